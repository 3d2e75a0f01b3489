"""All labels taken at their word: rows 3 and 4 of Xiao et al. (2015), Table 1."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nlhelpers import batches, losses, training
from nlhelpers.data import NoisyData
from nlhelpers.methods.clean_only import train_on_clean
from nlhelpers.models import Network
from nlhelpers.pretraining import pretrained
from nlhelpers.training import Event, Setup


def noisy_as_truth(data: NoisyData, setup: Setup) -> Iterator[Event]:
    """Train on clean and noisy labels alike, from random weights."""
    yield from train_on_all(data, setup, setup.build(data))


def noisy_as_truth_pretrained(data: NoisyData, setup: Setup) -> Iterator[Event]:
    """Train on clean and noisy labels alike, from a pretrained network."""
    network = yield from pretrained(data, setup)
    yield from train_on_all(data, setup, network)


def noisy_as_truth_after_clean(data: NoisyData, setup: Setup) -> Iterator[Event]:
    """Train on the clean labels, then on all of them.

    The baseline of the CIFAR-10 protocol in the authors' published code.
    """
    network = yield from train_on_clean(data, setup)
    yield from train_on_all(data, setup, network)


def train_on_all(data: NoisyData, setup: Setup, network: Network) -> Iterator[Event]:
    """Train a network in place, by cross-entropy on the clean and the noisy labels."""
    images = batches.joined(data.clean_images, data.images)
    labels = torch.cat([data.clean_labels, data.labels])

    def step(network: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        return losses.cross_entropy(network(images), labels[index]).mean()

    def epoch() -> Iterator[Tensor]:
        return batches.uniform(len(labels), setup.recipe.batch_size, setup.generator)

    def validate(network: nn.Module) -> float:
        return training.accuracy(network, data.val_images, data.val_labels)

    yield from training.fit(
        network, images, epoch, step, setup, validate, stage="noisy as truth"
    )
