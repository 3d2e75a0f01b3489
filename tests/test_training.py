"""The training loop: batches, augmentation, schedule, errors, and whose randomness."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nlhelpers import batches, experiments, losses, models, training
from nlhelpers.specs import Spec
from nlhelpers.training import DivergenceError, Recipe

# ---------------------------------------------------------------- the schedule


def cross_entropy_step(labels):
    def step(model, index, *views):
        return losses.cross_entropy(model(views[0]), labels[index]).mean()

    return step


def train(
    setup, seen, validate=lambda model: 0.0, step=None, views=1, fit=training.fit
):
    """Run `fit` on a fresh network; returns the epochs."""
    model = setup.build(seen)
    return fit(
        model,
        seen.images,
        lambda: batches.uniform(len(seen.labels), 32, setup.generator),
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


def test_what_a_generator_of_events_returns():
    seen = []

    def events():
        seen.extend([1, 2])
        yield from seen
        return "the end"

    assert training.returned(events()) == "the end"
    assert seen == [1, 2]


def test_rate_falls_after_patience_epochs_without_improvement(prepared, make_setup):
    seen, _ = prepared
    setup = make_setup(epochs=10, patience=3, learning_rate=0.08)
    # The best is epoch 2; 3, 4 and 5 are no better (equal is not better), so 6 is
    # halved; 7 is better; 8, 9, 10 are not.
    script = [0.5, 0.6, 0.6, 0.1, 0.59, 0.3, 0.7, 0.7, 0.7, 0.7]
    found = rates(seen, setup, script)
    assert found == [0.08] * 5 + [0.04] * 5
    setup = make_setup(epochs=4, patience=1, learning_rate=0.08, factor=0.25)
    assert rates(seen, setup, [0.5] * 4) == [0.08, 0.08, 0.02, 0.005]


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


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("optimiser", ["sgd", "adagrad", "adam"])
def test_optimisers_against_their_published_rules(optimiser, device):
    model = nn.Linear(1, 1, bias=False, device=device)
    model.weight.data.fill_(2.0)
    recipe = Recipe(
        1, optimiser=optimiser, learning_rate=0.1, momentum=0.8, weight_decay=0.01
    )
    found = training.make_optimiser(model, recipe)
    gradients = [1.0, -0.5, 2.0, 0.25]
    for gradient in gradients:
        model.weight.grad = torch.full((1, 1), gradient, device=device)
        found.step()
    expected = plain_steps(optimiser, 2.0, gradients, 0.1, 0.8, 0.01)
    assert model.weight.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("optimiser", ["sgd", "adagrad", "adam"])
def test_fused_optimisers_take_parameters_on_a_gpu(optimiser, monkeypatch):
    called = []
    kernel = f"_fused_{optimiser}_"
    monkeypatch.setattr(torch, kernel, lambda *args, **kwargs: called.append(kernel))
    with FakeTensorMode():  # shapes and devices without numbers
        model = nn.Linear(2, 2, bias=False, device="cuda")
        model.weight.grad = torch.ones_like(model.weight)
        training.make_optimiser(model, Recipe(1, optimiser=optimiser)).step()
    assert called == [kernel]


def test_rate_falls_after_the_named_epochs(prepared, make_setup):
    seen, _ = prepared
    setup = make_setup(
        epochs=5, learning_rate=0.01, factor=0.1, falls_after=[2, 4], patience=1
    )
    found = rates(seen, setup, [0.5] * 5)  # never better, but that has no say
    assert found == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])


def test_recipes_with_the_same_values_are_equal():
    assert Recipe(epochs=1, falls_after=[2]) == Recipe(epochs=1, falls_after=(2,))


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


@pytest.mark.parametrize("fit", [training.fit, training.fit_by_graphs])
def test_images_are_loaded_as_the_recipe_says(fit, prepared, make_setup, monkeypatch):
    class Asked(Exception):
        pass

    def loader(*given):
        raise Asked(*given)

    monkeypatch.setattr(batches, "loader", loader)
    setup = make_setup(crop=3, flip=True)
    with pytest.raises(Asked) as asked:
        next(train(setup, prepared[0], views=2, fit=fit))
    assert asked.value.args == (prepared[0].images, 3, True, setup.generator, 2)


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
            return torch.rand(3).tolist(), torch.rand(3, generator=generator).tolist()

    state = torch.random.get_rng_state()
    assert drawn(1) == drawn(1)
    plain = torch.rand(3, generator=torch.Generator().manual_seed(1)).tolist()
    assert len(set(map(tuple, [plain, *drawn(1), *drawn(2)]))) == 5
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
    assert training.pick_device("cpu", 1) == torch.device("cpu")


def test_processes_share_the_gpus_evenly(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [training.pick_device("cuda", number).index for number in range(4)]
    assert found == [0, 1, 0, 1]
    monkeypatch.setenv("LOCAL_RANK", "1")  # as torchrun does
    assert training.pick_device() == torch.device("cuda:1")


def test_bf16_is_for_convolutions_alone_on_a_cpu(monkeypatch, cpu):
    images = torch.zeros(5, 3, 6, 6, dtype=torch.uint8)
    networks = {name: models.build(name, images, 3) for name in ("mlp", "resnet14")}

    monkeypatch.setattr(training, "cpu_has_bf16", lambda: True)
    assert experiments.precision_of(networks["mlp"], cpu) == "float32"
    assert experiments.precision_of(networks["resnet14"], cpu) == "bfloat16"
    with training.autocast(networks["resnet14"], cpu):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == torch.bfloat16
    monkeypatch.setattr(training, "cpu_has_bf16", lambda: False)
    assert experiments.precision_of(networks["resnet14"], cpu) == "float32"


# ---------------------------------------------------------------- several processes


def losses_of(rank, world, folder):
    """Train in one of `world` processes; rank 0 writes what it saw."""
    if world > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet",
            rank=rank,
            world_size=world,
        )
    cpu = torch.device("cpu")
    seen, _ = experiments.prepare(Spec(profile="smoke"), cpu)
    with training.seeded(0, cpu) as generator:
        recipe = Recipe(epochs=3, batch_size=64)
        model = models.build("mlp", seen.images, 10, dropout=0.0)
        epochs = training.fit(
            model,
            seen.images,
            lambda: batches.uniform(len(seen.labels), 64, generator),
            cross_entropy_step(seen.labels),
            training.Setup("mlp", recipe, generator),
            lambda model: training.accuracy(model, seen.val_images, seen.val_labels),
            stage="test",
        )
        found = [(epoch.loss, epoch.val_accuracy) for epoch in epochs]
    if rank == 0:
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.save((found, weights), folder / f"of{world}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_train_like_one(tmp_path):
    """The same loss curve and the same weights, for the same batches."""
    losses_of(0, 1, tmp_path)
    torch.multiprocessing.spawn(losses_of, (2, tmp_path), nprocs=2)
    (one, first), (two, second) = (
        torch.load(tmp_path / f"of{world}.pt") for world in (1, 2)
    )
    assert torch.tensor(two).flatten().tolist() == pytest.approx(
        torch.tensor(one).flatten().tolist(), rel=1e-4
    )
    assert torch.allclose(first, second, atol=1e-4)
