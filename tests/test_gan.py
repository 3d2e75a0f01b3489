"""The networks of the noisy-label game, as section 3.1 has them."""

import pytest
import torch
from torch import nn

from nlhelpers import gan
from nlhelpers.gan import Discriminator, ImageGenerator, Players


def shape(channels=1, side=28):
    return torch.Size((channels, side, side))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [4, 7, 8, 28, 32, 33])
def test_any_square_image(channels, side):
    of = shape(channels, side)
    images = ImageGenerator(of)(torch.zeros(2, gan.NOISE))
    assert images.shape == (2, *of)
    assert images.abs().max() <= 1
    assert Discriminator(of)(images).shape == (2,)


def layers(network, kind):
    return [layer for layer in network.modules() if isinstance(layer, kind)]


@pytest.mark.parametrize(("channels", "widths"), [(1, [64, 128]), (3, [64, 128, 256])])
def test_widths_are_the_papers(channels, widths):
    D, G = Discriminator(shape(channels, 32)), ImageGenerator(shape(channels, 32))
    convolutions = layers(D, nn.Conv2d)
    assert [layer.out_channels for layer in convolutions] == widths
    assert {layer.kernel_size for layer in convolutions} == {(3, 3)}
    assert [layer.out_features for layer in layers(D, nn.Linear)] == [1024, 1]
    turned = layers(G, nn.ConvTranspose2d)
    assert [layer.in_channels for layer in turned] == widths[::-1]
    assert turned[-1].out_channels == channels
    first, second = layers(G, nn.Linear)
    assert (first.in_features, first.out_features) == (100, 1024)
    assert second.out_features == widths[-1] * (32 // 2 ** len(widths)) ** 2


def test_normalisation_and_dropout_are_where_the_paper_has_them():
    D, G = Discriminator(shape()), ImageGenerator(shape())
    assert layers(D, nn.BatchNorm2d) == []
    assert all(hasattr(x, "parametrizations") for x in layers(D, nn.Conv2d))
    assert not any(hasattr(x, "parametrizations") for x in layers(D, nn.Linear))
    D_all = Discriminator(shape(), spectral="all")
    for kind in (nn.Conv2d, nn.Linear):
        assert all(hasattr(x, "parametrizations") for x in layers(D_all, kind))
    assert [layer.p for layer in layers(D, nn.Dropout)] == [0.5]
    assert [norm.num_features for norm in layers(G, nn.BatchNorm2d)] == [64]
    assert [norm.num_features for norm in layers(G, nn.BatchNorm1d)] == [1024, 6272]
    assert layers(G, nn.Dropout) == []


def test_a_generator_cannot_learn_a_pattern_that_is_the_same_for_every_z():
    """What a linear layer adds for all z alike is taken away again, pixel by pixel."""
    G, z = ImageGenerator(shape()).train(), torch.rand(16, gan.NOISE) * 2 - 1
    before = G(z)
    for layer in layers(G, nn.Linear):
        nn.init.normal_(layer.bias)
    torch.testing.assert_close(G(z), before)


def test_bytes_come_back():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert gan.to_unit(images).min() == -1
    assert gan.to_unit(images).max() == 1
    assert torch.equal(gan.to_bytes(gan.to_unit(images)), images)


def test_z_is_uniform(generator):
    z = gan.noise(20_000, generator)
    assert z.shape == (20_000, 100)
    assert z.min() >= -1
    assert z.max() <= 1
    assert z.mean().abs() < 0.01
    assert z.square().mean() == pytest.approx(1 / 3, abs=0.01)


def test_a_prediction_is_what_D_says():
    images = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8)
    players = Players(images).eval()
    logits = players(images)
    expected = players.D(gan.to_unit(images)).sigmoid()
    assert torch.allclose(logits.softmax(dim=1)[:, 1], expected)


def test_generated_images_depend_on_the_generator_alone():
    players = Players(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).train()
    before = {name: value.clone() for name, value in players.state_dict().items()}
    first, again = (
        players.generated(1500, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [len(images) for images in first] == [1500, 1500]
    assert first[0].dtype == torch.uint8
    assert players.training
    after = players.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("bad", [(1, 8, 10), (1, 3, 3), (2, 8, 8)])
def test_other_images_are_refused(bad):
    with pytest.raises(ValueError, match="takes square ones of 4 pixels or more"):
        Players(torch.zeros(1, *bad, dtype=torch.uint8))
