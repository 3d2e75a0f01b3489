"""The sheets, and grading: what a submission gets, and what it cannot do."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from otter.test_files import ExceptionTestFile, GradingResults

import assign
import confined
import grade
from grade import Limits

# ---------------------------------------------------------------- a small sheet

MASTER = [
    ("raw", "# ASSIGNMENT CONFIG\nname: small\ninit_cell: false\nexport_cell: false"
     "\ntests:\n  ok_format: false"),
    ("code", "import otter\n\ngrader = otter.Notebook('small.ipynb')"),
    ("raw", "# BEGIN QUESTION\nname: q1\npoints: 3"),
    ("markdown", "Double it."),
    ("raw", "# BEGIN SOLUTION"),
    ("code", "def twice(x):\n    return x + x  # SOLUTION"),
    ("raw", "# END SOLUTION"),
    ("raw", "# BEGIN TESTS"),
    ("code", '""" # BEGIN TEST CONFIG\npoints: 0\n""" # END TEST CONFIG\n'
     "def test_form(twice):\n    assert callable(twice), 'twice is a function'"),
    ("code", '""" # BEGIN TEST CONFIG\nhidden: true\npoints: 3\n'
     'failure_message: not the double\n""" # END TEST CONFIG\n'
     "def test_double(twice):\n    assert twice(21) == 42"),
    ("raw", "# END TESTS"),
    ("raw", "# END QUESTION"),
    ("raw", "# BEGIN QUESTION\nname: q2\npoints: 2"),
    ("markdown", "Which number?"),
    ("raw", "# BEGIN SOLUTION"),
    ("code", "number = 7  # SOLUTION"),
    ("raw", "# END SOLUTION"),
    ("raw", "# BEGIN TESTS"),
    ("code", '""" # BEGIN TEST CONFIG\nhidden: true\npoints: 2\n""" # END TEST CONFIG\n'
     "def test_number(number):\n    assert number == 7, 'another number'"),
    ("raw", "# END TESTS"),
    ("raw", "# END QUESTION"),
]  # fmt: skip


def can_confine():
    try:
        grade.check_confinement()
    except grade.GradingError:
        return False
    return True


CONFINED = can_confine()
LIMITS = Limits(seconds=300, cell=5, memory=4 << 30, confined=CONFINED)
TWICE, NUMBER = "def twice(x):\n    return 2 * x", "number = 7"


def write_notebook(path, cells):
    new = {
        "raw": nbformat.v4.new_raw_cell,
        "markdown": nbformat.v4.new_markdown_cell,
        "code": nbformat.v4.new_code_cell,
    }
    notebook = nbformat.v4.new_notebook(cells=[new[kind](text) for kind, text in cells])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["kernelspec"] = kernel
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def answers(first=TWICE, second=NUMBER):
    """A submission of the small sheet."""
    texts = [MASTER[1][1], first, "grader.check('q1')", second, "grader.check('q2')"]
    return [("code", text) for text in texts]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small sheet's autograder, beside its students' copy and solution."""
    folder = tmp_path_factory.mktemp("sheet")
    master = write_notebook(folder / "small.ipynb", MASTER)
    assign.build(master, folder / "built", run=False)
    return folder / "built" / assign.AUTOGRADERS / "small.zip"


@pytest.fixture
def graded(small, tmp_path):
    """Grade submissions by name, and index the rows by student and question."""

    def run(limits=LIMITS, **submissions):
        for name, cells in submissions.items():
            write_notebook(tmp_path / "in" / f"{name}.ipynb", cells)
        table = grade.grade(small, tmp_path / "in", limits, at_once=2)
        assert list(table.columns) == ["student", "question", "points", "message"]
        return table.set_index(["student", "question"])

    return run


def points(table, student):
    print(table.loc[student].to_string())  # shown if the test fails
    return table.loc[student]["points"].to_dict()


# ---------------------------------------------------------------- honest submissions


def test_what_students_hand_in(graded, small, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "notes.ipynb").write_text("not a notebook")
    for kind in ("students", "solutions"):
        text = (small.parent.parent / kind / "small.ipynb").read_text()
        (tmp_path / "in" / "deep" / f"{kind}.ipynb").write_text(text)
    other = json.loads((tmp_path / "in" / "deep" / "students.ipynb").read_text())
    other["metadata"]["otter"]["assignment_name"] = "noise"
    (tmp_path / "in" / "other.ipynb").write_text(json.dumps(other))
    (tmp_path / "in" / "neighbour.ipynb").symlink_to(tmp_path / "in" / "moved.ipynb")
    with (tmp_path / "in" / "huge.ipynb").open("wb") as file:
        file.truncate(grade.LARGEST + 1)
    found = graded(
        # Cells merged, one check deleted, and an answer overwritten after its check.
        moved=[
            ("code", "\n".join(text for _, text in answers()[:4])),
            ("code", "def twice(x):\n    return x"),
        ],
        renamed=answers(first="def double(x):\n    return 2 * x", second="number = 8"),
        broken=answers(
            first="def twice(x)\n    return 2 * x", second="while True: pass"
        ),
        shell=answers(first=f"!ls\n%pip --version\n{TWICE}"),
        # What the first cell lacks is missed by the second question only.
        imports=[("code", "import nunpy as np"), *answers(second="number = np.max(7)")],
    )
    full = {"q1": 3.0, "q2": 2.0, "sheet": 5.0}
    for name in ("moved", "shell", "deep/solutions"):
        assert points(found, name) == full, name
        assert not found.loc[name]["message"].any(), name
    for name in ("deep/students", "renamed", "broken"):
        assert points(found, name) == {"q1": 0.0, "q2": 0.0, "sheet": 0.0}, name
    for (name, question), message in {
        ("renamed", "q1"): "twice is a function",
        ("renamed", "q2"): "another number",
        ("broken", "q1"): "SyntaxError: expected ':'",
        ("broken", "q2"): "TimeoutError: this cell took more than 5 s",
        ("imports", "q2"): "No module named 'nunpy'; NameError: name 'np' is not",
    }.items():
        assert message in found.loc[name, question]["message"]
    assert points(found, "imports") == {"q1": 3.0, "q2": 0.0, "sheet": 3.0}
    assert found.loc["imports", "q1"]["message"] == ""
    for name, message in {
        "notes": "not a notebook",
        "other": "a copy of the sheet noise, not of small",
        "neighbour": "not graded: a link",
        "huge": "larger than 50 MB",
    }.items():
        assert points(found, name) == {"sheet": 0.0}, name
        assert message in found.loc[name, "sheet"]["message"]


def test_grading_twice_gives_the_same(graded):
    first = graded(wrong=answers(second="number = 8"))
    pd.testing.assert_frame_equal(first, graded())


# ---------------------------------------------------------------- hostile submissions

needs_confinement = pytest.mark.skipif(
    not CONFINED, reason="this kernel cannot confine a submission"
)

READS = """
import glob, os
found = []
for pattern in {patterns!r}:
    for path in glob.glob(pattern, recursive=True):
        try:
            found.append(open(path).read()[:20])
        except OSError:
            pass
for other in range(1, 100_000):
    for name in ("environ", "cmdline"):
        try:
            found.append(open(f"/proc/{{other}}/{{name}}").read())
        except OSError:
            pass
assert not found, found
"""
WRITES = """
for path in {paths!r}:
    try:
        open(path, "w").write("good,sheet,100")
    except OSError:
        continue
    raise AssertionError("could write " + path)
"""
# A grandchild in a session of its own, whose parents are gone, that ticks for a minute.
OUTLIVES = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "61.125"])
    os._exit(0)
"""
# One victim, so that this test harms nobody where confinement fails.
KILLS = """
import os
try:
    os.kill({victim}, 9)
except PermissionError:
    pass
else:
    raise AssertionError("could kill a process of the teacher's")
"""


@needs_confinement
def test_what_a_submission_cannot_do(graded, small, tmp_path, monkeypatch):
    monkeypatch.setenv("BEARER_OF_A_SECRET", "1")
    csv = tmp_path / "small.csv"
    csv.write_text("yesterday's points")
    secrets = [str(tmp_path / "in" / "*"), str(small.parent.parent / "**" / "*.*")]
    secrets += [str(csv), str(assign.HERE / "*.ipynb"), str(Path.home() / "**" / "*")]
    before = {p.pid for p in psutil.process_iter()}
    victim = subprocess.Popen(["sleep", "600"])
    nosy = READS.format(patterns=secrets)
    nosy += WRITES.format(paths=[str(csv), str(tmp_path / "in" / "exits.ipynb")])
    nosy += "assert 'BEARER_OF_A_SECRET' not in os.environ\n"
    found = graded(
        hostile=answers(
            first=nosy + KILLS.format(victim=victim.pid) + OUTLIVES + TWICE
        ),
        memory=answers(first="x = bytearray(10 * 2**30)\n" + TWICE),
        exits=answers(first="import os\nos._exit(0)"),
        prints=answers(
            first="print('x' * 100_000_000)\n" + TWICE,
            second="raise ValueError('=1+1')",
        ),
    )
    assert points(found, "hostile") == {"q1": 3.0, "q2": 2.0, "sheet": 5.0}
    assert points(found, "prints") == {"q1": 3.0, "q2": 0.0, "sheet": 3.0}
    assert found.loc["prints", "sheet"]["message"] == "printed 100 MB"
    assert found.loc["prints", "q2"]["message"].startswith("ValueError: =1+1")
    assert points(found, "memory") == {"q1": 0.0, "q2": 2.0, "sheet": 2.0}
    assert "MemoryError" in found.loc["memory", "q1"]["message"]
    assert points(found, "exits") == {"sheet": 0.0}
    assert "died" in found.loc["exits", "sheet"]["message"]
    assert csv.read_text() == "yesterday's points"
    assert victim.poll() is None
    victim.kill()
    victim.wait()
    started = [p for p in psutil.process_iter() if p.pid not in before]
    assert not [p for p in started if "61.125" in p.cmdline()]


def test_limits_hold_whatever_a_submission_catches(graded, tmp_path):
    stubborn = (
        "while True:\n    try:\n        while True:\n            pass\n"
        "    except BaseException:\n        pass"
    )
    many = (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n"
        "        x = bytearray(b'1') * 2**28\n        time.sleep(60)\ntime.sleep(60)"
    )
    started = time.monotonic()
    found = graded(replace(LIMITS, seconds=8), stubborn=answers(first=stubborn))
    assert time.monotonic() - started < 60
    assert points(found, "stubborn") == {"sheet": 0.0}
    assert "stopped after 8 s" in found.loc["stubborn", "sheet"]["message"]
    (tmp_path / "in" / "stubborn.ipynb").unlink()
    found = graded(replace(LIMITS, memory=1 << 30), many=answers(first=many))
    assert points(found, "many") == {"sheet": 0.0}
    assert "more than 1 GiB" in found.loc["many", "sheet"]["message"]


def test_nothing_listens_where_points_are_counted(graded, monkeypatch):
    open_ports = []

    def look(process, limits, ward):
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                open_ports.extend(
                    found
                    for found in psutil.Process(process.pid).net_connections()
                    if found.status == psutil.CONN_LISTEN
                )
            time.sleep(0.05)
        return ""

    monkeypatch.setattr(grade, "watch", look)
    assert points(graded(good=answers()), "good")["sheet"] == 5
    assert not open_ports


NESTED = """
import os
top = os.open(".", os.O_RDONLY)
for _ in range(3000):
    os.mkdir("x")
    os.chdir("x")
os.fchdir(top)
"""


def test_nested_folders_cost_nobody_points(graded, tmp_path, monkeypatch):
    homes = tmp_path / "homes"
    homes.mkdir()
    monkeypatch.setattr(grade.tempfile, "tempdir", str(homes))
    found = graded(nested=answers(first=NESTED + TWICE))
    left = os.listdir(homes)
    subprocess.run(["rm", "-rf", homes])  # pytest could not
    assert points(found, "nested")["sheet"] == 5
    assert left == []


def test_an_error_in_one_submission_leaves_the_others(graded, monkeypatch):
    def graded_apart(path, *_):
        if path.stem == "odd":
            raise RecursionError("too deep")
        return {"message": "", "questions": {"q1": [3, ""]}}, ""

    monkeypatch.setattr(grade, "graded_apart", graded_apart)
    found = graded(odd=answers(), good=answers())
    said = found.loc["odd", "sheet"]["message"]
    assert said == "not graded: RecursionError: too deep"
    assert points(found, "good")["sheet"] == 3


# ---------------------------------------------------------------- what is left behind

adopts_orphans = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux gives orphans to the grading process"
)

# Each process is the child of one that is gone. It ends by itself, in any case.
CHAIN = """
import os, time
stop = time.time() + 8
if os.fork():
    os._exit(0)
while time.time() < stop:
    if os.fork():
        os._exit(0)
    {each}
"""


@pytest.fixture
def ward():
    with grade.Ward() as found:
        yield found


@adopts_orphans
@pytest.mark.parametrize("each", ["pass", "os.setsid()"])
def test_a_chain_of_forks_is_ended(ward, each):
    words = [sys.executable, "-S", "-c", CHAIN.format(each=each)]
    chain = ward.start(words, start_new_session=True)
    chain.wait()
    started = time.monotonic()
    assert ward.end(chain)
    assert time.monotonic() - started < 4
    time.sleep(0.1)
    assert not ward.strays()


def wait_for(condition):
    stop = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.01)


@adopts_orphans
def test_a_process_group_is_ended_at_one_stroke(ward):
    words = ["sh", "-c", "sh -c 'sleep 30; true' &"]
    ward.forget(ward.start(words, start_new_session=True))
    wait_for(lambda: [len(grade.family(pid)) for pid in ward.strays()] == [2])
    assert ward.end_strays()
    wait_for(lambda: ward.strays() and not any(map(alive, ward.strays())))
    assert ward.end_strays()


def alive(pid):
    return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@adopts_orphans
def test_dead_orphans_do_not_pile_up(ward):
    orphans = "for _ in 1 2 3 4 5; do (true &) ; done; sleep 30"
    process = ward.start(["sh", "-c", orphans])
    grade.watch(process, replace(LIMITS, seconds=1), ward)
    assert not ward.strays()
    assert ward.end(process)


@adopts_orphans
def test_ending_one_leaves_what_others_have_started(ward):
    other = ward.start(["sh", "-c", "(sleep 30 &) ; sleep 30"], start_new_session=True)
    wait_for(ward.strays)
    assert ward.end(ward.start(["true"]))
    assert not ward.strays()
    assert other.poll() is None
    assert ward.end(other)

    def status(_):
        process = ward.start(["sh", "-c", "exit 7"])
        process.wait()
        ward.end(process)
        return process.returncode

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(status, range(200))) == {7}


def test_what_cannot_be_ended_is_said(graded, tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "HERE", tmp_path)  # where there is no `confined`
    monkeypatch.setattr(grade, "PATIENCE", 0.1)
    monkeypatch.setattr(grade.Ward, "end_strays", lambda ward: True)
    found = graded(replace(LIMITS, confined=False), ann=answers())
    left, result = found.loc["ann", "sheet"]["message"].split("; ")
    assert left == "something left running could not be ended"
    assert result == "ended without a result (exit status 2)"
    said = {"message": "printed 11 MB", "questions": {"q1": [3, ""]}}
    whole = ("ann", "sheet", 3.0, f"{left}; printed 11 MB")
    assert grade.rows("ann", said, {"q1": 3.0}, left)[-1] == whole


def test_a_full_disk_is_not_the_students_fault(ward, monkeypatch):
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(grade.shutil, "disk_usage", lambda path: full)
    process = ward.start(["sleep", "30"])
    said = grade.watch(process, LIMITS, ward)
    assert said == "stopped: the disk is nearly full; make room and grade again"
    ward.end(process)


# ---------------------------------------------------------------- reports and input

POSSIBLE = {"q1": 3.0, "q2": 2.0}


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        {"questions": {}},
        {"message": 1, "questions": {}},
        {"message": "", "questions": {"q1": 3}},
        {"message": "", "questions": {"q1": ["3", ""]}},
        {"message": "", "questions": {"q1": [float("nan"), ""]}},
        {"message": "", "questions": {"q1": [3, None]}},
    ],
)
def test_a_report_of_another_form_is_worth_nothing(found):
    said = "reported something else than points"
    assert grade.rows("ann", found, POSSIBLE) == [("ann", "sheet", 0.0, said)]


def test_points_stay_in_their_range():
    found = {
        "message": "",
        "questions": {"q1": [1e9, ""], "q2": [-5, ""], "q3": [1, ""]},
    }
    rows = grade.rows("ann", found, POSSIBLE)
    assert [row[:3] for row in rows] == [
        ("ann", "q1", 3.0),
        ("ann", "q2", 0.0),
        ("ann", "sheet", 3.0),
    ]


def test_a_check_within_a_block_leaves_a_block():
    source = "try:\n    grader.check('q1')  # so far\nexcept ValueError:\n    raise"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    checks = confined.Checks({"q1": "def test_it():\n    assert True"}, 5)
    for cell in checks.before_execution(notebook).cells:
        compile(cell.source, "<cell>", "exec")
    assert checks.questions.count("q1") == 1


def test_texts_are_plain():
    assert grade.plain("=HYPERLINK(1)\n\x1b[31m" + "x" * 400).startswith(
        "'=HYPERLINK(1)"
    )
    assert "\x1b" not in grade.plain("a\x1b[31m")
    assert len(grade.plain("x" * 400)) == 300


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nois", "empty"], "there is no built sheet 'nois'"),
        (["cut_off", "empty"], "there is no built sheet 'cut_off'"),
        (["small", "nowhere"], "nowhere is not a folder"),
        (["small", "empty"], "empty is empty"),
        (["small", "empty", "--out", "no/x.csv"], "no/x.csv cannot be written"),
        (["small", "."], "small.csv would lie among the submissions in ."),
    ],
)
def test_bad_calls(small, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(grade, "BUILT", small.parent.parent)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    small.with_name("cut_off.zip").write_bytes(small.read_bytes()[:-50])
    assert grade.main(words) == 1
    assert message in capsys.readouterr().err


def test_an_autograder_older_than_its_sheet_grades_nothing(
    small, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(grade, "HERE", tmp_path)
    monkeypatch.setattr(grade, "BUILT", tmp_path / "built")
    master = write_notebook(tmp_path / "small.ipynb", MASTER)
    folder = tmp_path / "built" / assign.AUTOGRADERS
    folder.mkdir(parents=True)
    archive = Path(shutil.copy(small, folder))
    os.utime(master, (0, archive.stat().st_mtime - 1))
    assert grade.archive_of("small") == archive
    os.utime(master, (0, archive.stat().st_mtime + 1))
    words = ["small", str(tmp_path / "in"), "--out", str(tmp_path / "out.csv")]
    assert grade.main(words) == 1
    assert "older than its notebook; `make coursework`" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--minutes", "--memory"])
@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "many"])
def test_limits_are_above_zero(option, value, capsys):
    with pytest.raises(SystemExit):
        grade.main(["small", ".", option, value])
    assert f"{value!r} is no number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1", "0", "1.5", "many"])
def test_at_least_one_is_graded_at_once(value, capsys):
    with pytest.raises(SystemExit):
        grade.main(["small", ".", "--at-once", value])
    assert f"{value!r} is no whole number above 0" in capsys.readouterr().err


TESTS = """
from otter.test_files import test_case

name, points = "q1", 3

@test_case()
def test_form():
    assert False

@test_case(failure_message={hint!r})
def test_value():
    assert False, {said!r}
"""


@pytest.mark.parametrize(
    ("hint", "said", "message"),
    [
        (None, "not the double", "not the double"),
        ("a hint", "not the double", "a hint"),
        (None, "", "AssertionError"),
    ],
)
def test_the_first_failed_test_with_something_to_say_says_it(hint, said, message):
    test = ExceptionTestFile.from_string(TESTS.format(hint=hint, said=said), "q1.py")
    test.run({})
    assert confined.why_failed(GradingResults([test]), "q1") == message


def names(tmp_path, *files):
    return list(grade.names([tmp_path / file for file in files], tmp_path).values())


def test_no_two_submissions_share_a_name(tmp_path):
    assert names(tmp_path, "a.ipynb", "a.txt") == ["a", "a.txt"]
    assert names(tmp_path, "in/a", "in/a.ipynb") == ["in/a", "in/a.ipynb"]
    one_letter, two = "\xe9.ipynb", "e\u0301.ipynb"
    assert names(tmp_path, two) == ["\xe9"]
    assert names(tmp_path, one_letter, two) == ["\xe9.ipynb", "\xe9.ipynb (2)"]
    assert names(tmp_path, os.fsdecode(b"m\xfcller.ipynb")) == ["m\\xfcller"]
    long = [f"{'x' * 200}/{'=' * 150}{n}" for n in range(3)]
    found = names(tmp_path, *long)
    assert len(set(found)) == 3
    assert [grade.plain(name) for name in found] == found


def test_without_a_run_only_the_students_copy_is_made(tmp_path, monkeypatch):
    write_notebook(tmp_path / "small.ipynb", MASTER)
    monkeypatch.setattr(assign, "HERE", tmp_path)
    monkeypatch.setattr(assign, "BUILT", tmp_path / "built")
    assert assign.attempt("small", run=False) == ""
    made = [path for path in (tmp_path / "built").rglob("*") if path.is_file()]
    assert made == [tmp_path / "built" / assign.STUDENTS / "small.ipynb"]


def test_unknown_sheets_are_not_built(capsys):
    with pytest.raises(SystemExit):
        assign.main(["nois"])
    assert "unknown sheet 'nois'; the sheets are" in capsys.readouterr().err


def test_without_confinement_nothing_is_graded(small, tmp_path, monkeypatch, capsys):
    write_notebook(tmp_path / "in" / "good.ipynb", answers())
    monkeypatch.setattr(grade, "BUILT", small.parent.parent)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(grade, "HERE", tmp_path)  # where there is no `confined`
    words = ["small", str(tmp_path / "in"), "--out", str(tmp_path / "out.csv")]
    assert grade.main(words) == 1
    assert "cannot keep a submission from your files" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
    assert os.listdir(tmp_path / "in") == ["good.ipynb"]
