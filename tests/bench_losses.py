"""`make bench` on a GPU: how near the loss kernels are to the speed of memory.

Each loss is taken forward and backward, as the compiler has it and as `kernels` has it.
The least that both must move is the logits and the labels twice (read) and the gradient
once (written). That, over the seconds it takes, is set beside a copy from memory to
memory in the same run: it should be 0.7 of it or more, and 3 times as fast as eager.

What is timed is the card alone: calls are replayed as a CUDA graph. Of a call on few
classes that Python starts, one would time the starting.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from nlhelpers import losses, noise

WAYS = "compiled", "kernel"
EXAMPLES = 2**20
CLASSES = (10, 100, 1000)
DTYPES = (torch.bfloat16, torch.float32)


def named(K: int, device: torch.device, module: ModuleType) -> dict[str, losses.Loss]:
    """A module's losses by name, those that need T with one of K classes."""
    T = noise.symmetric(0.2, K).to(device, torch.float32)
    inverse = noise.inverse(T).to(device, torch.float32)
    return {
        "cross-entropy": module.cross_entropy,
        "unhinged": module.unhinged,
        "sigmoid": module.sigmoid,
        "savage": module.savage,
        "bootstrap soft": module.bootstrap_soft,
        "bootstrap hard": module.bootstrap_hard,
        "generalised": module.generalised_cross_entropy,
        "symmetric": module.symmetric_cross_entropy,
        "forward": partial(module.forward, transition=T),
        "backward": partial(module.backward, inverse=inverse),
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
    from nlhelpers import kernels  # needs Triton, which comes with torch for GPUs

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
            ways = [named(K, device, module) for module in (losses, kernels)]
            for name, loss in ways[0].items():
                eager = seconds(both_ways(mean_of(loss), logits, labels))
                line = f"{name:15} K = {K:4}, {str(dtype)[6:]:8}:"
                for way, by_name in zip(WAYS, ways, strict=True):
                    torch.compiler.reset()  # else not for this K alone, or not at all
                    fused = torch.compile(mean_of(by_name[name]), fullgraph=True)
                    taken = seconds(both_ways(fused, logits, labels))
                    speed = least / taken
                    line += f"  {way} {speed / 1e9:6,.0f} GB/s, {speed / copied:.2f} "
                    line += f"of a copy, {eager / taken:4.1f} x eager"
                print(line)
