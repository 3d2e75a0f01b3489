"""Networks that do not start from random weights."""

import pytest
import torch

from nlhelpers import data, experiments, models, pretraining
from nlhelpers.methods import METHODS
from nlhelpers.specs import Spec
from nlhelpers.training import Auxiliary, Setup


def finish(generator):
    """The events of a generator, and what it returns."""
    events = []
    while True:
        try:
            events.append(next(generator))
        except StopIteration as stop:
            return events, stop.value


def test_rotation_learns_without_labels(cpu, make_setup, seeded):
    seen, _ = experiments.prepare(Spec(), cpu)
    setup = make_setup(epochs=10)
    fresh = setup.build(seen)
    events, network = finish(pretraining.pretrained(seen, setup))
    assert all(isinstance(event, Auxiliary) for event in events)
    assert events[-1].epoch.val_accuracy > 0.8  # of four turns
    turner = events[-1].epoch.model
    assert network(seen.images[:5]).shape == (5, 10)
    taken, asked = turner.body.state_dict(), network.body.state_dict()
    for name, value in asked.items():
        of_last_layer = name.startswith("7.")
        same = value.shape == taken[name].shape and torch.equal(value, taken[name])
        assert same != of_last_layer, name
    assert torch.equal(network.mean, fresh.mean)


def test_turns_are_right(cpu, make_setup, prepared, monkeypatch):
    """What the network is told about an image is how it was turned."""
    seen, _ = prepared
    asked = []

    def accuracy(model, images, labels):
        asked.append((images, labels))
        return 0.0

    monkeypatch.setattr(pretraining.training, "accuracy", accuracy)
    finish(pretraining.pretrained(seen, make_setup(epochs=1)))
    images, turns = asked[0]
    assert turns.bincount().tolist() == [15] * 4
    for image, turn, original in zip(images, turns, seen.val_images, strict=True):
        assert torch.equal(image.rot90(-int(turn), (1, 2)), original)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, method in METHODS.items()
        if "start_pretrained" in method.settings or name.endswith("pretrained")
    ],
)
def test_every_method_starts_where_the_pretraining_ended(name, cpu, make_setup, seeded):
    """With a learning rate of zero all layers but the last stay those of the start."""
    method = METHODS[name]
    clean = 200 if method.clean_set == "needed" else 0
    seen, _ = experiments.prepare(Spec(name, profile="smoke", num_clean=clean), cpu)
    asked = {"start_pretrained"} & method.settings.keys()
    setup = make_setup(epochs=1, optimiser="sgd", learning_rate=0.0)
    events = method.run(seen, setup, **dict.fromkeys(asked, True))
    turned, trained = (getattr(e, "epoch", e) for e in (next(events), next(events)))
    assert turned.stage == "rotation" != trained.stage
    *start, last, _ = turned.model.body.state_dict().values()
    *now, own, _ = trained.model.body.state_dict().values()
    assert all(map(torch.equal, start, now)) and last.shape != own.shape


@pytest.mark.parametrize("name", ["alexnet", "resnet50"])
def test_imagenet_weights_fill_all_but_the_last_layer(name, monkeypatch, make_setup):
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    published = models.torchvision.models.get_model(name).state_dict()
    kind = type(models.torchvision.models.get_weight(pretraining.IMAGENET[name]))
    monkeypatch.setattr(kind, "get_state_dict", lambda self, **k: published)
    labels = torch.zeros(4, dtype=torch.int64)
    seen = data.NoisyData(images, labels, images, labels, 14, images, labels, labels)
    setup = Setup(name, make_setup().recipe, torch.Generator())
    events, network = finish(pretraining.pretrained(seen, setup))
    assert events == []
    own = network.body[-1].state_dict()
    shared = [name for name in own if name in published]
    differing = [n for n in shared if not torch.equal(own[n], published[n])]
    last = {"alexnet": ["classifier.6.weight", "classifier.6.bias"], "resnet50": []}
    assert differing == last[name]
    assert network(images).shape == (4, 14)


def test_imagenet_weights_that_cannot_be_had(monkeypatch, make_setup):
    def refuse(self, **options):
        raise OSError("no network")

    kind = models.torchvision.models.AlexNet_Weights
    monkeypatch.setattr(kind, "get_state_dict", refuse)
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    labels = torch.zeros(4, dtype=torch.int64)
    seen = data.NoisyData(images, labels, images, labels, 14, images, labels, labels)
    setup = Setup("alexnet", make_setup().recipe, torch.Generator())
    with pytest.raises(data.DataError, match=r"alexnet-.*\.pth into .*checkpoints"):
        finish(pretraining.pretrained(seen, setup))
