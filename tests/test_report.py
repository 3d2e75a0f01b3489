"""Measured beside published: hand-made records, hand values."""

import dataclasses

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from nlhelpers import report
from nlhelpers.papers import TABLES, Cell, Table
from nlhelpers.specs import Spec

SPEC = Spec("two-stage", "mnist", "asymmetric", 0.6, profile="paper")
TABLE = Table(
    "paper",
    "Table 1",
    "A table",
    (
        Cell("ours", "a", 90.0, 0.5, SPEC),
        Cell("ours", "b", None, None, dataclasses.replace(SPEC, noise_rate=0.2)),
        Cell("theirs", "a", 80.0, note="it is theirs"),
    ),
)


def record(accuracy, **changes):
    return {
        "spec": dataclasses.replace(SPEC, **changes).as_dict(),
        "recipe": {},
        "source": "other",
        "realised_rate": 0.24,
        "last_accuracy": accuracy,
        "best_accuracy": accuracy - 0.25,
        "seconds": 10.0,
        "device": "a CPU",
    }


def stopped(**changes):
    """A record of a run that stopped, as `experiments.attempt` makes it."""
    whole = record(0.0, **changes)
    kept = {name: whole[name] for name in ("spec", "recipe", "source", "seconds")}
    return kept | {"device": "a GPU", "stopped": "rho is 0.6; that is too much"}


def test_measured_means_and_spread_over_seeds():
    done = [record(0.90, seed=0), record(0.94, seed=1), record(0.5, num_clean=5)]
    (line,) = report.measured(TABLE, done).to_dict("records")
    assert (line["row"], line["column"], line["seeds"]) == ("ours", "a", 2)
    assert line["measured"] == pytest.approx(92)
    assert line["std"] == pytest.approx(2 * 2**0.5)
    assert line["difference"] == pytest.approx(2)
    assert not line["current"]


def test_a_run_made_again_counts_once():
    (line,) = report.measured(TABLE, [record(0.5), record(0.9)]).to_dict("records")
    assert (line["seeds"], line["measured"]) == (1, pytest.approx(90))


def test_what_stopped_is_counted_and_shown_beside_what_did_not():
    done = [record(0.9), stopped(seed=1), stopped(seed=2), stopped(profile="quick")]
    (line,) = report.measured(TABLE, done).to_dict("records")
    assert (line["measured"], line["seeds"], line["stopped"]) == (90, 1, 2)
    shown = report.at_a_glance(report.complete(TABLE, done)).data
    assert "1 seed, 2 stopped, paper, 10 s" in shown.loc["ours", "a"]
    assert report.summary(done)["seeds"].tolist() == [1]


def test_a_cell_whose_runs_all_stopped_says_why():
    whole = report.complete(TABLE, [stopped(seed=1), record(0.9, noise_rate=0.2)])
    why = "stopped: rho is 0.6; that is too much"
    assert whole["note"].tolist() == [why, "", "it is theirs"]
    assert f"<small>{why}" in report.at_a_glance(whole).data.loc["ours", "a"]


def test_a_run_that_stopped_before_and_ends_today_counts():
    done = [stopped(), record(0.9) | {"device": "a GPU"}]
    assert report.measured(TABLE, done)["stopped"].tolist() == [0]


def test_profiles_are_not_mixed():
    done = [record(0.9), record(0.7, profile="quick")]
    assert report.measured(TABLE, done)["measured"].tolist() == [90, 70]


def test_the_page_marks_shades_and_leaves_out():
    done = [record(0.8), record(0.95, noise_rate=0.2)]
    html = report.beside(report.measured(TABLE, done)).to_html()
    assert "90.0 ± 0.5" in html
    assert f"80.0 {report.OTHER_CODE}" in html
    assert "−10.0" in html
    assert html.count("#f6c667") == 1 and "#cfe5f3" not in html
    assert ">nan" not in html


def test_no_records_give_the_same_columns():
    assert list(report.measured(TABLE, [])) == list(report.measured(TABLE, [record(1)]))
    assert list(report.summary([])) == list(report.summary([record(1.0)]))


def test_the_summary_groups_seeds_and_shows_what_differs():
    done = [record(0.90, seed=0), record(0.94, seed=1)]
    (line,) = report.summary(done).to_dict("records")
    assert (line["last"], line["best"]) == (92, 67)
    assert (line["seeds"], line["rate"]) == (2, 0.6)
    assert "num_clean" not in line and "model" not in line
    lines = report.summary([*done, record(0.5, num_clean=5)]).to_dict("records")
    assert [line["num_clean"] for line in lines] == [0, 5]


def test_the_summary_shows_small_rates_as_they_are():
    low = [record(0.9, noise_rate=p) for p in (0.125, 0.004)]
    assert report.summary(low)["rate"].tolist() == [0.125, 0.004]


def test_whole_numbers_and_fractions_are_one_setting():
    pair = [
        record(0.9, settings={"alpha": x}, method="self-learning") for x in (1, 1.0)
    ]
    assert report.summary(pair)["settings"].tolist() == ["alpha=1.0"]


def test_the_summary_of_runs_whose_truth_nobody_knows():
    done = [record(0.9, seed=s) | {"realised_rate": None} for s in (0, 1)]
    (row,) = report.summary(done).itertuples()
    assert row.last == 90 and pd.isna(row.realised)


def test_every_method_has_a_colour_of_its_own():
    history = {"epoch": [1, 2], "test_accuracy": [0.5, 0.75]}
    done = [
        record(0.9, method=method, num_clean=9, seed=seed) | {"history": history}
        for method in ("clean-only", "bottom-up", "two-stage")
        for seed in (0, 1)
    ]
    figure, axes = plt.subplots()
    report.plot_histories(axes, done)
    colours = [line.get_color() for line in axes.lines]
    assert len(set(colours)) == 3 and colours[::2] == colours[1::2]
    assert len(axes.get_legend().get_texts()) == 3
    assert axes.lines[0].get_ydata().tolist() == [50, 75]
    plt.close(figure)


def test_a_matrix_has_true_labels_in_its_rows():
    figure, axes = plt.subplots()
    matrix = [[0.75, 0.25], [0.0, 1.0]]
    report.show_matrix(axes, torch.tensor(matrix), "ab", "T")
    assert axes.images[0].get_array().tolist() == matrix
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true label", "noisy label")
    printed = {text.get_position(): text.get_text() for text in axes.texts}
    assert printed == {(0, 0): ".75", (1, 0): ".25", (1, 1): "1"}  # column, row
    plt.close(figure)


def test_gains_are_taken_seed_by_seed():
    table = Table(
        "paper",
        "Table 2",
        "Another",
        (
            Cell("ours", "a", None, spec=SPEC),
            Cell(
                "plain",
                "a",
                None,
                spec=dataclasses.replace(SPEC, method="cross-entropy"),
            ),
            Cell("absent", "a", None, spec=dataclasses.replace(SPEC, num_clean=7)),
        ),
    )
    done = [record(0.90, seed=0), record(0.96, seed=1), record(0.5, seed=2)]
    done += [record(x, seed=s, method="cross-entropy") for s, x in ((0, 0.8), (1, 0.9))]
    (line,) = report.gains(table, done, "ours").itertuples()
    assert (line.column, line.over, line.seeds) == ("a", "plain", 2)
    assert line.gain == pytest.approx(8.0)
    assert line.std == pytest.approx(8**0.5)  # of 10 and 6
    (turned,) = report.gains(table, done, "plain").itertuples()
    assert turned.gain == pytest.approx(-8.0)
    assert report.gains(table, done, "absent").empty
    assert report.gains(table, [], "ours").empty


def test_a_cell_may_measure_the_labels_or_the_best_epoch():
    expected = {
        **{"labels_given": 76, "labels_first": 50, "labels_last": 80},
        **{"kept_right": 20, "kept_wrong": 10, "discarded": 70},
        **{"last_accuracy": 50, "best_accuracy": 25},
    }
    cells = [Cell(name, "a", None, spec=SPEC, measure=name) for name in expected]
    table = Table("paper", "Table 2", "Labels", tuple(cells))
    shares = {"correct": 0.2, "incorrect": 0.1, "unlabelled": 0.7}
    done = record(0.5) | {"label_accuracy": [0.5, 0.6, 0.8], "screening": shares}
    found = report.measured(table, [done])["measured"].tolist()
    assert found == pytest.approx(list(expected.values()))
    lacking = report.measured(table, [record(0.5)]).set_index("row")["measured"]
    assert pd.isna(lacking["discarded"])


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_of_the_papers_measures_what_a_record_has(name):
    measures = {cell.measure for cell in TABLES[name].cells}
    assert measures <= set(report.flat(record(0.5)))


# ---------------------------------------------------------------- every cell


def test_every_cell_is_there_measured_or_with_a_reason():
    whole = report.complete(TABLE, [record(0.90, seed=0), record(0.94, seed=1)])
    assert list(zip(whole["row"], whole["column"], strict=True)) == [
        (cell.row, cell.column) for cell in TABLE.cells
    ]
    assert whole["measured"].isna().tolist() == [False, True, True]
    assert whole["note"].tolist() == ["", "not run yet", "it is theirs"]
    assert whole["published"].fillna(0).tolist() == [90.0, 0.0, 80.0]


def test_a_table_that_nobody_has_run():
    whole = report.complete(TABLE, [])
    assert whole["note"].tolist() == ["not run yet", "not run yet", "it is theirs"]
    shown = report.at_a_glance(whole).data
    assert shown.loc["ours", "a"] == "– (90.0)<br><small>not run yet</small>"
    assert shown.loc["theirs", "b"] == ""


def test_data_that_not_everybody_has():
    spec = Spec("clean-only", "clothing1m", "crawled", None, num_clean=9)
    table = Table("paper", "Table 1", "", (Cell("ours", "a", 90.0, spec=spec),))
    assert report.complete(table, [])["note"].tolist() == ["for whoever has the data"]


def test_a_cell_at_a_glance():
    done = [record(0.90, seed=0), record(0.94, seed=1), record(0.5, noise_rate=0.2)]
    shown = report.at_a_glance(report.complete(TABLE, done)).data
    assert shown.loc["ours", "a"] == (
        "<b>92.0 ± 2.8 †</b> (90.0)<br><small>2 seeds, paper, 10 s</small>"
    )
    assert shown.loc["ours", "b"] == (
        "<b>50.0 †</b><br><small>1 seed, paper, 10 s</small>"
    )
    assert list(shown.index) == ["ours", "theirs"]
    assert list(shown.columns) == ["a", "b"]


def test_of_two_profiles_the_papers_is_shown():
    done = [record(0.5, profile="quick"), record(0.9)]
    shown = report.at_a_glance(report.complete(TABLE, done)).data
    assert "90.0" in shown.loc["ours", "a"].partition("(")[0]


@pytest.mark.parametrize(
    ("accuracy", "profile", "colour"),
    [
        (0.92, "paper", "#cfe5f3"),
        (0.96, "paper", "#9ccbe8"),
        (0.88, "paper", "#fbe3b5"),
        (0.84, "paper", "#f6c667"),
        (0.9104, "paper", None),  # one point, rounded as it is printed
        (0.50, "quick", None),  # no rival of the published number
    ],
)
def test_colours_of_agreement(accuracy, profile, colour):
    done = [record(accuracy, profile=profile)]
    for shown in (
        report.at_a_glance(report.complete(TABLE, done)),
        report.beside(report.measured(TABLE, done)),
    ):
        html = shown.to_html()
        found = [c for c in ("#cfe5f3", "#9ccbe8", "#fbe3b5", "#f6c667") if c in html]
        assert found == ([colour] if colour else [])
