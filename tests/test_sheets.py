"""The sheets themselves: what the solution, the students' copy and mistakes are worth.

Cells and tests run here, in this process, where torch is loaded already; that the same
comes out of a kernel of its own is tested in `test_coursework`.
"""

import ast
import copy
import functools
import re
import time
import tomllib
from pathlib import Path

import nbformat
import pytest
from otter.test_files import GradingResults
from otter.test_files.exception_test import ExceptionTestFile

import assign
import grade
from confined import CHECK
from nlhelpers import experiments
from wrong_answers import WRONG

TOP = Path(__file__).resolve().parent.parent
STUDENTS = TOP / "book" / "students.md"
PREDICTED = {  # before anything is run
    "noise": {"says_truth", "says_one_class"},
    "loss_correction": {"majority_clean", "majority_noisy", "truth_noisy"},
    "two_stage": {"shown_text", "shown_figure"},
    "self_learning": {"more_to_gain"},
    "noise_model": {"em_helps_under"},
}

each_sheet = pytest.mark.parametrize("sheet", assign.sheets())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A function that builds a sheet and gives the paths of its three files."""
    folder = tmp_path_factory.mktemp("built")

    @functools.cache
    def paths(sheet):
        assign.build(assign.HERE / f"{sheet}.ipynb", folder, run=False)
        students, solutions, autograders = (folder / name for name in assign.FOLDERS)
        name = f"{sheet}.ipynb"
        return students / name, solutions / name, autograders / f"{sheet}.zip"

    return paths


def parts_of(path):
    """Code cells by the question that is checked after them, in order."""
    parts, waiting = {}, []
    for cell in nbformat.read(path, as_version=4).cells:
        found = CHECK.search(cell.source)
        if found:
            parts[found[2]], waiting = waiting, []
        elif cell.cell_type == "code":
            waiting.append(cell.source)
    return parts


def points(parts, tests):
    """Run cells and tests as a kernel would: an error ends its cell only."""
    space, found = {"__name__": "__main__"}, {}
    for question, cells in parts.items():
        for source in cells:
            plain = re.sub(r"(?m)^grader = .*$", "", source)
            try:
                exec(compile(plain, question, "exec"), space)
            except Exception as error:
                space["_error"] = error
        test = ExceptionTestFile.from_string(tests[question])
        test.run(space)
        found[question] = GradingResults([test]).get_score(question)
    return found


def with_answer(parts, question, old, new):
    """The same cells with one answer replaced; `old` must stand there exactly once."""
    cells = parts[question]
    assert sum(cell.count(old) for cell in cells) == 1, (question, old)
    return parts | {question: [cell.replace(old, new) for cell in cells]}


@pytest.fixture
def trained_once(monkeypatch):
    """The same run is not trained twice; its events are told again."""
    kept, run = {}, experiments.run

    def again(spec, device, progress=lambda event: None):
        if spec not in kept:
            events = []
            kept[spec] = run(spec, device, progress=events.append), events
        record, events = kept[spec]
        for event in events:
            progress(event)
        return copy.deepcopy(record)

    monkeypatch.setattr(experiments, "run", again)


@each_sheet
def test_each_answer_is_worth_its_own_points(sheet, built, trained_once):
    students, solutions, archive = built(sheet)
    tests, possible = grade.hidden_tests(archive)
    solution = parts_of(solutions)
    assert sum(possible.values()) == 20
    assert 6 <= len(possible) <= 10
    assert list(solution) == list(possible)
    started = time.process_time()
    assert points(solution, tests) == possible
    assert time.process_time() - started < 120
    assert points(parts_of(students), tests) == dict.fromkeys(possible, 0)
    assert len(WRONG.get(sheet, [])) >= 3, "mistakes for it in wrong_answers.py"
    for question, old, new in WRONG[sheet]:
        found = points(with_answer(solution, question, old, new), tests)
        lost = {name for name in possible if found[name] < possible[name]}
        assert lost == {question}, (question, new)


def solution_lines(master):
    """Lines that only the solution has, and those of hidden tests."""
    lines = []
    for cell in nbformat.read(master, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        if "hidden: true" in cell.source:
            lines += cell.source.splitlines()
        inside = False
        for line in cell.source.splitlines():
            inside = (inside or "# BEGIN SOLUTION" in line) and "END SOL" not in line
            if inside or line.endswith("# SOLUTION"):
                lines.append(line.removesuffix("# SOLUTION"))
    return {line.strip() for line in lines}


@each_sheet
def test_the_students_copy_has_no_trace_of_a_solution(sheet, built):
    students, _, _ = built(sheet)
    copied = nbformat.read(students, as_version=4)
    given = {
        line.strip()
        for cell in nbformat.read(assign.HERE / f"{sheet}.ipynb", 4).cells
        if cell.cell_type != "raw" and "TEST CONFIG" not in cell.source
        for line in re.sub(
            r"# BEGIN SOLUTION.*?# END SOLUTION", "", cell.source, flags=re.S
        ).splitlines()
        if not line.endswith("# SOLUTION")
    } | {""}
    public = copied.metadata["otter"]["tests"].values()
    shown = {line.strip() for source in public for line in source.splitlines()}
    secret = solution_lines(assign.HERE / f"{sheet}.ipynb") - given - shown
    assert len(secret) > 20
    seen = {line.strip() for cell in copied.cells for line in cell.source.splitlines()}
    assert not secret & seen
    text = str(copied)
    assert "SOLUTION" not in text and "hidden: true" not in text
    assert "hidden=True" not in text
    assert not any(cell.get("outputs") for cell in copied.cells)


@each_sheet
def test_a_prediction_has_a_test_of_its_own_and_may_be_corrected(sheet):
    cells = nbformat.read(assign.HERE / f"{sheet}.ipynb", as_version=4).cells
    taken = [  # what each hidden test looks at
        {argument.arg for argument in node.args.args}
        for cell in cells
        if cell.cell_type == "code" and "hidden: true" in cell.source
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.FunctionDef)
    ]
    predicted = PREDICTED.get(sheet, set())
    once = int(bool(predicted))
    assert [names for names in taken if names & predicted] == once * [predicted]
    asked = [cell.source for cell in cells if "*Before you run" in cell.source]
    assert len(asked) == once
    said = "Then correct the answer in its cell: only your final answer counts."
    for text in (*asked, STUDENTS.read_text()):
        assert said in " ".join(text.split())


@each_sheet
def test_no_cell_of_a_sheet_is_long(sheet):
    for cell in nbformat.read(assign.HERE / f"{sheet}.ipynb", as_version=4).cells:
        assert cell.cell_type != "code" or len(cell.source.splitlines()) <= 25, cell.id


@each_sheet
def test_what_students_see_fail_says_why(sheet):
    """Tests of the form are in their copies, so a bare assert would say nothing."""
    cells = nbformat.read(assign.HERE / f"{sheet}.ipynb", as_version=4).cells
    found = [
        ast.parse(cell.source)
        for cell in cells
        if "BEGIN TEST CONFIG" in cell.source and "hidden: true" not in cell.source
    ]
    asserts = [node for tree in found for node in ast.walk(tree)]
    asserts = [node for node in asserts if isinstance(node, ast.Assert)]
    assert asserts
    assert not [ast.unparse(node) for node in asserts if node.msg is None]


def test_students_are_told_of_this_project_and_its_otter():
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    name = project["urls"]["Repository"].removeprefix("https://github.com/")
    assert f"(https://mybinder.org/v2/gh/{name}/main)" in STUDENTS.read_text()
    needed = project["optional-dependencies"]["coursework"]
    (otter,) = (need for need in needed if need.startswith("otter-grader"))
    assert f'"{otter}"' in STUDENTS.read_text()
