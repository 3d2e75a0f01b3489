"""NVIDIA's service for processes that share a GPU: started, found and ended."""

import os

import pytest

from nlhelpers import shared_gpu


@pytest.fixture
def control(monkeypatch, tmp_path):
    """A control program that notes how it is called; `status` is what it returns."""
    program, notes = tmp_path / shared_gpu.CONTROL, tmp_path / "notes"

    def make(status=0):
        words = '[ "$1" = -d ] || read words'
        told = f'echo "$1 $words in ${shared_gpu.FOLDER}" >> {notes}'
        program.write_text(f"#!/bin/sh\n{words}\n{told}\nexit {status}\n")
        program.chmod(0o755)
        return lambda: notes.read_text().splitlines() if notes.exists() else []

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv(shared_gpu.FOLDER, raising=False)
    return make


def test_a_service_lasts_as_long_as_it_is_needed(control):
    calls = control()
    with pytest.raises(KeyError), shared_gpu.service() as where:
        folder = where[shared_gpu.FOLDER]
        assert os.path.isdir(folder)
        assert len(folder) < 80  # sockets have short names
        assert shared_gpu.FOLDER not in os.environ
        assert calls() == [f"-d  in {folder}"]
        raise KeyError
    assert calls()[1:] == [f" quit -t 10 in {folder}"]
    assert not os.path.exists(folder)


def test_the_users_own_service_is_left_alone(control, monkeypatch):
    calls = control()
    monkeypatch.setenv(shared_gpu.FOLDER, "/somewhere")
    with shared_gpu.service() as where:
        assert where == {}
    assert calls() == []


def test_without_the_program_or_when_it_fails_runs_take_turns(
    control, monkeypatch, tmp_path, capsys
):
    calls = control(status=3)
    with shared_gpu.service() as where:
        assert where == {}
    assert len(calls()) == 1
    assert "-d ended with status 3, so runs take turns" in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with shared_gpu.service() as where:
        assert where == {}
    assert "nvidia-cuda-mps-control is not installed" in capsys.readouterr().out
