"""One file per method, each a short generator function in its paper's symbols.

A method is called as `method(data, setup, **settings)`; its settings are its
keyword-only arguments. It yields an `Epoch` after every epoch, or an `Auxiliary` if the
epoch was of a network that is not the result; a `Screening` when it decides which
labels to believe, a `Correction` when it changes them, and a `Transition` when it
estimates T.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from nlhelpers.methods import (
    bottom_up,
    clean_net,
    clean_only,
    co_teaching,
    confident_learning,
    cross_entropy,
    divide_mix,
    early_learning,
    improved_baseline,
    joint_optimization,
    loss_correction,
    mlnt,
    nl_gan,
    noise_model,
    noisy_as_truth,
    pseudo_label,
    rank_pruning,
    robust_losses,
    self_learning,
    two_stage,
    two_stage_pretrained,
)
from nlhelpers.training import Event


@dataclass(frozen=True)
class Method:
    """A method, and what the rest of the package needs to know about it.

    Attributes:
        run: takes `(data, setup, **settings)` and yields events.
        title: its name in the tables of the book.
        trainings: how many times it runs through the recipe's epochs, for progress
            bars.
        clean_set: whether images with true labels are "unused", "optional" or "needed".
        clean_validation: whether its paper validates on true labels.
        verdicts: whether it also learns from clean images of which it is known only
            that their given label is wrong.
        clean_trainings: how many `trainings` a clean set adds.
        two_classes: whether it is only for tasks with two classes.
        remembers: whether a training stores something for each image. Under torchrun,
            each process would store it for its own share only.
        more_trainings: settings that add `trainings`, each with how many it adds per
            unit of its value.
    """

    run: Callable[..., Iterator[Event]]
    title: str
    trainings: float = 1
    clean_set: str = "unused"
    clean_validation: bool = False
    verdicts: bool = False
    clean_trainings: float = 0
    two_classes: bool = False
    remembers: bool = False
    more_trainings: Mapping[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, object]:
        """Names and defaults of its settings."""
        parameters = inspect.signature(self.run).parameters.values()
        return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


STARTED = {"start_pretrained": 1}
TUNED = STARTED | {"finetune": self_learning.FINETUNE_EPOCHS}
CORRECTED = {  # on a clean set T is counted, which saves a training
    "trainings": 2,
    "clean_set": "optional",
    "clean_trainings": -1,
    "more_trainings": TUNED,
}

METHODS = {
    "cross-entropy": Method(cross_entropy.cross_entropy, "cross-entropy"),
    # Ding et al. (2018)
    "improved-baseline": Method(
        improved_baseline.improved_baseline, "improved baseline", trainings=2
    ),
    "two-stage": Method(
        two_stage.two_stage,
        "two-stage",
        2,
        "optional",
        clean_trainings=1,
        remembers=True,
    ),
    "two-stage-pretrained": Method(
        two_stage_pretrained.two_stage_pretrained,
        "two-stage, pretrained",
        3,
        "optional",
        clean_trainings=1,
        remembers=True,
        more_trainings={"finetune": self_learning.FINETUNE_EPOCHS},
    ),
    # Rows of its tables by others
    "unhinged": Method(robust_losses.unhinged, "unhinged (BN)"),
    "sigmoid": Method(robust_losses.sigmoid, "sigmoid (BN)"),
    "savage": Method(robust_losses.savage, "savage"),
    "bootstrap-soft": Method(robust_losses.bootstrap_soft, "bootstrap soft"),
    "bootstrap-hard": Method(robust_losses.bootstrap_hard, "bootstrap hard"),
    "backward": Method(loss_correction.backward, "backward", **CORRECTED),
    "forward": Method(loss_correction.forward, "forward", **CORRECTED),
    "pseudo-label": Method(
        pseudo_label.pseudo_label,
        "pseudo-label",
        2,
        "needed",
        True,
        more_trainings=STARTED,
    ),
    # Newer losses
    "generalised-cross-entropy": Method(
        robust_losses.generalised_cross_entropy, "generalised cross-entropy"
    ),
    "symmetric-cross-entropy": Method(
        robust_losses.symmetric_cross_entropy, "symmetric cross-entropy"
    ),
    "early-learning": Method(
        early_learning.early_learning,
        "early-learning regularisation",
        remembers=True,
    ),
    # Held-out networks
    "confident-learning": Method(
        confident_learning.confident_learning,
        "confident learning",
        trainings=5,
        more_trainings=STARTED,
    ),
    # Two networks
    "co-teaching": Method(co_teaching.co_teaching, "co-teaching"),
    "divide-mix": Method(divide_mix.divide_mix, "DivideMix"),
    # Xiao et al. (2015)
    "clean-only": Method(clean_only.clean_only, "clean only", 1, "needed", True),
    "clean-only-pretrained": Method(
        clean_only.clean_only_pretrained, "clean only, pretrained", 2, "needed", True
    ),
    "noisy-as-truth": Method(
        noisy_as_truth.noisy_as_truth, "noisy as truth", 1, "needed", True
    ),
    "noisy-as-truth-pretrained": Method(
        noisy_as_truth.noisy_as_truth_pretrained,
        "noisy as truth, pretrained",
        2,
        "needed",
        True,
    ),
    "noisy-as-truth-after-clean": Method(
        noisy_as_truth.noisy_as_truth_after_clean,
        "noisy as truth, after clean",
        2,
        "needed",
        True,
    ),
    "bottom-up": Method(
        bottom_up.bottom_up,
        "bottom-up",
        2,
        "needed",
        True,
        more_trainings=STARTED,
    ),
    "noise-model": Method(
        noise_model.noise_model,
        "noise model",
        2.25,
        "needed",
        True,
        more_trainings=STARTED,
    ),
    # Han et al. (2019)
    "self-learning": Method(
        self_learning.self_learning,
        "self-learning",
        1,
        "optional",
        more_trainings=TUNED,
    ),
    # Rows of its tables by others
    "joint-optimization": Method(
        joint_optimization.joint_optimization,
        "Joint Optimization",
        trainings=2,
        more_trainings=STARTED,
    ),
    "mlnt": Method(mlnt.mlnt, "MLNT, teacher", trainings=2, more_trainings=STARTED),
    "clean-net-hard": Method(
        clean_net.clean_net_hard,
        "CleanNet, hard",
        3,
        "needed",
        verdicts=True,
        more_trainings=TUNED,
    ),
    "clean-net-soft": Method(
        clean_net.clean_net_soft,
        "CleanNet, soft",
        3,
        "needed",
        verdicts=True,
        more_trainings=TUNED,
    ),
    # Chiaroni et al. (2019)
    "nl-gan": Method(
        nl_gan.nl_gan, "NL-GAN", two_classes=True, more_trainings={"game_epochs": 1}
    ),
    "rank-pruning": Method(
        rank_pruning.rank_pruning, "rank pruning", trainings=4, two_classes=True
    ),
}
