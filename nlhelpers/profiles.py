"""How long and on how much data a run trains: smoke, quick, paper.

`smoke` takes seconds and is for tests. `quick` takes minutes on two CPU cores and is
what the book runs. `paper` has the paper's own epochs and sizes.
"""

from dataclasses import replace

from nlhelpers import binary
from nlhelpers.training import Recipe

PROFILES = ("smoke", "quick", "paper")

# Ding et al. (2018), section 4.2; batch size from Patrini et al., weight decay from He
# et al. (2016). The rate of 0.1 that Ding et al. print is taken to be SGD's; AdaGrad
# has 0.01 in the code of Patrini et al.
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

# The solvers in the code that the authors of Xiao et al. (2015) published: for
# CIFAR-10, 4,000 of 5,000 or 6,000 steps are at the first rate; for Clothing1M, 50,000
# of the 100,000 of a first stage. There all methods have this one, and ours goes
# through the images 16 times.
CAFFE_QUICK = Recipe(
    epochs=12,
    batch_size=100,
    optimiser="sgd",
    learning_rate=0.001,
    weight_decay=0.004,
    factor=0.1,
    falls_after=(8,),
    val_share=0.05,
)
CLOTHING1M = replace(CAFFE_QUICK, epochs=16, batch_size=256, weight_decay=5e-4)

# Chiaroni et al. (2019), section 3.1; they name no batch size. The rate never falls.
DEEP_MNIST = Recipe(
    epochs=25, batch_size=128, optimiser="adam", learning_rate=1e-4, patience=25
)

# The slides of Han et al. (2019) name no settings for Food-101N; these are ours.
FOOD101N = replace(
    CLOTHING1M, epochs=30, batch_size=128, learning_rate=0.01, falls_after=(10, 20)
)

PHOTOGRAPHS = {"clothing1m": CLOTHING1M, "food101n": FOOD101N}  # for any model

RECIPES = {
    "mlp": MLP,
    "resnet14": RESNET,
    "caffe-quick": CAFFE_QUICK,
    "deep-mnist": DEEP_MNIST,
    "alexnet": CLOTHING1M,
    "resnet50": RESNET,
}
# Epochs of `quick`, where they are fewer than the paper's.
QUICK = {
    "mlp": 10,
    "resnet14": 6,
    "caffe-quick": 6,
    "deep-mnist": 10,
    "alexnet": 2,
    "resnet50": 3,
}
QUICK_FOLDER = 20  # of any model, as a folder of your own may hold few images

# Pixels per side that a network sees of a photograph.
PIXELS = dict.fromkeys(RECIPES, 32) | {"alexnet": 224, "resnet50": 224}

DEFAULT_MODELS = {
    "digits": "mlp",
    "mnist": "mlp",
    "fashion-mnist": "mlp",
    "cifar10": "resnet14",
    "clothing1m": "alexnet",
    "food101n": "resnet50",
    "folder": "resnet14",
}


def recipe(dataset: str, model: str, profile: str) -> Recipe:
    """The training recipe of a profile; `Spec` is taken to have checked the names."""
    paper = RECIPES[model]
    if dataset == "folder":
        return of_folder(model, profile)
    if dataset == "digits":
        # 42 times fewer images than MNIST: smaller batches keep the number of steps up.
        paper = replace(paper, batch_size=32)
    if dataset in PHOTOGRAPHS:
        paper = replace(PHOTOGRAPHS[dataset], crop=PIXELS[model] // 14, flip=True)
    elif dataset != "cifar10":
        paper = replace(paper, crop=0, flip=False)  # mirrored digits are other digits
    if profile == "smoke":
        return replace(shortened(paper, 2), limit=600)
    if profile == "quick" and dataset != "digits":
        limit = 5_000 if model != "mlp" else None
        return replace(shortened(paper, QUICK[model]), limit=limit)
    return paper


def of_folder(model: str, profile: str) -> Recipe:
    """The recipe for a folder of your own, which may hold few images."""
    paper = replace(RECIPES[model], batch_size=32, crop=0, flip=False)
    if PIXELS[model] > 32:  # whoever takes these networks has photographs
        crop = PIXELS[model] // 14
        paper = replace(FOOD101N, batch_size=32, crop=crop, flip=True)
    if profile == "smoke":
        return replace(shortened(paper, 2), limit=600)
    if profile == "quick":  # on all images: any label may be wrong
        return shortened(paper, min(QUICK_FOLDER, paper.epochs))
    return paper


def upsampled(model: str, profile: str, num_images: int) -> Recipe:
    """The recipe for a task whose few images are repeated to make many (`binary`).

    If there are more images than a profile has rows, all are taken, once each.
    """
    recipe = replace(RECIPES[model], crop=0, flip=False)
    if profile == "smoke":
        recipe = replace(shortened(recipe, 2), limit=600)
    if profile == "quick":
        recipe = replace(shortened(recipe, QUICK[model]), limit=5_000)
    rows = recipe.limit or binary.UPSAMPLED
    return recipe if num_images <= rows else replace(recipe, limit=num_images)


def shortened(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with fewer epochs, and its learning rate falling in proportion."""
    share = epochs / recipe.epochs
    return replace(
        recipe,
        epochs=epochs,
        patience=max(1, int(recipe.patience * share)),
        falls_after=[max(1, round(epoch * share)) for epoch in recipe.falls_after],
    )
