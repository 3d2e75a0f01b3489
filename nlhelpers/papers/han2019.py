"""Han, Luo and Wang (2019): the tables of their slides.

Accuracies are in percent. Clothing1M and Food-101N are for whoever has them; beside
them is CIFAR-10 with human mistakes (CIFAR-10N, the label set named "worst"), where
about as many labels are wrong as in Clothing1M. Its network is that of the CIFAR-10N
column beside Xiao et al. (2015), so that methods of the two papers can be compared.
"""

from nlhelpers.papers.table import Cell, Table
from nlhelpers.specs import Spec

CLOTHING1M = {
    "dataset": "clothing1m",
    "noise": "crawled",
    "noise_rate": None,
    "model": "resnet50",
}
FOOD101N = {**CLOTHING1M, "dataset": "food101n"}
PRETRAINED = {"start_pretrained": True}  # on ImageNet, the networks for photographs
PLAIN = {"alpha": 0.0}  # cross-entropy: self-learning that corrects nothing
CIFAR10N = {
    "dataset": "cifar10",
    "noise": "human-worst",
    "noise_rate": None,
    "model": "caffe-quick",
}

# Column of Table 1: the data, and the number of clean images in the rows "25k verify"
# and "50k clean", which are about as large a share of the open data.
COLUMNS = {
    "Clothing1M": (CLOTHING1M, 25_000, 47_570),
    "CIFAR-10N, worst": (CIFAR10N, 1250, 2500),
}
NOISY, VERIFY, CLEAN = "1M noisy", "1M noisy + 25k verify", "1M noisy + 50k clean"
TUNED = {"finetune": True}

# Rows of Table 1: data, system, accuracy, and how we run it.
ROWS = (
    (NOISY, "cross-entropy", 69.54, "self-learning", PLAIN),
    (NOISY, "forward", 69.84, "forward", {}),
    (NOISY, "Joint Optimization", 72.23, "joint-optimization", {}),
    # Probably after their second iteration, which has a mentor; we do only the first.
    (NOISY, "MLNT, teacher", 73.47, "mlnt", {}),
    (NOISY, "ours", 74.45, "self-learning", {}),
    (VERIFY, "forward", 73.11, "forward", {}),
    (VERIFY, "CleanNet, hard", 74.15, "clean-net-hard", {}),
    (VERIFY, "CleanNet, soft", 74.69, "clean-net-soft", {}),
    (VERIFY, "ours", 76.44, "self-learning", {}),
    (CLEAN, "cross-entropy", 80.27, "self-learning", PLAIN | TUNED),
    (CLEAN, "forward", 80.38, "forward", TUNED),
    (CLEAN, "CleanNet, soft", 79.90, "clean-net-soft", TUNED),
    (CLEAN, "ours", 81.16, "self-learning", TUNED),
)


def _spec(data: str, column: str, method: str | None = "self-learning", **settings):
    """The run of a system on the data of a row, or None."""
    if method is None:
        return None
    values, verified, clean = COLUMNS[column]
    if values["dataset"] != "cifar10":
        settings |= PRETRAINED
    num_clean = {NOISY: 0, VERIFY: verified, CLEAN: clean}[data]
    return Spec(
        method, **values, profile="paper", num_clean=num_clean, settings=settings
    )


TABLE1 = Table(
    "han2019",
    "Table 1",
    "Accuracy on Clothing1M, and on CIFAR-10N beside it",
    tuple(
        Cell(
            f"{system}, {data}",
            column,
            value if column == "Clothing1M" else None,
            spec=_spec(data, column, method, **settings),
        )
        for column in COLUMNS
        for data, system, value, method, settings in ROWS
    ),
)

# Share of right labels: as given, when first corrected, and as corrected in the end.
LABELS = {
    "original": (61.74, "labels_given"),
    "correct initial": (74.38, "labels_first"),
    "correct final": (77.36, "labels_last"),
}
TABLE2 = Table(
    "han2019",
    "Table 2",
    "Accuracy of the labels of the training set",
    tuple(
        Cell(
            row,
            column,
            value if column == "Clothing1M" else None,
            spec=_spec(NOISY, column),
            measure=measure,
        )
        for column in COLUMNS
        for row, (value, measure) in LABELS.items()
    ),
)

# Number of samples m: final and initial accuracy, without and with 25k verified images.
# The slides' initial is "the correct accuracy by the model just step into the first
# label correction phase"; at m = 1280 it is not that of Table 2. We put none beside it.
SAMPLES = {
    320: (74.37, 72.04, 76.43, 74.09),
    640: (74.07, 72.03, 76.49, 73.97),
    1280: (74.45, 72.09, 76.44, 74.17),
    2560: (74.27, 72.05, 76.55, 74.21),
}


def _table3() -> tuple[Cell, ...]:
    cells = []
    for column in COLUMNS:
        published = column == "Clothing1M"
        for m, (final, initial, verified, verified_initial) in SAMPLES.items():
            settings = {} if m == 1280 else {"num_samples": m}
            for data, value, first in (
                (NOISY, final, initial),
                (VERIFY, verified, verified_initial),
            ):
                # About 125 images per class of CIFAR-10N are verified, fewer than any
                # m: every m would be the same run.
                if data == VERIFY and settings and not published:
                    continue
                place = f"m = {m}, {data}"
                spec = _spec(data, column, **settings)
                cells.append(
                    Cell(place, column, value if published else None, spec=spec)
                )
                if published:
                    note = "defined, but not as what Table 2 calls initial"
                    cells.append(Cell(f"{place}, initial", column, first, note=note))
    return tuple(cells)


TABLE3 = Table(
    "han2019",
    "Table 3",
    "Accuracy with prototypes chosen among m images of each class",
    _table3(),
)

SELECTORS = {
    "K-means++": ({"selector": "k-means++"}, 74.08, 76.22),
    "density peaks, Euclidean": ({"selector": "euclidean"}, 74.11, 76.05),
    "ours": ({}, 74.45, 76.44),
}
TABLE4 = Table(
    "han2019",
    "Table 4",
    "Accuracy with prototypes chosen in three ways",
    tuple(
        Cell(
            f"{row}, {data}",
            column,
            value if column == "Clothing1M" else None,
            spec=_spec(data, column, **settings),
        )
        for column in COLUMNS
        for row, (settings, *values) in SELECTORS.items()
        for data, value in zip((NOISY, VERIFY), values, strict=True)
    ),
)

VERIFIED = 52_868  # images of Food-101N with a verification label, all for training
TABLE5 = Table(
    "han2019",
    "Table 5",
    "Accuracy on Food-101N",
    (
        Cell(
            "cross-entropy",
            "Food-101N",
            84.51,
            spec=Spec(
                "self-learning",
                **FOOD101N,
                profile="paper",
                settings=PLAIN | PRETRAINED,
            ),
        ),
        *(
            Cell(
                f"CleanNet, {kind}",
                "Food-101N",
                value,
                spec=Spec(
                    f"clean-net-{kind}",
                    **FOOD101N,
                    profile="paper",
                    num_clean=VERIFIED,
                    settings=PRETRAINED,
                ),
            )
            for kind, value in (("hard", 83.47), ("soft", 83.95))
        ),
        Cell(
            "ours",
            "Food-101N",
            85.11,
            spec=Spec(
                "self-learning", **FOOD101N, profile="paper", settings=PRETRAINED
            ),
        ),
    ),
)
