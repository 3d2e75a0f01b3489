"""Compile every loss kernel for a GPU (compute capability 9.0), which need not be here.

A program of its own: Triton either compiles kernels or, for other tests, runs them in
Python. It prints how many it compiled.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nlhelpers import kernels

TARGET = GPUTarget("cuda", 90, 32)
LOSSES = ("unhinged", "sigmoid", "cross_entropy", "generalised", "symmetric")
LOSSES += ("savage", "bootstrap_soft", "bootstrap_hard", "forward", "backward")
TYPES = {"i32": ("N", "stride"), "fp32": ("a", "b"), "*i64": ("labels",)}


def compile_one(kernel: object, loss: str, K: int, dtype: torch.dtype) -> None:
    """Compile a kernel as `kernels` would start it for logits (N, K)."""
    shape = kernels.tile(torch.zeros(1, K, dtype=dtype))
    options = {"num_warps": shape.pop("num_warps")}
    fixed = shape | {"K": K, "LOSS": loss, "SWAP": shape["COLUMNS"] == 2}
    types = {name: kind for kind, names in TYPES.items() for name in names}
    logits = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    signature = {
        name: "constexpr" if name in fixed else types.get(name, logits)
        for name in kernel.arg_names
    }
    source = ASTSource(
        kernel,
        signature,
        {(i,): fixed[n] for i, n in enumerate(kernel.arg_names) if n in fixed},
    )
    triton.compile(source, target=TARGET, options=options)


if __name__ == "__main__":
    made = 0
    for loss in LOSSES:
        for K, dtype in ((10, torch.float32), (100, torch.bfloat16)):
            for kernel in (kernels.values_kernel, kernels.slopes_kernel):
                compile_one(kernel, loss, K, dtype)
                made += 1
    print(made)
