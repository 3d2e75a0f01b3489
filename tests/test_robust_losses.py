"""Methods that are cross-entropy's training with another loss."""

import dataclasses

import pytest
import torch

from nlhelpers import experiments, losses, training
from nlhelpers.methods import METHODS, robust_losses
from nlhelpers.specs import Spec

NAMES = {
    "unhinged": losses.unhinged,
    "sigmoid": losses.sigmoid,
    "savage": losses.savage,
    "bootstrap-soft": losses.bootstrap_soft,
    "bootstrap-hard": losses.bootstrap_hard,
    "generalised-cross-entropy": losses.generalised_cross_entropy,
    "symmetric-cross-entropy": losses.symmetric_cross_entropy,
}


def by_hand(spec, loss, bounded):
    """A plain loop over the same batches: its weights after the last epoch."""
    seen, _ = experiments.data_for(spec, torch.device("cpu"))
    with training.seeded(spec.seed, torch.device("cpu")) as generator:
        setup = training.Setup(spec.model, spec.recipe, generator)
        model = setup.build(seen)
        if bounded:
            model = torch.nn.Sequential(model, torch.nn.BatchNorm1d(10))
        optimiser = training.make_optimiser(model, spec.recipe)
        for _ in range(spec.recipe.epochs):
            model.train()
            order = torch.randperm(len(seen.labels), generator=generator)
            size = spec.recipe.batch_size
            for first in range(0, len(order) - size + 1, size):
                index = order[first : first + size]
                optimiser.zero_grad()
                loss(model(seen.images[index]), seen.labels[index]).mean().backward()
                optimiser.step()
    return model.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_training_against_a_plain_loop(name, cpu):
    spec = Spec(name, "digits", "symmetric", 0.3, profile="smoke")
    models = []
    experiments.run(spec, cpu, progress=lambda event: models.append(event.model))
    bounded = name in ("unhinged", "sigmoid")
    expected = by_hand(spec, NAMES[name], bounded)
    found = models[-1].state_dict()
    assert list(found) == list(expected)
    assert any("running_mean" in key for key in found) == bounded
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("unhinged", {"others": 0.5}, r"others is 0\.5; it must be in \[-1, 0\]"),
        ("sigmoid", {"others": -2}, r"others is -2; it must be in \[-1, 0\]"),
        ("bootstrap-soft", {"beta": 1.5}, r"beta is 1\.5; it must be in \[0, 1\]"),
        ("bootstrap-hard", {"beta": -0.1}, r"beta is -0\.1; it must be in \[0, 1\]"),
        ("generalised-cross-entropy", {"q": 0}, r"q is 0; it must be in \[1e-06, 1\]"),
        ("generalised-cross-entropy", {"q": 2.0}, r"q is 2\.0; it must be in"),
        ("symmetric-cross-entropy", {"alpha": -1.0}, r"alpha is -1\.0; it must be in"),
        ("symmetric-cross-entropy", {"A": 4.0}, r"A is 4\.0; it must be in"),
        ("symmetric-cross-entropy", {"beta": float("nan")}, "beta is nan; it must be"),
    ],
)
def test_settings_out_of_their_range(name, settings, message, prepared, make_setup):
    seen, _ = prepared
    with pytest.raises(ValueError, match=message):
        list(METHODS[name].run(seen, make_setup(), **settings))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("unhinged", {"others": -0.5}),
        ("sigmoid", {"others": -0.5}),
        ("bootstrap-soft", {"beta": 0.5}),
        ("bootstrap-hard", {"beta": 0.5}),
        ("generalised-cross-entropy", {"q": 0.1}),
        ("symmetric-cross-entropy", {"alpha": 1.0}),
        ("symmetric-cross-entropy", {"beta": 0.1}),
        ("symmetric-cross-entropy", {"A": -6.0}),
    ],
)
def test_a_setting_changes_the_loss(name, setting, cpu):
    plain = Spec(name, "digits", "symmetric", 0.3, profile="smoke")
    changed = dataclasses.replace(plain, settings=setting)
    first, second = (experiments.run(spec, cpu) for spec in (plain, changed))
    assert first["history"]["loss"] != second["history"]["loss"]


def test_outputs_are_normalised_without_a_softmax(prepared, make_setup, seeded):
    seen, _ = prepared
    model = robust_losses.normalised(seen, make_setup()).train()
    outputs = model(seen.images[:200])
    torch.testing.assert_close(outputs.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        outputs.std(0, correction=0), torch.ones(10), atol=1e-2, rtol=0
    )
