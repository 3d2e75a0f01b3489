"""Losses as pure functions: one value per example, the caller reduces."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], per example.

    Args:
        logits: (N, K), any float type.
        labels: (N,) int64 in 0 .. K - 1.

    Returns:
        (N,), in nats.
    """
    return F.cross_entropy(logits, labels, reduction="none")


def one_vs_rest(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of K binary cross-entropies, each class against the others, per example.

    Positives of a class are K - 1 times rarer than its negatives when the classes are
    balanced, so they weigh K - 1 times as much (Ding et al. 2018, section 3.1).

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
