"""NVIDIA's Multi-Process Service: processes on one GPU work side by side.

Without it they take turns, and a small network's kernels leave most of a GPU idle. It
comes with the driver and needs no privileges: https://docs.nvidia.com/deploy/mps/
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

CONTROL = "nvidia-cuda-mps-control"
FOLDER = "CUDA_MPS_PIPE_DIRECTORY"  # where a process finds the service


@contextlib.contextmanager
def service() -> Iterator[dict[str, str]]:
    """The environment in which processes find a service of their own, while it runs.

    It is empty if they will find the user's, and, with a message, if none starts.
    """
    if FOLDER in os.environ:
        yield {}
        return
    if shutil.which(CONTROL) is None:
        print(f"{CONTROL} is not installed, so runs take turns on the GPU")
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        where = {FOLDER: folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        if status := control(where, "-d"):
            print(f"{CONTROL} -d ended with status {status}, so runs take turns")
            yield {}
            return
        try:
            yield where
        finally:
            control(where, words="quit -t 10\n")  # seconds for whoever still uses it


def control(where: dict[str, str], *options: str, words: str = "") -> int:
    """Call the service's control program; returns its exit status."""
    return subprocess.run(
        [CONTROL, *options],
        env=os.environ | where,
        input=words,
        text=True,
        stdout=subprocess.DEVNULL,  # a pipe would stay open as long as the service
        stderr=subprocess.DEVNULL,
    ).returncode
