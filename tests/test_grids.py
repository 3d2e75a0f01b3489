"""Grids go on where they were killed, and no record is lost or repeated."""

import contextlib
import gc
import inspect
import json
import multiprocessing
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import types

import distributed
import pytest
import torch

from nlhelpers import experiments, grids, losses, records, sources
from nlhelpers.data import DataError
from nlhelpers.grids import GridError, grid, recorded, run_all
from nlhelpers.specs import Spec

SMOKE = Spec(profile="smoke")
METHODS = ["cross-entropy", "improved-baseline", "two-stage"]
AT_START = dict(os.environ)


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


def test_grid_is_every_combination_the_last_fastest():
    specs = grid(SMOKE, seed=[0, 1], noise_rate=[0.1, 0.2, 0.3])
    found = [(spec.seed, spec.noise_rate) for spec in specs]
    assert found == [(0, 0.1), (0, 0.2), (0, 0.3), (1, 0.1), (1, 0.2), (1, 0.3)]
    assert all(spec.profile == "smoke" for spec in specs)
    assert grid(SMOKE) == [SMOKE]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs.jsonl"


def forbid_runs(monkeypatch):
    monkeypatch.setattr(
        experiments, "run", lambda spec, *a, **k: pytest.fail(f"ran {spec}")
    )


def test_recorded_runs_are_skipped(path, cpu, monkeypatch, capsys):
    specs = grid(SMOKE, seed=range(3))
    first = run_all(specs[1:], path, cpu)
    before = path.read_bytes()
    everything = run_all(specs, path, cpu)
    assert path.read_bytes().startswith(before)
    assert len(lines(path)) == 3
    assert [r["spec"]["seed"] for r in everything] == [0, 1, 2]
    assert everything[1:] == first
    assert "2 of 3 runs are recorded" in capsys.readouterr().out
    forbid_runs(monkeypatch)
    assert run_all(specs, path, cpu) == everything


def test_a_run_named_twice_runs_once(path, cpu):
    found = run_all([SMOKE, SMOKE, Spec(profile="smoke", model="mlp")], path, cpu)
    assert len(found) == 3
    assert len(lines(path)) == 1


def test_records_by_other_code_are_run_again_and_stay(path, cpu):
    (record,) = run_all([SMOKE], path, cpu)
    older = json.dumps(record | {"source": "0" * 12}).encode() + b"\n"
    changed = record | {"recipe": record["recipe"] | {"epochs": 7}}
    shorter = json.dumps(changed).encode() + b"\n"
    unknown = record | {"spec": record["spec"] | {"method": "forgotten"}}
    newer = json.dumps(unknown).encode() + b"\n"
    path.write_bytes(older + shorter + newer)
    assert recorded(path) == {}
    run_all([SMOKE], path, cpu)
    assert lines(path)[:3] == [older, shorter, newer]
    assert len(lines(path)) == 4
    assert list(recorded(path)) == [SMOKE]


def test_the_time_budget_stops_between_runs(path, cpu, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 60))  # a minute passes at every look
    monkeypatch.setattr(experiments, "run", lambda spec, *a, **k: fake_record(spec))
    patched = type("clock", (), {"perf_counter": lambda: next(clock)})
    monkeypatch.setattr(grids, "time", patched)
    specs = grid(SMOKE, seed=range(10))
    found = run_all(specs, path, cpu, time_budget=150)
    assert [r["spec"]["seed"] for r in found] == [0, 1]
    assert "time budget is spent" in "".join(capsys.readouterr())
    assert len(run_all(specs, path, cpu)) == 10  # goes on, and needs no budget
    assert len(lines(path)) == 10


def fake_record(spec):
    return {
        "spec": spec.as_dict(),
        "recipe": spec.recipe.as_dict(),
        "source": experiments.source(spec),
    }


@pytest.fixture
def diverging(monkeypatch):
    """The second stage of the two-stage method has no finite loss."""
    consistency = losses.consistency
    with monkeypatch.context() as patched:
        patched.setattr(
            losses, "consistency", lambda *given: consistency(*given) * float("nan")
        )
        yield patched
    records.source_hash.cache_clear()  # the patched loss has another


TRIO = grid(SMOKE, method=["cross-entropy", "two-stage", "improved-baseline"])
WHY = r"nan at epoch 1, step 1 of .*stage 2.*"


def test_a_diverging_run_does_not_stop_the_others(path, cpu, diverging, capsys):
    with pytest.raises(GridError, match=f"1 of 3 runs failed.* two-stage, .*{WHY}"):
        run_all(TRIO, path, cpu)
    assert "stopped: two-stage, digits" in "".join(capsys.readouterr())
    assert list(recorded(path)) == TRIO


def test_what_stopped_is_recorded_and_not_tried_again(
    path, cpu, diverging, monkeypatch
):
    once = "; .*runs.jsonl has a line for it: delete that to try the run again"
    with pytest.raises(GridError, match=WHY + once):
        run_all(TRIO[1:2], path, cpu)
    (record,) = records.read(path)
    assert record["stopped"].startswith("the loss is nan at epoch 1")
    assert record["spec"]["method"] == "two-stage"
    assert record["seconds"] > 0
    assert experiments.is_current(record)
    assert experiments.stopped([record]) == [record]
    assert experiments.latest([record]) == []
    forbid_runs(monkeypatch)
    with pytest.raises(GridError, match=WHY + once):
        run_all(TRIO[1:2], path, cpu)
    assert records.read(path) == [record]


def test_what_stopped_is_tried_again_by_other_code(path, cpu, diverging):
    with pytest.raises(GridError, match="1 of 3 runs failed"):
        run_all(TRIO, path, cpu)
    text = path.read_text().splitlines()
    (stopped,) = (line for line in text if '"stopped"' in line)
    older = json.loads(stopped) | {"source": "0" * 12}
    path.write_text("".join(f"{line}\n" for line in text if line != stopped))
    records.append(path, older)
    diverging.undo()
    found = run_all(TRIO, path, cpu)
    assert [Spec(**record["spec"]) for record in found] == TRIO
    assert len(lines(path)) == 4
    assert experiments.stopped(records.read(path)) == []  # today's code counts


def test_what_is_refused_leaves_no_record(path, cpu):
    wrong = Spec("two-stage", profile="smoke", settings={"threshold": 1.5})
    with pytest.raises(ValueError, match=r"^threshold is 1\.5; it must be"):
        run_all([wrong], path, cpu)
    with pytest.raises(GridError, match=r"1 of 2 runs failed.*threshold is 1\.5"):
        run_all([SMOKE, wrong], path, cpu)
    assert list(recorded(path)) == [SMOKE]


def test_a_singular_known_t_is_refused(path, cpu):
    """What a method says of T before it trains is no beginning of a training."""
    wrong = Spec(
        "backward",
        noise="pair-flip",
        noise_rate=0.5,
        profile="smoke",
        settings={"T": "known"},
    )
    with pytest.raises(ValueError, match=r"^T has the condition number"):
        run_all([wrong], path, cpu)
    assert records.read(path) == []


def test_a_missing_data_set_stops_at_once(path, cpu, monkeypatch):
    calls = []

    def no_data(spec, device, **options):
        calls.append(spec)
        raise DataError("mnist is not there")

    monkeypatch.setattr(experiments, "run", no_data)
    with pytest.raises(DataError, match="mnist is not there"):
        run_all(grid(SMOKE, seed=range(3)), path, cpu)
    assert len(calls) == 1


def test_the_bar_corrects_what_a_run_was_expected_to_take(path, cpu, capsys):
    """A known T saves one of the two trainings that forward correction has."""
    spec = Spec("forward", profile="smoke", settings={"T": "known"})
    assert grids.expected_epochs(spec) == 4
    run_all([spec], path, cpu)
    shown = capsys.readouterr().err
    assert "0/4" in shown
    assert "2/2" in shown


def test_a_damaged_file_or_folder_stops_before_training(path, cpu, monkeypatch):
    forbid_runs(monkeypatch)
    path.write_text('{"spec": {}, "half')
    with pytest.raises(records.RecordError, match="line 1 is cut off"):
        run_all([SMOKE], path, cpu)
    with pytest.raises(records.RecordError, match="cannot write records"):
        run_all([SMOKE], path / "below" / "a file.jsonl", cpu)
    assert path.read_text() == '{"spec": {}, "half'


def test_a_disk_that_fills_up_keeps_what_was_recorded(path, cpu, monkeypatch):
    run_all([SMOKE], path, cpu)
    before = path.read_bytes()
    write = os.write

    def write_a_bit(file, line):
        return write(file, line[:100])

    monkeypatch.setattr(os, "write", write_a_bit)
    with pytest.raises(records.RecordError, match="no space left"):
        run_all(grid(SMOKE, seed=range(2)), path, cpu)
    assert path.read_bytes() == before


# ---------------------------------------------------------------- SIGKILL


def command(path, seeds):
    call = [sys.executable, "-m", "nlhelpers", "run", "--profile", "smoke"]
    call += ["--method", *METHODS, "--device", "cpu", "--records", str(path)]
    return [*call, "--seeds", *map(str, range(seeds))]


def environment():
    paths = [records.PACKAGE.parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def wait_for_lines(path, count, process):
    for _ in range(1200):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, "the grid ended before it could be killed"
        time.sleep(0.05)
    pytest.fail(f"no {count} records within a minute")


def test_a_killed_grid_goes_on_without_losing_or_repeating_a_record(path):
    seeds = 6
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command(path, seeds), stdout=quiet, stderr=quiet, env=environment()
    ) as process:
        wait_for_lines(path, 3, process)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = path.read_bytes()
    recorded = before.count(b"\n")
    assert 3 <= recorded < seeds * len(METHODS)
    assert before.endswith(b"\n")

    again = subprocess.run(
        command(path, seeds), capture_output=True, text=True, env=environment()
    )
    assert again.returncode == 0, again.stderr
    assert f"{recorded} of {seeds * len(METHODS)} runs are recorded" in again.stdout
    assert path.read_bytes().startswith(before)
    found = [Spec(**record["spec"]) for record in records.read(path)]
    wanted = grid(SMOKE, seed=range(seeds), method=METHODS)
    assert found == wanted  # each exactly once, in the grid's order


def test_code_that_changes_under_a_grid_is_not_what_its_records_name(
    path, cpu, monkeypatch
):
    specs = grid(SMOKE, method=["cross-entropy", "two-stage"])
    expected = [experiments.source(spec) for spec in specs]
    sources.parsed.cache_clear()
    records.source_hash.cache_clear()
    run = experiments.run

    def run_and_edit(*given, **options):
        monkeypatch.setattr(inspect, "getsource", lambda thing: "def other(): pass")
        return run(*given, **options)

    monkeypatch.setattr(experiments, "run", run_and_edit)
    assert [record["source"] for record in run_all(specs, path, cpu)] == expected


# ---------------------------------------------------------------- workers


@pytest.fixture(scope="module")
def client():
    """Two workers, while another grid of this machine has its own.

    Whatever the environment says, they share the threads of this process.
    """
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        with contextlib.suppress(OSError):  # somebody has Dask's usual port already
            stack.enter_context(socket.create_server(("", 8787)))
        yield stack.enter_context(grids.workers(2, None))


def test_workers_return_the_same_numbers(path, cpu, client, capsys):
    specs = grid(SMOKE, seed=range(2), method=METHODS)
    found = run_all(specs, path, cpu, client=client)
    assert "0 of 6 runs are recorded" in capsys.readouterr().out
    assert [Spec(**record["spec"]) for record in found] == specs
    assert len(lines(path)) == 6
    assert set(recorded(path)) == set(specs)
    by_hand = experiments.run(specs[1], cpu)
    assert found[1]["history"]["test_accuracy"] == by_hand["history"]["test_accuracy"]
    assert {record["threads"] for record in found} == {
        max(1, torch.get_num_threads() // 2)
    }
    before = path.read_bytes()
    assert run_all(specs, path, cpu, client=client) == found  # nothing is left to do
    assert path.read_bytes() == before


def test_a_failure_on_a_worker_does_not_stop_the_others(path, cpu, client):
    wrong = Spec("two-stage", profile="smoke", settings={"threshold": 1.5})
    with pytest.raises(GridError, match=r"1 of 3 runs failed.*threshold is 1\.5"):
        run_all([SMOKE, wrong, *grid(SMOKE, seed=[1])], path, cpu, client=client)
    assert len(lines(path)) == 2


class Bar:
    """What `on_workers` does to a progress bar, each time with n and the total."""

    def __init__(self, total):
        self.n, self.total, self.seen = 0, total, []

    def update(self):
        self.n += 1

    def set_description(self, text):
        self.seen.append((text, self.n, self.total))


def test_the_epochs_of_workers_move_the_bar(cpu, client):
    """A known T saves one of the two trainings that forward correction has."""
    longer = Spec("forward", profile="smoke", settings={"T": "known"})
    specs = [longer, *grid(SMOKE, seed=range(2))]
    bar = Bar(sum(map(grids.expected_epochs, specs)))
    assert bar.total == 4 + 2 + 2
    outcomes = grids.on_workers(specs, client, cpu, bar, lambda: True)
    assert [spec in specs for spec, _ in outcomes] == [True] * 3
    assert [text for text, _, _ in bar.seen] == [f"{n} at once" for n in (2, 2, 1, 0)]
    assert bar.seen[0][1:] == (0, 8)
    assert bar.seen[-1][1:] == (6, 6)


def test_workers_have_numbers_for_the_gpus_of_a_machine(client):
    names = client.run(lambda dask_worker: dask_worker.name).values()
    assert sorted(names) == [0, 1]


def test_workers_are_left_undisturbed(client):
    def surroundings():
        import dask

        return [dask.config.get(name) for name in grids.UNDISTURBED], dict(os.environ)

    for settings, environment in client.run(surroundings).values():
        assert settings == list(grids.UNDISTURBED.values())
        added = environment.keys() - AT_START.keys()
        assert added.isdisjoint({"MALLOC_TRIM_THRESHOLD_", "MKL_NUM_THREADS"})


def test_workers_may_read_photographs_in_processes_of_their_own(client):
    daemons = client.run(lambda: multiprocessing.current_process().daemon)
    assert set(daemons.values()) == {False}


def test_the_time_budget_of_workers(path, cpu, client, capsys):
    specs = grid(SMOKE, seed=range(4))
    assert run_all(specs, path, cpu, client=client, time_budget=0.0) == []
    assert "time budget is spent" in "".join(capsys.readouterr())
    assert len(run_all(specs, path, cpu, client=client)) == 4


def test_a_record_by_other_code_is_refused(path, cpu, client, monkeypatch):
    monkeypatch.setattr(experiments, "is_current", lambda record: False)
    with pytest.raises(GridError, match=r"other code .* bring all workers to one"):
        run_all([SMOKE], path, cpu, client=client)
    assert lines(path) == []


def test_the_run_of_a_killed_worker_is_done_again(path, cpu, client, monkeypatch):
    """One of both workers dies in the middle of its first run."""
    specs = grid(SMOKE, seed=range(6), method=["two-stage"])
    processes, busy = client.run(os.getpid), []
    submit = client.submit

    def submit_and_kill(*given, **options):
        future = submit(*given, **options)
        while not busy:
            busy.extend(at for at, runs in client.processing().items() if runs)
            if busy:
                os.kill(processes[busy[0]], signal.SIGKILL)
        return future

    monkeypatch.setattr(client, "submit", submit_and_kill)
    found = run_all(specs, path, cpu, client=client)
    assert processes[busy[0]] not in client.run(os.getpid).values()
    assert [Spec(**record["spec"]) for record in found] == specs
    assert len(lines(path)) == 6


def kill_worker(*given):
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_takes_workers_down_does_not_stop_the_others(
    path, cpu, client, monkeypatch
):
    deadly, *others = specs = grid(SMOKE, seed=range(3))
    submit = client.submit

    def submit_one_to_kill(run, spec, *given, **options):
        run = kill_worker if spec == deadly else run
        return submit(run, spec, *given, **options)

    monkeypatch.setattr(client, "submit", submit_one_to_kill)
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 1)
    message = "^1 of 3 runs failed, .* seed 0: 2 workers in a row died of it"
    with pytest.raises(GridError, match=message):
        run_all(specs, path, cpu, client=client)
    assert set(recorded(path)) == set(others)
    client.wait_for_workers(2)


def test_while_no_worker_is_there_one_run_waits(path, cpu, client, monkeypatch):
    monkeypatch.setattr(grids, "places", lambda client: 0)
    assert len(run_all(grid(SMOKE, seed=range(2)), path, cpu, client=client)) == 2


def test_threads_of_one_worker_do_not_share_torchs_generator(path, cpu, monkeypatch):
    specs = grid(SMOKE, seed=range(3))
    cluster = distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=3,
        processes=False,
        protocol="tcp://",
        dashboard_address="localhost:0",
    )
    with cluster, distributed.Client(cluster) as client:
        assert grids.places(client) == 1
        monkeypatch.setattr(grids, "places", lambda client: 3)
        found = run_all(specs, path, cpu, client=client)
    alone = [experiments.run(spec, cpu) for spec in specs]
    losses = [[run["history"]["loss"] for run in runs] for runs in (found, alone)]
    assert losses[0] == losses[1]


def test_each_worker_says_what_device_it_has(path, client):
    if torch.cuda.is_available():
        pytest.skip("workers find a GPU here")
    assert len(run_all([SMOKE], path, "auto", client=client)) == 1
    other = Spec(profile="smoke", seed=1)
    with pytest.raises(GridError, match=r"the worker at .* torch finds no GPU"):
        run_all([other], path, "cuda", client=client)


def without_memory(*given):
    raise torch.OutOfMemoryError("no memory for 2 GiB")


def test_a_run_without_memory_does_not_stop_the_others(path, cpu, client, monkeypatch):
    large, *others = specs = grid(SMOKE, seed=range(3))
    submit = client.submit

    def submit_one_too_large(run, spec, *given, **options):
        return submit(without_memory if spec == large else run, spec, *given, **options)

    monkeypatch.setattr(client, "submit", submit_one_too_large)
    with pytest.raises(GridError, match="2 GiB; use fewer workers"):
        run_all(specs, path, cpu, client=client)
    assert set(recorded(path)) == set(others)


@pytest.mark.parametrize("here", [True, False])
def test_data_are_there_before_workers_ask_for_them(
    here, path, cpu, client, monkeypatch
):
    steps, submit = [], client.submit
    monkeypatch.setattr(grids, "fetch", lambda todo: steps.append("fetch"))
    monkeypatch.setattr(
        client, "submit", lambda *a, **o: steps.append("submit") or submit(*a, **o)
    )
    if not here:  # a scheduler's workers read their own
        monkeypatch.setattr(client, "cluster", None)
    run_all([SMOKE], path, cpu, client=client)
    assert steps == (["fetch", "submit"] if here else ["submit"])


def test_each_data_set_is_fetched_once_and_what_no_one_gives_out_is_not(monkeypatch):
    fetched = []
    monkeypatch.setattr(experiments, "load", fetched.append)
    own = Spec(dataset="folder", noise="crawled", noise_rate=None)
    grids.fetch([SMOKE, Spec(dataset="mnist"), own, Spec(profile="smoke", seed=1)])
    assert sorted(fetched) == ["digits", "mnist"]


def test_a_folder_that_is_another_one_ends_its_run_alone(monkeypatch):
    monkeypatch.setattr(experiments, "is_current", lambda record: False)
    record = {"spec": {"dataset": "folder"}}
    found = grids.outcome_of(types.SimpleNamespace(result=lambda: record))
    assert isinstance(found, GridError) and "are not those that it" in str(found)


def test_a_scheduler_that_goes_is_one_error(client):
    lost = client.submit(time.sleep, 0.1)
    lost.cancel()
    with pytest.raises(GridError, match="the scheduler is gone; run the command again"):
        grids.outcome_of(lost)


def test_two_grids_write_one_file_at_once(path, cpu, client):
    """Each has its own process; both sets of records survive, line by line."""
    other = subprocess.Popen(
        command(path, 3),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    mine = grid(SMOKE, seed=range(100, 106))
    run_all(mine, path, cpu, client=client)
    assert other.wait() == 0
    found = {Spec(**record["spec"]) for record in records.read(path)}
    assert found == {*mine, *grid(SMOKE, seed=range(3), method=METHODS)}


@pytest.mark.parametrize(
    ("count", "scheduler", "message"),
    [
        (0, None, "workers is 0; it must be at least 1"),
        (-2, None, "workers is -2; it must be at least 1"),
        (2, "tcp://127.0.0.1:9", "leave one of the two out"),
        (None, "tcp://127.0.0.1:9", "no Dask scheduler answers at 'tcp://127.0.0.1:9'"),
        (None, "nowhere", "no Dask scheduler answers at 'nowhere'"),
        (None, "tls://127.0.0.1:9", "no Dask scheduler answers at 'tls://127.0.0.1:9'"),
    ],
)
def test_workers_that_cannot_be_had(count, scheduler, message, monkeypatch):
    monkeypatch.setattr(grids, "WAIT", 0.5)
    with pytest.raises(ValueError, match=message), grids.workers(count, scheduler):
        pass


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "tls://127.0.0.1:9"])
def test_nothing_is_left_of_what_failed_to_connect(address, monkeypatch):
    """What is closed only when it is collected can hang a client that starts then."""
    monkeypatch.setattr(grids, "WAIT", 0.5)
    before = clients()
    with pytest.raises(ValueError, match="no Dask scheduler") as caught:
        grids.workers(None, address).__enter__()
    assert clients() == before
    assert caught.value.__cause__ is not None


def clients():
    distributed = pytest.importorskip("distributed")
    return sum(type(thing) is distributed.Client for thing in gc.get_objects())


def test_workers_are_none_of_torchruns_processes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="leave out either torchrun or workers"):
        grids.workers(2, None).__enter__()


def test_a_server_of_another_kind_is_no_scheduler(monkeypatch):
    monkeypatch.setattr(grids, "WAIT", 2)

    class Banner(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
            time.sleep(1)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Banner) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.server_address[1]}"
        message = "no Dask scheduler answers"
        with pytest.raises(ValueError, match=message), grids.workers(None, address):
            pass
        server.shutdown()


def test_a_scheduler_without_workers_is_waited_for(cpu, client, monkeypatch):
    written = []
    bar = types.SimpleNamespace(write=written.append)
    monkeypatch.setattr(grids, "places", lambda client: 0)
    outcomes = grids.on_workers([], client, cpu, bar, lambda: True)
    monkeypatch.setattr(bar, "set_description", lambda text: None, raising=False)
    assert list(outcomes) == []
    assert written == ["The scheduler has no worker yet; waiting for one."]


def test_without_dask_the_runs_go_one_after_the_other(path, cpu, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with grids.workers(2, None) as client:
        assert client is None
        assert len(run_all([SMOKE], path, cpu, client=client)) == 1
    assert "Dask is not installed" in capsys.readouterr().out


def test_an_address_joins_a_running_scheduler(path, cpu, client):
    with grids.workers(None, client.scheduler.address) as joined:
        assert len(run_all([SMOKE], path, cpu, client=joined)) == 1


def test_workers_find_the_service_of_a_gpu_while_they_live(monkeypatch):
    events = []

    @contextlib.contextmanager
    def service():
        events.append("started")
        yield {"CUDA_MPS_PIPE_DIRECTORY": "/somewhere"}
        events.append("ended")

    monkeypatch.setattr(grids.shared_gpu, "service", service)
    with grids.workers(2, None, torch.device("cuda")) as client:
        found = client.run(os.environ.get, "CUDA_MPS_PIPE_DIRECTORY")
        assert list(found.values()) == ["/somewhere"] * 2
        assert events == ["started"]
    assert events == ["started", "ended"]
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def test_a_single_worker_of_a_gpu_needs_no_service(monkeypatch):
    monkeypatch.delattr(grids.shared_gpu, "service")
    with grids.workers(1, None, torch.device("cuda")) as client:
        found = client.run(os.environ.get, "CUDA_MPS_PIPE_DIRECTORY")
        assert list(found.values()) == [None]
