"""Lee (2013): what counts how much and when, and labels that are really forgotten."""

import dataclasses
import inspect
import math

import pytest
import torch

from nlhelpers import evaluation, experiments, training
from nlhelpers.methods import clean_only, cross_entropy, pseudo_label
from nlhelpers.methods.pseudo_label import weight
from nlhelpers.profiles import shortened
from nlhelpers.specs import Spec
from nlhelpers.training import Auxiliary, Epoch, Setup


@pytest.fixture
def seen(cpu):
    """Digits with 100 clean images, as a method that validates on true labels."""
    spec = Spec("clean-only", noise_rate=0.4, profile="smoke", num_clean=100)
    return experiments.data_for(spec, cpu)[0]


def run(seen, setup, **settings):
    return list(pseudo_label.pseudo_label(seen, setup, **settings))


def held(step, name):
    """What a step knows by that name."""
    return inspect.getclosurevars(step).nonlocals[name]


def same_weights(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- a(t)


def test_the_weight_by_hand():
    paper = [weight(t / 1000, 3.0, 0.1, 0.6) for t in (0, 99, 100, 225, 350, 599)]
    assert paper == pytest.approx([0, 0, 0, 0.75, 1.5, 3 * 499 / 500])
    assert [weight(t, 3.0, 0.1, 0.6) for t in (0.6, 0.61, 1.0)] == [3.0] * 3
    assert [weight(t, 2.0, 0.5, 0.5) for t in (0, 0.49, 0.5, 1)] == [0, 0, 2, 2]
    assert weight(0.0, 2.0, 0.0, 0.0) == 2.0


def test_it_rises_after_every_epoch(seen, make_setup, steps):
    events = pseudo_label.pseudo_label(seen, make_setup(epochs=5), T1=0.3, T2=0.9)
    used = [held(steps[1], "a").item() for done in events if done.stage != "clean"]
    expected = [0.0, 0.0, 3 * 0.1 / 0.6, 3 * 0.3 / 0.6, 3 * 0.5 / 0.6]
    assert used == pytest.approx(expected)


# ---------------------------------------------------------------- the step


def test_a_step_against_a_plain_loop(seen, make_setup, steps, seeded):
    """Loss and gradient; the two parts are of unequal size here."""
    (*_, last) = run(seen, make_setup(epochs=1))
    network, step, M = last.model.eval(), steps[1], len(seen.clean_labels)
    held(step, "a").fill_(0.7)
    index = torch.cat([torch.arange(5), M + torch.arange(12)])
    both = torch.cat([seen.clean_images, seen.images])
    loss = step(network, index, both[index])
    supervised, guessed = 0.0, 0.0
    for i in range(5):
        log_p = network(seen.clean_images[i : i + 1])[0].log_softmax(dim=0)
        supervised = supervised - log_p[seen.clean_labels[i]] / 5
    for i in range(12):
        log_p = network(seen.images[i : i + 1])[0].log_softmax(dim=0)
        guessed = guessed - log_p[int(log_p.argmax())] / 12
    expected = supervised + 0.7 * guessed
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(network.parameters())
    for own, plain in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-6)


def test_half_of_a_batch_is_labelled(seen, make_setup, monkeypatch):
    epochs = []
    fit = training.fit

    def noted(model, images, epoch, *rest, **options):
        epochs.append((images, epoch))
        return fit(model, images, epoch, *rest, **options)

    monkeypatch.setattr(training, "fit", noted)
    run(seen, make_setup(epochs=1))
    images, epoch = epochs[1]
    M, N = len(seen.clean_labels), len(seen.labels)
    assert torch.equal(images, torch.cat([seen.clean_images, seen.images]))
    batches = torch.stack(list(epoch()))
    assert batches.shape == ((M + N) // 32, 32)
    assert ((batches < M).sum(dim=1) == 16).all()


def test_noisy_labels_are_forgotten(seen, make_setup, cpu):
    garbage = dataclasses.replace(seen, labels=torch.full_like(seen.labels, -7))
    found = []
    for given in (seen, garbage):
        with training.seeded(0, cpu):
            found.append(run(given, make_setup(epochs=3))[-1])
    assert found[0].loss == found[1].loss
    assert same_weights(found[0].model.state_dict(), found[1].model.state_dict())


def test_until_T1_images_without_a_label_change_nothing(
    seen, make_setup, steps, seeded
):
    (*_, last) = run(seen, make_setup(epochs=1))
    network, step, M = last.model.eval(), steps[1], len(seen.clean_labels)
    index = torch.cat([torch.arange(6), M + torch.arange(6)])
    images = torch.cat([seen.clean_images[:6], seen.images[:6]])
    black = torch.cat([seen.clean_images[:6], seen.images[:6] * 0])
    for a, same in ((0.0, True), (1.0, False)):
        held(step, "a").fill_(a)
        losses = [step(network, index, given).item() for given in (images, black)]
        assert (losses[0] == losses[1]) == same


# ---------------------------------------------------------------- the method


def test_one_network_learns_from_the_clean_set_first(seen, make_setup):
    events = run(seen, make_setup())
    assert [event.stage for event in events] == ["clean"] * 2 + ["pseudo-label"] * 2
    assert len({id(event.model) for event in events}) == 1


def test_it_starts_from_pretrained_layers_if_told(seen, make_setup):
    events = run(seen, make_setup(epochs=1), start_pretrained=True)
    assert [type(event) for event in events] == [Auxiliary, Epoch, Epoch]
    assert events[0].epoch.stage == "rotation"


def test_the_first_training_is_clean_only(seen, make_setup, cpu):
    found = []
    for method in (clean_only.clean_only, pseudo_label.pseudo_label):
        with training.seeded(0, cpu):
            found.append([done.loss for done in method(seen, make_setup())][:2])
    assert found[0] == found[1]


def test_it_repeats_itself(seen, make_setup, cpu):
    found = []
    for seed in (0, 0, 1):
        with training.seeded(seed, cpu):
            found.append(run(seen, make_setup(seed))[-1].model.state_dict())
    assert same_weights(found[0], found[1])
    assert not same_weights(found[0], found[2])


def test_defaults_are_the_papers():
    settings = inspect.signature(pseudo_label.pseudo_label).parameters
    names = ("a_f", "T1", "T2", "start_pretrained")
    assert [settings[name].default for name in names] == [3.0, 0.1, 0.6, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"a_f": -1.0}, "a_f is -1.0; it must be 0 or more"),
        ({"a_f": math.nan}, "a_f is nan"),
        ({"T1": -0.1}, r"T1 is -0.1; it must be in \[0, 1\]"),
        ({"T1": 1.5}, "T1 is 1.5"),
        ({"T1": 0.7}, r"T2 is 0.6; it must be in \[T1, 1\], and T1 is 0.7"),
        ({"T2": 1.2}, "T2 is 1.2"),
        ({"T2": math.nan}, "T2 is nan"),
    ],
)
def test_bad_settings(settings, message, seen, make_setup):
    with pytest.raises(ValueError, match=message):
        run(seen, make_setup(), **settings)


def test_it_needs_a_clean_set(prepared, make_setup):
    seen, _ = prepared
    with pytest.raises(ValueError, match="the clean set of 0 images has none of class"):
        run(seen, make_setup())


def test_it_learns_more_than_from_the_clean_set_alone(cpu):
    spec = Spec("clean-only", noise_rate=0.4, num_clean=200, seed=1)
    seen, truth = experiments.data_for(spec, cpu)
    found = []
    for method in (cross_entropy.cross_entropy, pseudo_label.pseudo_label):
        with training.seeded(spec.seed, cpu) as generator:
            setup = Setup(spec.model, shortened(spec.recipe, 15), generator)
            accuracies = [
                evaluation.measure(done, truth)["test_accuracy"]
                for done in method(seen, setup)
                if done.number == 15
            ]
        found.append(accuracies)
    (plain,), (clean, ours) = found
    assert ours >= plain > 0.85
    assert ours >= clean
