"""Rank Pruning with networks: events, folds of whole images, weights, bad settings."""

import dataclasses

import numpy as np
import pytest
import torch

from nlhelpers import data, pruning, training
from nlhelpers.data import NoisyData
from nlhelpers.methods import rank_pruning
from nlhelpers.training import Auxiliary, Epoch, Screening

WRONG = 0.3, 0.1  # share of the labels of each class


@pytest.fixture
def digits(generator):
    """Ones against sevens: as a method sees them, and the true labels."""
    every = data.digits()
    order = torch.isin(every.labels, torch.tensor([1, 7])).nonzero().squeeze(1)
    order = order[torch.randperm(len(order), generator=generator)]
    images, truth = every.images[order], (every.labels[order] == 7).long()
    labels = truth.clone()
    for label, share in enumerate(WRONG):
        own = (truth == label).nonzero().squeeze(1)
        labels[own[: round(share * len(own))]] = 1 - label
    val = torch.arange(len(labels)) % 5 == 0
    none = torch.empty(0, dtype=torch.int64)
    seen = NoisyData(
        images=images[~val],
        labels=labels[~val],
        val_images=images[val],
        val_labels=labels[val],
        num_classes=2,
        clean_images=images[none],
        clean_labels=none,
        clean_given_labels=none,
    )
    return seen, truth[~val]


def repeated(seen, count, rows):
    """The first `count` images, over and over."""
    again = torch.arange(rows) % count
    return dataclasses.replace(
        seen, images=seen.images[again], labels=seen.labels[again]
    )


@pytest.fixture
def run(cpu):
    def go(seen, setup, **settings):
        with training.seeded(0, cpu):
            return list(rank_pruning.rank_pruning(seen, setup, **settings))

    return go


def kept_by(events):
    (screening,) = (event for event in events if isinstance(event, Screening))
    return screening.kept


def test_events_come_in_order(digits, make_setup, run):
    seen, _ = digits
    events = run(seen, make_setup(epochs=2), folds=3)
    kinds = [type(event) for event in events]
    assert kinds == [Auxiliary] * 6 + [Screening] + [Epoch] * 2
    stages = [event.epoch.stage for event in events[:6:2]]
    assert stages == ["fold 1 of 3", "fold 2 of 3", "fold 3 of 3"]
    assert [(e.stage, e.number) for e in events[-2:]] == [
        ("training", 1),
        ("training", 2),
    ]
    networks = {id(e.epoch.model) for e in events[:6]} | {id(events[-1].model)}
    assert len(networks) == 4
    # An epoch is what is trained on, but for the incomplete batch.
    N, kept = len(seen.labels), kept_by(events)
    for event in events[:6]:
        assert event.epoch.images in {
            n // 32 * 32 for n in (N * 2 // 3, N * 2 // 3 + 1)
        }
    assert events[-1].images == int(kept.sum()) // 32 * 32 < N // 32 * 32


def test_it_prunes_what_is_wrong(digits, make_setup, run):
    seen, truth = digits
    kept = kept_by(run(seen, make_setup(epochs=3)))
    right = seen.labels == truth
    assert kept.dtype == torch.bool and kept.shape == truth.shape
    share, share_kept = (part.float().mean().item() for part in (right, right[kept]))
    assert kept.float().mean().item() == pytest.approx(share, abs=0.06)
    assert share_kept > share + 0.1


def test_the_pruning_is_that_of_the_held_out_predictions(
    digits, make_setup, run, monkeypatch
):
    seen, _ = digits
    asked = []
    prune = pruning.prune

    def noted(g, s):
        asked.append((g, s, prune(g, s)))
        return asked[-1][2]

    monkeypatch.setattr(pruning, "prune", noted)
    events = run(seen, make_setup())
    ((g, s, found),) = asked
    assert np.array_equal(s, seen.labels.numpy() == 0)
    assert np.array_equal(kept_by(events).numpy(), found.kept)
    # Class 0 is the paper's 1: its probability is the greater where it is the label.
    assert g[s].mean() > g[~s].mean() + 0.1
    held_out = [e.epoch.model for e in events[1:6:2]]
    every = [training.predict(m, seen.images)[:, 0].numpy() for m in held_out]
    near = np.abs(np.stack(every) - g) < 1e-5
    assert near.any(axis=0).all()


def test_the_loss_is_weighted_in_the_last_training_only(
    digits, make_setup, run, steps, monkeypatch
):
    seen, _ = digits
    monkeypatch.setattr(pruning, "noise_rates", lambda g, s: (0.3, 0.1))
    kept = kept_by(run(seen, make_setup())).nonzero().squeeze(1)
    network = make_setup().build(seen).eval()
    loss = -network(seen.images).log_softmax(dim=1)
    loss = loss.gather(1, seen.labels[:, None]).squeeze(1)
    # Class 0 lost 0.3 of its labels, so the rest of them weigh more.
    weight = torch.tensor([1 / 0.7, 1 / 0.9])[seen.labels]
    expected = (weight * loss)[kept].mean() / weight[kept].mean()
    with torch.no_grad():
        found = [step(network, kept, seen.images[kept]).item() for step in steps]
    plain = loss[kept].mean().item()
    assert found == pytest.approx([plain, plain, plain, expected.item()])
    assert plain != pytest.approx(expected.item())


@pytest.mark.parametrize("grouped", [True, False])
def test_copies_of_an_image_stay_in_one_fold(
    digits, make_setup, run, monkeypatch, grouped
):
    seen = repeated(digits[0], 60, 600)
    cuts = []
    splits = pruning.splits

    def noted(*arguments):
        cuts.append(splits(*arguments))
        return cuts[-1]

    trained = []
    fit = training.fit

    def spied(model, images, epoch, *rest, **options):
        seen_in_epochs = set()
        trained.append(seen_in_epochs)

        def watched():
            for index in epoch():
                seen_in_epochs.update((index % 60).tolist())
                yield index

        return fit(model, images, watched, *rest, **options)

    monkeypatch.setattr(pruning, "splits", noted)
    monkeypatch.setattr(training, "fit", spied)
    kept = kept_by(run(seen, make_setup(epochs=4), grouped=grouped))
    (parts,) = cuts
    held = [set((part % 60).tolist()) for _, part in parts]
    overlap = [bool(a & b) for a, b in zip(trained[:3], held, strict=True)]
    assert overlap == [not grouped] * 3
    if grouped:
        assert set.union(*held) == set(range(60)) and sum(map(len, held)) == 60
        # Copies are believed or doubted together.
        assert (kept.view(10, 60) == kept[:60]).all() and not kept.all()


def test_copies_are_predicted_once(digits, make_setup, monkeypatch):
    images = digits[0].images[:20].repeat(3, 1, 1, 1)
    model = make_setup().build(digits[0]).eval()
    held = np.r_[40:50, 0:10, 20:25]
    every = training.predict(model, images)[:, 0].double().numpy()
    asked = []
    predict = training.predict

    def noted(model, images):
        asked.append(len(images))
        return predict(model, images)

    monkeypatch.setattr(training, "predict", noted)
    for group in (None, rank_pruning.copies(images)):
        g = rank_pruning.predict_once(model, images, held, group)
        assert g.dtype == np.float64
        assert g == pytest.approx(every[held], abs=1e-6)
    assert np.array_equal(g[:10], g[10:20]) and np.array_equal(g[:5], g[20:])
    assert asked == [25, 10]


def test_copies_are_found():
    images = torch.arange(24, dtype=torch.uint8).view(3, 2, 2, 2)
    group = rank_pruning.copies(images[[2, 0, 0, 1, 2]])
    assert group[0] == group[4] and group[1] == group[2] and len(set(group)) == 3
    strided = images.contiguous(memory_format=torch.channels_last)[[0, 1, 0]]
    assert rank_pruning.copies(strided).tolist() == [0, 1, 0]


def test_the_same_seed_gives_the_same_result(digits, make_setup, run):
    seen, _ = digits
    other_clean = dataclasses.replace(
        seen,
        clean_images=seen.images[:5],
        clean_labels=seen.labels[:5],
        clean_given_labels=seen.labels[:5],
    )
    # A clean set changes nothing: there is none in the paper.
    first, again = run(seen, make_setup()), run(other_clean, make_setup())
    assert torch.equal(kept_by(first), kept_by(again))
    assert first[-1].loss == again[-1].loss
    other = run(seen, make_setup(seed=1))
    assert other[0].epoch.loss != first[0].epoch.loss


@pytest.mark.parametrize("grouped", [True, False])
def test_the_generator_decides_the_folds(digits, make_setup, monkeypatch, grouped):
    seen, _ = digits
    cuts = []
    splits = pruning.splits

    def noted(*arguments):
        cuts.append(splits(*arguments)[0][1].tolist())
        raise InterruptedError

    monkeypatch.setattr(pruning, "splits", noted)
    for seed in (0, 0, 1):
        with pytest.raises(InterruptedError):
            next(rank_pruning.rank_pruning(seen, make_setup(seed), grouped=grouped))
    assert cuts[0] == cuts[1] != cuts[2]


def test_bad_settings_and_data(digits, make_setup, run):
    seen, _ = digits
    with pytest.raises(
        ValueError, match="the data have 10 classes; rank pruning takes"
    ):
        run(dataclasses.replace(seen, num_classes=10), make_setup())
    with pytest.raises(ValueError, match="number of folds is 1; it must be"):
        run(seen, make_setup(), folds=1)
    with pytest.raises(ValueError, match="folds is 3, but only 0 groups"):
        one = dataclasses.replace(seen, labels=torch.zeros_like(seen.labels))
        run(one, make_setup())
    few = repeated(seen, 6, 60)
    with pytest.raises(ValueError, match=r"folds is 5, but only . groups"):
        run(few, make_setup(), folds=5)


def test_networks_that_learn_nothing(digits, make_setup, run, monkeypatch):
    def even(model, images):
        return torch.full((len(images), 2), 0.5)

    monkeypatch.setattr(training, "predict", even)
    with pytest.raises(
        ValueError, match=r"no better than guessing|too poor to estimate"
    ):
        run(digits[0], make_setup(epochs=1))
