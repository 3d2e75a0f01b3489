"""Which images a step sees: their order, class balance, and augmentation by batch."""

from collections.abc import Callable, Iterable, Iterator
from functools import singledispatch

import torch
from torch import Generator, Tensor, distributed


def uniform(count: int, batch_size: int, generator: Generator) -> Iterator[Tensor]:
    """One pass over 0 .. count - 1 in random order, without an incomplete batch."""
    batch_size = min(batch_size, count)
    size = count - count % batch_size
    return iter(repeated(count, size, generator).split(batch_size))


def balanced(
    labels: Tensor, batch_size: int, generator: Generator, size: int | None = None
) -> Iterator[Tensor]:
    """An epoch of `size` indices (as many as labels if None), classes equally often.

    Rare classes are over-sampled (Ding et al. 2018, section 3.3).
    """
    size = len(labels) if size is None else size
    batch_size = min(batch_size, size)
    size -= size % batch_size
    return iter(repeated_by_class(labels, size, generator).split(batch_size))


def repeated(count: int, size: int, generator: Generator) -> Tensor:
    """`size` indices below `count`: passes in random order, the last one cut off."""
    passes = [
        torch.randperm(count, generator=generator, device=generator.device)
        for _ in range(-(-size // count))
    ]
    return torch.cat(passes)[:size]


def repeated_by_class(labels: Tensor, size: int, generator: Generator) -> Tensor:
    """`size` indices into labels (N,), classes equally often, in random order.

    Within a class no index is used twice before every other has been used once.
    A class without a label is left out.
    """

    def shuffle(count: int) -> Tensor:
        return torch.randperm(count, generator=generator, device=labels.device)

    order = shuffle(len(labels))
    order = order[labels[order].argsort(stable=True)]  # random within each class
    counts = labels.bincount()
    starts = (counts.cumsum(0) - counts)[counts > 0]
    counts = counts[counts > 0]
    place = torch.arange(size, device=labels.device)
    # Which class gets one image more than another is drawn anew each time.
    which = shuffle(len(counts))[place % len(counts)]
    turn = place // len(counts)
    return order[starts[which] + turn % counts[which]][shuffle(size)]


def augmentation(
    images: Tensor, crop: int, flip: bool, generator: Generator
) -> Callable[[Tensor], Tensor]:
    """A function from indices (B,) to augmented images (B, C, H, W) uint8.

    A crop and a flip are one gather: each image of the batch picks its own rows and
    columns from the bordered original.

    Args:
        images: (N, C, H, W) uint8.
        crop: pixels of reflected border for random crops; 0 for none.
        flip: whether images are mirrored at random.
        generator: on the images' device.
    """
    channels, height, width = images.shape[1:]
    device = images.device
    if not crop and not flip:
        # Whole rows of bytes: on a CPU, many times faster than images[index].
        flat = images.permute(0, 2, 3, 1).flatten(1)
        return lambda index: (
            flat.index_select(0, index)
            .view(-1, height, width, channels)
            .permute(0, 3, 1, 2)
        )
    border = reflect(images, crop).permute(0, 2, 3, 1).contiguous()
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)

    def draw(high: int, count: int) -> Tensor:
        return torch.randint(high, (count, 1), generator=generator, device=device)

    def view(index: Tensor) -> Tensor:
        count = len(index)
        down = rows + draw(2 * crop + 1, count)
        right = columns + draw(2 * crop + 1, count)
        if flip:
            mirrored = draw(2, count).bool()
            right = torch.where(mirrored, right.flip(1), right)
        picked = border[index[:, None, None], down[:, :, None], right[:, None, :]]
        return picked.permute(0, 3, 1, 2)  # channels-last in memory

    return view


def reflect(images: Tensor, border: int) -> Tensor:
    """Images (N, C, H, W) with `border` pixels mirrored on each side."""

    def mirror(size: int) -> Tensor:
        place = torch.arange(-border, size + border, device=images.device).abs()
        return torch.where(place >= size, 2 * (size - 1) - place, place)

    return images[:, :, mirror(images.shape[2])][:, :, :, mirror(images.shape[3])]


# Turns an epoch's indices (B,) into the batches (index, *views) that a step takes.
Load = Callable[[Iterable[Tensor]], Iterator[tuple[Tensor, ...]]]


@singledispatch
def loader(
    images: Tensor, crop: int, flip: bool, generator: Generator, views: int
) -> Load:
    """Batches of images on the device; other kinds of images register a loader.

    Args:
        images: (N, C, H, W) uint8.
        crop: as in `augmentation`.
        flip: as in `augmentation`.
        generator: on the images' device.
        views: how many times each batch is augmented anew.
    """
    view = augmentation(images, crop, flip, generator)

    def load(batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        for index in map(share, batches):
            yield index, *(view(index) for _ in range(views))

    return load


def share(index: Tensor) -> Tensor:
    """The part of a batch (B,) that this process takes: all of it, if it is alone.

    Each of n processes takes every n-th index, so that every process gets some of both
    halves of a batch.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return index
    return index[distributed.get_rank() :: distributed.get_world_size()]


@singledispatch
def joined(first: Tensor, second: Tensor) -> Tensor:
    """Two sets of images, end to end; other kinds register their own function."""
    return torch.cat([first, second])
