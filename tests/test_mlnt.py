"""Li et al. (2019): synthetic labels, the step on them, and the teacher, by loops."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nlhelpers import experiments, losses, models, prototypes, training
from nlhelpers.methods import mlnt
from nlhelpers.methods.cross_entropy import cross_entropy
from nlhelpers.methods.mlnt import StudentAndTeacher
from nlhelpers.specs import Spec
from nlhelpers.training import Auxiliary, Epoch, Recipe, Setup

NETWORKS = ("mlp", "resnet14", "caffe-quick")


def run(seen, setup, **settings):
    return list(mlnt.mlnt(seen, setup, **{"M": 2} | settings))


@pytest.fixture
def few(prepared):
    """64 digits of 16 pixels, the least that caffe-quick takes."""
    seen, _ = prepared

    def large(images):
        images = images[:64].repeat_interleave(2, 2).repeat_interleave(2, 3)
        return images.contiguous(memory_format=torch.channels_last)

    return dataclasses.replace(
        seen,
        images=large(seen.images),
        labels=seen.labels[:64],
        val_images=large(seen.val_images),
        val_labels=seen.val_labels[:64],
    )


def without_dropout(network):
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return network


# ---------------------------------------------------------------- synthetic labels


def test_nearest_by_hand():
    G = torch.tensor([[0.0], [1.0], [3.0], [3.0], [10.0]])
    near = mlnt.nearest(G, 2)
    assert near[0].tolist() == [1, 2] or near[0].tolist() == [1, 3]
    assert near[1, 0] == 0
    assert near[2, 0] == 3 and near[3, 0] == 2  # its equal, and not itself
    assert sorted(near[4].tolist()) == [2, 3]


def test_nearest_against_a_loop(generator):
    G = torch.randn(30, 7, generator=generator)
    near = mlnt.nearest(G, 10)
    for i in range(30):
        others = [j for j in range(30) if j != i]
        others.sort(key=lambda j: ((G[i] - G[j]) ** 2).sum().item())
        assert near[i].tolist() == others[:10]


def test_a_batch_smaller_than_the_neighbours():
    near = mlnt.nearest(torch.randn(4, 3), 10)
    assert [sorted(row) for row in near.tolist()] == [
        [j for j in range(4) if j != i] for i in range(4)
    ]


def test_synthetic_labels_come_from_neighbours(seeded):
    labels, near = torch.arange(21), (torch.arange(21)[:, None] + torch.arange(1, 4))
    sets = mlnt.synthetic(labels, near % 21, 200, 0.5)
    assert sets.shape == (200, 21)
    changed = sets != labels
    assert (changed.sum(dim=1) == 10).all()  # half of 21, whole ones
    steps = (sets - labels) % 21
    assert steps.unique().tolist() == [0, 1, 2, 3]
    # Every image as often as any other, and every neighbour too.
    assert (changed.double().mean(dim=0) - 10 / 21).abs().max() < 0.15
    shares = steps[changed].bincount()[1:] / changed.sum()
    assert (shares - 1 / 3).abs().max() < 0.05
    assert len(set(map(tuple, sets.tolist()))) == 200
    assert len(set(map(tuple, changed.tolist()))) > 190


def test_no_synthetic_labels_and_all(seeded):
    labels, near = torch.tensor([0, 1, 2]), torch.tensor([[1], [2], [0]])
    assert mlnt.synthetic(labels, near, 2, 0.0).tolist() == [[0, 1, 2]] * 2
    assert mlnt.synthetic(labels, near, 2, 1.0).tolist() == [[1, 2, 0]] * 2


# ---------------------------------------------------------------- the step


def test_kl_by_hand():
    target = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]).log() + 3
    expected = [0.5 * math.log(0.5 / 0.25), 0.0]
    assert losses.divergence(logits, target).tolist() == pytest.approx(
        expected, abs=1e-6
    )
    assert (
        losses.divergence(torch.tensor([[-300.0, 300.0, 0.0]]), target[:1])
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_many_labels_from_one_pass(name, few, seeded):
    student = without_dropout(models.build(name, few.images, 10))
    student = StudentAndTeacher(student, 1, 1).student
    theta, images = dict(student.named_parameters()), few.images[:12]
    logits, gradient = mlnt.forward(student, theta, images)
    assert torch.allclose(logits, student(images), atol=1e-5)
    for labels in torch.randint(10, (3, 12)):
        loss = F.cross_entropy(student(images), labels)
        expected = torch.autograd.grad(loss, theta.values())
        found = gradient(labels)
        for value, (key, g) in zip(expected, found.items(), strict=True):
            assert not g.requires_grad
            assert torch.allclose(g, value, rtol=1e-3, atol=1e-5), key


def plain(pair, images, labels, y_hat, size, weight):
    """Loss and gradient of a step, one network per set of synthetic labels."""
    student = pair.student
    target = copy.deepcopy(pair.teacher)(images).softmax(dim=1)
    loss = F.cross_entropy(student(images), labels)
    grads = torch.autograd.grad(loss, list(student.parameters()))
    for of_set in y_hat:
        other = copy.deepcopy(student)
        wrong = F.cross_entropy(other(images), of_set)
        steps = torch.autograd.grad(wrong, list(other.parameters()))
        with torch.no_grad():
            for w, g in zip(other.parameters(), steps, strict=True):
                w -= size * g
        log_s = other(images).log_softmax(dim=1)
        J = F.kl_div(log_s, target, reduction="batchmean")
        more = torch.autograd.grad(J, list(other.parameters()))
        loss = loss + weight * J.item() / len(y_hat)
        grads = [g + weight * m / len(y_hat) for g, m in zip(grads, more, strict=True)]
    return loss.item(), grads


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_against_a_plain_version(name, few, steps, monkeypatch, seeded):
    setup = Setup(name, Recipe(1, 32, "sgd", 0.05, momentum=0.0), seeded)
    settings = {"alpha": 4.0, "eta": 1.5, "M": 3, "ramp": 0.0, "memory": 1.0}
    *_, last = run(few, setup, **settings)
    pair = without_dropout(last.model).train()
    assert not torch.equal(*(next(net.parameters()) for net in pair.children()))
    index = torch.arange(8, 24)
    y_hat = torch.randint(10, (3, 16))
    monkeypatch.setattr(mlnt, "synthetic", lambda *given: y_hat)
    followed = copy.deepcopy(pair)
    followed.follow()
    images, labels = few.images[index], few.labels[index]
    expected, grads = plain(followed, images, labels, y_hat, 4 * 0.05, 1.5)
    loss = steps[1](pair, index, images)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    found = torch.cat([w.grad.flatten() for w in pair.student.parameters()])
    gradient = torch.cat([g.flatten() for g in grads])
    assert (found - gradient).norm() < 0.01 * gradient.norm()
    assert all(w.grad is None for w in pair.teacher.parameters())


def test_labels_of_a_step_are_those_of_its_nearest_images(
    few, make_setup, monkeypatch, seeded
):
    given, taken = [], []
    nearest, synthetic = mlnt.nearest, mlnt.synthetic

    def noted_nearest(G, k):
        given.append((G, k))
        return nearest(G, k)

    def noted_synthetic(labels, near, M, rho):
        taken.append((labels, near, M, rho))
        return synthetic(labels, near, M, rho)

    monkeypatch.setattr(mlnt, "nearest", noted_nearest)
    monkeypatch.setattr(mlnt, "synthetic", noted_synthetic)
    batches = []
    uniform = training.drawn.uniform

    def noted_uniform(*args):
        for index in uniform(*args):
            batches.append(index)
            yield index

    monkeypatch.setattr(training.drawn, "uniform", noted_uniform)
    still = make_setup(epochs=1, optimiser="sgd", learning_rate=0.0)
    events = run(few, still, neighbours=5, rho=0.3, M=4)
    network = events[0].epoch.model
    G = torch.cat(list(prototypes.deep_features(network, few.images)))
    assert len(batches) == 4 and len(given) == len(taken) == 2
    for index, (of_batch, k), (labels, near, M, rho) in zip(
        batches[2:], given, taken, strict=True
    ):
        assert torch.equal(of_batch, G[index]) and (k, M, rho) == (5, 4, 0.3)
        assert torch.equal(labels, few.labels[index])
        assert torch.equal(near, nearest(G[index], 5))


def test_features_are_those_of_the_best_validation_accuracy(
    few, make_setup, monkeypatch, seeded
):
    scores = iter((0.3, 0.8, 0.8, 0.1))
    monkeypatch.setattr(training, "accuracy", lambda *given: next(scores))
    setup = make_setup(epochs=4)
    network, expected, found = setup.build(few), [], []

    def take(events):
        found.append((yield from events))

    for event in take(mlnt.features(network, few, setup)):
        assert event.epoch.stage == "features"
        expected.append(list(prototypes.deep_features(network, few.images)))
    assert torch.equal(found[0], torch.cat(expected[1]))
    assert not torch.equal(found[0], torch.cat(expected[3]))


# ---------------------------------------------------------------- the teacher


def linear():
    return nn.Linear(2, 3)


def test_the_teacher_is_a_moving_average(seeded):
    pair = StudentAndTeacher(linear(), ramp=30, memory=40)
    average, seen = None, []
    for t in range(60):
        with torch.no_grad():
            pair.student.weight.normal_()
        theta = pair.student.weight.detach().clone()
        seen.append(theta)
        pair.follow()
        remembered = min(t + 1, 4 if t < 30 else 40)
        gamma = 1 - 1 / remembered
        average = theta if average is None else gamma * average + (1 - gamma) * theta
        assert torch.allclose(pair.teacher.weight, average, atol=1e-6)
        if t < 4:
            assert torch.allclose(average, torch.stack(seen).mean(dim=0), atol=1e-6)
        u = min(1.0, (t + 1) / 30)
        assert pair.rise().item() == pytest.approx(math.exp(-5 * (1 - u) ** 2))


def test_a_short_memory_makes_the_teacher_the_student(seeded):
    pair = StudentAndTeacher(linear(), ramp=0, memory=0.2)
    for _ in range(3):
        with torch.no_grad():
            pair.student.weight.normal_()
        pair.follow()
        assert torch.equal(pair.teacher.weight, pair.student.weight)
        assert pair.rise() == 1


def test_defaults_are_the_authors_gammas_on_cifar(few, make_setup, monkeypatch):
    pairs = []

    class Spy(StudentAndTeacher):
        def __init__(self, network, ramp, memory):
            pairs.append((ramp, memory))
            super().__init__(network, ramp, memory)

    monkeypatch.setattr(mlnt, "StudentAndTeacher", Spy)
    images = few.images.expand(64, -1, -1, -1)
    data = dataclasses.replace(
        few, images=images.repeat(11, 1, 1, 1), labels=few.labels.repeat(11)
    )
    next(e for e in mlnt.mlnt(data, make_setup(epochs=6), M=1) if isinstance(e, Epoch))
    ((ramp, memory),) = pairs
    steps = 6 * 22  # of 704 images
    assert ramp == pytest.approx(steps / 6)
    # 1 / (1 - 0.999) of the 120 x 352 steps that 45,056 images give in batches of 128
    assert memory / steps == pytest.approx(1000 / (120 * 352))
    assert pytest.approx(100) == mlnt.EARLY * 1000


def test_who_answers_when(few, seeded):
    pair = StudentAndTeacher(without_dropout(models.build("mlp", few.images, 10)), 1, 1)
    with torch.no_grad():
        for w in pair.student.parameters():
            w.add_(0.1)
    assert not any(w.requires_grad for w in pair.teacher.parameters())
    assert torch.equal(pair.train()(few.images), pair.student(few.images))
    teachers = training.predict_logits(pair, few.images)
    assert torch.equal(teachers, pair.teacher.eval()(few.images))
    assert not torch.allclose(teachers, pair.student(few.images), atol=1e-3)


def test_trial_steps_leave_no_trace_in_running_statistics(few, steps, seeded):
    setup = Setup("resnet14", Recipe(1, 32, "sgd", 0.0), seeded)
    *_, last = run(few, setup, M=3)
    norm = last.model.teacher.body[1]
    assert norm.num_batches_tracked == 2  # steps of the one epoch
    before = copy.deepcopy(last.model.teacher).train()
    index = torch.arange(32)
    last.model.train()
    steps[1](last.model, index, few.images[index])
    before(few.images[index])
    assert torch.equal(norm.running_mean, before.body[1].running_mean)
    student = last.model.student
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(norm.running_mean is None for norm in norms)


# ---------------------------------------------------------------- the whole


def test_the_network_for_features_comes_first(prepared, make_setup):
    seen, _ = prepared
    events = run(seen, make_setup())
    assert [type(event) for event in events] == [Auxiliary] * 2 + [Epoch] * 2
    assert [e.epoch.stage for e in events[:2]] == ["features"] * 2
    assert [e.stage for e in events[2:]] == ["MLNT"] * 2
    last = events[-1]
    teacher = last.model.teacher
    found = training.accuracy(teacher, seen.val_images, seen.val_labels)
    assert last.val_accuracy == found
    assert last.model.steps == 2 * (len(seen.labels) // 32)


def test_all_networks_start_pretrained_if_told(prepared, make_setup):
    seen, _ = prepared
    still = make_setup(epochs=1, optimiser="sgd", learning_rate=0.0)
    events = run(seen, still, start_pretrained=True)
    assert [type(event) for event in events] == [Auxiliary] * 2 + [Epoch]
    network, pair = events[1].epoch.model, events[2].model
    assert events[0].epoch.stage == "rotation"
    for net in (pair.student, pair.teacher):
        pairs = zip(network.parameters(), net.parameters(), strict=True)
        assert all(a is not b and torch.equal(a, b) for a, b in pairs)


def accuracy(method, cpu, seed, **settings):
    """Last test accuracy on digits of which 40 % of the labels are wrong."""
    spec = Spec(noise="symmetric", noise_rate=0.4, seed=seed)
    seen, truth = experiments.data_for(spec, cpu)
    with training.seeded(seed, cpu) as generator:
        recipe = Recipe(15, 32, "sgd", 0.1)
        *_, last = method(seen, Setup("mlp", recipe, generator), **settings)
    return training.accuracy(last.model, truth.test_images, truth.test_labels)


def test_it_learns_digits_where_cross_entropy_learns_the_noise(cpu):
    plain = accuracy(cross_entropy, cpu, 1)
    assert accuracy(mlnt.mlnt, cpu, 1, M=1) > plain + 0.02


def test_same_seed_same_bits(few, cpu):
    found = []
    for seed in (0, 0, 1):
        with training.seeded(seed, cpu) as generator:
            setup = Setup("mlp", Recipe(2, 16, "sgd", 0.1), generator)
            *_, last = run(few, setup)
        found.append([w.clone() for w in last.model.parameters()])
    assert all(map(torch.equal, found[0], found[1]))
    assert not all(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"M": 0}, "M is 0; it must be 1 or more"),
        ({"neighbours": 0}, "neighbours is 0; it must be 1 or more"),
        ({"rho": 1.5}, r"rho is 1.5; it must be in \[0, 1\]"),
        ({"ramp": -0.1}, r"ramp is -0.1; it must be in \[0, 1\]"),
        ({"memory": 2.0}, r"memory is 2.0; it must be in \[0, 1\]"),
        ({"alpha": -1.0}, "alpha is -1.0; it must be 0 or more"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"eta": math.nan}, "eta is nan; it must be 0 or more"),
    ],
)
def test_bad_settings_are_one_error_before_any_training(
    settings, message, prepared, make_setup, steps
):
    with pytest.raises(ValueError, match=message):
        run(prepared[0], make_setup(), **settings)
    assert steps == []


def test_a_batch_of_one_has_no_neighbours(prepared, make_setup):
    with pytest.raises(ValueError, match="batch_size is 1; it must be 2 or more"):
        run(prepared[0], make_setup(batch_size=1))
