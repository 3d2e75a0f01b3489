"""Which images a step sees: orders, balance and augmentation."""

import numpy as np
import pytest
import torch

from nlhelpers import batches


def counts(index, size):
    return torch.bincount(index, minlength=size)


# ---------------------------------------------------------------- orders


def test_balanced_draws_classes_and_their_members_equally_often(generator):
    labels = torch.tensor([0] * 50 + [1] * 7 + [3] * 3)[
        torch.randperm(60, generator=generator)
    ]
    index = batches.repeated_by_class(labels, 300, generator)
    assert counts(labels[index], 4).tolist() == [100, 100, 0, 100]
    for label, members in ((0, 50), (1, 7), (3, 3)):
        drawn = counts(index, 60)[labels == label]
        assert len(drawn) == members
        assert drawn.max() - drawn.min() <= 1


def test_a_class_larger_than_its_share_loses_other_images_each_time(generator):
    labels = torch.tensor([0] * 20 + [1] * 4)
    draws = [batches.repeated_by_class(labels, 24, generator) for _ in range(30)]
    assert all(counts(labels[index], 2).tolist() == [12, 12] for index in draws)
    assert (counts(torch.cat(draws), 24) > 0).all()


def test_balanced_with_a_remainder(generator):
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    extra = torch.zeros(3)
    for _ in range(200):
        drawn = counts(labels[batches.repeated_by_class(labels, 10, generator)], 3)
        assert sorted(drawn.tolist()) == [3, 3, 4]
        extra += drawn - 3
    assert (extra > 30).all()  # each class in its turn, 67 times on average


def test_balanced_order_is_random(generator):
    labels = torch.arange(4).repeat_interleave(25)
    first = labels[batches.repeated_by_class(labels, 100, generator)]
    second = labels[batches.repeated_by_class(labels, 100, generator)]
    assert not torch.equal(first, second)
    # 4 classes in random order: half of the changes would be missing in a sorted one.
    assert (first[1:] != first[:-1]).sum() > 50


def test_repeated_is_whole_passes_in_random_order(generator):
    index = batches.repeated(10, 25, generator)
    assert len(index) == 25
    for start in (0, 10):
        assert sorted(index[start : start + 10].tolist()) == list(range(10))
    assert counts(index, 10).max() == 3
    assert index[:10].tolist() != index[10:20].tolist() != list(range(10))


def test_uniform_batches_are_one_pass_in_whole_batches(generator):
    drawn = list(batches.uniform(100, 32, generator))
    assert [len(batch) for batch in drawn] == [32, 32, 32]
    assert counts(torch.cat(drawn), 100).max() == 1
    (only,) = batches.uniform(10, 32, generator)
    assert sorted(only.tolist()) == list(range(10))


def test_balanced_batches(generator):
    labels = torch.tensor([0] * 90 + [1] * 10)
    drawn = list(batches.balanced(labels, 32, generator))
    assert [len(batch) for batch in drawn] == [32, 32, 32]
    assert counts(labels[torch.cat(drawn)], 2).tolist() == [48, 48]
    drawn = list(batches.balanced(labels, 32, generator, size=200))
    assert [len(batch) for batch in drawn] == [32] * 6
    (only,) = batches.balanced(labels[85:], 32, generator)
    assert len(only) == 15


# ---------------------------------------------------------------- augmentation


def distinct_images(count=5, channels=3, size=6):
    generator = torch.Generator().manual_seed(3)
    shape = (count, channels, size, size)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("border", [0, 1, 3])
def test_reflect_against_numpy(border):
    images = distinct_images()
    pad = [(0, 0), (0, 0), (border, border), (border, border)]
    expected = np.pad(images.numpy(), pad, mode="reflect")
    assert np.array_equal(batches.reflect(images, border).numpy(), expected)


def find_view(picture, original, crop):
    """Offsets and flip that make `picture` of `original`, by a plain search."""
    pad = [(0, 0), (crop, crop), (crop, crop)]
    border = np.pad(original.numpy(), pad, mode="reflect")
    size = original.shape[-1]
    return [
        (down, right, flip)
        for down in range(2 * crop + 1)
        for right in range(2 * crop + 1)
        for flip in (False, True)
        for cut in [border[:, down : down + size, right : right + size]]
        if np.array_equal(picture.numpy(), cut[:, :, ::-1] if flip else cut)
    ]


@pytest.mark.parametrize(("crop", "flip"), [(2, True), (2, False), (0, True)])
def test_each_view_is_a_crop_of_its_own_image(crop, flip, generator):
    images = distinct_images()
    index = torch.arange(5).repeat(80)
    views = batches.augmentation(images, crop, flip, generator)(index)
    assert views.dtype == torch.uint8
    seen = set()
    for picture, k in zip(views, index.tolist(), strict=True):
        (found,) = find_view(picture, images[k], crop)
        seen.add(found)
    shifts = range(2 * crop + 1)
    flips = (False, True) if flip else (False,)
    assert seen == {(d, r, f) for d in shifts for r in shifts for f in flips}


def test_half_of_the_views_are_flipped(generator):
    images = distinct_images()
    view = batches.augmentation(images, 0, True, generator)
    same = (view(torch.zeros(400).long()) == images[0]).flatten(1).all(1)
    assert 160 <= same.sum() <= 240  # 4 standard deviations around 200


@pytest.mark.parametrize("channels", [1, 3])
def test_no_augmentation_picks_the_images(channels, generator):
    images = distinct_images(channels=channels)
    index = torch.tensor([4, 0, 0, 2])
    view = batches.augmentation(images, 0, False, generator)
    assert torch.equal(view(index), images[index])


# ---------------------------------------------------------------- loading


def test_the_loader_gives_each_view_its_own_augmentation(generator):
    images = distinct_images(count=40)
    load = batches.loader(images, 2, True, generator, 2)
    drawn = list(load(iter(torch.arange(40).split(20))))
    assert [len(index) for index, *_ in drawn] == [20, 20]
    for _, first, second in drawn:
        assert first.shape == second.shape == (20, 3, 6, 6)
        assert not torch.equal(first, second)


def test_processes_share_a_batch_and_both_its_halves(monkeypatch):
    whole = torch.arange(8)
    assert batches.share(whole) is whole
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(batches.share(whole).tolist())
    assert parts == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_other_kinds_of_images_register_their_loader(generator):
    class Files:
        pass

    @batches.loader.register
    def of_files(images: Files, crop, flip, generator, views):
        return lambda batches: iter([("files",)])

    assert list(batches.loader(Files(), 0, False, generator, 1)([])) == [("files",)]
