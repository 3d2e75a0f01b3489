"""Images in files: decoding, order, augmentation, workers, damage and memory."""

import gc
import multiprocessing
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as F

from nlhelpers import batches, data, files, losses, models, training
from nlhelpers.data import DataError
from nlhelpers.files import ImageFiles
from nlhelpers.training import Recipe, Setup

COUNT, SIZE = 22, 32


def picture(k, width=SIZE, height=SIZE):
    """A smooth picture that no other `k` has."""
    rng = np.random.default_rng(k)
    coarse = rng.integers(256, size=(5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of square JPEGs, of the size they are decoded to."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "0").mkdir()
    for k in range(COUNT):
        picture(k).save(root / f"0/{k},é.jpg", quality=95)
    return root


@pytest.fixture(params=["read", "kept"])
def images(root, request):
    """The files, decoded in this process, when they are needed or at once."""
    names = [f"0/{k},é.jpg" for k in range(COUNT)]
    images = ImageFiles(root, names, SIZE, workers=0)
    return images.kept() if request.param == "kept" else images


of_reading = pytest.mark.parametrize("images", ["read"], indirect=True)


@pytest.fixture
def whole(root):
    """The same as a tensor, read by PIL."""
    arrays = [np.array(Image.open(root / f"0/{k},é.jpg")) for k in range(COUNT)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


@pytest.fixture
def small_pieces(monkeypatch):
    """Few images make a worker's answer, so that a small set has many of them."""
    monkeypatch.setattr(files, "PIECE", 3)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


# ---------------------------------------------------------------- in place of a tensor


def test_it_looks_like_a_tensor_of_images(images, cpu):
    assert len(images) == COUNT
    assert images.shape == torch.Size((COUNT, 3, SIZE, SIZE))
    assert images.shape[1:].numel() == 3 * SIZE * SIZE
    assert images.ndim == 4
    assert images.dtype == torch.uint8
    assert images.device == cpu
    moved = images.to("meta", memory_format=torch.channels_last)
    assert moved.device == torch.device("meta")
    assert images.device == cpu
    assert replace(images, crop_to=20).shape == torch.Size((COUNT, 3, 20, 20))


def test_a_bundle_of_data_moves_it(images):
    labels = torch.zeros(COUNT, dtype=torch.int64)
    truth = data.Truth(labels, labels, images, labels, labels).to("meta")
    assert truth.test_images.device == truth.labels.device == torch.device("meta")


def test_it_is_pickled_whole(images, whole):
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(next(again.split(COUNT)), whole)


@pytest.mark.parametrize(("size", "crop_to"), [(0, None), (32, 33), (32, 0), (32, -1)])
def test_sizes_that_make_no_picture(root, size, crop_to):
    with pytest.raises(ValueError, match=f"size is {size} and crop_to is .*<= size"):
        ImageFiles(root, [], size, crop_to)


@pytest.mark.parametrize("size", [1, 5, 22, 100])
@pytest.mark.usefixtures("small_pieces")
def test_split_gives_all_images_in_order(images, whole, size):
    found, expected = list(images.split(size)), whole.split(size)
    assert [len(part) for part in found] == [len(part) for part in expected]
    for part, right in zip(found, expected, strict=True):
        assert part.dtype == torch.uint8
        assert part.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(part, right)


@pytest.mark.usefixtures("small_pieces")
def test_split_is_the_same_with_workers(images, whole):
    found = torch.cat(list(replace(images, workers=2).split(5)))
    assert torch.equal(found, whole)


@pytest.mark.usefixtures("small_pieces")
def test_a_daemon_reads_by_itself(images, whole, monkeypatch):
    config = multiprocessing.current_process()._config
    monkeypatch.setitem(config, "daemon", True)
    with pytest.raises(AssertionError, match="daemonic processes are not allowed"):
        multiprocessing.Process().start()
    found = torch.cat(list(replace(images, workers=2).split(5)))
    assert torch.equal(found, whole)


def test_subsets(images, whole):
    order = torch.tensor([7, 2, 2, -1])
    mask = torch.arange(COUNT) % 3 == 1
    for index in (order, mask, slice(2, 9), slice(None, None, -4), torch.arange(0)):
        subset = images[index]
        assert isinstance(subset, ImageFiles)
        found = torch.cat(list(subset.split(4)))
        expected = whole[list(range(COUNT))[index]] if type(index) is slice else None
        assert torch.equal(found, whole[index] if expected is None else expected)
        assert subset.shape == found.shape
    subset = replace(images, crop_to=20, workers=1)[order][mask[:4]]
    assert (subset.crop_to, subset.workers) == (20, 1)


def test_one_image(images, whole):
    for index in (3, -1, torch.tensor(5)):
        assert torch.equal(images[index], whole[index])
    with pytest.raises(IndexError):
        images[COUNT]


def test_torch_joins_files_and_does_nothing_else_with_them(images, whole):
    both = torch.cat([images[5:9], images[:3]])
    assert torch.equal(next(both.split(100)), torch.cat([whole[5:9], whole[:3]]))
    with pytest.raises(TypeError, match=r"[Nn]o implementation|Multiple dispatch"):
        torch.stack([images, images])


def test_joined(images, whole):
    both = batches.joined(images[5:9], images[:3])
    assert torch.equal(next(both.split(100)), torch.cat([whole[5:9], whole[:3]]))
    longer = ImageFiles(images.root, ["a much longer name.jpg"], SIZE)
    names = batches.joined(images[:1], longer).names
    assert names.tolist() == [*images.names[:1], b"a much longer name.jpg"]
    with pytest.raises(ValueError, match="crop_to is 32 in one set and 20 in the"):
        batches.joined(images, replace(images, crop_to=20))


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("width", "height", "most"),
    # The last one's centre lies half a pixel off, wherever one rounds.
    [(50, 32, 1), (32, 50, 1), (64, 96, 1), (96, 64, 1), (16, 24, 1), (47, 91, 5)],
)
def test_the_shorter_side_is_scaled_and_the_centre_cut_out(
    tmp_path, width, height, most
):
    original = picture(1, width, height)
    path = save(tmp_path / "a.png", original)
    assert distance(files.decode(path, SIZE), original) < most


def test_a_large_jpeg_is_decoded_smaller(tmp_path):
    original = picture(1, 400, 300)
    path = save(tmp_path / "a.jpg", original, quality=95)
    assert distance(files.decode(path, SIZE), original) < 2


def distance(found, original):
    """Mean difference to what torchvision makes of a picture."""
    expected = np.asarray(F.center_crop(F.resize(original, SIZE), SIZE))
    assert found.shape == expected.shape
    return np.abs(found - expected.astype(float)).mean()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("P", "gif")],
)
def test_any_kind_of_picture_has_three_channels(tmp_path, mode, kind):
    original = picture(1).convert(mode)
    # The name of a file need not say what is in it.
    path = save(tmp_path / "a.jpg", original, format=Image.EXTENSION[f".{kind}"])
    (found,) = next(ImageFiles(tmp_path, [path.name], SIZE).split(1))
    expected = np.asarray(original.convert("RGB")).astype(float)
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).mean() < 8


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """A black line on nothing, as drawings are stored: below nothing it is black."""
    drawing = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (0, 8, SIZE, 24))
    save(tmp_path / "a.png", drawing.convert(mode))
    (found,) = ImageFiles(tmp_path, ["a.png"], SIZE).split(1)
    expected = torch.full((SIZE,), 255)
    expected[8:24] = 0
    assert (found[0] == expected[:, None]).all()


def test_few_are_given_at_once(images, whole, monkeypatch):
    monkeypatch.setattr(files, "MOST", 7)
    found = list(images.split(100))
    assert max(map(len, found)) == 7
    assert torch.equal(torch.cat(found), whole)


def test_predictions_see_the_centre(images, whole):
    found = next(replace(images, crop_to=20).split(COUNT))
    assert torch.equal(found, whole[:, :, 6:26, 6:26])
    assert torch.equal(replace(images, crop_to=20)[4], whole[4, :, 6:26, 6:26])


# ---------------------------------------------------------------- loading


def epoch():
    return torch.arange(COUNT).flip(0).split(8)


def drawn(images, crop, flip, *, seed=0, views=1):
    generator = torch.Generator().manual_seed(seed)
    return list(batches.loader(images, crop, flip, generator, views)(iter(epoch())))


@pytest.mark.parametrize(
    ("crop", "flip"), [(0, False), (3, False), (0, True), (3, True)]
)
@pytest.mark.usefixtures("small_pieces")
def test_batches_are_those_of_a_tensor(images, whole, crop, flip):
    found = drawn(images, crop, flip, views=2)
    expected = drawn(whole, crop, flip, views=2)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
        assert ours[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("small_pieces")
def test_workers_do_not_change_what_is_drawn(images):
    images = replace(images, crop_to=24)
    alone = drawn(images, 5, True, views=2)
    helped = drawn(replace(images, workers=2), 5, True, views=2)
    for one, other in zip(alone, helped, strict=True):
        assert all(map(torch.equal, one, other))
    assert not torch.equal(alone[0][1], alone[0][2])
    assert not torch.equal(alone[0][1], drawn(images, 5, True, seed=1)[0][1])


def test_batches_that_draw_too_do_not_change_what_is_drawn(images):
    """As a batch may be drawn from the same generator, all are drawn first."""

    def bits(workers):
        generator = torch.Generator().manual_seed(0)
        index = (batches.repeated(COUNT, 4, generator) for _ in range(5))
        load = batches.loader(replace(images, workers=workers), 2, True, generator, 1)
        return [torch.cat([k, view.flatten()]) for k, view in load(index)]

    assert all(map(torch.equal, bits(0), bits(2)))


def windows(original, side, crop):
    """Every window of `side` that moves by up to `crop` from the centre, by offset."""
    border = max(0, crop - (original.shape[-1] - side) // 2)
    pad = [(0, 0), (border, border), (border, border)]
    mirrored = np.pad(original.numpy(), pad, mode="reflect")
    start = (mirrored.shape[-1] - side) // 2 - crop
    return {
        mirrored[:, down : down + side, right : right + side].tobytes(): (
            down - start - crop,
            right - start - crop,
        )
        for down in range(start, start + 2 * crop + 1)
        for right in range(start, start + 2 * crop + 1)
    }


@pytest.mark.parametrize("crop", [0, 1, 2, 4])
def test_the_window_moves_over_the_picture_and_then_its_border(images, whole, crop):
    # 32 pixels less 28: the window moves by 2 before it leaves the picture.
    images, places = replace(images, crop_to=28), windows(whole[3], 28, crop)
    generator = torch.Generator().manual_seed(0)
    load = batches.loader(images, crop, False, generator, 30 * (2 * crop + 1))
    ((_, *views),) = load([torch.full((2 * crop + 1,), 3)])
    seen = {places[view.contiguous().numpy().tobytes()] for view in torch.cat(views)}
    shifts = range(-crop, crop + 1)
    assert seen == {(down, right) for down in shifts for right in shifts}


def test_processes_share_a_batch(images, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts = drawn(images, 0, False)
        seen.append([index.tolist() for index, _ in parts])
        for index, view in parts:
            assert torch.equal(view, torch.stack([images[int(k)] for k in index]))
    for batch, *halves in zip(epoch(), *seen, strict=True):
        assert [batch[::2].tolist(), batch[1::2].tolist()] == halves


def test_processes_share_the_cores(monkeypatch):
    alone = files.cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert files.cores() == max(1, alone // 2)


def test_nothing_is_drawn_from_torch_itself(images):
    before = torch.get_rng_state()
    drawn(images, 2, True)
    list(images.split(5))
    assert torch.equal(torch.get_rng_state(), before)


@of_reading
@pytest.mark.usefixtures("small_pieces")
def test_workers_end_with_whoever_takes_the_images(images):
    stream = replace(images, workers=2).split(3)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------- damage


def damage(path, how):
    content = path.read_bytes()
    match how:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "header only":
            path.write_bytes(content[:3])
        case "empty":
            path.write_bytes(b"")
        case "a web page":
            path.write_bytes(b"<!DOCTYPE html><html>404</html>")
        case "a program":
            path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        case "a folder":
            path.unlink()
            path.mkdir()


DAMAGES = [
    "missing",
    "truncated",
    "header only",
    "empty",
    "a web page",
    "a program",
    "a folder",
]


@pytest.fixture
def broken(tmp_path):
    """Seven files, of which the fourth waits to be damaged; and its path."""
    for k in range(7):
        save(tmp_path / f"{k}.jpg", picture(k))
    names = [f"{k}.jpg" for k in range(7)]
    return ImageFiles(tmp_path, names, SIZE, workers=0), tmp_path / "3.jpg"


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_named(broken, generator, how):
    images, path = broken
    damage(path, how)
    complaint = "is missing" if how == "missing" else "is damaged or not a picture"
    with pytest.raises(DataError, match=f"^{path} {complaint}"):
        list(images.split(7))
    with pytest.raises(DataError, match=f"^{path} {complaint}"):
        list(batches.loader(images, 2, True, generator, 1)([torch.arange(7)]))
    with pytest.raises(DataError, match=f"^{path} {complaint}"):
        images[3]
    assert images[4].shape == (3, SIZE, SIZE)


@pytest.mark.parametrize(("ending", "kind"), [("png", "uint16"), ("tiff", "float32")])
def test_deep_grey_is_not_taken_for_white(tmp_path, ending, kind):
    path = tmp_path / f"deep.{ending}"
    Image.fromarray(np.full((SIZE, SIZE), 20_000, dtype=kind)).save(path)
    with pytest.raises(DataError, match=f"^{path} has more than 8 bits a pixel"):
        files.decode(path, SIZE)
    images = ImageFiles(tmp_path, [path.name], SIZE, workers=0)
    for thorough in (False, True):
        assert images.broken(thorough=thorough).tolist() == [True]


@pytest.mark.usefixtures("small_pieces")
def test_a_damaged_file_is_named_by_a_worker(broken):
    images, path = broken
    damage(path, "truncated")
    stream = replace(images, workers=2).split(3)
    assert len(next(stream)) == 3
    with pytest.raises(DataError, match=f"^{path} is damaged or not a picture"):
        next(stream)


@pytest.mark.parametrize("how", DAMAGES)
def test_broken_files_are_found_before(broken, how):
    images, path = broken
    assert not images.broken(thorough=True).any()
    damage(path, how)
    expected = torch.arange(7) == 3
    assert torch.equal(images.broken(thorough=True), expected)
    if how != "truncated":  # which a header does not show
        assert torch.equal(images.broken(), expected)
    assert images[:0].broken().tolist() == []


# ---------------------------------------------------------------- memory


def test_a_million_paths_are_small():
    # A tenth of them, as to trace each takes its time.
    names = [f"images/{k % 10}/{k * 9770},{k * 12010}.jpg" for k in range(10**5)]
    tracemalloc.start()
    try:
        images = ImageFiles("root", names)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(images) == 10**5
    assert images.names[-1].decode() == names[-1]
    assert images.names.nbytes <= held < 10 * 10**6
    assert most < 20 * 10**6


@of_reading
def test_files_are_read_as_they_are_needed(images, monkeypatch):
    read, decode = [], files.decode

    def counted(path, size):
        read.append(path)
        return decode(path, size)

    monkeypatch.setattr(files, "decode", counted)
    stream = images.split(4)
    assert not read
    next(stream)
    assert len(read) == 4
    next(stream)
    assert len(read) == 8


@pytest.fixture
def alive():
    """A function that gives the bytes of all image tensors made since."""

    def count():
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return sum(x.nbytes for x in tensors if x.dtype == torch.uint8)

    gc.collect()
    gc.freeze()
    yield count
    gc.unfreeze()


@of_reading
@pytest.mark.parametrize("take", ["split", "loader"])
@pytest.mark.usefixtures("small_pieces")
def test_memory_does_not_grow_with_the_images(images, generator, alive, take):
    def most(count):
        many, order = images[torch.arange(count) % COUNT], torch.arange(count).split(6)
        load = batches.loader(many, 2, True, generator, 2)
        parts = many.split(6) if take == "split" else load(order)
        return max(alive() for _ in parts)

    assert 6 * 3 * SIZE**2 <= most(18) == most(120)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def dark_and_light(tmp_path_factory):
    """96 pictures, 28 x 24, and whether each is light."""
    root = tmp_path_factory.mktemp("dark_and_light")
    labels = torch.arange(96) % 2
    rng = np.random.default_rng(0)
    for k, light in enumerate(labels.tolist()):
        pixels = rng.integers(100, size=(24, 28, 3), dtype=np.uint8) + np.uint8(
            120 * light
        )
        Image.fromarray(pixels).save(root / f"{k}.jpg")
    names = [f"{k}.jpg" for k in range(96)]
    return ImageFiles(root, names, 24, crop_to=20), labels


def test_a_network_is_built_for_files(dark_and_light):
    images, _ = dark_and_light
    network = models.build("resnet14", images, 14)
    decoded = torch.cat(list(images.split(50))).double()
    assert torch.allclose(network.mean.double(), decoded.mean(0), atol=1e-4)
    assert training.predict(network, images).shape == (96, 14)


def test_a_network_learns_from_files(dark_and_light, seeded):
    images, labels = dark_and_light
    recipe = Recipe(2, 16, "sgd", learning_rate=0.05, crop=2, flip=True)
    setup = Setup("resnet14", recipe, seeded)
    network = models.build("resnet14", images, 2)

    def step(model: nn.Module, index, first, second):
        both = model(first) + model(second)
        return losses.cross_entropy(both, labels[index]).mean()

    epochs = training.fit(
        network,
        images,
        lambda: batches.uniform(len(images), 16, seeded),
        step,
        setup,
        lambda model: training.accuracy(model, images[:40], labels[:40]),
        stage="test",
        views=2,
    )
    (_, first), (_, second) = [(epoch.number, epoch.loss) for epoch in epochs]
    assert second < first
    assert training.accuracy(network, images, labels) > 0.9
    probs = training.predict(network, images)
    tensor = torch.cat(list(images.split(7)))
    assert torch.allclose(probs, training.predict(network, tensor), atol=1e-5)


@of_reading
@pytest.mark.parametrize(("few", "started"), [(COUNT - 1, 2), (COUNT, 0)])
def test_workers_start_only_where_it_pays(images, whole, few, started, monkeypatch):
    asked = []
    loader = files.DataLoader

    def noted(*given, num_workers, multiprocessing_context, **options):
        asked.append(num_workers)
        return loader(*given, num_workers=0, **options)

    monkeypatch.setattr(files, "DataLoader", noted)
    monkeypatch.setattr(files, "cores", lambda: 2)
    monkeypatch.setattr(files, "FEW", few)
    found = torch.cat(list(replace(images, workers=None).split(5)))
    assert found.equal(whole) and asked == [started]
