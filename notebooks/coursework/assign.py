"""Build the sheets: ``python assign.py [SHEET ...]``.

From each master, a notebook in this folder, otter makes three files in
``_build/coursework``: the students' copy, the solution, and the autograder that
`grade` and Gradescope take. It runs the solution first, which must get all points.
With ``--no-run`` it makes the students' copy only, which is all that the book needs.
"""

import argparse
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILT = HERE.parent.parent / "_build" / "coursework"
FOLDERS = STUDENTS, SOLUTIONS, AUTOGRADERS = "students", "solutions", "autograders"


def main(words: list[str] | None = None) -> int:
    """Build sheets, all if none is named.

    Returns:
        The exit status: 0 if all are built.
    """
    known = sheets()
    parser = argparse.ArgumentParser(description="Build the sheets.")
    parser.add_argument("sheet", nargs="*", help=f"{', '.join(known)}; all by default")
    parser.add_argument(
        "--no-run", action="store_true", help="students' copies only, nothing is run"
    )
    given = parser.parse_args(words)
    chosen = given.sheet or known
    if unknown := sorted(set(chosen) - set(known)):
        parser.error(f"unknown sheet {unknown[0]!r}; the sheets are {', '.join(known)}")
    one = functools.partial(attempt, run=not given.no_run)
    os.environ["OMP_NUM_THREADS"] = "1"  # several at once, each on a core
    failed = 0
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), silence)
    with pool as workers:
        for sheet, problem in zip(chosen, workers.map(one, chosen), strict=True):
            print(f"{sheet}: {problem or 'built'}", flush=True)
            failed += bool(problem)
    print(f"The sheets are in {BUILT}")
    return 1 if failed else 0


def sheets() -> list[str]:
    """The names of all sheets."""
    return sorted(path.stem for path in HERE.glob("*.ipynb"))


def silence() -> None:
    """Let this process and its kernels print nothing; problems are returned."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())


def attempt(sheet: str, run: bool) -> str:
    """Build a sheet, or the students' copy only; returns what went wrong, or ""."""
    try:
        build(HERE / f"{sheet}.ipynb", BUILT, run, FOLDERS if run else (STUDENTS,))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def build(
    master: Path, built: Path, run: bool = True, folders: Iterable[str] = FOLDERS
) -> None:
    """Make the three files of a sheet.

    Args:
        master: the notebook that holds all.
        built: the folder that gets them, each in one of FOLDERS.
        run: whether to run the solution first.
        folders: which of FOLDERS get theirs.

    Raises:
        RuntimeError: if the solution does not get all points.
    """
    from otter.assign import main as otter_assign

    with tempfile.TemporaryDirectory() as folder:
        otter_assign(str(master), folder, no_pdfs=True, no_run_tests=not run)
        own = Path(folder)
        (archive,) = own.glob("autograder/*.zip")
        files = {
            STUDENTS: own / "student" / master.name,
            SOLUTIONS: own / "autograder" / master.name,
            AUTOGRADERS: archive,
        }
        for name in folders:
            (built / name).mkdir(parents=True, exist_ok=True)
            made = files[name]
            shutil.copy(made, built / name / f"{master.stem}{made.suffix}")


if __name__ == "__main__":
    sys.exit(main())
