"""`make bench`: what the training loop costs over a bare step, and the other bounds.

Each model is trained on random tensors with a bare step, and through `training.fit`
with real images (batches, augmentation and bookkeeping included). The two take turns,
epoch by epoch, so that a machine whose speed drifts slows both; the result is the
median of the turns' ratios. It should be 0.90 or more for `mlp` and `resnet14` on two
CPU cores.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from unittest.mock import patch

import torch
from torch import Tensor, nn

import bench_losses
from nlhelpers import (
    batches,
    data,
    evaluation,
    experiments,
    gan,
    graphs,
    grids,
    losses,
    noise,
    prototypes,
    records,
    shared_gpu,
    training,
)
from nlhelpers.methods import METHODS, nl_gan
from nlhelpers.papers import TABLES
from nlhelpers.specs import Spec
from nlhelpers.training import Setup

# Images per epoch of the benchmark, of which a GPU takes more.
SIZES = {
    "cpu": {"mlp": 25_600, "resnet14": 1_280},
    "cuda": {"mlp": 54_000, "resnet14": 12_800},
}
DATASETS = {"mlp": "mnist", "resnet14": "cifar10"}
BATCH_SIZE = 128


def bare(model: nn.Module, seen: data.NoisyData, setup: Setup) -> Callable[[], float]:
    """An epoch of bare steps on random tensors; returns its seconds."""
    shape = (BATCH_SIZE, *seen.images.shape[1:])
    device = seen.images.device
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(seen.num_classes, (BATCH_SIZE,), device=device)
    optimiser = training.make_optimiser(model, setup.recipe)
    precision = training.autocast(model, device)

    def forward(labels: Tensor, images: Tensor) -> Tensor:
        return losses.cross_entropy(model(images), labels).mean()

    if graphs.used_on(device):
        forward = torch.compile(forward)

    def step(labels: Tensor, images: Tensor) -> Tensor:
        with precision:
            loss = forward(labels, images)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    take = graphs.Recorded(step) if graphs.used_on(device) else step

    def epoch() -> float:
        model.train()
        started = time.perf_counter()
        for _ in range(len(seen.images) // BATCH_SIZE):
            loss = take(labels, images)
        loss.item()  # waits for the device
        return time.perf_counter() - started

    return epoch


def looped(model: nn.Module, seen: data.NoisyData, setup: Setup) -> Callable[[], float]:
    """An epoch of `training.fit` on real images; returns its seconds of training."""

    def step(model: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        return losses.cross_entropy(model(images), seen.labels[index]).mean()

    epochs = training.fit(
        model,
        seen.images,
        lambda: batches.uniform(len(seen.images), BATCH_SIZE, setup.generator),
        step,
        setup,
        lambda model: 0.0,
        stage="bench",
    )
    return lambda: next(epochs).seconds


def bench(name: str, device: torch.device, rounds: int) -> None:
    """Print images/s of both and their ratio."""
    count = SIZES[device.type][name]
    try:
        spec = Spec(dataset=DATASETS[name], model=name, profile="paper")
        seen, _ = experiments.prepare(spec, device)
    except data.DataError as error:
        print(f"{name}: skipped, {error}")
        return
    seen = replace(seen, images=seen.images[:count], labels=seen.labels[:count])
    recipe = replace(spec.recipe, epochs=rounds + 2, batch_size=BATCH_SIZE)
    with training.seeded(0, device) as generator:
        setup = Setup(name, recipe, generator)
        epochs = [make(setup.build(seen), seen, setup) for make in (bare, looped)]
        for epoch in epochs * 2:
            epoch()  # warm up
        turns = [[epoch() for epoch in epochs] for _ in range(rounds)]
    fastest = [count / statistics.median(times) for times in zip(*turns, strict=True)]
    ratio = statistics.median(bare / loop for bare, loop in turns)
    print(
        f"{name:10} bare {fastest[0]:9,.0f} images/s   training.fit {fastest[1]:9,.0f} "
        f"images/s   ratio {ratio:.2f}"
    )


def bench_confusion(pairs: int = 1_000_000, num_classes: int = 1000) -> None:
    """Print what estimating C and the noise types takes on one core: under 1 s."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(num_classes, (pairs,), generator=generator)
    other = torch.randint(num_classes, (pairs,), generator=generator)
    noisy = torch.where(torch.rand(pairs, generator=generator) < 0.5, true, other)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    confusion = noise.estimate_confusion(noisy, true, num_classes)
    noise.noise_types(noisy, true, confusion)
    seconds = time.perf_counter() - started
    torch.set_num_threads(threads)
    print(f"C from {pairs:,} pairs of {num_classes:,} classes: {seconds:.2f} s, 1 core")


def bench_prototypes(m: int = 2560, d: int = 256, K: int = 14, p: int = 8) -> None:
    """Print what choosing prototypes takes (under 5 s), and correcting 10^6 labels.

    The latter should take under 10 s and 500 MB besides the features themselves.
    """
    generator = torch.Generator().manual_seed(0)
    of_class = torch.randn(m, d, generator=generator).abs()
    started = time.perf_counter()
    for _ in range(K):
        chosen = prototypes.by_density(of_class, p, prototypes.Rule())
    selecting = time.perf_counter() - started
    classes = prototypes.class_directions([of_class[chosen]] * K)
    features = torch.randn(1_000_000, d, generator=generator)
    before = records.peak_memory(torch.device("cpu"))
    started = time.perf_counter()
    prototypes.corrected(features.split(2000), classes)
    correcting = time.perf_counter() - started
    line = f"prototypes of {K} classes among {m:,} images each: {selecting:.1f} s; "
    line += f"10^6 labels corrected: {correcting:.1f} s"
    if before is not None:
        line += f", {records.peak_memory(torch.device('cpu')) - before:,.0f} MB"
    print(line)


def bench_game(device: torch.device, rounds: int, steps: int = 6) -> None:
    """Print a step of the noisy-label game over its bare forward and backward passes.

    On MNIST's shapes. The ratio should be 0.85 or more.
    """
    shape = BATCH_SIZE, 1, 28, 28
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    real = torch.randn(shape, device=device).contiguous(
        memory_format=torch.channels_last
    )
    noise_in = torch.randn(BATCH_SIZE // 2, gan.NOISE, device=device)
    labels = torch.arange(BATCH_SIZE, device=device) % 2
    with training.seeded(0, device) as generator:
        players = gan.Players(images).train()
        H = nl_gan.distance_of("cross-entropy")
        game = nl_gan.Game(players, 2e-4, H, alpha=5.0, beta=0.5)
    view = batches.augmentation(images, 0, False, generator)
    precision = training.autocast(players, device)

    def bare() -> None:
        with precision, nl_gan.still(players.D):
            made = torch.cat([players.G_P(noise_in), players.G_N(noise_in)])
            answers = players.D(made)
        answers.sum().backward()
        with precision:
            answers = players.D(torch.cat([real, made.detach()]))
        answers.sum().backward()
        players.zero_grad(set_to_none=True)

    step = partial(game.step, targets=(0.2, 0.7))
    take = graphs.Recorded(step) if game.recorded else step

    def whole() -> None:
        (index,) = nl_gan.halves(labels, BATCH_SIZE, generator)
        take(gan.to_unit(view(index)), gan.noise(BATCH_SIZE, generator))

    def seconds(step: Callable[[], None]) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for step in (bare, whole) * 2:
        seconds(step)  # warm up
    turns = [(seconds(bare), seconds(whole)) for _ in range(rounds)]
    ratio = statistics.median(first / second for first, second in turns)
    each = statistics.median(second for _, second in turns) / steps
    print(f"noisy-label game: {1000 * each:.0f} ms per step, ratio {ratio:.2f}")


def bench_table3(dataset: str, seeds: int, device: torch.device, at_once: int) -> None:
    """Print what Table 3's half on a data set would take here, from short runs of each.

    `at_once` processes each have a run of the same method at the same time, as in a
    grid with so many workers.
    """
    runs = TABLES["ding2018-table3"].specs(dataset, "paper", range(seeds))
    runs = [spec for spec in runs if spec.noise != "asymmetric-swap"]
    total, spawn = 0.0, get_context("spawn")
    start = (spawn.Barrier(at_once),)
    with (
        shared_gpu.service() if device.type == "cuda" else nullcontext({}) as found,
        patch.dict(os.environ, found),
        ProcessPoolExecutor(at_once, spawn, one_of_many, start) as pool,
    ):
        for method in dict.fromkeys(spec.method for spec in runs):
            own = [spec for spec in runs if spec.method == method]
            copies = [own[-1]] * at_once
            try:
                seconds = list(pool.map(seconds_per_epoch, copies, [device] * at_once))
            except data.DataError as error:
                print(f"Table 3 on {dataset}: skipped, {error}")
                return
            total += statistics.mean(seconds) * sum(map(grids.expected_epochs, own))
    print(
        f"Table 3 on {dataset}: {len(runs)} runs would take "
        f"{total / at_once / 60:,.0f} min, {at_once} at once"
    )


def one_of_many(start: Barrier) -> None:
    """Give a process of `bench_table3` one thread, and the line that all start from."""
    global START
    START = start
    torch.set_num_threads(1)


def seconds_per_epoch(spec: Spec, device: torch.device) -> float:
    """What an epoch of a run takes with its evaluation, from some on fewer images."""
    try:
        return timed(spec, device)
    except Exception:
        START.abort()  # else all others wait for this process
        raise


def timed(spec: Spec, device: torch.device) -> float:
    """What `seconds_per_epoch` says; processes wait until all have compiled."""
    seen, truth = experiments.data_for(spec, device)
    share = min(1.0, SIZES[device.type][spec.model] / len(seen.labels))
    seen, truth = first(seen, share), first(truth, share)
    recipe = replace(spec.recipe, epochs=3 if device.type == "cpu" else 5)
    took, before = [], None
    with (
        training.seeded(0, device) as generator,
        torch.compiler.config.patch(recompile_limit=experiments.FORMS),
    ):
        for event in METHODS[spec.method].run(
            seen, Setup(spec.model, recipe, generator)
        ):
            match event:
                case training.Epoch() as epoch:
                    evaluation.measure(epoch, truth)
                case training.Auxiliary(epoch=epoch):
                    pass
                case _:
                    continue
            if epoch.number > 1:
                took.append(time.perf_counter() - before)
            else:  # it warms up: on a GPU it compiles, each process for itself
                START.wait(600)
            before = time.perf_counter()
    return statistics.median(took) / share


def first(
    part: data.NoisyData | data.Truth, share: float
) -> data.NoisyData | data.Truth:
    """The first images of each of a data set's parts, with their labels."""
    short = {
        name: value[: round(share * len(value))]
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
    }
    return replace(part, **short)


def main() -> None:
    """Run all benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--at-once", type=int, default=os.cpu_count(), help="runs of Table 3 together"
    )
    options = parser.parse_args()
    device = training.pick_device(options.device)
    print(f"{records.device_name(device)}, batch {BATCH_SIZE}")
    for name in DATASETS:
        bench(name, device, options.rounds)
    peak = records.peak_memory(device)
    if peak is not None:
        print(f"peak memory, CIFAR-10 included: {peak:,.0f} MB")
    bench_confusion()
    bench_prototypes()
    bench_game(device, options.rounds)
    bench_table3("mnist", 5, device, options.at_once)
    bench_table3("cifar10", 1, device, options.at_once)
    if device.type == "cuda":
        bench_losses.bench(device)
    else:
        print("loss kernels: on a GPU only")


if __name__ == "__main__":
    main()
