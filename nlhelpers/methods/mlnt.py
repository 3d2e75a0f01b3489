"""Noise-tolerant training by meta-learning, MLNT (Li et al. 2019).

A network should not depend on which wrong labels it happens to be given. So each step
tries out what such labels would do to it: part of the batch gets the labels of similar
images, one step of gradient descent is taken on them, and the network after this step
should still predict what a steady teacher does. The network is the student, and its
moving average is the teacher, which also becomes the classifier.

Symbols: theta = weights of the student, y_hat = synthetic labels, M = how many sets of
them, rho = share of a batch that is relabelled, alpha = size of the step on y_hat, J =
how far the student is from the teacher after that step, eta = weight of J, gamma =
share of the teacher's weights that stays.
"""

import copy
import math
from collections.abc import Callable, Generator, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_, vjp

from nlhelpers import losses, prototypes, training
from nlhelpers.data import NoisyData
from nlhelpers.methods.robust_losses import train
from nlhelpers.methods.two_stage import check_shares
from nlhelpers.models import Network
from nlhelpers.pretraining import pretrained
from nlhelpers.training import Auxiliary, Event, Setup

# While eta rises, the teacher remembers a tenth as many steps as it does afterwards:
# the authors' gamma is 0.99 at first and then 0.999.
EARLY = 1 / 10

Weights = dict[str, Tensor]


def mlnt(
    data: NoisyData,
    setup: Setup,
    *,
    M: int = 10,
    rho: float = 0.5,
    neighbours: int = 10,
    alpha: float = 1.0,
    eta: float = 1.0,
    ramp: float = 20 / 120,
    memory: float = 1000 / (120 * 352),
    start_pretrained: bool = False,
) -> Iterator[Event]:
    """Train on all noisy labels as the authors' code does: once, without a mentor.

    J is averaged over the images; the authors' code divides it by K as well.

    Args:
        data: images with noisy labels.
        setup: network and recipe, also for the network that tells which images are
            alike.
        M: sets of synthetic labels for each batch.
        rho: share of the batch that gets another label in each set.
        neighbours: that label comes from one of this many most similar images in the
            batch.
        alpha: in units of the recipe's learning rate, which it equals on CIFAR-10.
        eta: its largest value; the authors' 1 goes with a J that is divided by K.
        ramp: share of all steps over which eta rises.
        memory: steps that the teacher remembers, 1 / (1 - gamma), as a share of all.
        start_pretrained: whether all networks start pretrained, as for photographs.
    """
    check(setup, M, neighbours, alpha=alpha, eta=eta)
    check_shares(rho=rho, ramp=ramp, memory=memory)
    start = (yield from pretrained(data, setup)) if start_pretrained else None

    def fresh() -> Network:
        return copy.deepcopy(start) if start_pretrained else setup.build(data)

    G = yield from features(fresh(), data, setup)
    y, size = data.labels, alpha * setup.recipe.learning_rate
    steps = setup.recipe.epochs * max(1, len(y) // setup.recipe.batch_size)
    pair = StudentAndTeacher(fresh(), ramp * steps, memory * steps)

    def step(pair: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        pair.follow()
        theta = dict(pair.student.named_parameters())
        logits, gradient = forward(pair.student, theta, images)
        with torch.no_grad():
            target = pair.teacher(images).softmax(dim=1)
            near = nearest(G[index], neighbours)
            y_hat = synthetic(y[index], near, M, rho)
        # A loop, since vmap does not support batch norm in bfloat16.
        J = torch.zeros_like(target[:, 0])
        for labels in y_hat:
            g = gradient(labels)
            after = {name: w - size * g[name] for name, w in theta.items()}
            moved = functional_call(pair.student, after, (images,))
            J = J + losses.divergence(moved, target) / M
        return (losses.cross_entropy(logits, y[index]) + eta * pair.rise() * J).mean()

    yield from training.fit_noisy(pair, data, step, setup, stage="MLNT")


# The synthetic labels


def features(
    network: Network, data: NoisyData, setup: Setup
) -> Generator[Event, None, Tensor]:
    """Train by cross-entropy, and take deep features at the best validation accuracy.

    The authors compute them from the augmented batch in every step; here an image has
    the same features in every step.

    Returns:
        (N, d) float32.
    """
    best, weights = -1.0, network.state_dict()
    for done in train(network, losses.cross_entropy, data, setup, "features"):
        yield Auxiliary(done)
        if done.val_accuracy > best:
            best, weights = done.val_accuracy, copy.deepcopy(network.state_dict())
    network.load_state_dict(weights)
    return torch.cat(list(prototypes.deep_features(network, data.images)))


def nearest(G: Tensor, k: int) -> Tensor:
    """The k nearest other images in the batch for each image.

    Args:
        G: features (B, d).
        k: how many; all others if the batch has fewer.

    Returns:
        (B, k) int64, below B.
    """
    itself = torch.eye(len(G), dtype=torch.bool, device=G.device)
    distances = torch.cdist(G, G).masked_fill(itself, math.inf)
    return distances.topk(min(k, len(G) - 1), largest=False).indices


def synthetic(labels: Tensor, near: Tensor, M: int, rho: float) -> Tensor:
    """M sets of labels; in each, a share rho comes from random neighbours.

    It draws from torch's own random state, as dropout does, because it is part of a
    compiled step.

    Args:
        labels: (B,) int64.
        near: neighbours of each image, (B, k) int64.
        M: how many sets.
        rho: share of each set that is replaced, rounded down to whole labels.

    Returns:
        (M, B) int64.
    """
    B, k = near.shape
    chosen = torch.rand(M, B, device=near.device).argsort(dim=1) < int(rho * B)
    which = torch.randint(k, (M, B, 1), device=near.device)
    theirs = labels[near].expand(M, B, k).gather(2, which).squeeze(2)
    return torch.where(chosen, theirs, labels)


# Before and after a step on them


def forward(
    student: nn.Module, theta: Weights, images: Tensor
) -> tuple[Tensor, Callable[[Tensor], Weights]]:
    """The student's logits, and a function from labels to the gradient of their loss.

    The loss is cross-entropy. All sets of labels share one forward pass. The gradients
    count as constants, so that the gradient of J is of first order. The authors' code
    sets out to do the same, but it detaches copies, so its gradient of J keeps the
    second-order term.
    """
    logits, pullback = vjp(lambda w: functional_call(student, w, (images,)), theta)

    @torch.no_grad()
    def gradient(labels: Tensor) -> Weights:
        wrong = logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])
        (g,) = pullback(wrong / len(labels))
        return g

    return logits, gradient


class StudentAndTeacher(nn.Module):
    """The student answers in training mode, the teacher in evaluation mode.

    While it teaches, the teacher is in training mode too, as in the authors' code. The
    student's batch norm keeps no running statistics: only evaluation needs them, and
    trial steps would spoil them. The teacher has its own.
    """

    def __init__(self, network: Network, ramp: float, memory: float) -> None:
        """Make a pair of a network and its copy.

        Args:
            network: becomes the student.
            ramp: steps over which eta rises.
            memory: steps that the teacher remembers afterwards.
        """
        super().__init__()
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.student = replace_all_batch_norm_modules_(network)
        self.ramp, self.memory = max(1.0, ramp), memory
        device = next(network.parameters()).device
        self.register_buffer("steps", torch.zeros((), device=device))

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) uint8 to logits (N, K) float32."""
        return self.student(images) if self.training else self.teacher(images)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the teacher to gamma * teacher + (1 - gamma) * student.

        This comes at the start of a step, as in the authors' code, so the very last
        step does not reach the teacher. Over the first steps, the teacher is the plain
        mean of the students.
        """
        late, early = max(1.0, self.memory), max(1.0, EARLY * self.memory)
        remembered = torch.where(self.steps < self.ramp, early, late)
        moves = 1 / torch.minimum(remembered, self.steps + 1)  # 1 - gamma
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for average, theta in pairs:
            average.lerp_(theta, moves)
        self.steps += 1

    def rise(self) -> Tensor:
        """Share of eta used in this step: exp(-5 (1 - u)^2), where u rises to 1."""
        u = (self.steps / self.ramp).clamp(max=1)
        return torch.exp(-5 * (1 - u).square())


def check(setup: Setup, M: int, neighbours: int, **weights: float) -> None:
    """Raise ValueError for the first number that makes no sense."""
    for name, count in {"M": M, "neighbours": neighbours}.items():
        if count < 1:
            raise ValueError(f"{name} is {count!r}; it must be 1 or more")
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight!r}; it must be 0 or more")
    if setup.recipe.batch_size < 2:
        raise ValueError(
            f"batch_size is {setup.recipe.batch_size!r}; it must be 2 or more, for an "
            "image to have a neighbour"
        )
