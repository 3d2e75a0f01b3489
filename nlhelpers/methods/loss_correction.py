"""Forward and backward correction of the loss by T (Patrini et al. 2017).

Both make a network learn the true classes from noisy labels, given the T of the noise.
Forward correction passes the network's prediction through the noise before it is
compared with a label. Backward correction weights the losses of all labels by T^-1.

T is known, or counted where people checked labels, or read off a second network that
has learnt the noisy labels: what it predicts for an image that is surely typical of a
class is the row of T for that class.

Symbols: T = noise transition matrix, T[i, j] = p(noisy j | true i).
"""

import functools
from collections.abc import Callable, Generator, Iterator

import torch
from torch import Tensor

from nlhelpers import losses, noise, training
from nlhelpers.data import UNKNOWN, NoisyData
from nlhelpers.methods.robust_losses import train
from nlhelpers.methods.self_learning import check_finetune, train_on_clean_set
from nlhelpers.pretraining import begun
from nlhelpers.training import Auxiliary, Event, Setup, Transition

ESTIMATED, KNOWN = "estimated", "known"


def forward(
    data: NoisyData,
    setup: Setup,
    *,
    T: str | Tensor = ESTIMATED,
    percentile: float = 97.0,
    start_pretrained: bool = False,
    finetune: bool = False,
) -> Iterator[Event]:
    """Cross-entropy of p T with the noisy labels (Theorem 2).

    Args:
        data: images with noisy labels.
        setup: network and recipe, the same for both networks.
        T: (K, K), or "estimated": counted on the clean set if there is one, else read
            off a network. A run may say "known", for the T of its own noise.
        percentile: a class's typical image is the one whose probability of the class is
            at this percentile.
        start_pretrained: whether the networks start from one trained without these
            labels.
        finetune: whether to fine-tune on the clean set at the end.
    """
    settings = percentile, start_pretrained, finetune
    yield from corrected(forward_loss, data, setup, T, *settings)


def backward(
    data: NoisyData,
    setup: Setup,
    *,
    T: str | Tensor = ESTIMATED,
    percentile: float = 97.0,
    start_pretrained: bool = False,
    finetune: bool = False,
) -> Iterator[Event]:
    """Cross-entropies weighted by T^-1 (Theorem 1).

    Args:
        data: images with noisy labels.
        setup: network and recipe, the same for both networks.
        T: as in `forward`; it must not be singular.
        percentile: as in `forward`.
        start_pretrained: as in `forward`.
        finetune: as in `forward`.
    """
    settings = percentile, start_pretrained, finetune
    yield from corrected(backward_loss, data, setup, T, *settings)


def forward_loss(T: Tensor) -> losses.Loss:
    """The loss of logits and noisy labels under T."""
    return functools.partial(losses.forward, transition=T)


def backward_loss(T: Tensor) -> losses.Loss:
    """The loss of logits and noisy labels under T."""
    return functools.partial(losses.backward, inverse=noise.inverse(T))


def corrected(
    loss_under: Callable[[Tensor], losses.Loss],
    data: NoisyData,
    setup: Setup,
    T: str | Tensor,
    percentile: float,
    start_pretrained: bool,
    finetune: bool,
) -> Iterator[Event]:
    """Find T, then train a fresh network with the loss that it gives."""
    check(data, T, percentile, finetune)
    started = yield from begun(data, setup, start_pretrained)
    if not isinstance(T, Tensor):
        verified = data.clean_given_labels != UNKNOWN
        if verified.any():
            T = counted(data, verified)
        else:
            T = yield from read_off(started, data, percentile)
    yield Transition(T)
    model = started.build(data)
    loss = loss_under(T.to(data.labels.device, torch.float32))
    yield from train(model, loss, data, setup)
    if finetune:
        yield from train_on_clean_set(model, data, setup)


def read_off(
    setup: Setup, data: NoisyData, percentile: float
) -> Generator[Event, None, Tensor]:
    """Train on the noisy labels as they are, and read T off the predictions."""
    model = setup.build(data)
    for done in train(model, losses.cross_entropy, data, setup):
        yield Auxiliary(done)
    probs = training.predict(model, data.images)
    return training.agreed(noise.anchor_transition(probs, percentile).cpu())


def counted(data: NoisyData, verified: Tensor) -> Tensor:
    """T (K, K), counted from the given and the true labels of the clean set."""
    given, true = data.clean_given_labels[verified], data.clean_labels[verified]
    T = noise.estimate_transition(given, true, data.num_classes).cpu()
    if T.isnan().any():
        k = int(T.isnan().any(dim=1).nonzero()[0])
        raise ValueError(
            f"the clean set has no image of class {k} with a given label, so that "
            "T cannot be counted; raise num_clean, or leave the clean set out"
        )
    return T


def check(data: NoisyData, T: str | Tensor, percentile: float, finetune: bool) -> None:
    """Raise ValueError unless the settings make sense for the data."""
    if isinstance(T, Tensor):
        noise.check_transition(T, data.num_classes)
    elif T != ESTIMATED:
        raise ValueError(f"T is {T!r}; it must be 'estimated', 'known' or a matrix")
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile is {percentile!r}; it must be in [0, 100]")
    check_finetune(data, finetune)
