"""Specs that cannot be wrong."""

import dataclasses
import json

import pytest

from nlhelpers import experiments, specs
from nlhelpers.specs import Spec

SMOKE = Spec(profile="smoke")
HALF = ((0.5, 0.5), (0.25, 0.75))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "two-stag"}, "method 'two-stag'; did you mean 'two-stage'"),
        ({"dataset": "cifar-10"}, "dataset 'cifar-10'; did you mean 'cifar10'"),
        ({"noise": "symetric"}, "noise 'symetric'; did you mean 'symmetric'"),
        ({"noise": "human-wors"}, "did you mean 'human-worst'"),
        ({"profile": "papers"}, "'papers'; did you mean 'paper'.*smoke, quick, paper"),
        ({"model": "resnet-14"}, "model 'resnet-14'; did you mean 'resnet14'"),
        ({"method": None}, "unknown method None.*Allowed: cross-entropy, "),
        ({"dataset": 3}, "unknown dataset 3"),
        ({"noise": []}, r"unknown noise \[\]"),
        ({"noise_rate": 1.2}, r"noise_rate is 1.2.*\[0, 1\]"),
        ({"noise_rate": -0.1}, "noise_rate is -0.1"),
        ({"noise_rate": "0.4"}, "noise_rate is '0.4'"),
        ({"noise_rate": None}, "noise_rate is None"),
        ({"noise_rate": float("nan")}, "noise_rate is nan"),
        ({"seed": -1}, "seed is -1; it must be a whole number of 0 or more"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"seed": "1"}, "seed is '1'"),
        ({"num_clean": -3}, "num_clean is -3"),
        ({"num_clean": 5}, "cross-entropy has no use for a clean set.*two-stage"),
        ({"settings": {"alpha": 1}}, "setting of cross-entropy 'alpha'; Allowed: none"),
        (
            {"method": "two-stage", "settings": {"treshold": 0.5}},
            "did you mean 'threshold'",
        ),
        ({"noise": "given"}, "'given' labels come with their own rate"),
        ({"noise": "given", "noise_rate": None}, "transition and the noise 'given'"),
        ({"transition": HALF}, "transition and the noise 'given' belong together"),
        ({"noise": "human-worst", "noise_rate": None}, "for cifar10 only, not.*digits"),
        ({"noise": "human-worst", "dataset": "cifar10"}, "set noise_rate to None"),
        (
            {"noise": "asymmetric-swap", "dataset": "cifar10"},
            "cifar10 has no published paths; there are paths for mnist, digits",
        ),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        Spec(**values)


@pytest.mark.parametrize(
    "rows",
    [
        ((0.5, 0.4), (0.25, 0.75)),
        ((1.5, -0.5), (0.0, 1.0)),
        ((1.0, 0.0),),
        ((1.0, 0.0), (1.0,)),
        (("a", "b"), ("c", "d")),
        (),
        1.0,
    ],
)
def test_bad_transition(rows):
    with pytest.raises(ValueError, match="transition"):
        Spec(noise="given", noise_rate=None, transition=rows)


def test_transition_for_other_classes_stops_before_training(cpu):
    spec = Spec(noise="given", noise_rate=None, transition=HALF, profile="smoke")
    with pytest.raises(ValueError, match="for 2 classes, but the data have 10"):
        experiments.run(spec, cpu, progress=lambda event: pytest.fail("trained"))


@pytest.mark.parametrize("settings", [{"alpha": [1.0]}, {"alpha": {"a": 1}}, "ab", 5])
def test_settings_that_make_no_value(settings):
    with pytest.raises(ValueError, match=r"setting|alpha"):
        hash(Spec(method="two-stage", settings=settings))


def test_defaults_of_the_data_set():
    assert Spec(dataset="cifar10").model == "resnet14"
    assert Spec().model == "mlp"
    assert Spec(noise_rate=0).noise_rate == 0.0
    assert Spec() == Spec(model="mlp")


ALL_KINDS = [
    Spec(),
    Spec("two-stage", settings={"threshold": 0.8, "alpha": None, "fixed_alpha": True}),
    Spec("two-stage", num_clean=20, seed=3, profile="paper"),
    Spec(noise="given", noise_rate=None, transition=HALF),
    Spec(noise="given", noise_rate=None, transition=[[0.9, 0.1], [1 / 3, 2 / 3]]),
    Spec(dataset="cifar10", noise="human-worst", noise_rate=None),
    Spec("improved-baseline", "mnist", "asymmetric-swap", 0.6, model="resnet14"),
]


@pytest.mark.parametrize("spec", ALL_KINDS, ids=str)
def test_a_spec_survives_json(spec):
    again = Spec(**json.loads(json.dumps(spec.as_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert {spec: 1}[again] == 1


def test_a_transition_is_kept_to_the_bit():
    rows = ((0.9, 0.1), (1 / 3, 2 / 3))
    spec = Spec(noise="given", noise_rate=None, transition=rows)
    assert spec.transition == rows
    assert Spec(**json.loads(json.dumps(spec.as_dict()))).transition == rows


def test_settings_in_any_order_make_the_same_spec():
    pairs = [("threshold", 0.8), ("at_least", 0.2)]
    specs = {Spec("two-stage", settings=s) for s in (dict(pairs), pairs, pairs[::-1])}
    assert len(specs) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Spec().seed = 1


def test_every_noise_has_a_name_and_every_name_a_noise():
    assert {*experiments.NOISES, specs.CRAWLED, specs.BINARY} == set(specs.NOISE_NAMES)
    assert set(specs.KNOWN_T) < set(experiments.NOISES)
