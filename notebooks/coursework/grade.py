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
import glob
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import zipfile
from collections import Counter
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
ROOM = 500_000_000  # bytes that stay free on the disk
PATIENCE = 10  # seconds for ending what a submission leaves behind
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
    named = names(papers, folder)
    if limits.confined:
        check_confinement()
    with Ward() as ward, ThreadPoolExecutor(at_once) as threads:

        def graded(path: Path) -> list[tuple]:
            try:
                found, note = graded_apart(path, archive.stem, tests, limits, ward)
                return rows(named[path], found, possible, note)
            except Exception as error:  # which must not cost the others their points
                said = f"not graded: {type(error).__name__}: {error}"
                return rows(named[path], said, possible)

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


def names(papers: list[Path], folder: Path) -> dict[Path, str]:
    """Whose submission each is; no two get the same name.

    Where they would (`ada` and `ada.ipynb`), they keep their suffix, and if that does
    not help, they get a number.
    """
    short = {path: plain(student(path, folder)) for path in papers}
    often = Counter(short.values())
    found: dict[Path, str] = {}
    for path in papers:
        name = short[path]
        if often[name] > 1:
            name = plain(shown(path.relative_to(folder)))
        unique, number = name, 2
        while unique in found.values():
            unique = plain(f"{name[: LONGEST - 9]} ({number})")
            number += 1
        found[path] = unique
    return found


def student(path: Path, folder: Path) -> str:
    """Whose submission it is: its path below the folder, without `.ipynb`."""
    name = path.relative_to(folder)
    return shown(name.with_suffix("") if name.suffix == ".ipynb" else name)


def shown(path: Path) -> str:
    r"""A path as text: letters in their NFC form, bytes that are no text as `\xfc`."""
    text = os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


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
    can get away: a child that this process did not start is a stray.
    """

    def __init__(self) -> None:
        """Whoever is a child of this process by now is none of ours."""
        self.lock = threading.Lock()
        self.before = set(children())
        # Not their pids: one that has ended gives its pid to the next to be started.
        self.started: set[subprocess.Popen] = set()

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
            self.started.add(process)
        return process

    def run(self, command: list[str]) -> None:
        """Run a program of our own to its end, whatever comes of it."""
        nowhere = subprocess.DEVNULL
        with contextlib.suppress(OSError):
            self.forget(self.start(command, stdout=nowhere, stderr=nowhere))

    def end(self, process: subprocess.Popen) -> bool:
        """End it and all that it has started; returns whether that was possible."""
        if process.poll() is None:  # its pid may be another's afterwards
            for member in family(process.pid):
                with contextlib.suppress(psutil.Error):
                    member.kill()
            kill_group(process.pid)
        self.forget(process)
        stop = time.monotonic() + PATIENCE
        while self.end_strays():
            if time.monotonic() > stop:
                return False
            time.sleep(0.001)  # lets other threads have the lock
        return True

    def forget(self, process: subprocess.Popen) -> None:
        """Wait for it; after that, its pid can be that of a stray."""
        process.wait()
        with self.lock:
            self.started.discard(process)

    def end_strays(self) -> bool:
        """Kill and reap the strays of this moment; returns whether there were any.

        A stray can fork and exit faster than it is found, so its process group goes
        too, at one stroke; but not with a leader that still has a parent, which is the
        kernel of a submission that is being graded.
        """
        with self.lock:
            strays = self.strays()
            for pid in reversed(strays):  # the youngest is the likeliest to live
                kill(pid)
            for group in set(map(group_of, strays)):
                if group in strays or not psutil.pid_exists(group):
                    kill_group(group)
            reap(strays)
        return bool(strays)

    def reap_strays(self) -> None:
        """Let dead strays go, so that they do not fill the table of processes."""
        with self.lock:
            reap(self.strays())

    def strays(self) -> list[int]:
        """Pids of the strays, the oldest first; to be called, and used, with the lock.

        Without it, one that another thread is about to start would be among them.
        """
        ours = self.before | {process.pid for process in self.started}
        return [pid for pid in children() if pid not in ours]


def children() -> list[int]:
    """Pids of the children of this process, fast where Linux lists them."""
    lists = glob.glob("/proc/self/task/*/children")
    if not lists:
        return [child.pid for child in psutil.Process().children()]
    found = []
    for path in lists:
        with contextlib.suppress(OSError):  # a thread that has ended
            found += map(int, Path(path).read_text().split())
    return found


def reap(pids: list[int]) -> None:
    """Take the exit status of those children that are dead."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.waitpid(pid, os.WNOHANG)


def group_of(pid: int) -> int:
    """The process group of a child; its own pid if it is gone."""
    try:
        return os.getpgid(pid)
    except OSError:
        return pid


def kill_group(group: int) -> None:
    """Kill a process group, unless it is gone, or ours."""
    if group != os.getpgrp():
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


def kill(pid: int) -> None:
    """Kill a process, unless it is gone."""
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def adopt_orphans(whether: bool) -> None:
    """Whether descendants without a parent become children of this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(ADOPT, int(whether), 0, 0, 0)


def graded_apart(
    path: Path, sheet: str, tests: dict[str, str], limits: Limits, ward: Ward
) -> tuple[object, str]:
    """Grade one submission in a process and a home of its own.

    Args:
        path: of the submission.
        sheet: the sheet's name.
        tests: sources by question.
        limits: of the process and of all that it starts.
        ward: starts and ends it.

    Returns:
        What the process reports, unchecked, or a sentence that says what became of it;
        and a note for the teacher, or "".
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
        return f"not graded: a link, or larger than {LARGEST / 1e6:.0f} MB", ""
    home = Path(tempfile.mkdtemp())
    try:
        furnish(home)
        try:
            shutil.copyfile(path, home / f"{sheet}.ipynb")
        except OSError as error:
            return f"cannot be read: {error.strerror}", ""
        return run_confined(task, home, limits, ward)
    finally:
        # In Python, deletion calls itself for each nested folder, and may go too deep.
        delete = 'chmod -R u+rwX "$0"; rm -rf "$0"'
        ward.run(["/bin/sh", "-c", delete, str(home)])


def run_confined(
    task: dict, home: Path, limits: Limits, ward: Ward
) -> tuple[object, str]:
    """Run `confined` in a home; returns what `graded_apart` does."""
    receive, send = os.pipe()
    os.set_blocking(receive, False)  # what could not be ended may never close it
    with os.fdopen(receive, "rb") as line:
        try:
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
        finally:
            os.close(send)
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as words:
                words.write(json.dumps(task).encode())
            ended = watch(process, limits, ward)
        finally:
            all_ended = ward.end(process)
        answer = line.read(1 << 20) or b""
    note = "" if all_ended else "something left running could not be ended"
    if ended:
        return ended, note
    try:
        return json.loads(answer), note
    except ValueError:
        return f"ended without a result (exit status {process.returncode})", note


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


def watch(process: subprocess.Popen, limits: Limits, ward: Ward) -> str:
    """Wait for the end, or for the limits; returns which of them it met, or ""."""
    stop = time.monotonic() + limits.seconds
    while time.monotonic() < stop:
        try:
            process.wait(0.2)
            return ""
        except subprocess.TimeoutExpired:
            ward.reap_strays()
            used = sum(map(memory_of, family(process.pid)))
        if used > limits.memory:
            return f"stopped: it used more than {limits.memory / (1 << 30):g} GiB"
        # All that run now are stopped: any of them may have failed for want of room.
        if shutil.disk_usage(tempfile.gettempdir()).free < ROOM:
            return "stopped: the disk is nearly full; make room and grade again"
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


def rows(
    name: str, found: object, possible: dict[str, float], note: str = ""
) -> list[tuple]:
    """The rows of one student, whatever the submission's process has said."""

    def whole(points: float, message: str) -> tuple:
        return row(name, WHOLE, points, "; ".join(filter(None, [note, message])))

    if isinstance(found, str):
        return [whole(0.0, found)]
    if not well_formed(found):
        return [whole(0.0, "reported something else than points")]
    if not found["questions"]:
        return [whole(0.0, found["message"])]
    each = []
    for question, most in possible.items():
        points, message = found["questions"].get(question, (0, "was not reached"))
        each.append(row(name, question, min(max(points, 0.0), most), message))
    return [*each, whole(sum(r[2] for r in each), found["message"])]


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
    line = "".join(c for c in text if c.isprintable() or c.isspace())
    line = " ".join(line.split())
    line = f"'{line}" if line.startswith(("=", "+", "-", "@")) else line
    return line[:LONGEST].rstrip()


if __name__ == "__main__":
    sys.exit(main())
