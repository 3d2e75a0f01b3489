"""Chiaroni, Rahal, Hueber and Dufaux (2019): the published table.

The paper prints shares; here they are in percent.
"""

from nlhelpers.papers.table import Cell, Table
from nlhelpers.specs import BINARY, Spec

TASKS = {
    "{5;7} vs {2;4}, MNIST": ("mnist", "5,7 vs 2,4", {}),
    "car vs airplane, CIFAR-10": (
        "cifar10",
        "automobile vs airplane",
        {"game_epochs": 500 / 25},
    ),
}
FRACTIONS = ((0.85, 0.85), (0.7, 0.85), (0.6, 0.65))  # pi_P and pi_N

# PN, then NL-GAN and RP for each of the fractions.
ROWS = {
    ("{5;7} vs {2;4}, MNIST", 1000): (97.0, 96.1, 96.5, 95.6, 94.8, 92.6, 80.9),
    ("{5;7} vs {2;4}, MNIST", 100): (90.0, 90.9, 89.2, 88.1, 85.3, 81.4, 70.3),
    ("car vs airplane, CIFAR-10", 1000): (87.8, 84.3, 83.3, 82.4, 79.4, 70.4, 65.9),
    ("car vs airplane, CIFAR-10", 100): (78.9, 78.9, 76.1, 78.2, 73.9, 68.7, 64.0),
}


def _spec(
    method: str, task: str, size: int, pi: tuple[float, float], **settings: float | str
) -> Spec:
    """The run of a system on a row's data."""
    dataset, groups, _ = TASKS[task]
    return Spec(
        method,
        dataset,
        BINARY,
        None,
        profile="paper",
        model="deep-mnist",
        task=groups,
        pi=pi,
        num_images=size,
        settings=settings,
    )


def _table1() -> tuple[Cell, ...]:
    cells = []
    for (task, size), (reference, *values) in ROWS.items():
        row, longer = f"{task}, {size} images", TASKS[task][2]
        spec = _spec("cross-entropy", task, size, (1.0, 1.0))
        cells.append(Cell(row, "PN", reference, spec=spec))
        for pi, gan, rp in zip(FRACTIONS, values[::2], values[1::2], strict=True):
            column = f"π_P = {pi[0]:g}, π_N = {pi[1]:g}"
            known = {"pi_P": pi[0], "pi_N": pi[1]}  # "prior knowledge parameters"
            spec = _spec("nl-gan", task, size, pi, **known, **longer)
            cells.append(Cell(row, f"{column}, NL-GAN", gan, spec=spec))
            # Ours: the same with a discriminator that cannot learn labels by heart.
            known |= {"spectral": "all"}
            spec = _spec("nl-gan", task, size, pi, **known, **longer)
            cells.append(Cell(row, f"{column}, NL-GAN, all layers", None, spec=spec))
            spec = _spec("rank-pruning", task, size, pi)
            cells.append(Cell(row, f"{column}, RP", rp, spec=spec))
    return tuple(cells)


TABLE1 = Table(
    "chiaroni2019",
    "Table 1",
    "Accuracy on small data sets of two classes with noisy labels",
    _table1(),
)
