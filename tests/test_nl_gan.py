"""The noisy-label game: losses by hand, who is trained when, and what it reads off."""

import math
import warnings

import pytest
import torch
from torch import nn

import tasks
from nlhelpers import experiments, training
from nlhelpers.gan import Players
from nlhelpers.methods import METHODS, nl_gan
from nlhelpers.methods.nl_gan import DISTANCES, Game, OneModeError, distance_of
from nlhelpers.specs import Spec
from nlhelpers.training import Auxiliary, Epoch

PI = [(0.85, 0.85), (0.7, 0.85), (0.6, 0.65), (1.0, 1.0)]
KNOWN = {"pi_P": 0.9, "pi_N": 0.8}


@pytest.fixture
def task(cpu):
    """Few digits of two classes, repeated, as a method sees them."""
    spec = Spec("nl-gan", **tasks.task("3 vs 5", (0.9, 0.8), 40), profile="smoke")
    return experiments.data_for(spec, cpu)[0]


@pytest.fixture
def game(task, seeded):
    return Game(Players(task.images), 1e-3, distance_of("cross-entropy"), 5.0, 0.5)


def run(task, setup, **settings):
    return list(METHODS["nl-gan"].run(task, setup, **settings))


def real(count=8):
    return torch.rand(count, 1, 8, 8) * 2 - 1


def z(count=8):
    return torch.rand(count, 100) * 2 - 1


def weights(module):
    return [value.detach().clone() for value in module.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------- losses


def logit(p):
    return torch.tensor(p, dtype=torch.float64).logit()


def test_cross_entropy_by_hand():
    H = distance_of("cross-entropy")
    answers = logit([0.2, 0.5])
    assert H(answers, 0.0).item() == pytest.approx(-(math.log(0.8) + math.log(0.5)) / 2)
    assert H(answers, 1.0).item() == pytest.approx(-(math.log(0.2) + math.log(0.5)) / 2)
    soft = -(0.3 * math.log(0.2) + 0.7 * math.log(0.8))
    assert H(logit([0.2]), 0.3).item() == pytest.approx(soft)


def test_squared_error_by_hand():
    found = distance_of("mse")(logit([0.2, 0.5]), 0.3).item()
    assert found == pytest.approx((0.1**2 + 0.2**2) / 2)


def test_the_three_losses_by_hand():
    H = distance_of("mse")
    a, b = logit([0.25]), logit([0.5])
    assert nl_gan.noisy_loss(a, b, H).item() == pytest.approx(0.25**2 + 0.5**2)
    assert nl_gan.adversarial_loss(a, b, H).item() == pytest.approx(0.75**2 + 0.5**2)
    found = nl_gan.generators_loss(a, b, (0.2, 0.9), H).item()
    assert found == pytest.approx(0.05**2 + 0.4**2)


def test_the_discriminators_loss_weighs_real_and_generated_images(game):
    game.alpha, game.beta = 3.0, 0.25
    x, made = real(), real()
    game.players.D.eval()
    on = game.players.D(x)[:4], game.players.D(x)[4:]
    of = game.players.D(made)[:4], game.players.D(made)[4:]
    noisy = nl_gan.noisy_loss(*on, game.H)
    adversarial = nl_gan.adversarial_loss(*of, game.H)
    expected = 3.0 * noisy + 0.25 * adversarial
    assert game.loss_D(x, made).item() == pytest.approx(expected.item(), rel=1e-5)
    assert game.loss_D(x, None).item() == pytest.approx(noisy.item(), rel=1e-5)


@pytest.mark.parametrize("pi", PI)
def test_deltas_are_shares_of_the_noisy_negatives(pi):
    """Eq. 3, by counting 10,000 images of either noisy label."""
    pi_P, pi_N = pi
    P = {"P_hat": pi_P * 1e4, "N_hat": (1 - pi_N) * 1e4}
    N = {"P_hat": (1 - pi_P) * 1e4, "N_hat": pi_N * 1e4}
    expected = [side["N_hat"] / sum(side.values()) for side in (P, N)]
    assert nl_gan.deltas(*pi) == pytest.approx(expected)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("pi", PI)
def test_the_noisy_loss_is_a_clean_loss_with_soft_labels(pi, distance, generator):
    """Eq. 2 equals Eq. 3: to the last digit, or for squared errors up to a constant."""
    (pi_P, pi_N), H = pi, distance_of(distance)
    on_P, on_N = (
        torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    # Expectations over mixtures are mixtures of expectations.
    noisy = pi_P * H(on_P, 0.0) + (1 - pi_P) * H(on_N, 0.0)
    noisy = noisy + pi_N * H(on_N, 1.0) + (1 - pi_N) * H(on_P, 1.0)
    delta_P, delta_N = nl_gan.deltas(pi_P, pi_N)
    clean = (pi_P + 1 - pi_N) * H(on_P, delta_P) + (1 - pi_P + pi_N) * H(on_N, delta_N)
    if distance == "cross-entropy":
        assert noisy.item() == pytest.approx(clean.item(), abs=1e-12)
    slopes = [torch.autograd.grad(x, (on_P, on_N)) for x in (noisy, clean)]
    for first, second in zip(*slopes, strict=True):
        assert torch.allclose(first, second, atol=1e-12)


# ---------------------------------------------------------------- the game


def test_each_step_trains_whom_it_should(game):
    players = game.players
    before = {name: weights(p) for name, p in players.named_children()}
    game.step(real(), z(), None)
    assert not same(weights(players.D), before["D"])
    assert same(weights(players.G_P), before["G_P"])
    assert same(weights(players.G_N), before["G_N"])

    D_step, G_step = [], []
    steps = {"D": (game.adam_D, D_step), "G": (game.adam_G, G_step)}
    for optimiser, seen in steps.values():
        optimiser.register_step_pre_hook(
            lambda *_, seen=seen: seen.append(
                {
                    name: any(
                        p.grad is not None and bool(p.grad.any())
                        for p in part.parameters()
                    )
                    for name, part in players.named_children()
                }
            )
        )
    game.step(real(), z(), (0.2, 0.8))
    assert D_step == [{"D": True, "G_P": False, "G_N": False}]
    assert G_step == [{"D": False, "G_P": True, "G_N": True}]


def test_each_generator_has_a_loss_of_its_own(game):
    """G_N steps the same whatever G_P is told."""

    def slopes(delta_P):
        torch.manual_seed(0)
        game.adam_G.zero_grad()
        loss, _ = game.loss_G(noise, (delta_P, 0.8))
        loss.backward()
        return [[p.grad.clone() for p in G.parameters()] for G in makers]

    noise, makers = z(), (game.players.G_P, game.players.G_N)
    with nl_gan.still(game.players.D):
        first, second = slopes(0.2), slopes(0.4)
    assert not same(first[0], second[0])
    assert same(first[1], second[1])


def test_the_losses_are_whole_graphs_to_the_compiler(game):
    """As a GPU has them, where a step with both is recorded."""
    torch.compiler.reset()
    x, noise = real(), z()
    game.players.G_P.eval(), game.players.G_N.eval()
    with nl_gan.still(game.players.D):
        plain, made = game.loss_G(noise, (0.2, 0.8))
        whole = torch.compile(game.loss_G, backend="aot_eager", fullgraph=True)
        assert whole(noise, (0.2, 0.8))[0].item() == pytest.approx(plain.item())
    whole = torch.compile(game.loss_D, backend="aot_eager", fullgraph=True)
    game.players.D.eval()
    for fake in (made, None):
        expected = game.loss_D(x, fake).item()
        assert whole(x, fake).item() == pytest.approx(expected, rel=1e-5)


def test_generators_make_what_their_half_of_z_says(game):
    players, noise = game.players.eval(), z()
    _, made = game.loss_G(noise, (0.2, 0.8))
    assert torch.allclose(made[:4], players.G_P(noise[:4]), atol=1e-6)
    assert torch.allclose(made[4:], players.G_N(noise[4:]), atol=1e-6)


def test_dropout_is_on_for_D_and_off_for_the_generators(game):
    states = []
    dropout = next(x for x in game.players.D.modules() if isinstance(x, nn.Dropout))
    dropout.register_forward_hook(
        lambda layer, given, out: states.append((layer.training, len(out)))
    )
    game.step(real(), z(), (0.2, 0.8))
    assert states == [(False, 8), (True, 16)]  # and D sees all it sees in one pass
    assert game.players.D.training
    assert all(p.requires_grad for p in game.players.D.parameters())


@pytest.mark.parametrize(
    ("spectral", "kinds"),
    [("convolutions", nn.Conv2d), ("all", nn.Conv2d | nn.Linear)],
)
def test_spectral_norms_stay_at_most_one(spectral, kinds, task, seeded):
    players = Players(task.images, spectral)
    game = Game(players, 1e-3, distance_of("cross-entropy"), 5.0, 0.5)
    for _ in range(30):
        game.step(real(), z(), (0.2, 0.8))
    found = [layer for layer in players.D.modules() if isinstance(layer, kinds)]
    assert len(found) == 2 * (1 + (spectral == "all"))
    for layer in found:
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
        assert 0.5 < largest.item() < 1.1


def test_generators_move_towards_their_target(task, seeded):
    """Against a D that stands still, its answers come to delta."""
    game = Game(Players(task.images), 5e-3, distance_of("cross-entropy"), 5.0, 0.5)
    last = [x for x in game.players.D.modules() if isinstance(x, nn.Linear)][-1]
    nn.init.normal_(last.weight)  # so that D has something to say
    with nl_gan.still(game.players.D):
        for _ in range(60):
            loss, _ = game.loss_G(z(32), (0.3, 0.7))
            nl_gan.descend(game.adam_G, loss)
        _, made = game.loss_G(z(32), (0.3, 0.7))
        answers = game.players.D(made).sigmoid()
    assert answers[:16].mean().item() == pytest.approx(0.3, abs=0.05)
    assert answers[16:].mean().item() == pytest.approx(0.7, abs=0.05)


def test_settings_reach_the_game(task, make_setup, monkeypatch):
    games, settings = [], {"alpha": 3.0, "beta": 0.25, "distance": "mse"}
    monkeypatch.setattr(nl_gan, "play", lambda game, *rest: games.append(game) or ())
    run(task, make_setup(epochs=1, learning_rate=0.01), **KNOWN, **settings)
    (game,) = games
    assert (game.alpha, game.beta) == (3.0, 0.25)
    assert game.H is distance_of("mse")
    for adam in (game.adam_D, game.adam_G):  # twice the rate, with DCGAN's betas
        (options,) = adam.param_groups
        assert (options["lr"], options["betas"]) == (0.02, (0.5, 0.999))


def test_half_of_every_batch_is_labelled_positive(generator):
    labels = (torch.arange(100) % 4 > 0).long()  # 25 and 75
    batches = list(nl_gan.halves(labels, 20, generator))
    assert len(batches) == 5
    for index in batches:
        assert labels[index].tolist() == [0] * 10 + [1] * 10
    used = torch.cat(batches).bincount(minlength=100)
    assert used[labels == 0].tolist() == [2] * 25
    assert used[labels == 1].max() == 1


def test_the_classifier_learns_from_made_up_images_alone(task, make_setup, seeded):
    setup = make_setup(epochs=3, batch_size=32)
    events = run(task, setup, **KNOWN, game_epochs=2 / 3)
    stages = [
        (type(e), (e.epoch if isinstance(e, Auxiliary) else e).stage) for e in events
    ]
    assert stages == [(Auxiliary, "game")] * 2 + [(Epoch, "training")] * 3
    images, labels = nl_gan.made_up(events[0].epoch.model, 10, setup.generator)
    assert images.shape == (10, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0] * 5 + [1] * 5


def test_made_up_images_carry_their_makers_label(task, game, generator):
    players = game.players
    for G, value in ((players.G_P, -10.0), (players.G_N, 10.0)):
        last = [x for x in G.modules() if isinstance(x, nn.ConvTranspose2d)][-1]
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, value)
    images, labels = nl_gan.made_up(players, 6, generator)
    assert images.flatten(1).amax(dim=1).tolist() == [0] * 3 + [255] * 3
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_the_same_seed_gives_the_same_bits(task, make_setup, cpu):
    def losses():
        with training.seeded(5, cpu):
            return [
                (e.epoch if isinstance(e, Auxiliary) else e).loss
                for e in run(task, make_setup(seed=5), **KNOWN, game_epochs=1.0)
            ]

    assert losses() == losses()


# ---------------------------------------------------------------- reading the deltas


def answers_of(delta_P, delta_N, spread, generator, count=1000):
    noise = spread * torch.randn(2 * count, generator=generator)
    return (
        torch.cat([torch.full((count,), delta_P), torch.full((count,), delta_N)])
        + noise
    ).clamp(0, 1)


@pytest.mark.parametrize("pi", PI[:3])
def test_a_mixture_finds_the_deltas(pi, generator):
    delta = nl_gan.deltas(*pi)
    shuffled = torch.randperm(2000, generator=generator)
    answers = answers_of(*delta, 0.07, generator)[shuffled]
    assert nl_gan.estimated_deltas(answers) == pytest.approx(delta, abs=0.05)


def test_one_mode_is_no_answer(generator):
    answers = 0.5 + 0.1 * torch.randn(2000, generator=generator)
    with pytest.raises(OneModeError, match="have one mode: two Gaussians"):
        nl_gan.estimated_deltas(answers)
    with pytest.warns(UserWarning, match="known ones are used"):
        assert nl_gan.read_off(answers, (0.7, 0.85)) == nl_gan.deltas(0.7, 0.85)
    with pytest.raises(OneModeError):
        nl_gan.read_off(answers, None)


def test_what_is_found_goes_before_what_is_known(generator):
    answers = answers_of(0.3, 0.9, 0.05, generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = nl_gan.read_off(answers, (0.6, 0.65))
    assert found == pytest.approx((0.3, 0.9), abs=0.01)


@pytest.mark.parametrize("settings", [{}, {**KNOWN, "estimate": True}])
def test_D_plays_alone_before_it_is_asked(
    settings, task, make_setup, seeded, monkeypatch
):
    asked, says = [], torch.tensor([0.75, 0.25])  # of P_hat and N_hat
    monkeypatch.setattr(
        nl_gan, "estimated_deltas", lambda answers: asked.append(answers) or (0.2, 0.8)
    )
    monkeypatch.setattr(training, "predict", lambda D, x: says.expand(len(x), 2))
    events = run(task, make_setup(), **settings, warm_up=1.5, game_epochs=0.5)
    stages = [e.epoch.stage for e in events if isinstance(e, Auxiliary)]
    assert stages == ["warm-up"] * 3 + ["game"]
    (answers,) = asked
    assert answers.tolist() == [0.25] * nl_gan.ASKED


@pytest.mark.parametrize("bf16", [False, True])
def test_a_blank_discriminator_stops_the_run(
    bf16, task, make_setup, seeded, monkeypatch
):
    """Answers rounded to a few values must not look like that many modes."""
    monkeypatch.setattr(training, "cpu_has_bf16", lambda: bf16)
    with pytest.raises(OneModeError):
        run(task, make_setup(learning_rate=0.0), warm_up=0.5)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pi_P": 0.5, "pi_N": 0.4}, "they say nothing"),
        ({"pi_P": 0.9}, "two numbers"),
        ({"pi_P": 1.2, "pi_N": 0.9}, "pi_P is 1.2"),
        ({**KNOWN, "distance": "hinge"}, "distance is 'hinge'; allowed are cross-ent"),
        ({**KNOWN, "spectral": "none"}, "spectral is 'none'; allowed are conv.*, all"),
        ({**KNOWN, "alpha": -1.0}, "alpha is -1.0; it must be 0 or more"),
        ({**KNOWN, "beta": math.inf}, "beta is inf"),
        ({**KNOWN, "game_epochs": math.nan}, "game_epochs is nan"),
        ({**KNOWN, "warm_up": -0.1}, "warm_up is -0.1"),
    ],
)
def test_bad_settings(settings, message, task, make_setup):
    with pytest.raises(ValueError, match=message):
        run(task, make_setup(), **settings)


def test_more_than_two_classes(prepared, make_setup):
    with pytest.raises(ValueError, match="the data have 10 classes"):
        run(prepared[0], make_setup(), **KNOWN)
