"""Lee et al. (2018): who weighs what, with and without CleanNet itself."""

import dataclasses
import inspect
import math

import pytest
import torch

from nlhelpers import evaluation, experiments, prototypes, relevance, training
from nlhelpers.data import UNKNOWN
from nlhelpers.methods import clean_net, cross_entropy
from nlhelpers.methods.clean_net import clean_net_hard, clean_net_soft
from nlhelpers.profiles import shortened
from nlhelpers.specs import Spec
from nlhelpers.training import Auxiliary, Epoch, Screening, Setup

BOTH = pytest.mark.parametrize("method", [clean_net_hard, clean_net_soft])


@pytest.fixture
def seen(cpu):
    """Digits with 100 clean images, of which all but 10 had a label before."""
    spec = Spec("self-learning", noise_rate=0.4, profile="smoke", num_clean=100)
    seen = experiments.data_for(spec, cpu)[0]
    given = seen.clean_given_labels.clone()
    given[30:40] = UNKNOWN
    return dataclasses.replace(seen, clean_given_labels=given)


def run(method, seen, setup, **settings):
    return list(method(seen, setup, **{"num_references": 5} | settings))


def held(step, name):
    """What a step knows by that name."""
    return inspect.getclosurevars(step).nonlocals[name]


@pytest.fixture
def judged(monkeypatch):
    """CleanNet's place is taken by made-up cosines, and tau = 0.25; they, and calls."""
    calls = []

    def learn(*given):
        y = given[1]
        cos = torch.linspace(-1, 1, len(y)) ** 3
        calls.append((given, cos))
        yield from ()
        return cos, torch.tensor(0.25)

    monkeypatch.setattr(relevance, "learn", learn)
    return calls


# ---------------------------------------------------------------- weights


def test_weights_by_hand():
    cos, tau = torch.tensor([-0.5, 0.0, 0.1, 0.25, 0.9]), torch.tensor(0.25)
    assert clean_net.hard(cos, tau).tolist() == [0, 0, 0, 1, 1]
    assert clean_net.soft(cos, tau).tolist() == pytest.approx([0, 0, 0.1, 0.25, 0.9])


@pytest.mark.parametrize("soft", [False, True])
def test_labels_are_weighted_in_the_last_training_only(
    soft, seen, make_setup, steps, seeded, judged
):
    method = clean_net_soft if soft else clean_net_hard
    network = run(method, seen, make_setup())[-1].model.eval()
    given = seen.clean_given_labels
    y = torch.cat([given[given != UNKNOWN], seen.labels])
    images = torch.cat([seen.clean_images[given != UNKNOWN], seen.images])
    (_, cos), index = judged[0], torch.arange(0, len(y), 7)
    of_index = cos[index].tolist()
    w = [max(0, c) if soft else float(c >= 0.25) for c in of_index]
    log_p = network(images[index]).log_softmax(dim=1)
    nats = [-log_p[j, y[i]].item() for j, i in enumerate(index.tolist())]
    weighted = sum(a * b for a, b in zip(w, nats, strict=True)) / len(index)
    plain = sum(nats) / len(index)
    for step, expected in zip(steps, (plain, weighted), strict=True):
        loss = step(network, index, images[index]).item()
        assert loss == pytest.approx(expected, rel=1e-5)
    assert abs(weighted - plain) > 0.1 * plain


@BOTH
def test_labels_are_screened_by_tau(method, seen, make_setup, judged):
    events = run(method, seen, make_setup())
    kinds = [type(event) for event in events]
    assert kinds == [Epoch, Epoch, Screening, Epoch, Epoch]
    (_, cos) = judged[0]
    expected = [c >= 0.25 for c in cos[90:].tolist()]
    assert events[2].kept.tolist() == expected
    assert len(expected) == len(seen.labels)


def test_what_clean_net_is_given(seen, make_setup, steps, seeded, judged):
    run(clean_net_hard, seen, make_setup(), margin=0.2, beta=0.3, gamma=0.4)
    (v, y, right, num_classes, rule, _), _ = judged[0]
    known = [i for i in range(100) if not 30 <= i < 40]
    assert y.tolist() == [
        *(int(seen.clean_given_labels[i]) for i in known),
        *seen.labels.tolist(),
    ]
    assert right.tolist() == [
        int(seen.clean_given_labels[i]) == int(seen.clean_labels[i]) for i in known
    ]
    assert v.shape == (len(y), 128)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(len(y)))
    assert (num_classes, rule) == (10, relevance.Rule(5, 0.2, 0.3, 0.4))


def test_features_are_the_last_layers(seen, make_setup, seeded):
    network = make_setup().build(seen)
    v = clean_net.features(network, seen.images)
    (raw,) = prototypes.deep_features(network, seen.images)
    for i in range(10):
        torch.testing.assert_close(v[i], raw[i] / raw[i].norm())


# ---------------------------------------------------------------- the method


@BOTH
def test_three_trainings_of_one_classifier(method, seen, make_setup):
    events = run(method, seen, make_setup(learning_rate=0.02), rate=0.5)
    kinds = [type(event) for event in events]
    assert kinds == [Epoch] * 2 + [Auxiliary] * 2 + [Screening] + [Epoch] * 2
    first, last = events[0], events[-1]
    assert (first.stage, last.stage) == ("all labels", "weighted labels")
    assert last.model is first.model
    assert isinstance(events[2].epoch.model, relevance.CleanNet)
    assert (first.learning_rate, last.learning_rate) == (0.02, 0.01)


def test_it_starts_pretrained_and_ends_with_the_clean_set_if_told(
    seen, make_setup, judged
):
    setup = make_setup(epochs=4)
    options = {"start_pretrained": True, "finetune": True}
    events = run(clean_net_soft, seen, setup, **options)
    epochs = [e for e in events if isinstance(e, Epoch)]
    stages = [epoch.stage for epoch in epochs]
    assert stages == ["all labels"] * 4 + ["weighted labels"] * 4 + ["fine-tuning"]
    assert [event.epoch.stage for event in events[:4]] == ["rotation"] * 4
    assert len({id(epoch.model) for epoch in epochs}) == 1


@BOTH
def test_it_repeats_itself(method, seen, make_setup, cpu):
    found = []
    for seed in (0, 0, 1):
        with training.seeded(seed, cpu):
            events = run(method, seen, make_setup(seed))
        screening = next(e for e in events if isinstance(e, Screening))
        found.append((events[-1].loss, events[-1].val_accuracy, screening.kept))
    assert found[0][:2] == found[1][:2] != found[2][:2]
    assert torch.equal(found[0][2], found[1][2])


def test_the_defaults():
    for method in (clean_net_hard, clean_net_soft):
        names = inspect.signature(method).parameters
        rule = [names[n].default for n in ("num_references", "margin", "beta", "gamma")]
        assert rule == [50, 0.1, 0.1, 0.1]
        assert relevance.Rule() == relevance.Rule(*rule)


# ---------------------------------------------------------------- bad input


@BOTH
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_references": 0}, "num_references is 0; it must be 1 or more"),
        ({"margin": 1.5}, "margin is 1.5; it must be in"),
        ({"beta": -1.0}, "beta is -1.0; it must be 0 or more"),
        ({"gamma": math.nan}, "gamma is nan"),
        ({"rate": 0.0}, r"rate is 0.0; it must be in \(0, 1\]"),
        ({"rate": 1.5}, "rate is 1.5"),
    ],
)
def test_bad_settings(method, settings, message, seen, make_setup, steps):
    with pytest.raises(ValueError, match=message):
        run(method, seen, make_setup(), **settings)
    assert steps == []  # before any training


def test_it_needs_verified_labels(seen, prepared, make_setup, steps):
    nothing, _ = prepared
    given = torch.full_like(seen.clean_given_labels, UNKNOWN)
    given[0] = 3
    one = dataclasses.replace(seen, clean_given_labels=given)
    for data, count in ((nothing, 0), (one, 1)):
        with pytest.raises(ValueError, match=f"the clean set has {count} images of wh"):
            run(clean_net_hard, data, make_setup())
    assert steps == []


def test_it_warns_if_every_verified_label_is_right(seen, make_setup, judged):
    data = dataclasses.replace(seen, clean_given_labels=seen.clean_labels)
    with pytest.warns(UserWarning, match="none of the 100 verified labels was wrong"):
        events = run(clean_net_hard, data, make_setup())
    assert len(events) == 5


def test_a_class_without_an_image(seen, make_setup, steps):
    def moved(labels):
        return labels.masked_fill(labels == 4, 5)

    data = dataclasses.replace(
        seen,
        labels=moved(seen.labels),
        clean_given_labels=moved(seen.clean_given_labels),
    )
    with pytest.raises(ValueError, match="class 4 has no image"):
        run(clean_net_soft, data, make_setup())
    assert steps == []


# ---------------------------------------------------------------- end to end


def test_it_finds_wrong_labels_and_learns_more_than_without(cpu):
    spec = Spec("self-learning", noise="symmetric", noise_rate=0.4, num_clean=200)
    seen, truth = experiments.data_for(spec, cpu)
    recipe = shortened(spec.recipe, 20)
    with training.seeded(spec.seed, cpu) as generator:
        setup = Setup(spec.model, recipe, generator)
        events = run(clean_net_soft, seen, setup, num_references=4)
    (screening,) = (e for e in events if isinstance(e, Screening))
    found = evaluation.screened(screening.kept, seen.labels == truth.labels)
    assert found["correct"] > 0.5  # of 0.6
    assert found["incorrect"] < 0.12  # of 0.4
    ours = evaluation.measure(events[-1], truth)["test_accuracy"]
    both = dataclasses.replace(
        seen,
        images=torch.cat([seen.clean_images, seen.images]),
        labels=torch.cat([seen.clean_given_labels, seen.labels]),
    )
    with training.seeded(spec.seed, cpu) as generator:
        setup = Setup(spec.model, recipe, generator)
        (*_, last) = cross_entropy.cross_entropy(both, setup)
    plain = evaluation.measure(last, truth)["test_accuracy"]
    assert ours >= plain > 0.85
