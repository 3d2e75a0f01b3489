"""Losses: a hand value, a batch against a loop, gradients, extremes, limits."""

import math

import pytest
import torch

from nlhelpers import losses


def random_logits(rows=7, columns=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 3


LABELS = torch.tensor([0, 1, 2, 3, 3, 0, 1])


def plain_cross_entropy(logits, label):
    return math.log(sum(math.exp(x) for x in logits)) - logits[label]


def plain_one_vs_rest(logits, label):
    total = 0.0
    for k, x in enumerate(logits):
        p = 1 / (1 + math.exp(-x))
        total -= (len(logits) - 1) * math.log(p) if k == label else math.log(1 - p)
    return total


PLAIN = [
    (losses.cross_entropy, plain_cross_entropy),
    (losses.one_vs_rest, plain_one_vs_rest),
]


def test_cross_entropy_by_hand():
    # softmax of (0, ln 3) is (1/4, 3/4).
    logits = torch.tensor([[0.0, math.log(3)]] * 2)
    found = losses.cross_entropy(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor([math.log(4), math.log(4 / 3)]))


def test_one_vs_rest_by_hand():
    # Every sigmoid is 1/2: the positive counts K - 1 = 2 times, both negatives once.
    found = losses.one_vs_rest(torch.zeros(1, 3), torch.tensor([1]))
    torch.testing.assert_close(found, torch.tensor([4 * math.log(2)]))


def test_consistency_by_hand():
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    other = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.8, 0.2]])
    found = losses.consistency(probs, other)
    torch.testing.assert_close(found, torch.tensor([2.0, 0.0, 0.08]))


@pytest.mark.parametrize(("loss", "plain"), PLAIN)
def test_batch_against_a_loop(loss, plain):
    logits = random_logits()
    pairs = zip(logits.tolist(), LABELS.tolist(), strict=True)
    by_loop = torch.tensor([plain(*pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(loss(logits, LABELS), by_loop)


def test_consistency_against_a_loop():
    probs, other = random_logits().softmax(1), random_logits().flip(0).softmax(1)
    by_loop = [
        sum((a - b) ** 2 for a, b in zip(*rows, strict=True))
        for rows in zip(probs.tolist(), other.tolist(), strict=True)
    ]
    found = losses.consistency(probs, other)
    torch.testing.assert_close(found, torch.tensor(by_loop, dtype=torch.float64))


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.one_vs_rest])
def test_gradient(loss):
    logits = random_logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, LABELS), logits)


def test_gradient_of_consistency():
    logits = random_logits().requires_grad_()
    other = random_logits().flip(0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: losses.consistency(a.softmax(1), b.softmax(1)), (logits, other)
    )


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.one_vs_rest])
def test_extreme_logits(loss):
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    labels = torch.tensor([0, 0])
    right, wrong = values = loss(logits, labels)
    assert right == 0.0
    assert 1e4 <= wrong < 1e5
    values.sum().backward()
    assert logits.grad.isfinite().all()


def test_consistency_of_extreme_logits():
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    values = losses.consistency(logits.softmax(1), (-logits).softmax(1))
    assert values.tolist() == [2.0]
    values.sum().backward()
    assert logits.grad.isfinite().all()


def test_limits():
    even = torch.zeros(1, 10)
    label = torch.tensor([3])
    assert losses.cross_entropy(even, label).item() == pytest.approx(math.log(10))
    # With two classes the positive weighs 1: both binary losses are cross-entropies.
    logits, labels = torch.tensor([[0.3, -0.3]]), torch.tensor([1])
    torch.testing.assert_close(
        losses.one_vs_rest(logits, labels), 2 * losses.cross_entropy(logits / 2, labels)
    )
    probs = random_logits().softmax(1)
    assert (losses.consistency(probs, probs) == 0).all()
    assert (losses.consistency(probs, probs.flip(1)) <= 2).all()


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.one_vs_rest])
def test_one_value_per_example_in_the_type_given(loss):
    values = loss(random_logits().float(), LABELS)
    assert values.shape == (7,)
    assert values.dtype == torch.float32
