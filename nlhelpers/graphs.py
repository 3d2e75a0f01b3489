"""A training step as one CUDA graph, from the forward pass to the update.

A step of a small network is some thirty kernels of a few microseconds each, and
starting them from Python takes many times as long. Here the first batch of an epoch is
an ordinary step, the second one is recorded, and all others replay the recording with
one call.

Kernels are recorded, and the addresses that they use. A step may change tensors that it
knows; but whatever else it reads, like a number or the learning rate, stays as it was
at the recording, and may change between epochs only.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, distributed

# The whole work of a step: from what it is given, (B, ...) each, to its loss, a scalar.
Whole = Callable[..., Tensor]


def used_on(device: torch.device) -> bool:
    """Whether steps are recorded: on a GPU, unless several processes train together."""
    together = distributed.is_available() and distributed.is_initialized()
    return device.type == "cuda" and not together


class Recorded:
    """A step that is first taken as it is, then recorded, then replayed."""

    def __init__(self, whole: Whole) -> None:
        """Keep the step; nothing is recorded yet."""
        self.whole = whole
        self.anew()

    def anew(self) -> None:
        """Start again: the next call is taken as it is, the one after it recorded."""
        self.replay: Whole | None = None
        self.shapes: list[torch.Size] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss of one batch, (B, ...) each."""
        shapes = [tensor.shape for tensor in inputs]
        if shapes != self.shapes:  # the first batch, or a last one with fewer images
            self.shapes = self.shapes or shapes
            return self.whole(*inputs)
        if self.replay is None:
            self.replay = record(self.whole, inputs)
        return self.replay(*inputs)


def record(whole: Whole, inputs: tuple[Tensor, ...]) -> Whole:
    """A function that does the work of `whole` as one CUDA graph.

    Args:
        whole: what to record; recording does not carry it out.
        inputs: like those that the function will be given, (B, ...) each.
    """
    held = [tensor.clone() for tensor in inputs]
    graph, room = torch.cuda.CUDAGraph(), room_on(held[0].device)
    torch.cuda.synchronize()
    with torch.cuda.stream(room.stream):
        graph.capture_begin(pool=room.memory)
        try:
            loss = whole(*held)
        finally:
            graph.capture_end()
    room.latest = graph

    def replay(*inputs: Tensor) -> Tensor:
        for place, tensor in zip(held, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return loss.clone()  # the next replay writes to the same place

    return replay


class Room:
    """Where a process records on a device: a stream, and memory for all its graphs."""

    def __init__(self, device: torch.device) -> None:
        """Reserve both; on the default stream nothing can be recorded."""
        self.stream = torch.cuda.Stream(device)
        self.memory = torch.cuda.graph_pool_handle()
        self.latest: torch.cuda.CUDAGraph | None = None  # keeps the memory alive


@functools.cache
def room_on(device: torch.device) -> Room:
    """The one room of a device."""
    return Room(device)
