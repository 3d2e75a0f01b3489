"""Run the notebooks that are not up to date, with papermill."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from freshness import notebook_key, versions

AT_ONCE = 4  # most notebooks to run at the same time: each may take 2 GB
# What the page of all results offers for download, besides the executed notebooks.
TABLES = ("tables.csv", "tables.json")


@dataclass(frozen=True)
class Chapter:
    """A notebook, and where its executed copy goes.

    Attributes:
        source: The notebook without outputs.
        target: Its executed copy.
    """

    source: Path
    target: Path

    @property
    def sidecar(self) -> Path:
        """The file that says what the executed copy was made from, and how."""
        return self.target.with_suffix(".json")

    @property
    def records(self) -> Path:
        """The file that the notebook stores the records of its runs in."""
        return self.target.with_suffix(".jsonl")

    def run_info(self) -> dict:
        """The content of the sidecar; empty if there is no complete executed copy."""
        if not (self.target.is_file() and self.sidecar.is_file()):
            return {}
        try:
            return json.loads(self.sidecar.read_text(encoding="utf-8"))
        except ValueError:  # cut off, as on a full disk
            return {}

    def forget(self) -> None:
        """Remove the executed copy."""
        self.sidecar.unlink(missing_ok=True)
        self.target.unlink(missing_ok=True)


def run_stale(top: Path, executed: Path) -> tuple[list[Chapter], int]:
    """Run every notebook whose key differs from that of its executed copy.

    Several run at once, each on a core of its own. With more threads their numbers
    would depend on how many others are running.

    Args:
        top: The repository. Notebooks run there.
        executed: The folder of the executed copies.

    Returns:
        All chapters, and how many of them failed.
    """
    executed.mkdir(parents=True, exist_ok=True)
    sources = sorted((top / "notebooks").glob("*.ipynb"))
    chapters = [Chapter(source, executed / source.name) for source in sources]
    remove_leftovers(chapters, executed)
    stale = {}
    for chapter in chapters:
        key = notebook_key(chapter.source, top)
        if chapter.run_info().get("key") == key:
            print(f"notebooks/{chapter.source.name} is up to date")
        else:
            stale[chapter] = key
    use_own_kernel()
    with ThreadPoolExecutor(min(AT_ONCE, cores())) as pool:
        ran = list(pool.map(lambda chapter: run(chapter, stale[chapter], top), stale))
    return chapters, ran.count(False)


def remove_leftovers(chapters: list[Chapter], executed: Path) -> None:
    """Remove what deleted notebooks, killed runs or editors have left behind."""
    kept = {
        path
        for chapter in chapters
        for path in (chapter.target, chapter.sidecar, chapter.records)
    } | {executed / name for name in TABLES}
    for path in set(executed.iterdir()) - kept:
        if path.is_dir() and not path.is_symlink():  # such as .ipynb_checkpoints
            shutil.rmtree(path)
        else:
            path.unlink()


def run(chapter: Chapter, key: str, top: Path) -> bool:
    """Run one notebook with its own default parameters.

    A failed notebook leaves no executed copy behind.

    Returns:
        Whether it ran to the end.
    """
    import papermill  # slow to import, and not needed when all is up to date

    print(f"notebooks/{chapter.source.name} is running", flush=True)
    part = chapter.target.with_suffix(".part.ipynb")
    # Nothing is carried over from an earlier run: the page's run time covers all that
    # it shows.
    chapter.records.unlink(missing_ok=True)
    start = time.perf_counter()
    try:
        papermill.execute_notebook(
            chapter.source,
            part,
            parameters={"records_file": os.path.relpath(chapter.records, top)},
            kernel_name="python3",
            cwd=top,
            progress_bar=False,  # several run at once
            extra_arguments=["--log-level=ERROR"],
        )
    except Exception as error:  # papermill's, a dead kernel, a broken file: all say why
        chapter.forget()
        part.unlink(missing_ok=True)
        print(f"notebooks/{chapter.source.name} failed{place(error)}", file=sys.stderr)
        print(error, file=sys.stderr)
        return False
    seconds = round(time.perf_counter() - start, 1)
    part.replace(chapter.target)
    info = {"key": key, "seconds": seconds, **origin(top)}
    chapter.sidecar.write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    print(f"notebooks/{chapter.source.name} has run, {seconds:.0f} s", flush=True)
    return True


def use_own_kernel() -> None:
    """Make "python3" mean this environment's kernel, on one core, unless told."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    os.environ["JUPYTER_PATH"] = os.path.join(sys.prefix, "share", "jupyter")


def place(error: Exception) -> str:
    """Where a notebook failed, as far as the error says."""
    if not hasattr(error, "cell_index"):
        return f" ({type(error).__name__})"
    # Counted from 1, without the cell of parameters that papermill puts before it.
    return f" in cell {error.cell_index}: {error.ename}: {error.evalue}"


def origin(top: Path) -> dict:
    """Where and when a run was made."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(top),
        "machine": machine(),
        "versions": versions(),
    }


def commit(top: Path) -> str:
    """The commit of the repository, marked if files differ from it."""
    command = ["git", "-C", str(top), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def machine() -> dict:
    """The processor, the cores that this process may use, and the memory in GB."""
    return {
        "processor": processor(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cores() -> int:
    """How many cores this process may use."""
    every = range(os.cpu_count() or 1)
    return len(getattr(os, "sched_getaffinity", lambda _: every)(0))


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return platform.processor() or "unknown"
