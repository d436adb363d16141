"""Shards on workers: the bits of the serial run, whoever dies; errors; nothing left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from ctxlab.data import InputError
from ctxlab.streaming.distributed import (
    _AHEAD,
    _absolute,
    _ahead,
    _connected,
    _result,
    _stream_distributed,
    _worker_budget,
    local_workers,
    stream_distributed,
)
from ctxlab.streaming.moments import ContextStats
from ctxlab.streaming.reading import (
    _least_bytes,
    _stream,
    _sums_bytes,
    load_stats,
    shards,
    stream,
)

pytest.importorskip("distributed")
DIM = 12


@pytest.fixture(scope="module")
def client():
    with local_workers(2) as client:
        yield client


@pytest.fixture
def listed(tmp_path):
    """Ten shards, one of them empty, one with values that are not finite."""
    rng = np.random.default_rng(0)
    (tmp_path / "run").mkdir()
    for i, n in enumerate([300, 0, 1, 700, 20, 300, 300, 64, 65, 2]):
        x = rng.standard_normal((n, DIM)).astype(np.float32) + 9
        y = x[:, ::-1] + rng.standard_normal((n, DIM)).astype(np.float32)
        if i == 5:
            x[7, 3] = np.nan
        np.savez(tmp_path / "run" / f"{i}.npz", x=x, y=y)
    return shards(tmp_path / "run")


def serial(listed, **options):
    with threadpool_limits(1, user_api="blas"):
        return stream(listed, **options)


def same(a, b):
    return all(np.array_equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def touch(path, content):
    """Write other bytes, surely with another time."""
    facts = os.stat(path)
    Path(path).write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))


# --- the same bits ---


@pytest.mark.parametrize("memory", ["1GB", "4.4MB"])  # the second: fewer rows at a time
def test_the_bits_of_the_serial_run(memory, listed, client):
    share = _worker_budget(memory, 2, DIM)
    assert same(
        stream_distributed(listed, client=client, memory=memory), serial(listed, memory=share)
    )


def test_an_order_that_is_not_that_of_arrival(listed, client):
    order = [3, 9, 0, 5, 1, 8]
    assert same(
        stream_distributed([listed[i] for i in order], client=client),
        serial([listed[i] for i in order]),
    )


def test_own_workers_and_pairs_of_files(listed, tmp_path):
    with np.load(listed[0].x) as a:
        for name in "xy":
            np.save(tmp_path / f"{name}.npy", a[name].astype(np.float64))
    pair = shards([(tmp_path / "x.npy", tmp_path / "y.npy")])
    got = stream_distributed(pair, workers=3)
    assert got.dtype == np.float64
    assert same(got, serial(pair))


def test_a_scheduler_at_an_address(listed, client, monkeypatch):
    monkeypatch.chdir(
        Path(listed[0].x).parent.parent
    )  # relative paths are the client's, not the workers'
    relative = shards("run")
    assert not os.path.isabs(relative[0].x)
    address = client.scheduler.address
    assert same(stream_distributed(relative, scheduler=address), serial(listed))
    assert client.status == "running"


class Done:
    """A future that is done when its result is asked for."""

    status = "error"

    def __init__(self, work, name=""):
        self.work, self.name = work, name

    def add_done_callback(self, call):
        call(self)

    def result(self, timeout):
        return self.work()


def test_a_bounded_number_of_shards_is_under_way(listed):
    class Fake:
        """A client that does a task when its result is asked for."""

        status, under_way, most = "running", 0, 0
        scheduler = type("S", (), {"address": "here"})

        def submit(self, task, **_):
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            return Done(lambda: (self.leave(), task())[1])

        def leave(self):
            self.under_way -= 1

        def cancel(self, futures, **_):
            self.cancelled = len(futures)

    fake, counts, ticks = Fake(), [], []
    for part in _ahead(fake, listed, 10**9, 3, ticks.append):
        counts.append(part[0].count)
    assert counts == ticks == [s.rows for s in listed]
    assert (fake.most, fake.cancelled) == (3, 0)
    parts = _ahead(fake, listed, 10**9, 3, ticks.append)
    next(parts)
    parts.close()
    assert fake.cancelled == 3


def test_scratch_of_workers_is_in_no_message(client):
    import pickle

    s = ContextStats(64)
    s.update(np.ones((500, 64), np.float32), np.ones((500, 64), np.float32))
    assert s.workspace.nbytes > 64 * 64 * 8
    assert len(pickle.dumps(s)) < s.nbytes - s.workspace.nbytes + 5000


# --- workers that die ---


def hold(place, name):
    """In a worker: reading the shard `name` leaves a note, and waits for the file `go`."""
    import ctxlab.streaming.distributed as module

    kept = module.shard_stats

    def patched(shard, *args, **options):
        while shard.name == name and not Path(place, "go").exists():
            if not list(Path(place).glob("pid*")):
                Path(place, f"pid{os.getpid()}").touch()
            time.sleep(0.01)
        return kept(shard, *args, **options)

    module.shard_stats = patched


@contextlib.contextmanager
def when_reading(client, place, name, act):
    """`act(pid)` is called once a worker reads the shard; then reading goes on."""
    place.mkdir()
    client.run(hold, str(place), name)

    def watch():
        while not (notes := list(place.glob("pid*"))):
            time.sleep(0.01)
        act(int(notes[0].name[3:]))
        (place / "go").touch()

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    watcher.join()


further = partial(pytest.param, marks=pytest.mark.thorough)  # as quick, for further cases


@pytest.mark.slow
@pytest.mark.parametrize("name", [further("0.npz"), "5.npz", further("9.npz")])
def test_a_killed_worker_changes_nothing(name, listed, tmp_path):
    with local_workers(2) as client:
        killed = []

        def kill(pid):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

        with when_reading(client, tmp_path / "notes", name, kill):
            got = stream_distributed(
                listed, client=client, checkpoint=tmp_path / "state.npz", every=1
            )
    assert killed
    assert same(got, serial(listed))
    assert same(load_stats(tmp_path / "state.npz", DIM), got)


def kill_always(name):
    """In a worker: reading the shard `name` is its end."""
    import ctxlab.streaming.distributed as module

    kept = module.shard_stats

    def patched(shard, *args, **options):
        if shard.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return kept(shard, *args, **options)

    module.shard_stats = patched


class Deadly:
    """A plugin patches workers that take the place of dead ones, too."""

    def __new__(cls):
        from distributed import WorkerPlugin

        return type(
            "Plugin", (WorkerPlugin,), {"setup": lambda self, worker: kill_always("4.npz")}
        )()


@pytest.mark.slow
def test_a_shard_that_kills_every_worker_is_named(listed, tmp_path):
    with local_workers(1) as client:
        client.register_plugin(Deadly())
        with pytest.raises(InputError, match=r"4\.npz: one worker after the other died"):
            stream_distributed(listed, client=client, checkpoint=tmp_path / "state.npz")
    assert load_stats(tmp_path / "state.npz", DIM).count == sum(s.rows for s in listed[:4])


class Suspicious:
    """A client that, as Dask does, gives up all that is under way with a shard that kills."""

    status = "running"
    scheduler = type("S", (), {"address": "here"})

    def __init__(self, deadly):
        self.deadly, self.under_way, self.alone = deadly, [], []

    def submit(self, task, **_):
        shard = task.args[0]
        self.under_way.append(shard.name)
        return Done(lambda: self.result(task, shard.name), shard.name)

    def result(self, task, name):
        if self.deadly in self.under_way:
            if len(self.under_way) == 1:
                self.alone.append(name)
            raise type("KilledWorker", (Exception,), {})
        self.under_way.remove(name)
        return task()

    def cancel(self, futures, **_):
        for f in futures:
            self.under_way.remove(f.name)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_the_suspects_are_done_again_alone(at, ahead, listed):
    client, counts = Suspicious(f"{at}.npz"), []
    parts = _ahead(client, listed, 10**9, ahead, lambda n: None)
    with pytest.raises(InputError, match=rf"run/{at}\.npz: one worker after the other died"):
        counts.extend(part.count for part, _ in parts)
    assert counts == [s.rows for s in listed[:at]]
    assert client.alone == (3 if ahead == 1 else 2) * [f"{at}.npz"]


def test_deaths_that_do_not_come_back_change_nothing(listed):
    """Two at a time were too much; one at a time is not. Then there are several again."""

    class Crowded(Suspicious):
        most, failures = 0, 0

        def result(self, task, name):
            self.most = max(self.most, len(self.under_way))
            if name == "3.npz" and len(self.under_way) > 1 and not self.failures:
                self.failures, self.most = 1, 0
                raise type("KilledWorker", (Exception,), {})
            if name in ("3.npz", "4.npz", "5.npz"):
                assert len(self.under_way) == 1
            self.under_way.remove(name)
            return task()

    client = Crowded("")
    parts = list(_ahead(client, listed, 10**9, 3, lambda n: None))
    assert [p.count for p, _ in parts] == [s.rows for s in listed]
    assert client.failures == 1
    assert client.most == 3


@pytest.mark.slow
def test_a_cluster_that_loses_all_workers_ends_with_an_error(listed, tmp_path):
    """Nobody restarts these workers; the scheduler stays."""
    from distributed import LocalCluster

    options = dict(dashboard_address="127.0.0.1:0", silence_logs=50, threads_per_worker=1)
    with LocalCluster(n_workers=2, processes=False, **options) as cluster:
        address = cluster.scheduler_address

        def lose(shard, memory, *, stats):
            cluster.scale(0)
            time.sleep(1)
            raise OSError("the worker is gone")

        with pytest.MonkeyPatch.context() as m:
            m.setattr("ctxlab.streaming.distributed.shard_stats", lose)
            with pytest.raises(
                InputError, match=rf"{address} has lost all its workers, and no other .* within 2 s"
            ):
                stream_distributed(listed, scheduler=address, patience=2)


def test_an_error_of_time_in_a_task_is_its_own(listed, client):
    def late():
        raise TimeoutError("the disk is slow")

    with pytest.raises(TimeoutError, match="the disk is slow"):
        _result(Done(late), client, 5)


def test_two_guilty_shards_do_not_blame_an_innocent_one(listed):
    """A suspect that dies alone, because another one is still at work, gets a second turn."""

    class Late(Suspicious):
        blamed = 0

        def result(self, task, name):
            if name == "3.npz" and len(self.under_way) == 1 and not self.blamed:
                self.blamed = 1
                raise type("KilledWorker", (Exception,), {})
            return super().result(task, name)

    client, counts = Late("4.npz"), []
    parts = _ahead(client, listed, 10**9, 3, lambda n: None)
    with pytest.raises(InputError, match=r"run/4\.npz: one worker after the other died"):
        counts.extend(part.count for part, _ in parts)
    assert client.blamed
    assert len(counts) == 4


def test_the_kernel_of_each_worker_is_kept(listed, client, tmp_path):
    path = tmp_path / "state.npz"
    _, kernels = _stream_distributed(listed[:4], client=client, checkpoint=path)
    pids = {process.rpartition(":")[2] for process in kernels}
    assert pids <= {str(pid) for pid in client.run(os.getpid).values()}
    assert all(kernel for kernel in kernels.values())
    again = _stream(listed, checkpoint=path, resume=True)[1]
    assert again.items() > kernels.items()
    assert str(os.getpid()) in {process.rpartition(":")[2] for process in again}


def test_layers_and_two_widths_on_workers(tmp_path, client):
    rng = np.random.default_rng(8)
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", hidden=rng.standard_normal((4, 5, 40, 6)).astype("f2"))
        np.savez(tmp_path / f"{i}.x.npz", x=rng.standard_normal((90, 5)), y=np.ones((90, 2)))
    paths = sorted(tmp_path.glob("?.npz"))
    todo = shards(paths, "all")
    got, want = stream_distributed(todo, client=client), serial(todo)
    assert list(got) == [1, 2, 3]
    assert all(same(got[layer], want[layer]) for layer in want)
    todo = shards(sorted(tmp_path.glob("*.x.npz")))
    assert same(stream_distributed(todo, client=client), serial(todo))


@pytest.mark.slow
def test_a_scheduler_that_goes_away(listed, tmp_path):
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(local_workers(1))
        with when_reading(client, tmp_path / "notes", "6.npz", lambda pid: stack.close()):
            with pytest.raises(InputError, match=r"scheduler: the connection to tcp://.* was lost"):
                stream_distributed(
                    listed, scheduler=client.scheduler.address, checkpoint=tmp_path / "state.npz"
                )
    assert load_stats(tmp_path / "state.npz", DIM).count == sum(s.rows for s in listed[:6])


# --- errors and checkpoints ---


def spoiled(listed, at, how):
    path = Path(listed[at].x)
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        touch(path, path.read_bytes())
    return path


@pytest.mark.parametrize("how", ["missing", "short", "changed"])
def test_a_shard_that_is_not_what_was_listed(how, listed, client, tmp_path):
    path, state = spoiled(listed, 6, how), tmp_path / "state.npz"
    with pytest.raises(InputError, match=str(path)) as there:
        stream_distributed(listed, client=client, checkpoint=state)
    with pytest.raises(InputError) as here:
        serial(listed)
    assert str(there.value) == str(here.value)
    assert "\n" not in str(there.value)
    assert load_stats(state, DIM).count == sum(s.rows for s in listed[:6])


@pytest.mark.parametrize("done", [1, 4, 10])
def test_either_way_goes_on_from_the_others_checkpoint(done, listed, client, tmp_path):
    whole = serial(listed)
    for first, second in [(serial, stream_distributed), (stream_distributed, serial)]:
        path = tmp_path / f"{first.__name__}.npz"
        options = {serial: {}, stream_distributed: dict(client=client)}
        first(listed[:done], checkpoint=path, every=3, **options[first])
        assert same(second(listed, checkpoint=path, resume=True, **options[second]), whole)


def test_any_scale_and_any_layer(tmp_path, client):
    hidden = np.random.default_rng(1).standard_normal((3, 200, 4))
    scales = np.array([1, 1e-200, 1e200, 1e-150])
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", hidden=hidden[:, 50 * i : 50 * i + 50] * scales)
    todo = shards(tmp_path, layer=2)
    got = stream_distributed(todo, client=client)
    assert same(got, serial(todo))
    want = np.corrcoef(hidden[1, :150].T, hidden[2, :150].T)[:4, 4:]
    assert np.abs(got.correlation() - want).max() < 1e-12


def test_checkpoints_of_other_runs(listed, client, tmp_path):
    path = tmp_path / "state.npz"
    stream_distributed(listed[:3], client=client, checkpoint=path)
    with pytest.raises(InputError, match="exists"):
        stream_distributed(listed, client=client, checkpoint=path)
    with pytest.raises(InputError, match="of another run"):
        stream_distributed(listed[1:], client=client, checkpoint=path, resume=True)


WRONG = [
    (dict(workers=0), "workers: 0"),
    (dict(workers=-2), "workers: -2"),
    (dict(workers=1, scheduler="tcp://a:1"), "one of workers, scheduler and client"),
    (dict(workers=1, memory="1MB"), "needed at least"),
    (dict(workers=1, memory="much"), "memory"),
    (dict(workers=1, every=0), "every"),
    (dict(workers=1, resume=True), "resume"),
]


@pytest.mark.parametrize(("options", "said"), WRONG)
def test_what_is_refused_before_anything_starts(options, said, listed, monkeypatch):
    monkeypatch.setattr("ctxlab.streaming.distributed.local_workers", None)  # would be called
    with pytest.raises(ValueError, match=said):
        stream_distributed(listed, **options)


def test_no_rows(listed):
    for nothing in ([], [listed[1]]):
        with pytest.raises(InputError, match="no rows"):
            stream_distributed(nothing, workers=1)


@pytest.mark.slow
def test_addresses_where_nobody_answers(listed):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        silent = f"tcp://127.0.0.1:{deaf.getsockname()[1]}"
        for address in (
            "tcp://127.0.0.1:9",
            silent,
            "tcp://no.such.host.invalid:8786",
            "nonsense",
            "what://a:1",
        ):
            start = time.monotonic()
            with pytest.raises(InputError, match=f"scheduler: {address} cannot be reached") as e:
                stream_distributed(listed, scheduler=address, timeout=1)
            assert "\n" not in str(e.value)
            assert time.monotonic() - start < 20  # a hang, not a duration


def test_a_scheduler_without_workers(listed):
    from distributed import LocalCluster

    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster:
        with pytest.raises(InputError, match="has no workers"):
            stream_distributed(listed, scheduler=cluster.scheduler_address, timeout=1)


# --- memory, threads, leftovers ---


def test_budgets_add_up():
    for workers in (1, 3, 100):
        for dim in (4, 700):
            share = _worker_budget("100GB", workers, dim)
            own = 10**11 - workers * share
            assert 2 * 8 * dim * dim < own < _sums_bytes(dim) + 2**20 + workers
            least = own + workers * _least_bytes(dim)
            assert _worker_budget(least, workers, dim) >= _least_bytes(dim)
            with pytest.raises(ValueError, match="needed at least"):
                _worker_budget(least - 2 * workers - 1, workers, dim)
    assert _AHEAD == 2  # what the shares count on


def blas_threads(dask_worker=None):
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_the_threads_of_blas_are_given_back(listed, client):
    with threadpool_limits(2, user_api="blas"):
        stream_distributed(listed, client=client)
        assert blas_threads() == {2}
    assert [client.submit(blas_threads, pure=False).result() for _ in range(4)] == 4 * [{1}]


def test_paths_for_workers_are_absolute(listed, monkeypatch):
    monkeypatch.chdir(Path(listed[0].x).parent)
    assert _absolute(shards(["0.npz"])[0]).x == listed[0].x


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_nothing_is_left_behind(listed, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with local_workers(1) as client:
        pids = list(client.run(os.getpid).values())
        stream_distributed(listed, client=client)
    assert not list((tmp_path / "tmp").iterdir())
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_own_client_is_closed_and_an_address_stays(client):
    with _connected(client.scheduler.address, 5) as other:
        assert other.status == "running"
    assert (other.status, client.status) == ("closed", "running")


def test_without_dask_the_error_says_how_to_get_it():
    script = """if True:
        import sys
        sys.modules['distributed'] = None
        from ctxlab.streaming.distributed import stream_distributed
        from ctxlab.streaming.reading import Shard
        shard = Shard('a', 'a', 'a', 5, 4, 'float32', ((0, 0), (0, 0)))
        for options in (dict(workers=1), dict(scheduler='tcp://127.0.0.1:9')):
            try: stream_distributed([shard], **options)
            except ImportError as e: print(e)"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "dask is not installed; pip install 'ctxlab[distributed]'\n" * 2


def test_importing_the_module_does_not_load_dask():
    script = (
        "import sys, ctxlab.streaming.distributed; "
        "print({'dask', 'distributed', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
