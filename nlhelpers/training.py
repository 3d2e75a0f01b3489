"""One visible training loop: optimiser, schedule, validation.

`fit` is a generator. It yields after every epoch, so that a method can do its own work
between epochs and so that whoever runs the method can evaluate the network without the
method ever holding the truth. On a GPU `fit_by_graphs` takes its place.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import adagrad, optimizer
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau

from nlhelpers import batches as drawn
from nlhelpers import graphs, models
from nlhelpers.data import NoisyData

# (model, index (B,), *views of the images (B, C, H, W)) -> scalar loss.
Step = Callable[..., Tensor]

if torch.__version__ < (2, 12):
    # torch has the kernel of a fused Adagrad for a GPU, but its Python code refuses it:
    # https://github.com/pytorch/pytorch/pull/177672
    adagrad._device_dtype_check_for_fused = lambda parameter, **without_gpu: (
        optimizer._device_dtype_check_for_fused(parameter)
    )


class DivergenceError(RuntimeError):
    """The loss became NaN or infinite; the message names the epoch and the step."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, whatever the method.

    Attributes:
        epochs: of each training that a method does.
        batch_size: images per step, over all processes together.
        optimiser: "sgd", "adagrad" or "adam".
        learning_rate: at the start.
        momentum: of SGD.
        weight_decay: L2 penalty.
        factor: what the learning rate is multiplied by when it falls.
        patience: epochs without a better validation accuracy until it falls.
        falls_after: epochs after which it falls, whatever the validation says; if any
            are named, `patience` has no effect.
        min_learning_rate: the lowest to which it falls by `patience`.
        crop: pixels of reflected border for random crops; 0 for none.
        flip: whether images are mirrored at random.
        val_share: share of the training set that is held out for validation.
        limit: use only this many images; None for all.
    """

    epochs: int
    batch_size: int = 128
    optimiser: str = "adagrad"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    factor: float = 0.5
    patience: int = 10
    falls_after: tuple[int, ...] = ()
    min_learning_rate: float = 1e-7
    crop: int = 0
    flip: bool = False
    val_share: float = 0.1
    limit: int | None = None

    def __post_init__(self) -> None:
        """Turn lists, as JSON has them, into tuples."""
        object.__setattr__(self, "falls_after", tuple(self.falls_after))

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        return values | {"falls_after": list(self.falls_after)}


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
        model: the network itself, which goes on changing.
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


@dataclass(frozen=True, eq=False)
class Auxiliary:
    """An epoch of a network that answers a question other than an image's class."""

    epoch: Epoch


@dataclass(frozen=True, eq=False)
class Correction:
    """What a method now takes as the labels: (N,) int64 over `data.labels`."""

    labels: Tensor


@dataclass(frozen=True, eq=False)
class Transition:
    """What a method now takes as T: (K, K), rows sum to 1."""

    T: Tensor


Event = Epoch | Auxiliary | Screening | Correction | Transition


def returned(events: Generator[Event, None, Any]) -> Any:
    """What a generator of events returns when it has reached its end."""
    while True:
        try:
            next(events)
        except StopIteration as ended:
            return ended.value


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
    lower_rate = make_schedule(optimiser, recipe)
    load = drawn.loader(images, recipe.crop, recipe.flip, setup.generator, views)
    objective = replicated(Objective(model, compiled(step, images.device)))
    precision = autocast(model, images.device)
    for number in range(1, recipe.epochs + 1):
        model.train()
        started = time.perf_counter()
        rate = optimiser.param_groups[0]["lr"]
        losses, seen = [], 0
        for index, *inputs in load(batches()):
            with precision:
                loss = objective(index, *inputs)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(loss.detach().clone())  # a CUDA graph reuses its output
            seen += len(index)
        loss = mean_loss(losses, stage, number)  # waits for the device
        seconds = time.perf_counter() - started
        accuracy = validate(model)
        lower_rate(accuracy)
        yield Epoch(stage, number, model, loss, accuracy, rate, seen, seconds)


def fit_by_graphs(
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
    """`fit`, line by line, but with a step and its update as one CUDA graph.

    What a step reads, other than tensors, changes between epochs only: see `graphs`.

    Raises:
        DivergenceError: as `fit` does.
    """
    recipe = setup.recipe
    optimiser = make_optimiser(model, recipe)
    for group in optimiser.param_groups:
        group["capturable"] = True  # Adam can be recorded only with this
    lower_rate = make_schedule(optimiser, recipe)
    load = drawn.loader(images, recipe.crop, recipe.flip, setup.generator, views)
    objective = torch.compile(step)
    precision = autocast(model, images.device)

    def whole(index: Tensor, *inputs: Tensor) -> Tensor:
        with precision:
            loss = objective(model, index, *inputs)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    take = graphs.Recorded(whole)
    for number in range(1, recipe.epochs + 1):
        model.train()
        started = time.perf_counter()
        rate = optimiser.param_groups[0]["lr"]
        losses, seen = [], 0
        take.anew()
        for index, *inputs in load(batches()):
            losses.append(take(index, *inputs))
            seen += len(index)
        loss = mean_loss(losses, stage, number)  # waits for the device
        seconds = time.perf_counter() - started
        accuracy = validate(model)
        lower_rate(accuracy)
        yield Epoch(stage, number, model, loss, accuracy, rate, seen, seconds)


def on_its_device(plain: Callable[..., Iterator[Epoch]]) -> Callable:
    """`fit`; on a GPU, unless several processes train together, `fit_by_graphs`."""

    @functools.wraps(plain)
    def chosen(model: nn.Module, images: Tensor, *rest, **options) -> Iterator[Epoch]:
        loop = fit_by_graphs if graphs.used_on(images.device) else plain
        return loop(model, images, *rest, **options)

    return chosen


fit = on_its_device(fit)


def fit_noisy(
    model: nn.Module,
    data: NoisyData,
    step: Step,
    setup: Setup,
    *,
    stage: str = "training",
    views: int = 1,
) -> Iterator[Epoch]:
    """`fit` on all of the images in random order, validated on equally noisy labels."""
    return fit(
        model,
        data.images,
        lambda: drawn.uniform(
            len(data.labels), setup.recipe.batch_size, setup.generator
        ),
        step,
        setup,
        lambda model: accuracy(model, data.val_images, data.val_labels),
        stage=stage,
        views=views,
    )


class Objective(nn.Module):
    """A step as a module, so that a replica averages the gradients of any method."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        """Keep both."""
        super().__init__()
        self.model = model
        self.step = step

    def forward(self, *inputs: Tensor) -> Tensor:
        """The loss of one batch."""
        return self.step(self.model, *inputs)


def replicated(objective: Objective) -> nn.Module:
    """The objective; with several processes, a replica that averages their gradients.

    Each takes every n-th image of a batch: see `batches.share`.
    """
    together = distributed.is_available() and distributed.is_initialized()
    return DistributedDataParallel(objective) if together else objective


def mean_loss(losses: list[Tensor], stage: str, epoch: int) -> float:
    """Mean of an epoch's losses; stops the run at the first that is not finite."""
    values = torch.stack(losses).double()  # whose mean does not overflow
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
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


def make_schedule(
    optimiser: torch.optim.Optimizer, recipe: Recipe
) -> Callable[[float], None]:
    """A function that takes an epoch's validation accuracy and lowers the rate."""
    if recipe.falls_after:
        steps = MultiStepLR(optimiser, recipe.falls_after, gamma=recipe.factor)
        return lambda accuracy: steps.step()
    # torch lowers the rate when more than `patience` epochs in a row were no better.
    plateau = ReduceLROnPlateau(
        optimiser,
        mode="max",
        factor=recipe.factor,
        patience=recipe.patience - 1,
        threshold=0.0,
        min_lr=recipe.min_learning_rate,
    )
    return plateau.step


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
    """The step as one CUDA graph on a GPU; unchanged on a CPU, which gains nothing."""
    return (
        torch.compile(step, mode="reduce-overhead") if device.type == "cuda" else step
    )


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """Make everything inside depend on `seed` alone, and leave torch's state as it was.

    Initial weights, dropout and noise layers draw from torch's own state, which
    compiled graphs need; batches and augmentation draw from the generator this gives.
    The two have separate streams, and neither is that of a generator with `seed`.
    """
    seeder = torch.Generator().manual_seed(seed)
    own, given = torch.randint(2**62, (2,), generator=seeder).tolist()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(own)
        yield torch.Generator(device=device).manual_seed(given)


def pick_device(
    name: str | torch.device = "auto", number: int | None = None
) -> torch.device:
    """The device by name: "auto" takes a GPU if there is one.

    Of several processes on a machine, each takes the GPU with its number; if there are
    more processes than GPUs, they share them evenly.

    Args:
        name: "auto", "cpu" or "cuda"; a device is returned as it is.
        number: of this process on its machine; None takes what torchrun says, if it
            runs.

    Raises:
        ValueError: for any other name, or for "cuda" on a machine without a GPU.
    """
    if isinstance(name, torch.device):
        return name
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}; allowed are 'auto', 'cpu' and 'cuda'")
    if name == "cpu":
        return torch.device("cpu")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("device is 'cuda', but torch finds no GPU here; use 'cpu'")
    if not found:
        return torch.device("cpu")
    if number is None:
        number = os.environ.get("LOCAL_RANK")
    if number is None:
        return torch.device("cuda")
    return torch.device("cuda", int(number) % torch.cuda.device_count())


def is_first() -> bool:
    """Whether this is the first of torchrun's processes, which writes and prints."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Work together with the other processes that torchrun started, if it did."""
    if "RANK" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def agreed(value: Any) -> Any:
    """What the first of several processes says; alone, the value itself."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    held = [value]
    distributed.broadcast_object_list(held)
    return held[0]
