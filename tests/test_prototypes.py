"""Han et al. (2019): selection against plain loops and hand values, to the bit."""

import math

import pytest
import torch
from torch import nn

from nlhelpers import models, training
from nlhelpers import prototypes as found
from nlhelpers.prototypes import SELECTORS, Rule, selector


@pytest.fixture
def features(generator):
    """Three unequal groups in seven dimensions."""
    centres = 3 * torch.randn(3, 7, generator=generator)
    group = torch.arange(60) % 5 % 3
    return centres[group] + torch.randn(60, 7, generator=generator)


def in_loops(features, S_c):
    """Density and eta by the slides' definitions, one pair at a time."""
    m = len(features)
    x = features.tolist()

    def cos(a, b):
        dot = math.fsum(p * q for p, q in zip(a, b, strict=True))
        return dot / math.sqrt(
            math.fsum(p * p for p in a) * math.fsum(q * q for q in b)
        )

    S = [[cos(a, b) for b in x] for a in x]
    rho = [sum((s > S_c) - (s < S_c) for s in row) for row in S]
    eta = []
    for i in range(m):
        denser = [S[i][j] for j in range(m) if rho[j] > rho[i]]
        eta.append(max(denser) if denser else min(S[i]))
    return rho, eta


@pytest.mark.parametrize("S_c", [-0.5, 0.1, 0.6])
def test_density_and_eta_as_in_plain_loops(features, S_c):
    rho, eta = in_loops(features, S_c)
    S = found.cosine(features)
    assert found.density(S, S_c).tolist() == rho
    close = torch.tensor(eta, dtype=torch.float64)
    assert found.nearest_denser(S, found.density(S, S_c)).allclose(close, atol=1e-6)


def test_all_that_are_densest_get_their_smallest_similarity():
    # Two pairs of equal directions, at a right angle: every density is the same.
    features = torch.tensor([[1.0, 0], [2, 0], [0, 3], [0, 1]])
    S = found.cosine(features)
    rho = found.density(S, 0.5)
    assert rho.tolist() == [0, 0, 0, 0]
    assert found.nearest_denser(S, rho).tolist() == [0, 0, 0, 0]


def test_a_similarity_of_just_the_cutoff_counts_for_nothing():
    features = torch.tensor([[1.0, 0], [0, 1]])
    assert found.density(found.cosine(features), 0.0).tolist() == [1, 1]


@pytest.mark.parametrize("kind", [found.cosine, found.euclidean])
@pytest.mark.parametrize("rows", [1, 7, 59])
def test_tiles_change_no_bit(features, kind, rows):
    whole, tiled = kind(features), kind(features, tile_bytes=8 * 60 * rows)
    tiles = list(tiled)
    assert len(tiles) == -(-60 // rows) and len(list(whole)) == 1
    assert torch.cat(tiles).equal(whole.whole)
    for top in (0.02, 0.4):
        S_c = found.cutoff(whole, top)
        assert found.cutoff(tiled, top) == S_c
        rho = found.density(whole, S_c)
        assert found.density(tiled, S_c).equal(rho)
        eta = found.nearest_denser(whole, rho)
        assert found.nearest_denser(tiled, rho).equal(eta)


def test_similarities_are_exact_in_any_order(generator):
    """What makes the tiles equal: a sum from either end has the same bits."""
    x = found.directions(torch.randn(40, 500, generator=generator))
    turned = x.flip(1)
    assert (x @ x.T).equal(turned @ turned.T)
    assert (x @ x.T)[3, 5].item() == math.fsum((x[3] * x[5]).tolist())


def test_euclidean_similarities_are_distances_turned_round(features):
    S = found.euclidean(features).whole
    apart = torch.cdist(features.double(), features.double())
    expected = -apart / features.double().norm(dim=1).max()
    assert S.allclose(expected, atol=1e-6)


@pytest.mark.parametrize("name", SELECTORS)
def test_scale_does_not_matter(features, name):
    def chosen(x):
        generator = torch.Generator().manual_seed(0)
        return selector(name)(x, 4, Rule(), generator).tolist()

    assert chosen(1000 * features) == chosen(0.001 * features) == chosen(features)


@pytest.mark.parametrize("top", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("kind", [found.cosine, found.euclidean])
def test_the_cutoff_leaves_the_share_above_it(features, kind, top):
    S = kind(features)
    S_c = found.cutoff(S, top)
    bin_width = (S.largest - S.smallest) / found.BINS
    assert (S.whole > S_c).double().mean() >= top
    assert (S.whole > S_c + bin_width).double().mean() < top


@pytest.mark.parametrize("name", SELECTORS)
def test_prototypes_are_distinct_images(features, name):
    chosen = selector(name)(features, 8, Rule(), torch.Generator().manual_seed(0))
    assert len(set(chosen.tolist())) == 8
    assert chosen.min() >= 0 and chosen.max() < 60


def test_one_prototype_of_one_blob_is_its_densest_image(generator):
    features = torch.tensor([5.0, 0, 0]) + torch.randn(50, 3, generator=generator)
    S = found.cosine(features)
    rho = found.density(S, found.cutoff(S, 0.4))
    (chosen,) = found.by_density(features, 1, Rule())
    assert rho[chosen] == rho.max()


def test_prototypes_are_apart_and_then_the_least_close():
    # Dense and equal, one other group, and one image alone.
    features = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 3 + [[-1.0, 0.2]])
    rule = Rule(S_c=0.5)
    first = found.by_density(features, 2, rule).tolist()
    assert first[0] < 5 and first[1] < 5  # both densest: their eta is the minimum
    # Five densest have eta = -1, the second group eta = 0, the outlier below 0.
    assert sorted(found.by_density(features, 9, rule).tolist()) == list(range(9))
    order = found.by_density(features, 9, rule).tolist()
    assert order[:5] == [0, 1, 2, 3, 4] and order[5:8] == [5, 6, 7] and order[8] == 8


def test_what_is_close_to_a_denser_image_comes_last():
    angles = torch.tensor([0.0, 0.012, 0.02, 0.027, 0.04, 1.2, 1.25, 2.6])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    rule = Rule(S_c=0.99965)  # neighbours are less than 0.0265 apart
    S = found.cosine(features)
    rho = found.density(S, 0.99965)
    assert rho.argmax() == 2  # the middle of the first five
    chosen = found.by_density(features, 8, rule).tolist()
    # Images 4, 0, 1, 3 come after all that are far from a denser one: theirs is at
    # 0.013, 0.012, 0.008 and 0.007.
    assert chosen[0] == 2
    assert chosen[-4:] == [4, 0, 1, 3]


@pytest.mark.parametrize("m", [30, 300])
def test_density_peaks_as_in_plain_loops(m):
    """The largest rho * delta, with distances and counts taken pair by pair."""
    features = torch.randn(m, 8, generator=torch.Generator().manual_seed(m))
    d = torch.cdist(features.double(), features.double()).tolist()
    pairs = sorted(d[i][j] for i in range(m) for j in range(i))
    k = round(0.02 * len(pairs))
    near = (pairs[k - 1] + pairs[k]) / 2
    rho = [sum(d[i][j] < near for j in range(m) if j != i) for i in range(m)]
    delta = []
    for i in range(m):
        denser = [d[i][j] for j in range(m) if rho[j] > rho[i]]
        delta.append(min(denser) if denser else max(d[i]))
    product = [r * x for r, x in zip(rho, delta, strict=True)]
    expected = sorted(range(m), key=lambda i: -product[i])[:5]
    assert selector("euclidean")(features, 5, Rule()).tolist() == expected


@pytest.mark.parametrize("name", SELECTORS)
def test_features_without_a_direction(name):
    features = torch.ones(9, 4)
    features[3] = 0
    with pytest.raises(ValueError, match="1 of 9 images have features of norm 0"):
        selector(name)(features, 2, Rule())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"S_c": 1.0}, r"S_c is 1.0; it must be in \(-1, 1\)"),
        ({"S_c": -1.0}, "S_c is -1.0"),
        ({"S_c": math.nan}, "S_c is nan"),
        ({"top": 0.0}, r"top is 0.0; it must be in \(0, 1\)"),
        ({"top": 1.0}, "top is 1.0"),
        ({"eta": -1.0}, "eta is -1.0"),
        ({"eta": 1.5}, "eta is 1.5"),
    ],
)
def test_a_bad_rule(values, message):
    with pytest.raises(ValueError, match=message):
        Rule(**values)


# ---------------------------------------------------------------- all classes


def test_samples_are_of_their_class_and_no_more_than_there_are(generator):
    labels = torch.arange(100) % 3
    chosen = found.sampled(labels, 3, 20, 5, generator)
    assert [len(index) for index in chosen] == [20, 20, 20]
    for c, index in enumerate(chosen):
        assert (labels[index] == c).all() and len(index.unique()) == 20
    assert [len(i) for i in found.sampled(labels, 3, 1000, 5, generator)] == [
        34,
        33,
        33,
    ]
    draws = [torch.cat(found.sampled(labels, 3, 20, 5, generator)) for _ in range(30)]
    assert len(torch.cat(draws).unique()) == 100  # each image in its turn


@pytest.mark.parametrize(("K", "p", "c", "has"), [(4, 1, 3, 0), (3, 34, 1, 33)])
def test_a_class_with_too_few_images(K, p, c, has, generator):
    with pytest.raises(ValueError, match=f"class {c} has {has} images for {p} proto"):
        found.sampled(torch.arange(100) % 3, K, 100, p, generator)


def test_sigma_is_the_mean_of_cosines(generator):
    prototypes = [torch.randn(4, 6, generator=generator) for _ in range(3)]
    features = torch.randn(5, 6, generator=generator)
    sigma = found.similarity(features, found.class_directions(prototypes))
    for n in range(5):
        for c in range(3):
            cosines = torch.cosine_similarity(features[n], prototypes[c], dim=1)
            assert sigma[n, c].item() == pytest.approx(cosines.mean().item(), abs=1e-6)
    batches = features.split(2)
    best = found.corrected(batches, found.class_directions(prototypes))
    assert best.equal(sigma.argmax(dim=1))


def test_separable_features_give_the_labels_back(generator):
    """30 % of the labels are wrong; at least 99 % of those are put right."""
    K = 5
    centres = 4 * torch.eye(K, 16)
    labels = torch.arange(3000) % K
    features = centres[labels] + 0.6 * torch.randn(3000, 16, generator=generator)
    wrong = torch.rand(3000, generator=generator) < 0.3
    shift = torch.randint(1, K, (3000,), generator=generator)
    given = torch.where(wrong, (labels + shift) % K, labels)
    chosen = found.sampled(given, K, 400, 8, generator)
    classes = found.class_directions(
        features[index][found.by_density(features[index], 8, Rule())]
        for index in chosen
    )
    y_hat = found.corrected(features.split(1000), classes)
    assert (y_hat == labels)[wrong].double().mean() >= 0.99
    assert (y_hat == labels)[~wrong].double().mean() >= 0.99


# ---------------------------------------------------------------- deep features


@pytest.mark.parametrize(
    ("model", "width"), [("mlp", 128), ("resnet14", 64), ("caffe-quick", 64)]
)
def test_deep_features_are_what_the_last_layer_is_given(model, width, monkeypatch):
    monkeypatch.setattr(training, "cpu_has_bf16", lambda: False)  # compared exactly
    images = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8)
    network = models.build(model, images, 4).train()
    batches = list(found.deep_features(network, images, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    features = torch.cat(batches)
    assert features.shape == (10, width)
    *_, last = (x for x in network.modules() if isinstance(x, nn.Linear))
    assert network.training  # as it was
    logits = network.eval()(images)
    assert last(features).allclose(logits, atol=1e-5)
    assert not last._forward_pre_hooks
