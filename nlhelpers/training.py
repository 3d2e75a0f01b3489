"""One visible training loop: batches, augmentation, schedule, validation.

`fit` is a generator. It yields after every epoch, so that a method can do its own work
between epochs and so that whoever runs the method can evaluate the network without the
method ever holding the truth.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nlhelpers import models
from nlhelpers.data import NoisyData

# (model, index (B,), *views of the images (B, C, H, W)) -> scalar loss.
Step = Callable[..., Tensor]


class DivergenceError(RuntimeError):
    """The loss became NaN or infinite; the message names the epoch and the step."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, whatever the method.

    Attributes:
        epochs: of each training a method does.
        batch_size: images per step.
        optimiser: "sgd", "adagrad" or "adam".
        learning_rate: at the start.
        momentum: of SGD.
        weight_decay: L2 penalty.
        patience: epochs without a better validation accuracy until the rate is halved.
        min_learning_rate: where the halving ends.
        crop: pixels of reflected border for random crops; 0 for none.
        flip: whether images are mirrored at random.
        val_share: share of the training set that is left out for validation.
        limit: use so many images only; None for all.
    """

    epochs: int
    batch_size: int = 128
    optimiser: str = "adagrad"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    patience: int = 10
    min_learning_rate: float = 1e-7
    crop: int = 0
    flip: bool = False
    val_share: float = 0.1
    limit: int | None = None


@dataclass(frozen=True)
class Setup:
    """What a method needs besides the data.

    Attributes:
        model: a key of `models.MODELS`.
        recipe: how its networks are trained.
        generator: the source of batches and augmentation, on the data's device.
    """

    model: str
    recipe: Recipe
    generator: torch.Generator

    def build(self, data: NoisyData, **perturbation) -> models.Network:
        """A fresh network for the data; `perturbation` goes to `models.build`."""
        return models.build(self.model, data.images, data.num_classes, **perturbation)


@dataclass(frozen=True, eq=False)
class Epoch:
    """The state after one epoch, as `fit` yields it.

    Attributes:
        stage: which of a method's trainings this is.
        number: from 1.
        model: the network, in place: it goes on changing.
        loss: mean over the epoch's steps.
        val_accuracy: on the labels the method validates with, in [0, 1].
        learning_rate: used in this epoch.
        images: trained on in this epoch.
        seconds: of training, without validation.
    """

    stage: str
    number: int
    model: nn.Module
    loss: float
    val_accuracy: float
    learning_rate: float
    images: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Screening:
    """Which labels a method goes on believing: kept (N,) bool over `data.labels`."""

    kept: Tensor


Event = Epoch | Screening


def fit(
    model: nn.Module,
    images: Tensor,
    batches: Callable[[], Iterator[Tensor]],
    step: Step,
    setup: Setup,
    validate: Callable[[nn.Module], float],
    *,
    stage: str,
    views: int = 1,
) -> Iterator[Epoch]:
    """Train `model` in place and yield after every epoch.

    Args:
        model: on the device of `images`.
        images: (N, C, H, W) uint8.
        batches: gives an epoch's batches of indices into `images`, each (B,) int64.
        step: the loss of one batch.
        setup: recipe and generator.
        validate: gives the accuracy that steers the learning rate.
        stage: a name for this training.
        views: how many times each batch is augmented anew for one step.

    Raises:
        DivergenceError: at the end of an epoch with a loss that is not finite.
    """
    recipe = setup.recipe
    optimiser = make_optimiser(model, recipe)
    # torch lowers the rate when more than `patience` epochs in a row were no better.
    halve = ReduceLROnPlateau(
        optimiser,
        mode="max",
        factor=0.5,
        patience=recipe.patience - 1,
        threshold=0.0,
        min_lr=recipe.min_learning_rate,
    )
    view = augmentation(images, recipe, setup.generator)
    step = compiled(step, images.device)
    precision = autocast(model, images.device)
    for number in range(1, recipe.epochs + 1):
        model.train()
        started = time.perf_counter()
        rate = optimiser.param_groups[0]["lr"]
        losses, seen = [], 0
        for index in batches():
            inputs = [view(index) for _ in range(views)]
            with precision:
                loss = step(model, index, *inputs)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(loss.detach().clone())  # a CUDA graph reuses its output
            seen += len(index)
        loss = mean_loss(losses, stage, number)  # waits for the device
        seconds = time.perf_counter() - started
        accuracy = validate(model)
        halve.step(accuracy)
        yield Epoch(stage, number, model, loss, accuracy, rate, seen, seconds)


def mean_loss(losses: list[Tensor], stage: str, epoch: int) -> float:
    """Mean of an epoch's losses; stops the run at the first that is not finite."""
    values = torch.stack(losses).double()  # whose mean does not overflow
    bad = ~values.isfinite()
    if bad.any():
        step = int(bad.nonzero()[0])
        raise DivergenceError(
            f"the loss is {values[step].item()} at epoch {epoch}, step {step + 1} of "
            f"{len(values)} ({stage}); a lower learning_rate is the usual cure"
        )
    return values.mean().item()


def make_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser, fused: one pass over all parameters per step."""
    options = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    match recipe.optimiser:
        case "sgd":
            kind, options["momentum"] = torch.optim.SGD, recipe.momentum
        case "adagrad":
            kind = torch.optim.Adagrad
        case "adam":
            kind = torch.optim.Adam
        case unknown:
            raise ValueError(
                f"optimiser is {unknown!r}; allowed are 'sgd', 'adagrad' and 'adam'"
            )
    return kind(model.parameters(), fused=True, **options)


def uniform_batches(count: int, setup: Setup) -> Iterator[Tensor]:
    """One pass over 0 .. count - 1 in random order, the incomplete batch left out."""
    batch_size = min(setup.recipe.batch_size, count)
    size = count - count % batch_size
    return iter(repeated(count, size, setup.generator).split(batch_size))


def balanced_batches(
    labels: Tensor, setup: Setup, size: int | None = None
) -> Iterator[Tensor]:
    """An epoch of `size` indices (as many as labels, if None), classes equally often.

    Rare classes are over-sampled (Ding et al. 2018, section 3.3).
    """
    size = len(labels) if size is None else size
    batch_size = min(setup.recipe.batch_size, size)
    size -= size % batch_size
    return iter(balanced(labels, size, setup.generator).split(batch_size))


def repeated(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` indices below `count`: passes in random order, the last one cut off."""
    passes = [
        torch.randperm(count, generator=generator, device=generator.device)
        for _ in range(-(-size // count))
    ]
    return torch.cat(passes)[:size]


def balanced(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`size` indices into labels (N,), classes equally often, in random order.

    Within a class no index is used twice before every other has been used once.
    A class without a label is left out.
    """

    def shuffle(count: int) -> Tensor:
        return torch.randperm(count, generator=generator, device=labels.device)

    order = shuffle(len(labels))
    order = order[labels[order].argsort(stable=True)]  # random within each class
    counts = labels.bincount()
    starts = (counts.cumsum(0) - counts)[counts > 0]
    counts = counts[counts > 0]
    place = torch.arange(size, device=labels.device)
    # Which class gets one image more than another is drawn anew each time.
    which = shuffle(len(counts))[place % len(counts)]
    turn = place // len(counts)
    return order[starts[which] + turn % counts[which]][shuffle(size)]


def augmentation(
    images: Tensor, recipe: Recipe, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """A function from indices (B,) to augmented images (B, C, H, W) uint8.

    A crop and a flip are one gather: each image of the batch picks its own rows and
    columns from the bordered original.
    """
    channels, height, width = images.shape[1:]
    device = images.device
    if not recipe.crop and not recipe.flip:
        # Whole rows of bytes: on a CPU, many times faster than images[index].
        flat = images.permute(0, 2, 3, 1).flatten(1)
        return lambda index: (
            flat.index_select(0, index)
            .view(-1, height, width, channels)
            .permute(0, 3, 1, 2)
        )
    border = reflect(images, recipe.crop).permute(0, 2, 3, 1).contiguous()
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)

    def draw(high: int, count: int) -> Tensor:
        return torch.randint(high, (count, 1), generator=generator, device=device)

    def view(index: Tensor) -> Tensor:
        count = len(index)
        down = rows + draw(2 * recipe.crop + 1, count)
        right = columns + draw(2 * recipe.crop + 1, count)
        if recipe.flip:
            mirrored = draw(2, count).bool()
            right = torch.where(mirrored, right.flip(1), right)
        picked = border[index[:, None, None], down[:, :, None], right[:, None, :]]
        return picked.permute(0, 3, 1, 2)  # channels-last in memory

    return view


def reflect(images: Tensor, border: int) -> Tensor:
    """Images (N, C, H, W) with `border` pixels mirrored on each side."""

    def mirror(size: int) -> Tensor:
        place = torch.arange(-border, size + border, device=images.device).abs()
        return torch.where(place >= size, 2 * (size - 1) - place, place)

    return images[:, :, mirror(images.shape[2])][:, :, :, mirror(images.shape[3])]


@torch.no_grad()
def predict_logits(model: nn.Module, images: Tensor, batch_size: int = 2000) -> Tensor:
    """Logits in evaluation mode: (N, K) float32, on the images' device."""
    training = model.training
    model.eval()
    with autocast(model, images.device):
        logits = torch.cat([model(part) for part in images.split(batch_size)])
    model.train(training)
    return logits


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Class probabilities in evaluation mode: softmax of `predict_logits`, (N, K)."""
    return predict_logits(model, images).softmax(dim=1)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images (N, C, H, W) whose most probable class is the label (N,)."""
    return (predict(model, images).argmax(dim=1) == labels).double().mean().item()


def balanced_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Mean over the classes present in `labels` of the share predicted right."""
    right = (predict(model, images).argmax(dim=1) == labels).double()
    counts = labels.bincount()
    hits = labels.bincount(weights=right, minlength=len(counts))
    return (hits / counts)[counts > 0].mean().item()


def autocast(
    model: nn.Module, device: torch.device
) -> contextlib.AbstractContextManager:
    """bfloat16 where it pays: any network on a GPU, convolutions on a CPU with bf16."""
    if device.type == "cpu" and not (cpu_has_bf16() and has_convolutions(model)):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; emulated, it is slower."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def has_convolutions(model: nn.Module) -> bool:
    """Whether any layer is a convolution."""
    return any(isinstance(layer, nn.Conv2d) for layer in model.modules())


def compiled(step: Step, device: torch.device) -> Step:
    """The step as one CUDA graph on a GPU; as it is on a CPU, which gains nothing."""
    return (
        torch.compile(step, mode="reduce-overhead") if device.type == "cuda" else step
    )


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """Make everything inside depend on `seed` alone, and leave torch's state as it was.

    Initial weights, dropout and noise layers draw from torch's own state, which
    compiled graphs need; batches and augmentation draw from the generator this gives.
    The two have streams of their own, and neither is that of a generator with `seed`.
    """
    seeder = torch.Generator().manual_seed(seed)
    own, given = torch.randint(2**62, (2,), generator=seeder).tolist()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(own)
        yield torch.Generator(device=device).manual_seed(given)


def pick_device(name: str = "auto") -> torch.device:
    """The device by name: "auto" takes a GPU if there is one.

    Raises:
        ValueError: for another name, or for "cuda" on a machine without one.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}; allowed are 'auto', 'cpu' and 'cuda'")
    if name == "cpu":
        return torch.device("cpu")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("device is 'cuda', but torch finds no GPU here; use 'cpu'")
    return torch.device("cuda" if found else "cpu")
