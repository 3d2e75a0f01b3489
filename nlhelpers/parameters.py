"""The check behind every notebook's parameter cell.

papermill only warns when a parameter has a name that the notebook does not know, and
then runs the notebook as if it had not been given. Here such a name, or a bad value,
stops the notebook in the cell after its parameters.
"""

import ast
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from nlhelpers import records, training
from nlhelpers.grids import grid
from nlhelpers.methods import METHODS
from nlhelpers.specs import Spec, known, natural

SPEC_FIELDS = [
    field.name for field in dataclasses.fields(Spec) if field.name != "method"
]
OTHERS = {
    "methods": ["cross-entropy"],
    "num_seeds": 1,
    "device": "auto",
    "records_file": "records/runs.jsonl",
}


@dataclass(frozen=True)
class Parameters:
    """A notebook's parameters, checked.

    Attributes:
        spec: the run they describe, with the first method and the first seed.
        methods: names of the methods to compare.
        num_seeds: runs of each method, with consecutive seeds.
        device: where to train.
        records: a .jsonl file to store records in.
    """

    spec: Spec
    methods: tuple[str, ...]
    num_seeds: int
    device: torch.device
    records: Path

    def specs(self, **changes: object) -> list[Spec]:
        """The runs asked for, seed by seed; `changes` replace fields of each."""
        base = dataclasses.replace(self.spec, **changes)
        seeds = range(base.seed, base.seed + self.num_seeds)
        return grid(base, seed=seeds, method=self.methods)


def check(**values: object) -> Parameters:
    """Check the values of a notebook's parameter cell.

    Args:
        values: every parameter of the notebook by its name: fields of `Spec`, and
            `methods` (a list of names), `num_seeds` (how many seeds to run, from `seed`
            on), `device` ("auto", "cpu" or "cuda") and `records_file` (where to append
            records).

    Raises:
        ValueError: for a wrong value, or for a name that papermill was given but the
            notebook does not have; the message says what is allowed.
        RecordError: if `records_file` cannot be written.
    """
    for name in injected():
        known("parameter", name, values)
    for name in values:
        known("parameter", name, [*SPEC_FIELDS, *OTHERS])
    others = {name: values.pop(name, default) for name, default in OTHERS.items()}
    methods = listed("methods", others["methods"])
    for method in methods:
        known("method", method, METHODS)
    if natural("num_seeds", others["num_seeds"]) == 0:
        raise ValueError("num_seeds is 0; it must be at least 1")
    if not isinstance(others["records_file"], str | Path):
        raise ValueError(
            f"records_file is {others['records_file']!r}; it must be a path as text"
        )
    path = Path(others["records_file"]).expanduser()
    records.check_writable(path)
    return Parameters(
        Spec(method=methods[0], **values),
        tuple(dict.fromkeys(methods)),
        others["num_seeds"],
        training.pick_device(others["device"]),
        path,
    )


def listed(what: str, values: object) -> list:
    """Return the values as a list, or raise ValueError if there are none."""
    if isinstance(values, str) or not isinstance(values, Iterable) or not list(values):
        raise ValueError(
            f"{what} is {values!r}; it must be a list with at least one entry (with "
            f'papermill: -y "{what}: [...]")'
        )
    return list(values)


def injected() -> list[str]:
    """Names that papermill has set in this notebook; [] without papermill.

    papermill puts its values into a cell of their own, which starts with a fixed
    comment and has run by the time of the check.
    """
    try:
        cells = get_ipython().user_ns["In"]  # type: ignore[name-defined]
    except NameError:  # not in a notebook
        return []
    return [
        target.id
        for cell in cells
        if cell.startswith("# Parameters\n")
        for statement in ast.parse(cell).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
    ]
