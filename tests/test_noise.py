"""Noise: matrices by hand, drawn rates within their spread, estimates by a loop."""

import itertools
import math

import pytest
import torch

from nlhelpers import noise
from nlhelpers.noise import PATHS

# Ding et al. (2018), Figure 3, as printed.
FIGURE_3 = [
    [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.6, 0.0, 0.0],
    [0.0, 0.0, 0.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.6, 0.0],
    [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.4, 0.6, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.6, 0.4, 0.0, 0.0, 0.0],
    [0.0, 0.6, 0.0, 0.0, 0.0, 0.0, 0.0, 0.4, 0.0, 0.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
]
# Images per class of MNIST's test set (LeCun et al. 1998).
MNIST_TEST = torch.tensor([980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def fresh(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- matrices


def test_symmetric_by_hand():
    by_hand = double([[0.7, 0.15, 0.15], [0.15, 0.7, 0.15], [0.15, 0.15, 0.7]])
    torch.testing.assert_close(noise.symmetric(0.3, 3), by_hand)


def test_asymmetric_by_hand():
    by_hand = double([[0.7, 0.0, 0.3], [0.0, 1.0, 0.0], [0.3, 0.0, 0.7]])
    torch.testing.assert_close(noise.asymmetric(0.3, {0: 2, 2: 0}, 3), by_hand)


def test_pair_flip_by_hand():
    by_hand = double([[0.7, 0.3, 0.0], [0.0, 0.7, 0.3], [0.3, 0.0, 0.7]])
    torch.testing.assert_close(noise.pair_flip(0.3, 3), by_hand)


ALL = {
    "symmetric": lambda rate: noise.symmetric(rate, 10),
    "pair-flip": lambda rate: noise.pair_flip(rate, 10),
} | {
    f"{name} {dataset}": lambda rate, paths=paths: noise.asymmetric(rate, paths, 10)
    for name, sets in PATHS.items()
    for dataset, paths in sets.items()
}


@pytest.mark.parametrize("kind", ALL)
def test_rows_sum_to_one_and_rate_0_changes_nothing(kind):
    for rate in (0.0, 0.2, 1 / 3, 0.6, 1.0):
        transition = ALL[kind](rate)
        assert transition.dtype == torch.float64
        torch.testing.assert_close(transition.sum(1), torch.ones(10).double())
    assert torch.equal(ALL[kind](0.0), torch.eye(10).double())


@pytest.mark.parametrize("kind", ALL)
def test_rate_1_changes_every_label_that_the_noise_touches(kind):
    before, after = ALL[kind](0.5).diagonal(), ALL[kind](1.0).diagonal()
    assert torch.equal(after, torch.where(before < 1, 0.0, 1.0).double())


def test_swap_is_the_matrix_of_figure_3():
    paths = PATHS["asymmetric-swap"]["mnist"]
    torch.testing.assert_close(noise.asymmetric(0.6, paths, 10), double(FIGURE_3))


def test_asymmetric_mnist_is_the_text_of_ding():
    by_hand = double(FIGURE_3)
    by_hand[6] = torch.eye(10)[6]  # "5 -> 6": 6 stays
    paths = PATHS["asymmetric"]["mnist"]
    torch.testing.assert_close(noise.asymmetric(0.6, paths, 10), by_hand)
    assert PATHS["asymmetric"]["digits"] == PATHS["asymmetric"]["mnist"]


@pytest.mark.parametrize(
    ("dataset", "classes", "by_name"),
    [
        (
            "cifar10",
            "airplane automobile bird cat deer dog frog horse ship truck",
            "truck>automobile bird>airplane deer>horse cat>dog dog>cat",
        ),
        (
            "fashion-mnist",
            "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot",
            "boot>sneaker sneaker>sandal pullover>shirt coat>dress dress>coat",
        ),
    ],
)
def test_asymmetric_paths_by_class_name(dataset, classes, by_name):
    classes = classes.split()
    pairs = (pair.split(">") for pair in by_name.split())
    paths = {classes.index(source): classes.index(target) for source, target in pairs}
    assert PATHS["asymmetric"][dataset] == paths


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("rate", [0.2, 0.6])
def test_every_cell_is_drawn_as_often_as_T_says(kind, rate):
    transition, count = ALL[kind](rate), 1000
    labels = torch.arange(10).repeat_interleave(count)
    noisy = noise.corrupt(labels, transition, fresh())
    drawn = torch.zeros(10, 10).double()
    for true, given in zip(labels.tolist(), noisy.tolist(), strict=True):
        drawn[true, given] += 1
    # A binomial count strays from its mean by 5 standard deviations once in 10^6.
    spread = (count * transition * (1 - transition)).sqrt()
    assert ((drawn - count * transition).abs() <= 5 * spread).all()
    assert (drawn[transition == 0] == 0).all()
    changed = 1 - transition.diagonal().mean().item()
    error = math.sqrt(changed * (1 - changed) / len(labels))
    assert abs(noise.realised_rate(noisy, labels) - changed) < 4 * error


def test_rate_0_and_rate_1_are_exact():
    labels = torch.arange(3).repeat(1000)
    assert torch.equal(noise.corrupt(labels, noise.symmetric(0.0, 3), fresh()), labels)
    assert (noise.corrupt(labels, noise.symmetric(1.0, 3), fresh()) != labels).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 1e-9])
def test_no_label_of_probability_0_even_at_the_ends_of_the_scale(monkeypatch, uniform):
    # A row may miss 1 by up to 1e-6: what it misses belongs to no class.
    transition = double([[0.0, 0.3, 0.7 - 9e-7, 0.0]] * 4)
    draws = torch.full((4, 1), uniform, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *size, **options: draws)
    noisy = noise.corrupt(torch.arange(4), transition, fresh())
    assert noisy.tolist() == [1 if uniform == 0 else 2] * 4


def test_noise_depends_on_the_seed_alone():
    labels = torch.arange(10).repeat(50)
    transition = noise.symmetric(0.4, 10)
    first = noise.corrupt(labels, transition, fresh(1))
    torch.manual_seed(99)  # the global state plays no part
    state = torch.random.get_rng_state()
    assert torch.equal(noise.corrupt(labels, transition, fresh(1)), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(noise.corrupt(labels, transition, fresh(2)), first)
    assert torch.equal(labels, torch.arange(10).repeat(50))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "rate", [-0.1, 1.1, math.nan, math.inf, "0.2", None, True, [0.2]]
)
def test_bad_rate(rate):
    with pytest.raises(ValueError, match=r"noise_rate is .*number in \[0, 1\]"):
        noise.check_rate(rate)
    with pytest.raises(ValueError, match="noise_rate"):
        noise.symmetric(rate, 3)
    with pytest.raises(ValueError, match="noise_rate"):
        noise.asymmetric(rate, {0: 1}, 3)


@pytest.mark.parametrize("rate", [0, 0.5, 1])
def test_good_rate_comes_back_as_a_float(rate):
    assert noise.check_rate(rate) == rate
    assert type(noise.check_rate(rate)) is float


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0.5, 0.5], [0.5, 0.6]], "row 1 .*sum 1.1"),
        ([[0.5, 0.5], [0.5, 0.49999]], "row 1 "),
        ([[1.5, -0.5], [0.0, 1.0]], "row 0 "),
        ([[1.0, 0.0], [math.nan, 1.0]], "row 1 "),
        ([[0.5, 0.9], [0.5, 0.1]], "row 0 "),  # columns sum to 1, rows do not
        ([[1.0, 0.0]], r"\(1, 2\); it must be square"),
        ([1.0, 0.0], r"\(2,\); it must be square"),
    ],
)
def test_bad_transition(rows, message):
    with pytest.raises(ValueError, match=message):
        noise.check_transition(double(rows))
    with pytest.raises(ValueError, match=message):
        noise.corrupt(torch.tensor([0, 1]), double(rows), fresh())


def test_transition_for_another_number_of_classes():
    with pytest.raises(ValueError, match="for 3 classes, but the data have 10"):
        noise.check_transition(torch.eye(3), num_classes=10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], r"label 3 \(example 2\).*3 classes.*0 to 2"),
        ([0, -1, 1], r"label -1 \(example 1\)"),
        ([0.0, 1.0], "float32.*whole numbers"),
        ([[0, 1]], r"\(1, 2\)"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        noise.check_labels(torch.tensor(labels), 3)
    with pytest.raises(ValueError, match=message):
        noise.corrupt(torch.tensor(labels), torch.eye(3), fresh())


# ---------------------------------------------------------------- estimates


def test_estimate_against_a_loop(generator):
    true = torch.randint(5, (500,), generator=generator)
    noisy = torch.randint(5, (500,), generator=generator)
    by_loop = [
        [
            sum((t == i) & (n == j) for t, n in zip(true, noisy, strict=True))
            / sum(true == i)
            for j in range(5)
        ]
        for i in range(5)
    ]
    found = noise.estimate_transition(noisy, true, 5)
    torch.testing.assert_close(found, double(by_loop), rtol=0, atol=1e-6)


def test_estimate_of_an_absent_class_is_nan():
    found = noise.estimate_transition(torch.tensor([0, 2]), torch.tensor([0, 0]), 3)
    assert found[0].tolist() == [0.5, 0.0, 0.5]
    assert found[1:].isnan().all()


def test_realised_rate_by_hand():
    given, true = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 1])
    assert noise.realised_rate(given, true) == 0.5


def test_standard_error_by_hand():
    assert noise.standard_error(0.5, 100) == pytest.approx(0.05)


# ---------------------------------------------------------------- the ceiling


def ceiling(name, rate):
    transition = noise.asymmetric(rate, PATHS[name]["mnist"], 10)
    return noise.accuracy_ceiling(transition, MNIST_TEST / MNIST_TEST.sum())


def test_a_majority_swap_costs_fives_and_sixes():
    lost = (892 + 958) / 10_000
    assert ceiling("asymmetric-swap", 0.6) == pytest.approx(1 - lost)
    assert ceiling("asymmetric-swap", 0.6) == pytest.approx(0.815)
    assert ceiling("asymmetric-swap", 0.4) == pytest.approx(1.0)


def test_without_the_swap_nothing_is_lost():
    assert ceiling("asymmetric", 0.6) == pytest.approx(1.0)


def test_ceiling_by_hand():
    # Noisy shares 0.35 and 0.65: class 0 looks like 0 (0.7/0.35 > 0.3/0.65), and so on.
    transition = double([[0.7, 0.3], [0.0, 1.0]])
    assert noise.accuracy_ceiling(transition, double([0.5, 0.5])) == 1.0
    swapped = double([[0.4, 0.6], [0.6, 0.4]])
    assert noise.accuracy_ceiling(swapped, double([0.3, 0.7])) == 0.0


def test_ceiling_without_labels_of_a_class():
    with pytest.raises(ValueError, match="no label of class 0 is left"):
        noise.accuracy_ceiling(double([[0, 1], [0, 1]]), double([0.5, 0.5]))


# ---------------------------------------------------------------- Xiao's C and z


def pairs_of(counts):
    """Noisy and true labels that have these counts (noisy i, true j)."""
    i, j = counts.nonzero(as_tuple=True)
    times = counts[i, j]
    return i.repeat_interleave(times), j.repeat_interleave(times)


def best_by_brute_force(m, alpha):
    """max E of Eq. 10 over all 2^L assignments of one column's wrong labels."""
    best = -math.inf
    for t in itertools.product((0, 1), repeat=len(m)):
        confused = sum(n for n, random in zip(m, t, strict=True) if not random)
        energy = sum(
            n * (math.log(alpha) if random else math.log(n / confused))
            for n, random in zip(m, t, strict=True)
            if n
        )
        best = max(best, energy)
    return best


def tables(L):
    """Random counts: dense, sparse, with ties, and with empty columns."""
    generator = torch.Generator().manual_seed(L)
    for high, share in ((50, 1.0), (50, 0.4), (3, 1.0), (3, 0.5), (1000, 0.7)):
        counts = torch.randint(high + 1, (L, L), generator=generator)
        keep = torch.rand(L, L, generator=generator) < share
        yield counts * keep
        yield counts * keep * (torch.arange(L) != 1)  # true class 1 is never wrong
    yield torch.full((L, L), 4)


@pytest.mark.parametrize("L", [2, 3, 4, 5, 6])
def test_confusion_is_optimal_among_all_assignments(L):
    alpha = 1 / (L - 1)
    for counts in tables(L):
        wrong = counts.clone().fill_diagonal_(0)
        if not wrong.any():
            continue
        C = noise.estimate_confusion(*pairs_of(counts), L)
        assert torch.equal(noise.check_confusion(C, L), C)
        for j in range(L):
            m = [int(wrong[i, j]) for i in range(L) if i != j]
            column = [C[i, j].item() for i in range(L) if i != j]
            ours = sum(
                n * math.log(max(alpha, c)) for n, c in zip(m, column, strict=True) if n
            )
            assert ours == pytest.approx(best_by_brute_force(m, alpha), abs=1e-9)
            if any(m) and L > 2:  # Lemma 1, and Eq. 11: the more frequent, the larger
                assert all(c == 0 or c > alpha for c in column)
                ranked = sorted(zip(m, column, strict=True))
                assert [c for _, c in ranked] == sorted(column)


@pytest.mark.parametrize("L", [3, 6])
def test_noise_types_follow_theorem_2(L):
    for counts in tables(L):
        noisy, true = pairs_of(counts)
        C = noise.estimate_confusion(noisy, true, L)
        z = noise.noise_types(noisy, true, C)
        assert torch.equal(z == noise.NOISE_FREE, noisy == true)
        for n in (noisy != true).nonzero().flatten().tolist():
            confused = C[noisy[n], true[n]] > 1 / (L - 1)
            assert z[n] == (noise.CONFUSING if confused else noise.RANDOM)


def test_confusion_by_hand():
    """Wrong labels of true class 0, counted 8, 6, 1 of 7 classes; alpha is 1/6.

    E is 7 log 1/6 = -12.5 if one is confused, 8 log 8/14 + 6 log 6/14 + log 1/6 = -11.4
    if two are, 8 log 8/15 + 6 log 6/15 + log 1/15 = -13.2 if three are.
    """
    counts = torch.zeros(7, 7, dtype=torch.int64)
    counts[:4, 0] = torch.tensor([70, 8, 6, 1])
    C = noise.estimate_confusion(*pairs_of(counts), 7)
    assert C[:, 0].tolist() == pytest.approx([0, 8 / 14, 6 / 14, 0, 0, 0, 0])
    assert C[:, 1].tolist() == pytest.approx([1 / 6, 0, *[1 / 6] * 5])


def test_without_a_wrong_label_there_is_no_confusion():
    labels = torch.arange(5)
    assert noise.estimate_confusion(labels, labels, 5) is None
    z = noise.noise_types(labels, (labels + 1) % 5, None)
    assert (z == noise.RANDOM).all()


def confused_pairs(L, generator):
    """Pairs of which 30 % are confused, 70 to 30 with two classes, and 10 % random."""
    C = torch.zeros(L, L, dtype=torch.float64)
    for j in range(L):
        C[(j + 1) % L, j], C[(j + 2) % L, j] = 0.7, 0.3
    true = torch.randint(L, (200_000,), generator=generator)
    confused = noise.corrupt(true, C.T, generator)
    random = noise.corrupt(true, noise.symmetric(1.0, L), generator)
    kind = torch.rand(len(true), generator=generator)
    noisy = torch.where(kind < 0.6, true, torch.where(kind < 0.9, confused, random))
    return C, noisy, true


def test_confusion_recovers_what_generated_it(generator):
    C, noisy, true = confused_pairs(14, generator)
    found = noise.estimate_confusion(noisy, true, 14)
    assert (found - C).abs().max() < 0.03  # the random labels pull a little


def test_with_few_classes_the_rarer_confusion_counts_as_chance(generator):
    """0.7 log 0.7 + 0.3 log 0.3 < 0.3 log 1/5: Eq. 9 prefers one class of six."""
    C, noisy, true = confused_pairs(6, generator)
    found = noise.estimate_confusion(noisy, true, 6)
    assert torch.equal(found, (C == 0.7).double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda C: C[:2], "shape"),
        (lambda C: C + torch.eye(3) / 10, "diagonal"),
        (lambda C: C * 0.9, "column 0 sums to 0.9"),
        (lambda C: -C, "column"),
    ],
)
def test_a_confusion_that_is_none(change, message):
    C = (1 - torch.eye(3, dtype=torch.float64)) / 2
    assert torch.equal(noise.check_confusion(C, 3), C)
    with pytest.raises(ValueError, match=message):
        noise.check_confusion(change(C), 3)


# ---------------------------------------------------------------- noise with shape


def test_random_confusion_has_the_rate_and_differs_by_seed():
    first, second = (
        noise.random_confusion(0.3, 10, torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    for T in (first, second):
        noise.check_transition(T, 10)
        assert torch.allclose(T.diagonal(), torch.tensor(0.7, dtype=torch.float64))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_confusing_noise_has_its_rate_and_hits_ambiguous_images(rate, generator):
    labels = torch.randint(3, (6000,), generator=generator)
    spread = 40 * torch.randn(6000, generator=generator)
    pixels = (60.0 + 60 * labels + spread).clamp(0, 255).byte()
    noisy = noise.confuse(pixels.view(-1, 1, 1, 1), labels, rate, generator)
    wrong = noisy != labels
    error = noise.standard_error(rate, 6000)
    assert abs(wrong.double().mean().item() - rate) <= 4 * error + 1e-9
    if rate != 0.2:
        return
    means = torch.stack([pixels[labels == k].float().mean() for k in range(3)])
    to_other = (pixels[:, None] - means).abs()
    to_own = to_other[torch.arange(6000), labels].clone()
    to_other[torch.arange(6000), labels] = torch.inf
    margin = to_other.min(dim=1).values - to_own
    clear = margin > margin.median()
    for half, expected in ((~clear, 0.3), (clear, 0.1)):
        found = wrong[half].double().mean().item()
        assert abs(found - expected) <= 4 * noise.standard_error(expected, 3000)
    assert (noisy == to_other.argmin(dim=1))[wrong & ~clear].all()
    ahead = (noisy - labels)[wrong & clear] % 3
    found = (ahead == 1).double().mean().item()  # the other one is 2
    assert abs(found - 0.5) <= 4 * noise.standard_error(0.5, len(ahead))


# ---------------------------------------------------------------- T by anchor points


def calibrated(T, count, generator):
    """What a perfect network says: P(noisy label | x), of images more or less sure."""
    K = len(T)
    sure = torch.rand(count, 1, generator=generator, dtype=torch.float64) ** 0.1
    own = torch.nn.functional.one_hot(torch.arange(count) % K, K)
    other = torch.rand(count, K, generator=generator, dtype=torch.float64)
    truth = sure * own + (1 - sure) * other / other.sum(1, keepdim=True)
    return truth @ T


@pytest.mark.parametrize(
    "T",
    [
        noise.symmetric(0.2, 10),
        noise.symmetric(0.6, 10),
        noise.asymmetric(0.4, noise.PATHS["asymmetric"]["mnist"], 10),
        noise.pair_flip(0.45, 10),
    ],
)
def test_anchors_of_a_calibrated_network_give_t(T, generator):
    """Within 0.05 at the percentile of the paper, within 0.005 without any."""
    probs = calibrated(T, 20_000, generator)
    found = noise.anchor_transition(probs)
    torch.testing.assert_close(found.sum(1), torch.ones(10).double())
    assert (found - T).abs().max() < 0.05
    assert (noise.anchor_transition(probs, 100.0) - T).abs().max() < 0.005


def test_a_swap_of_the_majority_is_read_off_in_the_wrong_rows(generator):
    """At p = 0.6 the image that is most surely labelled 5 is a 6."""
    paths = noise.PATHS["asymmetric-swap"]["mnist"]
    T = noise.asymmetric(0.6, paths, 10)
    found = noise.anchor_transition(calibrated(T, 20_000, generator), 100.0)
    torch.testing.assert_close(found[5], T[6], atol=0.01, rtol=0)
    torch.testing.assert_close(found[6], T[5], atol=0.01, rtol=0)


def test_anchors_by_hand():
    probs = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.5, 0.5], [0.2, 0.8], [0.4, 0.6]])
    best = noise.anchor_transition(probs, 100.0)
    torch.testing.assert_close(best, probs[[0, 3]].double())
    # Of five, 75 % is the second from above.
    second = noise.anchor_transition(probs, 75.0)
    torch.testing.assert_close(second, probs[[1, 4]].double())
    with pytest.raises(ValueError, match=r"percentile is 101; it must be in \[0, 100"):
        noise.anchor_transition(probs, 101)


def test_an_outlier_does_not_become_an_anchor(generator):
    T = noise.symmetric(0.4, 10)
    probs = calibrated(T, 5_000, generator)
    probs[17] = torch.eye(10).double()[3]  # the network is sure of one label: by heart
    assert (noise.anchor_transition(probs, 100.0) - T).abs().max() > 0.3
    assert (noise.anchor_transition(probs) - T).abs().max() < 0.05


def test_inverse_and_a_matrix_that_has_none():
    T = noise.pair_flip(0.3, 5)
    torch.testing.assert_close(noise.inverse(T) @ T, torch.eye(5).double())
    with pytest.raises(ValueError, match="condition number inf, so that its inverse"):
        noise.inverse(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    # Infinite too, but some LAPACKs round it to 6e+16.
    with pytest.raises(ValueError, match=r"condition number (inf|[\d.]+e\+1[5-9])"):
        noise.inverse(torch.full((2, 2), 0.5))
    with pytest.raises(ValueError, match=r"condition number 2e\+07"):
        noise.inverse(noise.symmetric(0.5 - 2.5e-8, 2))
