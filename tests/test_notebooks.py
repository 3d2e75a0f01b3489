"""Every notebook under papermill, as the README says, with good and bad parameters."""

import builtins
import os
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import torch
import yaml
from IPython.core.inputtransformer2 import TransformerManager

from nlhelpers import models, records, training
from nlhelpers.files import ImageFiles
from photographs import write_clothing1m, write_food101n, write_image

TOP = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)


def code_cells(notebook):
    """Sources of all code cells but the first, which fetches the package elsewhere."""
    cells = nbformat.read(notebook, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"][1:]


def defaults(notebook):
    """Names and values of the parameter cell."""
    values = {}
    exec(code_cells(notebook)[0], values)
    return {name: value for name, value in values.items() if name != "__builtins__"}


@each_notebook
def test_it_runs_and_stores_its_runs_where_it_is_told(notebook, papermill, tmp_path):
    done = papermill(notebook)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    stored = records.read(tmp_path / "runs.jsonl")
    assert {record["spec"]["profile"] for record in stored} <= {"smoke"}


@each_notebook
@pytest.mark.parametrize("there", [True, False])
def test_the_first_cell_fetches_the_package_where_it_is_missing(
    notebook, there, monkeypatch, capsys
):
    """Its magics are noted, not run."""
    called = []
    shell = SimpleNamespace(
        system=called.append,
        run_line_magic=lambda name, line: called.append(f"%{name} {line}"),
    )
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    if not there:
        monkeypatch.setitem(sys.modules, "nlhelpers", None)  # importing it fails
    cells = nbformat.read(notebook, as_version=4).cells
    first = next(cell for cell in cells if cell.cell_type == "code")
    assert first.metadata["tags"] == ["install", "remove-cell"]
    exec(TransformerManager().transform_cell(first.source), {})
    if there:
        assert called == [] and capsys.readouterr().out == ""
    else:
        clone, enter, install = called
        assert clone == f"git clone -q --depth 1 {repository()}"
        assert (enter, install) == ("%cd -q nlhelpers", "%pip install -q .")
        assert "installed" in capsys.readouterr().out


def repository():
    """Where the project says that it lives."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"]


def test_the_projects_address_is_the_same_everywhere():
    config = yaml.safe_load((TOP / "_config.yml").read_text())
    assert config["repository"]["url"] == repository()
    for name in ("notebooks/coursework/requirements.txt", "book/students.md"):
        assert re.findall(r"git\+(\S+)", (TOP / name).read_text()) == [repository()]


PHOTOGRAPHS = {
    "clothing1m": lambda data: write_clothing1m(data / "clothing1m"),
    "food101n": write_food101n,
}


@pytest.mark.parametrize("dataset", PHOTOGRAPHS)
def test_self_learning_runs_on_photographs(dataset, papermill, tmp_path, monkeypatch):
    """The one line of whoever owns the data, with a network that needs no download."""
    PHOTOGRAPHS[dataset](tmp_path)
    monkeypatch.setenv("NLHELPERS_DATA", str(tmp_path))
    values = {"dataset": dataset, "noise": "crawled", "noise_rate": "None"}
    values |= {"model": "caffe-quick"}
    options = [w for name, value in values.items() for w in ("-p", name, value)]
    done = papermill(TOP / "notebooks" / "self_learning.ipynb", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    stored = records.read(tmp_path / "runs.jsonl")
    assert {record["spec"]["dataset"] for record in stored} == {dataset}
    assert all(record["spec"]["settings"]["start_pretrained"] for record in stored)


NOT_UTF8 = os.fsdecode(b"dark/50\xe9.png")


def test_own_images_names_files_and_leaves_a_classifier(
    papermill, tmp_path, monkeypatch
):
    """Two classes of one colour each, and three images that lie in the wrong folder."""
    shades = {k: k if k < 40 else 200 + k % 40 for k in range(80)}
    for k, shade in shades.items():
        name = "light" if (k >= 40) != (k in (3, 50, 70)) else "dark"
        write_image(tmp_path / "folder" / name / f"{k}.png", shade)
    write_image(tmp_path / "folder" / "dark" / "again.png", shades[5])
    # As an old archive leaves it: a name that is no UTF-8.
    (tmp_path / "folder/dark/50.png").rename(tmp_path / "folder" / NOT_UTF8)
    monkeypatch.setenv("NLHELPERS_DATA", str(tmp_path))
    values = {"dataset": "folder", "noise": "crawled", "noise_rate": "None"}
    # Of the three, this seed trains on one, validates on one and tests on one.
    values |= {"model": "mlp", "profile": "quick", "seed": "2"}
    options = [w for name, value in values.items() for w in ("-p", name, value)]
    done = papermill(TOP / "notebooks" / "own_images.ipynb", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    doubtful = pd.read_csv(tmp_path / "doubtful.csv", encoding_errors="surrogateescape")
    found = dict(zip(doubtful["image"], doubtful["looks like"], strict=True))
    wrong = {"light/3.png": "dark", NOT_UTF8: "light", "dark/70.png": "light"}
    assert found == wrong
    assert "['dark/5.png', 'dark/again.png']" in (tmp_path / "out.ipynb").read_text()
    stored = torch.load(tmp_path / "classifier.pt")
    assert stored["classes"] == ("dark", "light")
    network = models.build(stored["model"], torch.zeros(1, 3, 32, 32).byte(), 2)
    network.load_state_dict(stored["weights"])
    pair = ImageFiles(tmp_path / "folder", ["dark/5.png", "light/60.png"], size=32)
    assert training.predict(network, pair).argmax(dim=1).tolist() == [0, 1]


def test_own_images_names_the_class_that_has_too_few(papermill, tmp_path, monkeypatch):
    for k in range(24):
        name = "usual" if k < 20 else "rare"
        write_image(tmp_path / "folder" / name / f"{k}.png", k)
    monkeypatch.setenv("NLHELPERS_DATA", str(tmp_path))
    values = {"dataset": "folder", "noise": "crawled", "noise_rate": "None"}
    values |= {"model": "mlp", "profile": "smoke"}
    options = [w for name, value in values.items() for w in ("-p", name, value)]
    done = papermill(TOP / "notebooks" / "own_images.ipynb", *options)
    assert done.returncode != 0
    message = "'rare' has 3 images to train on, fewer than the 4 folds"
    assert message in done.stderr


def test_a_bad_parameter_stops_papermill(papermill, tmp_path):
    done = papermill(NOTEBOOKS[0], "-p", "record_file", "x")
    assert done.returncode != 0
    assert "unknown parameter 'record_file'; did you mean 'records_" in done.stderr
    assert records.read(tmp_path / "runs.jsonl") == []


# More of them, for every notebook, without the seconds that a kernel takes to start.


@pytest.fixture
def check_cell(tmp_path, monkeypatch):
    """Run a notebook's parameter cell, papermill's values and the check cell."""

    def run(notebook, **given):
        given = {"records_file": str(tmp_path / "runs.jsonl")} | given
        parameters, check, *_ = code_cells(notebook)
        injected = "# Parameters\n"
        injected += "".join(f"{name} = {value!r}\n" for name, value in given.items())
        shell = SimpleNamespace(user_ns={"In": ["", parameters, injected, check]})
        monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
        space = {}
        for source in (parameters, injected, check):
            exec(source, space)
        return space

    return run


@each_notebook
def test_parameters_are_plain_literals_with_a_comment_each(notebook):
    lines = code_cells(notebook)[0].splitlines()
    assert len(defaults(notebook)) == len(lines)
    for line in lines:
        assert "  # " in line
    assert {"profile", "device", "records_file"} <= set(defaults(notebook))


@each_notebook
def test_the_check_cell_takes_the_defaults(notebook, check_cell):
    check_cell(notebook)


@each_notebook
def test_every_parameter_may_be_given(notebook, check_cell):
    given = defaults(notebook)
    check_cell(notebook, **{k: v for k, v in given.items() if k != "records_file"})


BAD = [
    (
        "record_file",
        "x",
        "unknown parameter 'record_file'; did you mean 'records_file'",
    ),
    ("profil", "paper", "did you mean 'profile'"),
    ("profile", "papers", "did you mean 'paper'"),
    ("device", "gpu", "device is 'gpu'"),
    ("dataset", "cifar-10", "did you mean 'cifar10'"),
    ("noise", "symetric", "did you mean 'symmetric'"),
    ("noise_rate", 1.4, "noise_rate is 1.4; it is the probability"),
    ("noise_rate", "0.4", "noise_rate is '0.4'"),
    ("methods", ["two-stag"], "did you mean 'two-stage'"),
    ("methods", "two-stage", "must be a list"),
    ("seed", -1, "seed is -1"),
    ("num_seeds", 0, "num_seeds is 0"),
]


@each_notebook
@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_the_check_cell_stops_bad_values(notebook, name, value, message, check_cell):
    known = defaults(notebook)
    if name not in known and not message.startswith(("unknown", "did you mean 'prof")):
        pytest.skip(f"{notebook.stem} has no parameter {name}")
    with pytest.raises(ValueError, match=message):
        check_cell(notebook, **{name: value})


def test_a_method_that_needs_a_clean_set_may_be_named_alone(check_cell):
    check_cell(TOP / "notebooks" / "other_methods.ipynb", methods=["clean-only"])
    with pytest.raises(ValueError, match="num_clean"):
        check_cell(
            TOP / "notebooks" / "loss_correction.ipynb",
            methods=["cross-entropy", "clean-only"],
        )
