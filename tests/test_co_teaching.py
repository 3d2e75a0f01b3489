"""Han et al. (2018), Algorithm 1: who picks what for whom, and how many."""

import math

import pytest
import torch

from nlhelpers import experiments, training
from nlhelpers.methods import co_teaching
from nlhelpers.methods.co_teaching import Pair, share_kept, small_loss
from nlhelpers.methods.cross_entropy import cross_entropy
from nlhelpers.specs import Spec
from nlhelpers.training import Epoch, Recipe, Setup


def run(seen, setup, **settings):
    return list(co_teaching.co_teaching(seen, setup, **settings))


@pytest.fixture
def shares(monkeypatch):
    """R at every step of the test's training, once for each network."""
    found = []

    def noted(loss, R):
        found.append(R.item())
        return small_loss(loss, R)

    monkeypatch.setattr(co_teaching, "small_loss", noted)
    return found


# ---------------------------------------------------------------- picks


@pytest.mark.parametrize("size", [1, 2, 20, 31, 32, 128])
def test_the_smallest_losses_are_picked(size, generator):
    for tau in (0.0, 0.1, 0.2, 0.3, 0.45, 0.5, 0.7, 0.99):
        loss = torch.rand(size, generator=generator)
        count = math.ceil(round((1 - tau) * size, 6))
        by_loss = sorted(range(size), key=lambda i, loss=loss: loss[i].item())
        picked = small_loss(loss, torch.tensor(1 - tau))
        assert set(picked.nonzero().squeeze(1).tolist()) == set(by_loss[:count])


def test_equal_losses_are_no_more_images():
    picked = small_loss(torch.tensor([3.0, 1.0, 1.0, 1.0]), torch.tensor(0.5))
    assert picked.tolist() == [False, True, True, False]


# ---------------------------------------------------------------- how many


def test_the_share_by_hand():
    found = [share_kept(T, 0.5, 10, 1.0) for T in (1, 5, 10, 11, 200)]
    assert found == pytest.approx([0.95, 0.75, 0.5, 0.5, 0.5])
    assert share_kept(3, 0.2, 10, 2.0) == pytest.approx(1 - 0.2 * 9 / 10)
    assert share_kept(4, 0.2, 10, 2.0) == pytest.approx(0.8)
    assert share_kept(25, 0.2, 10, 0.5) == pytest.approx(1 - 0.2 * 5 / 10)


@pytest.mark.parametrize(
    ("epochs", "settings", "expected"),
    [
        (2, {}, [1.0, 0.8]),
        (5, {"noise_rate": 0.4, "ramp": 0.8}, [1.0, 0.9, 0.8, 0.7, 0.6]),
        (4, {"noise_rate": 0.4, "ramp": 1.0, "exponent": 0.5}, None),
    ],
)
def test_the_share_falls_after_each_epoch(
    epochs, settings, expected, prepared, make_setup, shares
):
    seen, _ = prepared
    if expected is None:  # T is 50, 100, 150 of the paper's 200 epochs, T_k is 200
        expected = [1 - 0.4 * math.sqrt(T) / 200 for T in (0, 50, 100, 150)]
    run(seen, make_setup(epochs=epochs), **settings)
    steps = len(shares) // epochs
    assert shares[::steps] == pytest.approx(expected)
    assert shares[steps - 1 :: steps] == pytest.approx(expected)  # within an epoch


# ---------------------------------------------------------------- who learns what


def test_each_network_learns_what_the_other_one_picks(
    prepared, make_setup, steps, seeded
):
    seen, _ = prepared
    run(seen, make_setup(epochs=1), noise_rate=0.3)  # the share is 0.7 from here on
    index = torch.arange(40)
    pair = Pair(make_setup().build(seen), make_setup().build(seen)).eval()
    loss = steps[0](pair, index, seen.images[index])
    loss.backward()
    terms, picks = [], []
    for network in (pair.f, pair.g):
        log_p = network(seen.images[index]).log_softmax(dim=1)
        of_each = [-log_p[i, seen.labels[i]] for i in range(40)]
        order = sorted(range(40), key=lambda i, each=of_each: each[i].item())
        terms.append(of_each)
        picks.append(order[:28])
    assert picks[0] != picks[1]
    learnt = [sum(terms[k][i] for i in picks[1 - k]) / 28 for k in range(2)]
    assert loss.item() == pytest.approx(sum(learnt).item())
    for network, term in zip((pair.f, pair.g), learnt, strict=True):
        weights = list(network.parameters())
        for weight, expected in zip(
            weights, torch.autograd.grad(term, weights), strict=True
        ):
            torch.testing.assert_close(weight.grad, expected)


def test_with_no_noise_all_is_learnt(prepared, make_setup, shares):
    seen, _ = prepared
    run(seen, make_setup(), noise_rate=0.0)
    assert set(shares) == {1.0}


def test_the_two_start_apart_and_the_first_is_judged(prepared, make_setup, seeded):
    seen, _ = prepared
    (only,) = run(seen, make_setup(epochs=1, learning_rate=0.0))
    f, g = only.model.f, only.model.g
    assert not torch.equal(f.body[1].weight, g.body[1].weight)
    only.model.eval()
    torch.testing.assert_close(only.model(seen.images), f(seen.images))
    expected = training.accuracy(f, seen.val_images, seen.val_labels)
    assert only.val_accuracy == expected


# ---------------------------------------------------------------- the whole


def test_epochs_are_all_that_it_yields(prepared, make_setup, seeded):
    seen, _ = prepared
    events = run(seen, make_setup(epochs=3))
    assert [type(event) for event in events] == [Epoch] * 3
    assert {event.stage for event in events} == {"co-teaching"}


def test_same_seed_same_numbers(prepared, make_setup, cpu):
    seen, _ = prepared
    losses = []
    for seed in (1, 1, 2):
        with training.seeded(seed, cpu) as generator:
            setup = Setup("mlp", make_setup().recipe, generator)
            losses.append([event.loss for event in run(seen, setup)])
    assert losses[0] == losses[1] != losses[2]


def test_it_forgets_what_cross_entropy_learns_by_heart(cpu):
    spec = Spec(noise_rate=0.4)
    seen, truth = experiments.data_for(spec, cpu)
    recipe = Recipe(epochs=12, batch_size=32, optimiser="sgd", learning_rate=0.1)
    found = []
    for method, settings in (
        (cross_entropy, {}),
        (co_teaching.co_teaching, {"noise_rate": 0.4}),
    ):
        with training.seeded(0, cpu) as generator:
            setup = Setup(spec.model, recipe, generator)
            *_, last = method(seen, setup, **settings)
        test = truth.test_images, truth.test_labels
        found.append(training.accuracy(last.model, *test))
    assert found[1] > found[0] + 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_rate": 1.0}, r"noise_rate is 1.0; it must be in \[0, 1\)"),
        ({"noise_rate": -0.1}, "noise_rate is -0.1"),
        ({"noise_rate": math.nan}, "noise_rate is nan"),
        ({"ramp": 0.0}, r"ramp is 0.0; it must be in \(0, 1\]"),
        ({"ramp": 1.5}, "ramp is 1.5"),
        ({"exponent": 0.0}, "exponent is 0.0; it must be more than 0"),
        ({"exponent": math.inf}, "exponent is inf"),
    ],
)
def test_bad_settings(settings, message, prepared, make_setup):
    seen, _ = prepared
    with pytest.raises(ValueError, match=message):
        run(seen, make_setup(), **settings)
