"""Joint optimisation of a network and its labels (Tanaka et al. 2018).

While its learning rate stays high, a network does not learn wrong labels by heart. Its
predictions are then right more often than the labels it was given, so after every epoch
they become the labels that it trains on. Two terms keep it from trivial solutions: one
from predicting a single class for all images, the other from labels that say nothing.
Finally a fresh network, the classifier, is trained on the labels found.

Symbols: y = labels as probabilities (N, K), s = the network's probabilities, p = shares
of the classes among all images (the prior), alpha, beta = weights of L_p and L_e.
"""

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlhelpers import losses, training
from nlhelpers.data import NoisyData
from nlhelpers.methods.two_stage import check_shares
from nlhelpers.models import Network
from nlhelpers.pretraining import pretrained
from nlhelpers.training import Auxiliary, Correction, Event, Recipe, Setup

LABELS = ("soft", "hard")
PRIORS = ("uniform", "given")


def joint_optimization(
    data: NoisyData,
    setup: Setup,
    *,
    alpha: float = 1.2,
    beta: float = 0.8,
    begin: float = 70 / 200,
    past: float = 10 / 200,
    labels: str = "soft",
    prior: str = "uniform",
    start_pretrained: bool = False,
) -> Iterator[Event]:
    """Find the labels in stage 1, train the classifier on them in stage 2.

    The defaults are the authors' for CIFAR-10 with symmetric noise; for asymmetric
    noise they use alpha = 0.8 and beta = 0.4. Each stage takes the recipe's epochs; the
    authors' have 200 and 120. They average predictions made during training; here the
    network predicts all images after the epoch, without dropout or augmentation.

    Args:
        data: images with noisy labels.
        setup: network and recipe; in stage 1 the learning rate never falls.
        alpha: weight of L_p.
        beta: weight of L_e.
        begin: share of the epochs after which labels are replaced for the first time.
        past: how many of the latest epochs' predictions are averaged, as a share of all
            epochs.
        labels: "soft" keeps the averaged probabilities, "hard" only the most probable
            class.
        prior: the shares p are "uniform", as the authors have them for CIFAR-10, or
            those of the labels as "given", for classes of different sizes.
        start_pretrained: whether both networks start pretrained, as for photographs.
    """
    check(alpha, beta, begin, past, labels, prior)
    start = (yield from pretrained(data, setup)) if start_pretrained else None
    y, p = one_hot(data.labels, data.num_classes), class_shares(data, prior)
    first, window = in_epochs(begin, setup), in_epochs(past, setup)
    recent: deque[Tensor] = deque(maxlen=window)

    def fresh() -> Network:
        return copy.deepcopy(start) if start_pretrained else setup.build(data)

    def joint(network: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        log_s = network(images).log_softmax(dim=1)
        fits = losses.divergence(log_s, y[index]) + beta * L_e(log_s)  # L_c + beta L_e
        return fits.mean() + alpha * L_p(log_s, p)

    def plain(network: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        return losses.divergence(network(images), y[index]).mean()

    network, steady = fresh(), replace(setup, recipe=constant_rate(setup.recipe))
    for done in training.fit_noisy(network, data, joint, steady, stage="stage 1"):
        yield Auxiliary(done)
        if done.number > first - window:
            recent.append(training.predict(network, data.images))
        if done.number >= first:
            y.copy_(averaged(recent, labels))
            yield Correction(y.argmax(dim=1))
    yield from training.fit_noisy(fresh(), data, plain, setup, stage="stage 2")


# The loss: L_c + alpha L_p + beta L_e, where L_c is KL(y || s)


def L_p(log_s: Tensor, p: Tensor) -> Tensor:
    """KL(p || mean of s over the batch); the batch stands in for all images.

    Args:
        log_s: (N, K), log-probabilities.
        p: (K,), sums to 1.

    Returns:
        A scalar, in nats; finite even where a class is never predicted.
    """
    log_mean = log_s.logsumexp(dim=0) - math.log(len(log_s))
    return (torch.xlogy(p, p) - p * log_mean).sum()


def L_e(log_s: Tensor) -> Tensor:
    """Entropy of s, per example: log-probabilities (N, K) to (N,), in nats."""
    return -(log_s.exp() * log_s).sum(dim=1)


def class_shares(data: NoisyData, prior: str) -> Tensor:
    """The prior p, (K,) float32: equal shares, or those of the labels as given."""
    counts = data.labels.bincount(minlength=data.num_classes).float()
    if prior == "uniform":
        counts.fill_(1.0)
    return counts / counts.sum()


# The labels


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (N,) int64 as probabilities (N, K) float32."""
    return F.one_hot(labels, num_classes).float()


def averaged(predictions: Iterable[Tensor], labels: str) -> Tensor:
    """The mean of predictions (N, K); for "hard" labels, one-hot at its largest."""
    mean = torch.stack(tuple(predictions)).mean(dim=0)
    return mean if labels == "soft" else one_hot(mean.argmax(dim=1), mean.shape[1])


# Epochs and settings


def in_epochs(share: float, setup: Setup) -> int:
    """A share of the recipe's epochs as a number, at least one."""
    return max(1, round(share * setup.recipe.epochs))


def constant_rate(recipe: Recipe) -> Recipe:
    """The recipe with a learning rate that never falls."""
    return replace(recipe, patience=recipe.epochs + 1, falls_after=())


def check(
    alpha: float, beta: float, begin: float, past: float, labels: str, prior: str
) -> None:
    """Raise ValueError for the first setting that makes no sense."""
    for name, weight in {"alpha": alpha, "beta": beta}.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight!r}; it must be 0 or more")
    check_shares(begin=begin, past=past)
    for name, value, allowed in (("labels", labels, LABELS), ("prior", prior, PRIORS)):
        if value not in allowed:
            choice = " and ".join(map(repr, allowed))
            raise ValueError(f"{name} is {value!r}; allowed are {choice}")
