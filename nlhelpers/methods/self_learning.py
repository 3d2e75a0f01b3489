"""Deep self-learning from noisy labels (Han, Luo and Wang 2019).

After some plain epochs, training and label correction take turns: before each epoch a
few prototypes of every class are chosen among its images, every training image gets
the label of the prototypes that it is most similar to, and the epoch trains on both the
given and the corrected labels.

Symbols: y = labels as given, y_hat = corrected labels, alpha = their weight in the
loss, m = images sampled per class, p = prototypes per class, G(x) = deep features.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from nlhelpers import batches, losses, profiles, prototypes, training
from nlhelpers.data import NoisyData
from nlhelpers.methods.clean_only import clean_batches
from nlhelpers.models import Network
from nlhelpers.pretraining import pretrained
from nlhelpers.prototypes import Rule, Selector
from nlhelpers.training import Correction, Epoch, Event, Setup

# Fine-tuning is a quarter as long as training, at a tenth of its learning rate.
FINETUNE_EPOCHS, FINETUNE_RATE = 1 / 4, 1 / 10


def self_learning(
    data: NoisyData,
    setup: Setup,
    *,
    alpha: float = 0.5,
    start_epoch: int | None = None,
    num_samples: int = 1280,
    num_prototypes: int = 8,
    selector: str = "density",
    S_c: float | None = None,
    top: float = 0.4,
    eta: float = 0.95,
    start_pretrained: bool = False,
    finetune: bool = False,
) -> Iterator[Event]:
    """Algorithm 1. If the data have a clean set, prototypes come from it alone.

    Args:
        data: images with noisy labels; a clean set is the slides' "25k verify".
        setup: network and recipe.
        alpha: weight of the corrected labels in the loss, in [0, 1].
        start_epoch: the first epoch that trains on corrected labels; None is the first
            after a third of all epochs.
        num_samples: m; a class with fewer images gives all of them.
        num_prototypes: p.
        selector: one of `prototypes.SELECTORS`.
        S_c: similarity of neighbours, as in `prototypes.Rule`.
        top: the share of similarities that sets S_c if it is None.
        eta: the largest similarity of a prototype to a denser image.
        start_pretrained: whether the network starts pretrained, as for photographs.
        finetune: whether to fine-tune on the clean set at the end, the slides' "50k
            clean".
    """
    first = checked_start(start_epoch, setup.recipe.epochs)
    check(data, alpha, num_samples, num_prototypes, finetune)
    select, rule = prototypes.selector(selector), Rule(S_c, top, eta)
    start = (yield from pretrained(data, setup)) if start_pretrained else None
    network = start or setup.build(data)
    y, y_hat = data.labels, data.labels.clone()
    weight = torch.zeros((), device=y.device)  # alpha, once y_hat has been corrected

    def step(network: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        logits = network(images)
        on_given = losses.cross_entropy(logits, y[index])
        on_corrected = losses.cross_entropy(logits, y_hat[index])
        return ((1 - weight) * on_given + weight * on_corrected).mean()

    for done in train(network, data, setup, step):
        yield done
        if alpha > 0 and done.number >= first - 1:
            classes = find_classes(
                network, data, num_samples, num_prototypes, select, rule, setup
            )
            features = prototypes.deep_features(network, data.images)
            y_hat.copy_(prototypes.corrected(features, classes))
            weight.fill_(alpha)
            yield Correction(y_hat.clone())
    if finetune:
        yield from train_on_clean_set(network, data, setup)


def train(
    network: Network, data: NoisyData, setup: Setup, step: training.Step
) -> Iterator[Epoch]:
    """Train on all noisy images, validated on labels that are as noisy."""
    return training.fit(
        network,
        data.images,
        lambda: batches.uniform(
            len(data.labels), setup.recipe.batch_size, setup.generator
        ),
        step,
        setup,
        lambda network: training.accuracy(network, data.val_images, data.val_labels),
        stage="self-learning",
    )


def find_classes(
    network: Network,
    data: NoisyData,
    m: int,
    p: int,
    select: Selector,
    rule: Rule,
    setup: Setup,
) -> Tensor:
    """Choose p of m images per class; return their mean directions (K, d)."""
    verified = len(data.clean_labels) > 0
    images = data.clean_images if verified else data.images
    labels = data.clean_labels if verified else data.labels
    chosen = prototypes.sampled(labels, data.num_classes, m, p, setup.generator)
    features = torch.cat(
        list(prototypes.deep_features(network, images[torch.cat(chosen)]))
    )
    return prototypes.class_directions(
        of_class[select(of_class, p, rule, setup.generator)]
        for of_class in features.split([len(index) for index in chosen])
    )


def train_on_clean_set(
    network: Network, data: NoisyData, setup: Setup
) -> Iterator[Epoch]:
    """Fine-tune on the clean labels alone, in place."""
    recipe = setup.recipe
    shorter = profiles.shortened(recipe, max(1, round(FINETUNE_EPOCHS * recipe.epochs)))
    slower = replace(shorter, learning_rate=FINETUNE_RATE * recipe.learning_rate)

    def step(network: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        return losses.cross_entropy(network(images), data.clean_labels[index]).mean()

    return training.fit(
        network,
        data.clean_images,
        lambda: clean_batches(len(data.clean_labels), data, setup),
        step,
        replace(setup, recipe=slower),
        lambda network: training.accuracy(network, data.val_images, data.val_labels),
        stage="fine-tuning",
    )


def check_finetune(data: NoisyData, finetune: bool) -> None:
    """Raise ValueError if there is nothing to fine-tune on."""
    if finetune and not len(data.clean_labels):
        raise ValueError(
            "finetune is True, but there is no clean set; set num_clean to how many "
            "images it may have"
        )


def checked_start(start_epoch: int | None, epochs: int) -> int:
    """The first epoch with corrected labels; raises ValueError if there is none."""
    if start_epoch is None:
        return max(2, epochs // 3 + 1)
    if not isinstance(start_epoch, int) or not 2 <= start_epoch <= epochs:
        raise ValueError(
            f"start_epoch is {start_epoch!r}; it must be a whole number from 2 (a "
            f"network must be trained first) to {epochs}, the last epoch"
        )
    return start_epoch


def check(data: NoisyData, alpha: float, m: int, p: int, finetune: bool) -> None:
    """Raise ValueError unless the settings make sense for the data."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}; it must be in [0, 1]")
    if not 1 <= p <= m:
        raise ValueError(
            f"num_prototypes is {p!r} and num_samples is {m!r}; it must be "
            "1 <= num_prototypes <= num_samples"
        )
    if finetune and not len(data.clean_labels):
        raise ValueError(
            "finetune is True, but there is no clean set; set num_clean to how many "
            "images it may have"
        )
    if len(data.clean_labels) and data.clean_labels.max() >= data.num_classes:
        raise ValueError(
            f"the clean set has a label {int(data.clean_labels.max())}, but the noisy "
            f"data have the classes 0 to {data.num_classes - 1}; give both the same"
        )
