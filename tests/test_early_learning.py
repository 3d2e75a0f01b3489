"""Liu et al. (2020): the term and its targets by hand, and who gets a gradient."""

import inspect
import math

import pytest
import torch

from nlhelpers import evaluation, experiments, training
from nlhelpers.methods import cross_entropy, early_learning
from nlhelpers.methods.early_learning import averaged, probabilities, regulariser
from nlhelpers.specs import Spec
from nlhelpers.training import Epoch, Setup


def run(seen, setup, **settings):
    return list(early_learning.early_learning(seen, setup, **settings))


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- the term


def test_the_term_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05]])
    t = torch.tensor([[0.2, 0.4, 0.4], [0.0, 0.0, 0.0]])
    expected = [math.log(1 - (0.1 + 0.12 + 0.08)), 0.0]
    assert regulariser(p, t).tolist() == pytest.approx(expected)


def test_the_term_against_a_loop(generator):
    p, t = torch.randn(2, 50, 7, generator=generator).softmax(dim=2)
    expected = [
        math.log(1 - sum((p[i, k] * t[i, k]).item() for k in range(7)))
        for i in range(50)
    ]
    assert regulariser(p, t).tolist() == pytest.approx(expected, abs=1e-6)
    assert (regulariser(p, t) <= 0).all()


def test_the_gradient_is_the_closed_form(generator):
    logits = torch.randn(20, 5, generator=generator).double().requires_grad_()
    t = torch.randn(20, 5, generator=generator).double().softmax(dim=1)
    regulariser(logits.softmax(dim=1), t).sum().backward()
    p = logits.detach().softmax(dim=1)
    agreement = (p * t).sum(dim=1, keepdim=True)
    expected = p * (agreement - t) / (1 - agreement)
    torch.testing.assert_close(logits.grad, expected)


def test_probabilities_are_kept_away_from_0_and_1():
    logits = torch.tensor([[1e3, 0.0, -1e3], [0.0, 0.0, 0.0]], requires_grad=True)
    p = probabilities(logits)
    low, high = 1e-4, 1 - 1e-4
    torch.testing.assert_close(p[0], torch.tensor([high, low, low]))
    torch.testing.assert_close(p[1], torch.full((3,), 1 / 3))
    regulariser(p, torch.eye(3)[:2]).sum().backward()
    assert logits.grad.isfinite().all()


def test_targets_move_towards_predictions_that_sum_to_1():
    t, p = torch.tensor([[0.2, 0.4]]), torch.tensor([[0.6, 0.2]])
    expected = [0.7 * 0.2 + 0.3 * 0.75, 0.7 * 0.4 + 0.3 * 0.25]
    assert averaged(t, p, 0.7)[0].tolist() == pytest.approx(expected)


# ---------------------------------------------------------------- the step


def test_steps_against_a_plain_loop(prepared, make_setup, steps, seeded, generator):
    """Loss and gradient, with targets that are numbers and remember every batch."""
    seen, _ = prepared
    lam, beta = 2.5, 0.6
    events = early_learning.early_learning(seen, make_setup(), lam=lam, beta=beta)
    network = next(events).model.eval()
    kept = inspect.getclosurevars(steps[0]).nonlocals["t"]
    assert kept.abs().sum() > 0  # the first epoch left its mark
    kept.zero_()
    targets = {}
    parameters = list(network.parameters())
    for _ in range(4):
        index = torch.randperm(30, generator=generator)[:12]
        loss = steps[0](network, index, seen.images[index])
        expected = 0.0
        for i in index.tolist():
            log_p = network(seen.images[i : i + 1])[0].log_softmax(dim=0)
            p = log_p.exp().clamp(1e-4, 1 - 1e-4)
            now = [x / sum(p.tolist()) for x in p.tolist()]
            before = targets.get(i, [0.0] * 10)
            both = zip(before, now, strict=True)
            targets[i] = [beta * x + (1 - beta) * y for x, y in both]
            agreement = sum(p[k] * targets[i][k] for k in range(10))
            term = torch.log(1 - agreement)
            expected = expected + (-log_p[seen.labels[i]] + lam * term) / len(index)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for own, plain in zip(
            torch.autograd.grad(loss, parameters),
            torch.autograd.grad(expected, parameters),
            strict=True,
        ):
            torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-6)
    assert not kept.requires_grad
    for i in range(len(kept)):
        expected = targets.get(i, [0.0] * 10)
        assert kept[i].tolist() == pytest.approx(expected, abs=1e-6)


def test_without_weight_it_is_cross_entropy_to_the_bit(prepared, make_setup, cpu):
    seen, _ = prepared
    found = []
    for method, settings in (
        (cross_entropy.cross_entropy, {}),
        (early_learning.early_learning, {"lam": 0.0}),
    ):
        with training.seeded(0, cpu):
            (*_, last) = method(seen, make_setup(), **settings)
        found.append(last)
    assert found[0].loss == found[1].loss
    assert same_weights(found[0].model, found[1].model)


# ---------------------------------------------------------------- the method


def test_it_takes_the_recipes_epochs_and_repeats_itself(prepared, make_setup, cpu):
    seen, _ = prepared
    lasts = []
    for _ in range(2):
        with training.seeded(0, cpu):
            events = run(seen, make_setup(epochs=3))
        assert [type(event) for event in events] == [Epoch] * 3
        lasts.append(events[-1])
    assert lasts[0].loss == lasts[1].loss
    assert same_weights(lasts[0].model, lasts[1].model)


def test_defaults_are_the_authors_for_cifar10():
    settings = inspect.signature(early_learning.early_learning).parameters
    assert (settings["lam"].default, settings["beta"].default) == (3.0, 0.7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": -1.0}, "lam is -1.0; it must be 0 or more"),
        ({"lam": math.nan}, "lam is nan"),
        ({"lam": math.inf}, "lam is inf"),
        ({"beta": 1.0}, r"beta is 1.0; it must be in \[0, 1\)"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"beta": math.nan}, "beta is nan"),
    ],
)
def test_bad_settings(settings, message, prepared, make_setup):
    seen, _ = prepared
    with pytest.raises(ValueError, match=message):
        run(seen, make_setup(), **settings)


def test_it_bears_noise_better_than_cross_entropy(cpu):
    spec = Spec(noise="symmetric", noise_rate=0.4, profile="quick")
    seen, truth = experiments.data_for(spec, cpu)
    found = []
    for method in (cross_entropy.cross_entropy, early_learning.early_learning):
        with training.seeded(spec.seed, cpu) as generator:
            (*_, last) = method(seen, Setup(spec.model, spec.recipe, generator))
        found.append(evaluation.measure(last, truth)["test_accuracy"])
    plain, ours = found
    assert ours >= plain > 0.85
