"""The command line: exit codes, one line of error, the same runs as the notebooks."""

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nlhelpers import __main__ as cli
from nlhelpers import data, experiments, losses, records, report
from nlhelpers.__main__ import main
from nlhelpers.methods import METHODS
from nlhelpers.papers import TABLES
from nlhelpers.papers.table import Cell, Table
from nlhelpers.specs import Spec
from tasks import task


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "runs.jsonl"


@pytest.fixture
def run(path):
    """Run a command with the smoke profile; returns the exit status."""

    def run(*words, command="run"):
        options = ["--profile", "smoke", "--records", str(path)]
        return main([command, *words, *options])

    return run


@pytest.fixture
def table(monkeypatch):
    """A table with two runs on digits and a number that nothing measures."""
    specs = [Spec(name, noise_rate=0.2) for name in ("cross-entropy", "two-stage")]
    cells = [Cell(spec.method, "digits", 90.0, spec=spec) for spec in specs]
    table = Table(
        "key2020", "Table 1", "", (*cells, Cell("other", "digits", 80.0, note="why"))
    )
    monkeypatch.setitem(TABLES, "key2020-table1", table)


def specs_in(path):
    return [Spec(**record["spec"]) for record in records.read(path)]


def test_a_run_is_stored_and_printed(run, path, capsys):
    words = ("--method", "two-stage", "--noise", "asymmetric", "--noise-rate", "0.4")
    assert run(*words, "--set", "threshold=0.8", "consistency=pi") == 0
    (spec,) = specs_in(path)
    assert spec == Spec(
        "two-stage",
        noise="asymmetric",
        noise_rate=0.4,
        profile="smoke",
        settings={"threshold": 0.8, "consistency": "pi"},
    )
    printed = capsys.readouterr()
    assert "two-stage" in printed.out
    assert "0 of 1 runs are recorded" in printed.out
    assert "epoch" in printed.err  # the progress bar


def test_a_grid_skips_what_is_recorded(run, path, capsys):
    words = ("--method", "cross-entropy", "improved-baseline", "--seeds", "0", "1")
    assert run(*words) == 0
    before = path.read_bytes()
    assert len(specs_in(path)) == 4
    assert run(*words, "2") == 0
    assert path.read_bytes().startswith(before)
    assert len(specs_in(path)) == 6
    assert "4 of 6 runs are recorded" in capsys.readouterr().out


def test_a_table_by_name(run, path, table):
    assert run("key2020-table1") == 0
    assert [spec.method for spec in specs_in(path)] == ["cross-entropy", "two-stage"]


def test_a_table_on_one_data_set_needs_no_name_for_it():
    words = ["run", "xiao2015-cifar10", "--method", "noise-model"]
    (spec,) = cli.specs(cli.parser().parse_args(words))
    assert spec.dataset == "cifar10"
    (spec,) = cli.specs(cli.parser().parse_args(["run"]))
    assert spec.dataset == "digits"


def test_part_of_a_table(run, path, table):
    assert run("key2020-table1", "--method", "two-stage", "--seeds", "0", "1") == 0
    assert [(s.method, s.seed) for s in specs_in(path)] == [
        ("two-stage", 0),
        ("two-stage", 1),
    ]


def test_clean_images_and_another_model(run, path):
    assert run("--method", "two-stage", "--num-clean", "50", "--model", "mlp") == 0
    (spec,) = specs_in(path)
    assert spec.num_clean == 50


def test_a_given_transition(run, path, tmp_path):
    file = tmp_path / "T.csv"
    rows = 0.9 * torch.eye(10, dtype=torch.float64) + 0.01
    file.write_text("\n".join(",".join(map(str, row)) for row in rows.tolist()))
    assert run("--noise", "given", "--transition", str(file)) == 0
    (record,) = records.read(path)
    found = torch.tensor(record["spec"]["transition"])
    torch.testing.assert_close(found, rows.float())
    assert 0.03 < record["realised_rate"] < 0.18  # 0.09 in the mean


def test_a_task_of_two_groups(run, path):
    words = ("--task", "5,7 vs 2,4", "--pi", "0.7", "0.85", "--num-images", "100")
    assert run("--method", "cross-entropy", "rank-pruning", *words) == 0
    first, second = specs_in(path)
    assert first == Spec(**task("5,7 vs 2,4", (0.7, 0.85), 100), profile="smoke")
    assert second.method == "rank-pruning"


def test_several_runs_on_a_gpu_are_told_of_workers(run, monkeypatch, capsys):
    gpu = torch.device("cuda")
    monkeypatch.setattr(cli.training, "pick_device", lambda name: gpu)
    monkeypatch.setattr(cli.grids, "run_all", lambda *given, **options: [])
    devices = []

    def workers(count, scheduler, device):
        devices.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(cli.grids, "workers", workers)
    told = []
    several = ["--seeds", "0", "1"]
    for words in (several, ["--seeds", "0"], [*several, "--workers", "2"]):
        assert run(*words) == 0
        told.append(
            "several at once make better use of a GPU" in capsys.readouterr().out
        )
    assert told == [True, False, False]
    assert devices == ["auto"] * 3  # a scheduler's workers have their own


def test_no_time_no_run(run, path, capsys):
    assert run("--time-budget", "0") == 0
    assert records.read(path) == []
    assert "time budget is spent" in "".join(capsys.readouterr())


# ---------------------------------------------------------------- show, list


def test_show_prints_what_is_recorded_and_trains_nothing(run, monkeypatch, capsys):
    assert run("--noise-rate", "0.1") == 0
    monkeypatch.setattr(experiments, "run", lambda *a, **k: pytest.fail("trained"))
    capsys.readouterr()
    assert run("--noise-rate", "0.1", command="show") == 0
    assert "cross-entropy" in capsys.readouterr().out
    assert run("--noise-rate", "0.3", command="show") == 0
    assert "cross-entropy" not in capsys.readouterr().out


def test_show_without_a_file_makes_none(run, path):
    assert run(command="show") == 0
    assert not path.exists()


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(run, path):
    for words in ((), ("--num-clean", "50"), ("--model", "resnet14")):
        assert run("--method", "two-stage", *words) == 0
    assert len(report.summary(records.read(path))) == 3


def test_runs_of_different_tasks_are_not_averaged(run, path):
    for count, *pi in (("20", "1", "1"), ("20", ".9", ".8"), ("40", "1", "1")):
        task = ("--task", "5,7 vs 2,4", "--num-images", count, "--pi", *pi)
        assert run(*task) == 0
    table = report.summary(records.read(path))
    assert len(table) == 3
    assert {"pi", "num_images"} < set(table.columns)
    assert "task" not in table


def test_a_seed_that_is_named_twice_is_one_run():
    words = ["run", "--seeds", "0", "1", "0", "--method", *["cross-entropy"] * 2]
    assert [spec.seed for spec in cli.specs(cli.parser().parse_args(words))] == [0, 1]


def test_of_an_option_given_twice_both_count():
    words = ["run", "--method", "cross-entropy", "--seeds", "1", "--noise", "pair-flip"]
    words += ["--method", "two-stage", "--seeds", "2", "--noise", "symmetric"]
    words += ["--noise-rate", "0.1", "--noise-rate", "0.3"]
    assert len(cli.specs(cli.parser().parse_args(words))) == 16
    words = ["run", "--method", "two-stage", "--set", "threshold=0.8"]
    (spec,) = cli.specs(cli.parser().parse_args([*words, "--set", "consistency=pi"]))
    assert {"threshold": 0.8, "consistency": "pi"}.items() <= dict(
        spec.settings
    ).items()


def test_the_home_folder_after_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = cli.parser().parse_args(["run", "--records=~/runs.jsonl"])
    assert options.records == tmp_path / "runs.jsonl"


def test_runs_of_a_table_whose_labels_have_their_own_rate():
    words = ["show", "han2019-table1", "--dataset", "cifar10", "--noise-rate"]
    found = [cli.specs(cli.parser().parse_args([*words, p])) for p in ("none", "None")]
    assert found[0] == found[1] != []


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    names = [*METHODS, *data.DATASETS, *experiments.NOISES, *TABLES]
    assert [name for name in names if name not in printed] == []
    assert "threshold=0.9" in printed


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "two-stag"], "did you mean 'two-stage'"),
        (["--dataset", "cifar-10"], "did you mean 'cifar10'"),
        (["--noise", "symetric"], "did you mean 'symmetric'"),
        (["--noise-rate", "1.2"], "noise_rate is 1.2"),
        (["--noise-rate", "none"], "noise_rate is None"),
        (["--seeds", "-1"], "seed is -1"),
        (["--model", "resnet-50"], "did you mean 'resnet50'"),
        (["--model", "resnet50"], "takes 3 channels, but the images have 1"),
        (["--device", "gpu"], "device is 'gpu'"),
        (["--workers", "0"], "workers is 0; it must be at least 1"),
        (["--scheduler", "here"], "no Dask scheduler answers at 'here'"),
        (["--num-clean", "5"], "no use for a clean set"),
        (["--method", "two-stage", "--num-clean", "9999"], "num_clean is 9999"),
        (["--set", "alpha"], "--set takes NAME=VALUE, not 'alpha'"),
        (["--method", "two-stage", "--set", "alpa=1"], "did you mean 'alpha'"),
        (["--method", "two-stage", "--set", "alpha=[1]"], "alpha"),
        (["--method", "two-stage", "--set", "threshold=high"], "threshold is 'high'"),
        (["--transition", "none.csv", "--noise", "given"], "--transition: none.csv"),
        (["--noise", "given"], "'given' belong together"),
        (["--method", "nl-gan"], "nl-gan is for two classes"),
        (["--task", "5 vs 5"], "names 5 twice"),
        (["--task", "5 vs 7"], "pi is None"),
        (["--pi", "0.7", "0.8"], "pi is [0.7, 0.8], but noise is 'symmetric'"),
        (["ding2018-table9"], "did you mean 'ding2018-table"),
        (["ding2018-table3"], "no runs on 'digits'; it has on cifar10, mnist"),
        (["ding2018-table3", "--dataset", "mnits"], "did you mean 'mnist'"),
        # What a table leaves no room for is not passed over in silence.
        (["key2020-table1", "--method", "two-stag"], "did you mean 'two-stage'"),
        (["key2020-table1", "--noise", "symetric"], "did you mean 'symmetric'"),
        (["key2020-table1", "--noise-rate", "1.2"], "noise_rate is 1.2"),
        (["key2020-table1", "--noise-rate", "0.7"], "no run"),
        (["key2020-table1", "--num-clean", "10"], "--num-clean"),
        (["key2020-table1", "--set", "alpha=1"], "--set"),
        (["key2020-table1", "--model", "resnet14"], "--model"),
        (["key2020-table1", "--task", "5 vs 7"], "--task"),
        (["key2020-table1", "--num-images", "9"], "--num-images"),
    ],
)
def test_one_clear_error(run, path, table, words, message, capsys):
    records.append(path, {"spec": {"method": "by other code"}})
    before = path.read_bytes()
    assert run(*words) == 1
    printed = capsys.readouterr()
    error = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert "Traceback" not in printed.err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0.5,0.4\n0.5,0.5", "row 0 is [0.5, 0.4] (sum 0.9)"),
        ("1,0\n0,1", "for 2 classes, but the data have 10"),
        ("1,0\n1", "T.csv"),
        ("a,b\nc,d", "T.csv"),
        ("", "T.csv: loadtxt: input contained no data"),
    ],
)
def test_a_transition_that_is_none(run, tmp_path, content, message, capsys):
    file = tmp_path / "T.csv"
    file.write_text(content)
    assert run("--noise", "given", "--transition", str(file)) == 1
    assert message in capsys.readouterr().err


def test_missing_data_is_one_error(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NLHELPERS_DATA", str(tmp_path / "data"))
    experiments.load.cache_clear()
    assert run("--dataset", "mnist") == 1
    assert "is missing and could not be downloaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ['{"spec": {}, "cut', "{broken}\n", "{}\n"], ids=["cut", "broken", "{}"]
)
def test_damaged_records_are_one_error_and_stay(run, path, content, capsys):
    path.parent.mkdir()
    path.write_text(content)
    for command in ("run", "show"):
        assert run(command=command) == 1
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: {path}, line 1 ")
        assert len(printed.splitlines()) == 1
    assert path.read_text() == content


def test_records_under_a_file_are_one_error(run, path, capsys):
    path.parent.write_text("a file")
    assert run() == 1
    assert f"cannot write records to {path}" in capsys.readouterr().err


def test_what_is_closed_is_one_error(run, path, monkeypatch, capsys):
    def closed(name):
        raise PermissionError(13, "Permission denied", "MNIST/raw")

    monkeypatch.setattr(experiments, "load", closed)
    assert run("--dataset", "mnist") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: MNIST/raw is closed to you; change its perm")
    assert len(printed.splitlines()) == 1


def test_divergence_is_one_error_and_one_record(run, path, monkeypatch, capsys):
    assert run() == 0
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(losses, "consistency", lambda z1, z2: z1.sum(1) * math.nan)
        assert run("--method", "two-stage") == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: two-stage, digits, symmetric 0.2, seed 0: ")
        assert "the loss is nan at epoch 1, step 1 of" in error
        assert path.read_bytes().startswith(before)
        assert run("--method", "two-stage", command="show") == 0
        assert capsys.readouterr().out.startswith("stopped: two-stage, digits")
    records.source_hash.cache_clear()  # the patched loss has another
    assert len(report.summary(records.read(path))) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: run | show | list"),
        (["walk"], "invalid choice: 'walk'"),
        (["run", "--speed", "3"], "unrecognized arguments: --speed"),
        (
            ["run", "--noise-rate", "x"],
            "'x' is not a rate; it must be a number",
        ),
        (["run", "--time-budget", "-1"], "'-1' is not a number of minutes"),
        (
            ["run", "--time-budget", "nan"],
            "'nan' is not a number of minutes",
        ),
    ],
)
def test_usage_is_exit_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "usage: python -m nlhelpers" in printed
    assert message in printed


def test_too_little_memory_is_one_line(run, monkeypatch, capsys):
    def train(*given, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(experiments, "run", train)
    assert run() == 1
    assert capsys.readouterr().err.endswith("error: CUDA out of memory\n")


def test_an_interrupt_is_one_line(run, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "run", interrupted)
    assert run() == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "stopped; run the same command again to do the rest"


def test_nothing_to_show(run, path, capsys):
    assert run(command="show") == 0
    printed = capsys.readouterr().out
    assert printed == f"{path} has no record of these runs made by today's code\n"


def test_exit_status_of_the_program(tmp_path):
    top = Path(records.__file__).parent.parent
    call = [sys.executable, "-m", "nlhelpers", "run", "--noise-rate", "2"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=top)
    assert done.returncode == 1
    assert done.stderr.startswith("error: noise_rate is 2.0")
    assert done.stdout == ""


def test_a_terminal_that_does_not_know_the_dash(run, path):
    assert run() == 0
    call = [sys.executable, "-m", "nlhelpers", "show", "--profile", "smoke"]
    done = subprocess.run(
        [*call, "--records", str(path)],
        capture_output=True,
        text=True,
        cwd=records.PACKAGE.parent,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )
    assert done.returncode == 0, done.stderr
    assert "cross-entropy" in done.stdout


def test_two_processes_make_one_record(tmp_path):
    """torchrun: the processes train together, and only the first writes and prints."""
    path = tmp_path / "runs.jsonl"
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    call += ["--nproc-per-node", "2", "-m", "nlhelpers", "run", "--profile", "smoke"]
    call += ["--device", "cpu", "--seeds", "0", "1", "--records", str(path)]
    top = records.PACKAGE.parent
    done = subprocess.run(call, capture_output=True, text=True, cwd=top)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0 of 2 runs are recorded") == 1
    assert [record["spec"]["seed"] for record in records.read(path)] == [0, 1]
