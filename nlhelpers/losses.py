"""Losses as pure functions: one value per example, the caller reduces."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (logits (N, K), labels (N,)) -> (N,)
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], per example.

    Args:
        logits: (N, K), any float type.
        labels: (N,) int64 in 0 .. K - 1.

    Returns:
        (N,), in nats.
    """
    return F.cross_entropy(logits, labels, reduction="none")


@torch.compiler.substitute_in_graph(cross_entropy)
def compiled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`cross_entropy` for `torch.compile`, which makes two kernels of torch's version.

    The numbers are the same to the last bit, and so are those of the gradient.

    Args:
        logits: (N, K), any float type.
        labels: (N,) int64 in 0 .. K - 1.

    Returns:
        (N,), in nats.
    """
    nats = -logits.log_softmax(dim=1)
    return torch.where(is_label(logits, labels), nats, 0).sum(dim=1)


def one_vs_rest(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of K binary cross-entropies, each class against the others, per example.

    As in Ding et al. (2018), section 3.1, but for the weight of K - 1 on positives,
    which is ours: in balanced data they are K - 1 times rarer than negatives. So a
    classifier says yes where a class is more probable than 1 / K, not only from 1/2 on.

    Args:
        logits: (N, K); column k is the binary classifier of class k.
        labels: (N,) int64 in 0 .. K - 1.

    Returns:
        (N,), in nats.
    """
    num_classes = logits.shape[1]
    targets = F.one_hot(labels, num_classes).to(logits.dtype)
    weight = logits.new_tensor(num_classes - 1)
    terms = F.binary_cross_entropy_with_logits(
        logits, targets, reduction="none", pos_weight=weight
    )
    return terms.sum(dim=1)


def consistency(probs: Tensor, other_probs: Tensor) -> Tensor:
    """||z1 - z2||^2 of two predictions, per example (Ding et al. 2018, Eq. 1).

    Args:
        probs: (N, K), rows sum to 1.
        other_probs: (N, K), the second prediction or the ensemble's target.

    Returns:
        (N,), between 0 and 2.
    """
    return (probs - other_probs).square().sum(dim=1)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || softmax(logits)), per example.

    Args:
        logits: (N, K); log-probabilities are logits too.
        target: (N, K), rows sum to 1; entries may be 0.

    Returns:
        (N,), in nats.
    """
    log_p = logits.log_softmax(dim=1)
    return (torch.xlogy(target, target) - target * log_p).sum(dim=1)


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the values (N,) that are chosen, (N,) bool; at least one must be.

    Unlike `values[chosen].mean()` it has static shapes, which a compiled step needs.
    """
    return (values * chosen).sum() / chosen.sum()


# Losses that are said to tolerate noise. For the first three, Ding et al. (2018) quote
# the numbers that the program of Patrini et al. (2017) gave. There, y_k of the classes
# other than the label is 0; in the papers that the losses come from, it is -1.


def unhinged(logits: Tensor, labels: Tensor, others: float = 0.0) -> Tensor:
    """Mean of 1 - y_k o_k over the classes (van Rooyen et al. 2015), per example.

    Args:
        logits: o, (N, K).
        labels: (N,) int64 in 0 .. K - 1.
        others: y_k of the classes other than the label, whose own y_k is 1. With
            -1 / (K - 1), the sum over all labels is the same for all o.

    Returns:
        (N,), unbounded on both sides.
    """
    return (1 - signs(logits, labels, others) * logits).mean(dim=1)


def sigmoid(logits: Tensor, labels: Tensor, others: float = 0.0) -> Tensor:
    """Mean of 1 / (1 + exp(y_k o_k)) over the classes (Ghosh et al. 2015).

    Args:
        logits: o, (N, K).
        labels: (N,) int64 in 0 .. K - 1.
        others: as in `unhinged`. With -1, the sum over both labels of two classes is
            the same for all o.

    Returns:
        (N,), between 0 and 1.
    """
    return (-signs(logits, labels, others) * logits).sigmoid().mean(dim=1)


def savage(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of 1 / (1 + exp(2 y_k p_k))^2 (Masnadi-Shirazi and Vasconcelos 2008).

    Args:
        logits: (N, K), of which p is the softmax.
        labels: (N,) int64 in 0 .. K - 1; y_k is 1 for the label and 0 for the others.

    Returns:
        (N,), at most 1 / 4.
    """
    y = signs(logits, labels, 0.0)
    return (-2 * y * logits.softmax(dim=1)).sigmoid().square().mean(dim=1)


def signs(logits: Tensor, labels: Tensor, others: float) -> Tensor:
    """The y_k (N, K): 1 for the label and `others` for all other classes."""
    return torch.where(is_label(logits, labels), 1.0, others).to(logits.dtype)


def is_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Which class is the label, (N, K) bool; unlike a one-hot code, this fuses."""
    return labels[:, None] == torch.arange(logits.shape[1], device=logits.device)


def bootstrap_soft(logits: Tensor, labels: Tensor, beta: float = 0.95) -> Tensor:
    """-sum_k (beta y_k + (1 - beta) p_k) log p_k (Reed et al. 2015), per example.

    Args:
        logits: (N, K), of which p is the softmax; the target has gradients too.
        labels: (N,) int64 in 0 .. K - 1.
        beta: weight of the given label.

    Returns:
        (N,), in nats.
    """
    log_p = logits.log_softmax(dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    return beta * cross_entropy(logits, labels) + (1 - beta) * entropy


def bootstrap_hard(logits: Tensor, labels: Tensor, beta: float = 0.8) -> Tensor:
    """Cross-entropy: beta of the given label's plus 1 - beta of the predicted class's.

    Reed et al. (2015), section 3.2.

    Args:
        logits: (N, K).
        labels: (N,) int64 in 0 .. K - 1.
        beta: weight of the given label.

    Returns:
        (N,), in nats.
    """
    predicted = -logits.log_softmax(dim=1).amax(dim=1)
    return beta * cross_entropy(logits, labels) + (1 - beta) * predicted


def generalised_cross_entropy(logits: Tensor, labels: Tensor, q: float = 0.7) -> Tensor:
    """(1 - p_y^q) / q (Zhang and Sabuncu 2018, Eq. 6), per example.

    Args:
        logits: (N, K), of which p is the softmax.
        labels: (N,) int64 in 0 .. K - 1.
        q: in (0, 1]; towards 0 it is cross-entropy, at 1 the mean absolute error.

    Returns:
        (N,), between 0 and 1 / q.
    """
    return -torch.expm1(-q * cross_entropy(logits, labels)) / q


def symmetric_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 0.1,
    beta: float = 1.0,
    A: float = -4.0,
) -> Tensor:
    """Alpha times cross-entropy plus beta times its reverse (Wang et al. 2019, Eq. 7).

    The reverse, -sum_k p_k log y_k with A for log 0, is -A (1 - p_y). The paper's A is
    -4; the authors' code has log 0.0001, which is -9.2.

    Args:
        logits: (N, K), of which p is the softmax.
        labels: (N,) int64 in 0 .. K - 1.
        alpha: weight of cross-entropy.
        beta: weight of its reverse.
        A: below 0.

    Returns:
        (N,).
    """
    given = cross_entropy(logits, labels)
    return alpha * given + beta * A * torch.expm1(-given)


# Losses that are corrected by T (Patrini et al. 2017)

# Their program keeps probabilities above this. Here that is done where a term of the
# backward loss is negative: otherwise that loss has no lower bound.
SMALLEST = 1e-7


def forward(logits: Tensor, labels: Tensor, transition: Tensor) -> Tensor:
    """-log (p T)_y: cross-entropy of what the noise would make of p, per example.

    Theorem 2 of Patrini et al. (2017).

    Args:
        logits: (N, K), of which p is the softmax.
        labels: (N,) int64 in 0 .. K - 1, noisy.
        transition: T (K, K), rows sum to 1.

    Returns:
        (N,), in nats; infinite for a label that T never gives.
    """
    log_T = transition.to(logits).log()
    return -(logits.log_softmax(dim=1) + log_T.T[labels]).logsumexp(dim=1)


def backward(logits: Tensor, labels: Tensor, inverse: Tensor) -> Tensor:
    """Cross-entropies of all labels, weighted by a row of T^-1, per example.

    Theorem 1 of Patrini et al. (2017): its mean over noisy labels is the clean loss.

    Args:
        logits: (N, K).
        labels: (N,) int64 in 0 .. K - 1, noisy.
        inverse: T^-1 (K, K), as `noise.inverse` gives it.

    Returns:
        (N,), in nats; below 0 where T^-1 has negative entries.
    """
    weights = inverse.to(logits)[labels]
    nats = -logits.log_softmax(dim=1)
    bounded = nats.clamp(max=-math.log(SMALLEST))
    return (weights * torch.where(weights < 0, bounded, nats)).sum(dim=1)
