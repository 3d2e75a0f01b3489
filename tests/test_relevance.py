"""CleanNet itself: its loss by hand, its encoders by a loop, and that it learns."""

import inspect
import math

import pytest
import torch

from nlhelpers import relevance, training
from nlhelpers.data import UNKNOWN
from nlhelpers.relevance import CleanNet, Rule
from nlhelpers.training import Auxiliary


def unit(*shape, generator):
    x = torch.randn(*shape, generator=generator)
    return x / x.norm(dim=-1, keepdim=True)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("cos", "l", "expected", "slope"),
    [
        (0.8, 1, 0.2, -1.0),
        (-0.5, 1, 1.5, -1.0),
        (0.5, 0, 4 * 0.4, 4.0),
        (0.05, 0, 0.0, 0.0),
        (-0.5, 0, 0.0, 0.0),
        (0.8, UNKNOWN, 0.3 * 0.2, -0.3),  # is believed
        (0.05, UNKNOWN, 0.0, 0.0),  # is not
        (-0.5, UNKNOWN, 0.0, 0.0),
    ],
)
def test_the_loss_of_a_label_by_hand(cos, l, expected, slope):  # noqa: E741
    cos = torch.tensor([cos], requires_grad=True)
    rule = Rule(margin=0.1, gamma=0.3)
    loss = relevance.label_loss(cos, torch.tensor([l]), 4.0, rule)
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected)
    assert cos.grad.item() == pytest.approx(slope)


def test_omega_is_how_many_right_labels_come_to_a_wrong_one():
    right = torch.arange(10) < 8
    assert relevance.imbalance(right) == 4.0
    assert relevance.imbalance(right[:8]) == relevance.imbalance(right[8:]) == 1.0


# ---------------------------------------------------------------- the network


@torch.no_grad()
def test_the_network_against_a_loop(generator, seeded):
    V, v = unit(3, 4, 6, generator=generator), unit(5, 6, generator=generator)
    model = CleanNet(V)
    classes = []
    for c in range(3):
        h = [model.hidden(x) for x in V[c]]
        scores = [float(model.projection(x) @ model.context) for x in h]
        a = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
        attended = sum(a_i * x for a_i, x in zip(a, h, strict=True))
        classes.append(model.summary(attended))
    found = model(v[:, :, None, None])
    assert found.shape == (5, 3)
    for i in range(5):
        phi_q = model.encoder(v[i])
        for c in range(3):
            phi_s = classes[c]
            cos = phi_q @ phi_s / (phi_q.norm() * phi_s.norm())
            assert found[i, c].item() == pytest.approx(cos.item(), abs=1e-5)
    phi_q, decoded = model.queries(v)
    assert phi_q.shape == (5, 128) and decoded.shape == v.shape
    torch.testing.assert_close(decoded[0], model.decoder(model.encoder(v[0])))


def test_references_are_a_set_and_do_not_learn(generator, seeded):
    V, v = unit(2, 7, 6, generator=generator), unit(5, 6, 1, 1, generator=generator)
    model = CleanNet(V)
    found = model(v)
    found.sum().backward()
    assert model.context.grad.abs().sum() > 0  # attention learns, the set does not
    assert not model.V.requires_grad
    model.V.copy_(V[:, torch.randperm(7, generator=generator)])
    torch.testing.assert_close(model(v), found)


# ---------------------------------------------------------------- references


def test_centres_of_groups_are_found(generator):
    groups = unit(4, 20, generator=generator)
    v = groups.repeat_interleave(30, dim=0)
    v = v + 0.01 * torch.randn(v.shape, generator=generator)
    found = relevance.centres(v, 4, seed=3)
    means = torch.stack([part.mean(dim=0) for part in v.split(30)])
    nearest = torch.cdist(found, means).argmin(dim=1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(found, means[nearest], atol=1e-6, rtol=0)


def test_few_images_stand_for_themselves_again_and_again(generator):
    v = unit(3, 5, generator=generator)
    found = relevance.centres(v, 7, seed=0)
    assert torch.equal(found, v[[0, 1, 2, 0, 1, 2, 0]])


def test_each_class_has_references_of_its_own():
    y = torch.arange(60) % 3
    v = torch.eye(3)[y] + 0.001 * torch.arange(60)[:, None]
    V = [
        relevance.references(v, y, 3, 4, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert V[0].shape == (3, 4, 3)
    assert torch.equal(V[0], V[1])
    assert (V[0].argmax(dim=2) == torch.arange(3)[:, None]).all()


# ---------------------------------------------------------------- tau


def test_tau_by_hand():
    cos = torch.tensor([0.9, -0.2, 0.5, 0.3, 0.4])
    right = torch.tensor([True, False, True, True, False])
    assert relevance.threshold(cos, right).item() == pytest.approx(0.3)
    right = torch.tensor([True, False, True, False, False])
    assert relevance.threshold(cos, right).item() == pytest.approx(0.5)


def test_tau_against_all_candidates(generator):
    for _ in range(20):
        cos = torch.randint(-5, 10, (25,), generator=generator) / 10  # with ties
        right = torch.rand(25, generator=generator) < 0.3 + 0.5 * cos
        pairs = list(zip(cos.tolist(), right.tolist(), strict=True))
        hits = {t: sum((c >= t) == r for c, r in pairs) for t, _ in pairs}
        best = min(t for t in hits if hits[t] == max(hits.values()))
        assert relevance.threshold(cos, right).item() == pytest.approx(best)


@pytest.mark.parametrize("M", [2, 3, 10, 57])
def test_some_verified_labels_are_held_out(M, generator):
    learned, held_out = relevance.divided(M, generator)
    assert sorted([*learned.tolist(), *held_out.tolist()]) == list(range(M))
    assert len(held_out) == max(1, round(M / 5))
    assert len(learned) > 0


# ---------------------------------------------------------------- learning


def task(generator, M=100, N=300, share_wrong=0.4):
    """Features around three directions, with labels of which some are wrong."""
    true = torch.randint(3, (M + N,), generator=generator)
    v = torch.eye(3, 12)[true]
    v = v + 0.2 * torch.randn(v.shape, generator=generator)
    wrong = torch.rand(M + N, generator=generator) < share_wrong
    y = (true + wrong * torch.randint(1, 3, (M + N,), generator=generator)) % 3
    return v / v.norm(dim=1, keepdim=True), y, y == true


def learned(learning):
    """The events of `relevance.learn`, and what it returns."""
    events = []
    with pytest.raises(StopIteration) as stop:
        while True:
            events.append(next(learning))
    return events, *stop.value.value


def test_it_learns_which_labels_are_right(generator, make_setup, seeded):
    v, y, right = task(generator, M=300)
    setup = make_setup(epochs=40, crop=3, flip=True)  # which features do not survive
    learning = relevance.learn(v, y, right[:300], 3, Rule(m=8), setup)
    events, cos, tau = learned(learning)
    assert [type(event) for event in events] == [Auxiliary] * 40
    assert cos.shape == (600,)
    says = cos[300:] >= tau  # of images that nobody verified
    assert (says == right[300:]).float().mean() > 0.9
    assert right[300:].float().mean() < 0.7


def test_what_was_held_out_is_not_learned_from(generator, make_setup, cpu):
    v, y, right = task(generator)
    # The same draws as the method's: references come first.
    order = make_setup().generator
    torch.randint(2**31, (3,), generator=order)
    _, held_out = relevance.divided(100, order)
    lies = right[:100].clone()
    lies[held_out] = ~lies[held_out]
    found = []
    for given in (right[:100], lies):
        with training.seeded(0, cpu):
            rest = learned(relevance.learn(v, y, given, 3, Rule(m=8), make_setup()))
        found.append(rest)
    cos, tau = found[0][1:]
    assert torch.equal(cos, found[1][1])
    assert tau == relevance.threshold(cos[held_out], right[held_out])
    events, lied = found[0][0], found[1][0]
    assert events[-1].epoch.loss == lied[-1].epoch.loss
    accuracies = events[-1].epoch.val_accuracy, lied[-1].epoch.val_accuracy
    assert sum(accuracies) == pytest.approx(1.0)  # they are what it is validated with


def test_a_step_against_a_plain_loop(generator, make_setup, steps, seeded):
    v, y, right = task(generator)
    rule = Rule(m=5, margin=0.2, beta=0.3, gamma=0.4)
    events, *_ = learned(relevance.learn(v, y, right[:100], 3, rule, make_setup()))
    model, known = events[-1].epoch.model, inspect.getclosurevars(steps[0]).nonlocals
    l, omega = known["l"], known["omega"]  # noqa: E741
    assert (l[100:] == UNKNOWN).all()
    told = (l != UNKNOWN).nonzero().squeeze(1)
    assert len(told) == 80 and torch.equal(l[told] == 1, right[told])
    assert omega == int(right[told].sum()) / int((~right[told]).sum())
    index = torch.cat([told[:10], torch.arange(100, 112)])
    cosines, expected = model(v[:, :, None, None]), 0.0
    for i in index.tolist():
        cos = cosines[i, y[i]].item()
        believed = right[i] if i in told else cos >= 0.2
        term = 1 - cos if believed else omega * max(0.0, cos - 0.2)
        decoded = model.queries(v[i : i + 1])[1][0]
        error = ((v[i] - decoded) ** 2).sum().item()
        expected += ((1.0 if i in told else 0.4) * term + 0.3 * error) / len(index)
    loss = steps[0](model, index, v[index][:, :, None, None])
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_half_of_a_batch_is_verified(generator, make_setup, monkeypatch):
    v, y, right = task(generator)
    epochs = []
    fit = training.fit

    def noted(model, images, epoch, *rest, **options):
        epochs.append(epoch)
        return fit(model, images, epoch, *rest, **options)

    monkeypatch.setattr(training, "fit", noted)
    learned(relevance.learn(v, y, right[:100], 3, Rule(m=5), make_setup(epochs=1)))
    batches = torch.stack(list(epochs[0]()))
    assert batches.shape == (300 // 32, 64)
    assert (batches[:, :32] < 100).all() and (batches[:, 32:] >= 100).all()
    assert batches[:, :32].unique().numel() == 80  # the others are held out
    assert batches[:, 32:].flatten().bincount().max() == 1  # one pass


def test_a_few_images_are_enough(generator, make_setup, seeded):
    v, y, right = task(generator, M=2, N=5)
    events, cos, _ = learned(
        relevance.learn(v, y, right[:2], 3, Rule(m=2), make_setup(epochs=1))
    )
    assert len(events) == 1 and cos.isfinite().all()


def test_the_optimiser_is_the_authors(make_setup):
    given = make_setup(epochs=9, crop=4, flip=True, optimiser="adam", falls_after=(1,))
    recipe = relevance.for_clean_net(given).recipe
    assert (recipe.epochs, recipe.falls_after) == (9, (4,))
    assert (recipe.optimiser, recipe.learning_rate) == ("sgd", 0.01)
    assert (recipe.momentum, recipe.weight_decay, recipe.factor) == (0.9, 1e-4, 0.1)
    assert (recipe.crop, recipe.flip, recipe.batch_size) == (0, False, 64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"m": 0}, "num_references is 0; it must be 1 or more"),
        ({"margin": 1.0}, r"margin is 1.0; it must be in \[-1, 1\)"),
        ({"margin": math.nan}, "margin is nan"),
        ({"beta": -0.1}, "beta is -0.1; it must be 0 or more"),
        ({"beta": math.inf}, "beta is inf"),
        ({"gamma": math.nan}, "gamma is nan"),
    ],
)
def test_bad_rules(values, message):
    with pytest.raises(ValueError, match=message):
        Rule(**values)
