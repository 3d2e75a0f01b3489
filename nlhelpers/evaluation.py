"""How a run is judged: the only code that brings a network and the truth together."""

from torch import Tensor

from nlhelpers import training
from nlhelpers.data import Truth
from nlhelpers.training import Epoch


def measure(epoch: Epoch, truth: Truth) -> dict[str, object]:
    """One row of a record's history."""
    test = training.accuracy(epoch.model, truth.test_images, truth.test_labels)
    return {
        "stage": epoch.stage,
        "epoch": epoch.number,
        "loss": round(epoch.loss, 6),
        "val_accuracy": round(epoch.val_accuracy, 6),
        "test_accuracy": round(test, 6),
        "learning_rate": epoch.learning_rate,
        "images": epoch.images,
        "seconds": round(epoch.seconds, 4),
    }


def outcome(history: list[dict[str, object]]) -> dict[str, object]:
    """Test accuracy after the last epoch, and at the best validation epoch.

    The best epoch is the first with the highest validation accuracy in the method's
    last training; the test set plays no part in the choice.
    """
    final = [row for row in history if row["stage"] == history[-1]["stage"]]
    best = max(final, key=lambda row: row["val_accuracy"])
    images = sum(row["images"] for row in history)
    return {
        "last_accuracy": final[-1]["test_accuracy"],
        "best_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "images_per_second": round(images / sum(row["seconds"] for row in history)),
    }


def screened(kept: Tensor, right: Tensor) -> dict[str, object]:
    """Shares of the training set (Ding et al. 2018, Table 2); they sum to 1."""
    return {
        "correct": (kept & right).double().mean().item(),
        "incorrect": (kept & ~right).double().mean().item(),
        "unlabelled": (~kept).double().mean().item(),
    }
