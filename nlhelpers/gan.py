"""The networks of the noisy-label game: one discriminator, two generators.

Adapted from DCGAN (Radford et al. 2016) by Chiaroni et al. (2019), section 3.1. Images
are float (N, C, H, W) in [-1, 1] in here, and bytes outside.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

WIDTHS = {1: (64, 128), 3: (64, 128, 256)}  # filters, by the channels of an image
HIDDEN = 1024  # units of the fully connected layers
NOISE = 100  # dimensions of z
SLOPE = 0.2  # of the leaky ReLU; it and the initial weights are DCGAN's
STD = 0.02
SPECTRAL = ("convolutions", "all")  # layers of D that are spectrally normalised


def to_unit(images: Tensor) -> Tensor:
    """Bytes (N, C, H, W) as floats in [-1, 1]."""
    return images.float().mul_(1 / 127.5).sub_(1)


def to_bytes(images: Tensor) -> Tensor:
    """Floats (N, C, H, W) in [-1, 1] as bytes: the inverse of `to_unit`."""
    return images.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


class Discriminator(nn.Sequential):
    """Two or three 3x3 convolutions of stride 2 and two linear layers: one logit.

    Convolutions are spectrally normalised (Miyato et al. 2018), and the linear layers
    too if asked for. There is no batch normalisation, since a batch here mixes four
    distributions. The hidden linear layer has dropout.
    """

    def __init__(
        self,
        shape: torch.Size,
        *,
        dropout: float = 0.5,
        spectral: str = "convolutions",
    ) -> None:
        """Build it for square images of `shape` (C, H, W), of 4 pixels or more.

        Args:
            shape: of one image.
            dropout: probability.
            spectral: which layers are spectrally normalised, one of SPECTRAL.
        """
        sides = halved(shape)
        channels = (shape[0], *WIDTHS[shape[0]])
        normal = normalisation(spectral)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(channels):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
            layers += [spectral_norm(started(convolution)), nn.LeakyReLU(SLOPE)]
        super().__init__(
            *layers,
            nn.Flatten(),
            normal(started(nn.Linear(channels[-1] * sides[-1] ** 2, HIDDEN))),
            nn.LeakyReLU(SLOPE),
            nn.Dropout(dropout),
            normal(started(nn.Linear(HIDDEN, 1))),
            nn.Flatten(0),
        )


class ImageGenerator(nn.Sequential):
    """The discriminator in reverse: from z (N, 100) to images (N, C, H, W).

    Batch normalisation follows every layer but the last, as in DCGAN. The paper names
    only the transposed convolutions; but if the linear layers have none, every z soon
    gives the same image.
    """

    def __init__(self, shape: torch.Size) -> None:
        """Build it for square images of `shape` (C, H, W), of 4 pixels or more."""
        sides = halved(shape)[::-1]
        channels = (*WIDTHS[shape[0]][::-1], shape[0])
        units = channels[0] * sides[0] ** 2
        layers: list[nn.Module] = []
        for (inputs, outputs), (small, large) in zip(
            itertools.pairwise(channels), itertools.pairwise(sides), strict=True
        ):
            padding = large - 2 * small + 1
            layers += [
                nn.ReLU(),
                started(
                    nn.ConvTranspose2d(
                        inputs, outputs, 3, stride=2, padding=1, output_padding=padding
                    )
                ),
                nn.BatchNorm2d(outputs),
            ]
        super().__init__(
            started(nn.Linear(NOISE, HIDDEN)),
            nn.BatchNorm1d(HIDDEN),
            nn.ReLU(),
            started(nn.Linear(HIDDEN, units)),
            nn.BatchNorm1d(units),
            nn.Unflatten(1, (channels[0], sides[0], sides[0])),
            *layers[:-1],
            nn.Tanh(),
        )


class Players(nn.Module):
    """D, G_P and G_N; asked for a prediction, D answers with logits of P and N."""

    def __init__(self, images: Tensor, spectral: str = "convolutions") -> None:
        """Build all three for images (N, C, H, W), on their device."""
        super().__init__()
        self.D = Discriminator(images.shape[1:], spectral=spectral)
        self.G_P = ImageGenerator(images.shape[1:])
        self.G_N = ImageGenerator(images.shape[1:])
        self.to(images.device, memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) uint8 to logits (N, 2): D says 0 for P and 1 for N."""
        logits = self.D(to_unit(images)).float()
        return torch.stack([torch.zeros_like(logits), logits], dim=1)

    @torch.no_grad()
    def generated(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Images (count, C, H, W) uint8 of each generator, in evaluation mode."""
        training = self.training
        self.eval()
        images = [
            torch.cat([to_bytes(G(z)) for z in noise(count, generator).split(1000)])
            for G in (self.G_P, self.G_N)
        ]
        self.train(training)
        return images[0], images[1]


def noise(count: int, generator: Generator) -> Tensor:
    """Random z (count, 100), uniform in [-1, 1], on the generator's device."""
    shape = count, NOISE
    return torch.rand(shape, generator=generator, device=generator.device) * 2 - 1


def halved(shape: torch.Size) -> list[int]:
    """The sides of an image, and of what each convolution makes of it.

    Raises:
        ValueError: unless the images are square, large enough, and grey or in colour.
    """
    channels, height, width = shape
    if height != width or height < 4 or channels not in WIDTHS:
        raise ValueError(
            f"images are {channels} x {height} x {width}; the noisy-label game takes "
            "square ones of 4 pixels or more, with 1 or 3 channels"
        )
    sides = [height]
    for _ in WIDTHS[channels]:
        sides.append(-(-sides[-1] // 2))
    return sides


def normalisation(name: str) -> Callable[[nn.Module], nn.Module]:
    """What is done to D's linear layers, or ValueError for a name not in SPECTRAL."""
    if name not in SPECTRAL:
        raise ValueError(f"spectral is {name!r}; allowed are {', '.join(SPECTRAL)}")
    return spectral_norm if name == "all" else nn.Identity()


def started(layer: nn.Module) -> nn.Module:
    """Give a layer DCGAN's initial weights, and return it."""
    nn.init.normal_(layer.weight, std=STD)
    nn.init.zeros_(layer.bias)
    return layer
