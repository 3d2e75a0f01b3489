"""How long and on how much a run trains: smoke, quick, paper.

`smoke` takes seconds and is for tests. `quick` takes minutes on two CPU cores and is
what the book runs. `paper` has the paper's own epochs and sizes.
"""

from dataclasses import replace

from nlhelpers.training import Recipe

PROFILES = ("smoke", "quick", "paper")

# Ding et al. (2018), section 4.2; batch size and AdaGrad's rate from Patrini et al.
MLP = Recipe(epochs=40, batch_size=128, optimiser="adagrad", learning_rate=0.01)
RESNET = Recipe(
    epochs=120,
    batch_size=128,
    optimiser="sgd",
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    crop=4,
    flip=True,
)

DEFAULT_MODELS = {
    "digits": "mlp",
    "mnist": "mlp",
    "fashion-mnist": "mlp",
    "cifar10": "resnet14",
}


def recipe(dataset: str, model: str, profile: str) -> Recipe:
    """The training recipe of a profile; names are taken as checked by `Spec`."""
    paper = MLP if model == "mlp" else RESNET
    if dataset == "digits":
        # 42 times fewer images than MNIST: smaller batches keep the number of steps up.
        paper = replace(paper, batch_size=32)
    if dataset != "cifar10":
        paper = replace(paper, crop=0, flip=False)  # mirrored digits are other digits
    if profile == "smoke":
        return replace(paper, epochs=2, limit=600, patience=1)
    if profile == "quick" and dataset != "digits":
        shorter = {"mlp": 10, "resnet14": 10, "resnet50": 3}[model]
        limit = 5_000 if model != "mlp" else None
        patience = max(1, paper.patience * shorter // paper.epochs)
        return replace(paper, epochs=shorter, limit=limit, patience=patience)
    return paper
