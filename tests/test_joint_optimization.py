"""Tanaka et al. (2018): the loss by hand, the labels by a loop, both stages."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from nlhelpers import experiments, losses, training
from nlhelpers.methods import joint_optimization as joint
from nlhelpers.methods.cross_entropy import cross_entropy
from nlhelpers.specs import Spec
from nlhelpers.training import Auxiliary, Correction, Epoch, Recipe, Setup


def run(seen, setup, **settings):
    return list(joint.joint_optimization(seen, setup, **settings))


def kinds(events):
    return [type(event) for event in events]


# ---------------------------------------------------------------- the loss


def plain_loss(probs, y, p, alpha, beta):
    """L_c + alpha L_p + beta L_e in Python floats."""
    n, K = len(probs), len(p)
    fit = entropy = 0.0
    for s, of_one in zip(probs, y, strict=True):
        fit += sum(t * math.log(t / q) for t, q in zip(of_one, s, strict=True) if t)
        entropy -= sum(q * math.log(q) for q in s)
    mean = [sum(s[k] for s in probs) / n for k in range(K)]
    prior = sum(p[k] * math.log(p[k] / mean[k]) for k in range(K) if p[k])
    return fit / n + alpha * prior + beta * entropy / n


def test_each_term_by_hand():
    s = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    y = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    p = torch.tensor([0.25, 0.5, 0.25])
    fit = [math.log(2), 0.5 * math.log(0.5 / 0.125) + 0.5 * math.log(0.5 / 0.75)]
    assert losses.divergence(s.log(), y).tolist() == pytest.approx(fit)
    mean = [0.3125, 0.5, 0.1875]
    prior = 0.25 * math.log(0.25 / mean[0]) + 0.25 * math.log(0.25 / mean[2])
    assert joint.L_p(s.log(), p).item() == pytest.approx(prior, rel=1e-5)
    entropy = [1.5 * math.log(2), 0.25 * math.log(8) + 0.75 * math.log(4 / 3)]
    assert joint.L_e(s.log()).tolist() == pytest.approx(entropy)


def test_each_term_is_smallest_where_it_should_be():
    K = 4
    certain = torch.full((K, K), -50.0).fill_diagonal_(50.0).log_softmax(dim=1)
    equal, eye = torch.full((K,), 1 / K), torch.eye(K)
    assert losses.divergence(certain, eye).tolist() == pytest.approx([0] * K, abs=1e-6)
    assert joint.L_p(certain, equal).item() == pytest.approx(0, abs=1e-6)
    assert joint.L_e(certain).tolist() == pytest.approx([0] * K, abs=1e-6)
    unsure = torch.zeros(K, K).log_softmax(dim=1)
    assert joint.L_e(unsure).tolist() == pytest.approx([math.log(K)] * K)
    assert joint.L_p(certain[:1], equal).item() > 10


def test_extreme_logits_have_finite_losses_and_gradients():
    logits = torch.tensor([[300.0, 0.0, -300.0]] * 2, requires_grad=True)
    log_s = logits.log_softmax(dim=1)
    y, p = torch.tensor([[0.0, 0.0, 1.0]] * 2), torch.tensor([0.5, 0.5, 0.0])
    loss = (losses.divergence(log_s, y) + joint.L_e(log_s)).mean() + joint.L_p(log_s, p)
    loss.backward()
    # KL to the third class, and to the half of the second; nothing is predicted of it.
    assert loss.item() == pytest.approx(600 + 0.5 * 300 - math.log(2), rel=1e-5)
    assert logits.grad.isfinite().all()


def test_gradient_of_L_c_is_s_minus_y(generator):
    logits = torch.randn(5, 3, generator=generator, requires_grad=True)
    y = torch.rand(5, 3, generator=generator).softmax(dim=1)
    losses.divergence(logits.log_softmax(dim=1), y).sum().backward()
    assert torch.allclose(logits.grad, logits.detach().softmax(dim=1) - y, atol=1e-6)


def test_class_shares(prepared):
    seen, _ = prepared
    seen = dataclasses.replace(seen, labels=torch.tensor([3, 3, 0, 9]))
    expected = [0.25, 0, 0, 0.5, 0, 0, 0, 0, 0, 0.25]
    assert joint.class_shares(seen, "given").tolist() == expected
    assert joint.class_shares(seen, "uniform").tolist() == pytest.approx([0.1] * 10)


# ---------------------------------------------------------------- stage 1


@pytest.mark.parametrize("prior", joint.PRIORS)
def test_step_of_stage_1_against_a_plain_version(
    prior, prepared, make_setup, steps, seeded
):
    seen, _ = prepared
    settings = {"alpha": 0.7, "beta": 0.3, "begin": 0.5, "prior": prior}
    events = joint.joint_optimization(seen, make_setup(epochs=3), **settings)
    network, index = make_setup().build(seen).eval(), torch.arange(6, 26)
    probs = network(seen.images[index]).softmax(dim=1).tolist()
    counts = [(seen.labels == c).sum().item() for c in range(10)]
    p = [0.1] * 10
    if prior == "given":
        p = [count / len(seen.labels) for count in counts]
    before = [[float(c == label) for c in range(10)] for label in seen.labels[index]]
    next(events)  # no label is replaced after epoch 1 of 3
    loss = steps[0](network, index, seen.images[index]).item()
    assert loss == pytest.approx(plain_loss(probs, before, p, 0.7, 0.3), rel=1e-5)
    done = next(events).epoch
    assert isinstance(next(events), Correction)
    after = training.predict(done.model, seen.images)[index].tolist()  # past is 1 epoch
    loss = steps[0](network, index, seen.images[index]).item()
    assert loss == pytest.approx(plain_loss(probs, after, p, 0.7, 0.3), rel=1e-5)


def test_default_weights(prepared, make_setup, steps, seeded):
    seen, _ = prepared
    next(joint.joint_optimization(seen, make_setup()))
    network, index = make_setup().build(seen).eval(), torch.arange(9)
    probs = network(seen.images[index]).softmax(dim=1).tolist()
    y = [[float(c == label) for c in range(10)] for label in seen.labels[index]]
    loss = steps[0](network, index, seen.images[index]).item()
    assert loss == pytest.approx(plain_loss(probs, y, [0.1] * 10, 1.2, 0.8), rel=1e-5)


def scripted(monkeypatch, seen, generator):
    """Let predictions of the training images be random; returns a list of them."""
    given, predict = [], training.predict

    def answer(model, images):
        if images is not seen.images:
            return predict(model, images)
        logits = torch.randn(len(images), 10, generator=generator)
        given.append(logits.mul(2).softmax(dim=1))
        return given[-1]

    monkeypatch.setattr(training, "predict", answer)
    return given


@pytest.mark.parametrize("labels", joint.LABELS)
def test_labels_are_the_mean_of_the_last_predictions(
    labels, prepared, make_setup, monkeypatch, generator, steps
):
    seen, _ = prepared
    given = scripted(monkeypatch, seen, generator)
    settings = {"begin": 0.5, "past": 0.3, "labels": labels}  # from epoch 5, of 3
    corrections, network = 0, make_setup().build(seen).eval()
    index = torch.arange(40, 60)
    log_s = network(seen.images[index]).log_softmax(dim=1)
    for event in joint.joint_optimization(seen, make_setup(epochs=10), **settings):
        if not isinstance(event, Correction):
            continue
        corrections += 1
        assert len(given) == corrections + 2  # asked from epoch 3 on
        mean = sum(given[-3:]) / 3
        assert torch.equal(event.labels, mean.argmax(dim=1))
        assert not torch.equal(event.labels, given[-1].argmax(dim=1))
        y = mean[index]
        if labels == "hard":
            y = torch.eye(10)[mean.argmax(dim=1)][index]
        loss = steps[0](network, index, seen.images[index])
        expected = (torch.xlogy(y, y) - y * log_s).sum(dim=1).mean()
        expected = expected + 1.2 * joint.L_p(log_s, torch.full((10,), 0.1))
        expected = expected + 0.8 * joint.L_e(log_s).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert corrections == 6


def test_fewer_epochs_than_are_to_be_averaged(
    prepared, make_setup, monkeypatch, generator
):
    seen, _ = prepared
    given = scripted(monkeypatch, seen, generator)
    events = run(seen, make_setup(epochs=3), begin=0.0, past=1.0)
    found = [event.labels for event in events if isinstance(event, Correction)]
    for count, labels in enumerate(found, start=1):
        assert torch.equal(labels, sum(given[:count]).argmax(dim=1))
    assert len(found) == len(given) == 3


def test_when_labels_are_replaced(prepared, make_setup):
    seen, _ = prepared
    again = [Auxiliary, Correction]
    found = kinds(run(seen, make_setup(epochs=20)))
    assert found == [Auxiliary] * 6 + again * 14 + [Epoch] * 20  # 70 of 200 are 7 of 20
    found = kinds(run(seen, make_setup(epochs=2)))
    assert found == again * 2 + [Epoch] * 2
    found = kinds(run(seen, make_setup(epochs=2), begin=1.0))
    assert found == [Auxiliary, *again] + [Epoch] * 2


def test_the_rate_falls_in_stage_2_only(prepared, make_setup):
    seen, _ = prepared
    for falling in ({"falls_after": (1,)}, {"patience": 1, "learning_rate": 1e-6}):
        events = run(seen, make_setup(epochs=4, **falling))
        first = [e.epoch.learning_rate for e in events if isinstance(e, Auxiliary)]
        second = [e.learning_rate for e in events if isinstance(e, Epoch)]
        assert first == [first[0]] * 4 == [second[0]] * 4
        assert second[-1] < second[0]


# ---------------------------------------------------------------- stage 2


def test_stage_2_trains_a_fresh_network_on_the_labels_found(
    prepared, make_setup, steps, seeded
):
    seen, _ = prepared
    events = run(seen, make_setup(epochs=3))
    first = [e.epoch for e in events if isinstance(e, Auxiliary)]
    second = [e for e in events if isinstance(e, Epoch)]
    assert {e.stage for e in first} == {"stage 1"}
    assert {e.stage for e in second} == {"stage 2"}
    assert first[0].model is not second[0].model
    y = training.predict(first[0].model, seen.images)  # past is 1 epoch of 3
    network, index = make_setup().build(seen).eval(), torch.arange(30)
    s = network(seen.images[index]).softmax(dim=1)
    expected = nn.functional.kl_div(s.log(), y[index], reduction="batchmean")
    loss = steps[1](network, index, seen.images[index])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_both_networks_start_anew_or_from_the_same_pretrained_one(prepared, make_setup):
    seen, _ = prepared
    still = make_setup(epochs=2, optimiser="sgd", learning_rate=0.0)
    for pretrained in (False, True):
        events = run(seen, still, start_pretrained=pretrained)
        aux = [e.epoch for e in events if isinstance(e, Auxiliary)]
        stages = ["rotation"] * 2 * pretrained + ["stage 1"] * 2
        assert [epoch.stage for epoch in aux] == stages
        one, other = aux[-1].model, events[-1].model
        assert one is not other
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == pretrained


# ---------------------------------------------------------------- the whole


def spec(**values):
    return Spec(**{"noise": "symmetric", "noise_rate": 0.4} | values)


def accuracies(method, cpu, seed, **settings):
    """Last test accuracy, and the share of right labels after each correction."""
    seen, truth = experiments.data_for(spec(seed=seed), cpu)
    right = []
    with training.seeded(seed, cpu) as generator:
        recipe = Recipe(15, 32, "sgd", 0.1)
        for event in method(seen, Setup("mlp", recipe, generator), **settings):
            if isinstance(event, Correction):
                right.append((event.labels == truth.labels).double().mean().item())
    return training.accuracy(event.model, truth.test_images, truth.test_labels), right


def test_it_learns_digits_where_cross_entropy_learns_the_noise(cpu):
    plain, _ = accuracies(cross_entropy, cpu, 0)
    found, right = accuracies(joint.joint_optimization, cpu, 0)
    assert found > plain + 0.03
    assert right[-1] > 0.85  # of labels of which 0.6 were right


def test_same_seed_same_bits(prepared, make_setup, cpu):
    seen, _ = prepared
    found = []
    for seed in (0, 0, 1):
        with training.seeded(seed, cpu):
            *_, correction, _, last = run(seen, make_setup(seed))
        found.append((correction.labels, [w.clone() for w in last.model.parameters()]))
    (labels, weights), (same_labels, same_weights), (_, others) = found
    assert torch.equal(labels, same_labels)
    assert all(map(torch.equal, weights, same_weights))
    assert not all(map(torch.equal, weights, others))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha is -1.0; it must be 0 or more"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"beta": math.inf}, "beta is inf; it must be 0 or more"),
        ({"begin": 1.5}, r"begin is 1.5; it must be in \[0, 1\]"),
        ({"past": -0.1}, r"past is -0.1; it must be in \[0, 1\]"),
        ({"past": math.nan}, "past is nan"),
        ({"labels": "firm"}, "labels is 'firm'; allowed are 'soft' and 'hard'"),
        ({"prior": "flat"}, "prior is 'flat'; allowed are 'uniform' and 'given'"),
    ],
)
def test_bad_settings_are_one_error_before_any_training(
    settings, message, prepared, make_setup, steps
):
    with pytest.raises(ValueError, match=message):
        run(prepared[0], make_setup(), **settings)
    assert steps == []
