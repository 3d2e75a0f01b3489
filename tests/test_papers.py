"""The published tables against numbers typed from the papers' pages."""

import dataclasses

import pytest

from nlhelpers import profiles
from nlhelpers.methods import METHODS
from nlhelpers.papers import TABLES, ding2018
from nlhelpers.papers.table import Cell, Table
from nlhelpers.specs import Spec

# Ding et al. (2018), Table 3: (row, column) -> accuracy, standard deviation.
TABLE_3 = {
    ("cross-entropy [37]", "CIFAR-10, asy. p = 0.6"): (57.6, None),
    ("cross-entropy [37]", "MNIST, asy. p = 0.6"): (53.0, 0.6),
    ("sigmoid (BN)", "CIFAR-10, sy. p = 0.2"): (66.6, None),
    ("backward", "MNIST, asy. p = 0.6"): (67.4, 1.5),
    ("forward", "CIFAR-10, asy. p = 0.2"): (87.0, None),
    ("forward", "MNIST, asy. p = 0.6"): (64.9, 4.4),
    ("cross-entropy", "CIFAR-10, p = 0"): (87.9, None),
    ("cross-entropy", "MNIST, asy. p = 0.6"): (52.9, 0.6),
    ("improved baseline", "CIFAR-10, asy. p = 0.6"): (74.1, None),
    ("improved baseline", "MNIST, asy. p = 0.6"): (76.7, 1.6),
    ("ours", "CIFAR-10, p = 0"): (88.0, None),
    ("ours", "CIFAR-10, sy. p = 0.2"): (84.5, None),
    ("ours", "CIFAR-10, asy. p = 0.2"): (85.6, None),
    ("ours", "CIFAR-10, asy. p = 0.6"): (75.8, None),
    ("ours", "MNIST, p = 0"): (98.2, 0.1),
    ("ours", "MNIST, sy. p = 0.2"): (97.7, 0.4),
    ("ours", "MNIST, asy. p = 0.2"): (97.8, 0.1),
    ("ours", "MNIST, asy. p = 0.6"): (83.4, 1.3),
}


def cells(name):
    return {(cell.row, cell.column): cell for cell in TABLES[name].cells}


def test_table_3():
    found = cells("ding2018-table3")
    for place, printed in TABLE_3.items():
        assert (found[place].value, found[place].std) == printed, place
    columns = {column for _, column in found if "↔" not in column}
    assert len(columns) == 8
    assert len({row for row, _ in found}) == 11


@pytest.mark.parametrize(
    ("column", "best"),
    [
        # The numbers in bold: "ours" but for one column.
        ("CIFAR-10, p = 0", "ours"),
        ("CIFAR-10, sy. p = 0.2", "ours"),
        ("CIFAR-10, asy. p = 0.2", "forward"),
        ("CIFAR-10, asy. p = 0.6", "ours"),
        ("MNIST, p = 0", "ours"),
        ("MNIST, sy. p = 0.2", "ours"),
        ("MNIST, asy. p = 0.2", "ours"),
        ("MNIST, asy. p = 0.6", "ours"),
    ],
)
def test_bold_numbers_are_the_best(column, best):
    values = {
        cell.row: cell.value
        for cell in TABLES["ding2018-table3"].cells
        if cell.column == column
    }
    assert max(values, key=values.get) == best


def test_the_other_reading_of_the_paths_has_the_same_published_number():
    found = cells("ding2018-table3")
    for row in ding2018.METHODS:
        for p in ("0.2", "0.6"):
            text = found[row, f"MNIST, asy. p = {p}"]
            swap = found[row, f"MNIST, asy. p = {p}, 5↔6"]
            assert (text.value, text.std) == (swap.value, swap.std)
            assert (text.spec.noise, swap.spec.noise) == (
                "asymmetric",
                "asymmetric-swap",
            )
            assert text.spec.noise_rate == swap.spec.noise_rate == float(p)


def test_every_cell_runs_what_its_labels_say():
    for (row, column), cell in cells("ding2018-table3").items():
        title = METHODS[cell.spec.method].title
        assert title == {"ours": "two-stage"}.get(row, row.removesuffix(" [37]"))
        # The program of Patrini et al. takes the network that is best on validation.
        quoted = row not in ("cross-entropy", "improved baseline", "ours")
        assert cell.measure == ("best_accuracy" if quoted else "last_accuracy")
        dataset, noise = column.split(", ")[:2]
        assert cell.spec.dataset == {"CIFAR-10": "cifar10", "MNIST": "mnist"}[dataset]
        rate = float(noise.split(" = ")[1])
        assert cell.spec.noise_rate == rate
        assert cell.spec.noise.startswith("asym") == noise.startswith("asy.")


def test_table_1():
    found = cells("ding2018-table1")
    printed = {
        "5%": (87.9, 84.2, 85.5, 75.6),
        "10%": (88.0, 84.5, 85.6, 75.8),
        "20%": (87.9, 85.1, 85.5, 76.2),
        "50%": (88.1, 84.5, 85.6, 74.8),
    }
    columns = ("p = 0", "sy. p = 0.2", "asy. p = 0.2", "asy. p = 0.6")
    for row, values in printed.items():
        for column, value in zip(columns, values, strict=True):
            cell = found[row, f"CIFAR-10, {column}"]
            assert cell.value == value
            assert found[row, f"MNIST, {column}"].value is None
            share = float(row.rstrip("%")) / 100
            settings = dict(cell.spec.settings)
            assert settings == {"at_least": share, "at_most": share}


def test_table_2():
    found = cells("ding2018-table2")
    last = [found["after stage 1", c] for c in ("correct", "incorrect", "no label")]
    assert [cell.value for cell in last] == [16.8, 0.2, 81.0]
    assert sum(cell.value for cell in last) == pytest.approx(98.0)  # as printed
    for row in {row for row, _ in found} - {"after stage 1"}:
        shares = [cell.value for (r, _), cell in found.items() if r == row]
        assert sum(shares) == pytest.approx(100.0)
    spec = last[0].spec
    assert (spec.dataset, spec.noise, spec.noise_rate) == ("cifar10", "asymmetric", 0.6)


@pytest.mark.parametrize("name", TABLES)
def test_no_cell_and_no_run_is_there_twice(name):
    table = TABLES[name]
    places = [(cell.row, cell.column) for cell in table.cells]
    assert len(set(places)) == len(places)
    assert table.label in (f"Table {name[-1]}", "the authors' logs")
    for dataset in {cell.spec.dataset for cell in table.cells if cell.spec}:
        for profile in profiles.PROFILES:
            specs = table.specs(dataset, profile, range(3))
            assert len(set(specs)) == len(specs)
            assert {spec.profile for spec in specs} == {profile}
            assert {spec.dataset for spec in specs} == {dataset}
            assert [spec.seed for spec in specs] == sorted(s.seed for s in specs)
            cell_specs = {c.spec for c in table.cells if c.spec}
            runs = {s for s in cell_specs if s.dataset == dataset}
            assert len(specs) == 3 * len(runs)


def test_table_3_is_ten_methods_in_six_noises_on_mnist():
    specs = TABLES["ding2018-table3"].specs("mnist", "paper", [0])
    assert len(specs) == 10 * 6  # cross-entropy is two of the eleven rows
    assert len(TABLES["ding2018-table3"].specs("cifar10", "paper", [0])) == 10 * 4


def test_a_table_without_runs_on_a_data_set():
    with pytest.raises(ValueError, match="no runs on 'digits'; it has on cifar10"):
        TABLES["ding2018-table3"].specs("digits", "quick", [0])
    empty = Table("key", "Table 0", "", (Cell("a", "b", 1.0, note="why"),))
    with pytest.raises(ValueError, match="has no runs on 'mnist'"):
        empty.specs("mnist", "quick", [0])


# ---------------------------------------------------------------- Xiao et al. (2015)


def test_xiaos_table_2():
    found = cells("xiao2015-table2")
    printed = {
        "1 clean only, random": (64.28, 64.54),
        "2 clean only, pretrained": (72.21, 72.63),
        "3 noisy as truth, random": (73.76, 74.03),
        "4 noisy as truth, pretrained": (75.57, 75.30),
        "5 bottom-up": (75.97, 76.22),
        "6 ours": (77.65, 78.24),
    }
    for row, (validation, test) in printed.items():
        assert found[row, "Clothing1M, validation"].value == validation
        assert found[row, "Clothing1M, test"].value == test
        share = found[row, "CIFAR-10N, worst"].spec.num_clean / 50_000
        assert 0.02 < share < 0.04
    ours = dict(found["6 ours", "Clothing1M, test"].spec.settings)
    assert ours["start_pretrained"] and ours["types_rate"] == 1
    assert ours["types_epochs"] == 5_000 / 15_000  # steps in the authors' solvers


def test_xiaos_logs():
    found = cells("xiao2015-cifar10")
    column = "CIFAR-10, noise level 0.3"
    assert found["clean only", column].value == 62.04
    assert found["noisy as truth, after clean", column].value == 65.81
    assert found["ours", column].value == 68.94
    for (row, _), cell in found.items():
        assert (cell.spec.num_clean, cell.spec.noise_rate) == (10_000, 0.3), row


# ---------------------------------------------------------------- Han et al. (2019)


def published(name, column="Clothing1M"):
    return {row: cell.value for (row, c), cell in cells(name).items() if c == column}


def test_han_table_1():
    found = published("han2019-table1")
    assert len(found) == 13
    assert found["ours, 1M noisy"] == 74.45
    assert found["ours, 1M noisy + 25k verify"] == 76.44
    assert found["cross-entropy, 1M noisy + 50k clean"] == 80.27
    for data in ("1M noisy", "1M noisy + 25k verify", "1M noisy + 50k clean"):
        values = {r: v for r, v in found.items() if r.endswith(f", {data}")}
        assert max(values, key=values.get) == f"ours, {data}"  # in bold


def test_han_tables_run_what_their_rows_say():
    found = cells("han2019-table1")
    for column, dataset in (
        ("Clothing1M", "clothing1m"),
        ("CIFAR-10N, worst", "cifar10"),
    ):
        plain = found["cross-entropy, 1M noisy", column].spec
        ours = found["ours, 1M noisy", column].spec
        verified = found["ours, 1M noisy + 25k verify", column].spec
        tuned = found["ours, 1M noisy + 50k clean", column].spec
        reference = found["cross-entropy, 1M noisy + 50k clean", column].spec
        start = {"start_pretrained": True} if dataset == "clothing1m" else {}
        assert {s.dataset for s in (plain, ours, verified, tuned)} == {dataset}
        assert dict(plain.settings) == {"alpha": 0.0} | start
        assert dict(ours.settings) == dict(verified.settings) == start
        assert plain.num_clean == ours.num_clean == 0
        assert 0 < verified.num_clean < tuned.num_clean == reference.num_clean
        assert dict(tuned.settings) == {"finetune": True} | start
        assert dict(reference.settings) == {"finetune": True, "alpha": 0.0} | start
        for data in ("1M noisy", "1M noisy + 25k verify", "1M noisy + 50k clean"):
            forward, own = (
                found[f"forward, {data}", column].spec,
                found[f"ours, {data}", column].spec,
            )
            assert forward == dataclasses.replace(own, method="forward")
        network = "resnet50" if dataset == "clothing1m" else "caffe-quick"
        assert {s.model for s in (plain, ours, verified, tuned, reference)} == {network}
    # A fortieth and a twentieth of the images, as of Clothing1M's million.
    assert verified.num_clean * 40 == tuned.num_clean * 20 == 50_000


def test_han_table_2():
    found = cells("han2019-table2")
    places = ("original", "correct initial", "correct final")
    assert [published("han2019-table2")[row] for row in places] == [61.74, 74.38, 77.36]
    measures = [found[row, "Clothing1M"].measure for row in places]
    assert measures == ["labels_given", "labels_first", "labels_last"]


def test_hans_open_column_has_the_network_of_xiaos():
    """So that methods of two papers can be compared."""
    column = "CIFAR-10N, worst"
    fields = ("dataset", "noise", "noise_rate", "model", "profile")
    protocols = {
        tuple(getattr(cell.spec, field) for field in fields)
        for name in TABLES
        for cell in TABLES[name].cells
        if cell.column == column and cell.spec
    }
    assert protocols == {("cifar10", "human-worst", None, "caffe-quick", "paper")}


def test_m_is_open_only_where_it_matters():
    """Of each class fewer images are verified than any m: one run stands for all."""
    table = cells("han2019-table3")
    places = {row: cell for (row, c), cell in table.items() if c == "CIFAR-10N, worst"}
    assert list(places) == [
        "m = 320, 1M noisy",
        "m = 640, 1M noisy",
        "m = 1280, 1M noisy",
        "m = 1280, 1M noisy + 25k verify",
        "m = 2560, 1M noisy",
    ]
    verified = places["m = 1280, 1M noisy + 25k verify"].spec
    assert verified.num_clean / 10 < 320
    assert all(cell.value is None for cell in places.values())
    assert len({cell.spec for cell in places.values()}) == 5


def test_han_tables_3_to_5():
    found = published("han2019-table3")
    finals = [found[f"m = {m}, 1M noisy"] for m in (320, 640, 1280, 2560)]
    assert finals == [74.37, 74.07, 74.45, 74.27]
    verified = [
        found[f"m = {m}, 1M noisy + 25k verify"] for m in (320, 640, 1280, 2560)
    ]
    assert verified == [76.43, 76.49, 76.44, 76.55]
    assert found["m = 2560, 1M noisy + 25k verify, initial"] == 74.21
    spec = cells("han2019-table3")["m = 320, 1M noisy", "Clothing1M"].spec
    assert dict(spec.settings)["num_samples"] == 320
    found = published("han2019-table4")
    assert list(found.values()) == [74.08, 76.22, 74.11, 76.05, 74.45, 76.44]
    assert published("han2019-table5", "Food-101N") == {
        "cross-entropy": 84.51,
        "CleanNet, hard": 83.47,
        "CleanNet, soft": 83.95,
        "ours": 85.11,
    }
    for kind in ("hard", "soft"):  # https://kuanghuei.github.io/Food-101N/
        spec = cells("han2019-table5")[f"CleanNet, {kind}", "Food-101N"].spec
        assert (spec.method, spec.num_clean) == (f"clean-net-{kind}", 52_868)


def test_the_default_run_is_the_same_in_every_table_of_han():
    specs = {
        cells(name)[row, "CIFAR-10N, worst"].spec
        for name, row in (
            ("han2019-table1", "ours, 1M noisy"),
            ("han2019-table2", "correct final"),
            ("han2019-table3", "m = 1280, 1M noisy"),
            ("han2019-table4", "ours, 1M noisy"),
        )
    }
    assert len(specs) == 1


def test_a_cell_has_a_run_or_says_why_not():
    with pytest.raises(ValueError, match="'a', 'b' must have a run or a note"):
        Cell("a", "b", 1.0)
    with pytest.raises(ValueError, match="'a', 'b' must have a run or a note"):
        Cell("a", "b", 1.0, spec=Spec(), note="why")


def test_ding_table_4():
    """Thirteen rows on Clothing1M, of which those by the authors have their own run."""
    found = cells("ding2018-table4")
    printed = {  # number -> reported, their own run
        1: (73.04, None),
        2: (76.22, None),
        3: (78.24, None),
        4: (68.94, 69.03),
        5: (69.13, None),
        6: (69.84, None),
        7: (None, 77.34),
        8: (None, 79.38),
        9: (72.63, None),
        10: (75.19, 74.84),
        11: (80.38, None),
        12: (None, 80.44),
        13: (None, 80.53),
    }
    values = {
        (int(row.split()[0]), column): cell.value
        for (row, column), cell in found.items()
    }
    columns = ("Clothing1M, reported", "Clothing1M, their own run")
    assert values == {
        (number, column): value
        for number, both in printed.items()
        for column, value in zip(columns, both, strict=True)
        if value is not None
    }
    for (row, _), cell in found.items():
        number, spec = int(row.split()[0]), cell.spec
        assert spec.model == ("alexnet" if number in (1, 2, 3, 9) else "resnet50")
        assert (spec.num_clean > 0) == (number in (1, 2, 3, 8, 9, 10, 11, 12, 13))
        assert dict(spec.settings).get("finetune", False) == (number > 10)


def test_chiaroni_table_1():
    found = cells("chiaroni2019-table1")
    mnist, cifar = "{5;7} vs {2;4}, MNIST", "car vs airplane, CIFAR-10"
    printed = {
        (f"{mnist}, 1000 images", "PN"): 97.0,
        (f"{mnist}, 1000 images", "π_P = 0.7, π_N = 0.85, NL-GAN"): 95.6,
        (f"{mnist}, 100 images", "π_P = 0.6, π_N = 0.65, RP"): 70.3,
        (f"{cifar}, 1000 images", "π_P = 0.85, π_N = 0.85, RP"): 83.3,
        (f"{cifar}, 100 images", "π_P = 0.6, π_N = 0.65, NL-GAN"): 68.7,
    }
    for place, value in printed.items():
        assert found[place].value == value
    assert len({row for row, _ in found}) == 4
    assert sum(cell.value is not None for cell in found.values()) == 4 * 7
    for (row, column), cell in found.items():
        settings = dict(cell.spec.settings)
        size = int(row.split(", ")[-1].split()[0])
        assert cell.spec.num_images == size
        assert cell.spec.dataset == ("mnist" if "MNIST" in row else "cifar10")
        assert (settings.get("spectral") == "all") == column.endswith("all layers")
        known = (settings.get("pi_P"), settings.get("pi_N"))
        assert known == (cell.spec.pi if "GAN" in column else (None, None))
