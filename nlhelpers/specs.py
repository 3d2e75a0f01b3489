"""What a run is: a frozen `Spec`, checked on the way in."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from nlhelpers import binary, clothing1m, folder, food101n, noise, profiles
from nlhelpers import data as datasets
from nlhelpers.methods import METHODS, loss_correction
from nlhelpers.models import MODELS
from nlhelpers.records import Record
from nlhelpers.training import Recipe

# Data sets that come with noisy labels, the first two with some checked ones as well.
CRAWLED_SETS = {"clothing1m": clothing1m, "food101n": food101n, "folder": folder}
CRAWLED = "crawled"
DATASETS = (*datasets.DATASETS, *CRAWLED_SETS)
# Noises whose T is known beforehand.
KNOWN_T = ("symmetric", "pair-flip", *noise.PATHS, "given")
# The noise of binary tasks, which have few images.
BINARY = "binary"
DRAWN = ("symmetric", "pair-flip", *noise.PATHS, "random-confusion", "confusing")
NOISE_NAMES = (*DRAWN, "given", *datasets.HUMAN_LABELS, CRAWLED, BINARY)
OWN_RATE = ("given", CRAWLED, BINARY, *datasets.HUMAN_LABELS)  # noises without a rate


@dataclass(frozen=True)
class Spec:
    """All that decides the numbers of a run, apart from the device.

    Every value is checked on the way in: a wrong one raises ValueError with the value
    and the allowed ones.

    Attributes:
        method: a key of `methods.METHODS`.
        dataset: a key of `data.DATASETS` or of CRAWLED_SETS.
        noise: a key of NOISES, "crawled" for the labels of a set in CRAWLED_SETS, or
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
        num_images: how many different images a task has to train on.
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
                f"clean set; methods that use one: {', '.join(able)}"
            )
        if self.num_clean and self.dataset == folder.NAME:
            raise ValueError(
                f"num_clean is {self.num_clean}, but nobody has checked the images of "
                "a folder; set num_clean to 0, and take a method that needs none"
            )
        if not self.num_clean and use == "needed":
            raise ValueError(
                f"num_clean is 0, but {self.method} learns from images with true "
                "labels; set num_clean to how many it may have"
            )

    def _check_noise(self) -> None:
        if (self.noise == CRAWLED) != (self.dataset in CRAWLED_SETS):
            raise ValueError(
                f"noise is {self.noise!r} and dataset is {self.dataset!r}; "
                f"{CRAWLED!r} is the noise of {', '.join(CRAWLED_SETS)}, and they have "
                "no other"
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
                f"paths; there are paths for {able}"
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
        if not isinstance(self.task, str):
            raise ValueError(
                f"task is {self.task!r}; it must be a text, like '5,7 vs 2,4'"
            )
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
            if isinstance(defaults[name], float):  # 1 and 1.0 are one setting
                settings[name] = float(value)
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
            return profiles.upsampled(self.model, self.profile, self.num_images)
        return profiles.recipe(self.dataset, self.model, self.profile)

    def as_dict(self) -> Record:
        """Plain values for JSON, including those left at None or empty."""
        values = dataclasses.asdict(self)
        return values | {"settings": dict(self.settings)}

    def __str__(self) -> str:
        """A line for progress bars that tells the runs of a grid apart."""
        rate = "" if self.noise_rate is None else f" {self.noise_rate:g}"
        noise = f"{self.noise}{rate}"
        if self.task:
            noise = f"{self.task}, {self.num_images} images, pi {self.pi}"
        clean = f", {self.num_clean} clean" if self.num_clean else ""
        settings = "".join(f", {name}={value}" for name, value in self.settings)
        return (
            f"{self.method}{settings}, {self.dataset}, {noise}{clean}, seed {self.seed}"
        )


def known(what: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ValueError, with the nearest name, if `value` is not an allowed one."""
    allowed = list(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        choice = ", ".join(allowed) or "none"
        raise ValueError(f"unknown {what} {value!r}; {hint}Allowed: {choice}")


def kinds_like(default: object) -> tuple[type, ...]:
    """Types that may take the place of a default; None stands for a number."""
    if default is None:
        return float, int, type(None)
    return (float, int) if isinstance(default, float) else (type(default),)


def natural(what: str, value: object) -> int:
    """Return a whole number of 0 or more, or raise ValueError."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 0 <= value < 2**63:
        raise ValueError(f"{what} is {value!r}; it must be a whole number of 0 or more")
    return value
