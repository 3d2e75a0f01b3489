"""Co-teaching (Han, Yao, Yu, Niu, Xu, Hu, Tsang and Sugiyama 2018).

Networks learn what is right before they learn wrong labels by heart, so a label with a
small loss is probably right. Two networks see the same batches. In each batch, each of
them picks the images with the smallest loss, and its peer learns from these alone. As
the two make different errors, a wrong pick does not come back to the network that made
it.

Symbols: f, g = the two networks, D = a batch, R(T) = share of it that is picked, T =
epoch, T_k = epochs over which R falls, tau = share of wrong labels, by which R falls,
c = exponent of T.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nlhelpers import losses, training
from nlhelpers.data import NoisyData
from nlhelpers.models import Network
from nlhelpers.training import Event, Setup

PAPER_EPOCHS = 200  # T runs up to this, whatever the recipe's number of epochs


def co_teaching(
    data: NoisyData,
    setup: Setup,
    *,
    noise_rate: float = 0.2,
    ramp: float = 10 / 200,
    exponent: float = 1.0,
) -> Iterator[Event]:
    """Algorithm 1. The networks take their steps together, each with its own gradient.

    Only f is evaluated, since the paper's numbers are for single networks. The loss of
    an epoch is the sum over both. No label is judged for good, so there is no
    screening. The authors' code divides the mean loss of a pick by its size once more;
    here, as in the paper, it stays the mean.

    Args:
        data: images with noisy labels.
        setup: network and recipe.
        noise_rate: tau, the paper's epsilon. It must be known or estimated beforehand:
            the method does not learn it from the data. The default is the lowest of the
            paper's rates.
        ramp: T_k as a share of all epochs.
        exponent: c; the paper tries 0.5, 1 and 2.
    """
    check(noise_rate, ramp, exponent)
    pair = Pair(setup.build(data), setup.build(data))
    R = torch.ones((), device=data.labels.device)

    def step(pair: Pair, index: Tensor, images: Tensor) -> Tensor:
        labels = data.labels[index]
        loss_f = losses.cross_entropy(pair.f(images), labels)
        loss_g = losses.cross_entropy(pair.g(images), labels)
        D_f, D_g = small_loss(loss_f, R), small_loss(loss_g, R)
        return losses.mean_over(loss_f, D_g) + losses.mean_over(loss_g, D_f)

    for done in training.fit_noisy(pair, data, step, setup, stage="co-teaching"):
        yield done
        T = PAPER_EPOCHS * done.number / setup.recipe.epochs
        R.fill_(share_kept(T, noise_rate, PAPER_EPOCHS * ramp, exponent))


class Pair(nn.Module):
    """Two networks of the same kind; predictions come from the first."""

    def __init__(self, f: Network, g: Network) -> None:
        """Keep both networks."""
        super().__init__()
        self.f = f
        self.g = g

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) uint8 to logits (N, K) float32."""
        return self.f(images)


def share_kept(T: float, tau: float, T_k: float, c: float) -> float:
    """R(T) = 1 - tau min(T^c / T_k, 1) of section 4.2, which applies after T epochs.

    The first epoch thus keeps all images: Algorithm 1 updates R at the end of an epoch.
    """
    return 1 - tau * min(T**c / T_k, 1)


def small_loss(loss: Tensor, R: Tensor) -> Tensor:
    """Pick the images with the smallest loss that make up a share R of the batch.

    The paper keeps at least the share R, so a number of images that is not whole is
    rounded up (the authors' code rounds it down).

    Args:
        loss: (B,); equal losses are taken in order of position.
        R: scalar in (0, 1], on the same device.

    Returns:
        (B,) bool.
    """
    rank = loss.detach().argsort(stable=True).argsort()
    return rank < R * len(loss) - 1e-3  # R |D| may come out just above a whole number


def check(noise_rate: float, ramp: float, exponent: float) -> None:
    """Raise ValueError unless the settings make sense."""
    if not 0 <= noise_rate < 1:
        raise ValueError(f"noise_rate is {noise_rate!r}; it must be in [0, 1)")
    if not 0 < ramp <= 1:
        raise ValueError(f"ramp is {ramp!r}; it must be in (0, 1]")
    if not 0 < exponent < math.inf:
        raise ValueError(f"exponent is {exponent!r}; it must be more than 0")
