"""The check behind a parameter cell, with and without papermill."""

import builtins
from types import SimpleNamespace

import pytest
import torch

from nlhelpers import parameters
from nlhelpers.records import RecordError
from nlhelpers.specs import Spec

GIVEN = {
    "dataset": "digits",
    "noise": "asymmetric",
    "noise_rate": 0.4,
    "methods": ["cross-entropy", "two-stage"],
    "seed": 3,
    "num_seeds": 2,
    "profile": "smoke",
    "device": "cpu",
}


@pytest.fixture
def check(tmp_path):
    """`parameters.check` with good values but for those given."""

    def check(**changes):
        file = {"records_file": str(tmp_path / "runs.jsonl")}
        return parameters.check(**GIVEN | file | changes)

    return check


@pytest.fixture
def inject(monkeypatch):
    """Act as a notebook whose cells, papermill's among them, have run."""

    def act(*cells):
        shell = SimpleNamespace(user_ns={"In": ["", *cells]})
        monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)

    return act


def test_good_values(check, tmp_path):
    given = check()
    assert given.spec == Spec(
        "cross-entropy", "digits", "asymmetric", 0.4, seed=3, profile="smoke"
    )
    assert given.methods == ("cross-entropy", "two-stage")
    assert given.device == torch.device("cpu")
    assert given.records == tmp_path / "runs.jsonl"
    found = [(spec.seed, spec.method) for spec in given.specs()]
    assert found == [
        (3, "cross-entropy"),
        (3, "two-stage"),
        (4, "cross-entropy"),
        (4, "two-stage"),
    ]
    changed = given.specs(noise="symmetric", noise_rate=0.1)
    assert {(spec.noise, spec.noise_rate) for spec in changed} == {("symmetric", 0.1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_rate": 1.4}, r"noise_rate is 1.4.*\[0, 1\]"),
        ({"noise_rate": "0.4"}, "noise_rate is '0.4'"),
        ({"dataset": "minst"}, "dataset 'minst'; did you mean 'mnist'"),
        ({"noise": "asymetric"}, "did you mean 'asymmetric'"),
        ({"profile": "fast"}, "unknown profile 'fast'.*smoke, quick, paper"),
        ({"methods": ["two-stages"]}, "method 'two-stages'; did you mean 'two-stage'"),
        ({"methods": ["cross-entropy", "x"]}, "unknown method 'x'"),
        ({"methods": "two-stage"}, "'two-stage'; it must be a list.*papermill: -y"),
        ({"methods": []}, r"methods is \[\]"),
        ({"methods": 3}, "methods is 3"),
        ({"seed": -1}, "seed is -1"),
        ({"num_seeds": 0}, "num_seeds is 0; it must be at least 1"),
        ({"num_seeds": 1.5}, "num_seeds is 1.5"),
        ({"device": "gpu"}, "device is 'gpu'; allowed"),
        ({"records_file": None}, "records_file is None; it must be a path"),
        ({"noise_rat": 0.2}, "parameter 'noise_rat'; did you mean 'noise_rate'"),
    ],
)
def test_bad_values(check, changes, message):
    with pytest.raises(ValueError, match=message):
        check(**changes)


def test_a_gpu_where_there_is_none(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no GPU here"):
        check(device="cuda")


def test_records_that_cannot_be_written(check, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot write records to"):
        check(records_file=str(tmp_path / "file" / "runs.jsonl"))


def test_every_later_spec_is_checked_too(check):
    with pytest.raises(ValueError, match="no published paths"):
        check().specs(dataset="cifar10", noise="asymmetric-swap")


def test_a_method_named_twice_runs_once(check):
    twice = check(methods=["two-stage", "cross-entropy", "two-stage"])
    assert twice.methods == ("two-stage", "cross-entropy")


def test_outside_of_papermill_nothing_is_injected(inject):
    assert parameters.injected() == []
    inject("x = 1", "# parameters of my own\ny = 2", "import torch")
    assert parameters.injected() == []


def test_injected_names_are_found(inject):
    inject("a = 1", '# Parameters\nseed = 3\nmethods = ["x", "y"]\nrate = None\n')
    assert parameters.injected() == ["seed", "methods", "rate"]


def test_an_unknown_injected_name_stops_with_the_nearest(check, inject):
    inject("seed = 0", "# Parameters\nseed = 3\nnum_seeds = 2\n")
    check()
    inject("seed = 0", "# Parameters\nseed = 3\nnoise_rat = 0.2\n")
    with pytest.raises(ValueError, match=r"'noise_rat'; did you mean 'noise_rate'"):
        check()
    inject("# Parameters\nrecord_file = 'x'\n")
    with pytest.raises(ValueError, match=r"did you mean 'records_file'"):
        check()
    inject("# Parameters\nqqq = 1\n")
    with pytest.raises(ValueError, match=r"'qqq'; Allowed: dataset, noise, "):
        check()
