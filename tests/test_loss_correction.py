"""Forward and backward correction: where T comes from, and what is trained with it."""

import dataclasses

import pytest
import torch

from nlhelpers import experiments, losses, noise, training
from nlhelpers.data import UNKNOWN
from nlhelpers.methods import METHODS, loss_correction
from nlhelpers.specs import Spec
from nlhelpers.training import Auxiliary, Epoch, Transition

NAMES = ("forward", "backward")
SPEC = Spec("forward", "digits", "asymmetric", 0.3, profile="smoke")


def events(name, seen, setup, **settings):
    return list(METHODS[name].run(seen, setup, **settings))


def test_first_a_network_that_learns_the_noise_then_one_that_is_corrected(
    prepared, make_setup, seeded
):
    seen, _ = prepared
    kinds = [type(event) for event in events("forward", seen, make_setup(epochs=2))]
    assert kinds == [Auxiliary, Auxiliary, Transition, Epoch, Epoch]


def test_estimated_t_is_what_the_first_network_says(prepared, make_setup, seeded):
    seen, _ = prepared
    *first, found, _ = events("forward", seen, make_setup(epochs=1), percentile=90.0)
    probs = training.predict(first[-1].epoch.model, seen.images).double()
    rows = []
    for k in range(10):
        order = sorted(range(len(probs)), key=lambda i: probs[i, k].item())
        rows.append(probs[order[int(0.9 * (len(probs) - 1))]])
    torch.testing.assert_close(found.T, torch.stack(rows))


def test_a_known_t_needs_one_network_and_is_used(prepared, make_setup, cpu):
    """With T = I both are cross-entropy to the last bit or so."""
    seen, _ = prepared
    weights = {}
    for name in (*NAMES, "cross-entropy"):
        settings = {} if name == "cross-entropy" else {"T": torch.eye(10)}
        with training.seeded(0, cpu):
            found = events(name, seen, make_setup(epochs=2), **settings)
        assert not any(isinstance(event, Auxiliary) for event in found)
        weights[name] = torch.cat(
            [value.flatten() for value in found[-1].model.state_dict().values()]
        )
    for name in NAMES:
        torch.testing.assert_close(
            weights[name], weights["cross-entropy"], atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_that_of_the_noisy_labels_under_t(
    name, prepared, make_setup, seeded, monkeypatch
):
    seen, _ = prepared
    T = noise.pair_flip(0.3, 10)
    given = {"forward": T.float(), "backward": torch.linalg.inv(T)}[name]
    plain = getattr(losses, name)
    calls = []

    def spy(logits, labels, *, transition=None, inverse=None):
        used = transition if transition is not None else inverse
        calls.append(labels)
        torch.testing.assert_close(used.double(), given.double())
        return plain(logits, labels, used)

    monkeypatch.setattr(losses, name, spy)
    events(name, seen, make_setup(epochs=1), T=T)
    assert len(calls) == len(seen.labels) // make_setup().recipe.batch_size


def test_on_a_clean_set_t_is_counted(prepared, make_setup, seeded):
    seen, truth = prepared
    part = slice(0, 300)
    checked = dataclasses.replace(
        seen,
        clean_images=seen.images[part],
        clean_labels=truth.labels[part],
        clean_given_labels=seen.labels[part].clone(),
    )
    checked.clean_given_labels[:20] = UNKNOWN
    first, *others = events("backward", checked, make_setup(epochs=1))
    pairs = zip(
        truth.labels[20:300].tolist(), seen.labels[20:300].tolist(), strict=True
    )
    counts = torch.zeros(10, 10, dtype=torch.float64)
    for i, j in pairs:
        counts[i, j] += 1
    torch.testing.assert_close(first.T, counts / counts.sum(1, keepdim=True))
    assert [type(event) for event in others] == [Epoch]
    tuned = events("forward", checked, make_setup(epochs=1), finetune=True)
    assert [e.stage for e in tuned[1:]] == ["training", "fine-tuning"]
    few = {
        name: getattr(checked, name)[checked.clean_labels != 7]
        for name in ("clean_images", "clean_labels", "clean_given_labels")
    }
    with pytest.raises(ValueError, match="no image of class 7 with a given label"):
        events("forward", dataclasses.replace(checked, **few), make_setup())


def test_t_is_recorded(cpu):
    record = experiments.run(SPEC, cpu)
    T = torch.tensor(record["transition"], dtype=torch.float64)
    assert T.shape == (10, 10)
    torch.testing.assert_close(T.sum(1), torch.ones(10).double())
    plain = dataclasses.replace(SPEC, method="cross-entropy")
    assert experiments.run(plain, cpu)["transition"] is None


@pytest.mark.parametrize(
    ("kind", "rate", "transition", "expected"),
    [
        ("symmetric", 0.2, None, noise.symmetric(0.2, 10)),
        ("pair-flip", 0.3, None, noise.pair_flip(0.3, 10)),
        (
            "asymmetric-swap",
            0.6,
            None,
            noise.asymmetric(0.6, noise.PATHS["asymmetric-swap"]["digits"], 10),
        ),
        ("given", None, noise.pair_flip(0.1, 10).tolist(), noise.pair_flip(0.1, 10)),
    ],
)
def test_the_known_t_is_the_one_the_labels_were_drawn_by(
    kind, rate, transition, expected, cpu
):
    spec = Spec(
        "forward",
        "digits",
        kind,
        rate,
        profile="smoke",
        transition=transition,
        settings={"T": "known"},
    )
    record = experiments.run(spec, cpu)
    assert record["transition"] == expected.tolist()
    assert record["spec"]["settings"] == {"T": "known"}
    assert experiments.is_current(record)


@pytest.mark.parametrize("kind", ["human-worst", "random-confusion"])
def test_t_of_some_noises_is_not_known(kind):
    rate = None if kind == "human-worst" else 0.3
    with pytest.raises(ValueError, match=f"T is 'known' and noise is '{kind}'; T is"):
        Spec("forward", "cifar10", kind, rate, settings={"T": "known"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"T": "guessed"}, "T is 'guessed'; it must be 'estimated', 'known' or a"),
        ({"T": torch.eye(9)}, "9"),
        ({"T": torch.full((10, 10), 0.2)}, "row"),
        ({"percentile": 101.0}, r"percentile is 101\.0; it must be in \[0, 100\]"),
        ({"finetune": True}, "finetune is True, but there is no clean set"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_settings(name, settings, message, prepared, make_setup):
    seen, _ = prepared
    with pytest.raises(ValueError, match=message):
        events(name, seen, make_setup(), **settings)


def test_a_singular_t_stops_backward_correction_and_not_forward(
    prepared, make_setup, seeded
):
    seen, _ = prepared
    T = torch.full((10, 10), 0.1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"T has the condition number .* Use forward"):
        events("backward", seen, make_setup(epochs=1), T=T)
    assert events("forward", seen, make_setup(epochs=1), T=T)


@pytest.mark.parametrize("name", NAMES)
def test_correction_undoes_what_t_does(name, cpu):
    """A third of each class is labelled as the next: T known, the harm is undone."""
    spec = Spec(name, "digits", "pair-flip", 0.35, settings={"T": "known"})
    plain = dataclasses.replace(spec, method="cross-entropy", settings={})
    corrected = experiments.run(spec, cpu)["last_accuracy"]
    assert corrected > experiments.run(plain, cpu)["last_accuracy"] + 0.05


def test_names_of_both_losses():
    assert loss_correction.forward_loss(torch.eye(2)).func is losses.forward
    assert loss_correction.backward_loss(torch.eye(2)).func is losses.backward


@pytest.mark.parametrize("name", NAMES)
def test_one_pretraining_serves_both_networks(name, prepared, make_setup, seeded):
    """With a learning rate of zero both keep the layers that were pretrained."""
    seen, _ = prepared
    still = make_setup(epochs=1, optimiser="sgd", learning_rate=0.0)
    first, second, _, last = events(name, seen, still, start_pretrained=True)
    stages = [first.epoch.stage, second.epoch.stage, last.stage]
    assert stages == ["rotation", "training", "training"]
    start = first.epoch.model.body.state_dict()
    *inner, _, _ = start  # all but the last layer's weight and bias
    for model in (second.epoch.model, last.model):
        found = model.body.state_dict()
        assert all(torch.equal(found[key], start[key]) for key in inner)
