"""Saved runs: one line of JSON each, appended whole or not at all, with provenance."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from nlhelpers import __version__, sources

try:
    from fcntl import LOCK_EX, LOCK_SH, flock
except ImportError:  # Windows has no such locks: there, one process at a time
    LOCK_EX = LOCK_SH = 0

    def flock(file: int, kind: int) -> None:
        """Do nothing."""


Record = dict[str, Any]
PACKAGE = Path(__file__).parent
BINARY = getattr(os, "O_BINARY", 0)  # on Windows; elsewhere all files are
SAVED = PACKAGE.parent / "book" / "records"  # the book's runs, in a checkout
REPEATED = SAVED / "repeated"  # some of them again, on another kind of device


class RecordError(RuntimeError):
    """A record file cannot be read or written; the message names it."""


def append(path: Path, record: Record) -> None:
    """Append one record, so that the file holds either all of it or none of it.

    Raises:
        RecordError: if the folder is read-only, the disk is full, the file cannot be
            locked or ends in the middle of a line; what was there before stays as it
            was.
    """
    path = Path(path)
    line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | BINARY, 0o644)
    except OSError as error:
        raise RecordError(
            f"cannot write records to {path}: {error.strerror}"
        ) from error
    try:
        _lock(file, path)
        before = os.fstat(file).st_size
        if before:
            os.lseek(file, before - 1, os.SEEK_SET)
            if os.read(file, 1) != b"\n":
                raise RecordError(_cut_off(path))
        try:
            if os.write(file, line) != len(line):
                raise OSError(None, "no space left for the whole record")
            os.fsync(file)
        except OSError as error:
            with contextlib.suppress(OSError):  # a device has no length to restore
                os.ftruncate(file, before)
            message = f"cannot write records to {path}: {error.strerror}"
            raise RecordError(message) from error
    finally:
        os.close(file)


def check_writable(path: Path) -> None:
    """Raise RecordError now, not after hours of training, if nothing can be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:  # leaves an empty file where there was none
            _lock(stream.fileno(), path)
    except OSError as error:
        raise RecordError(
            f"cannot write records to {path}: {error.strerror}"
        ) from error


def _lock(file: int, path: Path) -> None:
    """Lock an open file until it is closed; others wait for their turn."""
    try:
        flock(file, LOCK_EX)
    except OSError as error:
        raise RecordError(
            f"cannot lock {path}: {error.strerror}; its file system has no locks, or "
            "they are off, so write records to another one"
        ) from error


def read(path: Path) -> list[Record]:
    """All records of a .jsonl file, or of all such files in a folder; [] if none.

    Raises:
        RecordError: for a line that is not a record; it names the file and the line.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [record for file in files if file.exists() for record in _lines(file)]


def _lines(file: Path) -> Iterator[Record]:
    try:
        with file.open("rb") as stream:
            flock(stream.fileno(), LOCK_SH)  # no line is half written
            text = stream.read()
    except OSError as error:
        raise RecordError(f"cannot read records of {file}: {error.strerror}") from error
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            raise RecordError(_cut_off(file))
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or "spec" not in record:
            raise RecordError(
                f"{file}, line {number} is not a record; delete that line"
            )
        yield record


def _cut_off(file: Path) -> str:
    number = file.read_bytes().count(b"\n") + 1
    return (
        f"{file}, line {number} is cut off in the middle; delete that line (the others "
        "are whole) and run again"
    )


def provenance(device: torch.device, source: str) -> Record:
    """Where a record comes from: device, versions, commit and source hash."""
    packages = ("torch", "torchvision", "numpy", "scikit-learn")
    versions = {package: importlib.metadata.version(package) for package in packages}
    versions |= {"python": platform.python_version(), "nlhelpers": __version__}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": versions,
        "commit": commit(),
        "source": source,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or "CPU"
    return f"{name}, {os.cpu_count()} cores"


def peak_memory(device: torch.device) -> float | None:
    """Largest memory held, in MB: on a GPU by this run, on a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


@functools.cache
def commit() -> str | None:
    """The commit of the checkout this package runs from; None outside one."""
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")  # not in somebody else's
        return _git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    call = ["git", "-C", str(PACKAGE), *words]
    found = subprocess.run(call, capture_output=True, text=True, check=True)
    return found.stdout.strip()


# The hash of the code behind a number


@functools.cache
def source_hash(*made_by: object, besides: tuple[object, ...] = ()) -> str:
    """Hash of the code of functions and classes, as `sources.definitions` finds it.

    Comments, docstrings and empty lines do not count, so that a record outlives a
    better sentence; nor does code that the number does not depend on.
    """
    found = sources.definitions(*made_by, besides=besides)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
