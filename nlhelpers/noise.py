"""Label noise: transition matrices, corruption, realised rates and estimates.

A transition matrix T (K, K) is row-stochastic: T[i, j] = p(noisy label j | true i).
A noise rate is the probability that a label is *changed*; symmetric noise spreads it
over the other K - 1 classes (some later code lets a label change into itself; this
does not).

Xiao et al. (2015) write it the other way round: their confusion matrix C (K, K) is
column-stochastic, C[i, j] = p(noisy label i | true j, and the label is confused). It
has a zero diagonal, since a confused label is a wrong one.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Which class turns into which, as class numbers. "asymmetric" is what the text of the
# source says; "asymmetric-swap" is the matrix printed in Ding et al. (2018), Figure 3.
PATHS: dict[str, dict[str, dict[int, int]]] = {
    "asymmetric": {
        # Ding et al. (2018), section 4.1: 2->7, 3->8, 5->6, 7->1.
        "mnist": {2: 7, 3: 8, 5: 6, 7: 1},
        "digits": {2: 7, 3: 8, 5: 6, 7: 1},
        # Patrini et al. (2017): truck->automobile, bird->airplane, deer->horse,
        # cat<->dog.
        "cifar10": {9: 1, 2: 0, 4: 7, 3: 5, 5: 3},
        # Zhang and Sabuncu (2018): boot->sneaker, sneaker->sandal, pullover->shirt,
        # coat<->dress.
        "fashion-mnist": {9: 7, 7: 5, 2: 6, 4: 3, 3: 4},
    },
    "asymmetric-swap": {
        # The same paths, but 5<->6 instead of 5->6.
        "mnist": {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
        "digits": {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
    },
}


def check_rate(noise_rate: float) -> float:
    """Return `noise_rate` as a float, or raise ValueError if it is outside [0, 1]."""
    number = isinstance(noise_rate, int | float) and not isinstance(noise_rate, bool)
    if not number or not 0.0 <= noise_rate <= 1.0:  # NaN fails the comparison too
        raise ValueError(
            f"noise_rate is {noise_rate!r}; it is the probability that a label is "
            "changed and must be a number in [0, 1]"
        )
    return float(noise_rate)


def check_transition(transition: Tensor, num_classes: int | None = None) -> Tensor:
    """Return T as float64, or raise ValueError if it is not row-stochastic.

    Args:
        transition: (K, K); every entry in [0, 1], every row summing to 1 within 1e-6.
        num_classes: the K that is expected; any K if None.
    """
    transition = torch.as_tensor(transition, dtype=torch.float64)
    if transition.ndim != 2 or transition.shape[0] != transition.shape[1]:
        shape = tuple(transition.shape)
        raise ValueError(f"transition has shape {shape}; it must be square (K, K)")
    if num_classes is not None and len(transition) != num_classes:
        raise ValueError(
            f"transition is for {len(transition)} classes, but the data have "
            f"{num_classes}"
        )
    bad = ~((transition >= 0) & (transition <= 1)).all(dim=1)
    bad |= ~((transition.sum(dim=1) - 1).abs() <= 1e-6)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"transition is not row-stochastic: row {row} is "
            f"{transition[row].tolist()} (sum {transition[row].sum():.6g}); entries "
            "must lie in [0, 1] and every row must sum to 1, since T[i, j] = "
            "p(noisy label j | true label i)"
        )
    return transition


def symmetric(noise_rate: float, num_classes: int) -> Tensor:
    """T (K, K) float64 that changes a label into any other class, at `noise_rate`."""
    rate = check_rate(noise_rate)
    transition = torch.full(
        (num_classes, num_classes), rate / (num_classes - 1), dtype=torch.float64
    )
    return transition.fill_diagonal_(1.0 - rate)


def asymmetric(noise_rate: float, paths: Mapping[int, int], num_classes: int) -> Tensor:
    """T (K, K) float64 that turns class a into paths[a], at `noise_rate`."""
    rate = check_rate(noise_rate)
    transition = torch.eye(num_classes, dtype=torch.float64)
    for source, target in paths.items():
        transition[source, source] = 1.0 - rate
        transition[source, target] = rate
    return transition


def pair_flip(noise_rate: float, num_classes: int) -> Tensor:
    """T (K, K) float64 that turns class k into k + 1 (the last into 0)."""
    paths = {k: (k + 1) % num_classes for k in range(num_classes)}
    return asymmetric(noise_rate, paths, num_classes)


def check_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Return labels (N,) int64, or raise ValueError if one is outside 0 .. K - 1."""
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; "
            "they must be a vector of whole numbers"
        )
    out_of_range = (labels < 0) | (labels >= num_classes)
    if out_of_range.any():
        where = int(out_of_range.nonzero()[0])
        raise ValueError(
            f"label {int(labels[where])} (example {where}) is out of range; "
            f"with {num_classes} classes, labels are 0 to {num_classes - 1}"
        )
    return labels.long()


def corrupt(labels: Tensor, transition: Tensor, generator: torch.Generator) -> Tensor:
    """Draw noisy labels (N,) int64 from the rows of T that `labels` (N,) name.

    Inverse-CDF sampling: one uniform number per label, all on the CPU, so that the
    noise of a seed is the same whatever device trains on it.

    Raises:
        ValueError: if T is not row-stochastic or a label is out of range.
    """
    transition = check_transition(transition)
    labels = check_labels(labels, len(transition))
    cumulative = transition.cumsum(dim=1)
    cumulative = (cumulative / cumulative[:, -1:])[:, :-1]  # sums are exactly 1
    uniform = torch.rand(len(labels), 1, generator=generator, dtype=torch.float64)
    return (uniform >= cumulative[labels]).sum(dim=1)


def confuse(
    images: Tensor, labels: Tensor, noise_rate: float, generator: torch.Generator
) -> Tensor:
    """Draw noisy labels (N,) int64 that depend on the image, not on its class alone.

    The half of the images that look most like another class, by their distance to the
    classes' mean images, gets three in four of the wrong labels, each of them that of
    the other class. (From a rate of 2/3 on, all of its labels are wrong.) In the
    clearer half, wrong labels are pure random. This noise is our own, for methods that
    ask which images are confusing (Xiao et al. 2015).

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, true, of at least two classes.
        noise_rate: probability that a label is changed, over both halves.
        generator: a CPU generator.
    """
    rate = check_rate(noise_rate)
    pixels = images.flatten(1).float()
    classes, own = labels.unique(return_inverse=True)
    means = torch.stack([pixels[labels == k].mean(dim=0) for k in classes])
    distances = torch.cdist(pixels, means)
    to_own = distances.gather(1, own[:, None]).squeeze(1)
    to_other, nearest = distances.scatter(1, own[:, None], math.inf).min(dim=1)
    confusing = (to_other - to_own).argsort(stable=True).argsort() < len(labels) / 2
    often = min(1.0, 1.5 * rate)
    chance = torch.where(confusing, often, 2 * rate - often)
    ahead = torch.randint(1, len(classes), labels.shape, generator=generator)
    wrong = classes[torch.where(confusing, nearest, (own + ahead) % len(classes))]
    changed = torch.rand(len(labels), generator=generator) < chance
    return wrong.where(changed, labels)


def realised_rate(noisy_labels: Tensor, true_labels: Tensor) -> float:
    """Share of labels that differ from the truth: what was drawn, not what was set."""
    return (noisy_labels != true_labels).double().mean().item()


def estimate_transition(
    noisy_labels: Tensor, true_labels: Tensor, num_classes: int
) -> Tensor:
    """T (K, K) float64 counted from pairs of labels; NaN in an absent class's row."""
    pairs = true_labels * num_classes + noisy_labels
    counts = torch.bincount(pairs, minlength=num_classes**2).double()
    counts = counts.view(num_classes, num_classes)
    return counts / counts.sum(dim=1, keepdim=True)


def anchor_transition(probs: Tensor, percentile: float = 97.0) -> Tensor:
    """T (K, K) float64 read off a network that has learnt the noisy labels.

    For an image that is surely of class i, the network predicts T[i] (Patrini et al.
    2017, Eq. 12 and 13). For each class, the image is taken whose probability of it is
    at the percentile; 100 takes the most probable one, which may be an outlier.

    Args:
        probs: P(noisy label | x), (N, K).
        percentile: in [0, 100].
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile is {percentile!r}; it must be in [0, 100]")
    probs = probs.double()
    place = math.floor(percentile / 100 * (len(probs) - 1))
    anchors = probs.argsort(dim=0, stable=True)[place]
    return probs[anchors] / probs[anchors].sum(dim=1, keepdim=True)


CONDITION = 1e6  # condition number of T at which its inverse says nothing


def inverse(transition: Tensor) -> Tensor:
    """T^-1 (K, K) float64; raises ValueError for a T that is as good as singular."""
    transition = transition.double()
    condition = torch.linalg.cond(transition).item()
    if not condition < CONDITION:
        raise ValueError(
            f"T has the condition number {condition:.3g}, so that its inverse says "
            f"nothing; it must be below {CONDITION:.0e}. Use forward correction, which "
            "needs no inverse, or another T"
        )
    return torch.linalg.inv(transition)


def random_confusion(
    noise_rate: float, num_classes: int, generator: torch.Generator
) -> Tensor:
    """T (K, K) float64 that changes a label to others in random, unequal shares.

    The noise of the CIFAR-10 protocol that the authors of Xiao et al. (2015) published
    with their code: uniform random numbers, normalised to the rate.
    """
    rate = check_rate(noise_rate)
    shape = (num_classes, num_classes)
    transition = torch.rand(shape, generator=generator, dtype=torch.float64)
    transition.fill_diagonal_(0.0)
    transition *= rate / transition.sum(dim=1, keepdim=True)
    return transition + (1.0 - rate) * torch.eye(num_classes, dtype=torch.float64)


def estimate_confusion(
    noisy_labels: Tensor, true_labels: Tensor, num_classes: int
) -> Tensor | None:
    """The C (K, K) that best explains pairs of labels (Xiao et al. 2015, Eq. 8-14).

    Wrong labels are pure random (each other class with probability 1 / (K - 1)) or
    confused (by C), whichever explains them better; C is chosen with that choice in
    mind. Per true class, it is enough to try how many of the most frequent wrong labels
    are confused (Eq. 12), and their shares are then the counted ones (Eq. 14). All of
    this is counting, sorting and sums: O(N + K^2) after the sort.

    Since Eq. 9 picks the better explanation for every label, it takes the rarer of two
    confusions for chance where there are few classes: with 6 classes, a label confused
    70 to 30 with two of them gives C = 1 for the first, however many pairs there are.

    Args:
        noisy_labels: (N,) int64.
        true_labels: (N,) int64.
        num_classes: K.

    Returns:
        C, float64, or None if no label is wrong. A true class without a wrong label
        tells nothing: its column is uniform over the other classes.
    """
    pairs = noisy_labels * num_classes + true_labels
    counts = torch.bincount(pairs, minlength=num_classes**2).double()
    m = counts.view(num_classes, num_classes).fill_diagonal_(0.0)
    if num_classes < 2 or not m.any():
        return None
    m, noisy = m.sort(dim=0, descending=True, stable=True)
    confused = m.cumsum(dim=0)  # labels of the k most frequent wrong classes
    # E of Eq. 10 with t and c of Eq. 12 and 14, for k = 1 .. K in the rows.
    explained = m.xlogy(m).cumsum(dim=0) - confused.xlogy(confused)
    random = (confused[-1] - confused) * math.log(1 / (num_classes - 1))
    k = (explained + random).argmax(dim=0)  # the first of equals: no zero counts
    place = torch.arange(num_classes, device=m.device)[:, None]
    shares = m.where(place <= k, 0.0) / confused.gather(0, k[None])
    confusion = torch.zeros_like(m).scatter_(0, noisy, shares)
    other = 1 - torch.eye(num_classes, dtype=m.dtype, device=m.device)
    return confusion.where(confused[-1] > 0, other / (num_classes - 1))


def check_confusion(confusion: Tensor, num_classes: int) -> Tensor:
    """Return C as float64, or raise ValueError if it cannot be a confusion matrix.

    Args:
        confusion: (K, K); entries in [0, 1], zero diagonal, columns sum to 1.
        num_classes: K.
    """
    confusion = torch.as_tensor(confusion, dtype=torch.float64)
    if confusion.shape != (num_classes, num_classes):
        raise ValueError(
            f"confusion has shape {tuple(confusion.shape)}; with {num_classes} classes "
            f"it must be ({num_classes}, {num_classes})"
        )
    if (confusion.diagonal() != 0).any():
        k = int((confusion.diagonal() != 0).nonzero()[0])
        raise ValueError(
            f"confusion has {confusion[k, k]:.6g} on its diagonal (class {k}); a "
            "confused label is a wrong one, so the diagonal must be zero"
        )
    bad = ~((confusion >= 0) & (confusion <= 1)).all(dim=0)
    bad |= ~((confusion.sum(dim=0) - 1).abs() <= 1e-6)
    if bad.any():
        k = int(bad.nonzero()[0])
        raise ValueError(
            f"confusion is not column-stochastic: column {k} sums to "
            f"{confusion[:, k].sum():.6g}; entries must lie in [0, 1] and every column "
            "must sum to 1, since C[i, j] = p(noisy label i | true label j)"
        )
    return confusion


NOISE_FREE, RANDOM, CONFUSING = range(3)  # z of Xiao et al. (2015), section 3


def noise_types(
    noisy_labels: Tensor, true_labels: Tensor, confusion: Tensor | None
) -> Tensor:
    """The z (N,) int64 of pairs of labels: NOISE_FREE, RANDOM or CONFUSING.

    A wrong label is confused where C explains it better than chance does (Xiao et al.
    2015, theorem 2). Without C there are no confused labels.
    """
    types = torch.full_like(noisy_labels, RANDOM)
    if confusion is not None:
        confusion = confusion.to(noisy_labels.device)
        explained = confusion[noisy_labels, true_labels] > 1 / (len(confusion) - 1)
        types[explained] = CONFUSING
    types[noisy_labels == true_labels] = NOISE_FREE
    return types


def accuracy_ceiling(transition: Tensor, class_shares: Tensor) -> float:
    """Best accuracy of a classifier that follows balanced noisy labels.

    Once the classes of the noisy labels are balanced, the most likely noisy label of a
    true class i is argmax_j T[i, j] / p(noisy j). Where that is not i, the whole class
    is lost, and more such labels do not help.

    Args:
        transition: T (K, K).
        class_shares: (K,), share of each true class, summing to 1.
    """
    transition = check_transition(transition)
    shares = class_shares.to(transition)
    noisy_shares = shares @ transition
    if (noisy_shares == 0).any():
        absent = int((noisy_shares == 0).nonzero()[0])
        raise ValueError(f"no label of class {absent} is left under this transition")
    winner = (transition / noisy_shares).argmax(dim=1)
    return shares[winner == torch.arange(len(shares))].sum().item()


def standard_error(rate: float, count: int) -> float:
    """Standard deviation of a realised rate over `count` independent labels."""
    return math.sqrt(rate * (1.0 - rate) / count)
