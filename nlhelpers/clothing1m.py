"""Clothing1M: photographs from shops, with labels found in the text around them.

A million images carry noisy labels, 72,409 were labelled by hand; there are 14 classes
(Xiao et al. 2015). The authors alone give out the set. It is read in the layout they
publish: `images/`, lists of keys, and tables from key to label. A key is the path of an
image under the root.
"""

import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from nlhelpers.data import UNKNOWN, DataError, NoisyData, Truth, data_root
from nlhelpers.files import ImageFiles

SOURCE = "https://github.com/Cysu/noisy_label"
NUM_CLASSES = 14
CLASS_NAMES = "category_names_eng.txt"
GIVEN, TRUE = "noisy_label_kv.txt", "clean_label_kv.txt"
NOISY = "noisy_train_key_list.txt"
CLEAN = "clean_train_key_list.txt"
VAL = "clean_val_key_list.txt"
TEST = "clean_test_key_list.txt"
TABLES = {NOISY: GIVEN, CLEAN: TRUE, VAL: TRUE, TEST: TRUE}  # with each list's labels
MOST_BROKEN = 0.01  # a larger share of broken images is no accident


@dataclass(frozen=True, eq=False)
class Part:
    """The images of one list, or some of them.

    Attributes:
        images: N files.
        given: (N,) int64, noisy labels, or `data.UNKNOWN`.
        true: (N,) int64, labels checked by hand, or `data.UNKNOWN`.
        index: (N,) int64, where each image stands in its list.
    """

    images: ImageFiles
    given: Tensor
    true: Tensor
    index: Tensor

    def __getitem__(self, index: Tensor) -> "Part":
        """A subset by int64 or bool (N,)."""
        return Part(*(value[index] for value in vars(self).values()))


def load(
    generator: Generator,
    *,
    root: Path | None = None,
    limit: int | None = None,
    size: int = 256,
    crop_to: int | None = None,
    clean_val: bool = True,
    thorough: bool = False,
) -> tuple[NoisyData, Truth]:
    """Clothing1M as Xiao et al. (2015) use it: noisy images, and a clean set besides.

    The clean set, the validation and the test images are those the authors chose, with
    true labels. Where a label is unknown it is -1: the true label of a noisy image
    that nobody checked (`Truth.labels`), and the label that a checked image would have
    been given, if it never was (`NoisyData.clean_given_labels`).

    All images are looked at first. If a few are missing or damaged, the rest is used,
    and one warning tells of them.

    Args:
        generator: a CPU generator; decides which images are used, if `limit` is set.
        root: the folder that holds `images`; None is `clothing1m` in `data_root()`.
        limit: use at most so many images of each of the four lists; None is all.
        size: as in `ImageFiles`.
        crop_to: as in `ImageFiles`.
        clean_val: whether `NoisyData.val_labels` are true; else they are as given, and
            -1 where none was.
        thorough: decode each image to see whether it is damaged, which takes as long as
            an epoch; else only its header is read.

    Raises:
        DataError: if the set is missing, if a list is malformed or disagrees with
            another one, or if more than 1 % of the images are missing or damaged.
    """
    root = data_root() / "clothing1m" if root is None else Path(root)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit!r}; it must be 1 or more, or None for all")
    check_layout(root)
    class_names(root)
    tables = {name: read_labels(root / name) for name in (GIVEN, TRUE)}
    keys = {name: read_lines(root / name) for name in TABLES}
    check_lists(root, keys, tables)
    parts = {}
    for name, listed in keys.items():
        images = ImageFiles(root, listed, size, crop_to)
        given, true = (look_up(listed, tables[table]) for table in (GIVEN, TRUE))
        part = Part(images, given, true, torch.arange(len(listed)))
        chosen = torch.randperm(len(listed), generator=generator)[:limit]
        parts[name] = part[chosen.sort().values]
    parts = without_broken(parts, thorough)
    noisy, clean, val, test = (parts[name] for name in (NOISY, CLEAN, VAL, TEST))
    seen = NoisyData(
        images=noisy.images,
        labels=noisy.given,
        val_images=val.images,
        val_labels=val.true if clean_val else val.given,
        num_classes=NUM_CLASSES,
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


def class_names(root: Path) -> tuple[str, ...]:
    """The 14 English names of the classes, in the order of their labels."""
    path = root / CLASS_NAMES
    names = read_lines(path)
    if len(names) != NUM_CLASSES:
        raise DataError(
            f"{path} has {len(names)} names, not {NUM_CLASSES}; put the published file "
            "there"
        )
    return tuple(names)


# Reading the lists


def check_layout(root: Path) -> None:
    """Raise DataError, which says what to put where, unless the set is complete."""
    files = [*TABLES, GIVEN, TRUE, CLASS_NAMES]
    missing = [name for name in files if not (root / name).is_file()]
    missing += [] if (root / "images").is_dir() else ["images/"]
    if missing:
        lack = f"lacks {', '.join(missing)}" if root.exists() else "is missing"
        raise DataError(
            f"{root} {lack}; ask the authors of Clothing1M for the set ({SOURCE}) and "
            f"put images/, the key lists, the label tables and {CLASS_NAMES} there, or "
            "set NLHELPERS_DATA to the folder that holds clothing1m/"
        )


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, of which none may be blank."""
    # A path need not be UTF-8; what is not comes through as it is.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if "" in lines:
        raise DataError(
            f"{path}, line {lines.index('') + 1} is blank; put the published file there"
        )
    return lines


def read_labels(path: Path) -> dict[str, int]:
    """Labels by key, from lines of a key and a label.

    Raises:
        DataError: if a line is malformed, a label is none of 0 to 13, or a key has two.
    """
    labels = {}
    for number, line in enumerate(read_lines(path), start=1):
        try:
            key, label = line.rsplit(maxsplit=1)
            label = int(label)
        except ValueError:
            raise DataError(
                f"{path}, line {number} is {line!r}; it must be a path and a label, as "
                "in 'images/0/1,2.jpg 5'"
            ) from None
        if not 0 <= label < NUM_CLASSES:
            raise DataError(
                f"{path}, line {number}: label {label} is out of range; it must be 0 "
                f"to {NUM_CLASSES - 1}"
            )
        if labels.setdefault(key, label) != label:
            raise DataError(
                f"{path}, line {number}: {key} has label {label} here and "
                f"{labels[key]} further up; put the published file there"
            )
    return labels


def check_lists(
    root: Path, keys: Mapping[str, Sequence[str]], tables: Mapping[str, dict[str, int]]
) -> None:
    """Raise DataError if a key has no label, or is in two lists that share none.

    A noisy image may be in the clean set too; in no other case does an image of one
    list return in another.
    """
    for name, table in TABLES.items():
        lost = [key for key in keys[name] if key not in tables[table]]
        if lost:
            raise DataError(
                f"{root / name} has {len(lost)} keys without a label in "
                f"{root / table}, first {lost[0]}; put lists of one release there"
            )
    unique = {name: set(listed) for name, listed in keys.items()}
    for one, other in itertools.combinations(keys, 2):
        if {one, other} == {NOISY, CLEAN}:
            continue
        both = unique[one] & unique[other]
        if both:
            raise DataError(
                f"{root / one} and {root / other} share {len(both)} keys, one is "
                f"{min(both)}; put lists of one release there"
            )


def look_up(keys: Sequence[str], table: Mapping[str, int]) -> Tensor:
    """The label of each key, (N,) int64; UNKNOWN where the table has none."""
    return torch.tensor([table.get(key, UNKNOWN) for key in keys])


# Looking at the images


def without_broken(parts: Mapping[str, Part], thorough: bool) -> dict[str, Part]:
    """The parts less their missing and damaged images, of which one warning tells.

    Raises:
        DataError: if they are more than 1 % of all.
    """
    broken = {n: part.images.broken(thorough=thorough) for n, part in parts.items()}
    lost = [name for n, part in parts.items() for name in part.images[broken[n]].names]
    total = sum(len(part.index) for part in parts.values())
    if lost:
        root = parts[NOISY].images.root
        first = ", ".join(os.fsdecode(name) for name in lost[:5])
        found = (
            f"{len(lost):,} of {total:,} images under {root} are missing or damaged, "
            f"first {first}"
        )
        if len(lost) > MOST_BROKEN * total:
            raise DataError(
                f"{found}; more than {MOST_BROKEN:.0%} are too many: unpack the "
                "published archives again"
            )
        warnings.warn(f"{found}; the run goes on without them", stacklevel=3)
    return {name: part[~broken[name]] for name, part in parts.items()}
