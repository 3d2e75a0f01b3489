"""Records: whole or not at all, whatever the disk does, and whose code made them."""

import builtins
import errno
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nlhelpers import experiments, records
from nlhelpers.grids import recorded
from nlhelpers.records import RecordError
from nlhelpers.specs import Spec

RECORD = {"spec": {"seed": 1}, "last_accuracy": 0.5}


@pytest.fixture
def path(tmp_path):
    """A file with one record."""
    path = tmp_path / "deep" / "runs.jsonl"
    records.append(path, RECORD)
    return path


# ---------------------------------------------------------------- reading, appending


def test_records_come_back_in_order(path):
    more = [{"spec": {"seed": k}, "text": "line\nbreak, ä"} for k in range(5)]
    for record in more:
        records.append(path, record)
    assert records.read(path) == [RECORD, *more]
    assert len(path.read_bytes().splitlines()) == 6


def test_a_folder_is_read_file_by_file_without_the_folders_in_it(path):
    folder = path.parent
    records.append(folder / "b.jsonl", {"spec": {"seed": 2}})
    (folder / "notes.txt").write_text("no record")
    records.append(folder / "repeated" / "c.jsonl", {"spec": {"seed": 3}})
    assert [r["spec"]["seed"] for r in records.read(folder)] == [2, 1]


def test_nothing_is_no_records(tmp_path):
    assert records.read(tmp_path / "none.jsonl") == []
    assert records.read(tmp_path) == []


def test_a_nan_is_no_number_for_a_record(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        records.append(path, {"spec": {}, "loss": float("nan")})
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_cut_off_line_is_one_error_and_stays(path, cut):
    records.append(path, RECORD)
    path.write_bytes(path.read_bytes()[:-cut])
    before = path.read_bytes()
    for act in (lambda: records.read(path), lambda: records.append(path, RECORD)):
        with pytest.raises(RecordError, match=f"{path}, line 2 is cut off.*delete"):
            act()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "line", [b"{broken}", b"", b"\xff\xfe", b"{}", b"3", b'"text"', b"[]", b"null"]
)
def test_a_line_that_is_no_record(path, line):
    before = path.read_bytes() + line + b"\n"
    path.write_bytes(before + before)
    with pytest.raises(RecordError, match=f"{path}, line 2 is not a record"):
        recorded(path)
    assert path.read_bytes() == before + before


def test_a_file_that_cannot_be_read(path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        for module, name in ((io, "open"), (builtins, "open"), (os, "open")):
            patch.setattr(module, name, refuse)
        with pytest.raises(RecordError, match=f"{path}.*Permission denied"):
            records.read(path)


# ---------------------------------------------------------------- disks that refuse


@pytest.mark.parametrize("act", ["append", "check_writable"])
def test_no_folder_can_be_made_there(act, path):
    before = path.read_bytes()
    below = path / "folder" / "runs.jsonl"  # path is a file
    call = {"append": lambda: records.append(below, RECORD)}.get(
        act, lambda: records.check_writable(below)
    )
    with pytest.raises(RecordError, match=f"cannot write records to {below}"):
        call()
    assert path.read_bytes() == before


@pytest.mark.parametrize("act", ["append", "check_writable"])
def test_read_only_folder(act, path, monkeypatch):
    before = path.read_bytes()

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        patch.setattr(io, "open", refuse)
        message = f"cannot write records to {path}: Read-only file system"
        with pytest.raises(RecordError, match=message):
            if act == "append":
                records.append(path, RECORD)
            else:
                records.check_writable(path)
    assert path.read_bytes() == before


def test_a_file_system_without_locks_is_met_before_training(path, monkeypatch):
    before = path.read_bytes()

    def refuse(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(records, "flock", refuse)
        message = f"cannot lock {path}: No locks available; its file system has no"
        for act in (records.check_writable, lambda path: records.append(path, RECORD)):
            with pytest.raises(RecordError, match=message):
                act(path)
    assert path.read_bytes() == before


def test_the_commit_is_that_of_this_package_alone(tmp_path, monkeypatch):
    """Installed below somebody's own project, it has none."""
    monkeypatch.setattr(records, "PACKAGE", tmp_path / "site-packages")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "__init__.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for words in ("init -q", "commit -q --allow-empty -m theirs"):
        subprocess.run([*git, *words.split()], check=True)
    assert records.commit.__wrapped__() is None
    subprocess.run([*git, "add", "."], check=True)
    assert len(records.commit.__wrapped__()) == 40


def test_a_folder_is_no_file(tmp_path):
    for act in (records.check_writable, lambda path: records.append(path, RECORD)):
        with pytest.raises(RecordError, match=r"cannot write records to .*directory"):
            act(tmp_path)


@pytest.mark.parametrize("room", [0, 10])
def test_full_disk(path, room):
    """The system itself stops writing after `room` more bytes."""
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
    try:
        with pytest.raises(RecordError) as caught:
            records.append(path, RECORD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write records to {path}" in str(caught.value)
    assert path.read_bytes() == before
    records.append(path, RECORD)
    assert records.read(path) == [RECORD, RECORD]


def test_no_space_left(path, monkeypatch):
    before = path.read_bytes()
    write = os.write
    refusals = [
        lambda file, line: write(file, line[:7]),
        lambda file, line: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")),
    ]
    for refuse in refusals:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", refuse)
            with pytest.raises(RecordError, match=r"(?i)no space"):
                records.append(path, RECORD)
        assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_device_that_is_always_full():
    with pytest.raises(
        RecordError, match="cannot write records to /dev/full: No space"
    ):
        records.append(Path("/dev/full"), RECORD)


def test_check_writable_leaves_things_as_they_are(path, tmp_path):
    before = path.read_bytes()
    records.check_writable(path)
    assert path.read_bytes() == before
    fresh = tmp_path / "new" / "runs.jsonl"
    records.check_writable(fresh)
    assert records.read(fresh) == []


def test_check_writable_deletes_nothing_that_another_process_just_wrote(
    tmp_path, monkeypatch
):
    path = tmp_path / "runs.jsonl"
    opened = Path.open

    def open_while_another_writes(self, *args, **kwargs):
        file = opened(self, *args, **kwargs)
        os.write(file.fileno(), json.dumps(RECORD).encode() + b"\n")
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_while_another_writes)
        records.check_writable(path)
    if not path.exists():  # it may be checked in another way than by opening it
        records.append(path, RECORD)
        pytest.fail("a record that another process wrote is gone")


# ---------------------------------------------------------------- two at a time

WRITER = """
import sys
from pathlib import Path
from nlhelpers import records

path, name = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
input()
for k in range(100):
    records.append(path, {"spec": {"seed": k}, "name": name, "text": name * 40_000})
"""


def start(name, path):
    """A process that appends a hundred records once it is told to."""
    top = str(records.PACKAGE.parent)  # this very package, wherever pytest runs
    paths = [top, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )


def test_processes_that_append_at_once_do_not_interleave(path):
    with start("a", path) as a, start("b", path) as b:
        for writer in (a, b):
            assert writer.stdout.readline() == "ready\n"
        for writer in (a, b):
            writer.stdin.write("\n")
            writer.stdin.flush()
        while a.poll() is None or b.poll() is None:
            records.read(path)  # a reader sees whole lines as well
        assert (a.returncode, b.returncode) == (0, 0), a.stderr.read() + b.stderr.read()
    found = records.read(path)[1:]
    for name in "ab":
        mine = [record["spec"]["seed"] for record in found if record["name"] == name]
        assert mine == list(range(100))
    assert all(record["text"] == record["name"] * 40_000 for record in found)


# ---------------------------------------------------------------- provenance


def test_a_record_says_where_it_comes_from(cpu):
    record = experiments.run(Spec(profile="smoke"), cpu)
    assert record["device"].endswith(f"{os.cpu_count()} cores")
    assert record["threads"] == torch.get_num_threads()
    assert record["precision"] == "float32"  # no convolutions, and no GPU
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(record["versions"]) >= {"python", "numpy", "torchvision", "nlhelpers"}
    assert record["date"].endswith("+00:00")
    assert len(record["source"]) == 12
    assert record["seconds"] > 0
    assert record["images_per_second"] > 0
    assert record["peak_memory_mb"] > 50
    assert record["commit"] is None or len(record["commit"]) == 40
    json.dumps(record, allow_nan=False)
