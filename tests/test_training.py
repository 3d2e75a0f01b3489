"""The training loop: batches, augmentation, schedule, errors, and whose randomness."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from nlhelpers import losses, models, training
from nlhelpers.training import DivergenceError, Recipe


def counts(index, size):
    return torch.bincount(index, minlength=size)


# ---------------------------------------------------------------- batches


def test_balanced_draws_classes_and_their_members_equally_often(generator):
    labels = torch.tensor([0] * 50 + [1] * 7 + [3] * 3)[
        torch.randperm(60, generator=generator)
    ]
    index = training.balanced(labels, 300, generator)
    assert counts(labels[index], 4).tolist() == [100, 100, 0, 100]
    for label, members in ((0, 50), (1, 7), (3, 3)):
        drawn = counts(index, 60)[labels == label]
        assert len(drawn) == members
        assert drawn.max() - drawn.min() <= 1


def test_balanced_with_a_remainder(generator):
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    extra = torch.zeros(3)
    for _ in range(200):
        drawn = counts(labels[training.balanced(labels, 10, generator)], 3)
        assert sorted(drawn.tolist()) == [3, 3, 4]
        extra += drawn - 3
    assert (extra > 30).all()  # each class in its turn, 67 times on average


def test_balanced_order_is_random(generator):
    labels = torch.arange(4).repeat_interleave(25)
    first = labels[training.balanced(labels, 100, generator)]
    second = labels[training.balanced(labels, 100, generator)]
    assert not torch.equal(first, second)
    # 4 classes in random order: half of the changes would be missing in a sorted one.
    assert (first[1:] != first[:-1]).sum() > 50


def test_repeated_is_whole_passes_in_random_order(generator):
    index = training.repeated(10, 25, generator)
    assert len(index) == 25
    for start in (0, 10):
        assert sorted(index[start : start + 10].tolist()) == list(range(10))
    assert counts(index, 10).max() == 3
    assert index[:10].tolist() != index[10:20].tolist() != list(range(10))


def test_uniform_batches_are_one_pass_in_whole_batches(make_setup):
    batches = list(training.uniform_batches(100, make_setup(batch_size=32)))
    assert [len(batch) for batch in batches] == [32, 32, 32]
    assert counts(torch.cat(batches), 100).max() == 1
    (only,) = training.uniform_batches(10, make_setup(batch_size=32))
    assert sorted(only.tolist()) == list(range(10))


def test_balanced_batches(make_setup):
    labels = torch.tensor([0] * 90 + [1] * 10)
    setup = make_setup(batch_size=32)
    batches = list(training.balanced_batches(labels, setup))
    assert [len(batch) for batch in batches] == [32, 32, 32]
    assert counts(labels[torch.cat(batches)], 2).tolist() == [48, 48]
    batches = list(training.balanced_batches(labels, setup, size=200))
    assert [len(batch) for batch in batches] == [32] * 6
    (only,) = training.balanced_batches(labels[85:], setup)
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
    assert np.array_equal(training.reflect(images, border).numpy(), expected)


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
    recipe = Recipe(epochs=1, crop=crop, flip=flip)
    index = torch.arange(5).repeat(80)
    views = training.augmentation(images, recipe, generator)(index)
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
    view = training.augmentation(images, Recipe(epochs=1, flip=True), generator)
    same = (view(torch.zeros(400).long()) == images[0]).flatten(1).all(1)
    assert 160 <= same.sum() <= 240  # 4 standard deviations around 200


@pytest.mark.parametrize("channels", [1, 3])
def test_no_augmentation_picks_the_images(channels, generator):
    images = distinct_images(channels=channels)
    index = torch.tensor([4, 0, 0, 2])
    view = training.augmentation(images, Recipe(epochs=1), generator)
    assert torch.equal(view(index), images[index])


# ---------------------------------------------------------------- the schedule


def cross_entropy_step(labels):
    def step(model, index, *views):
        return losses.cross_entropy(model(views[0]), labels[index]).mean()

    return step


def train(setup, seen, validate=lambda model: 0.0, step=None, views=1):
    """Run `fit` on a fresh network; returns the epochs."""
    model = setup.build(seen)
    return training.fit(
        model,
        seen.images,
        lambda: training.uniform_batches(len(seen.labels), setup),
        step or cross_entropy_step(seen.labels),
        setup,
        validate,
        stage="test",
        views=views,
    )


def rates(seen, setup, accuracies):
    script = iter(accuracies)
    epochs = train(setup, seen, lambda model: next(script))
    return [epoch.learning_rate for epoch in epochs]


def test_rate_halves_after_patience_epochs_without_improvement(prepared, make_setup):
    seen, _ = prepared
    setup = make_setup(epochs=10, patience=3, learning_rate=0.08)
    # The best is epoch 2; 3, 4 and 5 are no better (equal is not better), so 6 is
    # halved; 7 is better; 8, 9, 10 are not.
    script = [0.5, 0.6, 0.6, 0.1, 0.59, 0.3, 0.7, 0.7, 0.7, 0.7]
    found = rates(seen, setup, script)
    assert found == [0.08] * 5 + [0.04] * 5
    found = rates(seen, make_setup(epochs=4, patience=1, learning_rate=0.08), [0.5] * 4)
    assert found == [0.08, 0.08, 0.04, 0.02]


def test_rate_stays_while_validation_improves(prepared, make_setup):
    script = [0.1, 0.2, 0.3, 0.4 + 1e-6, 0.4 + 2e-6]
    found = rates(prepared[0], make_setup(epochs=5, patience=1), script)
    assert found == [0.01] * 5


def test_rate_has_a_minimum(prepared, make_setup):
    setup = make_setup(epochs=6, patience=1, min_learning_rate=0.004)
    found = rates(prepared[0], setup, [0.5] * 6)
    assert found == [0.01, 0.01, 0.005, 0.004, 0.004, 0.004]


# ---------------------------------------------------------------- the optimisers


def plain_steps(optimiser, x, gradients, rate, momentum, decay):
    """The published update rules, one weight, one gradient after the other."""
    moment, square = 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        gradient += decay * x
        if optimiser == "sgd":
            moment = momentum * moment + gradient
            x -= rate * moment
        elif optimiser == "adagrad":
            square += gradient**2
            x -= rate * gradient / math.sqrt(square)
        else:
            moment = 0.9 * moment + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            unbiased = math.sqrt(square / (1 - 0.999**t))
            x -= rate * moment / (1 - 0.9**t) / unbiased
    return x


@pytest.mark.parametrize("optimiser", ["sgd", "adagrad", "adam"])
def test_optimisers_against_their_published_rules(optimiser):
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    recipe = Recipe(
        1, optimiser=optimiser, learning_rate=0.1, momentum=0.8, weight_decay=0.01
    )
    found = training.make_optimiser(model, recipe)
    gradients = [1.0, -0.5, 2.0, 0.25]
    for gradient in gradients:
        model.weight.grad = torch.full((1, 1), gradient)
        found.step()
    expected = plain_steps(optimiser, 2.0, gradients, 0.1, 0.8, 0.01)
    assert model.weight.item() == pytest.approx(expected, rel=1e-5)


def test_unknown_optimiser():
    recipe = Recipe(epochs=1, optimiser="lion")
    with pytest.raises(ValueError, match="'lion'; allowed are 'sgd', 'adagrad'"):
        training.make_optimiser(nn.Linear(1, 1), recipe)


@pytest.mark.parametrize("optimiser", ["sgd", "adagrad", "adam"])
def test_every_optimiser_learns(optimiser, prepared, make_setup, seeded):
    rate = {"sgd": 0.1, "adagrad": 0.02, "adam": 0.003}[optimiser]
    setup = make_setup(epochs=3, optimiser=optimiser, learning_rate=rate)
    epochs = [epoch.loss for epoch in train(setup, prepared[0])]
    assert epochs[-1] < 0.8 * epochs[0]


# ---------------------------------------------------------------- the loop


def test_one_epoch_against_a_plain_loop(prepared, make_setup, cpu):
    seen, _ = prepared
    with training.seeded(0, cpu):
        setup = make_setup(epochs=1, optimiser="sgd", learning_rate=0.1)
        (epoch,) = train(setup, seen)
    with training.seeded(0, cpu):
        setup = make_setup(epochs=1)
        model = setup.build(seen)
        order = torch.randperm(len(seen.labels), generator=setup.generator)
        velocity = [torch.zeros_like(p) for p in model.parameters()]
        total = []
        for index in order[: 32 * (len(order) // 32)].view(-1, 32):
            probs = model(seen.images[index]).softmax(1)
            loss = -probs[torch.arange(32), seen.labels[index]].log().mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g)
                p.data -= 0.1 * v
            total.append(loss.item())
    for found, plain in zip(epoch.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert epoch.loss == pytest.approx(sum(total) / len(total), rel=1e-4)
    assert (epoch.number, epoch.stage) == (1, "test")
    assert epoch.images == 32 * len(total)
    assert epoch.seconds > 0


def test_training_mode_in_every_epoch_and_gradients_start_at_zero(prepared, make_setup):
    seen, _ = prepared
    modes, leftovers = [], []

    def step(model, index, images):
        modes.append(model.training)
        leftovers.extend(p.grad for p in model.parameters() if p.grad is not None)
        return model(images).square().mean()

    def validate(model):
        model.eval()
        return 0.0

    assert [e.number for e in train(make_setup(), seen, validate, step)] == [1, 2]
    assert all(modes)
    assert leftovers == []


def test_views_of_a_batch_are_augmented_anew(prepared, make_setup):
    seen, _ = prepared
    pairs = []

    def step(model, index, *views):
        pairs.append(views)
        return model(views[0]).mean()

    setup = make_setup(epochs=1, crop=2)
    list(train(setup, seen, step=step, views=2))
    assert all(len(views) == 2 for views in pairs)
    assert not any(torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_divergence_names_epoch_and_step(value, prepared, make_setup):
    taken = iter(range(1000))
    seen, _ = prepared
    steps = len(seen.labels) // 32

    def step(model, index, images):
        loss = model(images).square().mean()
        return loss * value if next(taken) == steps + 4 else loss  # fifth of epoch 2

    epochs = train(make_setup(epochs=3), seen, step=step)
    assert next(epochs).number == 1
    message = rf"loss is (nan|-?inf) at epoch 2, step 5 of {steps} \(test\)"
    with pytest.raises(DivergenceError, match=message):
        next(epochs)


def test_the_mean_of_huge_losses_is_finite():
    huge = [torch.tensor(3e38)] * 4
    assert training.mean_loss(huge, "test", 1) == pytest.approx(3e38)


def test_a_rate_that_is_too_high_diverges(prepared, make_setup):
    setup = make_setup(optimiser="sgd", learning_rate=1e30)
    with pytest.raises(DivergenceError, match="epoch 1, step"):
        list(train(setup, prepared[0]))


# ---------------------------------------------------------------- evaluation


def test_predict_leaves_mode_and_random_state_alone(prepared):
    seen, _ = prepared
    model = models.build("mlp", seen.images, 10, noise_std=0.5, dropout=0.5)
    for mode in (True, False):
        model.train(mode)
        state = torch.random.get_rng_state()
        first, second = (training.predict(model, seen.images) for _ in range(2))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert model.training is mode
        assert torch.equal(first, second)  # no dropout, no noise
        assert not first.requires_grad
        torch.testing.assert_close(first.sum(1), torch.ones(len(first)))


def test_prediction_in_parts(prepared):
    seen, _ = prepared
    model = models.build("mlp", seen.images, 10).eval()
    parts = training.predict_logits(model, seen.images, batch_size=100)
    torch.testing.assert_close(parts, model(seen.images).detach())


class Fixed(nn.Module):
    """Predicts what the pixel says."""

    def forward(self, images):
        return nn.functional.one_hot(images.flatten().long(), 3).float()


def test_accuracies_by_hand():
    predicted = torch.tensor([0, 0, 0, 1, 2, 2], dtype=torch.uint8).view(6, 1, 1, 1)
    labels = torch.tensor([0, 0, 0, 0, 0, 2])  # class 0: 3 of 5, class 2: 1 of 1
    assert training.accuracy(Fixed(), predicted, labels) == pytest.approx(4 / 6)
    found = training.balanced_accuracy(Fixed(), predicted, labels)
    assert found == pytest.approx((3 / 5 + 1) / 2)


# ---------------------------------------------------------------- seeds, devices


def test_seeded_gives_the_same_and_leaves_the_global_state(cpu):
    def drawn(seed):
        with training.seeded(seed, cpu) as generator:
            return torch.cat([torch.rand(3), torch.rand(3, generator=generator)])

    state = torch.random.get_rng_state()
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(KeyError), training.seeded(1, cpu):
        raise KeyError
    assert torch.equal(torch.random.get_rng_state(), state)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training.pick_device() == training.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda', but torch finds no GPU here"):
        training.pick_device("cuda")
    for name in ("gpu", "", "cuda:0"):
        with pytest.raises(ValueError, match=f"device is '{name}'; allowed are 'auto'"):
            training.pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training.pick_device("auto") == torch.device("cuda")
    assert training.pick_device("cpu") == torch.device("cpu")


def test_bf16_is_for_convolutions_alone_on_a_cpu(monkeypatch, cpu):
    images = distinct_images()
    networks = {name: models.build(name, images, 3) for name in ("mlp", "resnet14")}

    def precision(name):
        with training.autocast(networks[name], cpu):
            return torch.is_autocast_enabled("cpu")

    monkeypatch.setattr(training, "cpu_has_bf16", lambda: True)
    assert not precision("mlp")
    assert precision("resnet14")
    monkeypatch.setattr(training, "cpu_has_bf16", lambda: False)
    assert not precision("resnet14")
