"""Data sets as uint8 tensors that live on the device, and who may see what.

A method sees a `NoisyData` and nothing else. The true labels and the test set live in a
`Truth`, which only the evaluation receives.
"""

import codecs
import dataclasses
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets.utils import check_integrity

from nlhelpers import noise

# The label sets of CIFAR-10N, by the names that they have here as `noise`.
HUMAN_LABELS = {
    "human-clean": "clean_label",
    "human-aggregate": "aggre_label",
    "human-random1": "random_label1",
    "human-random2": "random_label2",
    "human-random3": "random_label3",
    "human-worst": "worse_label",
}


UNKNOWN = -1  # in place of a label that an image never got

# What readers raise for a file whose content is not what its name promises.
UNREADABLE = (LookupError, TypeError, ValueError, RuntimeError, AssertionError)


class DataError(RuntimeError):
    """A data file is missing or damaged; the message names it and says what to do."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """Images with their true labels, as published.

    Attributes:
        images: (N, C, H, W) uint8, in the published order; for the digits, in that of
            `digits`.
        labels: (N,) int64, true.
        test_images: (M, C, H, W) uint8.
        test_labels: (M,) int64, true.
        class_names: K names.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)


@dataclass(frozen=True, eq=False)
class NoisyData:
    """All that a method ever sees.

    Attributes:
        images: (N, C, H, W) uint8, to train on.
        labels: (N,) int64, as given: noisy.
        val_images: (V, C, H, W) uint8.
        val_labels: (V,) int64, as noisy as `labels`, unless the method's paper
            validates on labels checked by hand.
        num_classes: K.
        clean_images: (M, C, H, W) uint8, the paper's small clean set; M may be 0.
        clean_labels: (M,) int64, checked by hand, so true; UNKNOWN where the given one
            was found wrong, which only methods that learn from `verdicts` (`Method`)
            are shown.
        clean_given_labels: (M,) int64, what was given before they were checked;
            UNKNOWN where nothing was.
    """

    images: Tensor
    labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    num_classes: int
    clean_images: Tensor
    clean_labels: Tensor
    clean_given_labels: Tensor

    def to(self, device: torch.device) -> "NoisyData":
        """The same on `device`, images in channels-last layout."""
        return _to(self, device)


@dataclass(frozen=True, eq=False)
class Truth:
    """What only the evaluation sees.

    Attributes:
        labels: (N,) int64, the true labels of `NoisyData.images`.
        val_labels: (V,) int64, of `NoisyData.val_images`.
        test_images: (M, C, H, W) uint8.
        test_labels: (M,) int64.
        index: (N,) int64, the position of each training image in `DataSet.images`.
    """

    labels: Tensor
    val_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    index: Tensor

    def to(self, device: torch.device) -> "Truth":
        """The same on `device`."""
        return _to(self, device)


def with_clean(data: NoisyData, index: Tensor | slice) -> NoisyData:
    """The data with only some of their clean images: int64 or bool (M,), or a slice."""
    clean = ("clean_images", "clean_labels", "clean_given_labels")
    return dataclasses.replace(data, **{n: getattr(data, n)[index] for n in clean})


def _to(bundle, device: torch.device):
    moved = {}
    for field in dataclasses.fields(bundle):
        value = getattr(bundle, field.name)
        if getattr(value, "ndim", None) == 4:  # images, as a tensor or as files
            value = value.to(device, memory_format=torch.channels_last)
        elif isinstance(value, Tensor):
            value = value.to(device)
        moved[field.name] = value
    return dataclasses.replace(bundle, **moved)


def split(
    dataset: DataSet,
    noisy_labels: Tensor,
    generator: torch.Generator,
    *,
    val_share: float = 0.1,
    num_clean: int = 0,
    clean_val: bool = False,
    limit: int | None = None,
) -> tuple[NoisyData, Truth]:
    """Divide a training set at random into train, validation and clean images.

    Args:
        dataset: images with the truth.
        noisy_labels: (N,) int64, what a method is given instead.
        generator: a CPU generator; decides which image goes where.
        val_share: share held out for validation (Ding et al. 2018 hold out 10 %).
        num_clean: images with true labels, taken from the training part.
        clean_val: validate on true labels, as some papers do.
        limit: train and validate on this many images in all, and test on as many; None
            is all of them.
    """
    noise.check_labels(noisy_labels, dataset.num_classes)
    if len(noisy_labels) != len(dataset.images):
        raise ValueError(
            f"{len(noisy_labels)} labels for {len(dataset.images)} training images"
        )
    order = torch.randperm(len(dataset.images), generator=generator)[:limit]
    num_val = round(val_share * len(order))
    if not 0 <= num_clean < len(order) - num_val:
        raise ValueError(
            f"num_clean is {num_clean}; it must leave noisy images to train on, so "
            f"be 0 to {len(order) - num_val - 1}"
        )
    val, clean, train = order.tensor_split([num_val, num_val + num_clean])
    test = slice(limit)
    noisy = NoisyData(
        images=dataset.images[train],
        labels=noisy_labels[train],
        val_images=dataset.images[val],
        val_labels=(dataset.labels if clean_val else noisy_labels)[val],
        num_classes=dataset.num_classes,
        clean_images=dataset.images[clean],
        clean_labels=dataset.labels[clean],
        clean_given_labels=noisy_labels[clean],
    )
    truth = Truth(
        labels=dataset.labels[train],
        val_labels=dataset.labels[val],
        test_images=dataset.test_images[test],
        test_labels=dataset.test_labels[test],
        index=train,
    )
    return noisy, truth


def data_root() -> Path:
    """Where data sets are kept: $NLHELPERS_DATA, or ~/.cache/nlhelpers."""
    return Path(os.environ.get("NLHELPERS_DATA", "~/.cache/nlhelpers")).expanduser()


def load(name: str) -> DataSet:
    """Load a data set by its name, a key of DATASETS.

    Raises:
        DataError: if a file is missing and cannot be downloaded, or is damaged.
    """
    return DATASETS[name]()


def digits() -> DataSet:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; a fifth is for testing.

    The split is fixed and stratified; it is not part of an experiment's randomness.
    """
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(
        torch.from_numpy(pixels).unsqueeze(1),
        torch.from_numpy(bunch.target).long(),
        test_size=0.2,
        stratify=bunch.target,
        random_state=0,
    )
    images, test_images, labels, test_labels = parts
    names = tuple(str(digit) for digit in range(10))
    return DataSet(images, labels, test_images, test_labels, names)


def mnist() -> DataSet:
    """MNIST: 60,000 and 10,000 digits of 28 x 28 pixels (LeCun et al. 1998)."""
    names = tuple(str(digit) for digit in range(10))
    return _idx(torchvision.datasets.MNIST, names)


def fashion_mnist() -> DataSet:
    """Fashion-MNIST: like MNIST, with ten kinds of clothing (Xiao et al. 2017)."""
    kinds = torchvision.datasets.FashionMNIST
    return _idx(kinds, tuple(kinds.classes))


def cifar10() -> DataSet:
    """CIFAR-10: 50,000 and 10,000 colour images of 32 x 32 (Krizhevsky 2009)."""
    kind = torchvision.datasets.CIFAR10
    root, folder = data_root(), data_root() / kind.base_folder
    if not any(folder.glob("*")):
        _download(lambda: kind(root, download=True), "cifar-10-batches-py/", root)
    names = kind.meta["filename"], kind.meta["md5"]
    for name, md5 in [*kind.train_list, *kind.test_list, names]:
        _check_file(folder / name, md5)
    train, test = kind(root, train=True), kind(root, train=False)
    return DataSet(
        torch.from_numpy(train.data).permute(0, 3, 1, 2),
        torch.tensor(train.targets),
        torch.from_numpy(test.data).permute(0, 3, 1, 2),
        torch.tensor(test.targets),
        tuple(train.classes),
    )


def human_labels(noise_name: str, true_labels: Tensor) -> Tensor:
    """One of CIFAR-10N's six label sets (50,000,) int64, in torchvision's order.

    The file is an old pickle. It is read by torch's restricted unpickler, which may
    build numpy arrays and nothing else.

    Args:
        noise_name: a key of HUMAN_LABELS.
        true_labels: CIFAR-10's own labels; they must equal the file's clean ones.
    """
    path = data_root() / "CIFAR-N" / "CIFAR-10_human.pt"
    if not path.exists():
        raise DataError(
            f"{path} is missing; it is CIFAR-10N's label file, to be had from "
            "https://github.com/UCSC-REAL/cifar-10-100n (data/CIFAR-10_human.pt)"
        )
    # What an array's pickle may call; the file names numpy's rebuilder as numpy 1 did.
    rebuild = np.empty(0).__reduce__()[0]
    allowed = [
        (rebuild, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.int64)),
        codecs.encode,
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            arrays = torch.load(path, weights_only=True)
        clean, given = arrays["clean_label"], arrays[HUMAN_LABELS[noise_name]]
    except (*UNREADABLE, OSError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(path) from error
    if not np.array_equal(clean, true_labels.numpy()):
        raise DataError(
            f"{path}: its clean labels are not CIFAR-10's in torchvision's order "
            "(the TensorFlow release is ordered differently)"
        )
    return torch.from_numpy(given).long()


def _idx(kind: type, class_names: tuple[str, ...]) -> DataSet:
    """Read one of torchvision's four-file data sets in the MNIST format."""
    root, folder = data_root(), data_root() / kind.__name__ / "raw"
    if not any(folder.glob("*")):
        _download(lambda: kind(root, download=True), f"{kind.__name__}/raw/", root)
    parts = []
    for stem in ("train", "t10k"):
        for content, read in (
            ("images-idx3", torchvision.datasets.mnist.read_image_file),
            ("labels-idx1", torchvision.datasets.mnist.read_label_file),
        ):
            path = folder / f"{stem}-{content}-ubyte"
            _check_file(path)
            try:
                parts.append(read(path))
            except UNREADABLE as error:
                raise _damaged(path) from error
    images, labels, test_images, test_labels = parts
    return DataSet(
        images.unsqueeze(1), labels, test_images.unsqueeze(1), test_labels, class_names
    )


def _download(fetch: Callable[[], object], layout: str, root: Path) -> None:
    try:
        fetch()
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{root / layout} is missing and could not be downloaded ({error}); put "
            "the published files there, or set NLHELPERS_DATA to the folder that holds "
            f"{layout}"
        ) from error


def _check_file(path: Path, md5: str | None = None) -> None:
    if not path.exists():
        raise DataError(
            f"{path} is missing; put it there, or delete {path.parent} to have the "
            "whole set downloaded again"
        )
    if not check_integrity(path, md5):
        raise _damaged(path)


def _damaged(path: Path) -> DataError:
    return DataError(
        f"{path} is damaged; put the published file there, or delete {path.parent} to "
        "have the whole set downloaded again"
    )


DATASETS = {
    "digits": digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
}
