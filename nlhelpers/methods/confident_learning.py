"""Confident learning (Northcutt, Jiang and Chuang 2021): count, rank and prune.

Networks that never saw an image say how probable each class is for it. The image counts
towards a class if this probability is at least the average among images with that
label. How often the class and the label differ tells how many labels are wrong, and in
which direction. That many are left out, the most doubtful first, and a fresh network is
trained on the rest. With two classes this is Rank Pruning in another form
(`rank_pruning`).

Symbols: y_noisy, y_true = the label as given and the true one (in the paper y with a
tilde and with a star); p_hat = held-out probabilities; t = thresholds; C = confident
joint, Q = joint distribution of y_noisy (rows) and y_true (columns).
"""

from collections.abc import Generator, Iterator

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from nlhelpers import training
from nlhelpers.data import NoisyData
from nlhelpers.methods.rank_pruning import draw_seed, fit_on
from nlhelpers.pretraining import begun
from nlhelpers.training import Auxiliary, Event, Screening, Setup, Transition


def confident_learning(
    data: NoisyData,
    setup: Setup,
    *,
    folds: int = 4,
    prune_by: str = "noise-rate",
    start_pretrained: bool = False,
) -> Iterator[Event]:
    """Predict held-out images, prune their labels, train on the others.

    Args:
        data: images with noisy labels.
        setup: network and recipe, the same for every training.
        folds: number of networks, each predicting the images it was not trained on.
        prune_by: how the labels to prune are chosen, one of RULES.
        start_pretrained: whether all networks start from one trained without these
            labels.

    Raises:
        ValueError: if a class has too few labels for the folds, or would keep none.
    """
    check(data, folds, prune_by)
    device, y_noisy = data.labels.device, data.labels.cpu()
    setup = yield from begun(data, setup, start_pretrained)
    p_hat = yield from held_out(data, setup, folds)
    Q = joint(confident_joint(p_hat, y_noisy), y_noisy)
    kept = ~doubted(p_hat, y_noisy, Q, prune_by)
    check_kept(kept, y_noisy, Q)
    yield Transition(transition(Q))
    yield Screening(kept.to(device))
    weight = weights(Q)[y_noisy].float()
    # With a mean of 1 the learning rate means what it does in every other method.
    weight = (weight / weight[kept].mean()).to(device)
    model, index = setup.build(data), kept.nonzero().squeeze(1).to(device)
    yield from fit_on(index, weight, model, data, setup, "training")


def held_out(
    data: NoisyData, setup: Setup, folds: int
) -> Generator[Auxiliary, None, Tensor]:
    """For each fold in turn, train a network on the others and predict that fold.

    Returns:
        p_hat (N, K) float64, on the CPU.
    """
    device, y_noisy = data.labels.device, data.labels.cpu().numpy()
    p_hat = np.empty((len(y_noisy), data.num_classes))
    cut = StratifiedKFold(folds, shuffle=True, random_state=draw_seed(setup))
    alike = torch.ones(len(y_noisy), device=device)
    for number, (train, held) in enumerate(cut.split(y_noisy, y_noisy), start=1):
        model, index = setup.build(data), torch.from_numpy(train).to(device)
        stage = f"fold {number} of {folds}"
        for done in fit_on(index, alike, model, data, setup, stage):
            yield Auxiliary(done)
        images = data.images[torch.from_numpy(held).to(device)]
        p_hat[held] = training.predict(model, images).double().cpu().numpy()
    # All processes must prune the same labels, though their networks may round
    # differently.
    return torch.from_numpy(training.agreed(p_hat))


# Count: how many labels are wrong (section 3.1). All of this is on the CPU.


def thresholds(p_hat: Tensor, y_noisy: Tensor) -> Tensor:
    """Thresholds t (K,): mean probability of each class where it is the label (Eq. 2).

    Args:
        p_hat: (N, K).
        y_noisy: (N,) int64, in which every class occurs.
    """
    own = [p_hat[y_noisy == j, j] for j in range(p_hat.shape[1])]
    # Where all values are equal, rounding must not move the mean away from them.
    return torch.stack([p.mean().clamp(p.min(), p.max()) for p in own])


def confident_joint(p_hat: Tensor, y_noisy: Tensor) -> Tensor:
    """C (K, K) int64: number of images labelled i and confidently of class j (Eq. 1).

    If several classes reach their thresholds, the most probable one counts. Every row
    counts at least one image: of those with its label, the one most probably of that
    class reaches the threshold.

    Args:
        p_hat: (N, K).
        y_noisy: (N,) int64, in which every class occurs.
    """
    K = p_hat.shape[1]
    reached = p_hat >= thresholds(p_hat, y_noisy)
    likely = p_hat.masked_fill(~reached, -1).argmax(dim=1)
    counted = reached.any(dim=1)
    pairs = y_noisy[counted] * K + likely[counted]
    return pairs.bincount(minlength=K * K).view(K, K)


def joint(C: Tensor, y_noisy: Tensor) -> Tensor:
    """Q (K, K) float64: C with rows scaled to the label counts, sum 1 (Eq. 3).

    Args:
        C: (K, K), without a row of zeros.
        y_noisy: (N,) int64.
    """
    C, given = C.double(), y_noisy.bincount(minlength=len(C))
    return C / C.sum(dim=1, keepdim=True) * given[:, None] / len(y_noisy)


def transition(Q: Tensor) -> Tensor:
    """T (K, K): p(y_noisy | y_true), from Q (K, K)."""
    return (Q / Q.sum(dim=0)).T


# Rank and prune: which labels are wrong (section 3.2)


def by_class(p_hat: Tensor, y_noisy: Tensor, Q: Tensor) -> Tensor:
    """Doubt the least probable of each label, as many as are wrong (PBC): (N,) bool."""
    found = torch.zeros_like(y_noisy, dtype=torch.bool)
    for i, wrong in enumerate(len(y_noisy) * (Q.sum(dim=1) - Q.diagonal())):
        mark(found, (y_noisy == i).nonzero().squeeze(1), -p_hat[:, i], wrong)
    return found


def by_noise_rate(p_hat: Tensor, y_noisy: Tensor, Q: Tensor) -> Tensor:
    """For each i and j, doubt as many labels i as are truly j (PBNR): (N,) bool.

    Those with the greatest margin of j over i are doubted first.
    """
    found = torch.zeros_like(y_noisy, dtype=torch.bool)
    for i in range(len(Q)):
        own = (y_noisy == i).nonzero().squeeze(1)
        for j in range(len(Q)):
            if j != i:
                margin = p_hat[:, j] - p_hat[:, i]
                mark(found, own, margin, len(y_noisy) * Q[i, j])
    return found


def mark(found: Tensor, own: Tensor, doubt: Tensor, count: Tensor) -> None:
    """Set `found` at the `count` (rounded) indices of `own` with the greatest doubt."""
    found[own[doubt[own].topk(round(count.item())).indices]] = True


def both(p_hat: Tensor, y_noisy: Tensor, Q: Tensor) -> Tensor:
    """Doubt what both other rules doubt (C+NR): (N,) bool."""
    return by_class(p_hat, y_noisy, Q) & by_noise_rate(p_hat, y_noisy, Q)


RULES = ("noise-rate", "class", "both")


def doubted(p_hat: Tensor, y_noisy: Tensor, Q: Tensor, prune_by: str) -> Tensor:
    """Which labels to prune: (N,) bool.

    Args:
        p_hat: (N, K).
        y_noisy: (N,) int64.
        Q: (K, K).
        prune_by: one of RULES.
    """
    rule = {"noise-rate": by_noise_rate, "class": by_class, "both": both}[prune_by]
    return rule(p_hat, y_noisy, Q)


def weights(Q: Tensor) -> Tensor:
    """1 / p(y_noisy = k | y_true = k) of each class (K,), to make up for pruning."""
    return Q.sum(dim=0) / Q.diagonal()


# Bad input


def check(data: NoisyData, folds: int, prune_by: str) -> None:
    """Raise ValueError unless every class has a label in every fold."""
    if prune_by not in RULES:
        raise ValueError(f"prune_by is {prune_by!r}; allowed are {', '.join(RULES)}")
    if folds < 2:
        raise ValueError(f"folds is {folds!r}; it must be 2 or more")
    counts = data.labels.bincount(minlength=data.num_classes)
    if (counts < folds).any():
        k = int(counts.argmin())
        raise ValueError(
            f"folds is {folds}, but only {int(counts[k])} images are labelled {k}; "
            "every class needs as many as there are folds"
        )


def check_kept(kept: Tensor, y_noisy: Tensor, Q: Tensor) -> None:
    """Raise ValueError if no label of a class is believed."""
    counts = y_noisy[kept].bincount(minlength=len(Q))
    lost = (counts == 0) | (Q.diagonal() == 0)
    if lost.any():
        raise ValueError(
            f"every label of class {int(lost.int().argmax())} is doubted, so that "
            "nothing is left to learn it from; the held-out predictions are too poor, "
            "so change the network or train it longer"
        )
