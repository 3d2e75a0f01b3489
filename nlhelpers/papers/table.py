"""What a published table is: cells with a value and, where we can run it, a spec."""

from dataclasses import dataclass, field, replace

from nlhelpers.specs import Spec


@dataclass(frozen=True)
class Cell:
    """One published number.

    Attributes:
        row: label of the table's row.
        column: label of the table's column.
        value: in percent; None where the paper has no such cell and we add one.
        std: standard deviation over the paper's runs, in percentage points, if printed.
        spec: the run that measures it, seed and profile aside; None if nothing does.
        measure: which number of a run it is, a key of `report.flat`.
        note: why nothing measures it.
    """

    row: str
    column: str
    value: float | None
    std: float | None = None
    spec: Spec | None = None
    measure: str = "last_accuracy"
    note: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError unless a cell has either a run or a note."""
        if (self.spec is None) == (not self.note):
            raise ValueError(
                f"the cell {self.row!r}, {self.column!r} must have a run or a note, "
                "and not both"
            )


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Attributes:
        paper: citation key in the book's bibliography.
        label: such as "Table 3".
        caption: what it shows.
        cells: in reading order.
    """

    paper: str
    label: str
    caption: str
    cells: tuple[Cell, ...] = field(repr=False)

    @property
    def datasets(self) -> list[str]:
        """The data sets that its cells run on."""
        return sorted({cell.spec.dataset for cell in self.cells if cell.spec})

    def specs(self, dataset: str, profile: str, seeds: range | list[int]) -> list[Spec]:
        """The runs behind the cells of a data set, seed by seed, none twice."""
        runs = [
            replace(cell.spec, profile=profile, seed=seed)
            for seed in seeds
            for cell in self.cells
            if cell.spec is not None and cell.spec.dataset == dataset
        ]
        if not runs:
            raise ValueError(
                f"{self.label} of {self.paper} has no runs on {dataset!r}; it has on "
                f"{', '.join(self.datasets)}"
            )
        return list(dict.fromkeys(runs))
