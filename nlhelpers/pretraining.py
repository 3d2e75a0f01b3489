"""Networks that do not start from random weights.

Where torchvision has ImageNet weights, those are taken. The small networks have none;
they start from a stand-in that needs no labels either: telling by how much an image was
rotated (Gidaris et al. 2018).
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import torch
import torchvision
from torch import Tensor, nn

from nlhelpers import batches, losses, training
from nlhelpers.data import DataError, NoisyData
from nlhelpers.models import Network
from nlhelpers.training import Auxiliary, Setup

IMAGENET = {
    "alexnet": "AlexNet_Weights.IMAGENET1K_V1",
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
}


def pretrained(data: NoisyData, setup: Setup) -> Generator[Auxiliary, None, Network]:
    """A network for the data, with all layers but the last pretrained.

    Raises:
        DataError: if the ImageNet weights cannot be downloaded.
    """
    if setup.model in IMAGENET:
        return imagenet(data, setup)
    network = yield from rotation(data, setup)
    return network


def imagenet(data: NoisyData, setup: Setup) -> Network:
    """The network with torchvision's ImageNet weights (Deng et al. 2009)."""
    network = setup.build(data)
    published = torchvision.models.get_weight(IMAGENET[setup.model])
    try:
        weights = published.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"the ImageNet weights of {setup.model} could not be downloaded ({error}); "
            f"put {published.url.rpartition('/')[2]} into "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error
    transfer(weights, network.body[-1])
    return network


def rotation(data: NoisyData, setup: Setup) -> Generator[Auxiliary, None, Network]:
    """Train on all noisy images to tell turns of 0, 90, 180 and 270 degrees apart."""
    turner = setup.build(replace(data, num_classes=4))

    def turned(images: Tensor) -> tuple[Tensor, Tensor]:
        parts = images.tensor_split(4)
        labels = [torch.full((len(part),), k) for k, part in enumerate(parts)]
        turns = [part.rot90(k, (2, 3)) for k, part in enumerate(parts)]
        return torch.cat(turns), torch.cat(labels).to(images.device)

    def step(turner: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        images, labels = turned(images)
        return losses.cross_entropy(turner(images), labels).mean()

    def epoch() -> Iterator[Tensor]:
        size = setup.recipe.batch_size
        return batches.uniform(len(data.images), size, setup.generator)

    val_images, val_turns = turned(torch.cat(list(data.val_images.split(2000))))

    def validate(turner: nn.Module) -> float:
        return training.accuracy(turner, val_images, val_turns)

    images, stage = data.images, "rotation"
    for done in training.fit(turner, images, epoch, step, setup, validate, stage=stage):
        yield Auxiliary(done)
    network = setup.build(data)
    transfer(turner.body.state_dict(), network.body)
    return network


@dataclass(frozen=True)
class Begun(Setup):
    """A setup whose networks start from all but the last layer of another network."""

    start: Network

    def build(self, data: NoisyData, **perturbation) -> Network:
        """A network for the data, as from `Setup.build` except for its weights."""
        network = super().build(data, **perturbation)
        transfer(self.start.body.state_dict(), network.body)
        return network


def begun(
    data: NoisyData, setup: Setup, start_pretrained: bool
) -> Generator[Auxiliary, None, Setup]:
    """A setup whose networks start pretrained, if asked for; one is trained for all."""
    if not start_pretrained:
        return setup
    start = yield from pretrained(data, setup)
    return Begun(setup.model, setup.recipe, setup.generator, start)


def transfer(weights: dict[str, Tensor], body: nn.Module) -> None:
    """Load weights into all layers of the body but the last, which has its own task."""
    own = body.state_dict()
    linear = [n for n, layer in body.named_modules() if isinstance(layer, nn.Linear)]
    last = {f"{linear[-1]}.{kind}" for kind in ("weight", "bias")}
    others = {name: weights[name] for name in own if name not in last}
    body.load_state_dict(own | others)
