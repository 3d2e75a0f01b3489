"""Many runs: those not recorded yet, one after the other or on many workers.

Workers come from Dask's `distributed`, if it is installed: those of this machine, or of
any scheduler. A worker returns its record; only this process writes.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from nlhelpers import experiments, folder, records, shared_gpu, training
from nlhelpers.methods import METHODS
from nlhelpers.records import Record
from nlhelpers.specs import CRAWLED_SETS, Spec
from nlhelpers.training import Auxiliary, Epoch, Event

if TYPE_CHECKING:
    from distributed import Client, Future

CPU = torch.device("cpu")
WAIT = 10  # seconds for a scheduler to answer
EPOCHS = Epoch, Auxiliary  # what moves the progress bar
ALONE = threading.Lock()  # runs draw from torch's generators, one set per process

# Dask checks its workers up to a hundred times a second, and each check takes the
# interpreter away from a run of small steps: a tenth of the time in all. Once a second
# is enough. And a worker that died while it trained is started again, however long that
# takes: by default, Dask gives up on it after 15 seconds.
UNDISTURBED = {
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.monitor-interval": "1s",
    "distributed.admin.tick.interval": "1s",
    "distributed.deploy.lost-worker-timeout": "1 day",
}

# Runs with what came of them. A run that a method refuses, or that takes down one
# worker after another, leaves no record but an exception: a ValueError or a GridError.
Outcomes = Iterator[tuple[Spec, Record | Exception]]


class GridError(RuntimeError):
    """Runs of a grid failed: some, of which the message names one, or all those left.

    What was recorded stays, and the same command goes on with the rest.
    """


def grid(base: Spec, **values: Iterable[object]) -> list[Spec]:
    """Every combination of `values` (field name = its values), the last one fastest."""
    names = list(values)
    return [
        dataclasses.replace(base, **dict(zip(names, choice, strict=True)))
        for choice in itertools.product(*values.values())
    ]


def run_all(
    specs: Iterable[Spec],
    path: Path,
    device: torch.device | str,
    *,
    time_budget: float | None = None,
    client: "Client | None" = None,
) -> list[Record]:
    """Run what is not yet recorded, append each record to `path`, return them all.

    Under torchrun, all processes train each run together, and the first records it.

    Args:
        specs: the runs; those in `path` that today's code made are not repeated, nor
            are those that it had to stop.
        path: a .jsonl file.
        device: to train on, or its name, as in `training.pick_device`; with workers,
            each takes its own of this kind.
        time_budget: seconds after which no further run is started.
        client: of a Dask scheduler on whose workers to run; None runs them here, one
            after the other.

    Returns:
        The records of `specs` in their order, as far as they exist.

    Raises:
        GridError: at the end, if runs failed, now or as `path` says; at once, if the
            scheduler is lost or a worker has other code or no such device.
        ValueError: if there is one run only, and it is refused.
    """
    specs = list(specs)
    if client is None:
        device = training.pick_device(device)
    ends = math.inf if time_budget is None else time.perf_counter() + time_budget
    done = recorded(path)
    records.check_writable(path)
    first = training.is_first()
    failed = {}
    with training.processes(device):
        todo = [spec for spec in dict.fromkeys(specs) if spec not in done]
        elsewhere = client is not None and client.cluster is None
        if first and not elsewhere:  # else the workers have data of their own
            fetch(todo)
        todo = training.agreed(todo)
        remember_code(todo)
        if first:
            count = len(set(specs))
            print(f"{count - len(todo)} of {count} runs are recorded in {path}")
        with progress_bar(todo, first) as bar:

            def in_time() -> bool:
                return training.agreed(time.perf_counter() < ends)

            if client is None:
                outcomes = in_turn(todo, device, bar, in_time)
            else:
                outcomes = on_workers(todo, client, device, bar, in_time)
            left = len(todo)
            for spec, outcome in outcomes:
                left -= 1
                if isinstance(outcome, Exception):
                    failed[spec] = outcome
                    say(bar, f"failed: {spec}: {outcome}")
                    continue
                done[spec] = outcome
                if first:
                    records.append(path, outcome)
                if "stopped" in outcome:
                    say(bar, f"stopped: {spec}: {outcome['stopped']}")
            if left:
                say(bar, "The time budget is spent; the same command does the rest.")
    found = {spec: done[spec] for spec in specs if spec in done}
    check_all_ended(found, failed, path)
    return [found[spec] for spec in specs if spec in found]


def fetch(todo: list[Spec]) -> None:
    """Download what is missing of the runs' data, before several processes would."""
    for name in {spec.dataset for spec in todo} - CRAWLED_SETS.keys():
        experiments.load(name)


def remember_code(todo: list[Spec]) -> None:
    """Read the code behind the runs now, as imported: it may change while they run."""
    for spec, kind in itertools.product(todo, ("cpu", "cuda")):
        experiments.code(spec, kind)


def say(bar: tqdm, text: str) -> None:
    """Write a line above the bar; of several processes, only the first does."""
    if training.is_first():
        bar.write(text)


def check_all_ended(
    found: dict[Spec, Record], failed: dict[Spec, Exception], path: Path
) -> None:
    """Raise GridError if some of a grid's runs stopped or failed.

    Args:
        found: records of runs, in `path`, stopped ones among them.
        failed: runs without a record; if there was one run only and it was refused,
            that error is raised.
        path: a .jsonl file.
    """
    stopped = {spec: run["stopped"] for spec, run in found.items() if "stopped" in run}
    if not failed and not stopped:
        return
    count = len(found) + len(failed)
    spec, why = next(iter({**failed, **stopped}.items()))
    if count == 1 and isinstance(why, ValueError):
        raise why
    if spec in stopped:
        why += f"; {path} has a line for it: delete that to try the run again"
    several = f"{len(failed) + len(stopped)} of {count} runs failed, the others are "
    several += "recorded; the first: "
    message = f"{several if count > 1 else ''}{spec}: {why}"
    raise GridError(message) from failed.get(spec)


def recorded(path: Path) -> dict[Spec, Record]:
    """The records under `path` that today's code made, by their spec."""
    return {
        experiments.spec_of(record): record
        for record in records.read(path)
        if experiments.is_current(record)
    }


# One after the other


def in_turn(
    todo: list[Spec], device: torch.device, bar: tqdm, in_time: Callable[[], bool]
) -> Outcomes:
    """Each run in this process, for as long as there is time."""
    for spec in todo:
        if not in_time():
            return
        bar.set_description(str(spec))
        end = bar.n + expected_epochs(spec)
        try:
            outcome = experiments.attempt(
                spec, device, progress=functools.partial(advance, bar)
            )
        except ValueError as error:
            outcome = error
        yield spec, outcome
        bar.total += bar.n - end  # what was expected may not be what it took


def progress_bar(todo: list[Spec], shown: bool) -> tqdm:
    """A bar of epochs; the time left is estimated from the mean of all so far."""
    total = sum(map(expected_epochs, todo))
    return tqdm(total=total, unit="epoch", disable=not todo or not shown, smoothing=0)


def expected_epochs(spec: Spec) -> int:
    """How many epochs a run takes, over all its trainings, for progress bars."""
    method = METHODS[spec.method]
    trainings = method.trainings + method.clean_trainings * (spec.num_clean > 0)
    settings = method.settings | dict(spec.settings)
    for name, share in method.more_trainings.items():
        trainings += share * settings[name]
    return math.ceil(trainings * spec.recipe.epochs)


def advance(bar: tqdm, event: Event) -> None:
    """Move the bar by one epoch."""
    if isinstance(event, Epoch):
        bar.set_postfix(val=f"{event.val_accuracy:.3f}", refresh=False)
    if isinstance(event, EPOCHS):
        bar.update()


# On workers


@contextlib.contextmanager
def workers(
    count: int | None, scheduler: str | None, device: torch.device | str = CPU
) -> Iterator["Client | None"]:
    """A Dask client: of `count` processes here, or of the scheduler at an address.

    None if neither is asked for, and, with a message, if Dask is not installed.
    Processes here that share a GPU as their device use it side by side.

    Raises:
        ValueError: if both are asked for, the count is below 1, no scheduler answers,
            or this runs under torchrun.
    """
    if count is None and scheduler is None:
        yield None
        return
    if "RANK" in os.environ:
        raise ValueError(
            "torchrun trains each run on all its processes; leave out either torchrun "
            "or workers and scheduler"
        )
    if count is not None and scheduler is not None:
        raise ValueError(
            f"workers is {count} and scheduler is {scheduler!r}; a scheduler has its "
            "own workers, so leave one of the two out"
        )
    if count is not None and count < 1:
        raise ValueError(f"workers is {count}; it must be at least 1")
    try:
        import dask
        import distributed
    except ImportError:
        print(
            "Dask is not installed, so the runs go one after the other; workers come "
            'with: pip install -e ".[grid]"'
        )
        yield None
        return
    if scheduler is not None:
        with connected(scheduler) as client:
            yield client
        return
    several = training.pick_device(device).type == "cuda" and count > 1
    with (
        hidden_environment(),
        shared_gpu.service() if several else contextlib.nullcontext({}) as found,
        dask.config.set(UNDISTURBED | environment(count, found)),
        distributed.LocalCluster(
            n_workers=count, threads_per_worker=1, dashboard_address="localhost:0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@contextlib.contextmanager
def hidden_environment() -> Iterator[None]:
    """Hide what Dask would prefer to `environment`, and undo what it also sets here."""
    before = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def environment(count: int, more: dict[str, str]) -> dict[str, object]:
    """What Dask is told about the processes of this machine.

    Args:
        count: how many there are; they share the threads that this one has.
        more: environment variables.
    """
    threads = max(1, torch.get_num_threads() // count)
    return {
        # Instead of Dask's own, with which malloc returns memory at every step and MKL
        # has one thread. For a GPU, each compiles in as many processes.
        "distributed.nanny.pre-spawn-environ": {
            "OMP_NUM_THREADS": threads,
            "TORCHINDUCTOR_COMPILE_THREADS": threads,
            "LOCAL_WORLD_SIZE": count,  # as torchrun sets it; see `files.cores`
            **more,
        },
        "distributed.worker.daemon": False,  # it may start processes that read images
    }


@contextlib.contextmanager
def connected(scheduler: str) -> Iterator["Client"]:
    """A client of the scheduler at an address, which may have no worker yet."""
    import distributed

    try:
        client = distributed.Client(scheduler, timeout=WAIT)
    # Another kind of server can cause a MemoryError, and "tls://" a TypeError.
    except (OSError, ValueError, TypeError, MemoryError) as error:
        # Dask closes what failed to connect when that is garbage-collected, and hangs
        # if this happens while another client starts. So it is collected now.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        raise ValueError(
            f"no Dask scheduler answers at {scheduler!r}; start one with "
            "`dask scheduler`, give the address that it prints, or leave it out"
        ) from error
    with client:
        yield client


def on_workers(
    todo: list[Spec],
    client: "Client",
    device: torch.device | str,
    bar: tqdm,
    in_time: Callable[[], bool],
) -> Outcomes:
    """As many runs at once as there are workers, in the order in which they end.

    A run whose worker is lost is done again by another one: Dask sees to that. While
    there is no worker, one run waits for the first.
    """
    from distributed import as_completed

    kind = device if isinstance(device, str) else device.type
    waiting, running, epochs = iter(todo), {}, Counter()
    finished, topic = as_completed(), f"epochs for {client.id}"

    def start_more() -> None:
        free = max(not running, places(client) - len(running)) if in_time() else 0
        for spec in itertools.islice(waiting, free):
            future = client.submit(run_here, spec, kind, topic, pure=False)
            running[future] = spec
            finished.add(future)
        bar.set_description(f"{len(running)} at once")

    def count(event: tuple[float, str]) -> None:
        epochs[event[1]] += 1
        bar.update()

    if not places(client):
        bar.write("The scheduler has no worker yet; waiting for one.")
    client.wait_for_workers(1)
    client.subscribe_topic(topic, count)
    try:
        start_more()
        for future in finished:
            spec = running.pop(future)
            outcome = outcome_of(future)
            # What was expected may not be what it took.
            bar.total += epochs[future.key] - expected_epochs(spec)
            yield spec, outcome
            start_more()
    finally:
        client.unsubscribe_topic(topic)


def places(client: "Client") -> int:
    """How many runs the workers can do at once: one each, whatever their threads."""
    return len(client.nthreads())


def run_here(spec: Spec, device: str, topic: str) -> Record:
    """A run in a worker's own process, on its own device of a kind.

    Its epochs are logged under the topic, with the scheduler's key for the run.

    Raises:
        GridError: if this worker has no such device.
        ValueError: for what a method refuses before it trains.
    """
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()
    # The workers of this machine have numbers; those of others have names.
    number = worker.name if isinstance(worker.name, int) else None
    try:
        own = training.pick_device(device, number)
    except ValueError as error:
        raise GridError(f"the worker at {worker.address} says: {error}") from error
    if own.type == "cuda":
        torch.cuda.set_device(own)

    def tell(event: Event) -> None:
        if isinstance(event, EPOCHS):
            worker.log_event(topic, key)

    with ALONE:
        return experiments.attempt(spec, own, progress=tell)


def outcome_of(future: "Future") -> Record | Exception:
    """The record of a run, or why it has none: it was refused, or it killed workers.

    Raises:
        GridError: for what concerns other runs too.
        Exception: whatever else a worker raises.
    """
    from distributed import CancelledError, KilledWorker

    try:
        record = future.result()
    except ValueError as refused:
        return refused
    except (torch.OutOfMemoryError, MemoryError) as short:
        return GridError(f"{short}; use fewer workers")
    except KilledWorker as killed:
        return GridError(
            f"{killed.allowed_failures + 1} workers in a row died of it, as happens "
            "when memory is short; use fewer workers"
        )
    except CancelledError as lost:
        raise GridError(
            "the scheduler is gone; run the command again with another to do the rest"
        ) from lost
    if not experiments.is_current(record):
        if record["spec"]["dataset"] == folder.NAME:
            return GridError(
                f"the images in {folder.folder()} are not those that it was trained "
                "on; do not change them during runs, and have the same on all machines"
            )
        raise GridError(
            f"a worker returned a record made by other code ({record['source']}, "
            f"commit {record['commit']}) than is here; bring all workers to one commit"
        )
    return record
