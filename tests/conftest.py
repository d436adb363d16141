"""What the tests share: one hypothesis profile, and arrays of every kind, made from a seed,
what a comparison with PyTorch needs, how a workspace refuses, and pages in a browser."""

import gc
import shutil
import threading
import warnings
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from ctxlab.testing import _sprinkle

# The same examples in every run, and no time limit that a busy machine could break.
# New examples: pytest -m hypothesis --hypothesis-profile=fresh (or thorough, for a hunt)
settings.register_profile(
    "ctxlab",
    deadline=None,
    max_examples=60,
    stateful_step_count=30,
    derandomize=True,
    database=None,
)
settings.register_profile(
    "fresh", settings.get_profile("ctxlab"), derandomize=False, print_blob=True
)
settings.register_profile("thorough", settings.get_profile("fresh"), max_examples=5000)
settings.load_profile("ctxlab")

DTYPES = (np.float32, np.float64)
KINDS = ("normal", "steps", "tiny", "huge", "wide", "hostile")

few = settings(max_examples=25)
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(DTYPES)
kinds = st.sampled_from(KINDS)


def make(rng, shape, dtype=np.float32, kind="normal"):
    """An array of the kind: well behaved, or with what one guard in the package is there for."""
    x = rng.standard_normal(shape)
    if kind == "steps":  # ties, zeros, constant columns
        x = np.round(x)
    elif kind == "tiny":
        x *= 1e-30
    elif kind == "huge":  # squares are finite, products of three are not
        x *= 0.01 * np.sqrt(np.finfo(dtype).max)
    elif kind == "wide":  # float32 squares overflow and underflow
        x *= 10.0 ** rng.uniform(-30, 30, shape)
    x = np.asarray(x, dtype)
    return _sprinkle(x, rng) if kind == "hostile" else x


def lay(a, layout, fill=np.nan):
    """A copy of `a` in another layout that BLAS takes; panels lie in a buffer full of `fill`."""
    m, n = a.shape
    view = {
        "C": lambda: np.empty((m, n), a.dtype),
        "F": lambda: np.empty((n, m), a.dtype).T,
        "rows": lambda: np.full((m + 3, n), fill, a.dtype)[2 : m + 2],
        "columns": lambda: np.full((m, n + 3), fill, a.dtype)[:, 1 : n + 1],
        "F columns": lambda: np.full((n + 3, m + 2), fill, a.dtype)[1 : n + 1, :m].T,
    }[layout]()
    view[...] = a
    return view


LAYOUTS = ("C", "F", "rows", "columns", "F columns")
layouts = st.sampled_from(LAYOUTS)


@pytest.fixture(scope="module")
def one_thread():
    """These matrices are small: a second thread of BLAS would mostly wait."""
    with threadpool_limits(1, user_api="blas"):
        yield


def pytest_collection_finish():
    """What exists by now stays: no later collection of garbage searches it again.

    An account of memory collects garbage before and after; with hypothesis and matplotlib loaded
    that took three quarters of its time.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Whatever takes the fixture `torch` or `browser` can be chosen with `-m` and its name."""
    for item in items:
        for name in {"torch", "browser"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(name)


@pytest.fixture(scope="module")
def torch():
    """PyTorch with one thread; tests that compare with it are skipped where it is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("torch")
    module.set_num_threads(1)
    return module


debugging = pytest.mark.parametrize("debug", [False, True], ids=["normal", "debug"])


def no_memory(*args):
    raise MemoryError


def figures(ws):
    return ws.nbytes, ws.used_bytes, ws.peak_bytes, ws.allocation_count, ws.generation


@contextmanager
def refused(ws, error, match):
    """One clear line, and nothing has changed."""
    before = figures(ws), ws.summary(), repr(ws)
    with pytest.raises(error, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert (figures(ws), ws.summary(), repr(ws)) == before


def refuses(call, arrays, kind):
    """An error that names an argument first, and nothing has changed."""
    before = {n: a.tobytes() for n, a in arrays.items()}
    with pytest.raises(kind, match=r"^[a-z_0]+: "):
        call(*arrays.values())
    assert before == {n: a.tobytes() for n, a in arrays.items()}


def refuses_misfits(call, arrays, written):
    """Each array with another shape or dtype; read-only, or over another one, where it is written
    to: those are the last `written` of them."""
    call(*arrays.values())
    for wrong, a in arrays.items():
        refuses(call, arrays | {wrong: np.concatenate([a, a])}, ValueError)
        refuses(call, arrays | {wrong: a.astype(np.float32)}, TypeError)
        refuses(call, arrays | {wrong: a.astype(np.float16)}, TypeError)
    for target in list(arrays)[-written:]:
        a = arrays[target].copy()
        a.flags.writeable = False
        refuses(call, arrays | {target: a}, ValueError)
        for other, b in arrays.items():
            if other != target:
                store = np.ones(a.size + b.size)
                near = store[: a.size].reshape(a.shape)
                far = store[a.size - 1 :][: b.size].reshape(b.shape)
                refuses(call, arrays | {target: near, other: far}, ValueError)


def in_threads(*functions):
    """Run them at the same time; the first error is raised here."""
    errors = []

    def guarded(fn):
        try:
            fn()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=guarded, args=(fn,)) for fn in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )


# Pages in a browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
OFFLINE = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium")
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[docs]'")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
        yield chromium
        chromium.close()


@contextmanager
def serving(folder, policy=""):
    """The address of a folder on a server of its own, which may send a content policy."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

        def end_headers(self):
            if policy:
                self.send_header("Content-Security-Policy", policy)
            super().end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()
