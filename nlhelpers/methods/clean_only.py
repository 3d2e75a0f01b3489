"""A small clean set and nothing else: rows 1 and 2 of Xiao et al. (2015), Table 1."""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor, nn

from nlhelpers import batches, losses, training
from nlhelpers.data import NoisyData
from nlhelpers.models import Network
from nlhelpers.pretraining import pretrained
from nlhelpers.training import Event, Setup


def clean_only(data: NoisyData, setup: Setup) -> Iterator[Event]:
    """Train on the clean images alone, from random weights."""
    yield from train_on_clean(data, setup)


def clean_only_pretrained(data: NoisyData, setup: Setup) -> Iterator[Event]:
    """Train on the clean images alone, from a pretrained network."""
    yield from train_on_clean(data, setup, start_pretrained=True)


def train_on_clean(
    data: NoisyData, setup: Setup, *, start_pretrained: bool = False
) -> Generator[Event, None, Network]:
    """Train on the clean labels by cross-entropy, from random or pretrained weights.

    An epoch has as many images as there are in all, so that all methods take the same
    number of steps; the clean images are repeated to fill it.

    Returns:
        The network.
    """
    check_clean_set(data)
    start = (yield from pretrained(data, setup)) if start_pretrained else None
    network = start or setup.build(data)

    def step(network: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        return losses.cross_entropy(network(images), data.clean_labels[index]).mean()

    yield from training.fit(
        network,
        data.clean_images,
        lambda: clean_batches(len(data.clean_labels), data, setup),
        step,
        setup,
        lambda network: training.accuracy(network, data.val_images, data.val_labels),
        stage="clean",
    )
    return network


def clean_batches(count: int, data: NoisyData, setup: Setup) -> Iterator[Tensor]:
    """Indices below `count` for as many steps as one pass over all images takes."""
    size = len(data.clean_labels) + len(data.labels)
    batch_size = min(setup.recipe.batch_size, size)
    index = batches.repeated(count, size - size % batch_size, setup.generator)
    return iter(index.split(batch_size))


def check_clean_set(data: NoisyData) -> None:
    """Raise ValueError if a class has no clean image to learn from."""
    counts = data.clean_labels.bincount(minlength=data.num_classes)
    if (counts == 0).any():
        absent = torch.nonzero(counts == 0).flatten().tolist()
        raise ValueError(
            f"the clean set of {len(data.clean_labels)} images has none of class "
            f"{', '.join(map(str, absent))}; it needs one of every class, so raise "
            "num_clean"
        )
