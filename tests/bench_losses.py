"""`make bench` on a GPU: how near the loss kernels are to the speed of memory.

Each loss is compiled, forward and backward. The least that both must move is the logits
and the labels twice (read) and the gradient once (written). That, over the seconds it
takes, is set beside a copy from memory to memory in the same run: it should be 0.7 of
it or more, and 3 times as fast as without the compiler.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nlhelpers import losses, noise

EXAMPLES = 2**20
CLASSES = (10, 100, 1000)
DTYPES = (torch.bfloat16, torch.float32)


def kernels(K: int, device: torch.device) -> dict[str, losses.Loss]:
    """The losses by name, those that need T with one of K classes."""
    T = noise.symmetric(0.2, K).to(device, torch.float32)
    inverse = noise.inverse(T).to(device, torch.float32)
    return {
        "cross-entropy": losses.cross_entropy,
        "unhinged": losses.unhinged,
        "sigmoid": losses.sigmoid,
        "savage": losses.savage,
        "bootstrap soft": losses.bootstrap_soft,
        "bootstrap hard": losses.bootstrap_hard,
        "generalised": losses.generalised_cross_entropy,
        "symmetric": losses.symmetric_cross_entropy,
        "forward": partial(losses.forward, transition=T),
        "backward": partial(losses.backward, inverse=inverse),
    }


def seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median time of a call, after three to warm up."""
    times = []
    for _ in range(3 + rounds):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def both_ways(
    loss: losses.Loss, logits: Tensor, labels: Tensor
) -> Callable[[], Tensor]:
    """A call that computes the mean loss and its gradient."""

    def call() -> Tensor:
        (gradient,) = torch.autograd.grad(loss(logits, labels).mean(), logits)
        return gradient

    return call


def bench(device: torch.device, rounds: int, examples: int = EXAMPLES) -> None:
    """Print GB/s, the share of a copy's, and the ratio to eager, of every loss."""
    for K in CLASSES:
        for dtype in DTYPES:
            logits = torch.randn(examples, K, device=device, dtype=dtype)
            labels = torch.randint(K, (examples,), device=device)
            target = torch.empty_like(logits)
            size = logits.numel() * logits.element_size()
            copied = 2 * size / seconds(partial(target.copy_, logits), device, rounds)
            least = 3 * size + 2 * labels.numel() * labels.element_size()
            del target
            logits.requires_grad_()
            for name, loss in kernels(K, device).items():
                eager = seconds(both_ways(loss, logits, labels), device, rounds)
                fused = torch.compile(loss)
                taken = seconds(both_ways(fused, logits, labels), device, rounds)
                speed = least / taken
                print(
                    f"{name:15} K = {K:4}, {str(dtype)[6:]:8}: {speed / 1e9:6,.0f} "
                    f"GB/s, {speed / copied:.2f} of a copy, {eager / taken:.1f} x eager"
                )
