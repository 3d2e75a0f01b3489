"""Small folders of photographs, for the tests of data sets in files."""

import numpy as np
from PIL import Image

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
