"""The three profiles: the paper's numbers by hand, and the others never longer."""

import pytest

from nlhelpers import profiles
from nlhelpers.models import MODELS
from nlhelpers.training import Recipe


def test_mnist_as_published():
    recipe = profiles.recipe("mnist", "mlp", "paper")
    assert (recipe.epochs, recipe.optimiser, recipe.batch_size) == (40, "adagrad", 128)
    assert (recipe.patience, recipe.val_share, recipe.limit) == (10, 0.1, None)
    assert recipe.min_learning_rate == 1e-7
    assert not recipe.crop and not recipe.flip


def test_cifar10_as_published():
    recipe = profiles.recipe("cifar10", "resnet14", "paper")
    assert (recipe.epochs, recipe.optimiser, recipe.momentum) == (120, "sgd", 0.9)
    assert (recipe.learning_rate, recipe.crop, recipe.flip) == (0.1, 4, True)


def test_xiaos_cifar10_as_published():
    recipe = profiles.recipe("cifar10", "caffe-quick", "paper")
    steps = 50_000 // recipe.batch_size
    assert (steps * recipe.epochs, steps * recipe.falls_after[0]) == (6000, 4000)
    assert (recipe.learning_rate, recipe.factor, recipe.momentum) == (0.001, 0.1, 0.9)
    assert recipe.weight_decay == 0.004
    assert not recipe.crop and not recipe.flip


def test_a_shorter_recipe_keeps_the_proportions():
    recipe = Recipe(epochs=100, patience=20, falls_after=(50, 80))
    short = profiles.shortened(recipe, 10)
    assert (short.epochs, short.patience, short.falls_after) == (10, 2, (5, 8))


@pytest.mark.parametrize("dataset", profiles.DEFAULT_MODELS)
@pytest.mark.parametrize("model", MODELS)
def test_quick_and_smoke_are_never_longer(dataset, model):
    smoke, quick, paper = (
        profiles.recipe(dataset, model, name) for name in profiles.PROFILES
    )
    assert smoke.epochs <= quick.epochs <= paper.epochs
    assert 1 <= smoke.patience <= quick.patience <= paper.patience
    assert smoke.limit == 600
    assert paper.limit is None


@pytest.mark.parametrize("dataset", ["digits", "mnist", "fashion-mnist"])
def test_only_cifar10_is_cropped_and_mirrored(dataset):
    recipe = profiles.recipe(dataset, "resnet14", "paper")
    assert not recipe.crop and not recipe.flip
