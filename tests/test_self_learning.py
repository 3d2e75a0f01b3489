"""Han et al. (2019), Algorithm 1: what each epoch trains on, and bad settings."""

import dataclasses

import pytest
import torch

from nlhelpers import experiments, prototypes
from nlhelpers.data import UNKNOWN
from nlhelpers.methods import METHODS, self_learning
from nlhelpers.specs import Spec
from nlhelpers.training import Auxiliary, Correction, Epoch

SMALL = {"num_samples": 60, "num_prototypes": 3}


def run(seen, setup, **settings):
    return list(METHODS["self-learning"].run(seen, setup, **SMALL | settings))


def spec(**values):
    settings = SMALL | values.pop("settings", {})
    base = {"noise": "asymmetric", "noise_rate": 0.4, "profile": "smoke"}
    return Spec("self-learning", **base | values, settings=settings)


def test_without_a_weight_it_is_plain_training_to_the_bit(cpu):
    plain = dataclasses.replace(spec(), method="cross-entropy", settings=())
    expected = experiments.run(plain, cpu)
    record = experiments.run(spec(settings={"alpha": 0.0}), cpu)
    assert record["history"]["loss"] == expected["history"]["loss"]
    assert record["history"]["test_accuracy"] == expected["history"]["test_accuracy"]
    assert record["label_accuracy"] == expected["label_accuracy"] == []


def test_labels_are_corrected_after_every_epoch_but_the_first_few(prepared, make_setup):
    seen, _ = prepared
    setup = make_setup(epochs=7)
    kinds = [type(event) for event in run(seen, setup)]
    assert kinds == [Epoch] * 2 + [Correction, Epoch] * 5 + [Correction]
    kinds = [type(event) for event in run(seen, setup, start_epoch=6)]
    assert kinds == [Epoch] * 5 + [Correction, Epoch] * 2 + [Correction]


def test_each_step_weighs_given_and_corrected_labels(
    prepared, make_setup, steps, seeded
):
    seen, _ = prepared
    network = make_setup().build(seen).eval()
    log_p = network(seen.images).log_softmax(dim=1)
    on_given = -log_p.gather(1, seen.labels[:, None]).squeeze(1)
    corrections = 0
    for event in METHODS["self-learning"].run(
        seen, make_setup(epochs=3), **SMALL, alpha=0.25
    ):
        expected = on_given
        index = torch.arange(5)
        if isinstance(event, Correction):
            corrections += 1
            index = torch.nonzero(event.labels != seen.labels).squeeze(1)
            assert len(index) > 5
            on_corrected = -log_p.gather(1, event.labels[:, None]).squeeze(1)
            expected = 0.75 * on_given + 0.25 * on_corrected
        elif corrections:
            continue
        loss = steps[0](network, index, seen.images[index]).item()
        assert loss == pytest.approx(expected[index].mean().item())
    assert corrections == 3 and len(steps) == 1


def test_prototypes_come_from_the_clean_set_if_there_is_one(
    make_setup, cpu, monkeypatch
):
    with_clean = spec(num_clean=200)
    seen, _ = experiments.prepare(with_clean, cpu)
    asked, labels = [], []
    deep_features, sampled = prototypes.deep_features, prototypes.sampled

    def noted(network, images, *rest):
        asked.append(len(images))
        return deep_features(network, images, *rest)

    def noted_labels(given, *rest):
        labels.append(given.tolist())
        return sampled(given, *rest)

    monkeypatch.setattr(prototypes, "deep_features", noted)
    monkeypatch.setattr(prototypes, "sampled", noted_labels)
    run(seen, make_setup())
    counts = seen.clean_labels.bincount(minlength=10).clamp(max=60)
    assert asked == [int(counts.sum()), len(seen.images)] * 2
    assert labels == [seen.clean_labels.tolist()] * 2


def test_it_ends_with_the_clean_set_if_told(make_setup, cpu):
    seen, _ = experiments.prepare(spec(num_clean=200), cpu)
    events = run(seen, make_setup(epochs=8), finetune=True)
    tuned = [e for e in events if isinstance(e, Epoch) and e.stage == "fine-tuning"]
    assert [epoch.number for epoch in tuned] == [1, 2]
    assert tuned[0].learning_rate == pytest.approx(0.1 * events[0].learning_rate)
    assert tuned[0].model is events[0].model


def test_the_record_says_how_many_labels_are_right(cpu):
    record = experiments.run(spec(noise_rate=0.3), cpu)
    events = []
    experiments.run(spec(noise_rate=0.3), cpu, progress=events.append)
    _, truth = experiments.prepare(spec(noise_rate=0.3), cpu)
    expected = [
        (event.labels == truth.labels).double().mean().item()
        for event in events
        if isinstance(event, Correction)
    ]
    assert record["label_accuracy"] == pytest.approx(expected)
    assert len(expected) == 2 and expected[0] > 0.5


def test_where_the_truth_is_unknown_nothing_is_said(cpu, monkeypatch):
    prepare = experiments.prepare

    def unknown(spec, device):
        seen, truth = prepare(spec, device)
        truth.labels.fill_(UNKNOWN)
        return seen, truth

    monkeypatch.setattr(experiments, "prepare", unknown)
    assert experiments.run(spec(), cpu)["label_accuracy"] == [None] * 2


@pytest.mark.parametrize("selector", prototypes.SELECTORS)
def test_every_selector_runs_by_name(selector, cpu):
    record = experiments.run(spec(settings={"selector": selector}), cpu)
    assert 0.5 < record["label_accuracy"][0] <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"settings": {"alpha": 1.5}}, r"alpha is 1.5; it must be in \[0, 1\]"),
        ({"settings": {"alpha": -0.1}}, "alpha is -0.1"),
        ({"settings": {"start_epoch": 3}}, "start_epoch is 3; .* to 2, the last epoch"),
        ({"settings": {"start_epoch": 1}}, "start_epoch is 1"),
        ({"settings": {"start_epoch": 1.5}}, "start_epoch is 1.5"),
        ({"settings": {"num_prototypes": 0}}, "num_prototypes is 0"),
        ({"settings": {"num_samples": 2}}, "num_prototypes is 3 and num_samples is 2"),
        ({"settings": {"selector": "k-means"}}, "selector is 'k-means'; allowed are"),
        ({"settings": {"S_c": 1.0}}, "S_c is 1.0"),
        ({"settings": {"top": 1.0}}, "top is 1.0"),
        ({"settings": {"finetune": True}}, "there is no clean set; set num_clean"),
        ({"num_clean": 30}, "class . has . images for 3 prototypes"),
    ],
)
def test_bad_settings(values, message, cpu):
    with pytest.raises(ValueError, match=message):
        experiments.run(spec(**values), cpu)


def test_a_class_without_an_image(prepared, make_setup):
    seen, _ = prepared
    labels = seen.labels.masked_fill(seen.labels == 4, 5)
    with pytest.raises(ValueError, match="class 4 has 0 images"):
        run(dataclasses.replace(seen, labels=labels), make_setup())


def test_a_clean_set_of_more_classes(make_setup, cpu):
    seen, _ = experiments.prepare(spec(num_clean=100), cpu)
    labels = seen.clean_labels.clone()
    labels[0] = 10
    with pytest.raises(ValueError, match=r"clean set has a label 10, .* 0 to 9"):
        run(dataclasses.replace(seen, clean_labels=labels), make_setup())


def test_the_default_start_is_after_a_third():
    assert self_learning.checked_start(None, 120) == 41
    assert self_learning.checked_start(None, 2) == 2
    assert self_learning.checked_start(2, 2) == 2


def test_it_starts_from_pretrained_layers_if_told(prepared, make_setup):
    seen, _ = prepared
    events = run(seen, make_setup(), start_pretrained=True)
    kinds = [type(event) for event in events]
    assert kinds == [Auxiliary] * 2 + [Epoch, Correction] * 2
    assert events[0].epoch.stage == "rotation"
