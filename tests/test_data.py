"""Data: real formats in small files, damage of every kind, and splits of it."""

import hashlib
import os
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits

from nlhelpers import data, noise
from nlhelpers.data import DataError

CIFAR10 = torchvision.datasets.CIFAR10


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("NLHELPERS_DATA", str(tmp_path))
    return tmp_path


def random_bytes(*shape, high=256, seed=0):
    return np.random.default_rng(seed).integers(high, size=shape, dtype=np.uint8)


# ---------------------------------------------------------------- digits


def test_digits_are_those_of_scikit_learn():
    digits = data.load("digits")
    assert digits.images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.images.dtype == digits.test_images.dtype == torch.uint8
    assert digits.labels.dtype == digits.test_labels.dtype == torch.int64
    assert digits.num_classes == 10
    assert digits.images.max() == 255
    bunch = load_digits()
    expected = sorted(
        (tuple(np.rint(pixels * 255 / 16).astype(int)), label)
        for pixels, label in zip(bunch.data, bunch.target, strict=True)
    )
    images = torch.cat([digits.images, digits.test_images]).flatten(1).tolist()
    labels = torch.cat([digits.labels, digits.test_labels]).tolist()
    found = sorted((tuple(x), y) for x, y in zip(images, labels, strict=True))
    assert found == expected


def test_digits_test_set_is_fixed_and_stratified():
    first, second = data.load("digits"), data.load("digits")
    assert torch.equal(first.images, second.images)
    shares = first.test_labels.bincount() / 360 - first.labels.bincount() / 1437
    assert shares.abs().max() < 0.003


# ---------------------------------------------------------------- splits


@pytest.fixture
def numbered():
    """A data set in which every image is its own number."""
    numbers = torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1)
    labels = torch.arange(200) % 4
    return data.DataSet(numbers, labels, numbers[:50], labels[:50], tuple("abcd"))


def test_split_is_a_partition(numbered, generator):
    given = (numbered.labels + 1) % 4
    seen, _ = data.split(numbered, given, generator, num_clean=15)
    parts = [seen.images, seen.val_images, seen.clean_images]
    assert [len(part) for part in parts] == [165, 20, 15]
    numbers = torch.cat(parts).flatten().tolist()
    assert sorted(numbers) == list(range(200))
    assert numbers != list(range(200))


def test_every_label_stays_with_its_image(numbered, generator):
    given = (numbered.labels + 1) % 4
    seen, truth = data.split(numbered, given, generator, num_clean=15)
    train, val, clean = (
        part.flatten().long()
        for part in (seen.images, seen.val_images, seen.clean_images)
    )
    assert torch.equal(seen.labels, given[train])
    assert torch.equal(seen.val_labels, given[val])
    assert torch.equal(seen.clean_labels, numbered.labels[clean])
    assert torch.equal(truth.labels, numbered.labels[train])
    assert torch.equal(truth.val_labels, numbered.labels[val])
    assert torch.equal(truth.index, train)


def test_clean_images_keep_what_they_were_given(numbered, generator):
    noisy = (numbered.labels + 1) % 4
    for clean_val in (False, True):
        seen, truth = data.split(
            numbered, noisy, generator, num_clean=10, clean_val=clean_val
        )
        assert torch.equal(seen.clean_given_labels, (seen.clean_labels + 1) % 4)
        given = truth.val_labels if clean_val else (truth.val_labels + 1) % 4
        assert torch.equal(seen.val_labels, given)


def test_limit_and_share(numbered, generator):
    given = numbered.labels
    seen, truth = data.split(numbered, given, generator, val_share=0.25, limit=40)
    assert (len(seen.labels), len(seen.val_labels)) == (30, 10)
    assert torch.equal(truth.test_images, numbered.test_images[:40])
    assert torch.equal(truth.test_labels, numbered.test_labels[:40])


def test_split_depends_on_the_generator_alone(numbered):
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return data.split(numbered, numbered.labels, generator)[1].index.tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("num_clean", [-1, 180, 1000])
def test_too_many_clean_images(numbered, generator, num_clean):
    with pytest.raises(ValueError, match=rf"num_clean is {num_clean}.*0 to 179"):
        data.split(numbered, numbered.labels, generator, num_clean=num_clean)


def test_labels_that_do_not_fit(numbered, generator):
    with pytest.raises(ValueError, match="199 labels for 200 training images"):
        data.split(numbered, numbered.labels[1:], generator)
    with pytest.raises(ValueError, match=r"label 4 \(example 3\) is out of range"):
        data.split(numbered, numbered.labels + 1, generator)


def test_bundles_move_whole(numbered, generator, cpu):
    seen, truth = data.split(numbered, numbered.labels, generator)
    for bundle in (seen, truth):
        moved = bundle.to(cpu)
        for name, value in vars(bundle).items():
            same = getattr(moved, name)
            assert torch.equal(same, value) if torch.is_tensor(value) else same == value


# ---------------------------------------------------------------- the MNIST format


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">{1 + array.ndim}i", 0x800 + array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture(params=["mnist", "fashion-mnist"])
def idx(request, root):
    """A small set of four idx files: its name, its folder, its arrays."""
    folder = root / {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[request.param]
    arrays = {}
    for stem, count in (("train", 20), ("t10k", 10)):
        arrays[f"{stem}-images-idx3-ubyte"] = random_bytes(count, 28, 28)
        arrays[f"{stem}-labels-idx1-ubyte"] = random_bytes(count, high=10)
    for name, array in arrays.items():
        write_idx(folder / "raw" / name, array)
    return request.param, folder / "raw", arrays


def test_idx_files(idx):
    name, _, arrays = idx
    found = data.load(name)
    tensors = (found.images, found.labels, found.test_images, found.test_labels)
    for tensor, array in zip(tensors, arrays.values(), strict=True):
        assert np.array_equal(tensor.numpy().reshape(array.shape), array)
    assert found.images.shape == (20, 1, 28, 28)
    assert found.images.dtype == torch.uint8
    assert found.labels.dtype == torch.int64
    assert len(set(found.class_names)) == 10


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize(
    "damage",
    {
        "truncated": lambda content: content[:-5],
        "header only": lambda content: content[:16],
        "empty": lambda content: b"",
        "a web page": lambda content: b"<!DOCTYPE html><html>404</html>",
        "still compressed": lambda content: b"\x1f\x8b\x08\x08" + content,
        "zeros": lambda content: bytes(len(content)),
        "another type": lambda content: b"\0\0\x0a" + content[3:],
        "floats": lambda content: b"\0\0\x0d" + content[3:],
    }.items(),
    ids=lambda damage: damage[0],
)
def test_damaged_idx_file(idx, which, damage):
    name, folder, arrays = idx
    path = folder / list(arrays)[which]
    path.write_bytes(damage[1](path.read_bytes()))
    with pytest.raises(DataError, match=f"{path} is damaged; put the published"):
        data.load(name)


@pytest.mark.parametrize("which", range(4))
def test_missing_idx_file(idx, which):
    name, folder, arrays = idx
    path = folder / list(arrays)[which]
    path.unlink()
    with pytest.raises(DataError, match=f"{path} is missing"):
        data.load(name)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("mnist", "MNIST/raw/"),
        ("fashion-mnist", "FashionMNIST/raw/"),
        ("cifar10", "cifar-10-batches-py/"),
    ],
)
def test_missing_set_that_cannot_be_downloaded(root, name, layout):
    with pytest.raises(DataError) as caught:
        data.load(name)
    message = str(caught.value)
    assert f"{root / layout.rstrip('/')}" in message
    assert "could not be downloaded" in message
    assert "NLHELPERS_DATA" in message
    with pytest.raises(DataError, match="is missing"):
        data.load(name)  # and again


# ---------------------------------------------------------------- CIFAR-10


def checksum(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def cifar(root, monkeypatch):
    """A CIFAR-10 of 25 and 5 images in its own format; its folder and arrays."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    pixels = random_bytes(30, 3072)
    labels = random_bytes(30, high=10, seed=1)
    listed = []
    for k, name in enumerate(names):
        part = slice(5 * k, 5 * k + 5)
        entry = {"data": pixels[part], "labels": labels[part].tolist()}
        content = pickle.dumps(entry, protocol=2)
        (folder / name).write_bytes(content)
        listed.append([name, checksum(content)])
    content = pickle.dumps({"label_names": [f"class {k}" for k in range(10)]})
    (folder / "batches.meta").write_bytes(content)
    meta = {"filename": "batches.meta", "key": "label_names", "md5": checksum(content)}
    monkeypatch.setattr(CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(CIFAR10, "test_list", listed[5:])
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return folder, pixels.reshape(-1, 3, 32, 32), labels


def test_cifar_files(cifar):
    _, pixels, labels = cifar
    found = data.load("cifar10")
    assert np.array_equal(found.images.numpy(), pixels[:25])
    assert np.array_equal(found.test_images.numpy(), pixels[25:])
    assert found.labels.tolist() == labels[:25].tolist()
    assert found.test_labels.tolist() == labels[25:].tolist()
    assert found.images.dtype == torch.uint8
    assert found.labels.dtype == torch.int64
    assert found.class_names == tuple(f"class {k}" for k in range(10))


CIFAR_FILES = ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"]


@pytest.mark.parametrize("name", CIFAR_FILES)
def test_damaged_cifar_file(cifar, name):
    path = cifar[0] / name
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    with pytest.raises(DataError, match=f"{path} is damaged"):
        data.load("cifar10")


@pytest.mark.parametrize("name", CIFAR_FILES)
def test_missing_cifar_file(cifar, name):
    path = cifar[0] / name
    path.unlink()
    with pytest.raises(DataError, match=f"{path} is missing"):
        data.load("cifar10")


# ---------------------------------------------------------------- CIFAR-10N


def write_human(root, content):
    """Write CIFAR-10N's file as published: a torch archive with numpy 1's arrays."""
    path = root / "CIFAR-N" / "CIFAR-10_human.pt"
    path.parent.mkdir(exist_ok=True)
    pickled = pickle.dumps(content, protocol=2)
    pickled = pickled.replace(b"numpy._core", b"numpy.core")
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", pickled, len(pickled))
    writer.write_end_of_file()
    return path


PUBLISHED_NAMES = {
    "human-clean": "clean_label",
    "human-aggregate": "aggre_label",
    "human-random1": "random_label1",
    "human-random2": "random_label2",
    "human-random3": "random_label3",
    "human-worst": "worse_label",
}


@pytest.fixture
def human(root):
    """A CIFAR-10N of 40 labels: its file, its true labels, its arrays."""
    arrays = {
        file_name: np.random.default_rng(seed).integers(10, size=40)
        for seed, file_name in enumerate(PUBLISHED_NAMES.values())
    }
    path = write_human(root, arrays)
    return path, torch.from_numpy(arrays["clean_label"]), arrays


def test_human_labels(human):
    _, true, arrays = human
    assert list(data.HUMAN_LABELS) == list(PUBLISHED_NAMES)
    for name, in_file in PUBLISHED_NAMES.items():
        found = data.human_labels(name, true)
        assert found.dtype == torch.int64
        assert found.tolist() == arrays[in_file].tolist()


def test_human_labels_in_another_order(human):
    path, true, _ = human
    with pytest.raises(DataError, match=f"{path}: its clean labels are not"):
        data.human_labels("human-worst", true.flip(0))


def test_human_labels_missing(root):
    with pytest.raises(DataError, match=r"CIFAR-10_human\.pt is missing; .*https://"):
        data.human_labels("human-worst", torch.zeros(3).long())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_human_labels_truncated(human, share):
    path, true, _ = human
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=f"{path} is damaged"):
        data.human_labels("human-worst", true)


@pytest.mark.parametrize(
    "content",
    [
        {"clean_label": np.arange(40)},  # none but the clean ones
        {"labels": np.arange(40)},
        [np.arange(40)],
        np.arange(40),
        None,
    ],
    ids=["one set", "other names", "a list", "an array", "nothing"],
)
def test_human_labels_with_other_content(human, root, content):
    path = write_human(root, content)
    with pytest.raises(DataError, match=str(path)):
        data.human_labels("human-worst", torch.arange(40))


class Intruder:
    """Pickles to a call of os.mkdir."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["archive", "legacy", "bare pickle"])
def test_human_labels_never_execute_a_foreign_pickle(root, tmp_path, form):
    harm = tmp_path / "harm"
    path = write_human(root, {"clean_label": Intruder(harm)})
    if form == "legacy":
        torch.save(Intruder(harm), path, _use_new_zipfile_serialization=False)
    elif form == "bare pickle":
        path.write_bytes(pickle.dumps(Intruder(harm), protocol=2))
    with pytest.raises(DataError, match=f"{path} is damaged"):
        data.human_labels("human-clean", torch.arange(40))
    assert not harm.exists()


# ---------------------------------------------------------------- the published files


def published(name, folder):
    if not (data.data_root() / folder).exists():
        pytest.skip(f"{folder} is not under {data.data_root()}")
    return data.load(name)


def test_published_mnist():
    mnist = published("mnist", "MNIST/raw")
    assert mnist.images.shape == (60_000, 1, 28, 28)
    assert mnist.test_images.shape == (10_000, 1, 28, 28)
    per_class = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert mnist.test_labels.bincount().tolist() == per_class


def test_published_cifar10():
    cifar10 = published("cifar10", "cifar-10-batches-py")
    assert cifar10.images.shape == (50_000, 3, 32, 32)
    assert cifar10.labels.bincount().tolist() == [5000] * 10
    assert cifar10.test_labels.bincount().tolist() == [1000] * 10
    assert cifar10.class_names[3] == "cat"
    if not (data.data_root() / "CIFAR-N").exists():
        pytest.skip(f"CIFAR-N is not under {data.data_root()}")
    # Wei et al. (2022), Table 1.
    rates = {
        "human-clean": 0.0,
        "human-aggregate": 9.01,
        "human-random1": 17.23,
        "human-random2": 18.12,
        "human-random3": 17.64,
        "human-worst": 40.21,
    }
    for name, percent in rates.items():
        labels = data.human_labels(name, cifar10.labels)
        found = 100 * noise.realised_rate(labels, cifar10.labels)
        assert found == pytest.approx(percent, abs=0.005)
