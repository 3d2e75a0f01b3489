"""Runs: specs that cannot be wrong, grids that go on where they were killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from nlhelpers import experiments, losses, noise, profiles, records, training
from nlhelpers.data import HUMAN_LABELS, UNKNOWN
from nlhelpers.experiments import Spec, grid, run_all
from nlhelpers.methods import METHODS
from nlhelpers.training import DivergenceError
from tasks import task

WITHOUT_CLEAN = [
    name
    for name, method in METHODS.items()
    if method.clean_set != "needed" and not method.two_classes
]
SMOKE = Spec(profile="smoke")
HALF = ((0.5, 0.5), (0.25, 0.75))


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


# ---------------------------------------------------------------- the spec


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
            "cifar10 has no published paths; it has for mnist, digits",
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


def test_grid_is_every_combination_the_last_fastest():
    specs = grid(SMOKE, seed=[0, 1], noise_rate=[0.1, 0.2, 0.3])
    found = [(spec.seed, spec.noise_rate) for spec in specs]
    assert found == [(0, 0.1), (0, 0.2), (0, 0.3), (1, 0.1), (1, 0.2), (1, 0.3)]
    assert all(spec.profile == "smoke" for spec in specs)
    assert grid(SMOKE) == [SMOKE]


# ---------------------------------------------------------------- profiles


def test_the_paper_profile_is_the_papers():
    mnist = profiles.recipe("mnist", "mlp", "paper")
    cifar = profiles.recipe("cifar10", "resnet14", "paper")
    assert (mnist.epochs, mnist.optimiser, mnist.limit) == (40, "adagrad", None)
    assert (cifar.epochs, cifar.optimiser, cifar.limit) == (120, "sgd", None)
    assert (cifar.momentum, cifar.learning_rate) == (0.9, 0.1)
    assert cifar.flip
    assert cifar.crop > 0
    for recipe in (mnist, cifar):
        assert (recipe.patience, recipe.min_learning_rate) == (10, 1e-7)
        assert recipe.val_share == 0.1


# ---------------------------------------------------------------- one run


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


# ---------------------------------------------------------------- grids


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs.jsonl"


def forbid_runs(monkeypatch):
    monkeypatch.setattr(
        experiments, "run", lambda spec, *a, **k: pytest.fail(f"ran {spec}")
    )


def test_recorded_runs_are_skipped(path, cpu, monkeypatch, capsys):
    specs = grid(SMOKE, seed=range(3))
    first = run_all(specs[1:], path, cpu)
    before = path.read_bytes()
    everything = run_all(specs, path, cpu)
    assert path.read_bytes().startswith(before)
    assert len(lines(path)) == 3
    assert [r["spec"]["seed"] for r in everything] == [0, 1, 2]
    assert everything[1:] == first
    assert "2 of 3 runs are recorded" in capsys.readouterr().out
    forbid_runs(monkeypatch)
    assert run_all(specs, path, cpu) == everything


def test_a_run_named_twice_runs_once(path, cpu):
    found = run_all([SMOKE, SMOKE, Spec(profile="smoke", model="mlp")], path, cpu)
    assert len(found) == 3
    assert len(lines(path)) == 1


def test_records_by_other_code_are_run_again_and_stay(path, cpu):
    (record,) = run_all([SMOKE], path, cpu)
    older = json.dumps(record | {"source": "0" * 12}).encode() + b"\n"
    changed = record | {"recipe": record["recipe"] | {"epochs": 7}}
    shorter = json.dumps(changed).encode() + b"\n"
    unknown = record | {"spec": record["spec"] | {"method": "forgotten"}}
    newer = json.dumps(unknown).encode() + b"\n"
    path.write_bytes(older + shorter + newer)
    assert experiments.recorded(path) == {}
    run_all([SMOKE], path, cpu)
    assert lines(path)[:3] == [older, shorter, newer]
    assert len(lines(path)) == 4
    assert list(experiments.recorded(path)) == [SMOKE]


def test_the_time_budget_stops_between_runs(path, cpu, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 60))  # a minute passes at every look
    monkeypatch.setattr(experiments, "run", lambda spec, *a, **k: fake_record(spec))
    patched = type("clock", (), {"perf_counter": lambda: next(clock)})
    monkeypatch.setattr(experiments, "time", patched)
    specs = grid(SMOKE, seed=range(10))
    found = run_all(specs, path, cpu, time_budget=150)
    assert [r["spec"]["seed"] for r in found] == [0, 1]
    assert "time budget is spent" in "".join(capsys.readouterr())
    assert len(run_all(specs, path, cpu)) == 10  # goes on, and needs no budget
    assert len(lines(path)) == 10


def fake_record(spec):
    return {
        "spec": spec.as_dict(),
        "recipe": spec.recipe.as_dict(),
        "source": experiments.source(spec),
    }


def test_a_diverging_run_leaves_earlier_records(path, cpu, monkeypatch):
    consistency = losses.consistency
    monkeypatch.setattr(
        losses, "consistency", lambda *given: consistency(*given) * float("nan")
    )
    specs = grid(SMOKE, method=["cross-entropy", "two-stage", "improved-baseline"])
    with pytest.raises(DivergenceError, match=r"nan at epoch 1, step 1 of .*stage 2"):
        run_all(specs, path, cpu)
    (record,) = records.read(path)
    assert record["spec"]["method"] == "cross-entropy"
    monkeypatch.undo()
    assert len(run_all(specs, path, cpu)) == 3
    assert json.loads(lines(path)[0]) == record


def test_a_damaged_file_or_folder_stops_before_training(path, cpu, monkeypatch):
    forbid_runs(monkeypatch)
    path.write_text('{"spec": {}, "half')
    with pytest.raises(records.RecordError, match="line 1 is cut off"):
        run_all([SMOKE], path, cpu)
    with pytest.raises(records.RecordError, match="cannot write records"):
        run_all([SMOKE], path / "below" / "a file.jsonl", cpu)
    assert path.read_text() == '{"spec": {}, "half'


def test_a_disk_that_fills_up_keeps_what_was_recorded(path, cpu, monkeypatch):
    run_all([SMOKE], path, cpu)
    before = path.read_bytes()
    write = os.write

    def write_a_bit(file, line):
        return write(file, line[:100])

    monkeypatch.setattr(os, "write", write_a_bit)
    with pytest.raises(records.RecordError, match="no space left"):
        run_all(grid(SMOKE, seed=range(2)), path, cpu)
    assert path.read_bytes() == before


# ---------------------------------------------------------------- SIGKILL


def command(path, seeds):
    call = [sys.executable, "-m", "nlhelpers", "run", "--profile", "smoke"]
    call += ["--method", *WITHOUT_CLEAN, "--device", "cpu", "--records", str(path)]
    return [*call, "--seeds", *map(str, range(seeds))]


def wait_for_lines(path, count, process):
    for _ in range(1200):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, "the grid ended before it could be killed"
        time.sleep(0.05)
    pytest.fail(f"no {count} records within a minute")


def test_a_killed_grid_goes_on_without_losing_or_repeating_a_record(path):
    top = str(records.PACKAGE.parent)
    paths = [top, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    seeds = 6
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command(path, seeds), stdout=quiet, stderr=quiet, env=environment
    ) as process:
        wait_for_lines(path, 3, process)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = path.read_bytes()
    recorded = before.count(b"\n")
    assert 3 <= recorded < seeds * len(WITHOUT_CLEAN)
    assert before.endswith(b"\n")

    again = subprocess.run(
        command(path, seeds), capture_output=True, text=True, env=environment
    )
    assert again.returncode == 0, again.stderr
    assert (
        f"{recorded} of {seeds * len(WITHOUT_CLEAN)} runs are recorded" in again.stdout
    )
    assert path.read_bytes().startswith(before)
    found = [Spec(**record["spec"]) for record in records.read(path)]
    wanted = grid(SMOKE, seed=range(seeds), method=WITHOUT_CLEAN)
    assert found == wanted  # each exactly once, in the grid's order


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
