"""Clothing1M: photographs from shops, with labels found in the text around them.

A million images carry noisy labels, and 72,409 were labelled by hand; there are 14
classes (Xiao et al. 2015). The set is available from the authors only. It is read in
the layout they publish: `images/`, lists of keys, and tables from key to label. A key
is the path of an image under the root.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from nlhelpers import crawled
from nlhelpers.crawled import Part, read_lines
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
FILES = (*TABLES, GIVEN, TRUE, CLASS_NAMES, "images/")


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
    """Clothing1M as Xiao et al. (2015) use it: noisy images and a clean set.

    The clean set, the validation images and the test images are those the authors
    chose, with true labels. A label that is unknown is -1: the true label of a noisy
    image that nobody checked (`Truth.labels`), and the given label of a checked image
    that never got one (`NoisyData.clean_given_labels`).

    All files are examined first. If a few are missing or damaged, the others are used,
    and one warning reports them.

    Args:
        generator: a CPU generator; decides which images are used, if `limit` is set.
        root: the folder that holds `images`; None is `clothing1m` in `data_root()`.
        limit: use at most this many images of each of the four lists; None is all.
        size: as in `ImageFiles`.
        crop_to: as in `ImageFiles`.
        clean_val: whether `NoisyData.val_labels` are true; else they are as given, and
            -1 where none was given.
        thorough: decode each image to see whether it is damaged, which takes as long as
            an epoch; else only its header is read.

    Raises:
        DataError: if the set is missing, if a list is malformed or disagrees with
            another one, or if more than 1 % of the images are missing or damaged.
    """
    root = folder(root)
    crawled.check_limit(limit)
    class_names(root)
    tables = {name: read_labels(root / name) for name in (GIVEN, TRUE)}
    keys = {name: read_lines(root / name) for name in TABLES}
    check_lists(root, keys, tables)
    parts = {}
    for name, listed in keys.items():
        images = ImageFiles(root, listed, size, crop_to)
        given, true = (look_up(listed, tables[table]) for table in (GIVEN, TRUE))
        part = Part(images, given, true, torch.arange(len(listed)))
        parts[name] = part.drawn(limit, generator)
    parts = crawled.without_broken(parts, thorough)
    sets = (parts[name] for name in (NOISY, CLEAN, VAL, TEST))
    return crawled.divided(*sets, num_classes=NUM_CLASSES, clean_val=clean_val)


def folder(root: Path | None = None) -> Path:
    """Where the set is: `root`, or if that is None, `clothing1m` in `data_root()`."""
    return data_root() / "clothing1m" if root is None else Path(root)


def class_names(root: Path | None = None) -> tuple[str, ...]:
    """The 14 English names of the classes, in the order of their labels.

    Args:
        root: as in `load`.

    Raises:
        DataError: if any part of the set is missing.
    """
    root = folder(root)
    check_layout(root)
    path = root / CLASS_NAMES
    return crawled.check_names(path, read_lines(path), NUM_CLASSES)


# Reading the lists


def check_layout(root: Path) -> None:
    """Raise DataError, which says what to put where, unless the set is complete."""
    crawled.check_layout(
        root,
        FILES,
        f"ask the authors of Clothing1M for the set ({SOURCE}) and put images/, the "
        f"key lists, the label tables and {CLASS_NAMES} there, or set NLHELPERS_DATA "
        "to the folder that holds clothing1m/",
    )


def read_labels(path: Path) -> dict[str, int]:
    """Labels by key, from lines that hold a key and a label.

    Raises:
        DataError: if a line is malformed, a label is not one of 0 to 13, or a key has
            two different ones.
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
    """Raise DataError if a key has no label, or is in two lists that may share none.

    A noisy image may be in the clean set too; otherwise, no image of one list may be in
    another.
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
