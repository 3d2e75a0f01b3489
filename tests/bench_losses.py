"""`make bench` on a GPU: how near the loss kernels are to the speed of memory.

Each loss is compiled, forward and backward. The least that both must move is the logits
and the labels twice (read) and the gradient once (written). That, over the seconds it
takes, is set beside a copy from memory to memory in the same run: it should be 0.7 of
it or more, and 3 times as fast as without the compiler.

What is timed is the card alone: calls are replayed as a CUDA graph. Of a call on few
classes that Python starts, one would time the starting.
"""

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


def seconds(call: Callable[[], object]) -> float:
    """The median time that the card takes for a call."""
    from triton.testing import do_bench_cudagraph  # comes with torch for GPUs

    return do_bench_cudagraph(call, return_mode="median") / 1000


def mean_of(loss: losses.Loss) -> losses.Loss:
    """The mean loss, as a training step has it."""

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        return loss(logits, labels).mean()

    return mean


def both_ways(
    loss: losses.Loss, logits: Tensor, labels: Tensor
) -> Callable[[], Tensor]:
    """A call that computes a mean loss and its gradient."""

    def call() -> Tensor:
        (gradient,) = torch.autograd.grad(loss(logits, labels), logits)
        return gradient

    return call


def bench(device: torch.device, examples: int = EXAMPLES) -> None:
    """Print GB/s, the share of a copy's, and the ratio to eager, of every loss."""
    for K in CLASSES:
        for dtype in DTYPES:
            logits = torch.randn(examples, K, device=device, dtype=dtype)
            labels = torch.randint(K, (examples,), device=device)
            target = torch.empty_like(logits)
            size = logits.numel() * logits.element_size()
            copied = 2 * size / seconds(partial(target.copy_, logits))
            least = 3 * size + 2 * labels.numel() * labels.element_size()
            del target
            logits.requires_grad_()
            for name, loss in kernels(K, device).items():
                mean = mean_of(loss)
                eager = seconds(both_ways(mean, logits, labels))
                torch.compiler.reset()  # else not for this K alone, or not at all
                fused = torch.compile(mean, fullgraph=True)
                taken = seconds(both_ways(fused, logits, labels))
                speed = least / taken
                print(
                    f"{name:15} K = {K:4}, {str(dtype)[6:]:8}: {speed / 1e9:6,.0f} "
                    f"GB/s, {speed / copied:.2f} of a copy, {eager / taken:.1f} x eager"
                )
