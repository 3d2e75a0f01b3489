"""The "improved baseline" of Ding et al. (2018), Table 3.

Cross-entropy with two of the paper's ingredients: classes are balanced, and the
validation set that steers the training is refined by stage 1.
"""

from collections.abc import Iterator

from nlhelpers.data import NoisyData
from nlhelpers.methods import two_stage
from nlhelpers.training import Event, Setup


def improved_baseline(
    data: NoisyData, setup: Setup, *, threshold: float = 0.9, at_least: float = 0.1
) -> Iterator[Event]:
    """Train twice: once to refine the validation set, once from scratch with it.

    Args:
        data: images with noisy labels.
        setup: network and recipe, the same for both trainings.
        threshold: as in stage 1 of `two_stage`, for the validation labels.
        at_least: as in stage 1 of `two_stage`, for the validation labels.
    """
    rule = {"threshold": threshold, "at_least": at_least}
    two_stage.check_shares(**rule)
    _, _, val_kept = yield from two_stage.stage1(data, setup, **rule)
    validate = two_stage.validation(data, val_kept)
    model = setup.build(data)
    yield from two_stage.train_balanced(model, data, setup, validate, "stage 2")
