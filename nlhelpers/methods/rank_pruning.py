"""Learning with confident examples (Northcutt, Wu and Chuang 2017), Algorithm 1.

Networks that never saw an image say how probable its label is. This gives the noise
rates, and these give the number of wrong labels. That many of the least probable labels
are left out, and a fresh network is trained on the rest.

Symbols: as in `nlhelpers.pruning`. Class 0 is the paper's positive class, s = 1.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from nlhelpers import batches, losses, pruning, training
from nlhelpers.data import NoisyData
from nlhelpers.training import Auxiliary, Epoch, Event, Screening, Setup


def rank_pruning(
    data: NoisyData, setup: Setup, *, folds: int = 3, grouped: bool = True
) -> Iterator[Event]:
    """Predict held-out images, prune their labels, train on the others.

    Args:
        data: images of two classes with noisy labels.
        setup: network and recipe, the same for every training.
        folds: number of networks, each predicting the images it was not trained on.
        grouped: whether to keep the copies of an image in one fold. Otherwise, where
            images are repeated, a network has seen what it predicts.

    Raises:
        ValueError: if there are not two classes, or too few images for the folds, or
            if the estimated noise rates cannot be right.
    """
    if data.num_classes != 2:
        raise ValueError(
            f"the data have {data.num_classes} classes; rank pruning takes two only"
        )
    device = data.labels.device
    s = (data.labels == 0).cpu().numpy()
    group = copies(data.images) if grouped else None
    g = np.empty(len(s))
    cut = pruning.splits(s, folds, group, draw_seed(setup))
    for number, (train, held) in enumerate(cut, start=1):
        model, index = setup.build(data), torch.from_numpy(train).to(device)
        alike = torch.ones(len(s), device=device)
        stage = f"fold {number} of {folds}"
        for done in fit_on(index, alike, model, data, setup, stage):
            yield Auxiliary(done)
        g[held] = predict_once(model, data.images, held, group)
    # All processes must prune the same labels, though their networks may round
    # differently.
    found = pruning.prune(training.agreed(g), s)
    kept = torch.from_numpy(found.kept).to(device)
    yield Screening(kept)
    weight = torch.from_numpy(found.weights).float().to(device)
    # With a mean of 1 the learning rate means what it does in every other method.
    weight /= weight[kept].mean()
    model, index = setup.build(data), kept.nonzero().squeeze(1)
    yield from fit_on(index, weight, model, data, setup, "training")


def fit_on(
    index: Tensor,
    weight: Tensor,
    model: nn.Module,
    data: NoisyData,
    setup: Setup,
    stage: str,
) -> Iterator[Epoch]:
    """Weighted cross-entropy on some of the images; validate on noisy labels.

    Args:
        index: (M,) int64, which images.
        weight: (N,), one for every image.
        model: trained in place.
        data: images with noisy labels.
        setup: recipe and generator.
        stage: a name for this training.
    """

    def step(model: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        loss = losses.cross_entropy(model(images), data.labels[index])
        return (weight[index] * loss).mean()

    def epoch() -> Iterator[Tensor]:
        size = setup.recipe.batch_size
        return (index[b] for b in batches.uniform(len(index), size, setup.generator))

    def validate(model: nn.Module) -> float:
        return training.accuracy(model, data.val_images, data.val_labels)

    yield from training.fit(
        model, data.images, epoch, step, setup, validate, stage=stage
    )


def predict_once(
    model: nn.Module,
    images: Tensor,
    held: np.ndarray,
    group: np.ndarray | None,
) -> np.ndarray:
    """Predict g for the held-out images; copies are predicted once.

    If predicted separately, copies might differ by rounding, and some be pruned without
    the others.

    Args:
        model: not trained on these images.
        images: all N.
        held: (H,) int64, which ones are held out.
        group: (N,), the same number for copies; None to predict every image by itself.

    Returns:
        (H,) float64.
    """
    first, where = held, np.arange(len(held))
    if group is not None:
        _, start, where = np.unique(group[held], return_index=True, return_inverse=True)
        first = held[start]
    index = torch.from_numpy(first).to(images.device)
    probs = training.predict(model, images[index])
    return probs[:, 0].double().cpu().numpy()[where]


def draw_seed(setup: Setup) -> int:
    """A seed for scikit-learn, from the setup's generator."""
    generator = setup.generator
    drawn = torch.randint(2**31, (), generator=generator, device=generator.device)
    return int(drawn)


def copies(images: Tensor) -> np.ndarray:
    """A number for each image, the same for images with the same bytes: (N,) int64."""
    return torch.unique(images.flatten(1), dim=0, return_inverse=True)[1].cpu().numpy()
