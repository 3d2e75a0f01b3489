"""Small folders of photographs, for the tests of data sets in files."""

import itertools

import numpy as np
from PIL import Image

from nlhelpers import clothing1m, food101n

SIZE = 16


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def edit(path, change):
    write(path, change(path.read_text().splitlines()))


def write_image(path, k):
    """One colour, which tells the number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((SIZE, SIZE, 3), (k, 255 - k, 128), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)


def copy(folder, to):
    """All files of a folder, to be changed; returns `to`."""
    for path in folder.rglob("*.*"):
        place = to / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    return to


# Whole sets in their published layouts, small and with an image of every class


def write_clothing1m(root):
    """Clothing1M: of each class 4 noisy, 3 clean, 3 validation and 1 test images.

    Every third label is wrong; all but the test images have a given one.
    """
    counts = {
        clothing1m.NOISY: 56,
        clothing1m.CLEAN: 42,
        clothing1m.VAL: 42,
        clothing1m.TEST: 14,
    }
    labels = {clothing1m.GIVEN: [], clothing1m.TRUE: []}
    numbers = iter(range(sum(counts.values())))
    for name, count in counts.items():
        keys = {k: f"images/{k % 3}/{k}.jpg" for k in itertools.islice(numbers, count)}
        write(root / name, keys.values())
        for k, key in keys.items():
            write_image(root / key, k)
            if name != clothing1m.TEST:
                labels[clothing1m.GIVEN].append(f"{key} {k % 14}")
            if name != clothing1m.NOISY:
                labels[clothing1m.TRUE].append(f"{key} {(k + (k % 3 == 0)) % 14}")
    for table, rows in labels.items():
        write(root / table, rows)
    names = [f"Class {k}" for k in range(clothing1m.NUM_CLASSES)]
    write(root / clothing1m.CLASS_NAMES, names)


def write_food101n(root):
    """Food-101N and Food-101: of each class 2 training and 2 validation images.

    One of the training images is verified; every label that is verified is right.
    """
    names = [f"dish_{k:03}" for k in range(food101n.NUM_CLASSES)]
    files = ("train-1", "train-2", "val-1", "val-2")
    keys = [f"{name}/{file}.jpg" for name in names for file in files]
    right = [f"{key}\t1" for key in keys]
    write(root / food101n.CLASS_NAMES, ["class_name", *names])
    write(root / food101n.NOISY, ["class_name/key", *keys])
    write(root / food101n.CLEAN, [line for line in right if "train-1" in line])
    write(root / food101n.VAL, [line for line in right if "val" in line])
    write(root / food101n.TEST, [f"{name}/test" for name in names[:20]])
    paths = [root / food101n.IMAGES / key for key in keys]
    paths += [root / food101n.TEST_IMAGES / f"{name}/test.jpg" for name in names[:20]]
    for k, path in enumerate(paths):
        write_image(path, k % 256)
