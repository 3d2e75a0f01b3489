"""Learning from massive noisy labelled data (Xiao et al. 2015).

One network predicts the class, another the type of the label noise. Both are trained by
EM on the noisy labels, together with a clean set that keeps them from drifting.

Symbols: y = the true class, z = the noise type, y_noisy (the paper's y with a tilde) =
the label as given, C = the confusion matrix, L = the number of classes, q = posterior.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlhelpers import batches, losses, noise, profiles, training
from nlhelpers.data import UNKNOWN, NoisyData
from nlhelpers.methods.clean_only import clean_batches, train_on_clean
from nlhelpers.models import Network
from nlhelpers.training import Auxiliary, Event, Setup


def noise_model(
    data: NoisyData,
    setup: Setup,
    *,
    start_pretrained: bool = False,
    clean_share: float = 1 / 3,
    types_epochs: float = 1 / 4,
    types_rate: float = 1 / 10,
) -> Iterator[Event]:
    """Train both networks on the clean set, then both on everything by EM.

    On the clean set, the second network starts with the convolutions of the first and
    trains for a short time at a low rate. The paper does not say so; the authors'
    published code for CIFAR-10 does (three tenths of the steps; only its last layer
    has the rate of the first network). If it trains longer, it becomes so sure of the
    given labels that none is ever overruled.

    Args:
        data: images with noisy labels, and a clean set.
        setup: network and recipe.
        start_pretrained: whether the class network starts pretrained, as in row 6.
        clean_share: share of clean images in a batch; 1/3 upsamples them to half the
            number of noisy ones (section 4).
        types_epochs: epochs of the second network on the clean set, as a share of the
            recipe's.
        types_rate: its learning rate there, as a share of the recipe's.
    """
    check_share(clean_share)
    careful = for_types(setup, types_epochs, types_rate)
    y, y_noisy, L = data.clean_labels, data.clean_given_labels, data.num_classes
    pairs = y_noisy != UNKNOWN
    C = noise.estimate_confusion(y_noisy[pairs], y[pairs], L)
    if C is None:
        warnings.warn(
            f"none of the {int(pairs.sum())} clean images had a wrong label, so "
            "nothing is known of confusing noise; the model goes on without it",
            stacklevel=2,
        )
    z = torch.full_like(y, UNKNOWN)
    z[pairs] = noise.noise_types(y_noisy[pairs], y[pairs], C)
    classes = yield from train_on_clean(data, setup, start_pretrained=start_pretrained)
    types = setup.build(replace(data, num_classes=2 if C is None else 3))
    copy_convolutions(classes, types)
    yield from train_noise_types(types, data, z, careful)
    networks = TwoNetworks(classes, types)
    yield from em(networks, data, z, label_model(C, L), setup, clean_share)


class TwoNetworks(nn.Module):
    """Networks for p(y | x) and p(z | x); the prediction is the class."""

    def __init__(self, classes: Network, types: Network) -> None:
        """Keep both networks."""
        super().__init__()
        self.classes = classes
        self.types = types

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) uint8 to logits of the class (N, K) float32."""
        return self.classes(images)


# The noise model (section 3)


def label_model(C: Tensor | None, L: int) -> Tensor:
    """p(y_noisy | y, z) of Eq. 1, as (Z, L, L) float32: [z, y_noisy, y].

    Args:
        C: confusion matrix (L, L); None leaves confusing noise out, so that Z is 2.
        L: number of classes.
    """
    U, I = torch.ones(L, L), torch.eye(L)  # noqa: E741, the paper's symbol
    kinds = [I, (U - I) / (L - 1)]
    if C is not None:
        kinds.append(noise.check_confusion(C, L).float().cpu())
    return torch.stack(kinds)


def log_joint(
    y_logits: Tensor, z_logits: Tensor, y_noisy: Tensor, model: Tensor
) -> Tensor:
    """Log p(y_noisy, y, z | x) of Eq. 2: (N, Z, L).

    Args:
        y_logits: (N, L) of p(y | x).
        z_logits: (N, Z) of p(z | x).
        y_noisy: (N,) int64.
        model: p(y_noisy | y, z), (Z, L, L).
    """
    log_y = y_logits.log_softmax(dim=1)[:, None, :]
    log_z = z_logits.log_softmax(dim=1)[:, :, None]
    return model.log()[:, y_noisy].transpose(0, 1) + log_y + log_z


def posterior(joint: Tensor) -> tuple[Tensor, Tensor]:
    """q(y) (N, L) and q(z) (N, Z): the marginals of Eq. 5, from `log_joint`."""
    q = joint.flatten(1).softmax(dim=1).view_as(joint)
    return q.sum(dim=1), q.sum(dim=2)


def log_likelihood(joint: Tensor) -> Tensor:
    """Log p(y_noisy | x) (N,), from `log_joint`; EM never lowers it."""
    return joint.flatten(1).logsumexp(dim=1)


def soft_cross_entropy(logits: Tensor, q: Tensor) -> Tensor:
    """-sum_k q_k log softmax(logits)_k, per example: an M-step's gradient (Eq. 7)."""
    return F.cross_entropy(logits, q, reduction="none")


# Training (section 4)


def for_types(setup: Setup, epochs: float, rate: float) -> Setup:
    """The setup with a share of its epochs (at least one) and of its learning rate."""
    for name, share in (("types_epochs", epochs), ("types_rate", rate)):
        if not 0 < share <= 1:
            raise ValueError(f"{name} is {share!r}; it must be in (0, 1]")
    recipe = setup.recipe
    fewer = profiles.shortened(recipe, max(1, round(epochs * recipe.epochs)))
    return replace(
        setup, recipe=replace(fewer, learning_rate=rate * recipe.learning_rate)
    )


def copy_convolutions(source: Network, target: Network) -> None:
    """Copy the convolutions of `source`, with their batch norms, to `target`."""
    for given, own in zip(source.body.modules(), target.body.modules(), strict=True):
        if isinstance(own, nn.Conv2d | nn.BatchNorm2d):
            own.load_state_dict(given.state_dict())


def train_noise_types(
    network: Network, data: NoisyData, z: Tensor, setup: Setup
) -> Iterator[Auxiliary]:
    """Train the second network, in place, on the noise types of the clean set."""
    images, z = data.clean_images[z != UNKNOWN], z[z != UNKNOWN]

    def step(network: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        return losses.cross_entropy(network(images), z[index]).mean()

    for done in training.fit(
        network,
        images,
        lambda: clean_batches(len(z), data, setup),
        step,
        setup,
        lambda network: training.accuracy(network, images, z),
        stage="noise types",
    ):
        yield Auxiliary(done)


def em(
    networks: TwoNetworks,
    data: NoisyData,
    z: Tensor,
    model: Tensor,
    setup: Setup,
    clean_share: float,
) -> Iterator[Event]:
    """Train both networks on clean and noisy images together, in place.

    On a clean image both targets are given; on a noisy one the E-step supplies them.

    Args:
        networks: pretrained on the clean set.
        data: images with noisy labels, and a clean set.
        z: (M,) noise types of the clean set, or UNKNOWN.
        model: p(y_noisy | y, z), (Z, L, L).
        setup: recipe and generator.
        clean_share: share of clean images in a batch.
    """
    model = model.to(z.device)
    images = batches.joined(data.clean_images, data.images)
    y = torch.cat([data.clean_labels, data.labels])  # the noisy ones serve as y_noisy
    M = len(z)

    def step(networks: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        y_logits, z_logits = networks.classes(images), networks.types(images)
        clean = index < M
        with torch.no_grad():  # E-step
            q_y, q_z = posterior(log_joint(y_logits, z_logits, y[index], model))
            told_y = F.one_hot(y[index], q_y.shape[1]).to(q_y)
            types = z[index.clamp(max=M - 1)]  # an unknown type gives no target
            told_z = F.one_hot(types.clamp(min=0), q_z.shape[1]).to(q_z)
            told_z = told_z * (types != UNKNOWN)[:, None]
            q_y = torch.where(clean[:, None], told_y, q_y)
            q_z = torch.where(clean[:, None], told_z, q_z)
        loss = soft_cross_entropy(y_logits, q_y) + soft_cross_entropy(z_logits, q_z)
        return loss.mean()  # M-step

    yield from training.fit(
        networks,
        images,
        lambda: mixed_batches(data, setup, clean_share),
        step,
        setup,
        lambda networks: training.accuracy(networks, data.val_images, data.val_labels),
        stage="em",
    )


def mixed_batches(
    data: NoisyData, setup: Setup, clean_share: float
) -> Iterator[Tensor]:
    """Indices into the clean, then the noisy images; every batch has a share of both.

    An epoch has as many images as there are in all.
    """
    M, N = len(data.clean_labels), len(data.labels)
    batch_size = min(setup.recipe.batch_size, M + N)
    steps = (M + N) // batch_size
    clean = round(clean_share * batch_size)
    first = batches.repeated(M, steps * clean, setup.generator)
    second = M + batches.repeated(N, steps * (batch_size - clean), setup.generator)
    parts = first.view(steps, clean), second.view(steps, batch_size - clean)
    return iter(torch.cat(parts, dim=1))


def check_share(clean_share: float) -> None:
    """Raise ValueError unless both kinds of images have a share in a batch."""
    if not 0 < clean_share < 1:
        raise ValueError(f"clean_share is {clean_share!r}; it must be in (0, 1)")
