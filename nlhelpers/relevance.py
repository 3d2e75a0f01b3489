"""How relevant an image is to a class, learned from verified labels (Lee et al. 2018).

CleanNet knows a class by a set of reference features. Attention turns them into one
vector, an encoder turns an image into another, and their cosine is the relevance. It
learns from labels that somebody verified, and a little from its own belief about the
others.

Symbols: v = features of an image, V = reference features of the classes, m = how many
a class has, phi_s = the vector of a class, phi_q = the vector of an image, h = hidden
layer, a = attention, y = labels as given, l = verification labels (1 right, 0 wrong,
UNKNOWN if nobody looked), cos = relevance of an image to its label, omega = weight of
wrong labels, beta and gamma = weights of two terms of the loss, tau = threshold.

Layers, their sizes and the loss are those of the code that the authors published; m is
32 there.
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from nlhelpers import batches, prototypes, training
from nlhelpers.data import UNKNOWN
from nlhelpers.training import Auxiliary, Setup

SIZE = 128  # of phi_s and phi_q
# Food-101N has verified labels to learn from and others to validate with; here this
# share of the clean set is held out to validate with.
HELD_OUT = 1 / 5


@dataclass(frozen=True)
class Rule:
    """How CleanNet learns; ValueError for a value that makes no sense.

    Attributes:
        m: reference features of a class.
        margin: a wrong label costs nothing up to this cosine, and a label that nobody
            verified is taken to be right from it on.
        beta: weight of the reconstruction error.
        gamma: weight of the labels that nobody verified.
    """

    m: int = 50
    margin: float = 0.1
    beta: float = 0.1
    gamma: float = 0.1

    def __post_init__(self) -> None:
        """Check every value."""
        if self.m < 1:
            raise ValueError(f"num_references is {self.m!r}; it must be 1 or more")
        if not -1 <= self.margin < 1:
            raise ValueError(f"margin is {self.margin!r}; it must be in [-1, 1)")
        for name in ("beta", "gamma"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {value!r}; it must be 0 or more")


class CleanNet(nn.Module):
    """A reference set encoder and a query encoder.

    Asked for a prediction, it answers with the relevance of an image to every class.
    """

    def __init__(self, references: Tensor) -> None:
        """Build it on the device of the references V (K, m, d)."""
        super().__init__()
        d = references.shape[2]
        self.register_buffer("V", references)
        self.hidden = nn.Sequential(tanh(d, 512), tanh(512, 256))
        self.projection = tanh(256, 256)
        bound = math.sqrt(3 / 256)  # Xavier's
        self.context = nn.Parameter(torch.empty(256).uniform_(-bound, bound))
        self.summary = tanh(256, SIZE)
        self.encoder = nn.Sequential(tanh(d, 256), tanh(256, SIZE))
        self.decoder = nn.Sequential(tanh(SIZE, 256), tanh(256, d))
        self.to(references.device)

    def classes(self) -> Tensor:
        """The phi_s (K, 128) float32: references, weighted by attention."""
        h = self.hidden(self.V)
        a = (self.projection(h) * self.context).sum(dim=2, keepdim=True).softmax(dim=1)
        return self.summary((a * h).sum(dim=1)).float()

    def queries(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The phi_q (N, 128) float32 of features v (N, d), and v decoded from them."""
        phi_q = self.encoder(v)
        return phi_q.float(), self.decoder(phi_q).float()

    def forward(self, images: Tensor) -> Tensor:
        """Features in the shape of images (N, d, 1, 1) to cosines (N, K) float32."""
        phi_q, _ = self.queries(images.flatten(1))
        return F.cosine_similarity(phi_q[:, None], self.classes(), dim=2)


def tanh(inputs: int, outputs: int) -> nn.Sequential:
    """A linear layer and tanh, with Xavier's weights and zero biases to begin with."""
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.Tanh())


# Reference features


def references(
    v: Tensor, y: Tensor, num_classes: int, m: int, generator: torch.Generator
) -> Tensor:
    """V (K, m, d) float32: m centres of each class's features, by K-means.

    Args:
        v: (N, d) float32, of length 1.
        y: (N,) int64, as given; every class occurs.
        num_classes: K.
        m: how many stand for a class.
        generator: decides where K-means starts.
    """
    seeds = torch.randint(
        2**31, (num_classes,), generator=generator, device=generator.device
    )
    return torch.stack(
        [centres(v[y == c], m, seed) for c, seed in enumerate(seeds.tolist())]
    )


def centres(v: Tensor, m: int, seed: int) -> Tensor:
    """The m centres (m, d) of features v (n, d); if n <= m, all n in turn."""
    if len(v) <= m:
        return v[torch.arange(m, device=v.device) % len(v)]
    x = prototypes.on_grid(v.double())  # whose sums are the same in any order
    clusters = KMeans(m, n_init=1, max_iter=50, random_state=seed).fit(x.cpu().numpy())
    return torch.from_numpy(clusters.cluster_centers_).to(v)


# Learning


def learn(
    v: Tensor,
    y: Tensor,
    right: Tensor,
    num_classes: int,
    rule: Rule,
    setup: Setup,
) -> Generator[Auxiliary, None, tuple[Tensor, Tensor]]:
    """Train CleanNet; an epoch sees as many unverified images as there are.

    The features take the place of images, so no other training loop is needed.

    Args:
        v: (M + N, d) float32, of length 1: M verified images, then N others.
        y: (M + N,) int64, as given.
        right: (M,) bool, whether the given labels of the verified images are right.
        num_classes: K.
        rule: number of references, and the loss.
        setup: its recipe gives the number of epochs.

    Returns:
        cos (M + N,) of all images, and tau (a scalar), tuned on what was held out.
    """
    own, M, N = for_clean_net(setup), len(right), len(y) - len(right)
    model = CleanNet(references(v, y, num_classes, rule.m, setup.generator))
    images = v[:, :, None, None]
    learned, held_out = divided(M, setup.generator)
    l = torch.full_like(y, UNKNOWN)  # noqa: E741, the paper's symbol
    l[learned] = right[learned].long()
    omega = imbalance(right[learned])
    half = min(own.recipe.batch_size // 2, N)

    def epoch() -> Iterator[Tensor]:
        size = N // half * half
        verified = learned[batches.repeated(len(learned), size, setup.generator)]
        others = M + batches.repeated(N, size, setup.generator)
        return iter(torch.cat([verified.view(-1, half), others.view(-1, half)], dim=1))

    def step(model: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        given = images.flatten(1)
        phi_q, decoded = model.queries(given)
        cos = F.cosine_similarity(phi_q, model.classes()[y[index]])
        error = (given - decoded).square().sum(dim=1)
        on_labels = label_loss(cos, l[index], omega, rule)
        return (on_labels + rule.beta * error).mean()

    def of_label(model: nn.Module, index: Tensor) -> Tensor:
        cos = training.predict_logits(model, images[index])
        return cos.gather(1, y[index][:, None]).squeeze(1)

    def validate(model: nn.Module) -> float:
        believed = of_label(model, held_out) >= rule.margin
        return (believed == right[held_out]).double().mean().item()

    stage = "CleanNet"
    for done in training.fit(model, images, epoch, step, own, validate, stage=stage):
        yield Auxiliary(done)
    cos = of_label(model, torch.arange(M + N, device=y.device))
    return cos, threshold(cos[held_out], right[held_out])


def label_loss(cos: Tensor, l: Tensor, omega: float, rule: Rule) -> Tensor:  # noqa: E741
    """The cosine loss of verified labels; gamma times that of believed ones, (N,).

    Where nobody verified a label, what CleanNet believes at present takes its place.

    Args:
        cos: (N,), relevance of an image to its label.
        l: (N,) int64, verification labels.
        omega: weight of wrong labels.
        rule: margin and gamma.
    """
    told = l != UNKNOWN
    right = torch.where(told, l == 1, cos >= rule.margin)
    wrong_cost = omega * (cos - rule.margin).clamp(min=0)
    return torch.where(told, 1.0, rule.gamma) * torch.where(right, 1 - cos, wrong_cost)


def divided(M: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices below M in random order: those to learn from, and those held out."""
    order = torch.randperm(M, generator=generator, device=generator.device)
    count = max(1, round(HELD_OUT * M))
    return order[count:], order[:count]


def imbalance(right: Tensor) -> float:
    """Omega: how many right labels there are per wrong one; 1 without both kinds.

    The authors' code has 5, on Food-101N, where about a fifth of the labels are wrong.
    """
    count, wrong = int(right.sum()), int((~right).sum())
    return count / wrong if count and wrong else 1.0


def for_clean_net(setup: Setup) -> Setup:
    """The setup with the optimiser of the authors' code; it keeps its epochs.

    Their rate falls after half of the steps.
    """
    recipe = replace(
        setup.recipe,
        batch_size=64,
        optimiser="sgd",
        learning_rate=0.01,
        momentum=0.9,
        weight_decay=1e-4,
        factor=0.1,
        falls_after=(max(1, setup.recipe.epochs // 2),),
        crop=0,
        flip=False,
    )
    return replace(setup, recipe=recipe)


def threshold(cos: Tensor, right: Tensor) -> Tensor:
    """The tau (a scalar), one of cos (N,), that most often agrees with right (N,) bool.

    Of several, the lowest.
    """
    tau = cos.sort().values
    return tau[((cos >= tau[:, None]) == right).sum(dim=1).argmax()]
