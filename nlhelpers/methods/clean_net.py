"""CleanNet: transfer learning for training with label noise (Lee et al. 2018).

A classifier is trained on all labels as they are given. From its deep features, and
from the clean set's record of which labels proved right, a second network learns how
relevant an image is to the class that its label names (`nlhelpers.relevance`). The
training of the classifier then continues with every label weighted by this relevance.

Symbols: v = deep features, y = labels as given, cos = relevance of an image to its
label, tau = the cosine from which a label counts as right, w = weights of labels.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlhelpers import batches, losses, prototypes, relevance, training
from nlhelpers.data import UNKNOWN, NoisyData, with_clean
from nlhelpers.methods.self_learning import train_on_clean_set
from nlhelpers.models import Network
from nlhelpers.pretraining import pretrained
from nlhelpers.relevance import Rule
from nlhelpers.training import Epoch, Event, Screening, Setup

Weigh = Callable[[Tensor, Tensor], Tensor]  # cos and tau to w


def clean_net_hard(
    data: NoisyData,
    setup: Setup,
    *,
    num_references: int = 50,
    margin: float = 0.1,
    beta: float = 0.1,
    gamma: float = 0.1,
    rate: float = 0.1,
    start_pretrained: bool = False,
    finetune: bool = False,
) -> Iterator[Event]:
    """CleanNet that drops labels: w = 1 where cos >= tau, and 0 elsewhere.

    Args:
        data: images with noisy labels, and a clean set that includes the labels given
            before the check. Where all that is known is that the given label is wrong,
            the clean label is UNKNOWN.
        setup: network and recipe.
        num_references: number of reference features per class.
        margin: as in `relevance.Rule`, like the next two.
        beta: weight of the reconstruction error.
        gamma: weight of the labels that nobody verified.
        rate: learning rate of the training with weights, as a share of the recipe's;
            the default is our choice.
        start_pretrained: whether the classifier starts pretrained, as for photographs.
        finetune: whether to fine-tune on the clean set at the end ("50k clean").
    """
    rule = Rule(num_references, margin, beta, gamma)
    yield from clean_net(hard, data, setup, rule, rate, start_pretrained, finetune)


def clean_net_soft(
    data: NoisyData,
    setup: Setup,
    *,
    num_references: int = 50,
    margin: float = 0.1,
    beta: float = 0.1,
    gamma: float = 0.1,
    rate: float = 0.1,
    start_pretrained: bool = False,
    finetune: bool = False,
) -> Iterator[Event]:
    """CleanNet that weights labels: w = max(0, cos). Settings as `clean_net_hard`."""
    rule = Rule(num_references, margin, beta, gamma)
    yield from clean_net(soft, data, setup, rule, rate, start_pretrained, finetune)


def hard(cos: Tensor, tau: Tensor) -> Tensor:
    """Weights w_hard (N,) float32."""
    return (cos >= tau).float()


def soft(cos: Tensor, tau: Tensor) -> Tensor:
    """Weights w_soft (N,) float32, which do not depend on tau."""
    return cos.clamp(min=0)


def clean_net(
    weigh: Weigh,
    data: NoisyData,
    setup: Setup,
    rule: Rule,
    rate: float,
    start_pretrained: bool,
    finetune: bool,
) -> Iterator[Event]:
    """Train the classifier, then CleanNet, then the classifier with weights.

    The paper says that the two may take turns; here they do so once. Verified images
    are added to the noisy ones with the label they were given: a network that never
    trained on the wrong labels among them would give these images other features. Those
    that are among the noisy images already, as in Food-101N, therefore count twice.
    """
    verified = data.clean_given_labels != UNKNOWN
    y = torch.cat([data.clean_given_labels[verified], data.labels])
    right = (data.clean_labels == data.clean_given_labels)[verified]
    check(y, right, data.num_classes, rate)
    images = batches.joined(data.clean_images[verified], data.images)
    start = (yield from pretrained(data, setup)) if start_pretrained else None
    network = start or setup.build(data)
    w = torch.ones(len(y), device=y.device)
    yield from train(network, images, y, w, data, setup, "all labels")
    v = features(network, images)
    learning = relevance.learn(v, y, right, data.num_classes, rule, setup)
    cos, tau = yield from learning
    yield Screening(cos[len(right) :] >= tau)
    w = weigh(cos, tau)
    recipe = replace(setup.recipe, learning_rate=rate * setup.recipe.learning_rate)
    slower = replace(setup, recipe=recipe)
    yield from train(network, images, y, w, data, slower, "weighted labels")
    if finetune:
        known = with_clean(data, data.clean_labels != UNKNOWN)
        yield from train_on_clean_set(network, known, setup)


def train(
    network: Network,
    images: Tensor,
    y: Tensor,
    w: Tensor,
    data: NoisyData,
    setup: Setup,
    stage: str,
) -> Iterator[Epoch]:
    """Cross-entropy on labels y (N,), weighted by w (N,); validate on noisy labels."""

    def step(network: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        return (w[index] * losses.cross_entropy(network(images), y[index])).mean()

    return training.fit(
        network,
        images,
        lambda: batches.uniform(len(y), setup.recipe.batch_size, setup.generator),
        step,
        setup,
        lambda network: training.accuracy(network, data.val_images, data.val_labels),
        stage=stage,
    )


def features(network: Network, images: Tensor) -> Tensor:
    """Deep features v (N, d) float32, scaled to length 1.

    The authors' code can do this too; its default is a logarithm, for which features
    must not be negative.
    """
    parts = prototypes.deep_features(network, images)
    return torch.cat([F.normalize(part) for part in parts])


def check(y: Tensor, right: Tensor, num_classes: int, rate: float) -> None:
    """Raise ValueError unless there is enough to learn every class from.

    Warns if no verified label is wrong, since CleanNet then sees only right ones.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate!r}; it must be in (0, 1]")
    if len(right) < 2:
        raise ValueError(
            f"the clean set has {len(right)} images of which it is known what label "
            "was given before; CleanNet learns from 2 or more, so raise num_clean"
        )
    counts = y.bincount(minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(
            f"class {int(counts.argmin())} has no image, so there is nothing to know "
            "it by; give it one"
        )
    if right.all():
        warnings.warn(
            f"none of the {len(right)} verified labels was wrong, so CleanNet cannot "
            "learn what a wrong one looks like",
            stacklevel=3,
        )
