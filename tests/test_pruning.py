"""Rank Pruning: rates and cuts by hand and by loops, folds, estimator, bad input."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import check_estimator

from nlhelpers import pruning
from nlhelpers.pruning import RankPruning

# Ties at both thresholds: LB = 5/8 and UB = 1/4 are themselves predictions.
P = [0.875, 0.75, 0.625, 0.25]
N = [0.125, 0.125, 0.25, 0.75, 0.0, 0.25]
G = np.array(P + N)
S = np.array([True] * 4 + [False] * 6)


def toy(seed, rho_1, rho_0, distance=2.0, n=20_000):
    """Two Gaussians in the plane: X, the true labels and the noisy ones."""
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=n)
    X = rng.normal(size=(n, 2)) + np.where(y == 1, distance, -distance)[:, None] / 2
    wrong = rng.random(n) < np.where(y == 1, rho_1, rho_0)
    return X, y, np.where(wrong, 1 - y, y)


def noisy(seed=0, n=60):
    """A few separable examples, of which every tenth is labelled wrong."""
    X = np.random.default_rng(seed).normal(size=(n, 2))
    X[:, 0] += np.sign(X[:, 0])
    s = X[:, 0] > 0
    s[::10] = ~s[::10]
    return X, s.astype(int)


# The mathematics


def test_by_hand():
    rho_1, rho_0 = pruning.noise_rates(G, S)
    assert (rho_1, rho_0) == pytest.approx((1 / 4, 1 / 6))
    # p_s1 = 2/5, so p_y1 = (2/5 - 1/6) / (1 - 1/4 - 1/6) = 2/5.
    pi_1, pi_0 = pruning.inverse_rates(S, rho_1, rho_0)
    assert (pi_1, pi_0) == pytest.approx((1 / 4, 1 / 6))
    found = pruning.prune(G, S)
    assert found[:4] == (rho_1, rho_0, pi_1, pi_0)
    assert (~found.kept).nonzero()[0].tolist() == [3, 7]  # 0.25 in P and 0.75 in N
    assert found.weights == pytest.approx([4 / 3] * 4 + [6 / 5] * 6)


def test_inverse_rates_by_counting():
    # Of 50 truly 1 a fifth is labelled 0; of 150 truly 0 a tenth is labelled 1.
    y = np.repeat([1, 0], [50, 150])
    s = np.r_[np.repeat([1, 0], [40, 10]), np.repeat([1, 0], [15, 135])] == 1
    pi_1, pi_0 = pruning.inverse_rates(s, 0.2, 0.1)
    assert pi_1 == pytest.approx((y[s] == 0).mean())
    assert pi_0 == pytest.approx((y[~s] == 1).mean())


def by_loops(g, s):
    """Algorithm 1 in plain Python: which examples go."""
    n, P, N = range(len(g)), [], []
    for i in n:
        (P if s[i] else N).append(i)
    LB, UB = sum(g[i] for i in P) / len(P), sum(g[i] for i in N) / len(N)
    counts = dict.fromkeys([(1, 1), (1, 0), (0, 1), (0, 0)], 0)  # (s, y)
    for i in n:
        if g[i] >= LB:
            counts[int(s[i]), 1] += 1
        if g[i] <= UB:
            counts[int(s[i]), 0] += 1
    rho_1 = counts[0, 1] / (counts[0, 1] + counts[1, 1])
    rho_0 = counts[1, 0] / (counts[1, 0] + counts[0, 0])
    p, rest = len(P) / len(g), 1 - rho_1 - rho_0
    pi_1 = rho_0 / p * (1 - p - rho_1) / rest
    pi_0 = rho_1 / (1 - p) * (p - rho_0) / rest
    gone = set()
    for i in P:
        if sum(g[j] <= g[i] for j in P) <= pi_1 * len(P) + 1e-9:
            gone.add(i)
    for i in N:
        if sum(g[j] >= g[i] for j in N) <= pi_0 * len(N) + 1e-9:
            gone.add(i)
    return gone


@pytest.mark.parametrize("levels", [8, 64, 2**20])  # few levels make many ties
@pytest.mark.parametrize("seed", range(5))
def test_the_same_as_plain_loops(levels, seed):
    rng = np.random.default_rng(seed)
    s = rng.random(200) < 0.4
    g = np.where(s, rng.beta(2, 1, 200), rng.beta(1, 3, 200))
    g = np.floor(g * levels) / levels  # sums of these are exact in any order
    kept = pruning.prune(g, s).kept
    gone = set((~kept).nonzero()[0].tolist())
    assert gone and gone == by_loops(g.tolist(), s.tolist())


@pytest.mark.parametrize(("pi_1", "pi_0"), [(0.0, 0.3), (0.29, 0.0), (0.999, 0.257)])
def test_so_many_are_pruned(pi_1, pi_0):
    rng = np.random.default_rng(0)
    s, g = np.arange(300) < 100, rng.random(300)
    kept = pruning.confident(g, s, pi_1, pi_0)
    assert (~kept[s]).sum() == {0.0: 0, 0.29: 29, 0.999: 99}[pi_1]
    assert (~kept[~s]).sum() == {0.0: 0, 0.3: 60, 0.257: 51}[pi_0]
    assert g[s & ~kept].max(initial=0) < g[s & kept].min()
    assert g[~s & ~kept].min(initial=1) > g[~s & kept].max()


def test_what_ties_at_the_cut_stays():
    g, s = np.array([0.1, 0.2, 0.2, 0.2, 0.9, 0.9]), np.arange(6) < 5
    for pi_1, gone in [(0.2, [0]), (0.4, [0]), (0.6, [0]), (0.8, [0, 1, 2, 3])]:
        kept = pruning.confident(g, s, pi_1, 0.0)
        assert (~kept).nonzero()[0].tolist() == gone
    assert pruning.confident(np.full(6, 0.1), s, 0.9, 0.9).all()


def test_both_labels_are_treated_alike():
    found, mirrored = pruning.prune(G, S), pruning.prune(1 - G, ~S)
    assert (found.rho_1, found.pi_1) == (mirrored.rho_0, mirrored.pi_0)
    assert (found.rho_0, found.pi_0) == (mirrored.rho_1, mirrored.pi_1)
    assert np.array_equal(found.kept, mirrored.kept)
    assert np.array_equal(found.weights, mirrored.weights)


def test_known_rates_are_respected():
    assert pruning.prune(G, S, rho_1=0.0, rho_0=0.0).kept.all()
    found = pruning.prune(G, S, rho_0=0.0)
    assert (found.rho_1, found.rho_0, found.pi_1) == (0.25, 0.0, 0.0)
    found = pruning.prune(G, S, rho_1=0.0)
    assert (found.rho_1, found.pi_0) == (0.0, 0.0)
    assert found.rho_0 == pytest.approx(1 / 6)


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("count", [3, 10, 49])
def test_a_mean_is_never_beyond_its_values(value, count):
    assert pruning.mean(np.full(count, value)) == value


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((1.0, 0.0), r"rho_1 is 1\.0; it must be in \[0, 1\)"),
        ((0.0, -0.1), r"rho_0 is -0\.1; it must be in \[0, 1\)"),
        ((float("nan"), 0.0), "rho_1 is nan"),
        ((0.6, 0.4), r"rho_1 is 0\.6 and rho_0 is 0\.4; they must sum to less than 1"),
        ((0.1, 0.5), r"share of 0\.4 is labelled 1; it must be between rho_0 and"),
        ((0.1, 0.4), r"share of 0\.4 is labelled 1"),
        ((0.7, 0.1), r"share of 0\.4 is labelled 1; .* 1 - rho_1 = 0\.3"),
    ],
)
def test_impossible_rates(rates, message):
    with pytest.raises(ValueError, match=message):
        pruning.prune(G, S, *rates)


def test_predictions_that_say_nothing():
    with pytest.raises(ValueError, match=r"rho_1 is 0\.6 and rho_0 is 0\.4; they must"):
        pruning.prune(np.full(10, 0.1), S)
    with pytest.raises(ValueError, match=r"no better than guessing, so change the"):
        pruning.prune(1 - G, S)


@pytest.mark.parametrize("bad", [float("nan"), -0.1, 1.5, float("inf")])
def test_predictions_that_are_no_probabilities(bad):
    g = G.copy()
    g[7] = bad
    with pytest.raises(ValueError, match=f"prediction of example 7 is {bad}; it must"):
        pruning.prune(g, S)


# Folds


def test_groups_are_never_divided_and_labels_are_spread():
    rng = np.random.default_rng(0)
    groups = rng.integers(30, size=600)
    s = (groups % 3 == 0) ^ (rng.random(600) < 0.1)
    parts = pruning.splits(s, 3, groups, 0)
    for train, held in parts:
        assert not set(groups[train]) & set(groups[held])
        assert s[held].mean() == pytest.approx(s.mean(), abs=0.1)
    assert sorted(np.concatenate([held for _, held in parts])) == list(range(600))


def test_folds_depend_on_the_seed_alone():
    s = np.arange(90) % 3 == 0
    for groups in (None, np.arange(90) // 2):
        first, again, other = (pruning.splits(s, 3, groups, seed) for seed in (0, 0, 1))
        assert all(map(np.array_equal, first[0], again[0]))
        assert not np.array_equal(first[0][1], other[0][1])


@pytest.mark.parametrize("folds", [1, 2.5, "3", None])
def test_bad_number_of_folds(folds):
    with pytest.raises(ValueError, match=f"folds is {folds!r}; it must be a whole"):
        pruning.splits(S, folds)


def test_too_few_for_the_folds():
    with pytest.raises(ValueError, match="folds is 5, but only 4 examples have one of"):
        pruning.splits(S, 5)
    with pytest.raises(ValueError, match="folds is 3, but only 2 groups have one of"):
        pruning.splits(S, 3, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    with pytest.raises(ValueError, match="folds is 2, but only 0 examples"):
        pruning.splits(np.ones(4, dtype=bool), 2)


def test_groups_that_take_a_label_with_them():
    # Two groups have label 1, and the folds are most even with both in one of them.
    s, groups = np.arange(50) < 20, np.repeat([0, 1, 2], [10, 25, 15])
    with pytest.raises(ValueError, match="leave a fold only one label to train on"):
        pruning.splits(s, 2, groups, 0)


# The estimator


@pytest.mark.parametrize(("rho_1", "rho_0"), [(0.3, 0.2), (0.0, 0.3), (0.4, 0.0)])
def test_estimated_rates_are_near_the_truth(rho_1, rho_0):
    X, y, s = toy(0, rho_1, rho_0, distance=3.0)
    model = RankPruning(random_state=0).fit(X, s)
    assert model.rho_1_ == pytest.approx(rho_1, abs=0.03)
    assert model.rho_0_ == pytest.approx(rho_0, abs=0.03)
    assert model.pi_1_ == pytest.approx((y[s == 1] == 0).mean(), abs=0.03)
    assert model.pi_0_ == pytest.approx((y[s == 0] == 1).mean(), abs=0.03)
    assert (s == y)[model.kept_].mean() > 0.95


def test_it_beats_what_learns_from_all_labels():
    X, _, s = toy(0, 0.5, 0.1, distance=1.5, n=5000)
    X_test, y_test, _ = toy(1, 0, 0, distance=1.5)
    plain = LogisticRegression().fit(X, s).score(X_test, y_test)
    pruned = RankPruning(random_state=0).fit(X, s).score(X_test, y_test)
    best = LogisticRegression().fit(X_test, y_test).score(X_test, y_test)
    assert pruned > plain + 0.1
    assert pruned > best - 0.01


class Noted(LogisticRegression):
    """Remembers what it was last fitted to."""

    def fit(self, X, y, sample_weight=None):
        self.noted_ = X, y, sample_weight
        return super().fit(X, y, sample_weight=sample_weight)


def test_the_rest_is_weighted():
    X, s = noisy()
    model = RankPruning(Noted(), rho_1=0.2, rho_0=0.1, random_state=0).fit(X, s)
    assert (model.rho_1_, model.rho_0_) == (0.2, 0.1)
    kept_X, kept_s, weight = model.estimator_.noted_
    assert 0 < (~model.kept_).sum() < len(s)
    assert np.array_equal(kept_X, X[model.kept_])
    assert np.array_equal(kept_s, s[model.kept_])
    assert weight == pytest.approx(np.where(kept_s == 1, 1 / 0.8, 1 / 0.9))
    probs = model.predict_proba(X)
    assert np.array_equal(model.predict(X), probs.argmax(axis=1))


def test_known_rates_decide_how_many_are_pruned():
    X, _, s = toy(0, 0.3, 0.2, n=1000)
    known = {"rho_1": 0.1, "rho_0": 0.4}
    model = RankPruning(**known, random_state=0).fit(X, s)
    pi_1, pi_0 = pruning.inverse_rates(s == 1, **known)
    assert (model.pi_1_, model.pi_0_) == (pi_1, pi_0)
    gone = ~model.kept_
    assert gone[s == 1].sum() == int(pi_1 * (s == 1).sum())
    assert gone[s == 0].sum() == int(pi_0 * (s == 0).sum())


def test_any_two_labels():
    X, s = noisy()
    names = np.array(["cat", "dog"])
    model, named = RankPruning(random_state=0), RankPruning(random_state=0)
    model.fit(X, s), named.fit(X, names[s])
    assert named.classes_.tolist() == ["cat", "dog"]
    assert np.array_equal(model.kept_, named.kept_)
    assert np.array_equal(names[model.predict(X)], named.predict(X))
    assert named.score(X, names[s]) == model.score(X, s)


def test_the_same_seed_gives_the_same_model():
    X, _, s = toy(0, 0.3, 0.2, n=500)
    models = [RankPruning(random_state=seed).fit(X, s) for seed in (0, 0, 1)]
    first, again, other = (model.estimator_.coef_.tolist() for model in models)
    assert first == again != other


def test_what_is_held_out_already_is_not_predicted_again():
    fits = []

    class Counted(LogisticRegression):
        def fit(self, X, y, sample_weight=None):
            fits.append(len(y))
            return super().fit(X, y, sample_weight=sample_weight)

    X = np.c_[G, G]
    model = RankPruning(Counted()).fit(X, S, held_out=G.tolist())
    assert fits == [8] and (~model.kept_).nonzero()[0].tolist() == [3, 7]


def test_copies_in_other_folds_would_hide_the_noise():
    X, s = noisy()
    X, s, groups = np.repeat(X, 5, 0), np.repeat(s, 5), np.repeat(np.arange(60), 5)
    tree = DecisionTreeClassifier(random_state=0)
    blind = RankPruning(tree, random_state=0).fit(X, s)
    assert blind.kept_.all()  # the tree knows every label by heart
    model = RankPruning(tree, random_state=0).fit(X, s, groups=groups)
    assert min(model.rho_1_, model.rho_0_) > 0.05
    assert not model.kept_.all()


def test_it_is_a_scikit_learn_estimator():
    # With known rates, as most of the checks fit labels without any meaning.
    results = check_estimator(
        RankPruning(rho_1=0.1, rho_0=0.1, random_state=0), on_skip=None, on_fail=None
    )
    failed = [r["check_name"] for r in results if r["status"] == "failed"]
    assert len(results) > 40 and not failed
    model = clone(RankPruning(Noted(C=2.0), cv=4))
    assert model.cv == 4 and model.get_params()["estimator__C"] == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cv": 1}, "number of folds is 1; it must be"),
        ({"cv": 40}, "number of folds is 40, but only"),
        ({"rho_1": 1.0}, r"rho_1 is 1\.0; it must be in"),
        ({"rho_0": -0.2}, r"rho_0 is -0\.2; it must be in"),
        ({"rho_1": 0.5, "rho_0": 0.5}, "they must sum to less than 1"),
        ({"estimator": KNeighborsClassifier()}, "KNeighborsClassifier.* sample_weight"),
    ],
)
def test_bad_settings(settings, message):
    X, s = noisy()
    with pytest.raises(ValueError, match=message):
        RankPruning(**settings).fit(X, s)


def test_bad_data():
    X, s = noisy()
    with pytest.raises(ValueError, match=r"y has 1 classes, \[0\]; it must have two"):
        RankPruning().fit(X, 0 * s)
    with pytest.raises(ValueError, match=r"y has 3 classes, \[0, 1, 2\]; it must have"):
        RankPruning().fit(X, np.r_[2, s[1:]])
    with pytest.raises(ValueError, match=r"shape \(60, 2\); it must be \(60,\)"):
        RankPruning().fit(X, s, held_out=np.full((60, 2), 0.5))
    with pytest.raises(ValueError, match="prediction of example 0 is nan"):
        RankPruning().fit(X, s, held_out=np.full(60, np.nan))
    with pytest.raises(ValueError, match="held_out is given, so groups have no use"):
        RankPruning().fit(X, s, groups=s, held_out=s)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        RankPruning().fit(X, s, groups=s[1:])
