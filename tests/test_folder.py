"""A folder of folders: what is read, divided and passed over, and runs on it."""

import re
import shutil
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from nlhelpers import batches, experiments, files, folder, grids, records
from nlhelpers.__main__ import main
from nlhelpers.data import UNKNOWN, DataError
from nlhelpers.profiles import PROFILES
from nlhelpers.specs import Spec
from photographs import copy, write_image

SIZE = 16
RERUN = Path(__file__).parents[1] / "book" / "rerun.md"
CLASSES = {"cat": range(60), "dog": range(60, 90), "eel": range(90, 120)}
SPEC = {"dataset": "folder", "noise": "crawled", "noise_rate": None}


def path(k):
    (name,) = (name for name, own in CLASSES.items() if k in own)
    deep = "deep/er/" if k % 7 == 0 else ""
    return f"{name}/{deep}{k:03}.{('png', 'JPG', 'webp')[k % 3]}"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine") / "folder"
    for own in CLASSES.values():
        for k in own:
            write_image(root / path(k), k)
    (root / "cat" / "notes.txt").write_text("these are cats")
    (root / "readme.md").write_text("no class")
    return root


@pytest.fixture
def root(pristine, tmp_path, monkeypatch):
    """A copy in which any file may be changed, under the data root."""
    monkeypatch.setenv("NLHELPERS_DATA", str(tmp_path / "data"))
    return copy(pristine, tmp_path / "data" / "folder")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(files, "cores", lambda: 0)


def load(seed=0, **options):
    return folder.load(torch.Generator().manual_seed(seed), **{"size": SIZE} | options)


def numbers(images):
    return [int(name.decode().rpartition("/")[2][:3]) for name in images.names]


def test_every_image_is_in_one_part_with_the_label_of_its_folder(pristine):
    seen, truth = load(root=pristine)
    assert folder.class_names(pristine) == ("cat", "dog", "eel")
    assert seen.num_classes == 3
    parts = (
        (seen.images, seen.labels),
        (seen.val_images, seen.val_labels),
        (truth.test_images, truth.test_labels),
    )
    assert [len(labels) for _, labels in parts] == [96, 12, 12]
    assert sorted(k for images, _ in parts for k in numbers(images)) == list(range(120))
    for images, labels in parts:
        expected = [int(k >= 60) + int(k >= 90) for k in numbers(images)]
        assert labels.tolist() == expected
        red = torch.cat(list(images.split(50)))[:, 0].double().mean((1, 2))
        assert (red - torch.tensor(numbers(images))).abs().max() < 4
    assert len(seen.clean_images) == len(seen.clean_labels) == 0


def test_nobody_knows_the_truth(pristine):
    seen, truth = load(root=pristine)
    assert truth.labels.tolist() == [UNKNOWN] * 96
    assert truth.val_labels.tolist() == [UNKNOWN] * 12
    checked, _ = load(root=pristine, clean_val=True)
    assert checked.val_labels.tolist() == seen.val_labels.tolist()


def test_index_counts_in_the_order_of_the_paths(pristine):
    seen, truth = load(root=pristine)
    every = sorted(path(k) for k in range(120))
    named = [name.decode() for name in seen.images.names]
    assert [every[k] for k in truth.index] == named


def test_the_division_depends_on_the_generator_alone(pristine):
    drawn = [numbers(load(seed, root=pristine)[0].images) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_class_keeps_its_share(tmp_path):
    """Of n images of a class at most a tenth, rounded up, are in one held-out part."""
    sizes = {"a": 5, "b": 7, "c": 1, "d": 23, "e": 6}
    for name, count in sizes.items():
        for k in range(count):
            write_image(tmp_path / name / f"{k}.png", k)
    drawn = set()
    for seed in range(20):
        seen, truth = load(seed, root=tmp_path)
        held = [x.bincount(minlength=5) for x in (seen.val_labels, truth.test_labels)]
        most = torch.tensor([-(-count // 10) for count in sizes.values()])
        assert all((part <= most).all() for part in held)
        assert [part.sum() for part in held] == [5, 4]
        assert seen.labels.bincount()[[0, 1, 4]].min() >= 4
        assert seen.labels.tolist() != sorted(seen.labels.tolist())
        drawn.add(tuple(seen.val_images.names))
    assert len(drawn) > 10


def test_pictures_that_fit_in_memory_are_decoded_once(root, cpu, monkeypatch):
    spec = Spec("cross-entropy", **SPEC, profile="smoke", model="caffe-quick")
    decoded = []
    decode = files.decode
    monkeypatch.setattr(files, "decode", lambda *g: decoded.append(g) or decode(*g))
    kept = experiments.run(spec, cpu)
    assert len(decoded) == 120
    monkeypatch.setattr(folder, "KEPT", 0)
    again = experiments.run(spec, cpu)
    assert len(decoded) > 3 * 120
    assert kept["history"]["loss"] == again["history"]["loss"]
    assert kept["history"]["test_accuracy"] == again["history"]["test_accuracy"]


def test_limit(pristine):
    seen, truth = load(root=pristine, limit=50)
    sizes = len(seen.labels), len(seen.val_labels), len(truth.test_labels)
    assert sizes == (40, 5, 5)
    with pytest.raises(ValueError, match="limit is 0"):
        load(root=pristine, limit=0)


def test_a_damaged_image_is_left_out_with_a_report(root):
    (root / path(5)).write_bytes(b"")
    with pytest.warns(UserWarning, match="^1 of 120 images .* missing or damaged"):
        seen, truth = load()
    parts = (seen.images, seen.val_images, truth.test_images)
    assert sorted(k for part in parts for k in numbers(part)) == sorted(
        set(range(120)) - {5}
    )
    (root / path(6)).write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"2 of 120 images .* more than 1% are"):
        load()


def test_the_first_damaged_image_is_explained(root):
    for k in range(3):
        grey = Image.fromarray(torch.full((20, 20), 60_000).numpy().astype("uint16"))
        grey.save(root / path(3 * k))
    with pytest.raises(DataError, match=r"3 of 120 .* has more than 8 bits a pixel"):
        load()


def test_pictures_that_are_not_read_are_counted(root):
    for name in ("cat/1.HEIC", "dog/2.heic", "dog/3.svg", "dog/list.csv"):
        (root / name).write_bytes(b"something")
    with pytest.warns(
        UserWarning, match=r"is not read: 1 \.HEIC, 1 \.heic, 1 \.svg; co"
    ):
        load()


def test_a_picture_that_is_cut_off_is_left_out_too(root):
    file = root / path(5)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="^1 of 120 images .* missing or damaged"):
        load()


def test_what_systems_leave_behind_does_not_count(root):
    before = folder.fingerprint(), len(load()[0].labels)
    for name in (".DS_Store", "cat/._a.jpg", ".trash/a.png", "cat/.thumbs/a.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"no picture")
    with warnings.catch_warnings(action="error"):
        assert (folder.fingerprint(), len(load()[0].labels)) == before
    assert folder.class_names() == ("cat", "dog", "eel")


def test_nothing_is_said_of_other_files(pristine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(root=pristine)


# ---------------------------------------------------------------- bad folders


def test_a_missing_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NLHELPERS_DATA", str(tmp_path))
    message = f"^{tmp_path}/folder is missing; put one folder of images there for each"
    for read in (folder.class_names, load):
        with pytest.raises(DataError, match=message + ".* or set NLHELPERS_DATA"):
            read()


@pytest.mark.parametrize("names", [[], ["cat"]])
def test_too_few_classes(tmp_path, names):
    for name in names:
        write_image(tmp_path / name / "1.png", 1)
    (tmp_path / "dog.png").write_bytes(b"")  # a file is no class
    with pytest.raises(
        DataError, match=f"has {len(names)} folders and needs two or more"
    ):
        load(root=tmp_path)


def test_a_class_without_an_image(root):
    (root / "frog").mkdir()
    (root / "frog" / "list.csv").write_text("")
    with pytest.raises(DataError, match=f"^{root}/frog has no image; put some there"):
        load()


def test_too_many_damaged_images(root):
    for path in [*root.rglob("*.png")][:3]:
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"3 of 120 .* are too many: repair or remove"):
        load()


def test_every_kind_of_file_that_is_listed_can_be_read(root):
    for suffix in folder.EXTENSIONS:
        Image.new("RGB", (40, 40)).save(root / "cat" / f"999{suffix}")
    with warnings.catch_warnings(action="error"):
        load(thorough=True)


def test_too_few_images(tmp_path):
    for k in range(4):
        write_image(tmp_path / "ab"[k % 2] / f"{k}.png", k)
    with pytest.raises(DataError, match="has 4 images that can be used; put ten or m"):
        load(root=tmp_path)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", ["cross-entropy", "two-stage"])
def test_a_whole_run(root, cpu, method):
    spec = Spec(method, **SPEC, profile="smoke", model="mlp")
    record = experiments.run(spec, cpu)
    assert record["images"] == 96
    assert record["realised_rate"] is None  # nobody knows it
    assert record["screening"] is None
    assert record["last_accuracy"] == record["history"]["test_accuracy"][-1]
    assert experiments.is_current(record)


def test_what_reads_the_files_is_part_of_the_source(root, monkeypatch):
    readers = [
        kind.dispatch(files.ImageFiles) for kind in (batches.loader, batches.joined)
    ]
    assert set(experiments.OF_FILES) == set(readers)
    specs = Spec(**SPEC, profile="smoke"), Spec("cross-entropy", noise_rate=0.2)
    before = list(map(experiments.source, specs))
    monkeypatch.setattr(experiments, "OF_FILES", readers[:1])
    after = list(map(experiments.source, specs))
    assert before[0] != after[0]
    assert before[1] == after[1]  # its images are no files


def test_a_folder_that_changes_during_a_run(root, cpu):
    def add(event):
        (root / "cat" / "later.txt").write_text("one more")

    spec = Spec(**SPEC, profile="smoke", model="mlp")
    record = experiments.run(spec, cpu, progress=add)
    assert not experiments.is_current(record)
    (root / "cat" / "later.txt").unlink()
    assert experiments.is_current(record)


def test_an_image_that_a_link_leads_to_counts(root, tmp_path):
    shutil.move(root / "cat", tmp_path / "elsewhere")
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    before = folder.fingerprint(root)
    (tmp_path / "elsewhere" / "more.txt").touch()
    assert folder.fingerprint(root) != before


def test_labels_of_a_table_as_the_book_lays_them_out(pristine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(pristine, tmp_path / "images")  # whatever folders they are in
    labels = {path(k): ("01", "None")[k % 2] for own in CLASSES.values() for k in own}
    table = pd.DataFrame({"note": "", "image": labels.keys(), "label": labels.values()})
    table.to_csv("labels.csv", index=False)
    (lines,) = re.findall(r"```python\n(.*?labels\.csv.*?)```", RERUN.read_text(), re.S)
    exec(lines, {})
    assert folder.class_names(Path("photos/folder")) == ("01", "None")
    data, _ = load(root=Path("photos/folder"))
    assert [k % 2 for k in numbers(data.images)] == data.labels.tolist()
    assert folder.fingerprint(Path("images")) == folder.fingerprint(pristine)


def test_the_command_line(root, tmp_path):
    path = tmp_path / "runs.jsonl"
    call = ["run", "--dataset", "folder", "--model", "mlp", "--profile", "smoke"]
    assert main([*call, "--device", "cpu", "--records", str(path)]) == 0
    (record,) = records.read(path)
    assert record["spec"]["noise"] == "crawled"


def test_the_recipe_leaves_no_image_out():
    quick, paper = (Spec(**SPEC, profile=profile).recipe for profile in PROFILES[1:])
    assert (quick.epochs, quick.batch_size, quick.limit) == (20, 32, None)
    assert (paper.epochs, paper.batch_size, paper.limit) == (120, 32, None)
    assert not quick.flip and not quick.crop  # nobody knows whether they may be


def test_a_network_for_photographs_is_tuned_gently():
    recipe = Spec(**SPEC, profile="paper", model="resnet50").recipe
    assert (recipe.learning_rate, recipe.batch_size, recipe.epochs) == (0.01, 32, 30)
    assert (recipe.crop, recipe.flip, recipe.limit) == (16, True, None)
    assert Spec(**SPEC, model="resnet50").recipe.epochs == 20


def test_files_that_are_there_twice(root):
    shutil.copy(root / path(3), root / "eel" / "again.png")
    shutil.copy(root / path(3), root / "cat" / "AGAIN.png")
    other = bytearray((root / path(5)).read_bytes())
    other[-1] ^= 1  # as long, but another file
    (root / "dog" / "other.webp").write_bytes(other)
    images = files.ImageFiles(root, ["dog/other.webp", *map(path, range(10))], SIZE)
    assert folder.duplicates(images) == []
    again = files.ImageFiles(root, ["eel/again.png", "cat/AGAIN.png"], SIZE)
    found = folder.duplicates(torch.cat([again, images]))
    assert found == [["cat/003.png", "cat/AGAIN.png", "eel/again.png"]]


def test_there_is_no_clean_set():
    with pytest.raises(ValueError, match="num_clean is 20, but nobody has checked the"):
        Spec("clean-only", **SPEC, num_clean=20)


def test_runs_of_other_images_are_other_runs(root, cpu, tmp_path):
    spec = Spec(**SPEC, profile="smoke", model="mlp")
    (record,) = grids.run_all([spec], tmp_path / "runs.jsonl", cpu)
    assert experiments.is_current(record)
    moved = next((root / "cat").glob("*.JPG"))
    moved.rename(root / "dog" / moved.name)
    assert not experiments.is_current(record)
    assert grids.recorded(tmp_path / "runs.jsonl") == {}
    (root / "dog" / moved.name).rename(moved)
    assert experiments.is_current(record)
    moved.write_bytes(moved.read_bytes() + b" ")
    assert not experiments.is_current(record)
    shutil.rmtree(root)
    assert not experiments.is_current(record)
