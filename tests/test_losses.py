"""Losses: a hand value, a batch against a loop, gradients, extremes, limits."""

import math
from functools import partial

import pytest
import torch

from nlhelpers import losses, noise


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy_is_the_same_to_the_compiler(dtype, scale):
    logits = (random_logits() * scale).to(dtype).requires_grad_()
    eager = losses.cross_entropy(logits, LABELS)
    graph = losses.compiled_cross_entropy(logits, LABELS)
    assert torch.equal(eager, graph)
    wanted, found = (torch.autograd.grad(x.sum(), logits) for x in (eager, graph))
    assert torch.equal(*wanted, *found)


@pytest.mark.parametrize(
    "loss",
    [
        losses.cross_entropy,
        losses.bootstrap_soft,
        losses.bootstrap_hard,
        losses.generalised_cross_entropy,
        losses.symmetric_cross_entropy,
    ],
)
def test_the_compiler_sees_no_loss_with_a_kernel_of_its_own(loss):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def step(logits):  # what is compiled calls the loss, and is not the loss itself
        return loss(logits, LABELS)

    logits = random_logits()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    assert torch.equal(compiled(logits), step(logits))
    (graph,) = graphs
    assert "where" in graph.code
    assert "cross_entropy" not in graph.code


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


def test_the_mean_of_some():
    values = torch.tensor([1.0, 5.0, 3.0, 100.0], requires_grad=True)
    mean = losses.mean_over(values, torch.tensor([True, False, True, False]))
    mean.backward()
    assert mean.item() == 2.0
    assert values.grad.tolist() == [0.5, 0.0, 0.5, 0.0]


# ---------------------------------------------------------------- robust losses


def softmax(logits):
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def logistic(x):
    return 1 / (1 + math.exp(-x))


def plain_unhinged(logits, label, others=0.0):
    y = [1.0 if k == label else others for k in range(len(logits))]
    return sum(1 - a * b for a, b in zip(y, logits, strict=True)) / len(logits)


def plain_sigmoid(logits, label, others=0.0):
    y = [1.0 if k == label else others for k in range(len(logits))]
    return sum(logistic(-a * b) for a, b in zip(y, logits, strict=True)) / len(logits)


def plain_savage(logits, label):
    y = [float(k == label) for k in range(len(logits))]
    terms = [
        1 / (1 + math.exp(2 * a * p)) ** 2
        for a, p in zip(y, softmax(logits), strict=True)
    ]
    return sum(terms) / len(terms)


def plain_bootstrap_soft(logits, label):
    p = softmax(logits)
    return -sum((0.95 * (k == label) + 0.05 * q) * math.log(q) for k, q in enumerate(p))


def plain_bootstrap_hard(logits, label):
    p = softmax(logits)
    return -0.8 * math.log(p[label]) - 0.2 * math.log(max(p))


def plain_generalised(logits, label):
    return (1 - softmax(logits)[label] ** 0.7) / 0.7


def plain_symmetric(logits, label):
    p = softmax(logits)
    y = [float(k == label) for k in range(len(p))]
    reverse = -sum(q * (math.log(a) if a else -4.0) for q, a in zip(p, y, strict=True))
    return -0.1 * math.log(p[label]) + reverse


T = torch.tensor(
    [[0.7, 0.3, 0, 0], [0, 0.6, 0.2, 0.2], [0.1, 0, 0.9, 0], [0.4, 0, 0, 0.6]],
    dtype=torch.float64,
)


def plain_forward(logits, label):
    return -math.log(sum(p * T[i, label].item() for i, p in enumerate(softmax(logits))))


def plain_backward(logits, label):
    inverse = torch.linalg.inv(T)[label].tolist()
    return -sum(a * math.log(p) for a, p in zip(inverse, softmax(logits), strict=True))


ROBUST = [
    (losses.unhinged, plain_unhinged),
    (partial(losses.unhinged, others=-1.0), partial(plain_unhinged, others=-1.0)),
    (losses.sigmoid, plain_sigmoid),
    (partial(losses.sigmoid, others=-1.0), partial(plain_sigmoid, others=-1.0)),
    (losses.savage, plain_savage),
    (losses.bootstrap_soft, plain_bootstrap_soft),
    (losses.bootstrap_hard, plain_bootstrap_hard),
    (losses.generalised_cross_entropy, plain_generalised),
    (losses.symmetric_cross_entropy, plain_symmetric),
    (partial(losses.forward, transition=T), plain_forward),
    (partial(losses.backward, inverse=torch.linalg.inv(T)), plain_backward),
]


@pytest.mark.parametrize(("loss", "plain"), ROBUST)
def test_robust_losses_against_a_loop(loss, plain):
    logits = random_logits()
    pairs = zip(logits.tolist(), LABELS.tolist(), strict=True)
    by_loop = torch.tensor([plain(*pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(loss(logits, LABELS), by_loop)


@pytest.mark.parametrize("loss", [loss for loss, _ in ROBUST])
def test_gradient_of_robust_losses(loss):
    logits = random_logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, LABELS), logits)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # softmax of (0, ln 3) is (1/4, 3/4); the label is 0.
        (losses.unhinged, 1.0),  # (1 - 0) and (1 - 0 ln 3), halved
        (losses.sigmoid, 0.5),
        (losses.savage, (1 / (1 + math.exp(0.5)) ** 2 + 0.25) / 2),
        (
            partial(losses.bootstrap_soft, beta=0.5),
            -0.625 * math.log(0.25) - 0.375 * math.log(0.75),
        ),
        (
            partial(losses.bootstrap_hard, beta=0.5),
            -0.5 * math.log(0.25) - 0.5 * math.log(0.75),
        ),
        (partial(losses.generalised_cross_entropy, q=0.5), 1.0),
        (partial(losses.symmetric_cross_entropy, alpha=1.0), math.log(4) + 3.0),
        (
            partial(losses.forward, transition=torch.tensor([[0.8, 0.2], [0.4, 0.6]])),
            math.log(2),  # 0.8 / 4 + 0.4 * 3 / 4 = 1 / 2
        ),
        (
            partial(losses.backward, inverse=torch.tensor([[1.5, -0.5], [-1.0, 2.0]])),
            1.5 * math.log(4) - 0.5 * math.log(4 / 3),
        ),
    ],
)
def test_robust_losses_by_hand(loss, expected):
    found = loss(torch.tensor([[0.0, math.log(3)]]), torch.tensor([0]))
    torch.testing.assert_close(found, torch.tensor([expected]))


@pytest.mark.parametrize(
    "loss",
    [
        partial(losses.bootstrap_soft, beta=1.0),
        partial(losses.bootstrap_hard, beta=1.0),
        partial(losses.generalised_cross_entropy, q=1e-9),
        partial(losses.symmetric_cross_entropy, alpha=1.0, beta=0.0),
        partial(losses.forward, transition=torch.eye(4)),
        partial(losses.backward, inverse=torch.eye(4)),
    ],
)
def test_limits_that_are_cross_entropy(loss):
    logits = random_logits()
    expected = losses.cross_entropy(logits, LABELS)
    torch.testing.assert_close(loss(logits, LABELS), expected, rtol=1e-6, atol=1e-6)


def test_generalised_cross_entropy_with_q_1_is_the_mean_absolute_error():
    logits = random_logits()
    found = losses.generalised_cross_entropy(logits, LABELS, q=1.0)
    one_hot = torch.nn.functional.one_hot(LABELS, 4)
    expected = (logits.softmax(1) - one_hot).abs().sum(1) / 2
    torch.testing.assert_close(found, expected)


def over_all_labels(loss, logits):
    rows, classes = logits.shape
    labels = [torch.full((rows,), k) for k in range(classes)]
    return sum(loss(logits, label) for label in labels)


@pytest.mark.parametrize(
    ("loss", "classes", "constant"),
    [
        (partial(losses.unhinged, others=-1.0), 2, 2.0),
        (partial(losses.unhinged, others=-1 / 3), 4, 4.0),
        (partial(losses.unhinged, others=-1 / 9), 10, 10.0),
        (partial(losses.sigmoid, others=-1.0), 2, 1.0),
        (partial(losses.generalised_cross_entropy, q=1.0), 4, 3.0),
    ],
)
def test_sum_over_the_labels_of_a_symmetric_loss_is_constant(loss, classes, constant):
    total = over_all_labels(loss, random_logits(50, classes))
    torch.testing.assert_close(total, torch.full_like(total, constant))


@pytest.mark.parametrize(
    "loss", [losses.unhinged, losses.sigmoid, losses.cross_entropy, losses.savage]
)
def test_as_they_were_run_none_is_symmetric(loss):
    assert over_all_labels(loss, random_logits(50, 4)).std() > 0.01


def test_normalised_outputs_make_the_unhinged_loss_symmetric_on_the_whole():
    outputs = torch.nn.BatchNorm1d(4).double()(random_logits(50, 4))
    total = over_all_labels(losses.unhinged, outputs)
    torch.testing.assert_close(total.mean(), torch.tensor(4.0).double())


def test_backward_loss_is_the_clean_loss_on_average():
    """Theorem 1: over the labels that T makes of i, its mean is the loss of i."""
    logits = random_logits(50, 4)
    corrected = [
        losses.backward(logits, torch.full((50,), j), torch.linalg.inv(T))
        for j in range(4)
    ]
    for i in range(4):
        mean = sum(T[i, j] * corrected[j] for j in range(4))
        clean = losses.cross_entropy(logits, torch.full((50,), i))
        torch.testing.assert_close(mean, clean)


def test_forward_loss_is_least_where_p_is_the_truth():
    """Theorem 2: over the labels that T makes of q, no p does better than q."""
    q = random_logits(50, 4).softmax(1)
    noisy = q @ T

    def mean(p):
        of_label = [losses.forward(p.log(), torch.full((50,), j), T) for j in range(4)]
        return sum(noisy[:, j] * of_label[j] for j in range(4))

    least = mean(q)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        other = torch.rand(50, 4, generator=generator, dtype=torch.float64)
        assert (mean(other / other.sum(1, keepdim=True)) > least).all()


@pytest.mark.parametrize("loss", [loss for loss, _ in ROBUST])
def test_extreme_logits_of_robust_losses(loss):
    logits = torch.tensor([[1e4, -1e4, 0, 0], [-1e4, 1e4, 0, 0]], requires_grad=True)
    values = loss(logits, torch.tensor([0, 0]))
    assert values.isfinite().all()
    values.sum().backward()
    assert logits.grad.isfinite().all()


def test_backward_loss_has_a_lower_bound():
    """The label is 1; the network is ever surer of class 0, whose weight is below 0."""
    inverse = noise.inverse(torch.tensor([[0.6, 0.4], [0.2, 0.8]]))
    assert inverse[1, 0] < 0
    values = [
        losses.backward(torch.tensor([[-x, x]]), torch.tensor([1]), inverse).item()
        for x in (1.0, 5.0, 10.0, 100.0, 1e4)
    ]
    bound = inverse[1, 0].item() * -math.log(1e-7)
    assert values[-1] == values[-2] == pytest.approx(bound)
    assert values == sorted(values, reverse=True)
