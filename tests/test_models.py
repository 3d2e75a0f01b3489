"""Networks: parameter counts by formula, a plain forward pass, noise while training."""

import math

import pytest
import torch
import torch.nn.functional as F

from nlhelpers import models, training


def some_images(channels=3, size=32, count=6):
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, size, size)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def count(network):
    return sum(p.numel() for p in network.parameters())


def resnet_size(channels, num_classes, n):
    """Weights of He et al.'s CIFAR network: 3x3 kernels, 2 per batch-norm channel."""
    total = 9 * channels * 16 + 2 * 16
    for inputs, width in ((16, 16), (16, 32), (32, 64)):
        total += 9 * inputs * width + (2 * n - 1) * 9 * width * width
        total += 2 * n * 2 * width
    return total + 64 * num_classes + num_classes


# ---------------------------------------------------------------- sizes and shapes


def test_resnet_has_as_many_parameters_as_he_et_al_print():
    twenty = count(models.ResNet(3, 10, n=3))
    assert twenty == resnet_size(3, 10, 3)
    assert round(twenty / 1e6, 2) == 0.27  # He et al. (2016), Table 6
    assert round(count(models.ResNet(3, 10, n=5)) / 1e6, 2) == 0.46
    assert count(models.ResNet(1, 4)) == resnet_size(1, 4, 2)


def test_resnet14_has_14_layers_with_weights():
    layers = models.build("resnet14", some_images(), 10).body.modules()
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    assert sum(isinstance(layer, kinds) for layer in layers) == 14


def test_mlp_size():
    network = models.build("mlp", some_images(1, 28), 10)
    assert count(network) == 784 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10


@pytest.mark.parametrize("name", ["mlp", "resnet14"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_bytes_in_logits_out(name, channels, size):
    images = some_images(channels, size)
    before = images.clone()
    logits = models.build(name, images, 7)(images)
    assert logits.shape == (6, 7)
    assert logits.dtype == torch.float32
    assert torch.equal(images, before)


def test_caffe_quick_has_as_many_parameters_as_the_published_one():
    network = models.build("caffe-quick", some_images(), 10)
    conv = 25 * (3 * 32 + 32 * 32 + 32 * 64) + 32 + 32 + 64
    linear = 4 * 4 * 64 * 64 + 64 + 64 * 10 + 10
    assert count(network) == conv + linear == 145_578


@pytest.mark.parametrize("size", [16, 28, 31, 32])
def test_caffe_quick_takes_other_sizes(size):
    images = some_images(size=size)
    assert models.build("caffe-quick", images, 10)(images).shape == (6, 10)


def test_caffe_quick_against_a_plain_one(seeded):
    images = some_images()
    network = models.build("caffe-quick", images, 10)
    w = [p.detach() for p in network.body.parameters()]
    x = images.float() - network.mean  # 0 to 255
    x = F.relu(F.max_pool2d(F.conv2d(x, w[0], w[1], padding=2), 3, 2, ceil_mode=True))
    for k in (2, 4):
        x = F.relu(F.conv2d(x, w[k], w[k + 1], padding=2))
        x = F.avg_pool2d(x, 3, 2, ceil_mode=True)
    x = F.linear(F.linear(x.flatten(1), w[6], w[7]), w[8], w[9])
    assert torch.allclose(network(images), x, atol=1e-4)
    spreads = [p.std().item() for p in w[::2]]
    assert spreads == pytest.approx([1e-4, 0.01, 0.01, 0.1, 0.1], rel=0.1)


def test_deep_mnist_against_a_plain_one(seeded):
    images = some_images(1, 13)
    network = models.build("deep-mnist", images, 5).eval()
    w = [p.detach() for p in network.body.parameters()]
    x = (images.float() - images.float().mean(0)) / 255
    for k in (0, 2):
        x = F.max_pool2d(F.relu(F.conv2d(x, w[k], w[k + 1], padding=2)), 2)
    x = F.linear(F.relu(F.linear(x.flatten(1), w[4], w[5])), w[6], w[7])
    torch.testing.assert_close(network(images), x, rtol=1e-4, atol=1e-4)


def test_alexnet_is_the_published_one():
    images = some_images(size=96, count=2)
    network = models.build("alexnet", images, 1000)
    assert count(network) == 61_100_840  # as torchvision documents it
    assert models.build("alexnet", images, 14)(images).shape == (2, 14)


@pytest.mark.parametrize(
    ("name", "channels", "size", "message"),
    [
        ("alexnet", 1, 96, "3 channels"),
        ("resnet50", 1, 96, "3 channels"),
        ("alexnet", 3, 32, "63 pixels"),
        ("caffe-quick", 3, 8, "16 pixels"),
    ],
)
def test_images_that_a_network_cannot_take(name, channels, size, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, some_images(channels, size), 10)


def test_resnet50_builds():
    images = some_images(count=2)
    network = models.build("resnet50", images, 10).eval()
    # Torchvision's 25,557,032 with 10 instead of 1000 outputs.
    assert count(network) == 25_557_032 - 990 * (2048 + 1)
    pixels = []
    network.body[1].register_forward_pre_hook(lambda layer, x: pixels.extend(x))
    assert network(images).shape == (2, 10)
    # Of ImageNet's channels, in units of the full range.
    deviation = (0.229 + 0.224 + 0.225) / 3
    expected = (images.float() - images.float().mean(0)) / 255 / deviation
    torch.testing.assert_close(pixels[0], expected)
    with pytest.raises(ValueError, match="3 channels, but the images have 1"):
        models.build("resnet50", some_images(1), 10)


# ---------------------------------------------------------------- what is computed


def batch_norm(x, state, name):
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])


def plain_resnet(state, x):
    """14 layers in evaluation mode, written out."""
    x = F.relu(batch_norm(F.conv2d(x, state["0.weight"], padding=1), state, "1"))
    for unit in range(3, 9):
        stride = 2 if unit in (5, 7) else 1
        y = F.conv2d(x, state[f"{unit}.conv1.weight"], stride=stride, padding=1)
        y = F.relu(batch_norm(y, state, f"{unit}.norm1"))
        y = F.conv2d(y, state[f"{unit}.conv2.weight"], padding=1)
        y = batch_norm(y, state, f"{unit}.norm2")
        shortcut = torch.zeros_like(y)
        shortcut[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
        x = F.relu(y + shortcut)
    return x.mean((2, 3)) @ state["11.weight"].T + state["11.bias"]


def test_resnet_against_a_plain_one(seeded):
    images = some_images(3, 16)
    network = models.build("resnet14", images, 5)
    for _ in range(3):  # batch norm shall have means of its own
        network(images)
    state = network.body.state_dict()
    x = (images.float() - images.float().mean(0)) / 255
    found = network.eval()(images)
    torch.testing.assert_close(found, plain_resnet(state, x), rtol=1e-4, atol=1e-4)


def test_mlp_against_a_plain_one(seeded):
    images = some_images(1, 8)
    network = models.build("mlp", images, 5).eval()
    x = ((images.float() - images.float().mean(0)) / 255).flatten(1)
    for layer in (1, 4):
        weights = network.body[layer]
        x = (x @ weights.weight.T + weights.bias).clamp(min=0)
    x = x @ network.body[7].weight.T + network.body[7].bias
    torch.testing.assert_close(network(images), x)


def test_pixel_mean_in_pieces():
    images = some_images(3, 4, count=21)
    found = models.pixel_mean(images, chunk=8)
    torch.testing.assert_close(found, images.float().mean(0))
    bright = torch.full((300, 1, 2, 2), 255, dtype=torch.uint8)
    assert (models.pixel_mean(bright) == 255).all()


def test_weights_are_he_normal(seeded):
    network = models.ResNet(3, 10)
    mlp = models.MLP(784, 10)
    for layer in (network[5].conv2, network[8].conv1, mlp[1], mlp[4]):
        weight = layer.weight
        fan_in = weight[0].numel()
        assert weight.mean().abs() < 5 * (2 / fan_in / weight.numel()) ** 0.5
        assert weight.var().item() == pytest.approx(2 / fan_in, rel=0.05)
    assert (mlp[1].bias == 0).all()
    assert (network[-1].bias == 0).all()


# ---------------------------------------------------------------- noise and dropout


def test_gaussian_noise_has_the_asked_spread_while_training_only(seeded):
    layer = models.GaussianNoise(0.15)
    x = torch.full((100_000,), 0.5)
    drawn = layer(x) - x
    assert drawn.std().item() == pytest.approx(0.15, rel=0.02)
    assert abs(drawn.mean().item()) < 4 * 0.15 / len(x) ** 0.5
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(models.GaussianNoise(0.0)(x), x)


def test_noise_is_in_units_of_the_full_range_of_a_pixel(seeded):
    network = models.Network(torch.nn.Flatten(), torch.zeros(1, 100, 100), 0.15)
    x = network(torch.full((10, 1, 100, 100), 51, dtype=torch.uint8))
    assert x.mean().item() == pytest.approx(0.2, abs=4 * 0.15 / 1e5**0.5)
    assert x.std().item() == pytest.approx(0.15, rel=0.02)


@pytest.mark.parametrize("name", ["mlp", "resnet14"])
@pytest.mark.parametrize(
    "perturbation", [{"noise_std": 0.3, "dropout": 0.0}, {"dropout": 0.5}]
)
def test_perturbed_while_training_only(name, perturbation, seeded):
    images = some_images(1, 8)
    network = models.build(name, images, 4, **perturbation)
    plain = models.build(name, images, 4, dropout=0.0)
    assert not torch.equal(network(images), network(images))
    assert torch.equal(plain(images), plain(images))
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("p", [0.2, 0.5, 1 / 3, 1e-3, 0.999])
def test_dropout_drops_its_share_and_leaves_the_expectation(p, seeded):
    y = models.Dropout(p)(torch.full((1_000_003,), 2.0))
    dropped = (y == 0).double().mean().item()
    assert abs(dropped - p) < 5 * (p * (1 - p) / len(y)) ** 0.5
    (kept,) = y[y != 0].unique().tolist()
    assert kept == pytest.approx(2 / (1 - p))


@pytest.mark.parametrize("lag", [1, 2, 128])
def test_dropout_draws_its_units_independently(lag, seeded):
    y = models.Dropout(0.2)(torch.ones(1_000_000)).double()
    y = (y - y.mean()) / y.std()
    assert abs((y[lag:] * y[:-lag]).mean().item()) < 5 / len(y) ** 0.5


@pytest.mark.skipif(
    torch.__version__ >= (2, 16),
    reason="torch 2.11 to 2.15 draw so, a newer one may not",
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.2, 1 / 3, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(1,), (7, 5), (128, 128)])
def test_dropout_draws_what_torch_draws(shape, p, dtype):
    drawn = []
    for kind in (torch.nn.Dropout, models.Dropout):
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, math.prod(shape))
        x = x.to(dtype).view(shape).requires_grad_()
        y = kind(p)(x)
        y.sum().backward()
        drawn.append((y, x.grad, torch.get_rng_state()))
    assert all(map(torch.equal, *drawn))


def test_dropout_leaves_evaluation_alone():
    layer, x = models.Dropout(0.5), torch.rand(64, 3)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("mlp", {0.2}),
        ("resnet14", {0.0}),
        ("deep-mnist", {0.5}),
        ("alexnet", {0.5}),
        ("resnet50", {0.0}),
    ],
)
def test_default_dropout_is_the_networks_own(name, own):
    for dropout, expected in ((None, own), (0.0, {0.0}), (0.3, {0.3})):
        with torch.device("meta"):  # shapes without numbers
            body = models.MODELS[name](torch.Size((3, 64, 64)), 4, dropout)
        kinds = (m.p for m in body.modules() if isinstance(m, torch.nn.Dropout))
        assert set(kinds) == expected


def test_dropout_acts_between_the_convolutions_of_a_unit(seeded):
    unit = models.ResidualUnit(4, 4, 1, dropout=0.5)
    inputs = []
    unit.conv2.register_forward_hook(lambda layer, x, y: inputs.append(x[0]))
    unit(torch.rand(8, 4, 6, 6))
    unit.dropout.p = 0.0
    unit(torch.rand(8, 4, 6, 6))
    dropped, whole = ((x == 0).double().mean().item() for x in inputs)
    assert dropped > whole + 0.15


@pytest.mark.parametrize("name", models.MODELS)
def test_weights_move_between_a_perturbed_and_a_plain_network(name, seeded):
    images = some_images(size=64, count=2)
    plain = models.build(name, images, 4)
    perturbed = models.build(name, images, 4, noise_std=0.15, dropout=0.2)
    perturbed.load_state_dict(plain.state_dict())
    assert torch.equal(plain.eval()(images), perturbed.eval()(images))
    plain.load_state_dict(perturbed.state_dict())


def test_weights_depend_on_the_seed(cpu):
    def weights(seed):
        with training.seeded(seed, cpu):
            return models.build("mlp", some_images(1, 8), 4).body[1].weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
