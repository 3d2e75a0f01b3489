"""Binary tasks: exact fractions, equal classes, copies, and numbers that cannot be."""

import itertools

import pytest
import torch

from nlhelpers import binary, experiments
from nlhelpers.data import DataError, DataSet
from nlhelpers.specs import Spec
from tasks import task

PAPER = [(1.0, 1.0), (0.85, 0.85), (0.7, 0.85), (0.6, 0.65)]
TASK = task()


@pytest.fixture(scope="module")
def numbered():
    """Ten classes of 700 images, whose two pixels tell the number of the image."""
    number = torch.arange(7000)
    images = torch.stack([number // 256, number % 256], dim=1).to(torch.uint8)
    labels = number % 10
    names = tuple(map(str, range(10)))
    images = images.view(-1, 1, 1, 2)
    return DataSet(images, labels, images[:500], labels[:500], names)


def load(dataset, pi=(0.7, 0.85), task="5,7 vs 2,4", num_images=1000, seed=0, **words):
    generator = torch.Generator().manual_seed(seed)
    return binary.load(dataset, task, pi, num_images, generator, **words)


def numbers(images):
    return (images[:, 0, 0, 0].long() * 256 + images[:, 0, 0, 1]).tolist()


def fractions(given, true):
    """pi_P and pi_N by counting."""
    pairs = list(zip(given.tolist(), true.tolist(), strict=True))
    return [
        sum(t == label for g, t in pairs if g == label)
        / sum(g == label for g, _ in pairs)
        for label in (0, 1)
    ]


@pytest.mark.parametrize("pi", PAPER)
@pytest.mark.parametrize("size", [1000, 100, 40])
def test_fractions_are_as_exact_as_whole_numbers_allow(numbered, pi, size):
    seen, truth = load(numbered, pi, num_images=size, rows=size)
    assert fractions(seen.labels, truth.labels) == pytest.approx(pi, abs=2 / size)
    found = fractions(seen.val_labels, truth.val_labels)
    assert found == pytest.approx(pi, abs=2 / size)


@pytest.mark.parametrize("pi", [*PAPER, (0.51, 0.99), (0.9, 0.55), (0.75, 2 / 3)])
@pytest.mark.parametrize("half", [1, 2, 10, 37, 50])
def test_no_other_division_of_two_halves_comes_nearer(half, pi):
    def miss(d, b):
        a, c = half - d, half - b
        if a + b == 0 or c + d == 0:
            return float("inf")
        return abs(a / (a + b) - pi[0]) + abs(c / (c + d) - pi[1])

    every = itertools.product(range(half + 1), repeat=2)
    best = min(miss(d, b) for d, b in every)
    assert miss(*binary.wrong_labels(half, *pi)) == pytest.approx(best)


def test_fractions_that_come_out_even_are_exact():
    # Of 500 + 500 images 75 + 75 are wrong at 0.85; at 0.6 and 0.65, 600 are in P_hat.
    assert binary.wrong_labels(500, 0.85, 0.85) == (75, 75)
    assert binary.wrong_labels(500, 0.6, 0.65) == (140, 240)


def test_every_class_is_there_as_often_and_shares_the_wrong_labels(numbered):
    seen, truth = load(numbered, (0.6, 0.65), num_images=1000, rows=1000)
    classes = numbered.labels[truth.index]
    assert classes.bincount().tolist() == [0, 0, 250, 0, 250, 250, 0, 250]
    wrong = seen.labels != truth.labels
    assert classes[wrong].bincount().tolist() == [0, 0, 120, 0, 120, 70, 0, 70]
    assert (truth.labels == torch.isin(classes, torch.tensor([2, 4])).long()).all()


def test_groups_of_unequal_size_weigh_the_same(numbered):
    _, truth = load(numbered, task="0 vs 1,2,3", num_images=120, rows=120)
    counts = numbered.labels[truth.index].bincount().tolist()
    assert counts == [60, 20, 20, 20]


def test_images_are_repeated_with_their_labels(numbered):
    seen, truth = load(numbered, num_images=100, rows=1000)
    assert numbers(seen.images) == truth.index.tolist()
    found = {}
    for number, label in zip(numbers(seen.images), seen.labels.tolist(), strict=True):
        found.setdefault(number, []).append(label)
    assert len(found) == 100
    assert all(len(v) == 10 and len(set(v)) == 1 for v in found.values())


def test_rows_are_the_papers_ten_thousand_unless_a_profile_says_fewer(cpu):
    assert binary.UPSAMPLED == 10_000
    spec = Spec(**TASK, profile="paper")
    assert len(experiments.data_for(spec, cpu)[0].labels) == 10_000
    smoke = Spec(**TASK, profile="smoke")
    assert len(experiments.data_for(smoke, cpu)[0].labels) == smoke.recipe.limit


@pytest.mark.parametrize(("num_images", "rows"), [(100, 600), (800, 800)])
def test_more_images_than_rows_are_all_taken(cpu, num_images, rows):
    whole = task("0,1,2,3,4 vs 5,6,7,8,9", (1, 1), num_images)
    seen, _ = experiments.data_for(Spec(**whole, profile="smoke"), cpu)
    assert seen.labels.bincount().tolist() == [rows // 2, rows // 2]


def test_validation_has_other_images_and_testing_all_of_the_classes(numbered):
    seen, truth = load(numbered, num_images=1000)
    assert len(seen.val_labels) == 1000
    assert not set(numbers(seen.val_images)) & set(numbers(seen.images))
    own = torch.isin(numbered.test_labels, torch.tensor([2, 4, 5, 7]))
    assert len(truth.test_labels) == own.sum()
    negative = torch.isin(numbered.test_labels[own], torch.tensor([2, 4]))
    assert torch.equal(truth.test_labels, negative.long())


def test_validation_takes_what_is_left(numbered):
    seen, _ = load(numbered, num_images=2640)  # 660 of the 700 of each class
    assert len(seen.val_labels) == 160


def test_the_seed_decides(numbered):
    first, again, other = (load(numbered, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("5,7", "two groups of classes"),
        ("5 vs 7 vs 2", "two groups of classes"),
        ("5, vs 2", "two groups of classes"),
        (" vs ", "two groups of classes"),
        (57, "task is 57; it must be a text"),
        ("5,7 vs 7,2", "names 7 twice"),
        ("5,5 vs 2", "names 5 twice"),
    ],
)
def test_a_bad_task_is_met_at_the_door(task, message):
    with pytest.raises(ValueError, match=message):
        Spec(**TASK | {"task": task})


@pytest.mark.parametrize(
    ("pi", "message"),
    [
        ((0.0, 0.9), r"pi_P is 0.0; it must be in \(0, 1\]"),
        ((0.9, 1.2), "pi_N is 1.2"),
        ((0.5, 0.5), "they say nothing"),
        ((0.6, 0.3), "they say nothing"),
        ((float("nan"), 0.9), "pi_P is nan"),
        ((0.9,), "two numbers"),
        (("a", "b"), "two numbers"),
    ],
)
def test_bad_fractions_are_met_at_the_door(pi, message):
    with pytest.raises(ValueError, match=message):
        Spec(**TASK | {"pi": pi})


def test_two_halves_cannot_have_every_fraction(numbered):
    with pytest.raises(ValueError, match="both must be more than 1/2"):
        load(numbered, (0.9, 0.4))


@pytest.mark.parametrize("size", [2, 102, 1001])
def test_sizes_must_come_out_even(numbered, size):
    with pytest.raises(ValueError, match=r"num_images is .* multiple of 4"):
        load(numbered, num_images=size)


def test_more_images_than_there_are(numbered):
    with pytest.raises(DataError, match="2800, but a class has 700 images"):
        load(numbered, num_images=2800)  # leaves none to validate on


def test_a_class_that_the_data_lack(numbered):
    with pytest.raises(ValueError, match=r"no class 'car'; it has 0, 1"):
        load(numbered, task="car vs 2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": "symmetric", "noise_rate": 0.2}, "task is '5,7 vs 2,4', but noise"),
        ({"task": ""}, "task is ''"),
        ({"pi": None}, "pi is None"),
        ({"num_images": 0}, "num_images is 0"),
        ({"noise_rate": 0.2}, "own rate"),
        ({"method": "two-stage", "num_clean": 10}, "a task has no clean set"),
    ],
)
def test_a_task_is_said_whole_or_not_at_all(changes, message):
    with pytest.raises(ValueError, match=message):
        Spec(**TASK | changes)


@pytest.mark.parametrize("method", ["nl-gan", "rank-pruning"])
def test_methods_for_two_classes_want_a_task(method):
    with pytest.raises(ValueError, match="is for two classes; set noise to 'binary'"):
        Spec(method)


def test_a_spec_survives_its_record(cpu):
    spec = Spec(**TASK, profile="smoke", model="mlp")
    record = experiments.run(spec, cpu)
    assert experiments.spec_of(record) == spec
    assert record["spec"]["pi"] == (0.7, 0.85)
    assert record["realised_rate"] == pytest.approx(0.24, abs=0.02)
