"""What every test relies on: no network, and small data to train on."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

if not torch.cuda.is_available():  # before torchvision, which loads Triton
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run in Python

import torchvision

from nlhelpers import experiments, records, training
from nlhelpers.specs import Spec
from nlhelpers.training import Recipe, Setup

TOP = Path(__file__).resolve().parent.parent
LOCAL = {"localhost", "127.0.0.1", "::1"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Only this machine can be reached: a test that downloads something fails."""
    connect = socket.socket.connect

    def connect_locally(self, address):
        if self.family != socket.AF_UNIX and address[0] not in LOCAL:
            raise URLError(f"tests have no network, so not {address}")
        return connect(self, address)

    def refuse(*args, **kwargs):
        raise URLError("tests have no network")

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)


@pytest.fixture(autouse=True)
def fresh_hashes():
    """No source hash from a test that has patched the code behind it."""
    records.source_hash.cache_clear()


@pytest.fixture
def cpu():
    return torch.device("cpu")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def prepared(cpu):
    """Digits with asymmetric noise, as a method sees them, and their truth."""
    spec = Spec(noise="asymmetric", noise_rate=0.4, profile="smoke")
    return experiments.prepare(spec, cpu)


@pytest.fixture
def make_setup(cpu):
    """A setup of a few short epochs; keywords change the recipe."""

    def make(seed=0, **changes):
        recipe = Recipe(**{"epochs": 2, "batch_size": 32} | changes)
        return Setup("mlp", recipe, torch.Generator(cpu).manual_seed(seed))

    return make


@pytest.fixture
def steps(monkeypatch):
    """The function that each training of the test takes its steps by, in order."""
    found = []
    fit = training.fit

    def noted(model, images, epoch, step, *rest, **options):
        found.append(step)
        return fit(model, images, epoch, step, *rest, **options)

    monkeypatch.setattr(training, "fit", noted)
    return found


@pytest.fixture
def seeded(cpu):
    """Everything drawn in the test depends on seed 0."""
    with training.seeded(0, cpu) as generator:
        yield generator


@pytest.fixture
def papermill(tmp_path):
    """Run a notebook from the top of the checkout; returns the finished process."""

    def run(notebook, *words):
        given = {"profile": "smoke", "device": "cpu"}
        given["records_file"] = str(tmp_path / "runs.jsonl")
        options = [w for name, value in given.items() for w in ("-p", name, value)]
        call = [sys.executable, "-m", "papermill", str(notebook)]
        paths = [str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.run(
            [*call, str(tmp_path / "out.ipynb"), *options, *words],
            capture_output=True,
            text=True,
            cwd=TOP,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )

    return run
