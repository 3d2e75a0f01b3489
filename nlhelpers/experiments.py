"""One run: a `Spec` goes in, a record comes out."""

import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from nlhelpers import (
    binary,
    evaluation,
    files,
    folder,
    losses,
    noise,
    profiles,
    records,
    training,
)
from nlhelpers import data as datasets
from nlhelpers.data import DataSet, NoisyData, Truth
from nlhelpers.methods import METHODS, clean_only, loss_correction
from nlhelpers.models import MODELS
from nlhelpers.records import Record
from nlhelpers.specs import CRAWLED_SETS, Spec
from nlhelpers.training import (
    Auxiliary,
    Correction,
    DivergenceError,
    Epoch,
    Event,
    Recipe,
    Screening,
    Setup,
    Transition,
)

load = functools.lru_cache(maxsize=1)(datasets.load)

# Forms of one step that a process compiles for a GPU. All losses share a step, and each
# gives it another form; beyond torch's own limit of 8, the rest would run uncompiled.
FORMS = 64

# Where images are files, what reads them; code finds it by their type, not by name.
OF_FILES = files.loader, files.joined

# What only a GPU runs, in place of other code.
ON_A_GPU = training.fit_by_graphs, losses.compiled_cross_entropy

# What ends one run and says nothing about the next one.
FAILURES = (ValueError, DivergenceError)


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
    """A label changes into other classes, in shares drawn from the seed."""
    T = noise.random_confusion(spec.noise_rate, dataset.num_classes, generator)
    return noise.corrupt(dataset.labels, T, generator)


def confusing(spec: Spec, dataset: DataSet, generator: torch.Generator) -> Tensor:
    """A label changes into the class that its image looks like, or at random."""
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


# Running


def data_for(spec: Spec, device: torch.device) -> tuple[NoisyData, Truth]:
    """A run's data on the device: what the method sees, and what only we see."""
    return source_of_data(spec)(spec, device)


def source_of_data(spec: Spec) -> Callable[[Spec, torch.device], tuple]:
    """The function that gives a run its data."""
    if spec.dataset in CRAWLED_SETS:
        return crawled_data
    return binary_task if spec.task else prepare


def class_names(dataset: str) -> tuple[str, ...]:
    """The names of a data set's classes, in the order of the labels."""
    if dataset in CRAWLED_SETS:
        return CRAWLED_SETS[dataset].class_names()
    return load(dataset).class_names


def given_val_labels(spec: Spec, device: torch.device) -> Tensor:
    """A run's validation labels (V,) int64 before anybody checked them.

    UNKNOWN where none was given. A method may validate on the true labels instead.
    """
    if spec.dataset in CRAWLED_SETS:
        return crawled_data(spec, device, clean_val=False)[0].val_labels
    # A method that is given the same images, and validates on labels as given.
    unchecked = dataclasses.replace(spec, method="two-stage", settings=())
    return data_for(unchecked, device)[0].val_labels


def both_labels(
    spec: Spec, seen: NoisyData, truth: Truth
) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, ...) of a run with their given and their true labels, both known.

    They are training images, or validation images if more is known of those: hardly a
    training image of Clothing1M was checked, and none of Food-101N.
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


def crawled_data(
    spec: Spec, device: torch.device, *, clean_val: bool = True
) -> tuple[NoisyData, Truth]:
    """Data that come already divided, with as many clean images as the spec allows.

    Clean images of which it is only known that their label is wrong are for methods
    that learn from `verdicts`.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    seen, truth = CRAWLED_SETS[spec.dataset].load(
        generator,
        limit=spec.recipe.limit,
        size=profiles.PIXELS[spec.model] + 2 * spec.recipe.crop,
        crop_to=profiles.PIXELS[spec.model],
        clean_val=clean_val,
    )
    chosen = torch.randperm(len(seen.clean_labels), generator=generator)
    if not METHODS[spec.method].verdicts:
        chosen = chosen[seen.clean_labels[chosen] != datasets.UNKNOWN]
    chosen = chosen[: spec.num_clean].sort().values
    return datasets.with_clean(seen, chosen).to(device), truth.to(device)


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
        ValueError: for what the method refuses, such as a clean set that lacks a class.
        DivergenceError: if the loss stops being finite.
        DataError: if the data set is missing or damaged.
    """
    started = time.perf_counter()
    made_from = source(spec, device.type)  # before training: a folder may change
    check_processes(spec)
    seen, truth = data_for(spec, device)
    method = METHODS[spec.method]
    if spec.num_clean and not method.verdicts:
        clean_only.check_clean_set(seen)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    history, screening, label_accuracy, transition = [], None, [], None
    with (
        training.seeded(spec.seed, device) as generator,
        torch.compiler.config.patch(recompile_limit=FORMS),
    ):
        setup = Setup(spec.model, spec.recipe, generator)
        for event in method.run(seen, setup, **settings_of(spec)):
            if isinstance(event, Epoch):
                history.append(evaluation.measure(event, truth))
                model = event.model
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
        "precision": precision_of(model, device),
        "peak_memory_mb": records.peak_memory(device),
        **records.provenance(device, made_from),
        "history": {name: [row[name] for row in history] for name in history[0]},
    }


def check_processes(spec: Spec) -> None:
    """Raise ValueError if torchrun's processes cannot train a method together."""
    count = os.environ.get("WORLD_SIZE", "1")
    if METHODS[spec.method].remembers and int(count) > 1:
        raise ValueError(
            f"{spec.method} keeps what it saw of each image, which the {count} "
            "processes of torchrun do not share; leave torchrun out"
        )


def attempt(
    spec: Spec,
    device: torch.device,
    *,
    progress: Callable[[Event], None] = lambda event: None,
) -> Record:
    """Like `run`, but a run that stops in mid-training gives a record that says so.

    Such a record has the error's message as `stopped`, and no results.

    Raises:
        ValueError: for what a method refuses before it trains.
    """
    started, trained = time.perf_counter(), []
    made_from = source(spec, device.type)  # as in `run`

    def noted(event: Event) -> None:
        if isinstance(event, Epoch | Auxiliary):
            trained.append(True)
        progress(event)

    try:
        return run(spec, device, progress=noted)
    except FAILURES as error:
        if not trained and isinstance(error, ValueError):
            raise
        return {
            "spec": spec.as_dict(),
            "recipe": spec.recipe.as_dict(),
            "stopped": str(error),
            "seconds": round(time.perf_counter() - started, 3),
            **records.provenance(device, made_from),
        }


def settings_of(spec: Spec) -> dict[str, object]:
    """The method's settings; a "known" T is the one that the labels were drawn from."""
    known = {"T": transition_of(spec)} if knows_T(spec) else {}
    return dict(spec.settings) | known


def knows_T(spec: Spec) -> bool:
    """Whether the method is told the T of the noise."""
    return dict(spec.settings).get("T") == loss_correction.KNOWN


def transition_of(spec: Spec) -> Tensor:
    """T (K, K) float64 of a run's noise, which is one of KNOWN_T."""
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
    """What was kept of the labels whose truth is known; None if none are."""
    known = truth.labels != datasets.UNKNOWN
    if not known.any():
        return None
    right = seen.labels[known] == truth.labels[known]
    return evaluation.screened(event.kept[known], right)


def realised_rate(seen: NoisyData, truth: Truth) -> float | None:
    """Share of wrong labels among those whose truth is known; None if none are."""
    known = truth.labels != datasets.UNKNOWN
    if not known.any():
        return None
    return noise.realised_rate(seen.labels[known], truth.labels[known])


def precision_of(model: nn.Module, device: torch.device) -> str:
    """The type in which a network's matrices are multiplied, as `autocast` sets it."""
    with training.autocast(model, device):
        return "bfloat16" if torch.is_autocast_enabled(device.type) else "float32"


def source(spec: Spec, device: str = "cpu") -> str:
    """Hash of what makes a run's numbers besides spec and recipe, which a record holds.

    That is the code and, for a folder of your own, also which images are in it.
    """
    made_by = code(spec, device)
    if spec.dataset != folder.NAME:
        return made_by
    return hashlib.sha256((made_by + folder.fingerprint()).encode()).hexdigest()[:12]


def code(spec: Spec, device: str) -> str:
    """Hash of the code behind a run; what only a GPU runs counts on a GPU only."""
    loaders = datasets.DATASETS | {name: s.load for name, s in CRAWLED_SETS.items()}
    of_labels = [NOISES[spec.noise]] if spec.noise in NOISES else []
    return records.source_hash(
        METHODS[spec.method].run,
        MODELS[spec.model],
        source_of_data(spec),
        loaders[spec.dataset],
        *of_labels,
        *([transition_of] if knows_T(spec) else []),
        *(OF_FILES if spec.dataset in CRAWLED_SETS else []),
        *(ON_A_GPU if device == "cuda" else []),
        Setup,
        training.seeded,
        noise.realised_rate,
        evaluation.measure,
        evaluation.outcome,
        evaluation.screened,
        besides=(Spec, Recipe),
    )


def spec_of(record: Record) -> Spec | None:
    """What a record was meant to run; None if today's code no longer knows a name."""
    try:
        return Spec(**record["spec"])
    except (ValueError, TypeError):
        return None


def recipe_of(record: Record) -> Recipe | None:
    """How a record's networks were trained; None if today's code cannot express it."""
    try:
        return Recipe(**record["recipe"])
    except (KeyError, TypeError):
        return None


def is_current(record: Record) -> bool:
    """Whether today's code, profiles included, would make this record again."""
    spec = spec_of(record)
    return (
        spec is not None
        and record.get("source") == source(spec, device_type(record))
        and recipe_of(record) == spec.recipe
    )


def device_type(record: Record) -> str:
    """What a record was made on: "cpu", if it has a number of threads, or "cuda"."""
    return "cuda" if record.get("threads", 0) is None else "cpu"


def latest(found: Iterable[Record]) -> list[Record]:
    """For each spec and device, the record that counts, if the run reached its end.

    It is the last one that today's code made, or else the last one of all.
    """
    return [record for record in newest(found) if "stopped" not in record]


def stopped(found: Iterable[Record]) -> list[Record]:
    """For each spec and device, the record that counts, if the run stopped."""
    return [record for record in newest(found) if "stopped" in record]


def newest(found: Iterable[Record]) -> Iterable[Record]:
    """One record per spec and device: the last by today's code, or else the last."""
    chosen: dict[tuple[object, str], Record] = {}
    for record in found:
        # Specs that today's code does not know are told apart by their text.
        key = spec_of(record) or repr(record["spec"]), record["device"]
        if key not in chosen or is_current(record) or not is_current(chosen[key]):
            chosen[key] = record
    return chosen.values()
