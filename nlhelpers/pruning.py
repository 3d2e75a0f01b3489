"""Rank Pruning: which binary labels to doubt (Northcutt, Wu and Chuang 2017).

Symbols: s = the label as given, y = the true one, both 1 or 0; P, N = the examples with
s = 1 and s = 0 (the paper writes them with a tilde); g = P(s=1|x), predicted by a
classifier that was trained on other examples; rho_1 = P(s=0|y=1), rho_0 = P(s=1|y=0);
pi_1 = P(y=0|s=1), pi_0 = P(y=1|s=0). All arrays are numpy's; s is (N,) bool.

This is Algorithm 1 as printed. The authors' program differs: it estimates the rates in
each fold and takes the mean, keeps at least ten examples of a label, and forces rates
that cannot be right into [0, 1), where this module raises an error.
"""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    StratifiedGroupKFold,
    StratifiedKFold,
    cross_val_predict,
)
from sklearn.utils import _safe_indexing, assert_all_finite, get_tags, indexable
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, has_fit_parameter

Splits = list[tuple[np.ndarray, np.ndarray]]


class Pruned(NamedTuple):
    """What `prune` finds.

    Attributes:
        rho_1: share of the examples truly 1 that are labelled 0.
        rho_0: share of the examples truly 0 that are labelled 1.
        pi_1: share of the examples labelled 1 that are truly 0.
        pi_0: share of the examples labelled 0 that are truly 1.
        kept: (N,) bool.
        weights: (N,), for the loss of those that are kept.
    """

    rho_1: float
    rho_0: float
    pi_1: float
    pi_0: float
    kept: np.ndarray
    weights: np.ndarray


def prune(
    g: np.ndarray,
    s: np.ndarray,
    rho_1: float | None = None,
    rho_0: float | None = None,
) -> Pruned:
    """Algorithm 1 from the held-out predictions on; a rate that is None is estimated.

    Args:
        g: (N,), in [0, 1].
        s: (N,) bool.
        rho_1: in [0, 1), if known.
        rho_0: in [0, 1), if known.

    Raises:
        ValueError: if g is not a probability, or if the rates cannot be right.
    """
    g = check_probabilities(g, len(s))
    if rho_1 is None or rho_0 is None:
        counted = noise_rates(g, s)
        rho_1 = counted[0] if rho_1 is None else rho_1
        rho_0 = counted[1] if rho_0 is None else rho_0
    pi_1, pi_0 = inverse_rates(s, rho_1, rho_0)
    kept = confident(g, s, pi_1, pi_0)
    return Pruned(rho_1, rho_0, pi_1, pi_0, kept, weights(s, rho_1, rho_0))


# Part 1: estimating noise rates


def noise_rates(g: np.ndarray, s: np.ndarray) -> tuple[float, float]:
    """rho_1 and rho_0 by confident counts: both below 1, as no denominator is 0.

    An example whose g is at least the mean g of P counts as y = 1; one whose g is at
    most the mean g of N counts as y = 0.

    Args:
        g: (N,).
        s: (N,) bool, with both labels.
    """
    LB = mean(g[s])  # of y = 1
    UB = mean(g[~s])  # of y = 0
    P_1, N_1 = np.sum(s & (g >= LB)), np.sum(~s & (g >= LB))
    P_0, N_0 = np.sum(s & (g <= UB)), np.sum(~s & (g <= UB))
    return float(N_1 / (N_1 + P_1)), float(P_0 / (P_0 + N_0))


def mean(values: np.ndarray) -> float:
    """Mean that rounding cannot take beyond the values, even if all are the same."""
    return float(np.clip(values.mean(), values.min(), values.max()))


def inverse_rates(s: np.ndarray, rho_1: float, rho_0: float) -> tuple[float, float]:
    """pi_1 and pi_0 by Bayes' rule: both in [0, 1).

    Raises:
        ValueError: if the rates sum to 1 or more, or if no true labels could have
            become these labels at these rates.
    """
    check_rates(rho_1, rho_0)
    p_s1 = s.mean()
    p_y1 = (p_s1 - rho_0) / (1 - rho_1 - rho_0)
    if not 0 < p_y1 < 1:
        raise ValueError(
            f"rho_1 is {rho_1:g} and rho_0 is {rho_0:g}, but a share of {p_s1:g} is "
            f"labelled 1; it must be between rho_0 and 1 - rho_1 = {1 - rho_1:g}. "
            "Correct the rates if you gave them; else the held-out predictions are "
            "too poor to estimate them, so change the classifier or give the rates"
        )
    pi_1 = rho_0 * (1 - p_y1) / p_s1
    pi_0 = rho_1 * p_y1 / (1 - p_s1)
    return float(pi_1), float(pi_0)


# Part 2: pruning inconsistent examples


def confident(g: np.ndarray, s: np.ndarray, pi_1: float, pi_0: float) -> np.ndarray:
    """Leave out a share pi_1 of P, least g first, and pi_0 of N, greatest g first.

    Returns:
        (N,) bool: which are kept, at least one of each label.
    """
    kept = np.empty(len(s), dtype=bool)
    kept[s] = all_but_least(g[s], pi_1)
    kept[~s] = all_but_least(-g[~s], pi_0)
    return kept


def all_but_least(scores: np.ndarray, share: float) -> np.ndarray:
    """Which scores stay if a `share` of them goes, the lowest first: (n,) bool.

    The number removed is rounded down. Equal scores all stay or all go, so fewer may
    go: where the paper cuts, what equals the threshold stays.
    """
    # A product of 0.29 and 100 may miss 29 by the last bit.
    k = min(math.floor(share * len(scores) + 1e-9), len(scores) - 1)
    return scores >= np.partition(scores, k)[k]


def weights(s: np.ndarray, rho_1: float, rho_0: float) -> np.ndarray:
    """1 / (1 - rho_1) for s = 1 and 1 / (1 - rho_0) for s = 0: (N,).

    A share of 1 - rho_1 of those truly 1 is in P; weighted, they count in full again.
    """
    return np.where(s, 1 / (1 - rho_1), 1 / (1 - rho_0))


# Held-out predictions


def splits(
    s: np.ndarray,
    folds: int,
    groups: np.ndarray | None = None,
    seed: int | np.random.RandomState | None = None,
) -> Splits:
    """Which examples to train on and which to hold out, by fold: pairs of indices.

    The labels are spread over the folds as evenly as possible.

    Args:
        s: (N,) bool.
        folds: at least 2.
        groups: (N,), such as copies of one image, which must not be divided.
        seed: for the order.

    Raises:
        ValueError: if there are too few examples or groups.
    """
    if not isinstance(folds, Integral) or folds < 2:
        raise ValueError(
            f"the number of folds is {folds!r}; it must be a whole number from 2 on"
        )
    single = np.arange(len(s)) if groups is None else np.asarray(groups)
    what = "examples" if groups is None else "groups"
    for label in (0, 1):
        count = len(np.unique(single[s == label]))
        if count < folds:
            raise ValueError(
                f"the number of folds is {folds}, but only {count} {what} have one of "
                "the two labels; every label needs as many as there are folds"
            )
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    found = kind(folds, shuffle=True, random_state=seed).split(s, s, groups)
    found = list(found)
    if any(s[train].all() or not s[train].any() for train, _ in found):
        raise ValueError(
            f"{folds} folds of whole groups leave a fold only one label to train on; "
            "use other folds or smaller groups"
        )
    return found


class RankPruning(ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """A classifier of two classes that leaves out the labels it doubts.

    Algorithm 1 of Northcutt, Wu and Chuang (2017) around any scikit-learn classifier.
    The greater class is the paper's 1.

    Attributes:
        classes_: (2,), sorted.
        rho_1_: share of the second class that is labelled as the first.
        rho_0_: share of the first class that is labelled as the second.
        pi_1_: share of wrong labels among those of the second class.
        pi_0_: share of wrong labels among those of the first class.
        kept_: (N,) bool, which examples the classifier was trained on.
        estimator_: that classifier.
    """

    def __init__(
        self, estimator=None, *, cv=3, rho_1=None, rho_0=None, random_state=None
    ) -> None:
        """Keep the settings.

        Args:
            estimator: has `predict_proba`, and a `fit` that takes `sample_weight`;
                None is LogisticRegression.
            cv: number of folds.
            rho_1: in [0, 1), if known; None estimates it.
            rho_0: in [0, 1), if known; None estimates it.
            random_state: for the folds.
        """
        self.estimator = estimator
        self.cv = cv
        self.rho_1 = rho_1
        self.rho_0 = rho_0
        self.random_state = random_state

    def fit(
        self,
        X: Sequence,
        y: Sequence,
        groups: Sequence | None = None,
        held_out: Sequence | None = None,
    ) -> "RankPruning":
        """Estimate the noise, prune, and train on the rest.

        Args:
            X: (N, ...), what the estimator takes.
            y: (N,), labels of two classes, as given.
            groups: (N,), examples that must stay in one fold, such as copies.
            held_out: (N,), probability of the second class by a classifier that never
                saw the example; None predicts it by cross-validation.

        Raises:
            ValueError: for invalid input, or if the noise rates cannot be right.
        """
        estimator = check_takes_weights(self._estimator())
        check_rates(self.rho_1 or 0, self.rho_0 or 0)
        y = column_or_1d(y, warn=True)
        assert_all_finite(y, input_name="y")
        X, y, groups = indexable(X, y, groups)
        check_classification_targets(y)
        self.classes_, s = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            raise ValueError(
                f"Only binary classification is supported: y has {len(self.classes_)} "
                f"classes, {self.classes_[:5].tolist()}; it must have two"
            )
        if held_out is None:
            cv = splits(s == 1, self.cv, groups, self.random_state)
            probs = cross_val_predict(estimator, X, y, cv=cv, method="predict_proba")
            held_out = probs[:, 1]
        elif groups is not None:
            raise ValueError("held_out is given, so groups have no use; leave one out")
        found = prune(held_out, s == 1, self.rho_1, self.rho_0)
        self.rho_1_, self.rho_0_, self.pi_1_, self.pi_0_, self.kept_, weight = found
        index = self.kept_.nonzero()[0]
        self.estimator_ = clone(estimator).fit(
            _safe_indexing(X, index), y[index], sample_weight=weight[index]
        )
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self.estimator_, name):
                setattr(self, name, getattr(self.estimator_, name))
        return self

    def predict(self, X: Sequence) -> np.ndarray:
        """Classes, (N,)."""
        check_is_fitted(self)
        return self.estimator_.predict(X)

    def predict_proba(self, X: Sequence) -> np.ndarray:
        """Probabilities of the classes in the order of `classes_`, (N, 2)."""
        check_is_fitted(self)
        return self.estimator_.predict_proba(X)

    def _estimator(self) -> BaseEstimator:
        return LogisticRegression() if self.estimator is None else self.estimator

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags = get_tags(self._estimator()).input_tags
        return tags


# Checks


def check_probabilities(g: Sequence, count: int) -> np.ndarray:
    """Return g as (N,) float64, or raise ValueError unless it holds probabilities."""
    g = np.asarray(g, dtype=np.float64)
    if g.shape != (count,):
        raise ValueError(
            f"the held-out predictions have shape {g.shape}; it must be ({count},), a "
            "probability of label 1 for every example"
        )
    bad = ~((g >= 0) & (g <= 1))
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(
            f"the held-out prediction of example {first} is {g[first]}; it must be a "
            "probability in [0, 1]"
        )
    return g


def check_rates(rho_1: float, rho_0: float) -> None:
    """Raise ValueError unless labels with these noise rates tell classes apart."""
    for name, value in (("rho_1", rho_1), ("rho_0", rho_0)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value!r}; it must be in [0, 1)")
    if rho_1 + rho_0 >= 1:
        raise ValueError(
            f"rho_1 is {rho_1:g} and rho_0 is {rho_0:g}; they must sum to less than 1, "
            "or the labels say nothing of the classes. Correct them if you gave them; "
            "else the held-out predictions are no better than guessing, so change the "
            "classifier or give the rates"
        )


def check_takes_weights(estimator: BaseEstimator) -> BaseEstimator:
    """Return the estimator, or raise ValueError unless it can weight examples."""
    if not has_fit_parameter(estimator, "sample_weight"):
        raise ValueError(
            f"estimator is {estimator!r}, whose fit takes no sample_weight; use a "
            "classifier that does, and put the steps of a pipeline before RankPruning"
        )
    return estimator
