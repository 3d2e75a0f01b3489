"""Measured beside published: tables of records and the figures of the chapters."""

import pandas as pd

from nlhelpers.records import Record


def summary(done: list[Record]) -> pd.DataFrame:
    """One row per group of runs that differ in their seed alone.

    Accuracies are in percent, over seeds: mean and sample standard deviation.
    """
    if not done:
        return pd.DataFrame({"runs": []})
    rows = pd.DataFrame([flat(record) for record in done])
    by = ["dataset", "noise", "rate", "method", "settings", "profile", "device"]
    groups = rows.groupby(by, sort=False, dropna=False)
    table = groups.agg(
        realised=("realised_rate", "mean"),
        last=("last_accuracy", "mean"),
        std=("last_accuracy", "std"),
        best=("best_accuracy", "mean"),
        seeds=("seed", "nunique"),
        seconds=("seconds", "mean"),
    )
    return table.round(3).reset_index()


def flat(record: Record) -> Record:
    """A record as one row: what was run, and what came out in percent."""
    spec = record["spec"]
    settings = ", ".join(f"{k}={v}" for k, v in spec["settings"].items())
    return {
        **{k: spec[k] for k in ("method", "dataset", "noise", "seed", "profile")},
        "rate": spec["noise_rate"],
        "settings": settings,
        "realised_rate": 100 * record["realised_rate"],
        "last_accuracy": 100 * record["last_accuracy"],
        "best_accuracy": 100 * record["best_accuracy"],
        "seconds": record["seconds"],
        "device": record["device"],
    }
