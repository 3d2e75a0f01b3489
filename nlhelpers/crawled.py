"""Data sets of photographs in files, with labels found beside them.

What such sets share: lists in text files, images of which a few may be damaged, and a
division into training, clean, validation and test images that their authors made.
"""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from nlhelpers.data import DataError, NoisyData, Truth
from nlhelpers.files import Checking, ImageFiles

MOST_BROKEN = 0.01  # a larger share of broken images is no accident
NAMED = 20  # how many of them a message names


@dataclass(frozen=True, eq=False)
class Part:
    """The images of one list, or some of them.

    Attributes:
        images: N files.
        given: (N,) int64, noisy labels, or `data.UNKNOWN`.
        true: (N,) int64, labels checked by hand, or `data.UNKNOWN`.
        index: (N,) int64, the position of each image in its list.
    """

    images: ImageFiles
    given: Tensor
    true: Tensor
    index: Tensor

    def __getitem__(self, index: Tensor | slice) -> "Part":
        """A subset by int64 or bool (N,), or by a slice."""
        return Part(*(value[index] for value in vars(self).values()))

    def drawn(self, limit: int | None, generator: Generator) -> "Part":
        """At most `limit` of the images, chosen at random; None is all of them."""
        chosen = torch.randperm(len(self.index), generator=generator)[:limit]
        return self[chosen.sort().values]


def divided(
    noisy: Part, clean: Part, val: Part, test: Part, num_classes: int, clean_val: bool
) -> tuple[NoisyData, Truth]:
    """The four parts as a method sees them, and what only the evaluation sees.

    Args:
        noisy: to train on.
        clean: with true labels.
        val: to validate on.
        test: with true labels.
        num_classes: K.
        clean_val: whether a method validates on true labels; else on given ones.
    """
    seen = NoisyData(
        images=noisy.images,
        labels=noisy.given,
        val_images=val.images,
        val_labels=val.true if clean_val else val.given,
        num_classes=num_classes,
        clean_images=clean.images,
        clean_labels=clean.true,
        clean_given_labels=clean.given,
    )
    truth = Truth(
        labels=noisy.true,
        val_labels=val.true,
        test_images=test.images,
        test_labels=test.true,
        index=noisy.index,
    )
    return seen, truth


def check_limit(limit: int | None) -> None:
    """Raise ValueError unless a limit leaves at least one image."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit!r}; it must be 1 or more, or None for all")


# Reading the lists


def check_layout(root: Path, names: Iterable[str], advice: str) -> None:
    """Raise DataError, naming all that is missing, unless a set is complete.

    Args:
        root: the folder that should hold it.
        names: files, and folders with a / at the end.
        advice: what to put where.
    """
    missing = [name for name in names if not is_there(root / name, name[-1] == "/")]
    if missing:
        lack = f"lacks {', '.join(missing)}" if root.exists() else "is missing"
        raise DataError(f"{root} {lack}; {advice}")


def is_there(path: Path, folder: bool) -> bool:
    """Whether a path is a folder, if `folder` is true, or else a file."""
    return path.is_dir() if folder else path.is_file()


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, none of which may be blank."""
    # A path need not be UTF-8; what is not comes through as it is.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if "" in lines:
        raise DataError(
            f"{path}, line {lines.index('') + 1} is blank; put the published file there"
        )
    return lines


def check_names(path: Path, names: Sequence[str], number: int) -> tuple[str, ...]:
    """Return the names of the classes, or raise DataError unless there are `number`."""
    if len(names) != number:
        raise DataError(
            f"{path} has {len(names)} names, not {number}; put the published file there"
        )
    return tuple(names)


# Leaving out what is damaged


def without_broken(
    parts: Mapping[str, Part],
    thorough: bool,
    advice: str = "unpack the published archives again",
) -> dict[str, Part]:
    """The parts without their missing and damaged images, which one warning reports.

    An image in two parts counts twice.

    Args:
        parts: by name.
        thorough: whether every image is decoded, and not only its header read.
        advice: what to do if there are too many of them.

    Raises:
        DataError: if they are more than 1 % of all.
    """
    broken = {n: part.images.broken(thorough=thorough) for n, part in parts.items()}
    lost = [name for n, part in parts.items() for name in part.images[broken[n]].names]
    total = sum(len(part.index) for part in parts.values())
    root = next(iter(parts.values())).images.root
    lost = [os.fsdecode(name) for name in lost]
    if lost:
        advice = f"{advice} ({Checking(root, thorough).error(root / lost[0])})"
    what = f"images under {root} are missing or damaged"
    tolerate(lost, total, what, advice)
    return {name: part[~broken[name]] for name, part in parts.items()}


def tolerate(lost: Sequence[str], total: int, what: str, advice: str) -> None:
    """Warn whoever loads a set of what is left out.

    Args:
        lost: names of what is left out.
        total: how many there are in all.
        what: what they are and what is wrong with them, for the message.
        advice: what to do if there are too many of them.

    Raises:
        DataError: if they are more than 1 % of all.
    """
    if not lost:
        return
    first = ", ".join(dict.fromkeys(lost[:NAMED]))
    found = f"{len(lost):,} of {total:,} {what}, first {first}"
    if len(lost) > MOST_BROKEN * total:
        raise DataError(f"{found}; more than {MOST_BROKEN:.0%} are too many: {advice}")
    # Points to the line that called `load`, two calls further up.
    warnings.warn(f"{found}; the run goes on without them", stacklevel=4)
