"""The two-stage method of Clothing1M: its start, its screening and its end."""

import dataclasses

import pytest
import torch

from nlhelpers import experiments, training
from nlhelpers.data import with_clean
from nlhelpers.methods import METHODS
from nlhelpers.pretraining import Begun
from nlhelpers.specs import Spec
from nlhelpers.training import Auxiliary, Epoch, Screening


def stages(cpu, num_clean=0, **settings):
    spec = Spec(
        "two-stage-pretrained",
        profile="smoke",
        num_clean=num_clean,
        settings=settings,
    )
    found = []
    experiments.run(spec, cpu, progress=found.append)
    return [
        event.stage
        if isinstance(event, Epoch)
        else event.epoch.stage
        if isinstance(event, Auxiliary)
        else type(event).__name__
        for event in found
    ]


def test_stages(cpu):
    rotation, first, second = ["rotation"] * 2, ["stage 1"] * 2, ["stage 2"] * 2
    judge = ["one-vs-rest"] * 2
    assert stages(cpu) == [*rotation, *first, "Screening", *second]
    screened = [*rotation, *first, *judge, "Screening", *second]
    assert stages(cpu, 200) == screened
    assert stages(cpu, 200, finetune=True) == [*screened, "fine-tuning"]
    apart = [*rotation, *first, "Screening", *second, "fine-tuning"]
    assert stages(cpu, 200, finetune=True, screen=False) == apart


def test_networks_start_where_the_pretraining_ended(prepared, make_setup, seeded):
    """With a learning rate of zero all layers but the last stay those of the start."""
    seen, _ = prepared
    setup = make_setup(optimiser="sgd", learning_rate=0.0)
    models = []
    for event in METHODS["two-stage-pretrained"].run(seen, setup):
        if isinstance(event, Epoch | Auxiliary):
            epoch = getattr(event, "epoch", event)
            models.append((epoch.stage, epoch.model.body.state_dict()))
    start = next(weights for stage, weights in models if stage == "rotation")
    for stage, weights in models:
        same = {
            name: torch.equal(value, start[name])
            for name, value in weights.items()
            if value.shape == start[name].shape
        }
        *inner, last = (name for name in weights if name.endswith("weight"))
        assert all(same[name] for name in inner), stage
        assert stage == "rotation" or not same.get(last, False)


def test_networks_that_start_pretrained_are_perturbed_as_asked(prepared, make_setup):
    seen, _ = prepared
    setup = make_setup()
    begun = Begun(setup.model, setup.recipe, setup.generator, setup.build(seen))
    network = begun.build(seen, noise_std=0.3, dropout=0.4)
    rates = {m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)}
    assert (network.noise.std, rates) == (0.3, {0.4})


def test_pi_model_with_a_steady_alpha(prepared, make_setup, seeded, monkeypatch):
    seen, _ = prepared
    given = {}

    def two_stage(data, setup, **settings):
        given.update(settings)
        yield Screening(torch.ones(1))
        yield Epoch("stage 2", 1, setup.build(data), 0.0, 0.0, 0.0, 1, 0.0)

    module = "nlhelpers.methods.two_stage_pretrained.two_stage"
    monkeypatch.setattr(module, two_stage)
    list(METHODS["two-stage-pretrained"].run(seen, make_setup()))
    assert given == {"consistency": "pi", "alpha": 100.0, "fixed_alpha": True}


def test_finetune_needs_a_clean_set(prepared, make_setup):
    seen, _ = prepared
    with pytest.raises(ValueError, match="finetune is True, but there is no clean set"):
        list(METHODS["two-stage-pretrained"].run(seen, make_setup(), finetune=True))


def test_without_clean_set(prepared):
    seen, _ = prepared
    some = dataclasses.replace(
        seen,
        clean_images=seen.images[:9],
        clean_labels=seen.labels[:9],
        clean_given_labels=seen.labels[:9],
    )
    left = with_clean(some, slice(0))
    assert len(left.clean_images) == len(left.clean_labels) == 0
    assert left.images is some.images


def test_a_setup_can_be_shortened(make_setup):
    setup = make_setup()
    begun = Begun(setup.model, setup.recipe, setup.generator, None)
    shorter = dataclasses.replace(setup.recipe, epochs=1)
    assert dataclasses.replace(begun, recipe=shorter).recipe.epochs == 1
    assert isinstance(begun, training.Setup)
