"""Binary tasks with few images and exact fractions of right labels (Chiaroni 2019).

A task sets two groups of classes against each other, like "5,7 vs 2,4". A method sees
two classes: 0 is the positive group, 1 the negative one (Eq. 2). The fractions are
exact in the images that are kept; in the paper they are so before it keeps some.

Symbols: P, N = truly positive and negative images; P_hat, N_hat = images labelled so;
pi_P, pi_N = the fraction of right labels in P_hat and N_hat.
"""

import itertools
import math

import torch
from torch import Generator, Tensor

from nlhelpers import batches
from nlhelpers.data import DataError, DataSet, NoisyData, Truth

UPSAMPLED = 10_000  # rows of every training set, however few the images (section 3.1)

Groups = tuple[tuple[str, ...], tuple[str, ...]]


def groups(task: str) -> Groups:
    """The names of the positive and the negative classes of a task like "5,7 vs 2,4".

    Raises:
        ValueError: if a group is empty, or a class is named twice.
    """
    sides = task.split(" vs ")
    found = [tuple(name.strip() for name in side.split(",")) for side in sides]
    if len(found) != 2 or not all(itertools.chain.from_iterable(found)):
        raise ValueError(
            f"task is {task!r}; it must name two groups of classes, like '5,7 vs 2,4'"
        )
    named = [*found[0], *found[1]]
    twice = [name for name in dict.fromkeys(named) if named.count(name) > 1]
    if twice:
        raise ValueError(
            f"task is {task!r}, which names {', '.join(twice)} twice; every class must "
            "be on one side only"
        )
    return found[0], found[1]


def check_pi(pi: object) -> tuple[float, float]:
    """Return (pi_P, pi_N); raise ValueError if such labels cannot be learned from."""
    try:
        pi_P, pi_N = map(float, pi)
    except (TypeError, ValueError):
        raise ValueError(
            f"pi is {pi!r}; it must be two numbers, pi_P and pi_N"
        ) from None
    for name, value in (("pi_P", pi_P), ("pi_N", pi_N)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value!r}; it must be in (0, 1]")
    if pi_P + pi_N <= 1:
        raise ValueError(
            f"pi_P + pi_N is {pi_P + pi_N:g}; it must be more than 1: at 1 both labels "
            "are given to the same mixture of images, so that they say nothing, and "
            "below it they say the opposite"
        )
    return pi_P, pi_N


def load(
    dataset: DataSet,
    task: str,
    pi: tuple[float, float],
    num_images: int,
    generator: Generator,
    *,
    rows: int = UPSAMPLED,
) -> tuple[NoisyData, Truth]:
    """A few images with noisy labels, repeated to fill `rows`, and what only we see.

    All classes of a group have equally many images. Validation uses as many other
    images, or as many as there are, with labels as noisy; they are not repeated. The
    test uses all test images of the classes.

    Args:
        dataset: with all its classes.
        task: as in `groups`.
        pi: pi_P and pi_N, met as closely as whole numbers allow.
        num_images: how many different images to train on.
        generator: a CPU generator; decides which images, and which labels are wrong.
        rows: length of the training set, which its images are repeated to fill.

    Raises:
        ValueError: if the images cannot be divided evenly, or pi cannot be met.
        DataError: if a class has too few images.
    """
    sides = numbers(task, dataset)
    check_size(num_images, sides, task)
    train, val = divided(dataset.labels, sides, num_images, generator)
    given = mislabelled(dataset.labels[train], sides, pi, generator)
    val_given = mislabelled(dataset.labels[val], sides, pi, generator)
    again = torch.arange(rows) % num_images
    train, given = train[again], given[again]
    test = torch.isin(dataset.test_labels, torch.cat(sides))
    none = torch.empty(0, dtype=torch.int64)
    seen = NoisyData(
        images=dataset.images[train],
        labels=given,
        val_images=dataset.images[val],
        val_labels=val_given,
        num_classes=2,
        clean_images=dataset.images[none],
        clean_labels=none,
        clean_given_labels=none,
    )
    truth = Truth(
        labels=negative(dataset.labels[train], sides),
        val_labels=negative(dataset.labels[val], sides),
        test_images=dataset.test_images[test],
        test_labels=negative(dataset.test_labels[test], sides),
        index=train,
    )
    return seen, truth


def numbers(task: str, dataset: DataSet) -> tuple[Tensor, Tensor]:
    """The classes of a task's two groups, as labels of the data set."""
    names, sides = dataset.class_names, groups(task)
    for name in itertools.chain(*sides):
        if name not in names:
            raise ValueError(
                f"task is {task!r}, but the data set has no class {name!r}; it has "
                f"{', '.join(names)}"
            )
    positive, negative = ([names.index(name) for name in side] for side in sides)
    return torch.tensor(positive), torch.tensor(negative)


def check_size(num_images: int, sides: tuple[Tensor, Tensor], task: str) -> None:
    """Raise ValueError unless groups, and the classes of each, can be equally large."""
    step = 2 * math.lcm(*map(len, sides))
    if num_images < step or num_images % step:
        raise ValueError(
            f"num_images is {num_images}; of {task!r} it must be a multiple of {step}, "
            "so that both groups, and the classes of each, have as many images"
        )


def divided(
    labels: Tensor, sides: tuple[Tensor, Tensor], num_images: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Which images (N,) to train on, and which others (V,) to validate on."""
    order = torch.randperm(len(labels), generator=generator)
    shares = [num_images // (2 * len(side)) for side in sides]
    own = [[order[labels[order] == k] for k in side.tolist()] for side in sides]
    left = [
        (min(map(len, classes)) - share) * len(classes)
        for classes, share in zip(own, shares, strict=True)
    ]
    half = min(num_images // 2, *left)  # of a validation set as large, if possible
    half -= half % math.lcm(*map(len, sides))
    if half <= 0:
        fewest = min(len(index) for classes in own for index in classes)
        raise DataError(
            f"num_images is {num_images}, but a class has {fewest} images, of which "
            "some must be left to validate on; ask for fewer"
        )
    train, val = [], []
    for classes, share in zip(own, shares, strict=True):
        end = share + half // len(classes)
        train += [index[:share] for index in classes]
        val += [index[share:end] for index in classes]
    return torch.cat(train), torch.cat(val)


def negative(labels: Tensor, sides: tuple[Tensor, Tensor]) -> Tensor:
    """True classes (N,) as labels of the task: 0 for positive, 1 for negative."""
    return torch.isin(labels, sides[1]).long()


def mislabelled(
    labels: Tensor,
    sides: tuple[Tensor, Tensor],
    pi: tuple[float, float],
    generator: Generator,
) -> Tensor:
    """Labels of the task (N,), of which exactly as many are wrong as pi asks for.

    The classes of a group share its wrong labels as evenly as whole numbers allow.

    Args:
        labels: (N,) true classes, as many positive as negative.
        sides: the classes of the two groups.
        pi: pi_P and pi_N.
        generator: on the CPU.
    """
    given = negative(labels, sides)
    wrong = wrong_labels(len(labels) // 2, *pi)
    for side, count in zip(sides, wrong, strict=True):
        own = torch.isin(labels, side).nonzero().squeeze(1)
        if count:
            own = own[batches.repeated_by_class(labels[own], count, generator)]
            given[own] = 1 - given[own]
    return given


def wrong_labels(half: int, pi_P: float, pi_N: float) -> tuple[int, int]:
    """How many of `half` positive and of `half` negative images get a wrong label.

    With d positives in N_hat and b negatives in P_hat, (half - d) / (half - d + b) is
    to be pi_P and (half - b) / (half - b + d) is to be pi_N. There is one solution in
    real numbers; of the whole numbers around it, those that come nearest are taken.

    Raises:
        ValueError: if no division of two halves has these fractions.
    """
    if min(pi_P, pi_N) <= 1 / 2:
        raise ValueError(
            f"pi is {(pi_P, pi_N)}; with as many positive as negative images both must "
            "be more than 1/2, or one label could have no image"
        )
    in_P_hat = half * (2 * pi_N - 1) / (pi_P + pi_N - 1)
    middle = (1 - pi_N) * (2 * half - in_P_hat), (1 - pi_P) * in_P_hat
    d, b = torch.meshgrid(*(around(x, half) for x in middle), indexing="ij")
    a, c = half - d, half - b
    miss = (a / (a + b) - pi_P).abs() + (c / (c + d) - pi_N).abs()
    best = miss.nan_to_num(nan=math.inf).argmin()  # 0 / 0: a label without an image
    return int(d.flatten()[best]), int(b.flatten()[best])


def around(number: float, most: int) -> Tensor:
    """Whole numbers from 0 to `most` within 20 of a number, as float64."""
    first, last = max(0, math.floor(number) - 20), min(most, math.ceil(number) + 20)
    return torch.arange(first, last + 1, dtype=torch.float64)
