"""Confident learning: counts and ranks by plain loops, then with networks."""

import dataclasses

import pytest
import torch

from nlhelpers import experiments, noise, training
from nlhelpers.methods import confident_learning as cl
from nlhelpers.specs import Spec
from nlhelpers.training import Auxiliary, Epoch, Screening, Transition


def test_thresholds_and_counts_by_hand():
    of_0 = torch.tensor([0.75, 0.5, 0.25, 0.0, 0.25, 0.75]).double()
    p_hat, y_noisy = torch.stack([of_0, 1 - of_0], dim=1), torch.arange(6) // 3
    assert cl.thresholds(p_hat, y_noisy).tolist() == pytest.approx([1 / 2, 2 / 3])
    # The second image just reaches its threshold; the third and the last one change.
    assert cl.confident_joint(p_hat, y_noisy).tolist() == [[2, 1], [1, 2]]


def test_who_reaches_no_threshold_does_not_count():
    p_hat = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.4, 0.6], [0.0, 1.0]]).double()
    # Thresholds: 0.7 and 0.8. The second and the third image are sure of nothing.
    found = cl.confident_joint(p_hat, torch.tensor([0, 0, 1, 1]))
    assert found.tolist() == [[1, 0], [0, 1]]


def test_the_joint_has_as_many_of_each_label_as_given():
    C = torch.tensor([[2, 1], [1, 4]])
    Q = cl.joint(C, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]))
    assert Q.tolist() == [
        pytest.approx([0.75 * 2 / 3, 0.75 / 3]),
        pytest.approx([0.25 / 5, 0.25 * 4 / 5]),
    ]
    assert cl.transition(Q).sum(dim=1).tolist() == pytest.approx([1, 1])
    assert cl.transition(Q)[1, 0].item() == pytest.approx(0.25 / (0.25 + 0.2))


# ---------------------------------------------------------------- by plain loops


def simulated(K, N=240):
    """Predictions that are mostly right, of labels of which a third is drawn anew."""
    draw = torch.Generator().manual_seed(K)
    truth = torch.arange(N) % K
    redrawn = torch.randint(K, (N,), generator=draw)
    y_noisy = redrawn.where(torch.rand(N, generator=draw) < 1 / 3, truth)
    logits = torch.randn(N, K, generator=draw).double()
    logits[torch.arange(N), truth] += 2
    return logits.softmax(dim=1), y_noisy, truth


def joint_by_loops(p, y):
    """Q as Eq. 1 to 3 are printed."""
    K, N = len(p[0]), len(y)
    members = [[x for x in range(N) if y[x] == i] for i in range(K)]
    t = [sum(p[x][j] for x in members[j]) / len(members[j]) for j in range(K)]
    C = [[0] * K for _ in range(K)]
    for x in range(N):
        reached = [j for j in range(K) if p[x][j] >= t[j]]
        if reached:
            C[y[x]][max(reached, key=lambda j: p[x][j])] += 1
    return [[c / sum(C[i]) * len(members[i]) / N for c in C[i]] for i in range(K)]


def doubted_by_loops(p, y, Q):
    """Who is pruned by noise rate, and by class."""
    K, N = len(p[0]), len(y)
    by_rate, by_class = set(), set()
    for i in range(K):
        own = [x for x in range(N) if y[x] == i]
        wrong = sum(Q[i]) - Q[i][i]
        by_class |= set(sorted(own, key=lambda x: p[x][i])[: round(N * wrong)])
        for j in set(range(K)) - {i}:
            ranked = sorted(own, key=lambda x: p[x][i] - p[x][j])
            by_rate |= set(ranked[: round(N * Q[i][j])])
    return {"noise-rate": by_rate, "class": by_class, "both": by_rate & by_class}


@pytest.mark.parametrize("K", [2, 3, 6])
def test_plain_loops_find_the_same(K):
    p_hat, y_noisy, _ = simulated(K)
    Q = cl.joint(cl.confident_joint(p_hat, y_noisy), y_noisy)
    expected = joint_by_loops(p_hat.tolist(), y_noisy.tolist())
    assert Q.tolist() == [pytest.approx(row) for row in expected]
    assert Q.sum().item() == pytest.approx(1)
    found = doubted_by_loops(p_hat.tolist(), y_noisy.tolist(), Q.tolist())
    for rule, who in found.items():
        marked = cl.doubted(p_hat, y_noisy, Q, rule)
        assert set(marked.nonzero().squeeze(1).tolist()) == who
        assert 20 < len(who) < 120


# ---------------------------------------------------------------- theorems


@pytest.mark.parametrize("rule", cl.RULES)
@pytest.mark.parametrize("K", [2, 5])
def test_of_perfect_predictions_all_is_exact(K, rule):
    """Theorem 1: the joint is that of the labels, and just the wrong ones go."""
    _, y_noisy, truth = simulated(K)
    p_hat = torch.nn.functional.one_hot(truth, K).double()
    Q = cl.joint(cl.confident_joint(p_hat, y_noisy), y_noisy)
    counts = torch.zeros(K, K).double()
    for given, true in zip(y_noisy.tolist(), truth.tolist(), strict=True):
        counts[given, true] += 1
    assert torch.allclose(Q, counts / len(truth))
    assert torch.equal(cl.doubted(p_hat, y_noisy, Q, rule), y_noisy != truth)
    T = noise.estimate_transition(y_noisy, truth, K)
    assert torch.allclose(cl.transition(Q), T)


def test_weights_make_up_for_what_went():
    _, y_noisy, truth = simulated(4)
    p_hat = torch.nn.functional.one_hot(truth, 4).double()
    Q = cl.joint(cl.confident_joint(p_hat, y_noisy), y_noisy)
    kept = ~cl.doubted(p_hat, y_noisy, Q, "noise-rate")
    stand_for = cl.weights(Q) * y_noisy[kept].bincount(minlength=4)
    assert stand_for.tolist() == pytest.approx(truth.bincount().tolist())


def test_equal_predictions_reach_their_own_mean():
    """Rounding must not take a mean of equal numbers beyond them."""
    p_hat = torch.full((9, 3), 0.1, dtype=torch.float64)
    assert p_hat[:3, 0].mean() > 0.1
    assert cl.confident_joint(p_hat, torch.arange(9) // 3).sum().item() == 9


# ---------------------------------------------------------------- with networks


@pytest.fixture
def digits(cpu):
    """Digits with 40 % wrong labels, and the truth."""
    spec = Spec(noise="symmetric", noise_rate=0.4, profile="quick")
    return experiments.prepare(spec, cpu)


def of_kind(events, kind):
    (found,) = (event for event in events if isinstance(event, kind))
    return found


def test_events_come_in_order(digits, make_setup, seeded):
    seen, _ = digits
    events = list(cl.confident_learning(seen, make_setup(epochs=4), folds=3))
    kinds = [type(event) for event in events]
    assert kinds == [Auxiliary] * 12 + [Transition, Screening] + [Epoch] * 4
    stages = [event.epoch.stage for event in events[:12:4]]
    assert stages == ["fold 1 of 3", "fold 2 of 3", "fold 3 of 3"]
    networks = {id(e.epoch.model) for e in events[:12]} | {id(events[-1].model)}
    assert len(networks) == 4
    kept = of_kind(events, Screening).kept
    assert kept.shape == seen.labels.shape and kept.dtype == torch.bool
    assert events[-1].images == int(kept.sum()) // 32 * 32


def test_nobody_predicts_what_it_was_trained_on(
    digits, make_setup, seeded, monkeypatch
):
    seen, _ = digits
    trained, asked = [], []
    fit_on, predict = cl.fit_on, training.predict

    def fit(index, *rest):
        trained.append(set(index.tolist()))
        return fit_on(index, *rest)

    def ask(model, images):
        if len(images) not in (len(seen.labels), len(seen.val_labels)):
            asked.append(images)
        return predict(model, images)

    monkeypatch.setattr(cl, "fit_on", fit)
    monkeypatch.setattr(training, "predict", ask)
    list(cl.confident_learning(seen, make_setup(epochs=4), folds=3))
    every = set(range(len(seen.labels)))
    held = [every - index for index in trained[:3]]
    assert set.union(*held) == every and sum(map(len, held)) == len(every)
    for out, images in zip(held, asked, strict=True):
        assert torch.equal(images, seen.images[sorted(out)])
    counts = [seen.labels[sorted(out)].bincount() for out in held]  # labels are spread
    assert (torch.stack(counts).amax(dim=0) - torch.stack(counts).amin(dim=0)).max() < 2


def test_it_finds_what_is_wrong_and_how(digits, cpu):
    seen, truth = digits
    spec = Spec("confident-learning", noise="symmetric", noise_rate=0.4)
    with training.seeded(0, cpu) as generator:
        setup = training.Setup(spec.model, spec.recipe, generator)
        events = list(cl.confident_learning(seen, setup))
    kept, wrong = of_kind(events, Screening).kept, seen.labels != truth.labels
    assert (~kept)[wrong].double().mean() > 0.85  # of the wrong, found
    assert wrong[~kept].double().mean() > 0.85  # of the found, wrong
    T = noise.estimate_transition(seen.labels, truth.labels, 10)
    assert (of_kind(events, Transition).T - T).abs().sum(dim=1).mean() / 2 < 0.1


@pytest.mark.parametrize("rule", cl.RULES)
def test_labels_are_pruned_by_the_rule_that_is_asked_for(
    rule, digits, make_setup, monkeypatch
):
    p_hat, y_noisy, _ = simulated(6)

    def held_out(data, setup, folds):
        yield from ()
        return p_hat

    monkeypatch.setattr(cl, "held_out", held_out)
    seen = dataclasses.replace(
        digits[0], images=digits[0].images[:240], labels=y_noisy, num_classes=6
    )
    events = list(cl.confident_learning(seen, make_setup(epochs=1), prune_by=rule))
    Q = joint_by_loops(p_hat.tolist(), y_noisy.tolist())
    expected = doubted_by_loops(p_hat.tolist(), y_noisy.tolist(), Q)[rule]
    pruned = (~of_kind(events, Screening).kept).nonzero().squeeze(1)
    assert set(pruned.tolist()) == expected


def test_all_networks_may_start_pretrained(digits, make_setup, seeded):
    events = list(
        cl.confident_learning(
            digits[0], make_setup(epochs=4), folds=2, start_pretrained=True
        )
    )
    stages = [event.epoch.stage for event in events if isinstance(event, Auxiliary)]
    assert stages == ["rotation"] * 4 + ["fold 1 of 2"] * 4 + ["fold 2 of 2"] * 4


def test_the_loss_is_weighted_in_the_last_training_only(
    digits, make_setup, seeded, steps, monkeypatch
):
    seen, _ = digits
    monkeypatch.setattr(cl, "weights", lambda Q: 1 + torch.arange(10.0))
    events = list(cl.confident_learning(seen, make_setup(epochs=4), folds=2))
    kept = of_kind(events, Screening).kept.nonzero().squeeze(1)
    network = make_setup().build(seen).eval()
    loss = -network(seen.images).log_softmax(dim=1)
    loss = loss.gather(1, seen.labels[:, None]).squeeze(1)[kept]
    weight = 1.0 + seen.labels[kept]
    expected = ((weight * loss).mean() / weight.mean()).item()
    with torch.no_grad():
        found = [step(network, kept, seen.images[kept]).item() for step in steps]
    plain = loss.mean().item()
    assert found == pytest.approx([plain, plain, expected])
    assert plain != pytest.approx(expected)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": 1}, "folds is 1; it must be 2 or more"),
        ({"prune_by": "rank"}, "prune_by is 'rank'; allowed are noise-rate, class, bo"),
        ({"folds": 500}, "folds is 500, but only .* images are labelled .; every clas"),
    ],
)
def test_settings_that_make_no_sense(digits, make_setup, settings, message):
    with pytest.raises(ValueError, match=message):
        list(cl.confident_learning(digits[0], make_setup(), **settings))


@pytest.mark.parametrize("rule", cl.RULES)
def test_a_class_that_would_keep_no_label(rule):
    y_noisy = torch.tensor([0] * 6 + [1] * 6)
    # Who is labelled 1 is of class 0 even more surely than who is labelled so.
    p_hat = torch.tensor([[0.7, 0.3]] * 6 + [[0.9, 0.1]] * 6).double()
    Q = cl.joint(cl.confident_joint(p_hat, y_noisy), y_noisy)
    kept = ~cl.doubted(p_hat, y_noisy, Q, rule)
    with pytest.raises(ValueError, match="every label of class 1 is doubted"):
        cl.check_kept(kept, y_noisy, Q)
    cl.check_kept(torch.ones_like(kept), y_noisy, torch.eye(2) / 2)
