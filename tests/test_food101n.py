"""Food-101N: two small folders in their published layout, and damage of every kind."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nlhelpers import experiments, files, food101n, profiles, records
from nlhelpers.__main__ import main
from nlhelpers.data import UNKNOWN, DataError
from nlhelpers.files import ImageFiles
from nlhelpers.food101n import (
    CLASS_NAMES,
    CLEAN,
    IMAGES,
    NOISY,
    TEST,
    TEST_IMAGES,
    VAL,
)
from nlhelpers.methods import clean_net
from nlhelpers.specs import Spec
from photographs import SIZE, copy, edit, write, write_image

LISTED, TESTED = range(240), range(240, 256)
VERIFIED = {CLEAN: range(100, 220), VAL: range(40, 60)}
HEADERS = {
    CLASS_NAMES: "class_name",
    NOISY: "class_name/key",
    CLEAN: "class_name/key\tverification_label",
    VAL: "class_name/key\tverification_label",
}
NAMES = [f"dish_{100 - label:03}" for label in range(101)]  # sorting would turn them
# By a key's number: its class label, and whether a person found it right.
LABEL, RIGHT = (lambda k: k * 7 % 101), (lambda k: k % 5 != 0)

TRAIN = [k for k in LISTED if k not in VERIFIED[VAL]]
ALL = 220 + 120 + 16 + 16  # images in the four parts: three of them are not 1 %


def key(k):
    return f"{NAMES[LABEL(k)]}/{k * 977:x}-{k}.jpg"


def image(k):
    return (TEST_IMAGES if k in TESTED else IMAGES) + key(k)


def number(name):
    """The number in a key."""
    return int(name.decode().rpartition("-")[2].removesuffix(".jpg"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Both sets in their layout, under one folder."""
    root = tmp_path_factory.mktemp("pristine")
    write(root / CLASS_NAMES, [HEADERS[CLASS_NAMES], *NAMES])
    write(root / NOISY, [HEADERS[NOISY], *map(key, LISTED)])
    for name, listed in VERIFIED.items():
        lines = [f"{key(k)}\t{int(RIGHT(k))}" for k in listed]
        write(root / name, [HEADERS[name], *lines])
    write(root / TEST, [key(k).removesuffix(".jpg") for k in TESTED])
    for k in (*LISTED, *TESTED):
        write_image(root / image(k), k)
    return root


@pytest.fixture
def root(pristine, tmp_path, monkeypatch):
    """A copy in which any file may be changed, as the data root."""
    root = tmp_path / "data"
    monkeypatch.setenv("NLHELPERS_DATA", str(root))
    return copy(pristine, root)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """No workers: to start them takes longer than to read so few files."""
    monkeypatch.setattr(files, "cores", lambda: 0)


def load(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return food101n.load(generator, **{"size": SIZE} | options)


def numbers(images):
    return [number(name) for name in images.names]


def labels(images):
    return [LABEL(k) for k in numbers(images)]


def right(name):
    return [k for k in VERIFIED[name] if RIGHT(k)]


# ---------------------------------------------------------------- what is read


def test_the_protocol(pristine):
    seen, truth = load(root=pristine)
    assert seen.num_classes == 101
    assert numbers(seen.images) == TRAIN
    assert numbers(seen.clean_images) == list(VERIFIED[CLEAN])
    assert numbers(seen.val_images) == right(VAL)
    assert numbers(truth.test_images) == list(TESTED)
    assert truth.index.tolist() == TRAIN  # in the whole list
    for images in (seen.images, seen.val_images, seen.clean_images, truth.test_images):
        assert isinstance(images, ImageFiles)
        assert images.shape == torch.Size((len(images), 3, SIZE, SIZE))


def test_every_label_is_that_of_its_key(pristine):
    seen, truth = load(root=pristine)
    assert seen.labels.tolist() == labels(seen.images)
    assert seen.clean_given_labels.tolist() == labels(seen.clean_images)
    assert seen.val_labels.tolist() == labels(seen.val_images)
    assert truth.val_labels.tolist() == labels(seen.val_images)
    assert truth.test_labels.tolist() == labels(truth.test_images)
    for found in (vars(seen) | vars(truth)).values():
        assert not torch.is_tensor(found) or found.dtype == torch.int64


def test_a_label_that_was_found_right_is_both_given_and_true(pristine):
    seen, _ = load(root=pristine)
    as_given, _ = load(root=pristine, clean_val=False)
    is_right = torch.tensor([RIGHT(k) for k in VERIFIED[CLEAN]])
    assert not is_right.all()
    assert torch.equal(
        seen.clean_labels, seen.clean_given_labels.where(is_right, UNKNOWN)
    )
    assert seen.val_labels.tolist() == as_given.val_labels.tolist()


def test_nobody_knows_the_truth_of_the_training_images(pristine):
    seen, truth = load(root=pristine)
    assert truth.labels.tolist() == [UNKNOWN] * len(seen.labels)


def test_images_are_those_of_their_keys(pristine):
    seen, truth = load(root=pristine, crop_to=10)
    for images in (seen.images, seen.clean_images, seen.val_images, truth.test_images):
        decoded = torch.cat(list(images.split(50)))
        assert decoded.shape[1:] == (3, 10, 10)
        red = decoded[:, 0].double().mean((1, 2))
        assert (red - torch.tensor(numbers(images))).abs().max() < 3


def test_class_names(pristine):
    assert food101n.class_names(pristine) == tuple(NAMES)


def test_they_lie_under_the_data_root(root):
    assert load()[0].images.root == root
    assert food101n.class_names() == experiments.class_names("food101n") == tuple(NAMES)


@pytest.mark.parametrize("name", HEADERS)
def test_a_list_may_lack_its_header(root, name):
    before, truth_before = load()
    edit(root / name, lambda lines: lines[1:])
    after, truth_after = load()
    assert food101n.class_names() == tuple(NAMES)
    assert before.images.names.tolist() == after.images.names.tolist()
    assert before.labels.tolist() == after.labels.tolist()
    assert before.clean_labels.tolist() == after.clean_labels.tolist()
    assert before.val_labels.tolist() == after.val_labels.tolist()
    assert truth_before.index.tolist() == truth_after.index.tolist()


def test_lines_may_end_as_on_windows(root):
    before, truth_before = load()
    for name in (*HEADERS, TEST):
        path = root / name
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    after, truth_after = load()
    assert before.images.names.tolist() == after.images.names.tolist()
    assert before.clean_labels.tolist() == after.clean_labels.tolist()
    assert truth_before.test_labels.tolist() == truth_after.test_labels.tolist()


def test_what_is_verified_for_validation_is_nowhere_else(root):
    both = f"{key(41)}\t1"
    edit(root / CLEAN, lambda lines: [*lines, both])
    seen, _ = load()
    assert 41 in numbers(seen.val_images)
    assert 41 not in numbers(seen.clean_images)
    assert 41 not in numbers(seen.images)


# ---------------------------------------------------------------- fewer images


def test_limit(pristine):
    seen, truth = load(root=pristine, limit=20)
    sizes = len(seen.labels), len(seen.clean_labels)
    assert sizes == (20, 20)
    assert (len(seen.val_labels), len(truth.test_labels)) == (16, 16)  # all there are
    drawn = numbers(seen.images)
    assert drawn == sorted(set(drawn)) != TRAIN[:20]
    assert truth.index.tolist() == drawn
    assert seen.labels.tolist() == labels(seen.images)
    assert seen.clean_given_labels.tolist() == labels(seen.clean_images)
    wrong = [not RIGHT(k) for k in numbers(seen.clean_images)]
    assert (seen.clean_labels == UNKNOWN).tolist() == wrong
    assert truth.labels.tolist() == [UNKNOWN] * 20


def test_limit_depends_on_the_generator_alone(pristine):
    def drawn(seed):
        return numbers(load(seed, root=pristine, limit=20)[0].images)

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_limit_of_nothing(pristine):
    with pytest.raises(ValueError, match="limit is 0; it must be 1 or more"):
        load(root=pristine, limit=0)


# ---------------------------------------------------------------- damaged images


def test_a_few_broken_images_are_left_out_with_one_report(root):
    (root / image(5)).unlink()
    (root / image(41)).write_bytes(b"")
    (root / image(250)).write_bytes(b"<!DOCTYPE html>")
    with pytest.warns(UserWarning) as caught:
        seen, truth = load()
    (report,) = [str(warning.message) for warning in caught]
    assert report.startswith(f"3 of {ALL} images under {root} are missing or damaged")
    assert all(image(k) in report for k in (5, 41, 250))
    assert Path(caught[0].filename) == Path(__file__)
    assert numbers(seen.images) == [k for k in TRAIN if k != 5]
    assert truth.index.tolist() == numbers(seen.images)
    assert seen.labels.tolist() == labels(seen.images)
    assert numbers(seen.val_images) == [k for k in right(VAL) if k != 41]
    assert seen.val_labels.tolist() == labels(seen.val_images)
    assert truth.test_labels.tolist() == labels(truth.test_images)
    assert len(truth.test_labels) == 15


def test_a_broken_image_leaves_each_part_that_has_it(root):
    (root / image(101)).unlink()
    with pytest.warns(UserWarning, match=f"^2 of {ALL} images .* first {image(101)}; "):
        seen, _ = load()
    assert 101 not in numbers(seen.images) + numbers(seen.clean_images)


def test_more_than_one_percent_is_too_much(root):
    for k in range(4):
        (root / image(k)).unlink()
    message = f"4 of {ALL} images .*; more than 1% are too many: unpack the published"
    with pytest.raises(DataError, match=message):
        load()


def test_images_left_out_are_not_looked_at(root):
    used = set(numbers(load(limit=16)[0].images))
    (root / image(next(k for k in range(40) if k not in used))).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(limit=16)


def test_damage_behind_the_header_is_found_if_asked_for(root):
    path = root / image(60)
    pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert 60 in numbers(load()[0].images)  # a header says nothing of it
    with pytest.warns(UserWarning, match=f"1 of {ALL} images"):
        seen, _ = load(thorough=True)
    assert 60 not in numbers(seen.images)


# ---------------------------------------------------------------- bad lists


def test_a_missing_set(tmp_path):
    missing = tmp_path / "elsewhere"
    with pytest.raises(DataError) as caught:
        load(root=missing)
    message = str(caught.value)
    assert message.startswith(f"{missing} is missing; unpack Food-101N")
    hints = food101n.SOURCE, food101n.TEST_SOURCE, "NLHELPERS_DATA", "food-101/"
    assert all(hint in message for hint in hints)


def test_missing_parts_are_named_together(root):
    for name in (CLASS_NAMES, VAL):
        (root / name).unlink()
    (root / "food-101").rename(root / "food")
    lacking = f"{root} lacks {CLASS_NAMES}, {VAL}, {TEST_IMAGES}, {TEST}; unpack Food"
    with pytest.raises(DataError, match=f"^{lacking}"):
        load()
    with pytest.raises(DataError, match=f"^{lacking}"):
        experiments.class_names("food101n")


@pytest.mark.parametrize("name", [*HEADERS, TEST, IMAGES, TEST_IMAGES])
def test_each_part_is_needed(root, name):
    (root / name).rename(root / "away")
    with pytest.raises(DataError, match=f"^{root} lacks {name}; "):
        load()


@pytest.mark.parametrize("name", VERIFIED)
@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (key(7), "it must be a key, a tab and 0 or 1"),
        (f"{key(7)}\t", "it must be a key, a tab and 0 or 1"),
        (f"{key(7)} 1", "it must be a key, a tab and 0 or 1"),
        (f"{key(7)}\t2", "it must be a key, a tab and 0 or 1"),
        (f"{key(7)}\tyes", "it must be a key, a tab and 0 or 1"),
        ("1.jpg\t1", "key '1.jpg' is malformed; it must be a class and the name"),
        ("dish/1.jpg\t1", "class 'dish' is unknown; it must be one of those in"),
        ("", "is blank"),
    ],
)
def test_a_bad_line_in_a_verified_list(root, name, line, complaint):
    edit(root / name, lambda lines: [*lines[:7], line, *lines[7:]])
    with pytest.raises(DataError, match=f"^{root / name}, line 8.*{complaint}"):
        load()


@pytest.mark.parametrize("name", [NOISY, TEST])
@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("1.jpg", "key '1.jpg' is malformed; it must be a class and the name"),
        ("dish_001/", "key 'dish_001/' is malformed"),
        ("/1.jpg", "key '/1.jpg' is malformed"),
        ("dish_001/../1.jpg", "is malformed"),
        ("dish_101/1.jpg", f"class 'dish_101' is unknown; .* in {CLASS_NAMES}"),
        ("", "is blank"),
    ],
)
def test_a_bad_line_in_a_list_of_images(root, name, line, complaint):
    edit(root / name, lambda lines: [*lines[:7], line, *lines[7:]])
    with pytest.raises(DataError, match=f"^{root / name}, line 8.*{complaint}"):
        load()


def test_a_verified_key_that_is_not_listed(root):
    """As published: one image has another class in the other list."""
    stranger = f"{NAMES[0]}/a49e.jpg"
    edit(root / CLEAN, lambda lines: [*lines[:9], f"{stranger}\t1", *lines[9:]])
    with pytest.warns(UserWarning) as caught:
        seen, _ = load()
    (report,) = [str(warning.message) for warning in caught]
    assert report == (
        f"1 of 121 keys in {root / CLEAN} are not in {root / NOISY}, first {stranger}; "
        "the run goes on without them"
    )
    assert Path(caught[0].filename) == Path(__file__)
    assert numbers(seen.clean_images) == list(VERIFIED[CLEAN])


@pytest.mark.parametrize(("name", "extra"), [(CLEAN, 2), (VAL, 1)])
def test_more_than_one_percent_of_such_keys_are_too_many(root, name, extra):
    strangers = [f"{NAMES[0]}/{k}.jpg\t0" for k in range(extra)]
    edit(root / name, lambda lines: [*lines, *strangers])
    total = len(VERIFIED[name]) + extra
    message = f"^{extra} of {total} keys in {root / name} are not in .*; more than 1% "
    with pytest.raises(DataError, match=message + ".* put lists of one release there"):
        load()


def test_a_key_with_two_verification_labels(root):
    edit(root / CLEAN, lambda lines: [*lines, lines[1]])
    load()  # said twice is no matter
    edit(root / CLEAN, lambda lines: [*lines, f"{key(101)}\t0"])
    line = f"{root / CLEAN}, line 123: {key(101)} has verification label 0 here and ano"
    with pytest.raises(DataError, match=f"^{line}"):
        load()


def test_a_list_without_a_right_label(root):
    edit(root / VAL, lambda lines: [line.replace("\t1", "\t0") for line in lines])
    with pytest.raises(
        DataError, match=f"^{root / VAL} marks no label as right; put the"
    ):
        load()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [(NOISY, "names no image"), (VAL, "marks no label"), (CLASS_NAMES, "has 0 names")],
)
def test_nothing_but_a_header(root, name, complaint):
    edit(root / name, lambda lines: lines[:1])
    with pytest.raises(DataError, match=f"^{root / name} {complaint}"):
        load()


@pytest.mark.parametrize("name", [*HEADERS, TEST])
def test_an_empty_list(root, name):
    (root / name).write_text("")
    with pytest.raises(DataError, match=f"^{root / name}, line 1 is blank"):
        load()


@pytest.mark.parametrize("last", [[], [NAMES[0]]])
def test_another_number_of_classes(root, last):
    edit(root / CLASS_NAMES, lambda lines: [*lines[:-1], *last])
    complaint = f"^{root / CLASS_NAMES} has 100 names, not 101; put the published"
    with pytest.raises(DataError, match=complaint):
        load()


# ---------------------------------------------------------------- whole runs

SPEC = {"dataset": "food101n", "noise": "crawled", "noise_rate": None}
SMALL = SPEC | {"profile": "smoke", "model": "resnet14"}


def test_a_whole_run(root, cpu, monkeypatch):
    monkeypatch.setitem(profiles.PIXELS, "resnet14", 8)
    record = experiments.run(Spec("cross-entropy", **SMALL), cpu)
    assert record["last_accuracy"] == record["history"]["test_accuracy"][-1]
    assert record["images"] == len(TRAIN)
    assert record["realised_rate"] is None
    assert experiments.is_current(record)


def test_as_many_clean_images_as_the_spec_allows(root, cpu):
    spec = Spec("clean-only", **SMALL, num_clean=20)
    seen, _ = experiments.data_for(spec, cpu)
    assert len(seen.clean_images) == len(seen.clean_labels) == 20
    assert seen.clean_labels.tolist() == labels(seen.clean_images)
    assert set(numbers(seen.clean_images)) < set(right(CLEAN))
    assert seen.images.size == 36  # for windows that move by 2 pixels
    given = experiments.given_val_labels(spec, cpu)
    assert given.tolist() == seen.val_labels.tolist()


@pytest.mark.parametrize("method", ["clean-net-hard", "clean-net-soft"])
def test_clean_net_is_shown_labels_that_were_found_wrong(root, cpu, method):
    every = len(VERIFIED[CLEAN])
    for asked in (20, every, 52_868):
        spec = Spec(method, **SMALL, num_clean=asked)
        seen, _ = experiments.data_for(spec, cpu)
        assert len(seen.clean_images) == min(asked, every)
        wrong = [not RIGHT(k) for k in numbers(seen.clean_images)]
        assert (seen.clean_labels == UNKNOWN).tolist() == wrong
        assert any(wrong)
        assert seen.clean_given_labels.tolist() == labels(seen.clean_images)


def test_clean_net_runs_and_tunes_on_right_labels(root, cpu, monkeypatch):
    monkeypatch.setitem(profiles.PIXELS, "resnet14", 8)
    tuned = []

    def train_on_clean_set(network, data, setup):
        tuned.append(numbers(data.clean_images))
        assert data.clean_labels.tolist() == labels(data.clean_images)
        yield from ()

    monkeypatch.setattr(clean_net, "train_on_clean_set", train_on_clean_set)
    settings = {"num_references": 2, "finetune": True}
    every = len(VERIFIED[CLEAN])
    record = experiments.run(
        Spec("clean-net-soft", **SMALL, num_clean=every, settings=settings), cpu
    )
    assert record["last_accuracy"] == record["history"]["test_accuracy"][-1]
    assert tuned == [right(CLEAN)]


def test_the_command_line_needs_no_name_for_the_noise(root, tmp_path, monkeypatch):
    monkeypatch.setitem(profiles.PIXELS, "resnet14", 8)
    path = tmp_path / "runs.jsonl"
    call = ["run", "--dataset", "food101n", "--model", "resnet14"]
    call += ["--profile", "smoke", "--device", "cpu", "--records", str(path)]
    assert main(call) == 0
    (record,) = records.read(path)
    assert record["spec"]["noise"] == "crawled"


def test_the_recipe():
    spec = Spec(**SPEC, profile="paper")
    recipe = spec.recipe
    assert spec.model == "resnet50"
    assert (recipe.epochs, recipe.batch_size, recipe.falls_after) == (30, 128, (10, 20))
    assert (recipe.optimiser, recipe.learning_rate, recipe.factor) == ("sgd", 0.01, 0.1)
    assert (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)
    assert (recipe.crop, recipe.flip) == (16, True)
    assert profiles.PIXELS["resnet50"] + 2 * recipe.crop == 256
    quick = Spec(**SPEC).recipe
    assert (quick.epochs, quick.falls_after, quick.limit) == (3, (1, 2), 5000)
    assert (quick.batch_size, quick.crop, quick.flip) == (128, 16, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"noise": "symmetric", "noise_rate": 0.2},
            "noise is 'symmetric' and dataset is 'food101n'; 'crawled' is the noise of "
            "clothing1m, food101n, folder, and they have no other",
        ),
        ({"dataset": "cifar10"}, "noise is 'crawled' and dataset is 'cifar10'"),
        ({"noise_rate": 0.4}, "come with their own rate"),
    ],
)
def test_its_noise_is_its_own(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Spec(**SPEC | change)
