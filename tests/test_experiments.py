"""Runs: specs that cannot be wrong, grids that go on where they were killed."""

import dataclasses

import pytest
import torch

from nlhelpers import experiments, noise, profiles, training
from nlhelpers.data import HUMAN_LABELS, UNKNOWN
from nlhelpers.methods import METHODS
from nlhelpers.specs import DRAWN, Spec
from tasks import task

WITHOUT_CLEAN = [
    name
    for name, method in METHODS.items()
    if method.clean_set != "needed" and not method.two_classes
]
SMOKE = Spec(profile="smoke")


# ---------------------------------------------------------------- profiles


def test_the_paper_profile_is_the_papers():
    mnist = profiles.recipe("mnist", "mlp", "paper")
    cifar = profiles.recipe("cifar10", "resnet14", "paper")
    assert (mnist.epochs, mnist.optimiser, mnist.limit) == (40, "adagrad", None)
    assert (cifar.epochs, cifar.optimiser, cifar.limit) == (120, "sgd", None)
    assert (cifar.momentum, cifar.learning_rate) == (0.9, 0.1)
    assert cifar.flip
    assert cifar.crop > 0
    assert (mnist.learning_rate, cifar.weight_decay) == (0.01, 1e-4)
    deep = profiles.recipe("mnist", "deep-mnist", "paper")
    assert (deep.epochs, deep.optimiser, deep.learning_rate) == (25, "adam", 1e-4)
    for recipe in (mnist, cifar):
        assert (recipe.patience, recipe.min_learning_rate) == (10, 1e-7)
        assert recipe.val_share == 0.1


# ---------------------------------------------------------------- one run


@pytest.mark.parametrize("method", ["clean-only", "two-stage", "forward"])
def test_a_clean_set_needs_an_image_of_every_class(cpu, method):
    with pytest.raises(ValueError, match="clean set of 5 images has none of class"):
        experiments.run(Spec(method, num_clean=5, profile="smoke"), cpu)


def test_labels_of_every_noise(cpu):
    dataset = experiments.load("digits")
    identity = tuple(tuple(row) for row in torch.eye(10).tolist())
    given = Spec(noise="given", noise_rate=None, transition=identity)

    def drawn(spec):
        generator = torch.Generator().manual_seed(0)
        return experiments.NOISES[spec.noise](spec, dataset, generator)

    assert torch.equal(drawn(given), dataset.labels)
    pairs = drawn(Spec(noise="pair-flip", noise_rate=1.0))
    assert torch.equal(pairs, (dataset.labels + 1) % 10)
    swapped = drawn(Spec(noise="asymmetric-swap", noise_rate=1.0))
    by_hand = torch.tensor([0, 1, 7, 8, 4, 6, 5, 1, 8, 9])
    assert torch.equal(swapped, by_hand[dataset.labels])
    by_hand[6] = 6
    assert torch.equal(
        drawn(Spec(noise="asymmetric", noise_rate=1.0)), by_hand[dataset.labels]
    )
    assert (drawn(Spec(noise_rate=1.0)) != dataset.labels).all()


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("name", DRAWN)
def test_every_drawn_noise_has_the_rate_of_the_spec(name, rate, generator):
    dataset = experiments.load("digits")
    spec = Spec(noise=name, noise_rate=rate)
    wrong = experiments.NOISES[name](spec, dataset, generator) != dataset.labels
    touched = torch.isin(dataset.labels, dataset.labels[wrong].unique())
    found = wrong[touched].double().mean().item()
    assert abs(found - rate) < 4 * noise.standard_error(rate, int(touched.sum()))


def test_human_labels_are_used(monkeypatch):
    dataset = experiments.load("digits")
    asked = []

    def human(name, true_labels):
        asked.append((name, true_labels))
        return true_labels

    monkeypatch.setattr(experiments.datasets, "human_labels", human)
    for name in HUMAN_LABELS:
        spec = Spec(dataset="cifar10", noise=name, noise_rate=None)
        experiments.NOISES[name](spec, dataset, torch.Generator())
    assert [name for name, _ in asked] == list(HUMAN_LABELS)
    assert all(labels is dataset.labels for _, labels in asked)


def test_seeds_change_noise_and_split(cpu):
    first, again, other = (
        experiments.prepare(dataclasses.replace(SMOKE, seed=seed), cpu)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first[0].labels, again[0].labels)
    assert torch.equal(first[1].index, again[1].index)
    assert not torch.equal(first[1].index, other[1].index)
    labels = torch.full((2, len(experiments.load("digits").labels)), UNKNOWN)
    for row, (seen, truth) in zip(labels, (first, other), strict=True):
        row[truth.index] = seen.labels
    a, b = labels[:, (labels != UNKNOWN).all(dim=0)]  # of images that both train on
    assert 0.2 < (a != b).double().mean() < 0.5  # 1 - 0.8^2 - 0.2^2 / 9


def test_the_seed_changes_training_on_the_same_data(cpu, monkeypatch):
    data = experiments.data_for(SMOKE, cpu)
    monkeypatch.setattr(experiments, "data_for", lambda *given: data)
    specs = [dataclasses.replace(SMOKE, seed=seed) for seed in (0, 1)]
    first, other = (experiments.run(spec, cpu)["history"] for spec in specs)
    assert first["loss"] != other["loss"]


def test_the_same_seed_draws_the_same_noise_for_every_method(cpu):
    parts = [
        experiments.prepare(dataclasses.replace(SMOKE, method=name), cpu)
        for name in WITHOUT_CLEAN
    ]
    for seen, truth in parts[1:]:
        assert torch.equal(seen.labels, parts[0][0].labels)
        assert torch.equal(truth.index, parts[0][1].index)


def test_a_record_says_what_happened(cpu):
    spec = Spec("two-stage", noise="asymmetric", noise_rate=0.4, profile="smoke")
    record = experiments.run(spec, cpu)
    seen, truth = experiments.prepare(spec, cpu)
    wrong = (seen.labels != truth.labels).double().mean().item()
    assert record["spec"] == spec.as_dict()
    assert record["realised_rate"] == wrong
    assert noise.realised_rate(seen.labels, truth.labels) == wrong
    assert record["images"] == len(seen.labels) == 540
    assert sum(record["screening"].values()) == pytest.approx(1.0)
    history = record["history"]
    assert history["stage"] == ["stage 1"] * 2 + ["stage 2"] * 2
    assert history["epoch"] == [1, 2, 1, 2]
    assert record["last_accuracy"] == history["test_accuracy"][3]
    best = 2 if history["val_accuracy"][2] >= history["val_accuracy"][3] else 3
    assert record["best_accuracy"] == history["test_accuracy"][best]
    assert record["best_epoch"] == history["epoch"][best]
    assert experiments.run(SMOKE, cpu)["screening"] is None


def test_screening_is_held_against_the_truth(cpu):
    everything = {"threshold": 0.0, "at_least": 1.0}
    spec = Spec("two-stage", noise_rate=0.4, profile="smoke", settings=everything)
    record = experiments.run(spec, cpu)
    shares = record["screening"]
    assert shares["unlabelled"] == 0.0
    assert shares["incorrect"] == record["realised_rate"] > 0.3


def test_given_val_labels_are_those_before_the_check(cpu):
    spec = Spec("noise-model", noise_rate=0.4, num_clean=100, profile="smoke")
    seen, truth = experiments.data_for(spec, cpu)
    given = experiments.given_val_labels(spec, cpu)
    assert seen.val_labels.equal(truth.val_labels)  # checked, as its paper has it
    assert 0.2 < (given != truth.val_labels).double().mean() < 0.6
    unchecked = experiments.data_for(
        dataclasses.replace(spec, method="two-stage"), cpu
    )[0]
    assert unchecked.val_images.equal(seen.val_images)


def test_given_val_labels_of_a_task(cpu):
    spec = Spec(**task(), profile="smoke")
    seen, _ = experiments.data_for(spec, cpu)
    assert experiments.given_val_labels(spec, cpu).equal(seen.val_labels)


@pytest.mark.parametrize("more_of", ["training", "validation"])
def test_both_labels_are_taken_where_more_of_them_are_known(cpu, more_of):
    spec = Spec("noise-model", noise_rate=0.4, num_clean=100, profile="smoke")
    seen, truth = experiments.data_for(spec, cpu)
    expected = seen.images, seen.labels, truth.labels
    seen.labels[:3] = UNKNOWN
    truth.labels[5:8] = UNKNOWN
    if more_of == "validation":
        truth.labels[7:] = UNKNOWN
        val_labels = experiments.given_val_labels(spec, cpu)
        expected = seen.val_images, val_labels, truth.val_labels
        truth.val_labels[5:8] = UNKNOWN
    index = torch.tensor([i for i in range(len(expected[1])) if i not in (5, 6, 7)])
    index = index[3 * (more_of == "training") :]
    found = experiments.both_labels(spec, seen, truth)
    for values, every in zip(found, expected, strict=True):
        assert torch.equal(values, every[index])


def test_a_run_that_stops_has_the_source_of_its_start(cpu, monkeypatch):
    def stop(*given, progress):
        monkeypatch.setattr(experiments, "source", lambda *given: "of another folder")
        progress(training.Auxiliary(None))
        raise ValueError("no loss")

    monkeypatch.setattr(experiments, "run", stop)
    monkeypatch.setattr(experiments, "source", lambda *given: "of today")
    record = experiments.attempt(SMOKE, cpu)
    assert (record["source"], record["stopped"]) == ("of today", "no loss")


def test_records_of_forgotten_methods_are_all_kept():
    old = [{"spec": {"method": name}, "device": "cpu"} for name in "abb"]
    assert len(experiments.latest(old)) == 2


@pytest.mark.parametrize("method", ["two-stage", "early-learning"])
def test_processes_that_do_not_share_what_they_saw_do_not_train(
    method, cpu, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"{method} keeps .* the 2 processes"):
        experiments.run(Spec(method, profile="smoke"), cpu)


def test_class_names():
    assert experiments.class_names("digits") == tuple("0123456789")


def test_screening_is_judged_where_the_truth_is_known(cpu):
    seen, truth = experiments.prepare(SMOKE, cpu)
    event = training.Screening(torch.arange(len(seen.labels)) % 2 == 0)
    truth.labels[2:] = UNKNOWN
    truth.labels[:2] = seen.labels[:2]
    found = experiments.screened(event, seen, truth)
    assert found == {"correct": 0.5, "incorrect": 0.0, "unlabelled": 0.5}
    truth.labels[:2] = UNKNOWN
    assert experiments.screened(event, seen, truth) is None


@pytest.mark.parametrize(
    ("made", "counts"),
    [
        (("before", "before"), 1),
        (("before", "today"), 1),
        (("today", "before"), 0),
        (("today", "today"), 1),
    ],
)
def test_the_last_record_of_todays_code_counts_or_else_the_last(
    made, counts, monkeypatch
):
    monkeypatch.setattr(experiments, "is_current", lambda r: r["source"] == "today")
    same = {"spec": SMOKE.as_dict(), "device": "a CPU"}
    found = [same | {"source": code, "place": i} for i, code in enumerate(made)]
    (chosen,) = experiments.newest(found)
    assert chosen["place"] == counts
