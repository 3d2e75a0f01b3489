"""Cross-entropy on the labels as they are given: the baseline of every table."""

from collections.abc import Iterator

from torch import Tensor, nn

from nlhelpers import batches, losses, training
from nlhelpers.data import NoisyData
from nlhelpers.training import Event, Setup


def cross_entropy(data: NoisyData, setup: Setup) -> Iterator[Event]:
    """Train on all noisy labels; validate on noisy labels."""

    def step(model: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        return losses.cross_entropy(model(images), data.labels[index]).mean()

    def epoch() -> Iterator[Tensor]:
        size = setup.recipe.batch_size
        return batches.uniform(len(data.labels), size, setup.generator)

    def validate(model: nn.Module) -> float:
        return training.accuracy(model, data.val_images, data.val_labels)

    model, images, stage = setup.build(data), data.images, "training"
    yield from training.fit(model, images, epoch, step, setup, validate, stage=stage)
