"""One file per method, each a short generator function in its paper's symbols.

A method is called as `method(data, setup, **settings)`. It yields an `Epoch` after
every epoch and a `Screening` when it decides which labels to believe; its settings are
its keyword-only arguments.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nlhelpers.methods import cross_entropy, improved_baseline, two_stage
from nlhelpers.training import Event


@dataclass(frozen=True)
class Method:
    """A method by name.

    Attributes:
        run: takes `(data, setup, **settings)`, yields events.
        title: as the tables of the book print it.
        trainings: how many times it trains a network, for progress bars.
        uses_clean_set: whether it has a use for images with true labels.
        clean_validation: whether its paper validates on true labels.
    """

    run: Callable[..., Iterator[Event]]
    title: str
    trainings: int = 1
    uses_clean_set: bool = False
    clean_validation: bool = False

    @property
    def settings(self) -> dict[str, object]:
        """Names and defaults of what can be set."""
        parameters = inspect.signature(self.run).parameters.values()
        return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


METHODS = {
    "cross-entropy": Method(cross_entropy.cross_entropy, "cross-entropy"),
    "improved-baseline": Method(
        improved_baseline.improved_baseline, "improved baseline", trainings=2
    ),
    "two-stage": Method(
        two_stage.two_stage, "two-stage (ours)", trainings=2, uses_clean_set=True
    ),
}
