"""Grade a folder of notebooks: ``python grade.py SHEET FOLDER``.

Each submission is graded by `confined`, in a process, a home folder and an environment
of its own, and all that it leaves running is ended. What comes back is looked at like
any other input. One CSV is written, at the end and as a whole: a row for each student
and question, and one for the sheet, with the sum and with what there is to say of it.
"""

import argparse
import ast
import contextlib
import ctypes
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import matplotlib
import pandas as pd
import psutil

import nlhelpers
from assign import AUTOGRADERS, BUILT, HERE, sheets

COLUMNS = ["student", "question", "points", "message"]
WHOLE = "sheet"  # the question of a row about all of them
LONGEST = 300  # characters of a message
LARGEST = 50_000_000  # bytes of a submission
ADOPT = 36  # prctl's PR_SET_CHILD_SUBREAPER


class GradingError(Exception):
    """Nothing can be graded; the message says why, and what to do."""


@dataclass(frozen=True)
class Limits:
    """What a submission may use.

    Attributes:
        seconds: in all.
        cell: seconds of computing, of a single cell.
        memory: bytes, of all its processes together.
        confined: whether the operating system keeps it from other files and processes.
    """

    seconds: float
    cell: float
    memory: int
    confined: bool


def main(words: list[str] | None = None) -> int:
    """Grade, write the CSV, print the sums.

    Returns:
        The exit status: 0 if every submission has its rows.
    """
    given = parser().parse_args(words)
    out = given.out or Path(f"{given.sheet}.csv")
    limits = Limits(
        seconds=60 * given.minutes,
        cell=12 * given.minutes,
        memory=int(given.memory * (1 << 30)),
        confined=not given.trust,
    )
    try:
        check_out(out, given.folder)
        table = grade(archive_of(given.sheet), given.folder, limits, given.at_once)
    except GradingError as error:
        print(error, file=sys.stderr)
        return 1
    table.to_csv(out, index=False)
    sums = table[table["question"] == WHOLE].set_index("student")
    print(sums[["points", "message"]].to_string())
    print(f"The points are in {out}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description="Grade a folder of notebooks.")
    found.add_argument("sheet", help="its name, as in notebooks/coursework/NAME.ipynb")
    found.add_argument("folder", type=Path, help="with the submissions, at any depth")
    found.add_argument("--out", type=Path, help="the CSV; SHEET.csv if not given")
    found.add_argument("--minutes", type=above_zero, default=5, help="for each (5)")
    found.add_argument("--memory", type=above_zero, default=4, help="GiB for each (4)")
    found.add_argument("--at-once", type=whole, default=os.cpu_count(), help="how many")
    found.add_argument(
        "--trust",
        action="store_true",
        help="grade without confinement, where the operating system has none",
    )
    return found


def above_zero(text: str) -> float:
    """A number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def whole(text: str) -> int:
    """A whole number above 0."""
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")


def check_out(path: Path, folder: Path) -> None:
    """Raise GradingError now, not after all grading, if it cannot be written.

    Nor may it lie among the submissions: it could take the place of one, and would be
    graded as one the next time.
    """
    written = path if path.exists() else path.parent
    if path.is_dir() or not os.access(written, os.W_OK):
        raise GradingError(
            f"{path} cannot be written; name a file in a folder that is there"
        )
    if path.resolve().is_relative_to(folder.resolve()):
        raise GradingError(
            f"{path} would lie among the submissions in {folder}; name a file elsewhere"
        )


def archive_of(sheet: str) -> Path:
    """The autograder of a sheet; raises GradingError if it is not built, or is old."""
    path = BUILT / AUTOGRADERS / f"{sheet}.zip"
    if not zipfile.is_zipfile(path):  # nor if it is cut off
        raise GradingError(
            f"there is no built sheet {sheet!r}; the sheets are {', '.join(sheets())}, "
            "and `make coursework` builds them"
        )
    master = HERE / f"{sheet}.ipynb"
    if master.is_file() and path.stat().st_mtime < master.stat().st_mtime:
        raise GradingError(
            f"the built sheet {sheet!r} is older than its notebook; `make coursework` "
            "builds it again"
        )
    return path


def grade(archive: Path, folder: Path, limits: Limits, at_once: int) -> pd.DataFrame:
    """Grade all submissions in a folder.

    Args:
        archive: a sheet's autograder, SHEET.zip.
        folder: with notebooks, at any depth.
        limits: for each of them.
        at_once: how many are graded at the same time.

    Returns:
        The rows of the CSV, with COLUMNS.

    Raises:
        GradingError: if there is nothing to grade, or no confinement.
    """
    tests, possible = hidden_tests(archive)
    papers = submissions(folder)
    if limits.confined:
        check_confinement()
    with Ward() as ward, ThreadPoolExecutor(at_once) as threads:

        def graded(path: Path) -> list[tuple]:
            found = graded_apart(path, archive.stem, tests, limits, ward)
            return rows(student(path, folder), found, possible)

        parts = list(threads.map(graded, papers))
    return pd.DataFrame([row for part in parts for row in part], columns=COLUMNS)


def hidden_tests(archive: Path) -> tuple[dict[str, str], dict[str, float]]:
    """The tests in an autograder, and the points of each question."""
    with zipfile.ZipFile(archive) as opened:
        names = sorted(n for n in opened.namelist() if n.startswith("tests/"))
        tests = {Path(name).stem: opened.read(name).decode() for name in names}
    return tests, {name: points_of(source) for name, source in tests.items()}


def points_of(source: str) -> float:
    """What a question is worth: the number that its test file calls `points`."""
    (value,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "points"
    )
    return float(ast.literal_eval(value))


def submissions(folder: Path) -> list[Path]:
    """All files below a folder, in order, but hidden ones."""
    if not folder.is_dir():
        raise GradingError(f"{folder} is not a folder; name one with the submissions")
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise GradingError(f"{folder} is empty; put the students' notebooks in it")
    return found


def student(path: Path, folder: Path) -> str:
    """Whose submission it is: its path below the folder, without `.ipynb`."""
    name = path.relative_to(folder)
    return (name.with_suffix("") if name.suffix == ".ipynb" else name).as_posix()


def check_confinement() -> None:
    """Raise GradingError where the operating system cannot confine a submission.

    The imports are those of a submission's processes, which cannot store the bytecode:
    stored here, they start in half the time.
    """
    probe = "import pathlib, otter.execute, ipykernel.ipkernel, confined; "
    probe += "confined.confine(pathlib.Path('.'), [])"
    tried = subprocess.run(
        [sys.executable, "-c", probe], cwd=HERE, capture_output=True, text=True
    )
    if tried.returncode:
        why = (tried.stderr.strip().splitlines() or ["it failed"])[-1]
        raise GradingError(
            f"this machine cannot keep a submission from your files ({why}). It takes "
            "Linux 6.12 or newer. Grade in a virtual machine or a container that holds "
            "nothing else and say TRUST=yes there"
        )


class Ward:
    """The processes that grade submissions, and what these leave behind.

    On Linux a process that loses its parent becomes a child of this one, so that none
    can get away.
    """

    def __init__(self) -> None:
        """Whoever is a child of this process by now is none of ours."""
        self.lock = threading.Lock()
        self.known = {child.pid for child in psutil.Process().children()}

    def __enter__(self) -> Self:
        """Adopt orphans from now on."""
        adopt_orphans(True)
        return self

    def __exit__(self, *error: object) -> None:
        """Let them be."""
        adopt_orphans(False)

    def start(self, command: list[str], **options: Any) -> subprocess.Popen:
        """Start a process; `options` are those of `subprocess.Popen`."""
        with self.lock:
            process = subprocess.Popen(command, **options)
            self.known.add(process.pid)
        return process

    def end(self, process: subprocess.Popen) -> None:
        """End it and all that it has started."""
        for member in family(process.pid):
            kill(member)
        process.wait()
        with self.lock:
            self.known.discard(process.pid)
            while strays := self.strays():
                for stray in strays:
                    for member in family(stray.pid):
                        kill(member)
                psutil.wait_procs(strays, timeout=1)

    def strays(self) -> list[psutil.Process]:
        """Children of this process that it did not start: they have lost a parent."""
        children = psutil.Process().children()
        return [child for child in children if child.pid not in self.known]


def adopt_orphans(whether: bool) -> None:
    """Whether descendants without a parent become children of this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(ADOPT, int(whether), 0, 0, 0)


def graded_apart(
    path: Path, sheet: str, tests: dict[str, str], limits: Limits, ward: Ward
) -> object:
    """Grade one submission in a process of its own.

    Args:
        path: of the submission.
        sheet: the sheet's name.
        tests: sources by question.
        limits: of the process and of all that it starts.
        ward: starts and ends it.

    Returns:
        What the process reports, unchecked; or a sentence that says what became of it.
    """
    task = {
        "sheet": sheet,
        "tests": tests,
        "cell_seconds": limits.cell,
        "memory": limits.memory,
        "confined": limits.confined,
        "readable": readable(),
    }
    if path.is_symlink() or path.stat().st_size > LARGEST:
        return f"not graded: a link, or larger than {LARGEST / 1e6:.0f} MB"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        furnish(home)
        try:
            shutil.copyfile(path, home / f"{sheet}.ipynb")
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        receive, send = os.pipe()
        process = ward.start(
            [sys.executable, str(HERE / "confined.py"), str(send)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=home,
            env=environment(home),
            pass_fds=[send],
            start_new_session=True,
        )
        os.close(send)
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as words:
                words.write(json.dumps(task).encode())
            ended = watch(process, limits)
        finally:
            ward.end(process)
        with os.fdopen(receive, "rb") as line:
            answer = line.read(1 << 20)
    if ended:
        return ended
    try:
        return json.loads(answer)
    except ValueError:
        return f"ended without a result (exit status {process.returncode})"


def furnish(home: Path) -> None:
    """What every submission finds in its home: the package, and a list of fonts."""
    (home / "lib").mkdir()
    (home / "lib" / "nlhelpers").symlink_to(Path(nlhelpers.__file__).parent)
    shutil.copytree(matplotlib.get_cachedir(), home / "matplotlib")


def environment(home: Path) -> dict[str, str]:
    """All environment variables that a submission gets: none of the teacher's."""
    return {
        "HOME": str(home),
        "TMPDIR": str(home),
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(home / "jupyter"),
        "MPLCONFIGDIR": str(home / "matplotlib"),
        "MPLBACKEND": "agg",
        "PYTHONPATH": str(home / "lib"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",  # as many submissions as cores are graded at once
    }


def readable() -> list[str]:
    """Files and folders that Python and the package lie in."""
    own = [HERE / "confined.py", Path(nlhelpers.__file__).parent]
    return [sys.prefix, sys.base_prefix, *map(str, own)]


def watch(process: subprocess.Popen, limits: Limits) -> str:
    """Wait for the end, or for the limits; returns which of them it met, or ""."""
    stop = time.monotonic() + limits.seconds
    while time.monotonic() < stop:
        try:
            process.wait(0.2)
            return ""
        except subprocess.TimeoutExpired:
            used = sum(map(memory_of, family(process.pid)))
        if used > limits.memory:
            return f"stopped: it used more than {limits.memory / (1 << 30):g} GiB"
    return f"stopped after {limits.seconds:.0f} s: look for an endless loop"


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants; none if it is gone."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_of(process: psutil.Process) -> int:
    """Bytes that a process has in memory."""
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def kill(process: psutil.Process) -> None:
    """Kill a process, unless it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def rows(name: str, found: object, possible: dict[str, float]) -> list[tuple]:
    """The rows of one student, whatever the submission's process has said."""
    if isinstance(found, str) or not well_formed(found):
        said = (
            found if isinstance(found, str) else "reported something else than points"
        )
        return [row(name, WHOLE, 0.0, said)]
    if not found["questions"]:
        return [row(name, WHOLE, 0.0, found["message"])]
    each = []
    for question, most in possible.items():
        points, message = found["questions"].get(question, (0, "was not reached"))
        each.append(row(name, question, min(max(points, 0.0), most), message))
    return [*each, row(name, WHOLE, sum(r[2] for r in each), found["message"])]


def well_formed(found: object) -> bool:
    """Whether a report has the form that `confined` gives it."""
    match found:
        case {"message": str(), "questions": dict(questions)}:
            return all(
                isinstance(value, list)
                and len(value) == 2
                and isinstance(value[0], int | float)
                and value[0] == value[0]  # not NaN
                and isinstance(value[1], str)
                for value in questions.values()
            )
    return False


def row(name: str, question: str, points: float, message: str) -> tuple:
    """One row of the CSV."""
    return plain(name), question, float(points), plain(message)


def plain(text: str) -> str:
    """A text on one line, not too long, that no spreadsheet takes for a formula."""
    line = " ".join(text.split())
    line = "".join(c for c in line if c.isprintable())[:LONGEST]
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


if __name__ == "__main__":
    sys.exit(main())
