"""Measured beside published values: tables of records, and parts of the figures."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from torch import Tensor

from nlhelpers import experiments
from nlhelpers.methods import METHODS
from nlhelpers.papers import Cell, Table
from nlhelpers.records import Record
from nlhelpers.specs import CRAWLED_SETS, Spec

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY, BLACK = "#D55E00", "#CC79A7", "#56B4E9", "#000000"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MEASURED = (
    *("row", "column", "published", "published_std", "measured", "std", "difference"),
    *("seeds", "stopped", "profile", "device", "seconds", "current"),
)
RUN = ("row", "column", "profile", "device", "seed", "value")
STOP = ("row", "column", "profile", "device", "seed", "why")
GAINS = ("column", "over", "gain", "std", "seeds", "profile", "device")
OTHER_CODE = "†"  # marks a value measured by code other than today's
AIRY = [  # for a table whose cells hold several lines: they wrap, with space between
    {"selector": "caption", "props": "caption-side: top; font-weight: bold"},
    {"selector": "th, td", "props": "white-space: normal; padding: 0.25em 0.6em"},
    {"selector": "td", "props": "min-width: 6.5em; text-align: left; line-height: 1.4"},
    {"selector": "small", "props": "font-size: 85%"},
]


def style() -> None:
    """Make the figures of all notebooks look alike."""
    plt.rcParams.update(
        {
            "figure.figsize": (7.2, 3.6),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "image.cmap": "Blues",
            "legend.frameon": False,
            "font.size": 10,
        }
    )


# Tables


def summary(done: Sequence[Record]) -> pd.DataFrame:
    """One row per group of records that differ only in their seed.

    Accuracies and realised rates are in percent; `std` is the sample standard deviation
    over the seeds, NaN for one seed. Network, clean set, T and what defines a task have
    columns where they differ. Runs that stopped are left out.
    """
    columns = {
        "last": ("last_accuracy", "mean"),
        "std": ("last_accuracy", "std"),
        "best": ("best_accuracy", "mean"),
        "realised": ("realised_rate", "mean"),
        "seeds": ("seed", "nunique"),
        "seconds": ("seconds", "mean"),
    }
    by = ["method", "settings", "dataset", "noise", "rate", "profile", "device"]
    varying = ["model", "num_clean", "transition", "task", "pi", "num_images"]
    shown = ["method", "settings", "last", "std", "best", "dataset", "noise", "rate"]
    shown += ["realised", "seeds", "seconds", "profile", "device"]
    rows = pd.DataFrame([flat(record) for record in done if "stopped" not in record])
    if rows.empty:
        return pd.DataFrame(columns=shown)
    groups = rows.groupby(by + varying, sort=False, dropna=False)
    shown[2:2] = [name for name in varying if rows[name].nunique() > 1]
    measured = ("last", "std", "best", "realised", "seconds")
    return groups.agg(**columns).reset_index()[shown].round(dict.fromkeys(measured, 2))


def flat(record: Record) -> Record:
    """A record as one row: what was run, and what came out, in percent.

    `kept_right`, `kept_wrong` and `discarded` are shares of the labels after a
    screening; `labels_given`, `labels_first` and `labels_last` are the shares of right
    labels as given, when first corrected and in the end. What was not measured is NaN.
    """
    spec, wrong = record["spec"], record["realised_rate"]
    kept = record.get("screening") or {}
    corrected = record.get("label_accuracy") or [None]
    shares = {
        "realised_rate": wrong,
        "last_accuracy": record["last_accuracy"],
        "best_accuracy": record["best_accuracy"],
        "kept_right": kept.get("correct"),
        "kept_wrong": kept.get("incorrect"),
        "discarded": kept.get("unlabelled"),
        "labels_given": None if wrong is None else 1 - wrong,
        "labels_first": corrected[0],
        "labels_last": corrected[-1],
    }
    known = experiments.spec_of(record)
    settings = known.settings if known else spec["settings"].items()
    return {
        **{k: spec[k] for k in ("method", "dataset", "noise", "seed", "profile")},
        "rate": spec["noise_rate"],
        "model": spec["model"],
        "num_clean": spec["num_clean"],
        "transition": str(spec["transition"]),
        "task": spec.get("task", ""),
        "pi": str(spec.get("pi")),
        "num_images": spec.get("num_images", 0),
        "settings": ", ".join(f"{name}={value}" for name, value in settings),
        **{name: np.nan if x is None else 100 * x for name, x in shares.items()},
        "seconds": record["seconds"],
        "device": record["device"],
        "current": experiments.is_current(record),
    }


def measured(table: Table, done: Sequence[Record]) -> pd.DataFrame:
    """A published table's cells that we run, each beside what the records measured.

    Args:
        table: whose cells to fill.
        done: records; those that belong to no cell are left out. A cell measured in
            two profiles, or on two devices, gives two lines.

    Returns:
        One line per cell and profile: row, column, published (percent), published_std,
        measured (mean), std (over seeds), difference, seeds, stopped (how many seeds
        have stopped with an error, on any device), profile, device, seconds (mean of a
        run) and current (whether today's code made all of it).
    """
    lines = []
    by = ["row", "column", "profile", "device"]
    stopped = stops_of(table, done).groupby(by[:3])["seed"].nunique()
    for names, part in runs_of(table, done).groupby(by, sort=False):
        lines.append(
            dict(zip(by, names, strict=True))
            | part.iloc[0][["published", "published_std"]].to_dict()
            | {
                "measured": part["value"].mean(),
                "std": part["value"].std(),
                "seeds": part["seed"].nunique(),
                "stopped": stopped.get(names[:3], 0),
                "seconds": part["seconds"].mean(),
                "current": part["current"].all(),
            }
        )
    frame = pd.DataFrame(lines, columns=MEASURED)
    frame["difference"] = frame["measured"] - frame["published"]
    order = pd.Categorical(frame["column"], frame["column"].unique())
    return frame.iloc[order.codes.argsort(kind="stable")].reset_index(drop=True)


def complete(table: Table, done: Sequence[Record]) -> pd.DataFrame:
    """Every cell of a published table, in its order: as `measured`, or why it is not.

    Returns:
        As `measured`, with NaN where no run reached its end, note: why, else "", and
        measure: which number of a run it is.
    """
    places = ["row", "column"]
    stops = stops_of(table, done).drop_duplicates(places).set_index(places)["why"]
    cells = pd.DataFrame(
        {
            "row": cell.row,
            "column": cell.column,
            "published": cell.value,
            "published_std": cell.std,
            "measure": cell.measure,
            "note": stops.get((cell.row, cell.column), cell.note or why_not_run(cell)),
        }
        for cell in table.cells
    )
    cells = cells.astype({"published": float, "published_std": float})
    found = measured(table, done).drop(columns=["published", "published_std"])
    whole = cells.merge(found, how="left", on=places)
    whole["note"] = whole["note"].mask(whole["measured"].notna(), "")
    return whole


def why_not_run(cell: Cell) -> str:
    """Why a cell that has a run may have no record."""
    owned = cell.spec.dataset in CRAWLED_SETS
    return "for whoever has the data" if owned else "not run yet"


def at_a_glance(whole: pd.DataFrame) -> Styler:
    """The table of `complete` as rows and columns, each cell a few lines of HTML.

    The measured value is in bold, the published one in brackets, and below them are
    seeds, profile and seconds of a run, or why there is none. Runs of the paper profile
    are shaded by how far apart the two values are: blue above the paper, orange below
    it, darker beyond 5 points.
    """
    paper_first = whole.sort_values(
        "profile", key=lambda profile: profile != "paper", kind="stable"
    )
    frame = paper_first.drop_duplicates(["row", "column"])
    shape = {"index": "row", "columns": "column"}
    order = {"index": whole["row"].unique(), "columns": whole["column"].unique()}
    text = frame.assign(text=frame.apply(cell_text, axis=1))
    text = text.pivot(**shape, values="text").reindex(**order).fillna("")
    apart = frame.assign(apart=comparable(frame)).pivot(**shape, values="apart")
    apart = apart.reindex(**order)
    text.index.name = text.columns.name = None
    colours = apart.map(agreement)
    return text.style.apply(lambda _: colours, axis=None).set_table_styles(AIRY)


def cell_text(line: pd.Series) -> str:
    """A cell of `at_a_glance`."""
    published = f" ({line['published']:.1f})" if pd.notna(line["published"]) else ""
    if pd.isna(line["measured"]):
        return f"–{published}<br><small>{line['note']}</small>"
    mark = "" if line["current"] else f" {OTHER_CODE}"
    seeds = f"{line['seeds']:.0f} seed{'s' if line['seeds'] > 1 else ''}"
    value = spread(line["measured"], line["std"])
    if line["stopped"]:
        seeds += f", {line['stopped']:.0f} stopped"
    where = f"{seeds}, {line['profile']}, {line['seconds']:.0f} s"
    return f"<b>{value}{mark}</b>{published}<br><small>{where}</small>"


def comparable(frame: pd.DataFrame) -> pd.Series:
    """The differences of `measured`; NaN for runs shorter than the paper's."""
    return frame["difference"].where(frame["profile"] == "paper")


def agreement(difference: float) -> str:
    """Style of a cell by its difference in points; none where that is at most 1."""
    if not abs(round(difference, 1)) > 1:  # NaN where nothing is published
        return ""
    blue, orange = (("#cfe5f3", "#fbe3b5"), ("#9ccbe8", "#f6c667"))[abs(difference) > 5]
    return f"background-color: {blue if difference > 0 else orange}; color: #000"


def spread(mean: float, std: float) -> str:
    """A mean with its standard deviation, as far as they exist."""
    if pd.isna(mean):
        return "–"
    return f"{mean:.1f}" if pd.isna(std) else f"{mean:.1f} ± {std:.1f}"


def runs_of(table: Table, done: Sequence[Record]) -> pd.DataFrame:
    """The runs behind a table's cells, one line each.

    Returns:
        `flat` of each record, with the row, column, published, published_std and
        measured value of its cell.
    """
    lines = []
    for cell, record in of_cells(table, experiments.latest(done)):
        line = flat(record)
        place = {"row": cell.row, "column": cell.column}
        place |= {"published": cell.value, "published_std": cell.std}
        lines.append(line | place | {"value": line[cell.measure]})
    return pd.DataFrame(lines, columns=list(lines[0]) if lines else RUN)


def stops_of(table: Table, done: Sequence[Record]) -> pd.DataFrame:
    """The runs of a table's cells that stopped with an error, one line each.

    Returns:
        row, column, profile, device, seed and why: "stopped: " and the error.
    """
    lines = [
        {
            **{"row": cell.row, "column": cell.column, "device": record["device"]},
            **{name: record["spec"][name] for name in ("profile", "seed")},
            "why": f"stopped: {record['stopped']}",
        }
        for cell, record in of_cells(table, experiments.stopped(done))
    ]
    return pd.DataFrame(lines, columns=STOP)


def of_cells(table: Table, found: Sequence[Record]) -> Iterator[tuple[Cell, Record]]:
    """Each cell of a table with each of its records, of any seed and profile."""
    by_spec: dict[Spec, list[Record]] = {}
    for record in found:
        spec = experiments.spec_of(record)
        if spec is not None:
            cell_spec = replace(spec, seed=0, profile="paper")
            by_spec.setdefault(cell_spec, []).append(record)
    for cell in table.cells:
        for record in by_spec.get(cell.spec, ()):
            yield cell, record


def gains(table: Table, done: Sequence[Record], row: str) -> pd.DataFrame:
    """How much better one row of a table is than every other, seed by seed.

    Two runs of one seed have the same noise and the same split, so their difference
    says more than the difference of two means.

    Returns:
        One line per column, other row and profile: gain and its std over the seeds, in
        percentage points, and seeds.
    """
    wide = runs_of(table, done).pivot_table(
        index=["column", "profile", "device", "seed"],
        columns="row",
        values="value",
        sort=False,
    )
    if row not in wide:
        return pd.DataFrame(columns=GAINS)
    gain = wide.rsub(wide[row], axis=0).drop(columns=row)
    gain = (
        gain.rename_axis(columns="over").stack().dropna().rename("gain").reset_index()
    )
    by = ["column", "over", "profile", "device"]
    stats = {
        "gain": ("gain", "mean"),
        "std": ("gain", "std"),
        "seeds": ("gain", "size"),
    }
    return gain.groupby(by, sort=False).agg(**stats).reset_index()[list(GAINS)]


def beside(frame: pd.DataFrame) -> Styler:
    """The table of `measured` as a page shows it: rounded, with ± and shading.

    A difference of more than 1 point is shaded if it is `comparable`, see `agreement`.
    """

    def signed(difference: float) -> str:
        return "–" if pd.isna(difference) else f"{difference:+.1f}".replace("-", "−")

    marks = frame["current"].map({True: "", False: f" {OTHER_CODE}"})
    shown = pd.DataFrame(
        {
            "column": frame["column"],
            "method": frame["row"],
            "published": frame.apply(
                lambda line: spread(line["published"], line["published_std"]), axis=1
            ),
            "measured": frame.apply(
                lambda line: spread(line["measured"], line["std"]), axis=1
            ),
            "difference": frame["difference"],
            "seeds": frame["seeds"],
            "profile": frame["profile"],
            "s per run": frame["seconds"].round().astype(int),
            "device": frame["device"],
        }
    )
    shown["measured"] += marks
    style = shown.style.hide(axis="index").format({"difference": signed})
    colours = comparable(frame).map(agreement)
    return style.apply(lambda _: colours, subset=["difference"])


# Parts of figures


def show_matrix(axes: Axes, matrix: Tensor, names: Sequence[str], title: str) -> None:
    """A (K, K) matrix of shares as a heat map with its larger entries printed."""
    values = np.asarray(matrix)
    axes.imshow(values, vmin=0, vmax=1)
    axes.grid(False)
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names[0]) > 2 else 0)
    axes.set_yticks(range(len(names)), names)
    axes.set(title=title, xlabel="noisy label", ylabel="true label")
    for (row, column), share in np.ndenumerate(values):
        if share >= 0.005:
            colour = "white" if share > 0.5 else "black"
            text = f"{share:.2f}".lstrip("0") if share < 1 else "1"
            axes.text(column, row, text, ha="center", va="center", color=colour, size=7)


def gallery(
    images: Sequence[Tensor | None],
    titles: Sequence[str],
    columns: int,
    colours: Sequence[str] = (),
) -> Figure:
    """Images, each (C, H, W) uint8, in a grid with a title above; None leaves a gap."""
    rows = -(-len(images) // columns)
    size = (0.8 * columns, 1.0 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    colours = colours or [BLACK] * len(images)
    for axes, image, title, colour in zip(
        grid.flat, images, titles, colours, strict=False
    ):
        if image is not None:
            pixels = image.cpu().permute(1, 2, 0).squeeze(-1)
            axes.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None)
            axes.set_title(title, size=8, color=colour, parse_math=False)
    return figure


def plot_histories(axes: Axes, done: Sequence[Record]) -> None:
    """Test accuracy (%) over the epochs of all trainings, one line per record."""
    methods = dict.fromkeys(record["spec"]["method"] for record in done)
    colours = dict(zip(methods, itertools.cycle(COLOURS), strict=False))
    for record in done:
        method, history = record["spec"]["method"], record["history"]
        epochs = np.arange(1, len(history["epoch"]) + 1)
        percent = 100 * np.array(history["test_accuracy"])
        title = METHODS[method].title
        axes.plot(epochs, percent, color=colours[method], label=title)
    axes.set(xlabel="epoch, over all trainings of a method", ylabel="test accuracy (%)")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4}
    axes.legend(unique.values(), unique.keys(), **above)
