"""`python -m nlhelpers`: the notebooks' runs without a notebook."""

import argparse
import ast
import contextlib
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from nlhelpers import data, experiments, grids, profiles, records, report, training
from nlhelpers.methods import METHODS
from nlhelpers.models import MODELS
from nlhelpers.noise import check_rate
from nlhelpers.papers import TABLES
from nlhelpers.specs import (
    BINARY,
    CRAWLED,
    CRAWLED_SETS,
    DATASETS,
    NOISE_NAMES,
    OWN_RATE,
    Spec,
    known,
)

DATASET = "digits"  # by default
EXPECTED = (
    ValueError,
    data.DataError,
    grids.GridError,
    records.RecordError,
    training.DivergenceError,
    torch.OutOfMemoryError,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status.

    It is 0, or 1 for an error, 2 for wrong usage, 130 for Ctrl-C.
    """
    options = parser().parse_args(arguments)
    try:
        options.command(options)
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        print(
            f"error: {error.filename} is closed to you; change its permissions, or "
            "name another place",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to do the rest", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of every command."""
    top = argparse.ArgumentParser(prog="python -m nlhelpers", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="run | show | list")
    run = commands.add_parser(
        "run",
        help="run a grid, skipping what is recorded",
        description="Run every combination of the values given, or the runs behind a "
        "published table, and append a record of each.",
    )
    run.set_defaults(command=run_grid)
    add_grid(run)
    run.add_argument("--device", default="auto", help="auto, cpu or cuda")
    run.add_argument(
        "--time-budget", type=minutes, metavar="MINUTES", help="start no run after this"
    )
    run.add_argument(
        "--workers", type=int, metavar="N", help="processes that run at once (Dask)"
    )
    run.add_argument(
        "--scheduler", metavar="ADDRESS", help="of a Dask scheduler that has workers"
    )
    show = commands.add_parser("show", help="print records, and run nothing")
    show.set_defaults(command=show_table)
    add_grid(show)
    names = commands.add_parser("list", help="list all names")
    names.set_defaults(command=list_names)
    return top


def add_grid(command: argparse.ArgumentParser) -> None:
    """Add the options that say which runs; several values make a grid."""
    several = {"nargs": "+", "action": "extend"}  # of an option given twice, both count
    command.add_argument("table", nargs="?", help=f"a table: {', '.join(TABLES)}")
    command.add_argument("--method", **several, metavar="NAME")
    command.add_argument(
        "--dataset",
        metavar="NAME",
        help="default: the digits, or the only data set that a table has",
    )
    command.add_argument("--noise", **several, metavar="NAME")
    command.add_argument("--noise-rate", **several, type=rate, metavar="P")
    command.add_argument("--seeds", **several, type=int, metavar="S", help="default: 0")
    command.add_argument("--profile", default="quick", help="smoke, quick or paper")
    command.add_argument("--model", default="", metavar="NAME")
    command.add_argument("--num-clean", type=int, default=0, metavar="M")
    command.add_argument("--transition", metavar="CSV", help="T, for --noise given")
    command.add_argument("--task", default="", help="two groups, like '5,7 vs 2,4'")
    command.add_argument(
        "--pi", nargs=2, type=float, metavar=("PI_P", "PI_N"), help="for a task"
    )
    command.add_argument("--num-images", type=int, default=0, metavar="N")
    command.add_argument("--set", **several, default=[], metavar="SETTING=VALUE")
    command.add_argument(
        "--records", type=path, default=Path("records/runs.jsonl"), metavar="JSONL"
    )


def path(text: str) -> Path:
    """A path; shells leave the ~ of `--records=~/runs.jsonl` as it is."""
    return Path(text).expanduser()


def rate(text: str) -> float | None:
    """A noise rate, or None for labels that have their own."""
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a rate; it must be a number in [0, 1], or None for "
            "labels that have their own"
        ) from None


def minutes(text: str) -> float:
    """A number of 0 or more."""
    with contextlib.suppress(ValueError):
        if float(text) >= 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes, 0 or more")


def specs(options: argparse.Namespace) -> list[Spec]:
    """The runs that the options name, each once."""
    return list(dict.fromkeys(named(options)))


def named(options: argparse.Namespace) -> list[Spec]:
    """The runs that the options name, repeated where they name one again."""
    seeds = options.seeds or [0]
    if options.table is not None:
        known("table", options.table, TABLES)
        known("profile", options.profile, profiles.PROFILES)
        table = TABLES[options.table]
        dataset = options.dataset or only(table.datasets)
        known("data set", dataset, DATASETS)
        found = table.specs(dataset, options.profile, seeds)
        check_choice(options)
        runs = [spec for spec in found if chosen(spec, options)]
        if not runs:
            raise ValueError(
                f"{options.table} has no run with these methods, noises and rates"
            )
        return runs
    dataset = options.dataset or DATASET
    base = {
        "dataset": dataset,
        "profile": options.profile,
        "model": options.model,
        "num_clean": options.num_clean,
        "settings": dict(map(setting, options.set)),
        "task": options.task,
        "pi": options.pi,
        "num_images": options.num_images,
    }
    if options.transition:
        base["transition"] = read_transition(Path(options.transition))
    return [
        Spec(method=method, noise=noise, noise_rate=p, seed=seed, **base)
        for seed in seeds
        for noise in options.noise or [default_noise(dataset, options.task)]
        for p in options.noise_rate or [default_rate(noise)]
        for method in options.method or ["cross-entropy"]
    ]


def only(datasets: list[str]) -> str:
    """The data set of a table that has only one; else the default."""
    return datasets[0] if len(datasets) == 1 else DATASET


def check_choice(options: argparse.Namespace) -> None:
    """Raise ValueError for a wrong name or rate, or an option that a table fixes."""
    for method in options.method or []:
        known("method", method, METHODS)
    for name in options.noise or []:
        known("noise", name, NOISE_NAMES)
    for p in options.noise_rate or []:
        if p is not None:  # None: the labels have their own
            check_rate(p)
    fixed = ("model", "num_clean", "transition", "task", "pi", "num_images", "set")
    for name in (name for name in fixed if getattr(options, name)):
        option = "--" + name.replace("_", "-")
        raise ValueError(f"{option} is fixed by the table; leave out one of the two")


def default_noise(dataset: str, task: str) -> str:
    """Symmetric, unless the data or the task come with noise of their own."""
    if task:
        return BINARY
    crawled = dataset in CRAWLED_SETS
    return CRAWLED if crawled else "symmetric"


def default_rate(noise: str) -> float | None:
    """0.2, unless the labels have a rate of their own."""
    return None if noise in OWN_RATE else 0.2


def chosen(spec: Spec, options: argparse.Namespace) -> bool:
    """Whether a table's run is among the methods, noises and rates asked for."""
    return (
        (options.method is None or spec.method in options.method)
        and (options.noise is None or spec.noise in options.noise)
        and (options.noise_rate is None or spec.noise_rate in options.noise_rate)
    )


def setting(text: str) -> tuple[str, object]:
    """Split NAME=VALUE; a value that is not a Python literal stays text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes NAME=VALUE, not {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def read_transition(path: Path) -> tuple[tuple[float, ...], ...]:
    """T from a file of K lines with K comma-separated numbers."""
    try:
        with warnings.catch_warnings(action="error"):  # if a file has no numbers
            rows = np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError, UserWarning) as error:
        raise ValueError(
            f"--transition: {path}: {error}; it must hold K lines of K numbers, "
            "separated by commas"
        ) from error
    return tuple(map(tuple, rows.tolist()))


def run_grid(options: argparse.Namespace) -> None:
    """Run what is asked for but not yet recorded, then print all of it."""
    budget = None if options.time_budget is None else 60 * options.time_budget
    wanted = specs(options)
    alone = options.workers is None and options.scheduler is None
    if alone and len(wanted) > 1 and "RANK" not in os.environ:
        advise(training.pick_device(options.device))
    with grids.workers(options.workers, options.scheduler, options.device) as client:
        done = grids.run_all(
            wanted, options.records, options.device, time_budget=budget, client=client
        )
    if training.is_first() and done:
        print_summary(done)


def print_summary(done: list[records.Record]) -> None:
    """Print records as `report.summary` groups them, if any has a result."""
    summary = report.summary(done)
    if len(summary):
        print(summary.to_string(index=False, na_rep="–"))


def advise(device: torch.device) -> None:
    """Point out that a GPU can do several runs at once."""
    if device.type == "cuda":
        print(
            "This does one run at a time; several at once make better use of a GPU: "
            f"--workers {torch.get_num_threads()}"
        )


def show_table(options: argparse.Namespace) -> None:
    """Print the existing records of the runs asked for."""
    wanted = set(specs(options))
    found = grids.recorded(options.records)
    done = [record for spec, record in found.items() if spec in wanted]
    if not done:
        print(f"{options.records} has no record of these runs made by today's code")
        return
    print_summary(done)
    for record in experiments.stopped(done):
        print(f"stopped: {experiments.spec_of(record)}: {record['stopped']}")


def list_names(options: argparse.Namespace) -> None:
    """Print what every option allows."""
    print("methods:  ", ", ".join(METHODS))
    print("data sets:", ", ".join(DATASETS))
    print("noises:   ", ", ".join(NOISE_NAMES))
    print("models:   ", ", ".join(MODELS))
    print("profiles: ", ", ".join(profiles.PROFILES))
    print("tables:   ", ", ".join(TABLES))
    for name, method in METHODS.items():
        options = ", ".join(f"{k}={v!r}" for k, v in method.settings.items())
        print(f"settings of {name}: {options or 'none'}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not all terminals know all characters
    sys.exit(main())
