"""A semi-supervised two-stage approach to learning from noisy labels (Ding 2018).

Stage 1 trains a classifier on the noisy labels and keeps the few labels that it agrees
with most. Stage 2 discards all other labels and continues with semi-supervised
learning.

Symbols: c = a class, n = images per class, z = softmax output, alpha = balance cost
(Eq. 2); for the temporal ensemble (Laine and Aila 2017, Algorithm 2): Z = accumulated
predictions, a = decay, t = epochs accumulated.
"""

import math
from collections.abc import Callable, Generator, Iterator

import torch
from torch import Tensor, nn

from nlhelpers import batches, losses, training
from nlhelpers.data import NoisyData
from nlhelpers.training import Event, Screening, Setup

# Of 300 epochs, the weight of Laine and Aila (2017) rises for 80, and their learning
# rate falls for the last 50. We let the weight fall along that curve: section 3.2
# mentions a "ramp-down" of it and does not say which.
RAMP_UP, RAMP_DOWN = 80 / 300, 50 / 300
# Their largest weights, for the squared difference averaged over the classes.
LARGEST = {"temporal": 30.0, "pi": 100.0}

Screened = tuple[nn.Module, Tensor, Tensor]


def two_stage(
    data: NoisyData,
    setup: Setup,
    *,
    threshold: float = 0.9,
    at_least: float = 0.1,
    at_most: float = 1.0,
    consistency: str = "temporal",
    alpha: float | None = None,
    fixed_alpha: bool = False,
    decay: float = 0.6,
    noise_std: float = 0.15,
    dropout: float = 0.2,
) -> Iterator[Event]:
    """Run both stages. If the data have a clean set, stage 1 screens with it.

    Args:
        data: images with noisy labels.
        setup: network and recipe, the same for both stages.
        threshold: probability from which a consistent label is kept. This and the two
            shares are for stage 1 without a clean set; with one they have no effect.
        at_least: share of each class that is kept in any case, the most probable first,
            unless it is above `at_most`.
        at_most: largest share of each class that is kept; if `at_least` is the same,
            exactly that share is kept (Table 1).
        consistency: "temporal" ensembling, or the "pi" model (Algorithm 1).
        alpha: largest weight of the consistency term in Eq. 2; None is Laine and Aila's
            30 ("temporal") or 100 ("pi") divided by K.
        fixed_alpha: whether to hold alpha constant, as the paper does on large data.
        decay: a of the temporal ensemble.
        noise_std: standard deviation of the Gaussian noise layer in stage 2; 1 is the
            full range of a pixel. The paper gives no value; 0.15 is Laine and Aila's,
            whose pixels have a standard deviation of 1.
        dropout: in stage 2, inside the residual units of "resnet14", or before the last
            layer of "resnet50".
    """
    shares = {"threshold": threshold, "at_least": at_least, "at_most": at_most}
    check_shares(**shares, dropout=dropout)
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay!r}; it must be in [0, 1)")
    for name, value in {"alpha": alpha, "noise_std": noise_std}.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}; it must be 0 or more")
    if consistency not in LARGEST:
        raise ValueError(
            f"consistency is {consistency!r}; allowed are 'temporal' and 'pi'"
        )
    if len(data.clean_labels):
        model, kept, val_kept = yield from stage1_with_clean_set(data, setup)
    else:
        model, kept, val_kept = yield from stage1(data, setup, **shares)
    yield Screening(kept)
    student = setup.build(data, noise_std=noise_std, dropout=dropout)
    student.load_state_dict(model.state_dict())  # stage 2 "continues from" stage 1
    images = torch.cat([data.images, data.clean_images])
    labels = torch.cat([data.labels, data.clean_labels])
    labelled = torch.cat([kept, torch.ones_like(data.clean_labels, dtype=torch.bool)])
    if alpha is None:
        # Eq. 1 sums over the K classes where Laine and Aila average. They scale by the
        # labelled share, as they divide the supervised term by the whole batch; Eq. 2
        # divides it by the labelled images alone, so the share cancels.
        alpha = LARGEST[consistency] / data.num_classes
    weight = Balance(alpha, fixed_alpha, setup.recipe.epochs, images.device)
    term = Pi if consistency == "pi" else TemporalEnsemble
    yield from stage2(
        student,
        images,
        labels,
        labelled,
        setup,
        validation(data, val_kept),
        weight,
        term(len(images), data.num_classes, decay, images.device),
    )


# Stage 1: identifying likely correct labels (section 3.1)


def stage1(
    data: NoisyData, setup: Setup, **rule: float
) -> Generator[Event, None, Screened]:
    """Pre-train on all noisy labels, then screen them by the network's predictions.

    Args:
        data: images with noisy labels.
        setup: network and recipe.
        rule: settings of `likely_correct`.

    Returns:
        The network, and which labels pass: (N,) and (V,) bool.
    """
    model = setup.build(data)
    yield from train_balanced(model, data, setup, validation(data), "stage 1")
    kept = likely_correct(training.predict(model, data.images), data.labels, **rule)
    val_probs = training.predict(model, data.val_images)
    return model, kept, likely_correct(val_probs, data.val_labels, **rule)


def likely_correct(
    probs: Tensor,
    labels: Tensor,
    *,
    threshold: float = 0.9,
    at_least: float = 0.1,
    at_most: float = 1.0,
) -> Tensor:
    """Keep consistent labels with P(c|x) >= threshold, and at least a top share.

    Within each class c the images are ranked by P(c|x), those predicted to be c first.
    If fewer than the `at_least` share of a class pass, it is filled up along this
    ranking (beyond the consistent images only when those run out; the paper is silent
    on that).

    Args:
        probs: P(.|x), (N, K).
        labels: (N,) int64, noisy.
        threshold: in [0, 1].
        at_least: share of a class, in [0, 1].
        at_most: share of a class, in [0, 1].

    Returns:
        (N,) bool.
    """
    num_classes = probs.shape[1]
    p = probs.gather(1, labels[:, None]).squeeze(1).double()
    consistent = probs.argmax(dim=1) == labels
    passing = labels[consistent & (p >= threshold)].bincount(minlength=num_classes)
    n = labels.bincount(minlength=num_classes)
    floor, ceiling = (n * at_least).round().long(), (n * at_most).round().long()
    take = passing.maximum(floor).minimum(ceiling)
    ranking = (p + consistent).argsort(descending=True, stable=True)
    ranking = ranking[labels[ranking].argsort(stable=True)]  # class after class
    ranked = labels[ranking]
    place = torch.arange(len(labels), device=labels.device) - (n.cumsum(0) - n)[ranked]
    kept = torch.empty_like(consistent)
    kept[ranking] = place < take[ranked]
    return kept


def stage1_with_clean_set(
    data: NoisyData, setup: Setup
) -> Generator[Event, None, Screened]:
    """Pre-train on all noisy labels; classifiers trained on the clean set screen them.

    The K binary one-vs-rest classifiers share all layers but the last. A label c is
    removed where the classifier of c says "not c".

    Returns:
        As for `stage1`.
    """
    model, judge = setup.build(data), setup.build(data)
    yield from train_balanced(model, data, setup, validation(data), "stage 1")

    def step(judge: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        return losses.one_vs_rest(judge(images), data.clean_labels[index]).mean()

    def epoch() -> Iterator[Tensor]:  # as many images as an epoch of noisy ones
        batch_size, size = setup.recipe.batch_size, len(data.images)
        return batches.balanced(data.clean_labels, batch_size, setup.generator, size)

    images, validate, stage = data.clean_images, validation(data), "one-vs-rest"
    yield from training.fit(judge, images, epoch, step, setup, validate, stage=stage)

    def positive(images: Tensor, labels: Tensor) -> Tensor:
        logits = training.predict_logits(judge, images)
        return logits.gather(1, labels[:, None]).squeeze(1) > 0

    kept = positive(data.images, data.labels)
    return model, kept, positive(data.val_images, data.val_labels)


# Stage 2: semi-supervised learning (section 3.2)


def stage2(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    labelled: Tensor,
    setup: Setup,
    validate: Callable[[nn.Module], float],
    alpha: "Balance",
    term: "Pi | TemporalEnsemble",
) -> Iterator[Event]:
    """Minimise Eq. 2 over batches whose first half is labelled and class-balanced.

    An epoch has as many images as there are in all. If no image is unlabelled, the
    second half comes from all images.
    """
    if not labelled.any():
        raise ValueError("stage 1 kept no label; lower threshold or raise at_least")
    half = min(setup.recipe.batch_size, len(images)) // 2
    seeds = labelled.nonzero().squeeze(1)
    others = (~labelled).nonzero().squeeze(1)
    others = others if len(others) else torch.arange(len(images), device=images.device)
    size = len(images) // (2 * half) * half  # images of either half in an epoch

    def epoch() -> Iterator[Tensor]:
        known = batches.repeated_by_class(labels[seeds], size, setup.generator)
        unknown = batches.repeated(len(others), size, setup.generator)
        known, unknown = seeds[known], others[unknown]
        halves = known.view(-1, half), unknown.view(-1, half)
        return iter(torch.cat(halves, dim=1))

    def step(model: nn.Module, index: Tensor, *views: Tensor) -> Tensor:
        logits = model(views[0])
        supervised = losses.cross_entropy(logits[:half], labels[index[:half]])
        other = term.other(model, index, logits, *views[1:])
        difference = losses.consistency(logits.softmax(dim=1), other)
        return supervised.mean() + alpha.now * difference.mean()  # Eq. 2

    alpha.set(1)
    for done in training.fit(
        model,
        images,
        epoch,
        step,
        setup,
        validate,
        stage="stage 2",
        views=term.views,
    ):
        yield done
        term.end_epoch()
        alpha.set(done.number + 1)


class Balance:
    """alpha of Eq. 2: constant, or rising and falling by Laine and Aila's ramps."""

    def __init__(
        self, largest: float, fixed: bool, epochs: int, device: torch.device
    ) -> None:
        """Keep the schedule; `now` is the value in use, a scalar on the device."""
        self.largest, self.fixed, self.epochs = largest, fixed, epochs
        self.now = torch.zeros((), device=device)

    def set(self, epoch: int) -> None:
        """Move to the value of an epoch, counted from 1."""
        self.now.fill_(self.at(epoch))

    def at(self, epoch: int) -> float:
        """The value in an epoch, counted from 1; 0 in the first if it ramps up.

        It rises as exp(-5 (1 - t)^2), as in Laine and Aila (2017), and falls as their
        learning rate does, exp(-12.5 t^2), t in [0, 1] over the ramp.
        """
        if self.fixed:
            return self.largest
        if epoch == 1:
            return 0.0  # the ensemble has seen nothing yet
        up = min(1.0, (epoch - 1) / (RAMP_UP * self.epochs))
        down = max(0.0, 1.0 - (self.epochs - epoch) / (RAMP_DOWN * self.epochs))
        ramp = math.exp(-5.0 * (1.0 - up) ** 2 - 12.5 * down**2)
        return self.largest * ramp


class Pi:
    """The Pi model: compare with a second view of the same images (Algorithm 1)."""

    views = 2

    def __init__(
        self, count: int, num_classes: int, decay: float, device: torch.device
    ) -> None:
        """Nothing to remember."""

    def other(
        self, model: nn.Module, index: Tensor, logits: Tensor, again: Tensor
    ) -> Tensor:
        """z2 (B, K): the network on another augmentation, under different dropout."""
        return model(again).softmax(dim=1)

    def end_epoch(self) -> None:
        """Nothing to do."""


class TemporalEnsemble:
    """Compare with the decayed mean of past epochs' predictions (Laine and Aila 2017).

    An image drawn several times in an epoch counts with its mean prediction; one that
    was not drawn keeps its target.
    """

    views = 1

    def __init__(
        self, count: int, num_classes: int, decay: float, device: torch.device
    ) -> None:
        """Start with nothing accumulated for `count` images."""
        self.decay = decay
        self.sums = torch.zeros(count, num_classes, device=device)
        self.draws = torch.zeros(count, 1, device=device)
        self.accumulated = torch.zeros(count, num_classes, device=device)
        self.epochs = torch.zeros(count, 1, device=device)
        self.targets = torch.zeros(count, num_classes, device=device)

    def other(self, model: nn.Module, index: Tensor, logits: Tensor) -> Tensor:
        """Targets (B, K) of the batch; remembers its predictions for the next epoch."""
        with torch.no_grad():
            self.sums.index_add_(0, index, logits.detach().softmax(dim=1))
            self.draws.index_add_(0, index, torch.ones_like(logits[:, :1]))
        return self.targets[index]

    def end_epoch(self) -> None:
        """Z <- a Z + (1 - a) z; targets Z / (1 - a^t)."""
        drawn = (self.draws > 0).float()
        z = self.sums / self.draws.clamp(min=1)
        moved = self.decay * self.accumulated + (1 - self.decay) * z
        self.accumulated.lerp_(moved, drawn)
        self.epochs += drawn
        bias = (1 - self.decay**self.epochs).where(self.epochs > 0, 1.0)
        self.targets.copy_(self.accumulated / bias)
        self.sums.zero_()
        self.draws.zero_()


# Both stages


def train_balanced(
    model: nn.Module,
    data: NoisyData,
    setup: Setup,
    validate: Callable[[nn.Module], float],
    stage: str,
) -> Iterator[Event]:
    """Cross-entropy on all noisy labels, every class equally often (section 3.3)."""

    def step(model: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        return losses.cross_entropy(model(images), data.labels[index]).mean()

    def epoch() -> Iterator[Tensor]:
        batch_size = setup.recipe.batch_size
        return batches.balanced(data.labels, batch_size, setup.generator)

    images = data.images
    yield from training.fit(model, images, epoch, step, setup, validate, stage=stage)


def validation(
    data: NoisyData, kept: Tensor | None = None
) -> Callable[[nn.Module], float]:
    """Accuracy on the validation labels, or on those that stage 1 kept.

    Classes have equal weight, as they do in training: an unbalanced measure would
    prefer the very epochs that follow the majority of the noisy labels.
    """
    images, labels = data.val_images, data.val_labels
    if kept is not None and kept.any():
        images, labels = images[kept], labels[kept]
    return lambda model: training.balanced_accuracy(model, images, labels)


def check_shares(**shares: float) -> None:
    """Raise ValueError for the first value outside [0, 1]."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}; it must be in [0, 1]")
