"""Li et al. (2020), Algorithm 1: the division, the targets, the loss, the schedule."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from nlhelpers import experiments, training
from nlhelpers.methods import divide_mix
from nlhelpers.methods.cross_entropy import cross_entropy
from nlhelpers.methods.divide_mix import (
    Draws,
    Ensemble,
    beside,
    clean_probability,
    divided,
    mixed,
    ramped,
    semi_supervised_loss,
    sharpen,
    targets,
    warm_up_loss,
)
from nlhelpers.specs import Spec
from nlhelpers.training import Epoch, Recipe, Screening, Setup


def run(seen, setup, **settings):
    return list(divide_mix.divide_mix(seen, setup, **settings))


@pytest.fixture
def epochs(monkeypatch):
    """The batches (steps, B) of each epoch of the test's trainings."""
    found = []
    fit = training.fit

    def noted(model, images, epoch, *rest, **options):
        def listed():
            found.append(torch.stack(list(epoch())))
            return iter(found[-1])

        return fit(model, images, listed, *rest, **options)

    monkeypatch.setattr(training, "fit", noted)
    return found


@pytest.fixture
def judged(monkeypatch):
    """Make every division say the w (2, N) that the test calls this with."""

    def judge(w):
        monkeypatch.setattr(divide_mix, "co_divide", lambda *given: w)

    return judge


# ---------------------------------------------------------------- the division


def posterior_by_hand(losses, rounds=200):
    """EM for two Gaussians in plain Python, from the two ends of the losses."""
    low, high = min(losses), max(losses)
    x = [(loss - low) / (high - low) for loss in losses]
    means, variances, shares = [0.0, 1.0], [0.05, 0.05], [0.5, 0.5]
    for _ in range(rounds):
        rows = []
        for value in x:
            density = [
                s * math.exp(-((value - m) ** 2) / (2 * v)) / math.sqrt(v)
                for s, m, v in zip(shares, means, variances, strict=True)
            ]
            rows.append([d / sum(density) for d in density])
        for k in range(2):
            weight = sum(row[k] for row in rows)
            means[k] = sum(r[k] * v for r, v in zip(rows, x, strict=True)) / weight
            variances[k] = 5e-4 + sum(
                r[k] * (v - means[k]) ** 2 / weight
                for r, v in zip(rows, x, strict=True)
            )
            shares[k] = weight / len(x)
    return [row[0] for row in rows]


def test_w_is_the_posterior_of_the_smaller_mean(generator):
    few = 3 + torch.randn(30, generator=generator).abs()
    losses = torch.cat([torch.rand(50, generator=generator), few, torch.tensor([1.9])])
    w = clean_probability(losses, 0)
    assert w.dtype == torch.float32
    expected = torch.tensor(posterior_by_hand(losses.tolist()))
    torch.testing.assert_close(w, expected, atol=0.02, rtol=0)
    assert w[:50].min() > 0.9 and w[50:80].max() < 0.1


def test_w_depends_neither_on_scale_nor_on_order(generator):
    losses = torch.cat([torch.rand(40), 2 + torch.rand(20)])
    w = clean_probability(losses, 0)
    torch.testing.assert_close(clean_probability(100 * losses + 7, 0), w)
    flipped = clean_probability(losses.flip(0), 3)
    torch.testing.assert_close(flipped.flip(0), w, atol=1e-3, rtol=0)


def test_equal_losses_are_no_error():
    w = clean_probability(torch.full((20,), 1.5), 0)
    assert ((w >= 0) & (w <= 1)).all()


class Sure(nn.Module):
    """Gives every image the class of its first pixel, with a large logit."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, images):
        label = (images.flatten(1)[:, 0].long() + self.shift) % 3
        return 2.0 * nn.functional.one_hot(label, 3).float()


def test_each_network_gets_the_division_of_its_peer(prepared, generator):
    seen, _ = prepared
    pixels = torch.arange(80) % 3
    shifted = torch.arange(80) < 20
    images = pixels.to(torch.uint8).view(80, 1, 1, 1)
    labels = (pixels + shifted) % 3
    data = dataclasses.replace(seen, images=images, labels=labels)
    w = divide_mix.co_divide(Ensemble(Sure(1), Sure(0)), data, generator)
    for_f, for_g = w > 0.5
    assert torch.equal(for_f, ~shifted)  # as g says, which has no shift
    assert torch.equal(for_g, shifted)


def test_sides_by_hand():
    kept = torch.tensor([[True, False, True, False], [False, True, True, True]])
    sides = [side.tolist() for side in divided(kept)]
    assert sides == [[0, 2], [1, 3], [1, 2, 3], [0]]


def test_an_empty_side_is_everything():
    kept = torch.stack([torch.ones(3), torch.zeros(3)]).bool()
    every = [0, 1, 2]
    assert [side.tolist() for side in divided(kept)] == [every] * 4


def test_batches_have_pools_side_by_side(generator):
    pools = [torch.tensor([3, 5, 7]), torch.arange(10, 30)]
    found = torch.stack(list(beside(pools, 4, 3, generator)))
    assert found.shape == (3, 8)
    assert found[:, :4].flatten().bincount().tolist()[3:8:2] == [4, 4, 4]
    second = found[:, 4:].flatten()
    assert len(second.unique()) == 12 and second.min() >= 10  # none twice


def test_warm_up_sees_all_then_each_network_its_own_division(
    prepared, make_setup, epochs, judged
):
    seen, _ = prepared
    N = len(seen.labels)
    w = torch.zeros(2, N)
    w[0, :200] = 0.7
    w[1, 100:150] = 0.9
    judged(w)
    run(seen, make_setup(epochs=3))
    steps = N // 32
    assert [tuple(batches.shape) for batches in epochs] == [(steps, 64)] * 3
    f, g = epochs[0].chunk(2, dim=1)
    for half in (f, g):  # one pass over all, in another order
        assert half.flatten().bincount().max() == 1
    assert not torch.equal(f, g)
    for batches in epochs[1:]:
        x_f, u_f, x_g, u_g = batches.chunk(4, dim=1)
        assert (w[0, x_f] == 0.7).all() and (w[0, u_f] == 0).all()
        assert (w[1, x_g] == 0.9).all() and (w[1, u_g] == 0).all()
        assert x_f.shape[1] == u_g.shape[1] == 16
    assert not torch.equal(epochs[1], epochs[2])


def test_tau_decides(prepared, make_setup, epochs, judged):
    seen, _ = prepared
    w = torch.full((2, len(seen.labels)), 0.6)
    w[:, :100] = 0.8
    judged(w)
    *_, screening = run(seen, make_setup(), tau=0.7)
    assert (epochs[1].chunk(4, dim=1)[0] < 100).all()
    assert screening.kept.nonzero().squeeze(1).tolist() == list(range(100))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_and_everything_kept(value, prepared, make_setup, judged):
    seen, _ = prepared
    judged(torch.full((2, len(seen.labels)), value))
    *trained, screening = run(seen, make_setup())
    assert len(trained) == 2
    assert screening.kept.all() == bool(value)


# ---------------------------------------------------------------- targets and mixing


def test_sharpening_by_hand():
    p = torch.tensor([[0.8, 0.2, 0.0], [0.25, 0.25, 0.5]])
    expected = torch.tensor([[0.64 / 0.68, 0.04 / 0.68, 0.0], [1 / 6, 1 / 6, 4 / 6]])
    torch.testing.assert_close(sharpen(p, 0.5), expected)
    torch.testing.assert_close(sharpen(p, 1.0), p)
    assert sharpen(p, 1e-3).isfinite().all()


@pytest.fixture
def pair(prepared, make_setup, seeded):
    """Two networks without chance inside."""
    seen, _ = prepared
    return Ensemble(make_setup().build(seen), make_setup().build(seen)).eval()


def targets_by_hand(network, peer, first, second, labels, w, T):
    """Row by row: first and second are looks at x and then at u."""
    rows, count = [], len(labels)
    with torch.no_grad():
        own = [network(look).softmax(1) for look in (first, second)]
        other = [peer(look).softmax(1) for look in (first, second)]
    for i in range(2 * count):
        mean = (own[0][i] + own[1][i]) / 2
        if i < count:
            y = torch.eye(10)[labels[i]]
            p = w[i] * y + (1 - w[i]) * mean
        else:
            p = (own[0][i] + own[1][i] + other[0][i] + other[1][i]) / 4
        powers = [value.item() ** (1 / T) for value in p]
        rows.append([power / sum(powers) for power in powers])
    return torch.tensor(rows)


def test_targets_against_a_loop(prepared, pair, generator):
    seen, _ = prepared
    first, second = seen.images[:12], seen.images[20:32]
    labels, w = seen.labels[:6], torch.rand(6, generator=generator)
    y = torch.eye(10)[labels]
    images = torch.cat([first, second])
    found = targets(pair.f, pair.g, images, y, w, 0.5)
    expected = targets_by_hand(pair.f, pair.g, first, second, labels, w, 0.5)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_mixing_against_a_loop(generator):
    images = torch.randint(256, (5, 1, 2, 2), generator=generator, dtype=torch.uint8)
    p = torch.rand(5, 3, generator=generator)
    lam = torch.tensor([0.0, 0.3, 0.5, 0.8, 1.0])
    order = torch.tensor([1, 2, 3, 4, 0])
    found, found_p = mixed(images, p, lam, order)
    for i, share in enumerate([1.0, 0.7, 0.5, 0.8, 1.0]):  # the first has the larger
        j = int(order[i])
        expected = share * images[i].float() + (1 - share) * images[j].float()
        torch.testing.assert_close(found[i], expected)
        torch.testing.assert_close(found_p[i], share * p[i] + (1 - share) * p[j])


def test_draws(cpu, generator):
    draws = Draws(2000, 64, cpu)
    draws.renew(4.0, generator)
    before = draws.lam.clone()
    assert before.mean().item() == pytest.approx(0.5, abs=0.01)
    variance = 1 / (4 * (2 * 4.0 + 1))
    assert before.var().item() == pytest.approx(variance, rel=0.1)
    index = torch.randint(2000, (32,), generator=generator)
    (lam, order), (_, other) = draws.of(0, index), draws.of(1, index)
    for look in range(2):
        for place, i in enumerate(index.tolist()):
            assert lam[32 * look + place] == before[0, look, i]
    assert order.sort().values.tolist() == list(range(64))
    assert not torch.equal(order, other)
    assert len(draws.of(0, index[:16])[1]) == 32
    draws.renew(4.0, generator)
    assert not torch.equal(draws.lam, before)
    assert not torch.equal(draws.of(0, index)[1], order)


# ---------------------------------------------------------------- losses


def loss_by_hand(logits, p, lambda_u):
    """Image by image; looks one after the other, each with x before u."""
    K, count = logits.shape[1], len(logits) // 4
    L_X = L_U = 0.0
    mean = [0.0] * K
    for i, (row, target) in enumerate(zip(logits, p, strict=True)):
        z = row.exp() / row.exp().sum()
        if i // count in (0, 2):
            L_X = L_X - sum(target[c] * z[c].log() for c in range(K)) / (2 * count)
        else:
            square = sum((target[c] - z[c]) ** 2 for c in range(K)) / K
            L_U = L_U + square / (2 * count)
        mean = [m + z[c] / len(logits) for c, m in enumerate(mean)]
    L_reg = sum(math.log(1 / K) - m.log() for m in mean) / K
    return L_X + lambda_u * L_U + L_reg


def test_the_loss_against_a_loop(generator):
    logits = torch.randn(12, 4, generator=generator)
    p = torch.rand(12, 4, generator=generator).softmax(1)
    for lambda_u in (0.0, 25.0):
        found = semi_supervised_loss(logits, p, torch.tensor(lambda_u))
        torch.testing.assert_close(found, loss_by_hand(logits, p, lambda_u))


def test_the_regularisation_alone():
    """Targets that are met leave the entropy and the mean prediction."""
    sure = torch.full((4, 2), -50.0)
    sure[:, 0] = 50.0
    p = torch.tensor([[1.0, 0.0]] * 4)
    loss = semi_supervised_loss(sure, p, torch.tensor(25.0))
    assert loss.item() == pytest.approx(math.log(0.5) + 50.0)  # mean of 0 and 100
    even = sure.clone()
    even[1], even[3], p = even[1].flip(0), even[3].flip(0), p.clone()
    p[1] = p[3] = torch.tensor([0.0, 1.0])
    loss = semi_supervised_loss(even, p, torch.tensor(25.0))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_warm_up_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    labels = torch.tensor([1, 0])
    plain = [-math.log(0.75), math.log(2)]
    assert warm_up_loss(logits, labels, False).tolist() == pytest.approx(plain)
    entropy = [-0.25 * math.log(0.25) - 0.75 * math.log(0.75), math.log(2)]
    expected = [loss - H for loss, H in zip(plain, entropy, strict=True)]
    assert warm_up_loss(logits, labels, True).tolist() == pytest.approx(expected)


# ---------------------------------------------------------------- the step


def weights_of(network):
    return list(network.parameters())


@pytest.mark.parametrize("penalty", [False, True])
def test_warm_up_step_by_hand(penalty, prepared, make_setup, monkeypatch, pair):
    seen, _ = prepared
    steps = []
    fit = training.fit

    def first_step(model, images, epoch, step, *rest, **options):
        index = torch.arange(40)
        views = seen.images[:40], seen.images[40:80]
        steps.append(step(pair, index, *views))  # before the first epoch
        return fit(model, images, epoch, step, *rest, **options)

    monkeypatch.setattr(training, "fit", first_step)
    run(seen, make_setup(), confidence_penalty=penalty)
    expected = 0.0
    for network, part in ((pair.f, range(20)), (pair.g, range(20, 40))):
        z = network(seen.images[:40]).softmax(1)
        for i in part:
            expected -= z[i, seen.labels[i]].log() / 20
            if penalty:
                expected += (z[i] * z[i].log()).sum() / 20
    torch.testing.assert_close(steps[0], expected)


def test_mixing_step_by_hand(
    prepared, make_setup, steps, judged, monkeypatch, pair, generator
):
    seen, _ = prepared
    w = torch.rand(2, len(seen.labels), generator=generator)
    judged(w)
    lam = torch.rand(2, 16, generator=generator)
    order = [torch.randperm(16, generator=generator) for _ in range(2)]
    index = torch.randint(len(seen.labels), (16,), generator=generator)
    looked = seen.images[index], seen.images[index].flip(3)
    run(seen, make_setup(epochs=2), T=0.7, lambda_u=30.0)  # risen to the full
    given = []

    def draw(self, k, mine):
        given.append(mine.tolist())
        return lam[k], order[k]

    monkeypatch.setattr(Draws, "of", draw)
    loss = steps[0](pair, index, *looked)
    loss.backward()
    assert given == [index[:8].tolist(), index[8:].tolist()]
    total = 0.0
    for k, (network, peer) in enumerate(((pair.f, pair.g), (pair.g, pair.f))):
        mine = index[8 * k : 8 * k + 8]
        first, second = (look[8 * k : 8 * k + 8] for look in looked)
        p = targets_by_hand(
            network, peer, first, second, seen.labels[mine[:4]], w[k, mine[:4]], 0.7
        )
        p, images = torch.cat([p, p]), torch.cat([first, second]).float()
        share = torch.tensor([max(v, 1 - v) for v in lam[k].tolist()])
        for_images = share.view(-1, 1, 1, 1)
        images = for_images * images + (1 - for_images) * images[order[k]]
        p = share[:, None] * p + (1 - share[:, None]) * p[order[k]]
        term = loss_by_hand(network(images), p, 30.0)
        total = total + term
        # Each learns from its own images: targets and the peer's guesses stand still.
        expected = torch.autograd.grad(term, weights_of(network))
        for weight, gradient in zip(weights_of(network), expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, total)


# ---------------------------------------------------------------- schedules


def test_the_rise_is_the_mean_of_the_authors_over_an_epoch():
    for done in range(20):
        fine = [min((done + (i + 0.5) / 1000) / 16, 1.0) for i in range(1000)]
        assert ramped(done, 16) == pytest.approx(sum(fine) / 1000)
    assert ramped(0, 16 / 300 * 2) == 1.0  # with few epochs at once


@pytest.mark.parametrize(
    ("settings", "epochs", "expected"),
    [
        ({}, 2, [25.0]),
        ({"lambda_u": 8.0, "ramp_up": 0.5}, 8, [1.0, 3.0, 5.0, 7.0, 8.0, 8.0, 8.0]),
        ({"warm_up": 0.5, "ramp_up": 0.25}, 8, [6.25, 18.75, 25.0, 25.0]),
        ({"warm_up": 0.99}, 3, [25.0]),
    ],
)
def test_warm_up_and_weight_of_each_epoch(
    settings, epochs, expected, prepared, make_setup, monkeypatch
):
    seen, _ = prepared
    weights = []

    def noted(logits, p, lambda_u):
        weights.append(lambda_u.item())
        return semi_supervised_loss(logits, p, lambda_u)

    monkeypatch.setattr(divide_mix, "semi_supervised_loss", noted)
    seen = dataclasses.replace(seen, images=seen.images[:96], labels=seen.labels[:96])
    trained = run(seen, make_setup(epochs=epochs), **settings)[:-1]
    assert [event.number for event in trained] == list(range(1, epochs + 1))
    assert {event.stage for event in trained} == {"divide-mix"}
    of_epoch = 2 * 3  # both networks, three steps
    assert weights[::of_epoch] == pytest.approx(expected)
    assert weights[of_epoch - 1 :: of_epoch] == pytest.approx(expected)


def test_chance_is_drawn_anew_after_every_epoch_with_the_given_alpha(
    prepared, make_setup, judged, monkeypatch
):
    seen, _ = prepared
    judged(torch.rand(2, len(seen.labels)))
    given = []
    monkeypatch.setattr(Draws, "renew", lambda self, alpha, _: given.append(alpha))
    events = divide_mix.divide_mix(seen, make_setup(epochs=3), alpha=2.5)
    for done, _ in enumerate(events):
        assert given == [2.5] * done
    assert done == 3  # the screening


def test_one_epoch_is_warm_up(prepared, make_setup, judged):
    seen, _ = prepared
    judged(torch.rand(2, len(seen.labels)))
    assert [type(e) for e in run(seen, make_setup(epochs=1))] == [Epoch, Screening]


def test_the_screening_is_by_the_mean_of_the_last_division(
    prepared, make_setup, monkeypatch, generator
):
    seen, _ = prepared
    given = []

    def judge(networks, data, generator):
        given.append(torch.rand(2, len(data.labels)))
        return given[-1]

    monkeypatch.setattr(divide_mix, "co_divide", judge)
    *trained, screening = run(seen, make_setup(epochs=4))
    assert [type(event) for event in trained] == [Epoch] * 4
    assert len(given) == 4  # before each mixing epoch, and after the last
    f, g = given[-1].tolist()
    means = [(a + b) / 2 for a, b in zip(f, g, strict=True)]
    assert screening.kept.tolist() == [mean > 0.5 for mean in means]


# ---------------------------------------------------------------- the whole


def test_both_answer_together(prepared, pair):
    seen, _ = prepared
    f, g = (training.predict(network, seen.images) for network in (pair.f, pair.g))
    torch.testing.assert_close(training.predict(pair, seen.images), (f + g) / 2)
    torch.testing.assert_close(pair(seen.images[:5]).exp().sum(1), torch.ones(5))


def test_same_seed_same_numbers(prepared, make_setup, cpu):
    seen, _ = prepared
    found = []
    for seed in (1, 1, 2):
        with training.seeded(seed, cpu) as generator:
            setup = Setup("mlp", make_setup(epochs=3).recipe, generator)
            *trained, screening = run(seen, setup)
            found.append([event.loss for event in trained] + screening.kept.tolist())
    assert found[0] == found[1] != found[2]


def test_it_finds_wrong_labels_and_beats_cross_entropy(cpu):
    spec = Spec(noise_rate=0.4)
    seen, truth = experiments.data_for(spec, cpu)
    recipe = Recipe(epochs=8, batch_size=32, optimiser="sgd", learning_rate=0.1)
    found = []
    for method in (cross_entropy, divide_mix.divide_mix):
        with training.seeded(0, cpu) as generator:
            events = list(method(seen, Setup(spec.model, recipe, generator)))
        model = [event for event in events if isinstance(event, Epoch)][-1].model
        found.append(training.accuracy(model, truth.test_images, truth.test_labels))
    assert found[1] > found[0] + 0.02
    right = seen.labels == truth.labels
    kept = events[-1].kept
    assert right[kept].double().mean() > 0.98  # 0.6 of all are
    assert kept[right].double().mean() > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 1.0}, r"tau is 1.0; it must be in \[0, 1\)"),
        ({"tau": math.nan}, "tau is nan"),
        ({"warm_up": 1.0}, r"warm_up is 1.0; it must be in \[0, 1\)"),
        ({"warm_up": -0.1}, "warm_up is -0.1"),
        ({"T": 0.0}, r"T is 0.0; it must be in \(0, 1\]"),
        ({"T": 1.5}, "T is 1.5"),
        ({"ramp_up": 0.0}, r"ramp_up is 0.0; it must be in \(0, 1\]"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be more than 0"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"lambda_u": -1.0}, "lambda_u is -1.0; it must be 0 or more"),
        ({"lambda_u": math.nan}, "lambda_u is nan"),
    ],
)
def test_bad_settings(settings, message, prepared, make_setup):
    seen, _ = prepared
    with pytest.raises(ValueError, match=message):
        run(seen, make_setup(), **settings)
