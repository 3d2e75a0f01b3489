"""How runs are judged: hand values."""

import pytest
import torch

from nlhelpers import evaluation, models
from nlhelpers.data import Truth
from nlhelpers.training import Epoch


def row(stage, epoch, val, test):
    return {
        "stage": stage,
        "epoch": epoch,
        "val_accuracy": val,
        "test_accuracy": test,
        "images": 100,
        "seconds": 0.5,
    }


def test_the_best_epoch_is_the_first_with_the_highest_validation_accuracy():
    history = [
        row("one", 1, 0.99, 0.1),  # an earlier training has no say
        row("two", 1, 0.6, 0.2),
        row("two", 2, 0.8, 0.3),
        row("two", 3, 0.8, 0.9),  # better on the test set, which has no say either
        row("two", 4, 0.7, 0.4),
    ]
    assert evaluation.outcome(history) == {
        "last_accuracy": 0.4,
        "best_accuracy": 0.3,
        "best_epoch": 2,
        "images_per_second": 200,
    }


def test_screened_shares_by_hand():
    kept = torch.tensor([True, True, True, False])
    right = torch.tensor([True, True, False, True])
    found = evaluation.screened(kept, right)
    assert found == {"correct": 0.5, "incorrect": 0.25, "unlabelled": 0.25}


def test_a_row_holds_the_accuracy_on_the_true_test_labels(seeded):
    images = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
    model = models.build("mlp", images, 10).eval()
    labels = model(images).argmax(dim=1)
    labels[:5] = (labels[:5] + 1) % 10
    nothing = torch.zeros(0, dtype=torch.int64)
    truth = Truth(nothing, nothing, images, labels, nothing)
    epoch = Epoch("stage", 3, model, 1.25, 0.5, 0.01, 20, 0.1)
    found = evaluation.measure(epoch, truth)
    assert found["test_accuracy"] == pytest.approx(0.75)
    assert (found["epoch"], found["loss"], found["val_accuracy"]) == (3, 1.25, 0.5)
