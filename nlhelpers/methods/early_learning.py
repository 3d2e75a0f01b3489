"""Early-learning regularisation (Liu, Niles-Weed, Razavian and Fernandez-Granda 2020).

A network learns what is right before it learns wrong labels by heart. Its early
predictions for each image are therefore remembered in a running average, and a term
added to the cross-entropy rewards agreement with them. The gradient of this term
cancels that of a wrong label, and keeps that of a right one from fading.

Symbols: p = the network's probabilities, t = targets (the running averages of p),
beta = momentum of the targets, lam = weight of the term (lambda in the paper).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nlhelpers import losses, training
from nlhelpers.data import NoisyData
from nlhelpers.training import Event, Setup

# The authors' code keeps probabilities at least this far from 0 and 1.
SMALLEST = 1e-4


def early_learning(
    data: NoisyData, setup: Setup, *, lam: float = 3.0, beta: float = 0.7
) -> Iterator[Event]:
    """Train by cross-entropy plus lam * log(1 - <p, t>), on all noisy labels.

    The defaults are those of the authors' code for CIFAR-10 with symmetric noise; for
    asymmetric noise it has lam = 1 and beta = 0.9.

    Args:
        data: images with noisy labels.
        setup: network and recipe.
        lam: weight of the term; 0 leaves plain cross-entropy.
        beta: share of the old target in the new one, in [0, 1).
    """
    check(lam, beta)
    N, K = len(data.labels), data.num_classes
    t = torch.zeros(N, K, device=data.labels.device)

    def step(model: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        logits = model(images)
        p = probabilities(logits)
        with torch.no_grad():
            target = averaged(t[index], p, beta)
            t[index] = target
        given = losses.cross_entropy(logits, data.labels[index])
        return (given + lam * regulariser(p, target)).mean()

    yield from training.fit_noisy(setup.build(data), data, step, setup)


def probabilities(logits: Tensor) -> Tensor:
    """Softmax of the logits (N, K), kept away from 0 and 1, in float32."""
    return logits.float().softmax(dim=1).clamp(SMALLEST, 1 - SMALLEST)


def averaged(t: Tensor, p: Tensor, beta: float) -> Tensor:
    """The new targets: beta * t + (1 - beta) * p, with p (N, K) scaled to sum 1.

    They start at 0 and, as in the authors' code, are not scaled up to correct for that:
    the term has little weight until an image has been seen a few times.
    """
    return beta * t + (1 - beta) * p / p.sum(dim=1, keepdim=True)


def regulariser(p: Tensor, t: Tensor) -> Tensor:
    """log(1 - <p, t>), per example.

    Args:
        p: (N, K), between 1e-4 and 1 - 1e-4, so that 1 - <p, t> is above 0.
        t: (N, K), rows sum to at most 1.

    Returns:
        (N,), 0 or less.
    """
    return torch.log(1 - (p * t).sum(dim=1))


def check(lam: float, beta: float) -> None:
    """Raise ValueError unless both settings make sense."""
    if not 0 <= lam < math.inf:
        raise ValueError(f"lam is {lam!r}; it must be 0 or more")
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta!r}; it must be in [0, 1)")
