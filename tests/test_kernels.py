"""The kernels of a GPU against the losses they stand for: in Python, without one.

`conftest` asks Triton for that.
"""

import inspect
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from nlhelpers import losses, noise

kernels = pytest.importorskip("nlhelpers.kernels")

# Numpy tells of rows beyond the last, which a tile has and nobody reads.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 67  # not a whole number of tiles

# name -> arguments besides the defaults, by the number of classes
CASES = {
    "cross_entropy": lambda K: {},
    "unhinged": lambda K: {},
    "unhinged, symmetric": lambda K: {"others": -1 / (K - 1)},
    "sigmoid": lambda K: {},
    "sigmoid, symmetric": lambda K: {"others": -1.0},
    "savage": lambda K: {},
    "bootstrap_soft": lambda K: {},
    "bootstrap_hard": lambda K: {"beta": 0.5},
    "generalised_cross_entropy": lambda K: {},
    "generalised_cross_entropy, q = 1": lambda K: {"q": 1.0},
    "symmetric_cross_entropy": lambda K: {"beta": 0.5},
    "forward": lambda K: {"transition": transition(K)},
    "backward": lambda K: {"inverse": noise.inverse(transition(K))},
}


def transition(K):
    """T of two kinds of noise at once, so that no two rows or columns are alike."""
    return noise.symmetric(0.2, K) @ noise.pair_flip(0.3, K)


def both(loss, logits, labels, above):
    """Values and the gradient, float64."""
    logits = logits.clone().requires_grad_()
    values = loss(logits, labels)
    (slopes,) = torch.autograd.grad(values, logits, above.to(values))
    return values.detach().double(), slopes.double()


def case(name, K, dtype=torch.float64):
    """A kernel and the loss it stands for; T is what is left of it in the dtype."""
    given, name = CASES[name](K), name.split(",")[0]
    given = {
        key: value.to(dtype).double().to(DEVICE) if torch.is_tensor(value) else value
        for key, value in given.items()
    }
    return partial(getattr(kernels, name), **given), partial(
        getattr(losses, name), **given
    )


def data(K, scale, dtype=torch.float32):
    generator = torch.Generator().manual_seed(K)
    logits = scale * torch.randn(ROWS, K, generator=generator)
    labels = torch.randint(K, (ROWS,), generator=generator)
    above = 0.5 + torch.rand(ROWS, generator=generator)
    return logits.to(DEVICE, dtype), labels.to(DEVICE), above.to(DEVICE)


@pytest.mark.parametrize("name", {name.split(",")[0]: None for name in CASES})
def test_a_kernel_takes_the_place_of_its_loss(name):
    mine, theirs = (getattr(module, name) for module in (kernels, losses))
    assert inspect.signature(mine) == inspect.signature(theirs)


@pytest.mark.parametrize("K", [2, 10, 100])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_loss(name, K):
    kernel, loss = case(name, K)
    logits, labels, above = data(K, scale=3.0)
    found = both(kernel, logits, labels, above)
    expected = both(loss, logits.double(), labels, above)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_computed_in_float32(name):
    kernel, loss = case(name, 10, torch.bfloat16)
    logits, labels, above = data(10, scale=3.0, dtype=torch.bfloat16)
    above = above.to(logits.dtype)
    values, slopes = both(kernel, logits, labels, above)
    expected = both(loss, logits.double(), labels, above)
    torch.testing.assert_close((values, slopes), expected, rtol=1e-2, atol=1e-2)
    assert kernel(logits, labels).dtype == torch.bfloat16


@pytest.mark.parametrize("name", CASES)
def test_extreme_logits(name):
    """As the loss itself has it; where a gradient is finite, it is the same."""
    kernel, loss = case(name, 3)
    rows = [[1e4, 0, -1e4], [-1e4, -1e4, -1e4], [0, 1e4, 1e4], [-1e4, 0, 1e4]]
    logits = torch.tensor(rows, device=DEVICE)
    labels = torch.tensor([2, 0, 1, 0], device=DEVICE)
    above = torch.ones(4, device=DEVICE)
    values, slopes = both(kernel, logits, labels, above)
    expected, slopes_expected = both(loss, logits.double(), labels, above)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert slopes.isfinite().all()
    torch.testing.assert_close(slopes, slopes_expected, rtol=1e-4, atol=1e-4)


def test_equal_largest_logits_share_the_gradient():
    kernel, loss = case("bootstrap_hard", 4)
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    labels, above = torch.tensor([2, 0], device=DEVICE), torch.ones(2, device=DEVICE)
    found = both(kernel, logits, labels, above)
    expected = both(loss, logits.double(), labels, above)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_label_that_the_noise_never_gives():
    T = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=DEVICE)
    logits, labels = torch.zeros(1, 2, device=DEVICE), torch.tensor([1], device=DEVICE)
    assert kernels.forward(logits, labels, T).item() == float("inf")


@pytest.mark.parametrize("name", ["cross_entropy", "forward"])
def test_a_sum_of_logits_that_do_not_lie_row_by_row(name):
    """The sum's gradient is one number for all rows, in one place of memory."""
    kernel, loss = case(name, 10)
    logits, labels, _ = data(10, scale=3.0)
    turned = logits.T.contiguous().T
    found, expected = (
        torch.autograd.grad(f(x, labels).sum(), x)[0].double()
        for f, x in (
            (kernel, turned.requires_grad_()),
            (loss, logits.double().requires_grad_()),
        )
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_labels_that_do_not_lie_side_by_side():
    logits = torch.randn(4, 3, device=DEVICE)
    labels = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]], device=DEVICE)[:, 0]
    found = kernels.cross_entropy(logits, labels)
    torch.testing.assert_close(found, losses.cross_entropy(logits, labels))


@pytest.mark.parametrize("name", ["savage", "backward"])
def test_the_compiler_takes_a_kernel_as_it_is(name):
    torch.compiler.reset()
    kernel, _ = case(name, 10)
    logits, labels, above = data(10, scale=3.0)
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    found = both(compiled, logits, labels, above)
    torch.testing.assert_close(found, both(kernel, logits, labels, above))


@pytest.mark.parametrize("K", [2, 3, 10, 64, 100, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_hold_whole_rows(K, dtype):
    shape = kernels.tile(torch.zeros(1, K, dtype=dtype))
    for name in ("ROWS", "COLUMNS", "PARTS"):
        assert shape[name] & (shape[name] - 1) == 0, name  # Triton has powers of 2 only
    assert K <= shape["COLUMNS"] * shape["PARTS"] < 4 * K


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * 2 * 10
