"""What a run is, and running it: a frozen `Spec` goes in, a record comes out."""

import dataclasses
import difflib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nlhelpers import (
    binary,
    clothing1m,
    evaluation,
    food101n,
    noise,
    profiles,
    records,
    training,
)
from nlhelpers import data as datasets
from nlhelpers.data import DataSet, NoisyData, Truth
from nlhelpers.methods import METHODS, loss_correction
from nlhelpers.models import MODELS
from nlhelpers.records import Record
from nlhelpers.training import (
    Auxiliary,
    Correction,
    Epoch,
    Event,
    Recipe,
    Screening,
    Setup,
    Transition,
)


@dataclass(frozen=True)
class Spec:
    """All that decides the numbers of a run, apart from the device.

    Every value is checked on the way in: a wrong one raises ValueError with the value
    and the allowed ones.

    Attributes:
        method: a key of `methods.METHODS`.
        dataset: a key of `data.DATASETS` or of PUBLISHED.
        noise: a key of NOISES, "crawled" for the labels of a set in PUBLISHED, or
            "binary" for those of a task.
        noise_rate: probability that a label is changed (on the classes that the noise
            touches); None for noise that has its own.
        seed: decides the noise, the split, the weights and the batches.
        profile: one of `profiles.PROFILES`.
        model: a key of `models.MODELS`; "" is the data set's default.
        num_clean: images whose true labels the method may use.
        transition: T as K rows, for the noise "given" only.
        task: two groups of classes, like "5,7 vs 2,4", for the noise "binary" only.
        pi: fractions of right labels among those labelled positive and negative, for
            a task.
        num_images: how many different ones a task has to train on.
        settings: the method's own settings, as a mapping or as pairs.
    """

    method: str = "cross-entropy"
    dataset: str = "digits"
    noise: str = "symmetric"
    noise_rate: float | None = 0.2
    seed: int = 0
    profile: str = "quick"
    model: str = ""
    num_clean: int = 0
    transition: tuple[tuple[float, ...], ...] | None = None
    task: str = ""
    pi: tuple[float, float] | None = None
    num_images: int = 0
    settings: Mapping[str, object] | tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        """Check every value and bring it to one form."""
        known("method", self.method, METHODS)
        known("dataset", self.dataset, DATASETS)
        known("noise", self.noise, NOISE_NAMES)
        known("profile", self.profile, profiles.PROFILES)
        self._set("model", self.model or profiles.DEFAULT_MODELS[self.dataset])
        known("model", self.model, MODELS)
        self._set("seed", natural("seed", self.seed))
        self._set("num_clean", natural("num_clean", self.num_clean))
        self._set("num_images", natural("num_images", self.num_images))
        self._check_noise()
        self._check_task()
        self._set("settings", self._checked_settings())
        use = METHODS[self.method].clean_set
        if self.num_clean and use == "unused":
            able = [n for n, method in METHODS.items() if method.clean_set != "unused"]
            raise ValueError(
                f"num_clean is {self.num_clean}, but {self.method} has no use for a "
                f"clean set; those that do: {', '.join(able)}"
            )
        if not self.num_clean and use == "needed":
            raise ValueError(
                f"num_clean is 0, but {self.method} learns from images with true "
                "labels; set num_clean to how many it may have"
            )

    def _check_noise(self) -> None:
        if (self.noise == CRAWLED) != (self.dataset in PUBLISHED):
            raise ValueError(
                f"noise is {self.noise!r} and dataset is {self.dataset!r}; "
                f"{CRAWLED!r} is the noise of {', '.join(PUBLISHED)}, and they have no "
                "other"
            )
        own_rate = self.noise in OWN_RATE
        if own_rate and self.noise_rate is not None:
            raise ValueError(
                f"noise_rate is {self.noise_rate!r}, but {self.noise!r} labels come "
                "with their own rate; set noise_rate to None"
            )
        if not own_rate:
            self._set("noise_rate", noise.check_rate(self.noise_rate))
        if self.noise in datasets.HUMAN_LABELS and self.dataset != "cifar10":
            raise ValueError(
                f"noise is {self.noise!r}, but human labels exist for cifar10 only, "
                f"not for {self.dataset}"
            )
        if self.noise in noise.PATHS and self.dataset not in noise.PATHS[self.noise]:
            able = ", ".join(noise.PATHS[self.noise])
            raise ValueError(
                f"noise is {self.noise!r}, for which {self.dataset} has no published "
                f"paths; it has for {able}"
            )
        if (self.noise == "given") != (self.transition is not None):
            raise ValueError(
                "transition and the noise 'given' belong together: noise is "
                f"{self.noise!r}, transition is {self.transition!r}"
            )
        if self.transition is not None:
            try:
                rows = torch.tensor(self.transition, dtype=torch.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"transition is {self.transition!r}; it must be K rows of K numbers"
                ) from error
            rows = noise.check_transition(rows).tolist()
            self._set("transition", tuple(tuple(row) for row in rows))

    def _check_task(self) -> None:
        if self.noise != BINARY:
            if METHODS[self.method].two_classes:
                raise ValueError(
                    f"noise is {self.noise!r}, but {self.method} is for two classes; "
                    f"set noise to {BINARY!r} and task to two groups of classes, like "
                    "'5,7 vs 2,4'"
                )
            for name in ("task", "pi", "num_images"):
                if value := getattr(self, name):
                    raise ValueError(
                        f"{name} is {value!r}, but noise is {self.noise!r}; it belongs "
                        f"to a task, whose noise is {BINARY!r}"
                    )
            return
        binary.groups(self.task)
        self._set("pi", binary.check_pi(self.pi))
        if not self.num_images:
            raise ValueError("num_images is 0; say how many a task has to train on")
        if self.num_clean:
            raise ValueError(
                f"num_clean is {self.num_clean}, but a task has no clean set"
            )

    def _checked_settings(self) -> tuple[tuple[str, object], ...]:
        try:
            settings = dict(self.settings)
        except (TypeError, ValueError):
            raise ValueError(
                f"settings is {self.settings!r}; it must be a mapping or pairs"
            ) from None
        defaults = METHODS[self.method].settings
        for name, value in settings.items():
            known(f"setting of {self.method}", name, defaults)
            kinds = kinds_like(defaults[name])
            if type(value) not in kinds:
                choice = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{name} is {value!r}; it must be of type {choice}")
        if settings.get("T") == loss_correction.KNOWN and self.noise not in KNOWN_T:
            raise ValueError(
                f"T is 'known' and noise is {self.noise!r}; T is known of "
                f"{', '.join(KNOWN_T)} only, so set T to 'estimated'"
            )
        return tuple(sorted(settings.items()))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def recipe(self) -> Recipe:
        """How networks are trained in this run."""
        if self.task:
            return profiles.upsampled(self.model, self.profile)
        return profiles.recipe(self.dataset, self.model, self.profile)

    def as_dict(self) -> Record:
        """Plain values for JSON, those left at None or empty included."""
        values = dataclasses.asdict(self)
        return values | {"settings": dict(self.settings)}

    def __str__(self) -> str:
        """A short line for progress bars."""
        rate = "" if self.noise_rate is None else f" {self.noise_rate:g}"
        noise = f"{self.noise}{rate}"
        if self.task:
            noise = f"{self.task}, {self.num_images} images, pi {self.pi}"
        return f"{self.method}, {self.dataset}, {noise}, seed {self.seed}"


def known(what: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ValueError, with the nearest name, if `value` is none of the allowed."""
    allowed = list(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        choice = ", ".join(allowed) or "none"
        raise ValueError(f"unknown {what} {value!r}; {hint}Allowed: {choice}")


def kinds_like(default: object) -> tuple[type, ...]:
    """Types that may stand in place of a default; None stands for a number."""
    if default is None:
        return float, int, type(None)
    return (float, int) if isinstance(default, float) else (type(default),)


def natural(what: str, value: object) -> int:
    """Return a whole number of 0 or more, or raise ValueError."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 0 <= value < 2**63:
        raise ValueError(f"{what} is {value!r}; it must be a whole number of 0 or more")
    return value


def grid(base: Spec, **values: Iterable[object]) -> list[Spec]:
    """Every combination of `values` (a field's name = its values), the last fastest."""
    names = list(values)
    return [
        dataclasses.replace(base, **dict(zip(names, choice, strict=True)))
        for choice in itertools.product(*values.values())
    ]


load = functools.lru_cache(maxsize=1)(datasets.load)


# The noisy labels (N,) int64 that a run is given for a data set, by the spec's noise


def symmetric(spec: Spec, dataset: DataSet, generator: torch.Generator) -> Tensor:
    """A label changes into any other class with the same probability."""
    transition = noise.symmetric(spec.noise_rate, dataset.num_classes)
    return noise.corrupt(dataset.labels, transition, generator)


def pair_flip(spec: Spec, dataset: DataSet, generator: torch.Generator) -> Tensor:
    """A label changes into the next class."""
    transition = noise.pair_flip(spec.noise_rate, dataset.num_classes)
    return noise.corrupt(dataset.labels, transition, generator)


def published_paths(spec: Spec, dataset: DataSet, generator: torch.Generator) -> Tensor:
    """A label changes along the data set's published path, if its class has one."""
    paths = noise.PATHS[spec.noise][spec.dataset]
    transition = noise.asymmetric(spec.noise_rate, paths, dataset.num_classes)
    return noise.corrupt(dataset.labels, transition, generator)


def given(spec: Spec, dataset: DataSet, generator: torch.Generator) -> Tensor:
    """A label changes as the spec's own T says."""
    rows = torch.tensor(spec.transition, dtype=torch.float64)
    transition = noise.check_transition(rows, dataset.num_classes)
    return noise.corrupt(dataset.labels, transition, generator)


def random_confusion(
    spec: Spec, dataset: DataSet, generator: torch.Generator
) -> Tensor:
    """A label changes into others with shares that the seed draws."""
    T = noise.random_confusion(spec.noise_rate, dataset.num_classes, generator)
    return noise.corrupt(dataset.labels, T, generator)


def confusing(spec: Spec, dataset: DataSet, generator: torch.Generator) -> Tensor:
    """A label changes into the class that its image looks like."""
    return noise.confuse(dataset.images, dataset.labels, spec.noise_rate, generator)


def human(spec: Spec, dataset: DataSet, generator: torch.Generator) -> Tensor:
    """What people answered; nothing is drawn."""
    return datasets.human_labels(spec.noise, dataset.labels)


NOISES: dict[str, Callable[[Spec, DataSet, torch.Generator], Tensor]] = {
    "symmetric": symmetric,
    "pair-flip": pair_flip,
    **dict.fromkeys(noise.PATHS, published_paths),
    "random-confusion": random_confusion,
    "confusing": confusing,
    "given": given,
    **dict.fromkeys(datasets.HUMAN_LABELS, human),
}


# Data sets that come divided, with noisy labels of their own and clean ones beside.
PUBLISHED = {"clothing1m": clothing1m, "food101n": food101n}
CRAWLED = "crawled"
DATASETS = (*datasets.DATASETS, *PUBLISHED)
# Noises whose T can be said beforehand.
KNOWN_T = ("symmetric", "pair-flip", *noise.PATHS, "given")
# The noise of binary tasks, whose data are few.
BINARY = "binary"
NOISE_NAMES = (*NOISES, CRAWLED, BINARY)
OWN_RATE = ("given", CRAWLED, BINARY, *datasets.HUMAN_LABELS)  # noises without a rate

# Running


def data_for(spec: Spec, device: torch.device) -> tuple[NoisyData, Truth]:
    """A run's data on the device: what the method sees, and what only we see."""
    return source_of_data(spec)(spec, device)


def source_of_data(spec: Spec) -> Callable[[Spec, torch.device], tuple]:
    """The function that gives a run its data."""
    if spec.dataset in PUBLISHED:
        return published
    return binary_task if spec.task else prepare


def class_names(dataset: str) -> tuple[str, ...]:
    """The names of a data set's classes, in the order of the labels."""
    if dataset in PUBLISHED:
        return PUBLISHED[dataset].class_names()
    return load(dataset).class_names


def given_val_labels(spec: Spec, device: torch.device) -> Tensor:
    """A run's validation labels (V,) int64 before anybody checked them.

    UNKNOWN where none was given. What a method validates with may be the true ones.
    """
    if spec.dataset in PUBLISHED:
        return published(spec, device, clean_val=False)[0].val_labels
    # A method that is given the same images, and validates on labels as they are.
    unchecked = dataclasses.replace(spec, method="two-stage", settings=())
    return data_for(unchecked, device)[0].val_labels


def both_labels(
    spec: Spec, seen: NoisyData, truth: Truth
) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, ...) of a run with their given and their true labels, both known.

    Of training, or of validation if more is known there: of Clothing1M hardly a
    training image was checked, of Food-101N none.
    """
    val_given = given_val_labels(spec, seen.labels.device)
    found = []
    for images, labels, true in (
        (seen.images, seen.labels, truth.labels),
        (seen.val_images, val_given, truth.val_labels),
    ):
        known = (labels != datasets.UNKNOWN) & (true != datasets.UNKNOWN)
        found.append((images[known], labels[known], true[known]))
    return max(found, key=lambda part: len(part[1]))


def published(
    spec: Spec, device: torch.device, *, clean_val: bool = True
) -> tuple[NoisyData, Truth]:
    """Data that come divided, with as many clean images as the spec allows."""
    generator = torch.Generator().manual_seed(spec.seed)
    seen, truth = PUBLISHED[spec.dataset].load(
        generator,
        limit=spec.recipe.limit,
        size=profiles.PIXELS[spec.model] + 2 * spec.recipe.crop,
        crop_to=profiles.PIXELS[spec.model],
        clean_val=clean_val,
    )
    chosen = torch.randperm(len(seen.clean_labels), generator=generator)
    chosen = chosen[: spec.num_clean].sort().values
    clean = ("clean_images", "clean_labels", "clean_given_labels")
    fewer = {name: getattr(seen, name)[chosen] for name in clean}
    return dataclasses.replace(seen, **fewer).to(device), truth.to(device)


def prepare(spec: Spec, device: torch.device) -> tuple[NoisyData, Truth]:
    """Data that are divided at random, and whose labels get the spec's noise."""
    dataset = load(spec.dataset)
    generator = torch.Generator().manual_seed(spec.seed)
    labels = NOISES[spec.noise](spec, dataset, generator)
    seen, truth = datasets.split(
        dataset,
        labels,
        generator,
        val_share=spec.recipe.val_share,
        num_clean=spec.num_clean,
        clean_val=METHODS[spec.method].clean_validation,
        limit=spec.recipe.limit,
    )
    return seen.to(device), truth.to(device)


def binary_task(spec: Spec, device: torch.device) -> tuple[NoisyData, Truth]:
    """Two groups of classes with few images, which are repeated."""
    seen, truth = binary.load(
        load(spec.dataset),
        spec.task,
        spec.pi,
        spec.num_images,
        torch.Generator().manual_seed(spec.seed),
        rows=spec.recipe.limit or binary.UPSAMPLED,
    )
    return seen.to(device), truth.to(device)


def run(
    spec: Spec,
    device: torch.device,
    *,
    progress: Callable[[Event], None] = lambda event: None,
) -> Record:
    """Train by the spec's method and return the record.

    Raises:
        DivergenceError: if the loss stops being finite.
        DataError: if the data set is missing or damaged.
    """
    started = time.perf_counter()
    seen, truth = data_for(spec, device)
    method = METHODS[spec.method]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    history, screening, label_accuracy, transition = [], None, [], None
    with training.seeded(spec.seed, device) as generator:
        setup = Setup(spec.model, spec.recipe, generator)
        for event in method.run(seen, setup, **settings_of(spec)):
            if isinstance(event, Epoch):
                history.append(evaluation.measure(event, truth))
            elif isinstance(event, Screening):
                screening = screened(event, seen, truth)
            elif isinstance(event, Correction):
                now = dataclasses.replace(seen, labels=event.labels)
                wrong = realised_rate(now, truth)
                label_accuracy.append(None if wrong is None else 1 - wrong)
            elif isinstance(event, Transition):
                transition = event.T.tolist()
            progress(event)
    return {
        "spec": spec.as_dict(),
        "recipe": spec.recipe.as_dict(),
        "images": len(seen.labels),
        "realised_rate": realised_rate(seen, truth),
        **evaluation.outcome(history),
        "screening": screening,
        "label_accuracy": label_accuracy,
        "transition": transition,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory_mb": records.peak_memory(device),
        **records.provenance(device, source(spec)),
        "history": {name: [row[name] for row in history] for name in history[0]},
    }


def settings_of(spec: Spec) -> dict[str, object]:
    """The method's settings; a "known" T is the one that the labels were drawn by."""
    settings = dict(spec.settings)
    if settings.get("T") == loss_correction.KNOWN:
        settings["T"] = transition_of(spec)
    return settings


def transition_of(spec: Spec) -> Tensor:
    """T (K, K) float64 of a run's noise, one of KNOWN_T."""
    num_classes = len(class_names(spec.dataset))
    match spec.noise:
        case "symmetric":
            return noise.symmetric(spec.noise_rate, num_classes)
        case "pair-flip":
            return noise.pair_flip(spec.noise_rate, num_classes)
        case "given":
            return torch.tensor(spec.transition, dtype=torch.float64)
    paths = noise.PATHS[spec.noise][spec.dataset]
    return noise.asymmetric(spec.noise_rate, paths, num_classes)


def screened(
    event: Screening, seen: NoisyData, truth: Truth
) -> dict[str, float] | None:
    """What was kept of the labels whose truth is known; None if none is."""
    known = truth.labels != datasets.UNKNOWN
    if not known.any():
        return None
    right = seen.labels[known] == truth.labels[known]
    return evaluation.screened(event.kept[known], right)


def realised_rate(seen: NoisyData, truth: Truth) -> float | None:
    """Share of wrong labels among those whose truth is known; None if none is."""
    known = truth.labels != datasets.UNKNOWN
    if not known.any():
        return None
    return noise.realised_rate(seen.labels[known], truth.labels[known])


def source(spec: Spec) -> str:
    """Hash of the code that makes a run's numbers; the record holds spec and recipe."""
    loaders = datasets.DATASETS | {name: s.load for name, s in PUBLISHED.items()}
    of_labels = [NOISES[spec.noise]] if spec.noise in NOISES else []
    return records.source_hash(
        METHODS[spec.method].run,
        MODELS[spec.model],
        source_of_data(spec),
        loaders[spec.dataset],
        *of_labels,
        Setup,
        training.seeded,
        noise.realised_rate,
        evaluation.measure,
        evaluation.outcome,
        evaluation.screened,
        besides=(Spec, Recipe),
    )


def spec_of(record: Record) -> Spec | None:
    """What a record was asked to run; None if today's code no longer knows a name."""
    try:
        return Spec(**record["spec"])
    except (ValueError, TypeError):
        return None


def recipe_of(record: Record) -> Recipe | None:
    """How a record's networks were trained; None if today's code cannot say it."""
    try:
        return Recipe(**record["recipe"])
    except (KeyError, TypeError):
        return None


def is_current(record: Record) -> bool:
    """Whether today's code, profiles included, would make this record again."""
    spec = spec_of(record)
    return (
        spec is not None
        and record.get("source") == source(spec)
        and recipe_of(record) == spec.recipe
    )


def latest(found: Iterable[Record]) -> list[Record]:
    """One record per spec and device: the last that today's code made, or the last."""
    chosen: dict[tuple[Spec | None, str], Record] = {}
    for record in found:
        key = spec_of(record), record["device"]
        if key not in chosen or is_current(record) or not is_current(chosen[key]):
            chosen[key] = record
    return list(chosen.values())


def run_all(
    specs: Iterable[Spec],
    path: Path,
    device: torch.device,
    *,
    time_budget: float | None = None,
) -> list[Record]:
    """Run what is not recorded yet, append each record to `path`, return them all.

    Under torchrun, all processes train each run together, and the first records it.

    Args:
        specs: the runs; those in `path` that today's code made are not repeated.
        path: a .jsonl file.
        device: to train on.
        time_budget: seconds after which no further run is started.

    Returns:
        The records of `specs` in their order, as far as they exist.
    """
    specs = list(specs)
    started = time.perf_counter()
    done = recorded(path)
    records.check_writable(path)
    first = training.is_first()
    with training.processes(device):
        todo = [spec for spec in dict.fromkeys(specs) if spec not in done]
        todo = training.agreed(todo)
        epochs = math.ceil(sum(map(expected_epochs, todo)))
        if first:
            count = len(set(specs))
            print(f"{count - len(todo)} of {count} runs are recorded in {path}")
        with tqdm(total=epochs, unit="epoch", disable=not todo or not first) as bar:
            for spec in todo:
                spent = time.perf_counter() - started
                if training.agreed(time_budget is not None and spent > time_budget):
                    bar.write(
                        "The time budget is spent; the same command goes on later."
                    )
                    break
                bar.set_description(str(spec))
                record = run(spec, device, progress=functools.partial(advance, bar))
                if first:
                    records.append(path, record)
                done[spec] = record
    return [done[spec] for spec in specs if spec in done]


def expected_epochs(spec: Spec) -> float:
    """How many epochs a run takes, over all its trainings, for progress bars."""
    method = METHODS[spec.method]
    trainings = method.trainings + method.clean_trainings * (spec.num_clean > 0)
    settings = method.settings | dict(spec.settings)
    for name, share in method.more_trainings.items():
        trainings += share * settings[name]
    return trainings * spec.recipe.epochs


def advance(bar: tqdm, event: Event) -> None:
    """Move the bar by one epoch."""
    if isinstance(event, Auxiliary):
        bar.update()
    if isinstance(event, Epoch):
        bar.set_postfix(val=f"{event.val_accuracy:.3f}", refresh=False)
        bar.update()


def recorded(path: Path) -> dict[Spec, Record]:
    """The records under `path` that today's code made, by their spec."""
    return {
        spec_of(record): record for record in records.read(path) if is_current(record)
    }
