"""A cleanly labelled data set, made from a noisy one by GANs (Chiaroni et al. 2019).

A discriminator learns to tell the two noisy labels apart. Two generators learn to make
images to which it responds as it does to truly positive and truly negative ones. A
classifier then learns from these generated images alone.

Symbols: P_hat, N_hat = images labelled positive and negative, 0 and 1; D =
discriminator; G_P, G_N = generators; pi_P, pi_N = fractions of right labels in P_hat
and N_hat; delta_P, delta_N = what D should say of P and N (Eq. 3); H = distance of an
answer from a label; alpha, beta = weights of real and of generated images (Eq. 5).
"""

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from torch import Generator, Tensor, nn

from nlhelpers import batches, binary, gan, graphs, training
from nlhelpers.data import NoisyData
from nlhelpers.gan import Players
from nlhelpers.methods.cross_entropy import cross_entropy
from nlhelpers.training import Auxiliary, Epoch, Event, Setup

RATE = 2  # the first stage's learning rate, in units of the classifier's
BETAS = 0.5, 0.999  # of Adam, as in DCGAN
APART = 2  # standard deviations between two modes; any closer, they count as one
ASKED = 2_000  # images from which D's answers are read off

Distance = Callable[[Tensor, float], Tensor]
Deltas = tuple[float, float]


def nl_gan(
    data: NoisyData,
    setup: Setup,
    *,
    pi_P: float | None = None,
    pi_N: float | None = None,
    estimate: bool = False,
    alpha: float = 5.0,
    beta: float = 0.5,
    distance: str = "cross-entropy",
    spectral: str = "convolutions",
    game_epochs: float = 40 / 25,
    warm_up: float = 15 / 25,
) -> Iterator[Event]:
    """Run both stages: the game of D and the generators, then the classifier.

    Args:
        data: of two classes, 0 = positive and 1 = negative.
        setup: network and recipe of the classifier.
        pi_P: fraction of right labels in P_hat; None if it is not known.
        pi_N: the same for N_hat.
        estimate: whether delta_P and delta_N are read off D's answers; they always are
            if pi_P and pi_N are not known.
        alpha: weight of real images in D's loss.
        beta: weight of generated images in D's loss.
        distance: H, one of DISTANCES.
        spectral: which layers of D are spectrally normalised, one of `gan.SPECTRAL`.
            With the convolutions alone, as in section 3.1, D soon learns the labels by
            heart if there are few images; with all layers it does not.
        game_epochs: epochs of the first stage, in units of the classifier's: 40 / 25 on
            MNIST, 500 / 25 on CIFAR-10 (section 3.1).
        warm_up: epochs, in the same units, for which D first trains alone if the deltas
            are read off its answers (15 in Figure 1).
    """
    pi = None if pi_P is None and pi_N is None else binary.check_pi((pi_P, pi_N))
    check_data(data)
    check_settings(alpha=alpha, beta=beta, game_epochs=game_epochs, warm_up=warm_up)
    players, recipe = Players(data.images, spectral), setup.recipe
    game = Game(
        players, RATE * recipe.learning_rate, distance_of(distance), alpha, beta
    )
    if estimate or pi is None:
        yield from play(game, data, setup, times(warm_up, recipe.epochs), None)
        index = batches.repeated_by_class(data.labels, ASKED, setup.generator)
        targets = read_off(training.predict(players, data.images[index])[:, 1], pi)
    else:
        targets = deltas(*pi)
    yield from play(game, data, setup, times(game_epochs, recipe.epochs), targets)
    images, labels = made_up(players, len(data.labels), setup.generator)
    yield from cross_entropy(replace(data, images=images, labels=labels), setup)


def times(share: float, epochs: int) -> int:
    """A multiple of a number of epochs, rounded, but at least one."""
    return max(1, round(share * epochs))


# What D should say (section 2.1)


def deltas(pi_P: float, pi_N: float) -> Deltas:
    """delta_P and delta_N of Eq. 3: the share of N_hat among P, and among N."""
    return (1 - pi_N) / (pi_P + 1 - pi_N), pi_N / (1 - pi_P + pi_N)


class OneModeError(ValueError):
    """D's answers do not fall into two groups, so nothing can be read off them."""


def estimated_deltas(answers: Tensor) -> Deltas:
    """delta_P and delta_N as the means of a mixture of two Gaussians (Figure 1).

    Args:
        answers: D(x) for as many images of P_hat as of N_hat, (N,) in [0, 1].

    Raises:
        OneModeError: if the means are less than two standard deviations apart (the D of
            Ashman, Bird and Zepf 1994).
    """
    found = GaussianMixture(2, random_state=0).fit(answers.double().cpu()[:, None])
    delta_P, delta_N = sorted(found.means_.ravel().tolist())
    spread = math.sqrt(found.covariances_.mean())
    if delta_N - delta_P < APART * spread:
        raise OneModeError(
            f"the discriminator's answers have one mode: two Gaussians have the means "
            f"{delta_P:.2f} and {delta_N:.2f}, only {(delta_N - delta_P) / spread:.1f} "
            f"standard deviations apart; give pi_P and pi_N"
        )
    return delta_P, delta_N


def read_off(answers: Tensor, pi: tuple[float, float] | None) -> Deltas:
    """`estimated_deltas` or, if that fails, `deltas` of a known `pi` and a warning."""
    try:
        return estimated_deltas(answers)
    except OneModeError as error:
        if pi is None:
            raise
        warnings.warn(f"{error} (done: the known ones are used)", stacklevel=2)
        return deltas(*pi)


# Losses (section 2.2.1), from D's logits


def cross_entropy_to(logits: Tensor, label: float) -> Tensor:
    """Mean binary cross-entropy to one label, which may lie between 0 and 1."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def squared_error_to(logits: Tensor, label: float) -> Tensor:
    """Mean squared error to one label."""
    return (logits.sigmoid() - label).square().mean()


DISTANCES = ("cross-entropy", "mse")


def distance_of(name: str) -> Distance:
    """H by its name, one of DISTANCES; raises ValueError for any other name."""
    if name == "cross-entropy":
        return cross_entropy_to
    if name == "mse":
        return squared_error_to
    raise ValueError(f"distance is {name!r}; allowed are {', '.join(DISTANCES)}")


def noisy_loss(on_P_hat: Tensor, on_N_hat: Tensor, H: Distance) -> Tensor:
    """L_Noisy of Eq. 2."""
    return H(on_P_hat, 0.0) + H(on_N_hat, 1.0)


def adversarial_loss(on_G_P: Tensor, on_G_N: Tensor, H: Distance) -> Tensor:
    """The term of weight beta in Eq. 5: generated images get the opposite label."""
    return H(on_G_P, 1.0) + H(on_G_N, 0.0)


def generators_loss(
    on_G_P: Tensor, on_G_N: Tensor, targets: Deltas, H: Distance
) -> Tensor:
    """L_GP + L_GN of Eq. 4; each term has gradients for its own generator alone."""
    delta_P, delta_N = targets
    return H(on_G_P, delta_P) + H(on_G_N, delta_N)


# The game


class Game:
    """The players, with their optimisers and their losses."""

    def __init__(
        self, players: Players, rate: float, H: Distance, alpha: float, beta: float
    ) -> None:
        """Take the players, which are trained in place, and the settings."""
        self.players, self.rate = players, rate
        self.H, self.alpha, self.beta = H, alpha, beta
        self.recorded = graphs.used_on(next(players.parameters()).device)
        options = {"lr": rate, "betas": BETAS, "fused": True}
        adam = functools.partial(torch.optim.Adam, **options, capturable=self.recorded)
        self.adam_D = adam(players.D.parameters())
        self.adam_G = adam([*players.G_P.parameters(), *players.G_N.parameters()])
        if self.recorded:
            self.loss_D = torch.compile(self.loss_D)
            self.loss_G = torch.compile(self.loss_G)

    def step(self, real: Tensor, z: Tensor, targets: Deltas | None) -> Tensor:
        """Take a step of the generators, then one of D; without targets, only D's.

        Args:
            real: (B, C, H, W) in [-1, 1], the first half P_hat, the second N_hat.
            z: (B, 100), the first half for G_P, the second for G_N.
            targets: delta_P and delta_N.

        Returns:
            L_D of Eq. 5, or L_Noisy of Eq. 2 if D trains alone.
        """
        precision = training.autocast(self.players, real.device)
        fake = None
        if targets is not None:
            with precision, still(self.players.D):
                loss, fake = self.loss_G(z, targets)
            descend(self.adam_G, loss)
        with precision:
            loss = self.loss_D(real, fake)
        descend(self.adam_D, loss)
        return loss.detach()

    def loss_G(self, z: Tensor, targets: Deltas) -> tuple[Tensor, Tensor]:
        """L_GP + L_GN of Eq. 4, and the images (B, C, H, W), half by each generator."""
        for_P, for_N = z.chunk(2)
        fake = torch.cat([self.players.G_P(for_P), self.players.G_N(for_N)]).float()
        on_G_P, on_G_N = self.players.D(fake).float().chunk(2)
        return generators_loss(on_G_P, on_G_N, targets, self.H), fake.detach()

    def loss_D(self, real: Tensor, fake: Tensor | None) -> Tensor:
        """L_D of Eq. 5, in one pass over all images; without generated ones, Eq. 2."""
        if fake is None:
            return noisy_loss(*self.players.D(real).float().chunk(2), self.H)
        answers = self.players.D(torch.cat([real, fake])).float().chunk(4)
        noisy = noisy_loss(*answers[:2], self.H)
        return self.alpha * noisy + self.beta * adversarial_loss(*answers[2:], self.H)


def descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient of a loss."""
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


@contextlib.contextmanager
def still(D: nn.Module) -> Iterator[None]:
    """D without dropout and without gradients, as the generators' steps need it."""
    D.eval().requires_grad_(False)
    yield
    D.train().requires_grad_(True)


def play(
    game: Game, data: NoisyData, setup: Setup, epochs: int, targets: Deltas | None
) -> Iterator[Auxiliary]:
    """Train the players, and yield after every epoch.

    Args:
        game: whose players are trained in place.
        data: images with noisy labels.
        setup: gives the batch size and the generator.
        epochs: how many.
        targets: delta_P and delta_N; None trains D alone.
    """
    players = game.players
    stage = "warm-up" if targets is None else "game"
    view = batches.augmentation(data.images, 0, False, setup.generator)
    step = functools.partial(game.step, targets=targets)
    for number in range(1, epochs + 1):
        started, values, seen = time.perf_counter(), [], 0
        players.train()
        take = graphs.Recorded(step) if game.recorded else step
        for index in halves(data.labels, setup.recipe.batch_size, setup.generator):
            z = gan.noise(len(index), setup.generator)
            values.append(take(gan.to_unit(view(index)), z))
            seen += len(index)
        loss = training.mean_loss(values, stage, number)  # waits for the device
        seconds = time.perf_counter() - started
        accuracy = training.accuracy(players, data.val_images, data.val_labels)
        yield Auxiliary(
            Epoch(stage, number, players, loss, accuracy, game.rate, seen, seconds)
        )


def halves(labels: Tensor, batch_size: int, generator: Generator) -> Iterator[Tensor]:
    """An epoch of batches, the first half of each P_hat and the second N_hat."""
    half = min(batch_size, len(labels)) // 2
    steps = len(labels) // (2 * half)
    parts = []
    for label in (0, 1):
        own = (labels == label).nonzero().squeeze(1)
        drawn = batches.repeated(len(own), steps * half, generator)
        parts.append(own[drawn].view(steps, half))
    return iter(torch.cat(parts, dim=1))


def made_up(
    players: Players, count: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """The augmented data set: images (count, C, H, W) uint8 with labels (count,)."""
    images = torch.cat(players.generated(count // 2, generator))
    labels = torch.arange(2, device=images.device).repeat_interleave(count // 2)
    return images, labels


# Bad input


def check_data(data: NoisyData) -> None:
    """Raise ValueError unless there are two classes, and an image of each."""
    counts = data.labels.bincount(minlength=2).tolist()
    if data.num_classes != 2 or min(counts) == 0:
        raise ValueError(
            f"the data have {data.num_classes} classes, with {counts} images; the "
            "noisy-label game is for two with images of both, so give it a task like "
            "'5,7 vs 2,4'"
        )


def check_settings(**numbers: float) -> None:
    """Raise ValueError for the first number that makes no sense."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}; it must be 0 or more")
