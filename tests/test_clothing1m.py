"""Clothing1M: a small folder in its published layout, and damage of every kind."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nlhelpers import clothing1m, data, experiments, files, profiles, records, training
from nlhelpers.__main__ import main
from nlhelpers.clothing1m import CLASS_NAMES, CLEAN, GIVEN, NOISY, TEST, TRUE, VAL
from nlhelpers.data import UNKNOWN, DataError
from nlhelpers.files import ImageFiles
from nlhelpers.methods import METHODS
from nlhelpers.papers import xiao2015
from nlhelpers.specs import Spec
from nlhelpers.training import Recipe, Setup
from photographs import SIZE, copy, edit, write, write_image

ROWS_OF_XIAO = [method for method, *_ in xiao2015.ROWS.values()]

COUNTS = {NOISY: 132, CLEAN: 36, VAL: 16, TEST: 16}  # 200: two of them are 1 %
# By a key's number: its noisy label, and the one checked by hand.
GIVEN_LABEL, TRUE_LABEL = (lambda k: k % 14), (lambda k: (k // 2) % 14)


def key(k):
    return f"images/{k % 3}/{k * 977},{k}.jpg"


def number(name):
    """The number in a key."""
    return int(name.decode().rpartition(",")[2].removesuffix(".jpg"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """The set in its layout; the last six noisy images are in the clean set too.

    Every third clean or validation image never had a noisy label.
    """
    root = tmp_path_factory.mktemp("pristine") / "clothing1m"
    root.mkdir()
    numbers = iter(range(200))
    lists = {name: [next(numbers) for _ in range(COUNTS[name])] for name in COUNTS}
    lists[CLEAN][:6] = lists[NOISY][-6:]
    for name, listed in lists.items():
        write(root / name, map(key, listed))
    given = lists[NOISY] + [k for k in lists[CLEAN][6:] + lists[VAL] if k % 3]
    write(root / GIVEN, [f"{key(k)} {GIVEN_LABEL(k)}" for k in given])
    true = lists[CLEAN] + lists[VAL] + lists[TEST]
    write(root / TRUE, [f"{key(k)} {TRUE_LABEL(k)}" for k in true])
    write(root / CLASS_NAMES, [f"Class {k}" for k in range(14)])
    for k in range(200):
        write_image(root / key(k), k)
    return root


@pytest.fixture
def root(pristine, tmp_path, monkeypatch):
    """A copy in which any file may be changed, under the data root."""
    monkeypatch.setenv("NLHELPERS_DATA", str(tmp_path))
    root = tmp_path / "clothing1m"
    return copy(pristine, root)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """No workers: to start them takes longer than to read so few files."""
    monkeypatch.setattr(files, "cores", lambda: 0)


def load(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return clothing1m.load(generator, **{"size": SIZE} | options)


def numbers(images):
    return [number(name) for name in images.names]


def labels(images, label):
    return [label(k) for k in numbers(images)]


# ---------------------------------------------------------------- what is read


def test_the_protocol(pristine):
    seen, truth = load(root=pristine)
    assert seen.num_classes == 14
    assert numbers(seen.images) == list(range(132))
    assert numbers(seen.clean_images) == [*range(126, 132), *range(138, 168)]
    assert numbers(seen.val_images) == list(range(168, 184))
    assert numbers(truth.test_images) == list(range(184, 200))
    assert truth.index.tolist() == list(range(132))
    for images in (seen.images, seen.val_images, seen.clean_images, truth.test_images):
        assert isinstance(images, ImageFiles)
        assert images.shape == torch.Size((len(images), 3, SIZE, SIZE))


def test_every_label_is_that_of_its_key(pristine):
    seen, truth = load(root=pristine)
    assert seen.labels.tolist() == labels(seen.images, GIVEN_LABEL)
    assert seen.clean_labels.tolist() == labels(seen.clean_images, TRUE_LABEL)
    assert seen.val_labels.tolist() == labels(seen.val_images, TRUE_LABEL)
    assert truth.val_labels.tolist() == seen.val_labels.tolist()
    assert truth.test_labels.tolist() == labels(truth.test_images, TRUE_LABEL)
    for found in (vars(seen) | vars(truth)).values():
        assert not torch.is_tensor(found) or found.dtype == torch.int64


def test_the_order_of_a_table_does_not_matter(root):
    before, truth_before = load()
    for table in (GIVEN, TRUE):
        edit(root / table, lambda lines: lines[::-1])
    after, truth_after = load()
    assert before.labels.tolist() == after.labels.tolist()
    assert before.clean_given_labels.tolist() == after.clean_given_labels.tolist()
    assert truth_before.test_labels.tolist() == truth_after.test_labels.tolist()


def test_what_is_not_known_is_minus_one(pristine):
    seen, truth = load(root=pristine)
    expected = [-1] * 126 + [TRUE_LABEL(k) for k in range(126, 132)]
    assert truth.labels.tolist() == expected
    expected = [
        GIVEN_LABEL(k) if k % 3 or k < 132 else -1 for k in numbers(seen.clean_images)
    ]
    assert seen.clean_given_labels.tolist() == expected
    assert expected.count(-1) == 10


def test_images_are_those_of_their_keys(pristine):
    seen, truth = load(root=pristine, crop_to=10)
    for images in (seen.images, seen.clean_images, seen.val_images, truth.test_images):
        decoded = torch.cat(list(images.split(50)))
        assert decoded.shape[1:] == (3, 10, 10)
        red = decoded[:, 0].double().mean((1, 2))
        assert (red - torch.tensor(numbers(images))).abs().max() < 3


def test_class_names(pristine):
    assert clothing1m.class_names(pristine) == tuple(f"Class {k}" for k in range(14))


def test_it_lies_under_the_data_root(root):
    assert load()[0].images.root == data.data_root() / "clothing1m" == root


def test_lines_may_end_as_on_windows_and_keys_be_any_bytes(root):
    for path in root.glob("*.txt"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    odd = "images/0/a b é\udcff.jpg"
    (root / key(0)).rename(root / odd)
    for name in (NOISY, GIVEN):
        content = (root / name).read_bytes()
        odd_bytes = odd.encode(errors="surrogateescape")
        (root / name).write_bytes(content.replace(key(0).encode(), odd_bytes, 1))
    seen, _ = load()
    assert seen.images.names[0] == odd_bytes
    assert seen.labels[0] == GIVEN_LABEL(0)
    assert abs(float(seen.images[0][0].float().mean())) < 3


# ---------------------------------------------------------------- fewer images


def test_limit(pristine):
    seen, truth = load(root=pristine, limit=20)
    sizes = len(seen.labels), len(seen.clean_labels)
    assert sizes == (20, 20)
    assert (len(seen.val_labels), len(truth.test_labels)) == (16, 16)  # all there are
    drawn = numbers(seen.images)
    assert drawn == sorted(set(drawn)) != list(range(20))
    assert truth.index.tolist() == drawn
    assert seen.labels.tolist() == labels(seen.images, GIVEN_LABEL)
    assert seen.clean_labels.tolist() == labels(seen.clean_images, TRUE_LABEL)
    assert seen.val_labels.tolist() == labels(seen.val_images, TRUE_LABEL)


def test_limit_depends_on_the_generator_alone(pristine):
    def drawn(seed):
        return numbers(load(seed, root=pristine, limit=20)[0].images)

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_limit_of_nothing(pristine):
    with pytest.raises(ValueError, match="limit is 0; it must be 1 or more"):
        load(root=pristine, limit=0)


# ---------------------------------------------------------------- damaged images


def test_a_few_broken_images_are_left_out_with_one_report(root):
    (root / key(5)).unlink()
    (root / key(170)).write_bytes(b"")
    with pytest.warns(UserWarning) as caught:  # 2 of 200 are not more than 1 %
        seen, truth = load()
    (report,) = [str(warning.message) for warning in caught]
    assert report.startswith(f"2 of 200 images under {root} are missing or damaged")
    assert key(5) in report
    assert key(170) in report
    assert Path(caught[0].filename) == Path(__file__)
    assert numbers(seen.images) == [k for k in range(132) if k != 5]
    assert truth.index.tolist() == numbers(seen.images)
    assert seen.labels.tolist() == labels(seen.images, GIVEN_LABEL)
    assert 170 not in numbers(seen.val_images)
    assert seen.val_labels.tolist() == labels(seen.val_images, TRUE_LABEL)
    assert len(next(seen.images[:20].split(20))) == 20


def test_half_a_percent_goes_on_and_more_than_one_does_not(root):
    (root / key(150)).write_bytes(b"<!DOCTYPE html>")
    with pytest.warns(UserWarning, match=f"^1 of 200 images .* first {key(150)}; "):
        load()
    for k in (0, 190):
        (root / key(k)).unlink()
    with pytest.raises(DataError, match=r"3 of 200 images .*; more than 1% are too ma"):
        load()


def test_a_long_report_names_the_first_few(root):
    for k in range(100):
        (root / key(k)).unlink()
    with pytest.raises(DataError) as caught:
        load()
    message = str(caught.value)
    assert message.startswith("100 of 200 images")
    assert [k for k in range(100) if key(k) in message] == list(range(20))


def test_images_left_out_are_not_looked_at(root):
    used = set(numbers(load(limit=16)[0].images))
    (root / key(next(k for k in range(132) if k not in used))).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(limit=16)


def test_damage_behind_the_header_is_found_if_asked_for(root):
    path = root / key(60)
    pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    seen, _ = load()  # a header says nothing of it
    with pytest.raises(DataError, match=f"^{path} is damaged"):
        list(seen.images.split(200))
    with pytest.warns(UserWarning, match="1 of 200 images"):
        seen, _ = load(thorough=True)
    assert 60 not in numbers(seen.images)


# ---------------------------------------------------------------- bad lists


def test_a_missing_set(tmp_path):
    missing = tmp_path / "elsewhere"
    with pytest.raises(DataError) as caught:
        load(root=missing)
    message = str(caught.value)
    assert message.startswith(f"{missing} is missing; ask the authors")
    for hint in (clothing1m.SOURCE, "images/", "key lists", "NLHELPERS_DATA"):
        assert hint in message


def test_missing_parts_are_named_together(root):
    for name in (VAL, GIVEN, CLASS_NAMES):
        (root / name).unlink()
    (root / "images").rename(root / "pictures")
    lacking = f"{root} lacks {VAL}, {GIVEN}, {CLASS_NAMES}, images/; ask the authors"
    with pytest.raises(DataError, match=f"^{lacking}"):
        load()


@pytest.mark.parametrize("name", [NOISY, CLEAN, VAL, TEST, GIVEN, TRUE, CLASS_NAMES])
def test_each_list_is_needed(root, name):
    (root / name).unlink()
    with pytest.raises(DataError, match=f"^{root} lacks {name}; "):
        load()


@pytest.mark.parametrize("table", [GIVEN, TRUE])
@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("images/0/1,2.jpg", "it must be a path and a label"),
        ("5", "it must be a path and a label"),
        ("images/0/1,2.jpg five", "it must be a path and a label"),
        ("images/0/1,2.jpg 5.0", "it must be a path and a label"),
        ("", "is blank"),
        ("images/0/1,2.jpg 14", "label 14 is out of range; it must be 0 to 13"),
        ("images/0/1,2.jpg -1", "label -1 is out of range; it must be 0 to 13"),
    ],
)
def test_a_bad_line_in_a_table(root, table, line, complaint):
    edit(root / table, lambda lines: [*lines[:7], line, *lines[7:]])
    with pytest.raises(DataError, match=f"^{root / table}, line 8.*{complaint}"):
        load()


def test_a_key_with_two_labels(root):
    edit(root / TRUE, lambda lines: [*lines, lines[0]])
    load()  # said twice is no matter
    edit(root / TRUE, lambda lines: [*lines, f"{key(126)} 13"])
    line = f"{root / TRUE}, line 70: {key(126)} has label 13 here and 7 further up"
    with pytest.raises(DataError, match=f"^{line}"):
        load()


@pytest.mark.parametrize("name", [NOISY, CLEAN, VAL, TEST])
def test_a_key_without_a_label(root, name):
    edit(root / name, lambda lines: [*lines[:3], "images/0/9,9.jpg", *lines[3:]])
    table = clothing1m.TABLES[name]
    complaint = f"{root / name} has 1 keys without a label in {root / table}, first "
    with pytest.raises(DataError, match=f"^{complaint}images/0/9,9.jpg; "):
        load()


@pytest.mark.parametrize(
    ("one", "other"), [(CLEAN, VAL), (CLEAN, TEST), (VAL, TEST), (NOISY, TEST)]
)
def test_a_key_in_two_lists(root, one, other):
    shared = (root / other).read_text().splitlines()[-1]
    edit(root / one, lambda lines: [*lines, shared])
    edit(root / GIVEN, lambda lines: [*lines, f"{shared} 3"])
    complaint = f"{root / one} and {root / other} share 1 keys, one is {shared}; "
    with pytest.raises(DataError, match=f"^{complaint}"):
        load()


@pytest.mark.parametrize("name", [NOISY, CLASS_NAMES])
def test_a_blank_line_in_a_list(root, name):
    edit(root / name, lambda lines: [*lines[:4], " ", *lines[5:]])
    with pytest.raises(DataError, match=f"^{root / name}, line 5 is blank"):
        load()


@pytest.mark.parametrize("name", [NOISY, VAL, GIVEN, CLASS_NAMES])
def test_an_empty_list(root, name):
    (root / name).write_text("")
    with pytest.raises(DataError, match=f"^{root / name}, line 1 is blank"):
        load()


def test_another_number_of_classes(root):
    edit(root / CLASS_NAMES, lambda lines: lines[:-1])
    with pytest.raises(DataError, match=f"^{root / CLASS_NAMES} has 13 names, not 14"):
        load()


# ---------------------------------------------------------------- a method runs on it


def test_a_method_trains_on_it(pristine, seeded, cpu):
    seen, truth = load(root=pristine, crop_to=12)
    seen, truth = seen.to(cpu), truth.to(cpu)
    recipe = Recipe(2, 32, "sgd", learning_rate=0.01, crop=2, flip=True)
    setup = Setup("resnet14", recipe, seeded)
    *_, last = METHODS["cross-entropy"].run(seen, setup)
    assert last.number == 2
    expected = training.accuracy(last.model, seen.val_images, seen.val_labels)
    assert last.val_accuracy == pytest.approx(expected)
    probs = training.predict(last.model, truth.test_images)
    assert probs.shape == (16, 14)


# ---------------------------------------------------------------- whole runs

SPEC = {"dataset": "clothing1m", "noise": "crawled", "noise_rate": None}
SMALL = SPEC | {"profile": "smoke", "model": "resnet14"}


@pytest.mark.parametrize("method", ["cross-entropy", *ROWS_OF_XIAO])
def test_every_row_of_the_table_runs(method, root, cpu, monkeypatch):
    monkeypatch.setitem(profiles.PIXELS, "resnet14", 8)
    few = {} if method == "cross-entropy" else {"num_clean": 34}
    record = experiments.run(Spec(method, **SMALL, **few), cpu)
    assert record["last_accuracy"] == record["history"]["test_accuracy"][-1]
    assert record["images"] == 132
    # Six noisy images were checked by hand.
    wrong = [GIVEN_LABEL(k) != TRUE_LABEL(k) for k in range(126, 132)]
    assert record["realised_rate"] == pytest.approx(sum(wrong) / 6)
    assert experiments.is_current(record)


def test_as_many_clean_images_as_the_spec_allows(root, cpu):
    spec = Spec("clean-only", **SMALL, num_clean=20)
    seen, _ = experiments.data_for(spec, cpu)
    assert len(seen.clean_images) == len(seen.clean_labels) == 20
    assert seen.clean_labels.tolist() == labels(seen.clean_images, TRUE_LABEL)
    assert seen.images.shape == (132, 3, 32, 32)
    assert seen.images.size == 36  # for windows that move by 2 pixels


def test_the_command_line_needs_no_name_for_the_noise(root, tmp_path, monkeypatch):
    monkeypatch.setitem(profiles.PIXELS, "resnet14", 8)
    path = tmp_path / "runs.jsonl"
    call = ["run", "--dataset", "clothing1m", "--model", "resnet14"]
    call += ["--method", "noise-model", "--num-clean", "34", "--profile", "smoke"]
    assert main([*call, "--device", "cpu", "--records", str(path)]) == 0
    (record,) = records.read(path)
    assert record["spec"]["noise"] == "crawled"


def test_the_chapter_runs_on_it(root, papermill):
    """The one line of whoever owns the data, with a small network in few epochs."""
    chapter = Path(__file__).parent.parent / "notebooks" / "noise_model.ipynb"
    values = {"dataset": "clothing1m", "noise": "crawled", "noise_rate": "None"}
    values |= {"num_clean": "34", "model": "caffe-quick"}
    options = [w for name, value in values.items() for w in ("-p", name, value)]
    done = papermill(chapter, *options, "-y", "{methods: [noise-model]}")
    assert done.returncode == 0, done.stderr[-3000:]


def test_labels_as_they_were_given_before_the_check(root, cpu):
    spec = Spec("clean-only", **SMALL, num_clean=34)
    seen, _ = experiments.data_for(spec, cpu)
    expected = [GIVEN_LABEL(k) if k % 3 else UNKNOWN for k in numbers(seen.val_images)]
    assert experiments.given_val_labels(spec, cpu).tolist() == expected
    assert seen.val_labels.tolist() == labels(seen.val_images, TRUE_LABEL)
    assert experiments.class_names("clothing1m")[3] == "Class 3"


def test_as_published_for_its_network():
    recipe = Spec("noise-model", **SPEC, profile="paper", num_clean=47_570).recipe
    assert (recipe.batch_size, recipe.learning_rate, recipe.factor) == (256, 1e-3, 0.1)
    assert (recipe.crop, recipe.flip) == (16, True)
    assert profiles.PIXELS["alexnet"] + 2 * recipe.crop == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": "symmetric", "noise_rate": 0.2}, "'crawled' is the noise of"),
        ({"dataset": "digits"}, "'crawled' is the noise of clothing1m"),
        ({"noise_rate": 0.4}, "come with their own rate"),
    ],
)
def test_its_noise_is_its_own(change, message):
    with pytest.raises(ValueError, match=message):
        Spec(**SPEC | change)
