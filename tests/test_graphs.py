"""Steps as one graph: recorded once, replayed, and nothing else than the step itself.

A GPU's graph is imitated by one of torch.fx, which holds the same: operations and the
tensors that they use, of a step from the forward pass to the update.
"""

import functools

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from nlhelpers import batches, experiments, graphs, losses, training
from test_methods import RUNS, spec_of
from test_training import GPU


def imitation(whole, inputs):
    """`graphs.record` without a GPU; recording does it, the next call does not."""
    done = []

    def noted(*given):
        done[:] = [whole(*given)]
        return done[0]

    graph = make_fx(noted)(*inputs)
    recorded = done[:]

    def replay(*given):
        if recorded:
            return recorded.pop().clone()
        with torch.no_grad():
            return graph(*given).clone()

    return replay


def one_hot(labels, num_classes):
    """Without the look at the labels that torch's takes on a CPU, and not on a GPU."""
    return (labels[..., None] == torch.arange(num_classes)).long()


@pytest.fixture
def recorded(monkeypatch):
    """Training as on a GPU; how many steps have been recorded is its length."""
    made = []

    def record(whole, inputs):
        made.append(imitation(whole, inputs))
        return made[-1]

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "used_on", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda step: step)
    monkeypatch.setattr(nn.functional, "one_hot", one_hot)
    return made


@pytest.mark.parametrize("run", RUNS)
def test_a_replayed_step_does_what_a_step_does(run, cpu, request):
    """Nothing that a method's step reads, but for tensors, changes within an epoch."""
    plain = experiments.run(spec_of(run), cpu)
    made = request.getfixturevalue("recorded")
    replayed = experiments.run(spec_of(run), cpu)
    assert made
    for name in ("loss", "test_accuracy", "val_accuracy", "learning_rate", "images"):
        assert replayed["history"][name] == plain["history"][name], name


@pytest.mark.parametrize("optimiser", ["sgd", "adagrad", "adam"])
def test_a_falling_rate_is_recorded_anew(optimiser, prepared, make_setup, request):
    """It is a number of the graph, not a tensor."""
    seen, _ = prepared

    def weights():
        setup = make_setup(epochs=3, optimiser=optimiser, falls_after=[1], factor=0.1)
        with training.seeded(0, seen.labels.device):
            model = setup.build(seen)
            for _ in epochs_of(model, seen, setup):
                pass
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    plain = weights()
    made = request.getfixturevalue("recorded")
    assert torch.equal(weights(), plain)
    assert len(made) == 3  # one per epoch


def epochs_of(model, seen, setup, step=None):
    def mean_loss(model, index, images):
        return losses.cross_entropy(model(images), seen.labels[index]).mean()

    return training.fit(
        model,
        seen.images,
        lambda: batches.uniform(len(seen.labels), 32, setup.generator),
        step or mean_loss,
        setup,
        lambda model: 0.0,
        stage="test",
    )


def test_the_imitation_sees_a_step_that_counts(prepared, make_setup, recorded):
    """What changes with every step, and is no tensor, stays as it was recorded."""
    calls = []

    def counting(model, index, images):
        calls.append(index)
        return model(images).square().mean() * 0 + len(calls)

    seen, _ = prepared
    setup = make_setup(epochs=1)
    (epoch,) = epochs_of(setup.build(seen), seen, setup, counting)
    count = len(seen.labels) // 32
    assert count > 3
    assert len(calls) == 2
    assert epoch.loss == pytest.approx((1 + 2 * (count - 1)) / count)


def test_the_first_call_is_a_step_and_the_second_recorded(monkeypatch):
    done = []

    def whole(x):
        done.append(("step", x.tolist()))
        return x.sum()

    def record(whole, inputs):
        done.append(("record", inputs[0].tolist()))
        return lambda x: done.append(("replay", x.tolist())) or x.sum()

    monkeypatch.setattr(graphs, "record", record)
    take = graphs.Recorded(whole)
    for values in ([1, 2], [3, 4], [5, 6], [7], [8, 9]):
        assert take(torch.tensor(values)) == sum(values)
    take.anew()
    assert take(torch.tensor([0, 1])) == 1
    assert done == [
        ("step", [1, 2]),
        ("record", [3, 4]),
        ("replay", [3, 4]),
        ("replay", [5, 6]),
        ("step", [7]),  # of another shape
        ("replay", [8, 9]),
        ("step", [0, 1]),
    ]


def test_a_gpu_records_unless_several_processes_train(monkeypatch):
    @functools.wraps(training.fit)
    def plain(model, images, *rest, **options):
        return "plain"

    fit = training.on_its_device(plain)
    monkeypatch.setattr(training, "fit_by_graphs", lambda *given, **options: "graphs")
    assert fit(None, torch.zeros(1)) == "plain"
    with torch.device("meta"):
        images = torch.zeros(1)
    on_gpu = type("Images", (), {"device": torch.device("cuda")})()
    assert fit(None, images) == "plain"
    assert fit(None, on_gpu, stage="test") == "graphs"
    monkeypatch.setattr(graphs.distributed, "is_initialized", lambda: True)
    assert fit(None, on_gpu) == "plain"


def test_a_record_of_a_gpu_depends_on_what_only_a_gpu_runs(monkeypatch, cpu):
    record = experiments.run(spec_of("cross-entropy"), cpu)
    spec = experiments.spec_of(record)
    on_gpu = record | {"threads": None, "source": experiments.source(spec, "cuda")}
    assert record["source"] == experiments.source(spec) != on_gpu["source"]
    assert experiments.is_current(record)
    assert experiments.is_current(on_gpu)
    assert not experiments.is_current(record | {"threads": None})
    assert not experiments.is_current(on_gpu | {"threads": 2})


@GPU
@pytest.mark.parametrize("optimiser", ["sgd", "adagrad", "adam"])
def test_a_graph_of_a_gpu_against_the_plain_loop(optimiser):
    gpu = torch.device("cuda")
    seen, _ = experiments.prepare(spec_of("cross-entropy"), gpu)
    found = []
    for loop in (training.fit_by_graphs, training.fit.__wrapped__):
        with training.seeded(0, gpu) as generator:
            recipe = training.Recipe(3, batch_size=32, optimiser=optimiser, patience=1)
            setup = training.Setup("mlp", recipe, generator)
            model = setup.build(seen, dropout=0.0)  # which draws other numbers
            epochs = loop(
                model,
                seen.images,
                lambda setup=setup: batches.uniform(540, 32, setup.generator),
                lambda model, index, images: losses.cross_entropy(
                    model(images), seen.labels[index]
                ).mean(),
                setup,
                lambda model: 0.0,
                stage="test",
            )
            found.append([epoch.loss for epoch in epochs])
    assert found[0] == pytest.approx(found[1], rel=1e-2)  # in bfloat16
