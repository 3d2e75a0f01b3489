"""Images that stay in their files and are read when needed, by several processes.

`ImageFiles` takes the place of a tensor (N, C, H, W) of images, for sets too large for
memory. Files are decoded a little ahead of whoever takes the images.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Resampling
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from nlhelpers import batches
from nlhelpers.data import DataError

CPU = torch.device("cpu")
LAYOUT = torch.channels_last
PIECE = 64  # files that a worker reads for one answer; few, to keep memory low
FEW = 512  # files that are read here in less time than it takes to start workers
MOST = 256  # pictures at once, as a network may need megabytes for each
# Kinds of pictures that are opened. PIL knows more, some of which start programs.
FORMATS = ("JPEG", "PNG", "PPM", "GIF", "BMP", "WEBP", "TIFF")


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Colour images in files, as (N, 3, H, W) uint8 with H = W = `crop_to`.

    It has a tensor's `shape`, `dtype`, `device`, `to`, `split` and indexing, as far as
    training and prediction use them. A picture is scaled until its shorter side is
    `size`, and its centre is cut out, `size` by `size`. Predictions see the central
    window of `crop_to` pixels of that. In training, with `crop` pixels of border, the
    window moves by up to `crop` pixels each way: over the picture as far as it reaches,
    then over its mirrored border. AlexNet's random windows, for example, are `size`
    256, `crop_to` 224 and `crop` 16.

    Pictures are used as stored: a camera's note on which side is up is ignored.

    Attributes:
        root: folder that `names` are relative to.
        names: (N,) paths as bytes, padded to one length; any sequence of paths is
            converted to that form. A million of 40 characters take 40 MB.
        size: pixels per side that are decoded.
        crop_to: pixels per side that a network sees; None is `size`.
        device: where decoded images are delivered.
        workers: processes that decode; 0 decodes in this one, None is one per core,
            or none if there are few files.
        pixels: (N, size, size, 3) uint8, if the pictures are held in memory, see
            `kept`; None if they are read whenever they are needed.
    """

    root: Path
    names: np.ndarray
    size: int = 256
    crop_to: int | None = None
    device: torch.device = CPU
    workers: int | None = None
    pixels: Tensor | None = None

    def __post_init__(self) -> None:
        """Bring paths to one form; raise ValueError for sizes that make no sense."""
        crop_to = self.size if self.crop_to is None else self.crop_to
        if not 1 <= crop_to <= self.size:
            raise ValueError(
                f"size is {self.size!r} and crop_to is {crop_to!r}; it must be "
                "1 <= crop_to <= size"
            )
        object.__setattr__(self, "root", Path(self.root))
        object.__setattr__(self, "names", packed(self.names))
        object.__setattr__(self, "crop_to", crop_to)

    def __len__(self) -> int:
        """N."""
        return len(self.names)

    @property
    def shape(self) -> torch.Size:
        """(N, 3, crop_to, crop_to)."""
        return torch.Size((len(self), 3, self.crop_to, self.crop_to))

    @property
    def ndim(self) -> int:
        """4, as for any images."""
        return 4

    @property
    def dtype(self) -> torch.dtype:
        """torch.uint8."""
        return torch.uint8

    def to(
        self, device: torch.device, memory_format: torch.memory_format | None = None
    ) -> "ImageFiles":
        """The same, delivered on `device`; always in channels-last layout."""
        return dataclasses.replace(self, device=torch.device(device))

    def __getitem__(self, index: int | slice | Tensor) -> "ImageFiles | Tensor":
        """A subset by a slice, int64 or bool (N,); one decoded image by a number."""
        index = index.cpu().numpy() if torch.is_tensor(index) else index
        places = torch.as_tensor(np.arange(len(self))[index].copy())
        every = places.view(-1)
        pixels = None if self.pixels is None else self.pixels[every]
        subset = dataclasses.replace(
            self, names=self.names[every.numpy()], pixels=pixels
        )
        return subset if places.ndim else next(subset.split(1))[0]

    def split(self, size: int) -> Iterator[Tensor]:
        """The images in order, decoded, at most `size` at a time: (B, 3, H, W) uint8.

        Raises:
            DataError: if a file is missing or damaged; the message names it.
        """
        parts = torch.arange(len(self)).split(min(size, MOST))
        return self.decoded(parts, self.crop_to)

    def kept(self) -> "ImageFiles":
        """The same, with all pictures decoded now and held in memory.

        Raises:
            DataError: as `split`.
        """
        pixels = torch.empty((len(self), self.size, self.size, 3), dtype=torch.uint8)
        pieces = torch.arange(len(self)).split(PIECE)
        stream = self._each(Decoding(self.root, self.size, self.size), pieces)
        for place, piece in zip(pixels.split(PIECE), stream, strict=True):
            place.copy_(piece)
        return dataclasses.replace(self, pixels=pixels)

    def decoded(self, parts: Iterable[Tensor], side: int) -> Iterator[Tensor]:
        """The central `side` pixels of each part's images: (B, 3, side, side) uint8.

        Args:
            parts: indices, each (B,) int64; taken before the first file is read.
            side: pixels, up to `size`.
        """
        parts = [part.cpu() for part in parts]
        if self.pixels is not None:
            start = (self.size - side) // 2
            inner = self.pixels[:, start : start + side, start : start + side]
            for part in parts:
                whole = inner[part].to(self.device, non_blocking=True)
                yield whole.permute(0, 3, 1, 2)
            return
        pieces = [piece for part in parts for piece in part.split(PIECE)]
        stream = self._each(Decoding(self.root, self.size, side), pieces)
        for part in parts:
            shape = len(part), side, side, 3
            whole = torch.empty(shape, dtype=torch.uint8, device=self.device)
            for place in whole.split(PIECE):
                place.copy_(next(stream), non_blocking=True)
            yield whole.permute(0, 3, 1, 2)

    @classmethod
    def __torch_function__(cls, function, types, given=(), options=None):
        """`torch.cat` of sets of files is `batches.joined`; no other function works."""
        if function is not torch.cat:
            return NotImplemented
        return functools.reduce(batches.joined, *given)

    def broken(self, *, thorough: bool = False) -> Tensor:
        """Which files are missing, empty or not an image: (N,) bool, on the CPU.

        Args:
            thorough: decode every image; else only its header is read.
        """
        pieces = torch.arange(len(self)).split(16 * PIECE)  # headers are read fast
        return torch.cat(list(self._each(Checking(self.root, thorough), pieces)))

    def _each(self, work: "Reading", pieces: Sequence[Tensor]) -> Iterator[Tensor]:
        """What `work` makes of the files at each piece's indices, in order."""
        # Paths travel piece by piece: a worker never holds the whole list.
        names = [self.names[piece.numpy()] for piece in pieces]
        workers = self.workers
        if workers is None:
            workers = cores() if sum(map(len, names)) > FEW else 0
        if len(names) < 2 or multiprocessing.current_process().daemon:
            workers = 0  # a daemon, as Dask's workers are, may not start a process
        workers = min(workers, len(names))
        results = DataLoader(
            work,
            sampler=names,
            batch_size=None,  # a piece is a batch already
            num_workers=workers,
            multiprocessing_context=context() if workers else None,
            pin_memory=self.device.type == "cuda",
            generator=Generator(),  # else it draws from torch's own state
        )
        for result in results:
            if isinstance(result, DataError):
                raise result
            yield result


def packed(names: Sequence[str | bytes | Path] | np.ndarray) -> np.ndarray:
    """Paths as one array of bytes, which is cheap to hold and to pickle."""
    if isinstance(names, np.ndarray) and names.dtype.kind == "S":
        return names
    return np.array([os.fsencode(name) for name in names], dtype=bytes)


def cores() -> int:
    """How many cores this process may use, shared with those that train beside it.

    torchrun and our Dask workers say how many such processes this machine has.
    """
    able = getattr(os, "sched_getaffinity", None)
    count = len(able(0)) if able else os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@functools.cache
def context() -> BaseContext:
    """How workers start: from a small server that has imported all they need.

    Forking this process would save time once, but its threads may leave behind a lock
    that nobody releases, and Python warns of it.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    return server


# What a worker does with the paths of a piece


@dataclass(frozen=True)
class Decoding:
    """Reads pictures, or says which one cannot be read.

    Attributes:
        root: folder of the files.
        size: pixels per side that are decoded.
        side: pixels per side that are kept, at the centre.
    """

    root: Path
    size: int
    side: int

    def __getitem__(self, names: np.ndarray) -> Tensor | DataError:
        """(B, side, side, 3) uint8; errors are returned, as a traceback says less."""
        result = np.empty((len(names), self.side, self.side, 3), np.uint8)
        start = (self.size - self.side) // 2
        inner = slice(start, start + self.side)
        try:
            for place, path in zip(result, paths(self.root, names), strict=True):
                place[:] = decode(path, self.size)[inner, inner]
        except DataError as error:
            return error
        return torch.from_numpy(result)


@dataclass(frozen=True)
class Checking:
    """Tells which files cannot be read.

    Attributes:
        root: folder of the files.
        thorough: decode the pictures, instead of reading only their headers.
    """

    root: Path
    thorough: bool

    def __getitem__(self, names: np.ndarray) -> Tensor:
        """(B,) bool."""
        broken = [self.is_broken(path) for path in paths(self.root, names)]
        return torch.tensor(broken, dtype=torch.bool)

    def is_broken(self, path: str) -> bool:
        """Whether a file cannot be opened or, if `thorough`, decoded."""
        return self.error(path) is not None

    def error(self, path: str) -> DataError | None:
        """Why it cannot."""
        try:
            with opened(path) as image:
                if self.thorough:
                    image.load()
        except DataError as error:
            return error
        return None


Reading = Decoding | Checking


def paths(root: Path, names: np.ndarray) -> list[str]:
    """Where the files are, as plain text: a million `Path` objects take a while."""
    folder = str(root)
    return [os.path.join(folder, os.fsdecode(name)) for name in names]


def decode(path: str | Path, size: int) -> np.ndarray:
    """The picture in a file as (size, size, 3) uint8.

    Its shorter side is scaled to `size`, and its centre is cut out. Where it is
    transparent it is white.

    Raises:
        DataError: if the file is missing or damaged, or a pixel has more than 8 bits of
            grey (see `opened`); the message names it.
    """
    with opened(path) as image:
        # A large JPEG is decoded at half its size or less: much faster, and the same to
        # the eye, as that is still twice as large as the picture made from it.
        image.draft(None, (2 * size, 2 * size))
        if image.has_transparency_data:  # below which may be anything, often black
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        picture = image.convert("RGB")
        return np.asarray(ImageOps.fit(picture, (size, size), Resampling.BILINEAR))


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture, of which only the header has been read.

    It is read by PIL: torchvision's own decoders are being phased out, and know fewer
    kinds of JPEG.

    Raises:
        DataError: if opening the picture fails, or what is done with it, or if a pixel
            has more than 8 bits of grey, all of which PIL would turn white; the message
            names the file.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{path} has more than 8 bits a pixel (PIL's mode {image.mode}); "
                    "convert it to 8 bits, or remove it (and from its list, if any)"
                )
            yield image
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing; put it there, or remove it from its list, if any"
        ) from error
    except Exception as error:  # PIL has a dozen ways to say that a file is damaged
        raise DataError(
            f"{path} is damaged or not a picture ({error}); put the right file "
            "there, or remove it (and from its list, if any)"
        ) from error


# As tensors, for the training loop


@batches.loader.register
def loader(
    images: ImageFiles, crop: int, flip: bool, generator: Generator, views: int
) -> batches.Load:
    """Batches of images in files; see `batches.loader` and `ImageFiles`.

    What is drawn from the generator depends on the batches alone, not on how many
    workers there are: an epoch's indices are taken before the first file is read.
    """
    # As many pixels as the moving window can reach, around the centre.
    side = min(images.size, images.crop_to + 2 * crop)
    start = (side - images.crop_to) // 2
    window = slice(start, start + images.crop_to)

    def load(epoch: Iterable[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        parts = [batches.share(index) for index in epoch]
        for index, whole in zip(parts, images.decoded(parts, side), strict=True):
            augmented = batches.augmentation(whole, crop, flip, generator)
            every = torch.arange(len(index), device=whole.device)
            seen = (augmented(every)[:, :, window, window] for _ in range(views))
            yield index, *(view.contiguous(memory_format=LAYOUT) for view in seen)

    return load


@batches.joined.register
def joined(first: ImageFiles, second: ImageFiles) -> ImageFiles:
    """Two sets of files under one root, decoded alike; see `batches.joined`."""
    for name in ("root", "size", "crop_to"):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            raise ValueError(
                f"{name} is {one!r} in one set and {other!r} in the other; it must be "
                "the same in both"
            )
    names = np.concatenate([first.names, second.names])
    pixels = [first.pixels, second.pixels]
    pixels = None if any(each is None for each in pixels) else torch.cat(pixels)
    return dataclasses.replace(first, names=names, pixels=pixels)
