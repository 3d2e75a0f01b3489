"""Pseudo-label (Lee 2013): row 1 of Ding et al. (2018), Table 4.

Semi-supervised learning with the clean set as the labelled images. All labels of the
noisy images are discarded; in every step the class that the network finds most probable
stands in for the label, with a weight that grows as training goes on.

Symbols: y = clean labels, y' = pseudo-labels, a(t) = weight of the images without a
label at time t, T1 and T2 = when it starts and stops rising, a_f = its final value.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nlhelpers import batches, losses, training
from nlhelpers.data import NoisyData
from nlhelpers.methods.clean_only import train_on_clean
from nlhelpers.methods.noise_model import mixed_batches
from nlhelpers.training import Event, Setup


def pseudo_label(
    data: NoisyData,
    setup: Setup,
    *,
    start_pretrained: bool = False,
    a_f: float = 3.0,
    T1: float = 0.1,
    T2: float = 0.6,
) -> Iterator[Event]:
    """Train on the clean images, then on all images with pseudo-labels.

    Lee draws 32 labelled and 256 unlabelled images for a step; here half of a batch is
    labelled, as in the two-stage method. The mean of each part is taken first, so that
    their sizes do not change what a(t) means.

    Args:
        data: images, whose noisy labels are ignored, and a clean set.
        setup: network and recipe, the same for all trainings.
        start_pretrained: whether the network starts pretrained, as in row 9.
        a_f: the final a(t).
        T1: time up to which a(t) is 0, as a share of the epochs. The paper has 100
            epochs; we know of no total and take it to be 1,000.
        T2: time from which a(t) is a_f; the paper has 600 epochs.
    """
    check(a_f, T1, T2)
    network = yield from train_on_clean(data, setup, start_pretrained=start_pretrained)
    images = batches.joined(data.clean_images, data.images)
    y, M = data.clean_labels, len(data.clean_labels)
    a = torch.zeros((), device=y.device)

    def step(network: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        logits = network(images)
        labelled = index < M
        target = torch.where(labelled, y[index.clamp(max=M - 1)], logits.argmax(dim=1))
        loss = losses.cross_entropy(logits, target)
        return losses.mean_over(loss, labelled) + a * losses.mean_over(
            loss, ~labelled
        )  # Eq. 15

    epochs = setup.recipe.epochs
    a.fill_(weight(0, a_f, T1, T2))
    for done in training.fit(
        network,
        images,
        lambda: mixed_batches(data, setup, clean_share=1 / 2),
        step,
        setup,
        lambda network: training.accuracy(network, data.val_images, data.val_labels),
        stage="pseudo-label",
    ):
        yield done
        a.fill_(weight(done.number / epochs, a_f, T1, T2))


def weight(t: float, a_f: float, T1: float, T2: float) -> float:
    """a(t) of Eq. 16: 0 before T1, a_f from T2 on, and linear in between."""
    if t < T1:
        return 0.0
    if t >= T2:
        return a_f
    return a_f * (t - T1) / (T2 - T1)


def check(a_f: float, T1: float, T2: float) -> None:
    """Raise ValueError unless a(t) is a weight that never falls."""
    if not 0 <= a_f < math.inf:
        raise ValueError(f"a_f is {a_f!r}; it must be 0 or more")
    if not 0 <= T1 <= 1:
        raise ValueError(f"T1 is {T1!r}; it must be in [0, 1]")
    if not T1 <= T2 <= 1:
        raise ValueError(f"T2 is {T2!r}; it must be in [T1, 1], and T1 is {T1!r}")
