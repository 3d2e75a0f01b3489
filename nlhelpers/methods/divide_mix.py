"""DivideMix (Li, Socher and Hoi 2020).

Two networks are trained. Before each epoch, two Gaussians are fitted to the losses of
each network: a small loss suggests a right label, and only labels that are probably
right are kept. The network's peer then learns from kept labels and from images without
a label at the same time, by MixMatch: labels are refined or guessed from predictions of
the networks, and images are mixed in pairs. So each network learns by the judgement of
the other.

Symbols: w = probability that a label is right, tau = the w above which it is kept; x, u
= images with and without a label, M = views of each, y = labels, p = predictions or
targets, T = temperature of sharpening, alpha = parameter of the mixing weight lam
(lambda), lambda_u = weight of the images without a label, pi_c = 1 / K.
"""

import math
import warnings
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Generator, Tensor, nn

from nlhelpers import batches, losses, training
from nlhelpers.data import NoisyData
from nlhelpers.methods.co_teaching import Pair
from nlhelpers.training import Event, Screening, Setup

M = 2


def divide_mix(
    data: NoisyData,
    setup: Setup,
    *,
    tau: float = 0.5,
    T: float = 0.5,
    alpha: float = 4.0,
    lambda_u: float = 25.0,
    warm_up: float = 10 / 300,
    ramp_up: float = 16 / 300,
    confidence_penalty: bool = False,
) -> Iterator[Event]:
    """Algorithm 1, with the warm-up in the same training, as the authors have it.

    Both networks take every step together, whereas the authors train one for an epoch
    and then the other. In an epoch, each sees as many images as there are in all, half
    of them with a label; the length of the authors' epoch is the number of kept labels.
    The loss of an epoch is the sum over both networks. Both are evaluated together, as
    in the paper. The screening at the end uses the mean of both w.

    Args:
        data: images with noisy labels.
        setup: network and recipe.
        tau: a label is kept if its w is larger.
        T: temperature, in (0, 1]; 1 does not sharpen.
        alpha: of the Beta distribution; a larger one mixes images more evenly.
        lambda_u: its largest value; the paper picks one of 0, 25, 50 and 150. Its
            Appendix B has 0 on CIFAR-10 with 20 % of the labels wrong, 25 with 50 %.
        warm_up: share of all epochs that train on all labels first; at least one does.
        ramp_up: share of all epochs over which lambda_u rises.
        confidence_penalty: whether the warm-up rewards entropy, for asymmetric noise.
    """
    check(tau, T, alpha, lambda_u, warm_up, ramp_up)
    N, K, epochs = len(data.labels), data.num_classes, setup.recipe.epochs
    networks = Ensemble(setup.build(data), setup.build(data))
    half = max(1, min(setup.recipe.batch_size, N) // 2)
    warm = max(1, min(round(warm_up * epochs), epochs - 1))
    warming = True  # changes once; on a GPU the step is then compiled again
    w = torch.ones(2, N, device=data.labels.device)
    weight = torch.zeros((), device=w.device)  # lambda_u in the current epoch
    draws = Draws(N, 2 * M * half, w.device)

    def epoch() -> Iterator[Tensor]:
        count = N // (2 * half)
        if warming:
            every = torch.arange(N, device=w.device)
            return beside([every, every], 2 * half, count, setup.generator)
        return beside(divided(w > tau), half, count, setup.generator)

    def step(networks: Ensemble, index: Tensor, *views: Tensor) -> Tensor:
        total = 0.0
        for k, (network, peer) in enumerate(networks.turns()):
            mine = index.chunk(2)[k]
            if warming:
                logits = network(views[0].chunk(2)[k])
                loss = warm_up_loss(logits, data.labels[mine], confidence_penalty)
                total = total + loss.mean()
            else:
                images = torch.cat([view.chunk(2)[k] for view in views])
                x = mine.chunk(2)[0]
                y = F.one_hot(data.labels[x], K)
                p = targets(network, peer, images, y, w[k][x], T).repeat(M, 1)
                images, p = mixed(images, p, *draws.of(k, mine))
                total = total + semi_supervised_loss(network(images), p, weight)
        return total

    for done in training.fit(
        networks,
        data.images,
        epoch,
        step,
        setup,
        lambda model: training.accuracy(model, data.val_images, data.val_labels),
        stage="divide-mix",
        views=M,
    ):
        yield done
        if done.number >= warm:
            warming = False
            w.copy_(co_divide(networks, data, setup.generator))
            draws.renew(alpha, setup.generator)
            weight.fill_(lambda_u * ramped(done.number - warm, ramp_up * epochs))
    yield Screening(w.mean(dim=0) > tau)


class Ensemble(Pair):
    """Two networks that predict mean probabilities (the authors' code: logits)."""

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) uint8 to the log of probabilities (N, K) float32."""
        log_p = [network(images).log_softmax(dim=1) for network in (self.f, self.g)]
        return torch.logaddexp(*log_p) - math.log(2)

    def turns(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        """Each network with its peer."""
        return (self.f, self.g), (self.g, self.f)


# Warm-up and co-divide (section 3.1)


def warm_up_loss(logits: Tensor, labels: Tensor, penalty: bool) -> Tensor:
    """Cross-entropy per example (B,); with `penalty`, minus the entropy of Eq. 2."""
    loss = losses.cross_entropy(logits, labels)
    if penalty:
        log_p = logits.log_softmax(dim=1)
        loss = loss + (log_p.exp() * log_p).sum(dim=1)
    return loss


def co_divide(networks: Ensemble, data: NoisyData, generator: Generator) -> Tensor:
    """Find w (2, N), for f and for g, each from the losses of its peer."""
    found = []
    for _, peer in networks.turns():
        logits = training.predict_logits(peer, data.images)
        loss = losses.cross_entropy(logits, data.labels)
        found.append(clean_probability(loss, seed(generator)))
    return torch.stack(found)


def clean_probability(loss: Tensor, seed: int) -> Tensor:
    """The posterior of the Gaussian with the smaller mean, by EM on the losses.

    Losses are scaled to [0, 1] first. The number of iterations and the smallest
    variance are those of the authors' code. Where nine labels in ten are wrong, that
    code also averages the losses of five epochs, which is left out here.

    Args:
        loss: (N,), of every label.
        seed: of the k-means that EM starts from.

    Returns:
        (N,) float32, on the same device.
    """
    low, high = loss.double().aminmax()
    scaled = (loss.double() - low) / (high - low).clamp(min=1e-12)
    column = scaled.cpu().numpy()[:, None]
    gaussians = GaussianMixture(
        2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed
    )
    with warnings.catch_warnings():  # ten iterations may be too few, or losses equal
        warnings.simplefilter("ignore", ConvergenceWarning)
        gaussians.fit(column)
    w = gaussians.predict_proba(column)[:, gaussians.means_.argmin()]
    return torch.from_numpy(w).to(loss.device, torch.float32)


def divided(kept: Tensor) -> list[Tensor]:
    """Indices (n,) of the x and the u of f, then of g, from kept labels (2, N) bool.

    If no label is kept, or every label, the empty set is replaced by all images.
    """
    sides = [side for row in kept for side in (row, ~row)]
    full = [side if side.any() else torch.ones_like(side) for side in sides]
    return [side.nonzero().squeeze(1) for side in full]


def beside(
    pools: list[Tensor], width: int, count: int, generator: Generator
) -> Iterator[Tensor]:
    """`count` batches of `width` indices from each pool (n,), one pool after the other.

    Each pool is run through in random order, as often as needed.
    """
    columns = [
        pool[batches.repeated(len(pool), count * width, generator)].view(count, width)
        for pool in pools
    ]
    return iter(torch.cat(columns, dim=1))


# MixMatch with co-refinement and co-guessing (section 3.2)


@torch.no_grad()
def targets(
    network: nn.Module, peer: nn.Module, images: Tensor, y: Tensor, w: Tensor, T: float
) -> Tensor:
    """Refined labels for x (Eq. 3) and guessed ones for u, both sharpened.

    Both networks stay in training mode; the authors put the peer in evaluation mode.

    Args:
        network: the one that learns; it refines the labels of x.
        peer: the other one; both guess the labels of u.
        images: (M * 2B, C, H, W), one view after the other, each with x before u.
        y: one-hot labels of x, (B, K).
        w: (B,), of the labels of x.
        T: temperature.

    Returns:
        (2B, K), for x before u.
    """
    p_x, p_u = network(images).softmax(dim=1).unflatten(0, (M, 2, -1)).mean(dim=0)
    u = images.unflatten(0, (M, 2, -1))[:, 1].flatten(0, 1)
    p_peer = peer(u).softmax(dim=1).unflatten(0, (M, -1)).mean(dim=0)
    refined = w[:, None] * y + (1 - w[:, None]) * p_x
    return sharpen(torch.cat([refined, (p_u + p_peer) / 2]), T)


def sharpen(p: Tensor, T: float) -> Tensor:
    """p^(1 / T), rescaled to sum 1 (Eq. 4): (B, K)."""
    return (p.log() / T).softmax(dim=1)


def mixed(
    images: Tensor, p: Tensor, lam: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix every image and its target with those of another image (Eq. 5 to 8).

    Args:
        images: (B, C, H, W).
        p: targets, (B, K).
        lam: (B,) in [0, 1]; the first image of a pair gets the larger share.
        order: (B,) int64, the second image of each pair.

    Returns:
        Images (B, C, H, W) and targets (B, K), float32.
    """
    share = lam.maximum(1 - lam)[:, None]
    p = share * p + (1 - share) * p[order]
    share = share[:, :, None, None]
    return share * images + (1 - share) * images[order], p


def semi_supervised_loss(logits: Tensor, p: Tensor, lambda_u: Tensor) -> Tensor:
    """L_X + lambda_u L_U + L_reg, Eq. 9 to 12, of one batch.

    Eq. 10 sums over the classes. The authors' code averages over them, and since their
    lambda_u belongs to the code, so does this.

    Args:
        logits: (M * 2B, K), in the order of the images in `targets`.
        p: targets, of the same shape and in the same order.
        lambda_u: scalar.
    """
    log_p = logits.log_softmax(dim=1)
    log_x, log_u = log_p.unflatten(0, (M, 2, -1)).unbind(1)
    p_x, p_u = p.unflatten(0, (M, 2, -1)).unbind(1)
    L_X = -(p_x * log_x).sum(dim=-1).mean()
    L_U = (p_u - log_u.exp()).square().mean()
    log_mean = log_p.logsumexp(dim=0) - math.log(len(log_p))
    L_reg = (-math.log(log_p.shape[1]) - log_mean).mean()  # pi_c log(pi_c / mean p^c)
    return L_X + lambda_u * L_U + L_reg


class Draws:
    """The random draws of mixing: a lam for every view of an image, and the pairing.

    They are drawn anew for every epoch; within an epoch, the random order of the images
    makes new pairs. The authors draw for every step, and their code has one lam for a
    whole batch.
    """

    def __init__(self, N: int, size: int, device: torch.device) -> None:
        """Make room for N images, and for batches of `size` views for one network."""
        self.lam = torch.ones(2, M, N, device=device)
        self.keys = torch.zeros(2, size, device=device)

    def renew(self, alpha: float, generator: Generator) -> None:
        """Draw everything again, in place."""
        chance = np.random.default_rng(seed(generator))
        drawn = chance.beta(alpha, alpha, size=self.lam.shape)
        self.lam.copy_(torch.from_numpy(drawn))
        self.keys.uniform_(generator=generator)

    def of(self, k: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Lam and partners, each (M * B,), for network k's batch of indices (B,)."""
        size = M * len(index)  # smaller where several processes share a batch
        return self.lam[k][:, index].flatten(), self.keys[k, :size].argsort()


def ramped(done: int, length: float) -> float:
    """Share of lambda_u in the epoch after `done` epochs of its linear rise.

    It is the value in the middle of that epoch; the authors' rises with every step.
    """
    return min((done + 0.5) / length, 1.0)


def seed(generator: Generator) -> int:
    """A seed for NumPy and scikit-learn, drawn from torch's generator."""
    device = generator.device
    return int(torch.randint(2**31, (), generator=generator, device=device))


def check(
    tau: float, T: float, alpha: float, lambda_u: float, warm_up: float, ramp_up: float
) -> None:
    """Raise ValueError unless the settings make sense."""
    for name, value in {"tau": tau, "warm_up": warm_up}.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value!r}; it must be in [0, 1)")
    for name, value in {"T": T, "ramp_up": ramp_up}.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value!r}; it must be in (0, 1]")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha!r}; it must be more than 0")
    if not 0 <= lambda_u < math.inf:
        raise ValueError(f"lambda_u is {lambda_u!r}; it must be 0 or more")
