"""Class prototypes, and labels corrected by them (Han et al. 2019).

Symbols: G(x) = deep features, m = images that are sampled from a class, S = their
similarities (m, m), S_c = the similarity above which two images are neighbours, rho =
density, eta = similarity to denser images, p = prototypes of a class, sigma = mean
similarity of an image to the prototypes of a class.

Similarities are computed so that the order of summation cannot change a bit of them:
see `on_grid`. Selection therefore gives the same prototypes however its work is split.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Generator, Tensor, nn

from nlhelpers import training

TILE_BYTES = 256 * 2**20  # of similarities that are held at once
GRID = 2.0**26
BINS = 2**16


@torch.no_grad()
def deep_features(
    model: nn.Module, images: Tensor, batch_size: int = 2000
) -> Iterator[Tensor]:
    """G(x), the input of the last linear layer: (B, d) float32 for each batch.

    Args:
        model: a network whose last linear layer gives the logits.
        images: (N, C, H, W) uint8.
        batch_size: images at a time; features of no more than these are held.
    """
    *_, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    given: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda layer, inputs: given.append(inputs[0]))
    was_training = model.training
    model.eval()
    try:
        for part in images.split(batch_size):
            with training.autocast(model, images.device):
                model(part)
            yield given.pop().float()
    finally:
        hook.remove()
        model.train(was_training)


# Similarities, a tile of rows at a time


def on_grid(x: Tensor) -> Tensor:
    """Round to multiples of 2^-26, as float64.

    For rows no longer than 1, every sum of products is then a multiple of 2^-52 below
    1: float64 holds it exactly, in any order.
    """
    return (x * GRID).round() / GRID


def directions(features: Tensor) -> Tensor:
    """Features (m, d) divided by their norms, (m, d) float64 on the grid.

    Raises:
        ValueError: if a norm is zero.
    """
    x = features.double()
    return on_grid(x / checked_norms(x)[:, None])


def checked_norms(features: Tensor) -> Tensor:
    """The norms (m,) of features (m, d); ValueError if one is 0 or not finite."""
    norms = features.norm(dim=1)
    bad = ~(norms > 0) | norms.isinf()
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(features)} images have features of norm "
            f"{norms[bad][0].item():g}, which have no direction; train with a lower "
            "learning rate, or begin to correct later"
        )
    return norms


@dataclass(frozen=True, eq=False)
class Similarities:
    """A matrix (m, m) of similarities, of which only some rows exist at a time.

    Attributes:
        between: gives the similarities of some rows of `x` to all of them.
        x: (m, d) float64.
        smallest: lowest similarity that `between` can give.
        largest: highest similarity that `between` can give.
        tile_bytes: how many bytes one tile may take.
    """

    between: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    smallest: float
    largest: float
    tile_bytes: int = TILE_BYTES

    def __len__(self) -> int:
        """The number m of images."""
        return len(self.x)

    def __iter__(self) -> Iterator[Tensor]:
        """Tiles of rows (r, m) float64, from the first row to the last."""
        rows = max(1, self.tile_bytes // (8 * len(self)))
        if rows >= len(self):
            yield self.whole
            return
        for part in self.x.split(rows):
            yield self.between(part, self.x)

    @cached_property
    def whole(self) -> Tensor:
        """The matrix (m, m), kept for the next time it is asked for."""
        return self.between(self.x, self.x)


def cosine(features: Tensor, tile_bytes: int = TILE_BYTES) -> Similarities:
    """The cosines of the angles between features (m, d)."""
    return Similarities(
        lambda part, x: part @ x.T, directions(features), -1.0, 1.0, tile_bytes
    )


def euclidean(features: Tensor, tile_bytes: int = TILE_BYTES) -> Similarities:
    """Euclidean distances between features (m, d), with the opposite sign.

    They are in units of the largest norm.
    """
    x = features.double()
    x = on_grid(x / checked_norms(x).amax())

    def between(part: Tensor, x: Tensor) -> Tensor:
        squares = (part * part).sum(1)[:, None] + (x * x).sum(1) - 2 * part @ x.T
        return -squares.clamp(min=0).sqrt()

    return Similarities(between, x, -2.0, 0.0, tile_bytes)


def cutoff(S: Similarities, top: float) -> float:
    """S_c, such that about a share `top` of all similarities is larger.

    It is rounded down to a 65,536th of their range, so that one pass over S is enough.
    """
    low, high = S.smallest, S.largest
    counts = [tile.clamp(low, high).histc(BINS, low, high).cpu() for tile in S]
    above = torch.stack(counts).sum(dim=0).flip(0).cumsum(0)
    place = BINS - 1 - int((above < top * len(S) ** 2).sum())
    return low + max(place, 0) * (high - low) / BINS


def density(S: Similarities, S_c: float) -> Tensor:
    """The rho (m,) float64 of each image: rho_i = sum_j sign(S_ij - S_c)."""
    return torch.cat([(tile - S_c).sign_().sum(dim=1) for tile in S])


def nearest_denser(S: Similarities, rho: Tensor) -> Tensor:
    """The eta (m,): max of S_ij over the denser j; for the densest, min_j S_ij."""
    eta, start = [], 0
    for tile in S:
        own = rho[start : start + len(tile), None]
        denser = rho > own
        highest = tile.masked_fill(~denser, -torch.inf).amax(dim=1)
        eta.append(torch.where(denser.any(dim=1), highest, tile.amin(dim=1)))
        start += len(tile)
    return torch.cat(eta)


# Selectors: which p of a class's m images (m, d) are its prototypes


@dataclass(frozen=True)
class Rule:
    """What the slides leave open; the defaults are the published paper's.

    Attributes:
        S_c: in (-1, 1); None takes it from `top`.
        top: share of all similarities that is larger than S_c, in (0, 1).
        eta: prototypes are the densest images with an eta below it, in (-1, 1].
    """

    S_c: float | None = None
    top: float = 0.4
    eta: float = 0.95

    def __post_init__(self) -> None:
        """Raise ValueError for a value that makes no or all images neighbours."""
        if self.S_c is not None and not -1 < self.S_c < 1:
            raise ValueError(f"S_c is {self.S_c!r}; it must be in (-1, 1), or None")
        if not 0 < self.top < 1:
            raise ValueError(f"top is {self.top!r}; it must be in (0, 1)")
        if not -1 < self.eta <= 1:
            raise ValueError(f"eta is {self.eta!r}; it must be in (-1, 1]")


def by_density(
    features: Tensor, p: int, rule: Rule, generator: Generator | None = None
) -> Tensor:
    """The p densest images that are not close to a denser one: indices (p,).

    If there are fewer than p, those least close to a denser one follow.
    """
    S = cosine(features)
    S_c = cutoff(S, rule.top) if rule.S_c is None else rule.S_c
    rho = density(S, S_c)
    eta = nearest_denser(S, rho)
    apart = eta < rule.eta
    first = torch.where(apart, -rho, torch.inf).argsort(stable=True)
    rest = torch.where(apart, -torch.inf, eta).argsort(stable=True)
    found = int(apart.sum())
    return torch.cat([first[:found], rest[found:]])[:p]


def by_euclidean_density(
    features: Tensor, p: int, rule: Rule, generator: Generator | None = None
) -> Tensor:
    """Density peaks (Rodriguez and Laio 2014): the p largest rho * delta, (p,).

    rho counts the other images closer than a distance that 2 % of all pairs fall below;
    delta is the distance to the nearest denser one.
    """
    S, m = euclidean(features), len(features)
    of_entries = (m + 0.02 * m * (m - 1)) / m**2  # each image is as near to itself
    signs = density(S, cutoff(S, of_entries))
    rho = (signs + m) / 2 - 1  # how many are +1, without its own
    delta = -nearest_denser(S, rho)
    return (rho * delta).argsort(descending=True, stable=True)[:p]


def by_k_means(
    features: Tensor, p: int, rule: Rule, generator: Generator | None = None
) -> Tensor:
    """The images nearest to p centres, started by k-means++ (Arthur et al. 2007)."""
    x = directions(features)
    seed = int(torch.randint(2**31, (1,), generator=generator, device=x.device))
    clusters = KMeans(p, n_init=1, random_state=seed).fit(x.cpu().numpy())
    centres = torch.from_numpy(clusters.cluster_centers_).to(x)
    return torch.cdist(centres, x).argmin(dim=1)


Selector = Callable[[Tensor, int, Rule, Generator | None], Tensor]
SELECTORS = ("density", "euclidean", "k-means++")


def selector(name: str) -> Selector:
    """A selector of the slides' Table 4 by its name; ValueError if there is none."""
    match name:
        case "density":
            return by_density
        case "euclidean":
            return by_euclidean_density
        case "k-means++":
            return by_k_means
    allowed = ", ".join(map(repr, SELECTORS))
    raise ValueError(f"selector is {name!r}; allowed are {allowed}")


# Prototypes of all classes, and what they say


def sampled(
    labels: Tensor, num_classes: int, m: int, p: int, generator: Generator
) -> list[Tensor]:
    """At most m random indices of each class's labels: K tensors of indices.

    Raises:
        ValueError: if a class has no label, or fewer than p.
    """
    chosen = []
    for c in range(num_classes):
        of_class = torch.nonzero(labels == c).squeeze(1)
        if len(of_class) < p:
            raise ValueError(
                f"class {c} has {len(of_class)} images for {p} prototypes; lower "
                "num_prototypes, or give it more images"
            )
        order = torch.randperm(
            len(of_class), generator=generator, device=generator.device
        )
        chosen.append(of_class[order[:m]])
    return chosen


def class_directions(prototypes: Iterable[Tensor]) -> Tensor:
    """The mean of the directions of each class's prototypes (p, d): (K, d) float32.

    Its product with a direction is sigma, the mean of p cosines.
    """
    return torch.stack([directions(x).mean(dim=0) for x in prototypes]).float()


def similarity(features: Tensor, classes: Tensor) -> Tensor:
    """The sigma (B, K) of features (B, d), by `class_directions` (K, d)."""
    norms = checked_norms(features)
    return F.linear(features, classes) / norms[:, None]


def corrected(features: Iterable[Tensor], classes: Tensor) -> Tensor:
    """The most similar class of each image, (N,) int64, from batches of features."""
    return torch.cat([similarity(part, classes).argmax(dim=1) for part in features])
