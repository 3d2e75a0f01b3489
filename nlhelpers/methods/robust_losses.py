"""Losses that tolerate noise, each in place of cross-entropy in plain training.

The first five are rows of Ding et al. (2018), Table 3, whose numbers come from the
program of Patrini et al. (2017). The defaults are those of that program or, for the
hard bootstrap, which it lacks, those of Reed et al. (2015). The last two are newer.
Settings are named as in `nlhelpers.losses`.
"""

import functools
from collections.abc import Iterator

from torch import Tensor, nn

from nlhelpers import losses, training
from nlhelpers.data import NoisyData
from nlhelpers.training import Epoch, Event, Setup


def unhinged(data: NoisyData, setup: Setup, *, others: float = 0.0) -> Iterator[Event]:
    """The unhinged loss of batch-normalised outputs (van Rooyen et al. 2015)."""
    check(others=(others, -1, 0))
    loss = functools.partial(losses.unhinged, others=others)
    yield from train(normalised(data, setup), loss, data, setup)


def sigmoid(data: NoisyData, setup: Setup, *, others: float = 0.0) -> Iterator[Event]:
    """The sigmoid loss of batch-normalised outputs (Ghosh et al. 2015)."""
    check(others=(others, -1, 0))
    loss = functools.partial(losses.sigmoid, others=others)
    yield from train(normalised(data, setup), loss, data, setup)


def savage(data: NoisyData, setup: Setup) -> Iterator[Event]:
    """The savage loss (Masnadi-Shirazi and Vasconcelos 2008)."""
    yield from train(setup.build(data), losses.savage, data, setup)


def bootstrap_soft(
    data: NoisyData, setup: Setup, *, beta: float = 0.95
) -> Iterator[Event]:
    """Soft bootstrapping: targets include the predictions (Reed et al. 2015)."""
    check(beta=(beta, 0, 1))
    loss = functools.partial(losses.bootstrap_soft, beta=beta)
    yield from train(setup.build(data), loss, data, setup)


def bootstrap_hard(
    data: NoisyData, setup: Setup, *, beta: float = 0.8
) -> Iterator[Event]:
    """Hard bootstrapping: targets include the predicted class (Reed et al. 2015)."""
    check(beta=(beta, 0, 1))
    loss = functools.partial(losses.bootstrap_hard, beta=beta)
    yield from train(setup.build(data), loss, data, setup)


def generalised_cross_entropy(
    data: NoisyData, setup: Setup, *, q: float = 0.7
) -> Iterator[Event]:
    """A loss between cross-entropy and mean absolute error (Zhang and Sabuncu 2018)."""
    check(q=(q, 1e-6, 1))
    loss = functools.partial(losses.generalised_cross_entropy, q=q)
    yield from train(setup.build(data), loss, data, setup)


def symmetric_cross_entropy(
    data: NoisyData,
    setup: Setup,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    A: float = -4.0,
) -> Iterator[Event]:
    """Cross-entropy plus its reverse (Wang et al. 2019); defaults are for CIFAR-10."""
    check(alpha=(alpha, 0, 1e6), beta=(beta, 0, 1e6), A=(A, -1e6, 0))
    loss = functools.partial(
        losses.symmetric_cross_entropy, alpha=alpha, beta=beta, A=A
    )
    yield from train(setup.build(data), loss, data, setup)


def train(
    model: nn.Module,
    loss: losses.Loss,
    data: NoisyData,
    setup: Setup,
    stage: str = "training",
) -> Iterator[Epoch]:
    """Minimise the mean of a loss on the noisy labels."""

    def step(model: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        return loss(model(images), data.labels[index]).mean()

    return training.fit_noisy(model, data, step, setup, stage=stage)


def normalised(data: NoisyData, setup: Setup) -> nn.Module:
    """A network with batch-normalised outputs: the "BN" of the table.

    The losses that need it have no softmax, and the unhinged one falls without bound as
    the outputs grow.
    """
    body = setup.build(data)
    bounded = nn.BatchNorm1d(data.num_classes, device=data.labels.device)
    return nn.Sequential(body, bounded)


def check(**settings: tuple[float, float, float]) -> None:
    """Raise ValueError for the first setting (value, least, most) out of its range."""
    for name, (value, least, most) in settings.items():
        if not least <= value <= most:
            raise ValueError(
                f"{name} is {value!r}; it must be in [{least:g}, {most:g}]"
            )
