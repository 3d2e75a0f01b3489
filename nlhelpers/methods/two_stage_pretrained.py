"""The two-stage method as on Clothing1M: Ding et al. (2018), section 4.3 and Table 4.

Networks start from weights that were learnt without these labels, outputs are compared
by the Pi model (section 3.2; the introduction says temporal ensembling), alpha is
constant, and at the end the network may be fine-tuned on the clean set. The paper
trains with Adam; here the recipe is the one for all methods on Clothing1M.
"""

from collections.abc import Iterator

from nlhelpers.data import NoisyData, with_clean
from nlhelpers.methods.self_learning import check_finetune, train_on_clean_set
from nlhelpers.methods.two_stage import two_stage
from nlhelpers.pretraining import begun
from nlhelpers.training import Epoch, Event, Setup


def two_stage_pretrained(
    data: NoisyData,
    setup: Setup,
    *,
    alpha: float = 100.0,
    screen: bool = True,
    finetune: bool = False,
) -> Iterator[Event]:
    """Run both stages from pretrained weights; optionally fine-tune on the clean set.

    Args:
        data: images with noisy labels.
        setup: network and recipe, the same for all stages.
        alpha: weight of the consistency term in Eq. 2, the same in all epochs.
        screen: whether stage 1 screens with the clean set, if there is one (rows 8 and
            13); if False, it screens without it (row 12).
        finetune: whether to fine-tune on the clean set at the end (rows 12 and 13).
    """
    check_finetune(data, finetune)
    started = yield from begun(data, setup, start_pretrained=True)
    stages = data if screen else with_clean(data, slice(0))
    steady = {"consistency": "pi", "alpha": alpha, "fixed_alpha": True}
    for event in two_stage(stages, started, **steady):
        yield event
        if isinstance(event, Epoch):
            network = event.model
    if finetune:
        yield from train_on_clean_set(network, data, setup)
