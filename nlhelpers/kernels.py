"""The losses of `losses` for a GPU: one Triton kernel forward and one backward.

They are for logits by the million, whose loss should cost no more than reading and
writing them; what torch's compiler makes of `losses` takes up to seven times as long.
For the small batches of this book's networks the compiled code starts fewer kernels, so
training uses `losses`.

A program has a tile of (rows, parts, columns): a row of K logits is cut into parts of
that many columns. That way few lanes share a row, and each does most of the reduction
by itself.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from nlhelpers import losses

MOST = tl.constexpr(-math.log(losses.SMALLEST))  # nats, where a weight is negative


# Functions of a tile, in float32


@triton.jit
def total_of(x):
    """Sum of each row."""
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit
def top_of(x):
    """Largest of each row."""
    return tl.max(tl.max(x, 1), 1)


@triton.jit
def wide(row):
    """A number for each row, as a tile."""
    return row[:, None, None]


@triton.jit
def expm1(x):
    """Exp(x) - 1, near 0 by its series."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    return tl.where(tl.abs(x) < 0.2, series, tl.exp(x) - 1)


@triton.jit
def reduced(x, given, chosen, inside, w, a, b, K: tl.constexpr, LOSS: tl.constexpr):
    """For each row the loss, the largest logit, 1 / sum exp(x - it), and one more.

    What the last one is depends on the loss; `slope` uses it. Where no softmax is
    taken, only the loss counts.
    """
    if LOSS == "unhinged":
        signed = tl.where(chosen, 1.0, a) * x
        value = 1 - total_of(tl.where(inside, signed, 0.0)) / K
        top, scale, more = value, value, value
    elif LOSS == "sigmoid":
        terms = tl.sigmoid(-tl.where(chosen, 1.0, a) * x)
        value = total_of(tl.where(inside, terms, 0.0)) / K
        top, scale, more = value, value, value
    else:
        value, top, scale, more = of_softmax(x, given, inside, w, a, b, K, LOSS)
    return value, top, scale, more


@triton.jit
def of_softmax(x, given, inside, w, a, b, K: tl.constexpr, LOSS: tl.constexpr):
    """`reduced` where a softmax is taken."""
    top = top_of(x)
    z = x - wide(top)
    e = tl.exp(z)
    total = total_of(e)
    log_total = tl.log(total)
    nats = log_total - (given - top)
    if LOSS == "cross_entropy":
        value = nats
        more = nats
    elif LOSS == "generalised":
        value = -expm1(-a * nats) / a
        more = tl.exp(-a * nats)
    elif LOSS == "symmetric":
        value = a * nats + b * expm1(-nats)
        more = a - b * tl.exp(-nats)
    elif LOSS == "savage":
        p = tl.exp(-nats)
        half = tl.sigmoid(-2 * p)
        value = ((K - 1) / 4 + half * half) / K
        more = 4 * half * half * (1 - half) * p / K
    elif LOSS == "bootstrap_soft":
        more = log_total - total_of(tl.where(inside, e * z, 0.0)) / total  # entropy
        value = a * nats + (1 - a) * more
    elif LOSS == "bootstrap_hard":
        value = a * nats + (1 - a) * log_total
        more = (1 - a) / total_of(tl.where(z == 0, 1.0, 0.0))  # ties share
    elif LOSS == "forward":
        noisy = z + w
        largest = tl.maximum(top_of(noisy), -3e38)  # a label that T never gives
        more = largest + tl.log(total_of(tl.exp(noisy - wide(largest))))
        value = log_total - more
    else:
        tl.static_assert(LOSS == "backward")
        each = wide(log_total) - z
        terms = w * tl.where(w < 0, tl.minimum(each, MOST), each)
        value = total_of(tl.where(inside, terms, 0.0))
        more = total_of(tl.where((w < 0) & (each > MOST), 0.0, w))
    return value, top, 1 / total, more


@triton.jit
def slope(x, chosen, w, top, scale, more, a, K: tl.constexpr, LOSS: tl.constexpr):
    """The gradient d loss / dx; `top`, `scale` and `more` come from `reduced`."""
    y = tl.where(chosen, 1.0, 0.0)
    z = x - top
    p = tl.exp(z) * scale
    if LOSS == "unhinged":
        dx = -tl.where(chosen, 1.0, a) / K
    elif LOSS == "sigmoid":
        sign = tl.where(chosen, 1.0, a)
        s = tl.sigmoid(-sign * x)
        dx = -sign * s * (1 - s) / K
    elif LOSS == "cross_entropy":
        dx = p - y
    elif LOSS == "bootstrap_soft":
        dx = a * (p - y) - (1 - a) * p * (z + tl.log(scale) + more)
    elif LOSS == "bootstrap_hard":
        dx = p - a * y - tl.where(z == 0, more, 0.0)
    elif LOSS == "forward":
        dx = p - tl.exp(z + w - more)
    elif LOSS == "backward":
        each = -(z + tl.log(scale))
        dx = p * more - tl.where((w < 0) & (each > MOST), 0.0, w)
    else:
        dx = more * (p - y)
    return dx


# Kernels


@triton.jit
def tile_of(
    logits,
    labels,
    table,
    N,
    K: tl.constexpr,
    LOSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Where a program's tile starts, what is in it, and what `reduced` needs of it."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    n = tl.arange(0, ROWS)
    exists = n < N - first
    k = COLUMNS * tl.arange(0, PARTS)[None, :, None] + tl.arange(0, COLUMNS)
    at = wide(n * K) + k
    inside = wide(exists) & (k < K)
    x = tl.load(logits + first * K + at, inside, other=-float("inf")).to(tl.float32)
    y = tl.load(labels + first + n, exists, other=0).to(tl.int32)
    given = tl.load(logits + first * K + n * K + y, exists, other=0).to(tl.float32)
    if LOSS == "forward":
        w = tl.load(table + wide(y * K) + k, inside, other=-float("inf"))
    elif LOSS == "backward":
        w = tl.load(table + wide(y * K) + k, inside, other=0)
    else:
        w = x
    w = w.to(tl.float32)
    return first, n, exists, at, inside, k == wide(y), x, given, w


@triton.jit
def values_kernel(
    logits,
    labels,
    table,
    values,
    N,
    a,
    b,
    K: tl.constexpr,
    LOSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The loss of some rows."""
    first, n, exists, _, inside, chosen, x, given, w = tile_of(
        logits, labels, table, N, K, LOSS, ROWS, COLUMNS, PARTS
    )
    value, _, _, _ = reduced(x, given, chosen, inside, w, a, b, K, LOSS)
    tl.store(values + first + n, value.to(values.dtype.element_ty), exists)


@triton.jit
def slopes_kernel(
    logits,
    labels,
    table,
    above,
    slopes,
    N,
    stride,
    a,
    b,
    K: tl.constexpr,
    LOSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    SWAP: tl.constexpr,
):
    """The gradient of some rows; it reduces them again, which moves no more bytes.

    With SWAP, lanes exchange what they hold, so that a store is in one piece.
    """
    first, n, exists, at, inside, chosen, x, given, w = tile_of(
        logits, labels, table, N, K, LOSS, ROWS, COLUMNS, PARTS
    )
    _, top, scale, more = reduced(x, given, chosen, inside, w, a, b, K, LOSS)
    dx = slope(x, chosen, w, wide(top), wide(scale), wide(more), a, K, LOSS)
    g = tl.load(above + (first + n) * stride, exists, other=0).to(tl.float32)
    out = (dx * wide(g)).to(slopes.dtype.element_ty)
    if SWAP:
        k = tl.arange(0, PARTS * COLUMNS)[None, :]
        out = tl.reshape(out, (ROWS, PARTS * COLUMNS))
        at = n[:, None] * K + k
        inside = exists[:, None] & (k < K)
    tl.store(slopes + first * K + at, out, inside)


def tile(logits: Tensor) -> dict[str, int]:
    """The tile of a program, for logits (N, K): what both kernels are given.

    A lane loads at most 16 bytes at once, and holds about 32 logits of a row.
    """
    K, size = logits.shape[1], logits.element_size()
    whole = triton.next_power_of_2(K)
    lanes = max(1, whole // 32)  # of a row
    columns = min(lanes * (math.gcd(K * size, 16) // size), whole)
    warps = min(16, max(4, lanes // 32))
    rows = max(1, 32 * warps // lanes)
    parts = triton.next_power_of_2(triton.cdiv(K, columns))
    return {"ROWS": rows, "COLUMNS": columns, "PARTS": parts, "num_warps": warps}


@custom_op("nlhelpers::loss_values", mutates_args=())
def loss_values(
    logits: Tensor, labels: Tensor, table: Tensor | None, loss: str, a: float, b: float
) -> Tensor:
    """A loss per example.

    Args:
        logits: (N, K), contiguous; computations are in float32, whatever their type.
        labels: (N,) int64 in 0 .. K - 1.
        table: (K, K), contiguous: log T transposed for "forward", T^-1 for "backward".
        loss: one of those that `reduced` knows.
        a: parameter of the loss.
        b: parameter of the loss.

    Returns:
        (N,), of the logits' type.
    """
    N, K = logits.shape
    values, shape = logits.new_empty(N), tile(logits)
    read = logits if table is None else table
    values_kernel[(triton.cdiv(N, shape["ROWS"]),)](
        *(logits, labels, read, values, N, a, b),
        K=K,
        LOSS=loss,
        **shape,
    )
    return values


@custom_op("nlhelpers::loss_slopes", mutates_args=())
def loss_slopes(
    logits: Tensor,
    labels: Tensor,
    table: Tensor | None,
    above: Tensor,
    loss: str,
    a: float,
    b: float,
) -> Tensor:
    """The gradient for the logits, given `above` (N,), the gradient for each loss."""
    N, K = logits.shape
    slopes, shape = torch.empty_like(logits), tile(logits)
    read = logits if table is None else table
    slopes_kernel[(triton.cdiv(N, shape["ROWS"]),)](
        *(logits, labels, read, above, slopes, N, above.stride(0), a, b),
        K=K,
        LOSS=loss,
        SWAP=shape["COLUMNS"] * logits.element_size() == 8,  # as measured
        **shape,
    )
    return slopes


@loss_values.register_fake
def _(logits, labels, table, loss, a, b):
    return logits.new_empty(len(logits))


@loss_slopes.register_fake
def _(logits, labels, table, above, loss, a, b):
    return torch.empty_like(logits)


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    logits, labels, table, *ctx.rest = inputs
    ctx.save_for_backward(logits, labels, table)


def _differentiate(ctx, above: Tensor) -> tuple:
    dx = loss_slopes(*ctx.saved_tensors, above, *ctx.rest)
    return dx, None, None, None, None, None


loss_values.register_autograd(_differentiate, setup_context=_remember)


def per_example(
    logits: Tensor,
    labels: Tensor,
    loss: str,
    a: float = 0.0,
    b: float = 0.0,
    table: Tensor | None = None,
) -> Tensor:
    """A loss per example, (N,); the arguments are those of `loss_values`."""
    if table is not None:
        table = table.contiguous()
    given = logits.contiguous(), labels.contiguous()
    return loss_values(*given, table, loss, a, b)


# The losses: names and arguments are those of `losses`, which says what they are.


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`losses.cross_entropy`."""
    return per_example(logits, labels, "cross_entropy")


def unhinged(logits: Tensor, labels: Tensor, others: float = 0.0) -> Tensor:
    """`losses.unhinged`."""
    return per_example(logits, labels, "unhinged", others)


def sigmoid(logits: Tensor, labels: Tensor, others: float = 0.0) -> Tensor:
    """`losses.sigmoid`."""
    return per_example(logits, labels, "sigmoid", others)


def savage(logits: Tensor, labels: Tensor) -> Tensor:
    """`losses.savage`."""
    return per_example(logits, labels, "savage")


def bootstrap_soft(logits: Tensor, labels: Tensor, beta: float = 0.95) -> Tensor:
    """`losses.bootstrap_soft`."""
    return per_example(logits, labels, "bootstrap_soft", beta)


def bootstrap_hard(logits: Tensor, labels: Tensor, beta: float = 0.8) -> Tensor:
    """`losses.bootstrap_hard`."""
    return per_example(logits, labels, "bootstrap_hard", beta)


def generalised_cross_entropy(logits: Tensor, labels: Tensor, q: float = 0.7) -> Tensor:
    """`losses.generalised_cross_entropy`."""
    return per_example(logits, labels, "generalised", q)


def symmetric_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 0.1,
    beta: float = 1.0,
    A: float = -4.0,
) -> Tensor:
    """`losses.symmetric_cross_entropy`."""
    return per_example(logits, labels, "symmetric", alpha, beta * A)


def forward(logits: Tensor, labels: Tensor, transition: Tensor) -> Tensor:
    """`losses.forward`."""
    log_T = transition.to(logits).log()
    return per_example(logits, labels, "forward", table=log_T.T)


def backward(logits: Tensor, labels: Tensor, inverse: Tensor) -> Tensor:
    """`losses.backward`."""
    return per_example(logits, labels, "backward", table=inverse.to(logits))
