"""Food-101N: photographs of 101 dishes from the web, about a fifth of them mislabelled.

The class label of 310,009 images is the name of their folder, which is noisy. For
57,609, a person said whether it is right (Lee et al. 2018). The test set is that of
Food-101 (Bossard et al. 2014), which has the same classes. Both are read in the layout
that they unpack to. A key is the path of an image under its set's `images/`.
"""

import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from nlhelpers import crawled
from nlhelpers.crawled import Part
from nlhelpers.data import UNKNOWN, DataError, NoisyData, Truth, data_root
from nlhelpers.files import ImageFiles

SOURCE = "https://kuanghuei.github.io/Food-101N/"
TEST_SOURCE = "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"
NUM_CLASSES = 101
IMAGES, TEST_IMAGES = "Food-101N_release/images/", "food-101/images/"
CLASS_NAMES = "Food-101N_release/meta/classes.txt"
NOISY = "Food-101N_release/meta/imagelist.tsv"
CLEAN = "Food-101N_release/meta/verified_train.tsv"
VAL = "Food-101N_release/meta/verified_val.tsv"
TEST = "food-101/meta/test.txt"
FILES = (IMAGES, CLASS_NAMES, NOISY, CLEAN, VAL, TEST_IMAGES, TEST)
HEADER = "class_name"  # how the first line of a list starts, if it is a header
VERDICTS = {"0": False, "1": True}


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
    """Food-101N as Lee et al. (2018) divide it, and the test set of Food-101.

    The training set is the whole list without the images verified for validation. The
    clean set is the images verified for training; they stay in the training set too.
    Validation uses the images verified for it whose label is right. A label that was
    found right is both the given and the true one; where it was found wrong, the true
    one is UNKNOWN.

    All files are examined first. If a few are missing or damaged, the others are used,
    and one warning reports them. The same goes for verified images that are not listed.

    Args:
        generator: a CPU generator; decides which images are used, if `limit` is set.
        root: the folder that holds `Food-101N_release` and `food-101`; None is
            `data_root()`.
        limit: use at most this many images of each of the four lists; None is all.
        size: as in `ImageFiles`.
        crop_to: as in `ImageFiles`.
        clean_val: has no effect here: the true labels of the validation images are the
            given ones.
        thorough: decode each image to see whether it is damaged, which takes as long as
            an epoch; else only its header is read.

    Raises:
        DataError: if a set is missing, if a list is malformed, if more than 1 % of the
            images are missing or damaged, or if more than 1 % of a verified list are
            not listed.
    """
    root = folder(root)
    crawled.check_limit(limit)
    classes = class_names(root)
    listed = read_labels(root / NOISY, classes)
    verified = {name: read_verified(root / name, classes) for name in (CLEAN, VAL)}
    check_lists(root, listed, verified)
    names = [IMAGES + key for key in listed]
    every = as_part(ImageFiles(root, names, size, crop_to), listed.values())
    place = {key: number for number, key in enumerate(listed)}
    divided = divide(listed, verified)
    parts = {
        name: every[torch.tensor([place[key] for key in keys], dtype=torch.int64)]
        for name, keys in divided.items()
    }
    right = [verified[CLEAN][key] for key in divided[CLEAN]]
    parts[CLEAN] = true_only_where(torch.tensor(right, dtype=bool), parts[CLEAN])
    # If the truth were known only for noisy images that were verified right, there
    # would seem to be no noise.
    parts[NOISY] = true_only_where(torch.tensor(False), parts[NOISY])
    tested = read_labels(root / TEST, classes)
    names = [f"{TEST_IMAGES}{key}.jpg" for key in tested]
    parts[TEST] = as_part(ImageFiles(root, names, size, crop_to), tested.values())
    parts = {name: part.drawn(limit, generator) for name, part in parts.items()}
    parts = crawled.without_broken(parts, thorough)
    sets = (parts[name] for name in (NOISY, CLEAN, VAL, TEST))
    return crawled.divided(*sets, num_classes=NUM_CLASSES, clean_val=clean_val)


def folder(root: Path | None = None) -> Path:
    """Where both sets are: `root`, or if that is None, `data_root()`."""
    return data_root() if root is None else Path(root)


def class_names(root: Path | None = None) -> tuple[str, ...]:
    """The 101 names of the classes, in the order of their labels.

    Args:
        root: as in `load`.

    Raises:
        DataError: if any part of the sets is missing.
    """
    root = folder(root)
    check_layout(root)
    path = root / CLASS_NAMES
    names = dict.fromkeys(name for _, name in read_rows(path))
    return crawled.check_names(path, list(names), NUM_CLASSES)


# Reading the lists


def check_layout(root: Path) -> None:
    """Raise DataError, which says what to put where, unless both sets are complete."""
    crawled.check_layout(
        root,
        FILES,
        f"unpack Food-101N ({SOURCE}) and Food-101 ({TEST_SOURCE}) there, or set "
        "NLHELPERS_DATA to the folder that holds Food-101N_release/ and food-101/",
    )


def read_rows(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a list without its header, each preceded by where it was found."""
    for number, line in enumerate(crawled.read_lines(path), start=1):
        if number > 1 or not line.startswith(HEADER):
            yield f"{path}, line {number}", line


def read_labels(path: Path, classes: Sequence[str]) -> dict[str, int]:
    """The class label of each key in a list.

    Raises:
        DataError: if a line is not a key, or there are no lines.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    rows = read_rows(path)
    labels = {key: numbers[class_of(key, numbers, where)] for where, key in rows}
    if not labels:
        raise DataError(f"{path} names no image; put the published file there")
    return labels


def read_verified(path: Path, classes: Sequence[str]) -> dict[str, bool]:
    """Whether the class label of each key in a list was found right.

    Raises:
        DataError: if a line is malformed, a key has two verification labels, or no
            label was found right.
    """
    verified = {}
    for where, line in read_rows(path):
        key, _, verdict = line.rpartition("\t")
        if verdict not in VERDICTS:
            raise DataError(
                f"{where} is {line!r}; it must be a key, a tab and 0 or 1, as in "
                "'ramen/1a2b.jpg\\t1'"
            )
        class_of(key, classes, where)
        if verified.setdefault(key, VERDICTS[verdict]) != VERDICTS[verdict]:
            raise DataError(
                f"{where}: {key} has verification label {verdict} here and another "
                "further up; delete the wrong one of the two lines"
            )
    if not any(verified.values()):
        raise DataError(f"{path} marks no label as right; put the published file there")
    return verified


def class_of(key: str, classes: Container[str], where: str) -> str:
    """The class in a key; if there is none, the error message begins with `where`."""
    name, _, image = key.partition("/")
    if not name or not image or "/" in image:
        raise DataError(
            f"{where}: key {key!r} is malformed; it must be a class and the name of an "
            "image, as in 'ramen/1a2b.jpg'"
        )
    if name not in classes:
        raise DataError(
            f"{where}: class {name!r} is unknown; it must be one of those in "
            f"{CLASS_NAMES}"
        )
    return name


def check_lists(
    root: Path, listed: Container[str], verified: Mapping[str, Mapping[str, bool]]
) -> None:
    """Warn of verified keys that are not listed; raise DataError if there are many.

    The published lists do not agree on the class of every image.
    """
    for name, verdicts in verified.items():
        crawled.tolerate(
            [key for key in verdicts if key not in listed],
            len(verdicts),
            f"keys in {root / name} are not in {root / NOISY}",
            "put lists of one release there",
        )


# Dividing the images


def divide(
    listed: Mapping[str, int], verified: Mapping[str, Mapping[str, bool]]
) -> dict[str, list[str]]:
    """The keys of the training, clean and validation images, by their list.

    Images verified for validation are in no other part, be their label right or wrong.
    """
    train = [key for key in listed if key not in verified[VAL]]
    checked = [key for key in verified[CLEAN] if key in listed]
    right = [key for key, is_right in verified[VAL].items() if is_right]
    return {
        NOISY: train,
        CLEAN: [key for key in checked if key not in verified[VAL]],
        VAL: [key for key in right if key in listed],
    }


def as_part(images: ImageFiles, labels: Iterable[int]) -> Part:
    """Images of a list, with their labels taken to be true."""
    labels = torch.tensor(list(labels))
    return Part(images, given=labels, true=labels, index=torch.arange(len(labels)))


def true_only_where(known: Tensor, part: Part) -> Part:
    """A part whose true labels are UNKNOWN except where `known`, (N,) or () bool."""
    return dataclasses.replace(part, true=part.true.where(known, UNKNOWN))
