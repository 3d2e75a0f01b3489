"""A folder of your own images, with one folder of files in it for each class.

An image's label is the name of the folder that it is in, right or wrong. Names that
begin with a dot are ignored, since systems leave such files behind. Pictures that fit
in memory are decoded once. Nobody knows the truth, so the labels of validation and test
images are as given, too: how often a network agrees with them says less than how often
it is right.
"""

import dataclasses
import hashlib
import os
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import Generator
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from nlhelpers import crawled
from nlhelpers.crawled import Part
from nlhelpers.data import UNKNOWN, DataError, NoisyData, Truth, data_root
from nlhelpers.files import ImageFiles

NAME = "folder"  # of the folder, under the data root
EVERY = 10  # one image in so many is for validation, and another one for the test
KEPT = 1 << 30  # bytes of decoded pictures that are held in memory
EXTENSIONS = (*IMG_EXTENSIONS, ".gif", ".jfif")
# Pictures that are not read; what systems and people keep beside pictures is no news.
NOT_READ = (
    *(".avif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".raw"),
)


def load(
    generator: Generator,
    *,
    root: Path | None = None,
    limit: int | None = None,
    size: int = 256,
    crop_to: int | None = None,
    clean_val: bool = True,
    thorough: bool = True,
) -> tuple[NoisyData, Truth]:
    """The images of a folder, divided at random; there is no clean set.

    Of each class about a tenth is for validation, and as much for the test. The true
    labels of the training and the validation images are UNKNOWN. `index` is the
    position of each training image among all images in the order of their paths.

    Args:
        generator: a CPU generator; decides which image goes where.
        root: the folder of folders; None is "folder" under `data_root()`.
        limit: use at most this many images in all; None is all of them.
        size: as in `ImageFiles`.
        crop_to: as in `ImageFiles`.
        clean_val: has no effect here: there are no labels but the given ones.
        thorough: decode each image to see whether it is damaged, which takes as long as
            an epoch; else only its header is read.

    Raises:
        DataError: if there are fewer than two classes, if one has no images, if there
            are too few images to divide, or if more than 1 % of them are damaged.

    Warns:
        UserWarning: if up to 1 % are damaged, or if there are pictures of a kind that
            is not read.
    """
    root = folder(root)
    crawled.check_limit(limit)
    classes = class_names(root)
    files = listed(root, classes)
    labels = torch.tensor([label for _, label in files])
    names = [os.path.relpath(path, root) for path, _ in files]
    unknown = torch.full_like(labels, UNKNOWN)
    images = ImageFiles(root, names, size, crop_to)
    every = Part(images, labels, unknown, torch.arange(len(labels)))
    every = every.drawn(limit, generator)
    advice = "repair or remove them"
    every = crawled.without_broken({NAME: every}, thorough, advice)[NAME]
    if len(every.index) <= EVERY // 2:
        raise DataError(
            f"{root} has {len(every.index)} images that can be used; put ten or more "
            "there, and as many as you can"
        )
    if 3 * size**2 * len(every.index) <= KEPT:
        every = dataclasses.replace(every, images=every.images.kept())
    order = torch.randperm(len(every.index), generator=generator)
    # Counted class by class, so that none loses more than its share.
    place = every.given[order].argsort(stable=True).argsort() % EVERY
    is_val, is_test = place == 0, place == EVERY // 2
    parts = is_val, is_test, ~(is_val | is_test)
    val, test, noisy = (every[order[part]] for part in parts)
    test = dataclasses.replace(test, true=test.given)
    parts = noisy, noisy[:0], val, test
    return crawled.divided(*parts, num_classes=len(classes), clean_val=False)


def folder(root: Path | None = None) -> Path:
    """Where the images are: `root`, or if that is None, below `data_root()`."""
    return data_root() / NAME if root is None else Path(root)


def class_names(root: Path | None = None) -> tuple[str, ...]:
    """The names of the folders, sorted: the classes in the order of their labels.

    Args:
        root: as in `load`.

    Raises:
        DataError: if there are fewer than two of them.
    """
    root = folder(root)
    advice = (
        "put one folder of images there for each class, or set NLHELPERS_DATA to the "
        f"folder that holds {NAME}/"
    )
    if not root.is_dir():
        raise DataError(f"{root} is missing; {advice}")
    try:
        found, _ = find_classes(root)
    except FileNotFoundError:
        found = []
    found = [name for name in found if not name.startswith(".")]
    if len(found) < 2:
        raise DataError(
            f"{root} has {len(found)} folders and needs two or more; {advice}"
        )
    return tuple(found)


def fingerprint(root: Path | None = None) -> str:
    """A hash of the names and sizes of all files, since other files give other results.

    Links are followed, as they are when the images are listed.

    Args:
        root: as in `load`; it need not exist.
    """
    root = folder(root)
    walked = os.walk(root, followlinks=True)
    paths = (Path(parent, name) for parent, _, names in walked for name in names)
    files = (path for path in paths if path.is_file() and not hidden(path, root))
    found = sorted((str(path.relative_to(root)), path.stat().st_size) for path in files)
    return hashlib.sha256(repr(found).encode()).hexdigest()


def listed(root: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """Paths of all images below the folders, with their labels, sorted.

    Files of other kinds are skipped, pictures among them with a warning.

    Raises:
        DataError: if a folder has no image.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    wanted = EXTENSIONS + NOT_READ
    found = make_dataset(root, numbers, wanted, allow_empty=True)
    found = [(path, label) for path, label in found if not hidden(Path(path), root)]
    files = [(path, label) for path, label in found if is_read(path)]
    others = Counter(Path(path).suffix for path, _ in found if not is_read(path))
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
        warnings.warn(
            f"pictures under {root} of a kind that is not read: {kinds}; convert them "
            f"to one of {', '.join(EXTENSIONS)}",
            stacklevel=3,
        )
    empty = set(classes) - {classes[label] for _, label in files}
    if empty:
        raise DataError(
            f"{root / min(empty)} has no image; put some there, or remove it. Images "
            f"are files that end in {', '.join(EXTENSIONS)}"
        )
    return files


def is_read(path: str) -> bool:
    """Whether a file's name ends like that of a picture that can be read."""
    return path.lower().endswith(EXTENSIONS)


def hidden(path: Path, root: Path) -> bool:
    """Whether a name on the path from the root to a file begins with a dot."""
    return any(name.startswith(".") for name in path.relative_to(root).parts)


def duplicates(images: ImageFiles) -> list[list[str]]:
    """Names of files that are the same to the last byte, a list for each such file.

    A network that has learnt from one of them is no judge of the others.
    """
    by_size, by_content = defaultdict(list), defaultdict(list)
    for name in sorted(map(os.fsdecode, images.names)):
        by_size[(images.root / name).stat().st_size].append(name)
    for name in (name for same in by_size.values() if len(same) > 1 for name in same):
        with (images.root / name).open("rb") as file:
            by_content[hashlib.file_digest(file, "sha256").digest()].append(name)
    return [same for same in by_content.values() if len(same) > 1]
