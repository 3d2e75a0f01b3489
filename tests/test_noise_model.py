"""Xiao et al. (2015): the model by enumeration, EM by its theorems, bad clean sets."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from nlhelpers import experiments, models, noise, profiles, training
from nlhelpers.data import UNKNOWN
from nlhelpers.methods import METHODS, noise_model
from nlhelpers.methods.bottom_up import noisy_log_likelihood
from nlhelpers.methods.noise_model import (
    copy_convolutions,
    for_types,
    label_model,
    log_joint,
    log_likelihood,
    mixed_batches,
    posterior,
    soft_cross_entropy,
)
from nlhelpers.specs import Spec
from nlhelpers.training import Auxiliary, Epoch, Setup

L = 4


@pytest.fixture
def C(generator):
    """A confusion matrix with some zeros."""
    C = torch.rand(L, L, generator=generator, dtype=torch.float64).fill_diagonal_(0)
    C[1, 0] = C[0, 2] = 0
    return C / C.sum(dim=0)


def logits(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).mul(2).requires_grad_()


# ---------------------------------------------------------------- the model


def test_eq_1_by_hand(C):
    model = label_model(C, L)
    assert model.shape == (3, L, L)
    assert torch.allclose(model.sum(dim=1), torch.ones(3, L))  # over y_noisy
    assert torch.equal(model[0], torch.eye(L))
    assert model[1, 2, 1] == pytest.approx(1 / 3) and model[1, 2, 2] == 0
    assert torch.allclose(model[2], C.float())
    assert label_model(None, L).shape == (2, L, L)


def test_posterior_equals_enumeration(C):
    y_logits, z_logits = logits(20, L), logits(20, 3, seed=2)
    y_noisy = torch.arange(20) % L
    joint = log_joint(y_logits, z_logits, y_noisy, label_model(C, L))
    q_y, q_z = posterior(joint)
    p_y, p_z = y_logits.softmax(dim=1).tolist(), z_logits.softmax(dim=1).tolist()
    for n in range(20):
        noisy, table = int(y_noisy[n]), {}
        for y, z in itertools.product(range(L), range(3)):
            of_label = {
                0: float(noisy == y),
                1: float(noisy != y) / (L - 1),
                2: C[noisy, y].item(),
            }[z]
            table[y, z] = of_label * p_y[n][y] * p_z[n][z]
        total = sum(table.values())
        for y in range(L):
            by_hand = sum(table[y, z] for z in range(3)) / total
            assert q_y[n, y].item() == pytest.approx(by_hand, abs=1e-6)
        for z in range(3):
            by_hand = sum(table[y, z] for y in range(L)) / total
            assert q_z[n, z].item() == pytest.approx(by_hand, abs=1e-6)
        assert log_likelihood(joint)[n].item() == pytest.approx(
            math.log(total), abs=1e-5
        )
    assert torch.allclose(q_y.sum(dim=1), torch.ones(20))
    assert torch.allclose(q_z.sum(dim=1), torch.ones(20))


def test_posterior_of_extreme_logits(C):
    y_logits = torch.tensor([[200.0, -200, 0, 0]]).expand(L, L)
    z_logits = torch.tensor([[-300.0, 300, 0]]).expand(L, 3)
    q_y, q_z = posterior(
        log_joint(y_logits, z_logits, torch.arange(L), label_model(C, L))
    )
    for q in (q_y, q_z):
        assert q.isfinite().all()
        assert torch.allclose(q.sum(dim=1), torch.ones(L))


def test_the_m_step_climbs_the_likelihood(C):
    """Eq. 7 at the current parameters is the gradient of log p(y_noisy | x)."""
    y_logits, z_logits = logits(30, L), logits(30, 3, seed=2)
    y_noisy = torch.arange(30) % L
    joint = log_joint(y_logits, z_logits, y_noisy, label_model(C, L))
    expected = torch.autograd.grad(
        log_likelihood(joint).sum(), (y_logits, z_logits), retain_graph=True
    )
    q_y, q_z = (q.detach() for q in posterior(joint))
    loss = soft_cross_entropy(y_logits, q_y) + soft_cross_entropy(z_logits, q_z)
    found = torch.autograd.grad(-loss.sum(), (y_logits, z_logits))
    for gradient, same in zip(found, expected, strict=True):
        assert torch.allclose(gradient, same, atol=1e-6)


def test_noise_free_is_plain_cross_entropy(C):
    y_noisy = torch.arange(12) % L
    certain = torch.tensor([[0.0, -math.inf, -math.inf]]).expand(12, 3)
    q_y, q_z = posterior(log_joint(logits(12, L), certain, y_noisy, label_model(C, L)))
    assert torch.equal(q_y, torch.eye(L)[y_noisy])
    assert torch.equal(q_z, torch.eye(3)[:1].expand(12, 3))


def test_one_shared_noise_type_is_the_bottom_up_model(C):
    y_logits, y_noisy = logits(12, L), torch.arange(12) % L
    shared = torch.tensor([[0.5, 0.2, 0.3]])
    model = label_model(C, L)
    Q = (shared[0][:, None, None] * model).sum(dim=0)
    ours = log_likelihood(
        log_joint(y_logits, shared.log().expand(12, 3), y_noisy, model)
    )
    theirs = noisy_log_likelihood(y_logits, y_noisy, Q)
    assert torch.allclose(ours, theirs, atol=1e-6)
    by_hand = (y_logits.softmax(dim=1) @ Q.T).gather(1, y_noisy[:, None]).log()
    assert torch.allclose(theirs, by_hand.squeeze(1), atol=1e-6)


# ---------------------------------------------------------------- EM on tables


def tabular(generator, C, count):
    """True tables, and x, y, z, y_noisy drawn from the model."""
    X = 6
    p_y = torch.randn(X, L, generator=generator).mul(2).softmax(dim=1)
    p_z = torch.randn(X, 3, generator=generator).softmax(dim=1)
    x = torch.randint(X, (count,), generator=generator)
    y = torch.multinomial(p_y[x], 1, generator=generator).squeeze(1)
    z = torch.multinomial(p_z[x], 1, generator=generator).squeeze(1)
    of_label = label_model(C, L)[z, :, y]
    y_noisy = torch.multinomial(of_label, 1, generator=generator).squeeze(1)
    return p_y, p_z, x, y, z, y_noisy


def em_step(log_y, log_z, counts, model, clean):
    """One exact EM step on tables, from the counts (X, L) of x and y_noisy.

    `clean` are the counts (X, L) and (X, 3) of what is known: y and z.
    """
    x, y_noisy = torch.ones_like(counts).nonzero(as_tuple=True)
    joint = log_joint(log_y[x], log_z[x], y_noisy, model)
    n = counts[x, y_noisy][:, None]
    q_y, q_z = posterior(joint)
    new_y = clean[0].clone().index_add_(0, x, n * q_y)
    new_z = clean[1].clone().index_add_(0, x, n * q_z)
    log_y = (new_y / new_y.sum(dim=1, keepdim=True)).log()
    log_z = (new_z / new_z.sum(dim=1, keepdim=True)).log()
    return log_y, log_z, (n.squeeze(1) * log_likelihood(joint)).sum().item()


def count(x, values, size):
    """Counts (6, size), float64, of pairs."""
    pairs = torch.bincount(x * size + values, minlength=6 * size)
    return pairs.view(6, size).double()


def test_the_likelihood_never_falls(C, generator):
    _, _, x, _, _, y_noisy = tabular(generator, C, 3000)
    counts, model = count(x, y_noisy, L), label_model(C, L).double()
    nothing = torch.zeros(6, L).double(), torch.zeros(6, 3).double()
    for seed in range(3):
        log_y = logits(6, L, seed=seed).detach().double().log_softmax(dim=1)
        log_z = logits(6, 3, seed=seed + 9).detach().double().log_softmax(dim=1)
        past = -math.inf
        for _ in range(100):
            log_y, log_z, now = em_step(log_y, log_z, counts, model, nothing)
            assert now >= past - 1e-9
            past = now


def test_em_recovers_the_parameters_better_than_the_clean_set_alone(C, generator):
    p_y, p_z, x, y, z, y_noisy = tabular(generator, C, 1_000_000)
    M, model = 3000, label_model(C, L).double()
    clean = count(x[:M], y[:M], L), count(x[:M], z[:M], 3)
    log_y, log_z = (known.div(known.sum(1, keepdim=True)).log() for known in clean)

    def error():
        found = (log_y.exp() - p_y).abs().mean() + (log_z.exp() - p_z).abs().mean()
        return found.item()

    before, counts = error(), count(x[M:], y_noisy[M:], L)
    for _ in range(2000):
        log_y, log_z, _ = em_step(log_y, log_z, counts, model, clean)
    assert error() < 0.7 * before
    assert error() < 0.03


# ---------------------------------------------------------------- the method


def test_every_batch_has_its_share_of_clean_images(prepared, make_setup):
    seen, _ = prepared
    seen = dataclasses.replace(
        seen, clean_images=seen.images[:50], clean_labels=seen.labels[:50]
    )
    setup = make_setup(batch_size=30)
    drawn = list(mixed_batches(seen, setup, 1 / 3))
    assert len(drawn) == (50 + len(seen.labels)) // 30
    for index in drawn:
        assert (index < 50).sum() == 10
    noisy = torch.cat(drawn)
    noisy = noisy[noisy >= 50]
    assert noisy.max() < 50 + len(seen.labels)
    assert noisy.bincount().max() == 1  # none twice before all once


def test_networks_other_than_the_classifier_are_not_judged(cpu, make_setup):
    spec = Spec("noise-model", noise="confusing", num_clean=100, profile="smoke")
    seen, _ = experiments.prepare(spec, cpu)
    events = list(METHODS["noise-model"].run(seen, make_setup()))
    kinds = [type(event) for event in events]
    assert kinds == [Epoch] * 2 + [Auxiliary] + [Epoch] * 2
    assert [event.stage for event in events if isinstance(event, Epoch)] == [
        *["clean"] * 2,
        *["em"] * 2,
    ]


def test_clean_images_are_told_and_noisy_ones_inferred(
    prepared, make_setup, cpu, monkeypatch, seeded
):
    """With a certain network, q of a noisy image is its posterior, of a clean one y."""
    given = []
    original = noise_model.soft_cross_entropy

    def spy(logits, q):
        given.append(q)
        return original(logits, q)

    monkeypatch.setattr(noise_model, "soft_cross_entropy", spy)
    spec = Spec("noise-model", noise="confusing", num_clean=100, profile="smoke")
    seen, _ = experiments.prepare(spec, cpu)
    list(METHODS["noise-model"].run(seen, make_setup(batch_size=30)))
    q_y, q_z = given[0], given[1]
    certain = (q_y == 1).any(dim=1)
    assert certain[:10].all() and not certain[10:].all()
    assert (q_z == 1).any(dim=1)[:10].all()
    assert torch.allclose(q_y.sum(dim=1), torch.ones(30), atol=1e-5)


@pytest.fixture
def captured(cpu, make_setup, monkeypatch):
    """Runs a method without training: its data, and what it would train by stage."""

    def capture(method):
        spec = Spec(method, noise="confusing", num_clean=100, profile="smoke")
        seen, _ = experiments.prepare(spec, cpu)
        stages = {}

        def fit(model, images, batches, step, *rest, stage):
            stages[stage] = model.eval(), images, step
            return iter(())

        monkeypatch.setattr(training, "fit", fit)
        list(METHODS[method].run(seen, make_setup()))
        return seen, stages

    return capture


def six_of(seen):
    """Three clean images whose labels were wrong before the check, three noisy ones."""
    wrong = (seen.clean_given_labels != seen.clean_labels).nonzero().flatten()
    return torch.cat([wrong[:3], torch.tensor([100, 101, 350])])


def test_bottom_up_by_hand(captured, seeded):
    seen, stages = captured("bottom-up")
    network, images, step = stages["bottom-up"]
    index = six_of(seen)
    Q = torch.zeros(10, 10)
    for noisy, true in zip(seen.clean_given_labels, seen.clean_labels, strict=True):
        Q[noisy, true] += 1
    Q /= Q.sum(dim=0)
    p = network(images[index]).softmax(dim=1)
    expected = [-p[n, seen.clean_labels[index[n]]].log() for n in range(3)]
    expected += [-(Q @ p[n])[seen.labels[index[n] - 100]].log() for n in range(3, 6)]
    loss = step(network, index, images[index])
    assert loss.item() == pytest.approx(sum(expected).item() / 6, rel=1e-4)
    assert torch.equal(images, torch.cat([seen.clean_images, seen.images]))


@pytest.mark.parametrize("method", ["noisy-as-truth", "noisy-as-truth-after-clean"])
def test_noisy_as_truth_takes_true_labels_where_it_has_them(method, captured, seeded):
    seen, stages = captured(method)
    network, images, step = stages["noisy as truth"]
    index = six_of(seen)
    labels = torch.cat([seen.clean_labels, seen.labels])[index]
    log_p = network(images[index]).log_softmax(dim=1)
    expected = -log_p[torch.arange(6), labels].mean().item()
    assert step(network, index, images[index]).item() == pytest.approx(expected)
    assert ("clean" in stages) == (method == "noisy-as-truth-after-clean")


@pytest.mark.parametrize(
    "method", ["noisy-as-truth-after-clean", "bottom-up", "pseudo-label", "noise-model"]
)
def test_the_network_of_the_clean_set_goes_on(method, cpu, make_setup):
    seen, _ = experiments.prepare(Spec(method, num_clean=100, profile="smoke"), cpu)
    first, *_, last = METHODS[method].run(seen, make_setup(epochs=1))
    assert (first.stage, first.number) == ("clean", 1) and last.stage != "clean"
    assert getattr(last.model, "classes", last.model) is first.model


def test_a_step_of_em_climbs_the_likelihood(captured, seeded):
    """Of what was given to noisy images; of clean ones class and noise type count."""
    seen, stages = captured("noise-model")
    networks, images, step = stages["em"]
    given, true = seen.clean_given_labels, seen.clean_labels
    C = noise.estimate_confusion(given, true, 10)
    of_label, index, expected = label_model(C, 10), six_of(seen), 0.0
    p_y = networks.classes(images[index]).softmax(dim=1)
    p_z = networks.types(images[index]).softmax(dim=1)
    for n, i in enumerate(index.tolist()):
        if i < 100:
            z = 2 if C[given[i], true[i]] > 1 / 9 else 1  # of a wrong label
            p = p_y[n, true[i]] * p_z[n, z]
        else:
            joint = of_label[:, seen.labels[i - 100]] * p_z[n][:, None] * p_y[n]
            p = joint.sum()
        expected = expected - p.log() / 6
    weights = list(networks.parameters())
    found = torch.autograd.grad(step(networks, index, images[index]), weights)
    for slope, by_hand in zip(
        found, torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(slope, by_hand)


NEED_CLEAN = [name for name, method in METHODS.items() if method.clean_set == "needed"]


@pytest.mark.parametrize("method", NEED_CLEAN)
def test_a_clean_set_is_asked_for(method):
    with pytest.raises(ValueError, match="num_clean is 0"):
        Spec(method)


@pytest.mark.parametrize("method", ["clean-only", "bottom-up", "noise-model"])
def test_a_clean_set_without_a_class(method, cpu):
    with pytest.raises(ValueError, match=r"none of class .*num_clean"):
        experiments.run(Spec(method, num_clean=5, profile="smoke"), cpu)


def test_a_clean_set_without_a_wrong_label_goes_on(cpu):
    spec = Spec("noise-model", num_clean=100, noise_rate=0.0, profile="smoke")
    with pytest.warns(UserWarning, match="nothing is known of confusing noise"):
        record = experiments.run(spec, cpu)
    assert record["last_accuracy"] > 0.75


@pytest.mark.parametrize("method", ["bottom-up", "noise-model"])
@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_bad_share(method, share, cpu):
    spec = Spec(method, num_clean=100, settings={"clean_share": share})
    with pytest.raises(ValueError, match="clean_share"):
        experiments.run(spec, cpu)


@pytest.mark.parametrize("name", ["types_epochs", "types_rate"])
@pytest.mark.parametrize("share", [0.0, 1.5, -0.5])
def test_a_bad_share_of_the_recipe(name, share, cpu):
    spec = Spec("noise-model", num_clean=100, settings={name: share})
    with pytest.raises(ValueError, match=rf"{name} is {share}; it must be in"):
        experiments.run(spec, cpu)


def test_the_second_network_trains_as_in_the_authors_solver():
    """1,500 of 6,000 steps of 100 images, at 1e-4, falling after 1,000."""
    setup = Setup("caffe-quick", profiles.CAFFE_QUICK, torch.Generator())
    recipe = for_types(setup, 1 / 4, 1 / 10).recipe
    assert recipe.epochs * 500 == 1500
    assert recipe.falls_after == (2,)
    assert recipe.learning_rate == pytest.approx(1e-4)
    assert for_types(setup, 1.0, 1.0).recipe == setup.recipe
    assert for_types(setup, 0.01, 1.0).recipe.epochs == 1


@pytest.mark.parametrize("model", ["mlp", "resnet14", "caffe-quick"])
def test_convolutions_are_copied_and_nothing_else(model):
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    source, target = (models.build(model, images, K) for K in (10, 3))
    source(images)  # moves the running means of ResNet's normalisation
    before = {name: value.clone() for name, value in target.state_dict().items()}
    copy_convolutions(source, target)
    for (name, own), given in zip(
        target.state_dict().items(), source.state_dict().values(), strict=True
    ):
        layer = target.get_submodule(name.rpartition(".")[0])
        copied = isinstance(layer, nn.Conv2d | nn.BatchNorm2d)
        assert own.equal(given if copied else before[name])


def test_the_second_network_starts_with_the_convolutions_of_the_first(
    cpu, make_setup, monkeypatch
):
    class Stop(Exception):
        pass

    def stop(types, *rest):
        raise Stop(types)

    monkeypatch.setattr(noise_model, "train_noise_types", stop)
    seen, _ = experiments.prepare(Spec("noise-model", num_clean=100), cpu)
    setup = dataclasses.replace(make_setup(epochs=1), model="resnet14")
    classes = None
    with pytest.raises(Stop) as stopped:
        for event in METHODS["noise-model"].run(seen, setup):
            classes = event.model
    (types,) = stopped.value.args
    assert types.body[0].weight.equal(classes.body[0].weight)


def test_what_no_clean_image_showed_is_unlikely_not_impossible():
    Q = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0]])
    found = noisy_log_likelihood(torch.zeros(3, 3), torch.tensor([0, 1, 2]), Q)
    assert found.isfinite().all() and found[2] < found[0] - 5


def test_clean_images_that_never_had_another_label(cpu, make_setup, monkeypatch):
    """C is counted without them, and nothing is told about their noise type."""
    spec = Spec("noise-model", noise="confusing", num_clean=200, profile="smoke")
    seen, _ = experiments.prepare(spec, cpu)
    half = torch.arange(200) % 2 == 0
    given = seen.clean_given_labels.masked_fill(half, UNKNOWN)
    seen = dataclasses.replace(seen, clean_given_labels=given)
    expected = noise.estimate_confusion(given[~half], seen.clean_labels[~half], 10)
    asked, told = [], []
    labels, cross_entropy = noise_model.label_model, noise_model.soft_cross_entropy

    def label_spy(C, L):
        asked.append(C)
        return labels(C, L)

    def told_spy(logits, q):
        told.append(q)
        return cross_entropy(logits, q)

    monkeypatch.setattr(noise_model, "label_model", label_spy)
    monkeypatch.setattr(noise_model, "soft_cross_entropy", told_spy)
    list(METHODS["noise-model"].run(seen, make_setup(batch_size=30)))
    assert torch.equal(asked[0], expected)
    q_z = torch.cat([q[:10] for q in told[1::2]])  # of the clean images in each batch
    assert set(q_z.sum(dim=1).tolist()) == {0.0, 1.0}
    assert 0.4 < q_z.sum(dim=1).mean() < 0.6
    list(METHODS["bottom-up"].run(seen, make_setup(batch_size=30)))


def test_confusing_noise_is_found_in_the_image(cpu):
    """p(z | x) of images with confused labels is higher than that of others."""
    spec = Spec("noise-model", noise="confusing", noise_rate=0.3, num_clean=300)
    seen, truth = experiments.prepare(spec, cpu)
    with training.seeded(0, cpu) as generator:
        recipe = dataclasses.replace(spec.recipe, epochs=8)
        setup = training.Setup("mlp", recipe, generator)
        for event in METHODS["noise-model"].run(seen, setup):
            last = event
    types = training.predict(last.model.types, seen.images)
    wrong = seen.labels != truth.labels
    p = types[:, noise.CONFUSING]
    assert p[wrong].mean() > p[~wrong].mean() + 0.05
