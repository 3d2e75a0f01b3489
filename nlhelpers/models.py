"""The papers' networks. Every one takes uint8 images and gives float32 logits."""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class GaussianNoise(nn.Module):
    """Adds N(0, std^2) to its input while training; std 0 leaves it alone."""

    def __init__(self, std: float) -> None:
        """Keep `std`, in units of the normalised input."""
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """Return x, or x plus noise."""
        if self.training and self.std > 0:
            return x + self.std * torch.randn_like(x)
        return x

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"std={self.std}"


class Dropout(nn.Dropout):
    """`nn.Dropout`, faster on a CPU: its draws are a fifth of a small network's step.

    A unit is kept if a number from [0, 1) with 53 bits is below 1 - p. torch 2.15 draws
    and compares them one by one; drawing all and then comparing gives the same units in
    two thirds of the time. Other devices draw as torch does.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x, or in training x with some units at 0 and the others scaled up."""
        if not (self.training and 0 < self.p < 1 and x.device.type == "cpu"):
            return super().forward(x)
        draws = torch.rand(x.shape, dtype=torch.float64, device=x.device)
        return x * draws.lt_(1 - self.p).to(x.dtype).div_(1 - self.p)


class Network(nn.Module):
    """Normalises uint8 images, perturbs them, and runs a body in the body's layout.

    Normalising inside the network keeps the data set as bytes on the device and makes
    every prediction, wherever it is asked for, use the same mean.
    """

    def __init__(self, body: nn.Module, mean: Tensor, noise_std: float = 0.0) -> None:
        """Wrap `body`.

        Args:
            body: takes float images (N, C, H, W), gives logits (N, K).
            mean: (C, H, W), mean of each pixel over the training images, 0 to 255.
            noise_std: of the Gaussian noise layer; 1 is the full range of a pixel.
        """
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.noise = GaussianNoise(noise_std)
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) uint8 to logits (N, K) float32."""
        x = images.float().sub_(self.mean).mul_(1 / 255)
        return self.body(self.noise(x)).float()


class MLP(nn.Sequential):
    """Fully connected: inputs-128-128-K, ReLU, dropout (Patrini et al. 2017)."""

    def __init__(
        self, inputs: int, num_classes: int, dropout: float = 0.2, width: int = 128
    ) -> None:
        """Build it with He-normal weights and zero biases."""
        super().__init__(
            nn.Flatten(),
            nn.Linear(inputs, width),
            nn.ReLU(inplace=True),
            Dropout(dropout),
            nn.Linear(width, width),
            nn.ReLU(inplace=True),
            Dropout(dropout),
            nn.Linear(width, num_classes),
        )
        he_normal(self)


class ResidualUnit(nn.Module):
    """conv-BN-ReLU-dropout-conv-BN plus the input (He et al. 2016; Ding et al. 2018).

    The shortcut has no parameters: where the shape changes it takes every second pixel
    and fills the new channels with zeros (He et al.'s option A).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        """Build one unit of `inputs` to `outputs` channels."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(self.dropout(y)))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(x + y, inplace=True)


class ResNet(nn.Sequential):
    """6n + 2 layers for small images, widths 16-32-64 (He et al. 2016, section 4.2).

    Ding et al. (2018) take theirs from Patrini et al. (2017), whose present program
    normalises before a convolution and has shortcuts with 1 x 1 convolutions.
    """

    def __init__(
        self, channels: int, num_classes: int, n: int = 2, dropout: float = 0.0
    ) -> None:
        """Build it with He-normal weights; n = 2 is the 14-layer network."""
        units = []
        for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
            stride = outputs // inputs
            units.append(ResidualUnit(inputs, outputs, stride, dropout))
            units += [ResidualUnit(outputs, outputs, 1, dropout) for _ in range(n - 1)]
        super().__init__(
            nn.Conv2d(channels, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            *units,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, num_classes),
        )
        he_normal(self)


class Scale(nn.Module):
    """Multiplies by a constant, for networks that expect pixels in other units."""

    def __init__(self, factor: float) -> None:
        """Keep `factor`."""
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return factor * x."""
        return self.factor * x


# torchvision's networks expect pixels in units of ImageNet's standard deviation.
IMAGENET_SCALE = 1 / 0.226


class CaffeQuick(nn.Sequential):
    """Caffe's "CIFAR-10 quick": three 5x5 convolutions and two linear layers.

    Widths 32-32-64-64-K, Gaussian weights of the published standard deviations, pixels
    from 0 to 255 minus their mean (Jia et al. 2014; used by the code that the authors
    of Xiao et al. 2015 published).
    """

    def __init__(self, shape: torch.Size, num_classes: int) -> None:
        """Build it for images of `shape` (C, H, W), of 16 pixels or more."""
        if min(shape[1:]) < 16:
            raise ValueError(
                f"caffe-quick takes images of 16 pixels or more, not {tuple(shape[1:])}"
            )

        def pool(kind: type) -> nn.Module:  # Caffe rounds sizes up
            return kind(3, stride=2, ceil_mode=True)

        height, width = (side // 8 for side in shape[1:])
        super().__init__(
            Scale(255.0),
            nn.Conv2d(shape[0], 32, 5, padding=2),
            pool(nn.MaxPool2d),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 5, padding=2),
            nn.ReLU(inplace=True),
            pool(nn.AvgPool2d),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(inplace=True),
            pool(nn.AvgPool2d),
            nn.Flatten(),
            nn.Linear(64 * height * width, 64),
            nn.Linear(64, num_classes),
        )
        layers = [x for x in self if isinstance(x, nn.Conv2d | nn.Linear)]
        for layer, std in zip(layers, (1e-4, 0.01, 0.01, 0.1, 0.1), strict=True):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


class DeepMnist(nn.Sequential):
    """Two 5x5 convolutions and two linear layers, widths 32-64-1024-K.

    The classifier of Chiaroni et al. (2019): the network of TensorFlow's tutorial "Deep
    MNIST for experts", each convolution followed by ReLU and 2x2 max-pooling.
    """

    def __init__(self, shape: torch.Size, num_classes: int, dropout: float) -> None:
        """Build it for images of `shape` (C, H, W), of 4 pixels or more."""
        if min(shape[1:]) < 4:
            raise ValueError(
                f"deep-mnist takes images of 4 pixels or more, not {tuple(shape[1:])}"
            )
        height, width = (side // 4 for side in shape[1:])
        super().__init__(
            nn.Conv2d(shape[0], 32, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * height * width, 1024),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(1024, num_classes),
        )
        for layer in self:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)
                nn.init.constant_(layer.bias, 0.1)


def he_normal(module: nn.Module) -> None:
    """Draw every weight matrix and kernel from N(0, 2 / fan_in); biases become 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def mlp(shape: torch.Size, num_classes: int, dropout: float | None) -> MLP:
    """The MLP for images of `shape` (C, H, W); dropout is 0.2 by default."""
    return MLP(shape.numel(), num_classes, 0.2 if dropout is None else dropout)


def resnet14(shape: torch.Size, num_classes: int, dropout: float | None) -> ResNet:
    """The 14-layer ResNet for images of `shape` (C, H, W); no dropout by default."""
    return ResNet(shape[0], num_classes, dropout=dropout or 0.0)


def caffe_quick(
    shape: torch.Size, num_classes: int, dropout: float | None
) -> CaffeQuick:
    """Caffe's "quick" network for images of `shape` (C, H, W); it has no dropout."""
    return CaffeQuick(shape, num_classes)


def deep_mnist(shape: torch.Size, num_classes: int, dropout: float | None) -> DeepMnist:
    """The tutorial's network for images of `shape`; dropout is 0.5 by default."""
    return DeepMnist(shape, num_classes, 0.5 if dropout is None else dropout)


def resnet50(shape: torch.Size, num_classes: int, dropout: float | None) -> nn.Module:
    """ResNet-50 from torchvision, without weights; dropout before its last layer."""
    check_colour("resnet50", shape)
    network = torchvision.models.resnet50(num_classes=num_classes)
    network.fc = nn.Sequential(nn.Dropout(dropout or 0.0), network.fc)
    return nn.Sequential(Scale(IMAGENET_SCALE), network)


def alexnet(shape: torch.Size, num_classes: int, dropout: float | None) -> nn.Module:
    """AlexNet from torchvision, without weights; dropout is 0.5 by default."""
    check_colour("alexnet", shape)
    if min(shape[1:]) < 63:
        raise ValueError(
            f"alexnet takes images of 63 pixels or more, not {tuple(shape[1:])}"
        )
    dropout = 0.5 if dropout is None else dropout
    network = torchvision.models.alexnet(num_classes=num_classes, dropout=dropout)
    return nn.Sequential(Scale(IMAGENET_SCALE), network)


def check_colour(name: str, shape: torch.Size) -> None:
    """Raise ValueError unless the images (C, H, W) have three channels."""
    if shape[0] != 3:
        raise ValueError(f"{name} takes 3 channels, but the images have {shape[0]}")


MODELS = {
    "mlp": mlp,
    "resnet14": resnet14,
    "caffe-quick": caffe_quick,
    "deep-mnist": deep_mnist,
    "alexnet": alexnet,
    "resnet50": resnet50,
}


def build(
    name: str,
    images: Tensor,
    num_classes: int,
    *,
    noise_std: float = 0.0,
    dropout: float | None = None,
) -> Network:
    """Build a network for `images`, on their device.

    Noise and dropout have no parameters, so weights move freely between a network with
    them and one without.

    Args:
        name: a key of MODELS.
        images: (N, C, H, W) uint8; they give the shape, the mean and the device.
        num_classes: K.
        noise_std: of the Gaussian noise layer on the input.
        dropout: probability of dropping a unit; None is the network's own default.
    """
    body = MODELS[name](images.shape[1:], num_classes, dropout)
    network = Network(body, pixel_mean(images), noise_std)
    return network.to(images.device, memory_format=torch.channels_last)


def pixel_mean(images: Tensor, chunk: int = 8192) -> Tensor:
    """Mean of each pixel over the images: (C, H, W) float32, 0 to 255."""
    sums = torch.stack([part.sum(0, dtype=torch.int64) for part in images.split(chunk)])
    return (sums.sum(0).double() / len(images)).float()
