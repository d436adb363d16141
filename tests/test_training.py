"""`training`: batches, gradients of the whole model, causality, resuming, checkpoints, bad
input.
"""

import hashlib
import os
import pickle
import re
import zipfile
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
from conftest import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from ctxlab.measure import page_faults, traced_peak
from ctxlab.models import optimiser, training
from ctxlab.models.block import _FreshWorkspace
from ctxlab.models.diffusion import Denoiser
from ctxlab.models.language import LanguageModel, _language_model
from ctxlab.models.training import (
    Settings,
    _draw,
    _learning_rate,
    _previous,
    _proceed,
    _read_checkpoint,
    _Recall,
    _Run,
    _Text,
    _Tokens,
    corpus,
    load_checkpoint,
    save_checkpoint,
    train,
)
from ctxlab.planning import plan, record
from ctxlab.testing import assert_equiv, numeric_gradient
from ctxlab.workspace import Workspace

TINY = dict(dim=8, n_heads=2, ffn_dim=12, n_layers=3, max_len=8, vocab=23)
SHORT = Settings(steps=6, batch=2, seq_len=8, warmup=2, judge_every=2, windows=4)
TEXT = _Text(*np.split(np.random.default_rng(0).integers(0, 23, 700).astype(np.uint8), [600]))
strengths = pytest.mark.parametrize("strength", [None, 0.7], ids=["plain", "contexts"])


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Products this small gain nothing from a second thread, and wait for it on a busy machine."""
    with threadpool_limits(1, user_api="blas"):
        yield


def make(seed=0, strength=0.7, **options):
    return LanguageModel(
        **TINY | options, strength=strength, update_rate=0.2, rng=np.random.default_rng(seed)
    )


def new(seed=0, strength=0.7, text=TEXT, changed=None, **options):
    return _Run(make(seed, strength, **options), text, Settings(**asdict(SHORT) | (changed or {})))


def advanced(steps, **options):
    run = new(**options)
    for _ in range(steps):
        run.advance()
    return run


def same(a, b):
    """Two states agree to the bit."""
    return a.keys() == b.keys() and all(
        x.dtype == b[n].dtype and np.array_equal(x, b[n], equal_nan=True) for n, x in a.items()
    )


def unlearned(state):
    """A state without what contexts have learned."""
    return {n: a for n, a in state.items() if not n.endswith((".incoming", ".outgoing"))}


# --- the text


def test_the_text_is_what_it_was():
    text = corpus()
    for data in text:
        assert data.dtype == np.uint8
        assert data.ndim == 1
    assert len(text.train) == 1_156_193
    assert len(text.valid) == 106_382
    whole = hashlib.sha256(text.train.tobytes() + text.valid.tobytes()).hexdigest()
    assert whole == "b82a619619c3d6f5a3ad153e7e95197a58fd33003824bcdf62f46082f2756a8c"
    assert text.train.tobytes().startswith(b"In the beginning God created")
    assert text.valid.tobytes().startswith(b"Now it came to pass after the death of Saul")
    assert text.valid.tobytes().isascii()
    assert text.train.tobytes().isascii()


@given(seeds, st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_a_batch_depends_on_seed_and_step_alone(seed, steps):
    one = {t: _draw(TEXT.train, t, 3, 8, seed) for t in steps}
    for t in reversed(steps):
        again = _draw(TEXT.train, t, 3, 8, seed)
        assert again.shape == (3, 9)
        assert np.array_equal(again, one[t])


def test_all_windows_can_be_drawn_and_none_leaves_the_text():
    data = np.arange(10, dtype=np.uint8)
    starts = {int(w[0]) for t in range(60) for w in _draw(data, t, 4, 7)}
    assert starts == {0, 1, 2}
    assert np.array_equal(_draw(np.arange(9, dtype=np.uint8), 3, 1, 8), [np.arange(9)])


# --- the model


@strengths
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_model_is_the_reference(strength, dtype):
    model, rng = make(strength=strength, dtype=dtype), np.random.default_rng(1)
    for shape in ((2, 8), (1, 1), (3, 5)):
        ids, targets = rng.integers(0, 23, (2, *shape))
        model.loss(ids, targets)
        got = model.outputs(ids)["logits"].reshape(*shape, 23)
        contexts = {
            i: b.context.incoming
            for i, b in enumerate(model.blocks)
            if b.context is not None and b.context.incoming is not None
        }
        want = _language_model(model.parameters(), ids, 2, 3, contexts)
        assert_equiv(got, want, depth=40, scale=8.0)


@strengths
def test_gradients_of_every_parameter(strength):
    rng = np.random.default_rng(2)
    model = LanguageModel(
        4,
        2,
        6,
        2,
        max_len=4,
        vocab=5,
        dtype=np.float64,
        strength=strength,
        update_rate=1.0,
        rng=rng,
    )
    for p in model.parameters().values():
        p += 0.2 * rng.standard_normal(p.shape)
    for _ in range(2):
        model.loss(*rng.integers(0, 5, (2, 2, 3)))
    ids, targets = rng.integers(0, 5, (2, 2, 3))
    model.loss(ids, targets, learn=False)
    model.backward()
    found = {n: g.copy() for n, g in model.gradients().items()}
    assert len(found) == 4 + 2 * (12 + (strength is not None))
    for name, gradient in found.items():
        p = model.parameters()[name]
        kept = p.copy()

        def loss(value, p=p):
            p[...] = value
            return model.loss(ids, targets, learn=False)

        assert_equiv(
            gradient, numeric_gradient(loss, kept), c=1e8, scale=max(1.0, np.abs(gradient).max())
        )
        p[...] = kept


@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_nothing_of_the_future_or_of_another_sequence_is_seen(rate):
    model, rng = make(), np.random.default_rng(3)
    model.update_rate = rate
    for _ in range(3):
        model.loss(*rng.integers(0, 23, (2, 4, 8)))
    ids = rng.integers(0, 23, (4, 8))
    targets, state = np.roll(ids, -1, axis=1), model.state_dict()

    def logits(ids):  # of a training pass, and then of a validation
        model.load_state_dict(state)
        model.loss(ids, targets)
        hidden = model.last_outputs()["norm"].reshape(4, 8, -1).copy()
        model.load_state_dict(state)
        return hidden, model.outputs(ids)["logits"].reshape(4, 8, -1).copy()

    before = logits(ids)
    for at in range(8):
        other = ids.copy()
        other[1, at] = (other[1, at] + 1) % 23
        for a, b in zip(before, logits(other), strict=True):
            assert np.array_equal(a[[0, 2, 3]], b[[0, 2, 3]])
            assert np.array_equal(a[1, :at], b[1, :at])
            assert not np.array_equal(a[1, at], b[1, at])


def test_validation_teaches_nothing():
    run = advanced(3)
    before = run.state_dict()
    first = TEXT.judge(run.model, SHORT)
    assert TEXT.judge(run.model, SHORT) == first
    run.model.outputs(TEXT.valid[None, :8])
    after = run.state_dict()
    # What comes in is what had been learned: it is handed on before a pass, whoever asks for it.
    handed = [n for n in before if n.endswith("incoming")]
    assert len(handed) == 2
    assert same(*({n: a for n, a in s.items() if n not in handed} for s in (before, after)))
    straight = advanced(6)
    while run.step < 6:
        run.advance()
    assert same(run.state_dict(), straight.state_dict())


@strengths
def test_pooled_packed_watched_or_fresh_is_the_same_curve(strength):
    learned = advanced(2, strength=strength).model.state_dict()

    def one_step(ws):
        run = new(strength=strength, workspace=ws)
        run.model.load_state_dict(learned)
        run.advance()

    arena = Workspace(growth="exact")
    arena.arrange(plan(record(one_step)))
    want = advanced(3, strength=strength).state_dict()
    for ws in (_FreshWorkspace(), Workspace(debug=True), Workspace(), arena):
        assert same(advanced(3, strength=strength, workspace=ws).state_dict(), want)
    assert arena.allocation_count == 1


@strengths
def test_a_step_allocates_nothing_and_needs_what_was_foretold(strength):
    model = LanguageModel(32, 2, 64, 2, max_len=64, strength=strength, rng=np.random.default_rng(0))
    text = _Text(*[np.random.default_rng(0).integers(0, 256, 2000).astype(np.uint8)] * 2)
    run = _Run(model, text, Settings(batch=4, seq_len=64))
    window = _draw(text.train, 1, 4, 64)

    def step():
        run.model.loss(window[:, :-1], window[:, 1:])
        run.model.backward()
        run.optimise(1, 1.0)

    for _ in range(3):
        step()
    count = model.workspace.allocation_count
    assert traced_peak(step) < 25_000 < 4 * 64 * 32 * 4  # the smallest activation
    assert page_faults(step, warmup=2) < 50
    assert model.workspace.allocation_count == count
    assert model.workspace.peak_bytes == model.workspace_bytes(4, 64)
    held = 2 * sum(p.nbytes for p in model.parameters().values()) + model.workspace.nbytes
    assert model.nbytes - held == (0 if strength is None else (2 * 1 + 2) * 32 * 32 * 4)
    for shape in ((1, 1), (3, 17)):
        model.workspace.clear()
        model.loss(*np.ones((2, *shape), int))
        model.backward()
        assert model.workspace.peak_bytes == model.workspace_bytes(*shape)


def test_a_strength_that_nothing_comes_in_for_has_no_gradient():
    run = advanced(3)
    bare = unlearned(run.model.state_dict())
    window = _draw(TEXT.train, 9, 2, 8)
    run.model.loss(window[:, :-1], window[:, 1:], learn=False)
    run.model.backward()
    assert run.model.gradients()["blocks.1.context.strength"][0] != 0
    run.model.load_state_dict(bare)
    run.model.loss(window[:, :-1], window[:, 1:], learn=False)
    run.model.backward()
    assert run.model.gradients()["blocks.1.context.strength"][0] == 0


# --- bad input

ids = np.zeros((2, 5), int)
BAD = {
    "too long": (
        np.zeros((1, 9), int),
        np.zeros((1, 9), int),
        ValueError,
        "ids: 9 tokens.*max_len is 8",
    ),
    "too large": (ids + 23, ids, ValueError, r"ids: 23\.\.23, needed 0\.\.22"),
    "negative": (ids - 1, ids, ValueError, r"ids: -1\.\.-1"),
    "bad target": (ids, ids + 23, ValueError, "targets: 23"),
    "no integers": (ids + 0.5, ids, TypeError, "ids: float64"),
    "booleans": (ids == 0, ids, TypeError, "ids: bool"),
    "one row": (ids[0], ids[0], ValueError, r"ids: shape \(5,\)"),
    "nothing": (ids[:0], ids[:0], ValueError, r"ids: shape \(0, 5\)"),
    "no tokens": (ids[:, :0], ids[:, :0], ValueError, r"ids: shape \(2, 0\)"),
    "other shape": (ids, ids[:, :4], ValueError, r"targets: shape \(2, 4\) does not match ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tokens_are_refused_and_nothing_is_changed(case):
    bad, targets, error, match = BAD[case]
    run = advanced(2)
    run.model.loss(ids, ids)
    state, generation = run.state_dict(), run.model.workspace.generation
    with pytest.raises(error, match=match) as caught:
        run.model.loss(bad, targets)
    assert "\n" not in str(caught.value)
    assert run.model.workspace.generation == generation
    assert same(run.state_dict(), state)
    run.model.backward()  # the loss before is still there to follow


def test_backward_needs_a_loss_of_its_own():
    model = make()
    with pytest.raises(RuntimeError, match="there is no loss"):
        model.backward()
    model.loss(ids, ids)
    model.workspace.next_generation()
    with pytest.raises(RuntimeError, match="generation"):
        model.backward()
    model.loss(ids, ids)
    model.outputs(ids)
    with pytest.raises(RuntimeError, match="there is no loss"):
        model.backward()
    model.loss(ids, ids)
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="there is no loss"):
        model.backward()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(n_layers=0), "n_layers"),
        (dict(max_len=0), "max_len"),
        (dict(vocab=0), "vocab"),
        (dict(dim=0), "dim"),
        (dict(n_heads=3), "n_heads"),
        (dict(workspace=3), "workspace"),
    ],
)
def test_bad_dimensions_are_refused(options, name):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
        make(**options)


@pytest.mark.parametrize(
    "bad",
    [
        dict(steps=0),
        dict(batch=0),
        dict(seq_len=0),
        dict(judge_every=0),
        dict(windows=0),
        dict(lr=np.nan),
        dict(lr=0.0),
        dict(clip=np.inf),
        dict(clip=-1.0),
    ],
    ids=str,
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))}: "):
        Settings(**bad)


def test_bad_texts_are_refused():
    empty = np.zeros(0, np.uint8)
    for text in (
        _Text(empty, TEXT.valid),
        _Text(TEXT.train, empty),
        _Text(TEXT.train[:8], TEXT.valid),
    ):
        with pytest.raises(ValueError, match=r"^text: "):
            new(text=text)
    for train_part in (TEXT.train / 2, TEXT.train[None], b"text"):
        with pytest.raises(TypeError, match=r"^text: train"):
            new(text=_Text(train_part, TEXT.valid))
    for data in (empty, TEXT.train[None]):
        with pytest.raises(ValueError, match=r"^data: "):
            _draw(data, 1, 2, 8)
    with pytest.raises(ValueError, match=r"^seq_len: 9"):
        new(changed=dict(seq_len=9))
    run = new(text=_Text(TEXT.train + np.uint8(23), TEXT.valid))
    with pytest.raises(ValueError, match=r"^ids: .*needed 0\.\.22"):
        run.advance()
    assert run.step == 0


# --- steps


def test_the_learning_rate_rises_and_falls():
    s = Settings(steps=50, warmup=10, lr=2.0, final=0.25)
    rates = [_learning_rate(t, s) for t in range(1, 51)]
    assert rates[:10] == pytest.approx([0.2 * t for t in range(1, 11)])
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.5)
    assert _learning_rate(1, Settings(steps=1, warmup=0, lr=1.0, final=0.5)) == pytest.approx(0.5)


def test_large_gradients_are_clipped():
    free, clipped = new(changed=dict(clip=1e6)), new(changed=dict(clip=1e-3))
    assert free.advance() == clipped.advance()
    assert free.norms == clipped.norms
    for run, norm in ((clipped, 1e-3), (free, free.norms[0])):
        found = np.sqrt(sum(np.sum(m * m) for m in run.optimiser.moments["m"].values()))
        assert found == pytest.approx(norm * (1 - SHORT.beta1), rel=1e-4)


def test_training_learns():
    text = _Text(*[np.tile(np.arange(23, dtype=np.uint8), 30)] * 2)
    run = train(make(), text, Settings(steps=60, batch=4, seq_len=8, warmup=5, lr=2e-2), quiet=True)
    assert run.judged[-1][0] == 60
    assert run.judged[-1][1] < 2 < 3 < run.losses[0]


@pytest.mark.parametrize("strength", [None, 0.0, 0.7])
@pytest.mark.parametrize("layer", ["embedding", "blocks.0", "blocks.1", "blocks.2", "norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stops_the_run_and_names_the_first_layer(strength, layer, value):
    run = advanced(2, strength=strength)
    names = {"embedding": "positions", "norm": "norm.bias"}
    run.model.parameters()[names.get(layer, f"{layer}.linear2.bias")][...] = value
    before = run.state_dict()
    with pytest.raises(FloatingPointError, match=rf"^step 3: .* {re.escape(layer)}$"):
        run.advance()
    after = run.state_dict()
    assert same(*(unlearned(s) for s in (before, after)))


def test_gradients_that_are_not_finite_stop_the_run():
    run = advanced(2)
    backward = run.model.backward

    def poisoned():
        backward()
        run.model.gradients()["blocks.1.norm1.bias"][0] = np.inf

    run.model.backward = poisoned
    before = run.state_dict()
    with pytest.raises(FloatingPointError, match=r"^step 3: the norm .* blocks\.1\.norm1\.bias$"):
        run.advance()
    assert same(*(unlearned(s) for s in (before, run.state_dict())))


# --- resuming


@settings(max_examples=6)
@given(st.sampled_from([None, 0.0, 0.7]), st.integers(0, 6), st.integers(1, 3))
def test_a_resumed_run_is_the_uninterrupted_one(strength, at, judge_every):
    options = dict(strength=strength, changed=dict(judge_every=judge_every))
    straight, halted, resumed = (
        advanced(6, **options),
        advanced(at, **options),
        new(seed=5, **options),
    )
    resumed.load_state_dict(halted.state_dict())
    assert resumed.step == at
    for _ in range(6 - at):
        resumed.advance()
    assert same(straight.state_dict(), resumed.state_dict())
    assert straight.losses == resumed.losses
    assert straight.judged == resumed.judged


def test_a_run_resumes_from_a_file(tmp_path):
    path = tmp_path / "run.ckpt"
    _proceed(new(), until=3, checkpoint=path, quiet=True)
    halted = load_checkpoint(path, new(seed=3))
    assert same(halted.state_dict(), advanced(3).state_dict())
    assert {n.rpartition(".")[2] for n in halted.state_dict() if "context" in n} >= {
        "strength",
        "incoming",
        "outgoing",
    }
    resumed = train(make(4), TEXT, SHORT, resume=path, quiet=True)
    assert same(resumed.state_dict(), advanced(6).state_dict())


OTHERS = {
    "steps": dict(changed=dict(steps=7)),
    "lr": dict(changed=dict(lr=1e-3)),
    "seed": dict(changed=dict(seed=1)),
    "n_heads": dict(n_heads=4),
    "dim": dict(dim=4),
    "n_layers": dict(n_layers=2),
    "with_contexts": dict(strength=None),
    "itemsize": dict(dtype=np.float64),
    "task": dict(text=_Text(TEXT.train[:-1], TEXT.valid)),
    "with_ssm": dict(kind="SSM"),
}


@pytest.mark.parametrize("fact", OTHERS)
def test_another_run_does_not_resume(fact):
    state, other = advanced(2).state_dict(), advanced(1, **OTHERS[fact])
    before = other.state_dict()
    with pytest.raises(ValueError, match=rf"^state: is of another run: .*{fact} is ") as caught:
        other.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert same(before, other.state_dict())


def spoil(state, name, value):
    return {n: a for n, a in (state | {name: value}).items() if a is not None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimiser.m.embedding", None),
        ("v.embedding", np.zeros(3)),
        ("model.norm.bias", None),
        ("facts.lr", None),
        ("losses", np.zeros(1)),
        ("judged", np.zeros((3, 2))),
        ("step", np.array(5)),
        ("step", None),
        ("step", np.array(-1)),
        ("extra", np.zeros(1)),
        ("model.norm.bias", np.array(["a"] * 8)),
        ("model.blocks.1.context.incoming", np.zeros((2, 2))),
        ("model.blocks.1.context.strength", np.array([np.nan])),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(name, value):
    state, run = spoil(advanced(2).state_dict(), name, value), advanced(1)
    before = run.state_dict()
    with pytest.raises(ValueError, match=r"^state: ") as caught:
        run.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert same(before, run.state_dict())


# --- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "run.ckpt"
    save_checkpoint(path, advanced(2))
    return path.read_bytes()


def refuse(path, data):
    path.write_bytes(data)
    run = new()
    before = run.state_dict()
    with pytest.raises(ValueError, match=f"^checkpoint: .*{path.name} is refused: ") as caught:
        load_checkpoint(path, run)
    assert "\n" not in str(caught.value)
    assert same(before, run.state_dict())


def test_a_file_that_is_cut_short_is_refused(checkpoint, tmp_path):
    for length in (
        0,
        1,
        31,
        32,
        33,
        len(checkpoint) // 2,
        len(checkpoint) - 33,
        len(checkpoint) - 1,
    ):
        refuse(tmp_path / "bad.ckpt", checkpoint[:length])
    refuse(tmp_path / "bad.ckpt", checkpoint + b"\0")


def test_a_bit_that_tips_anywhere_is_noticed(checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(checkpoint), 40):
        bad = bytearray(checkpoint)
        bad[at] ^= 1 << int(rng.integers(8))
        refuse(tmp_path / "bad.ckpt", bytes(bad))


class Loud:
    """Unpickling it would be noticed."""

    def __reduce__(self):
        return os._exit, (1,)


def test_files_of_other_kinds_are_refused_and_never_unpickled(tmp_path):
    objects = np.array([Loud()], object)
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    np.savez(tmp_path / "objects.npz", x=objects)
    np.save(tmp_path / "objects.npy", objects, allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as f:
        f.writestr("x.npy", "no array")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Loud()))
    for name in ("foreign.npz", "objects.npz", "objects.npy", "text.zip", "pickle"):
        data = (tmp_path / name).read_bytes()
        refuse(tmp_path / "bad.ckpt", data)
        if name.startswith(("objects", "pickle")):  # even with a right checksum
            refuse(tmp_path / "bad.ckpt", data + hashlib.sha256(data).digest())
    data = (tmp_path / "foreign.npz").read_bytes()
    (tmp_path / "signed").write_bytes(data + hashlib.sha256(data).digest())
    with pytest.raises(ValueError, match=r"^state: is of no run"):
        load_checkpoint(tmp_path / "signed", new())
    with pytest.raises(FileNotFoundError):
        _read_checkpoint(tmp_path / "missing")


def test_the_one_before_is_kept_and_named(tmp_path):
    path, run = tmp_path / "run.ckpt", new()
    for step in (1, 2, 3):
        run.advance()
        save_checkpoint(path, run)
        assert load_checkpoint(path, new()).step == step
        assert (
            not _previous(path).exists() or load_checkpoint(_previous(path), new()).step == step - 1
        )
    assert {p.name for p in tmp_path.iterdir()} == {"run.ckpt", "run.ckpt.previous"}
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"the one before it is .*run\.ckpt\.previous$"):
        _read_checkpoint(path)


def test_where_there_are_no_hard_links_a_copy_is_kept(tmp_path, monkeypatch):
    def none(*args):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", none)
    run = new()
    for _ in range(2):
        run.advance()
        save_checkpoint(tmp_path / "run", run)
    assert load_checkpoint(_previous(tmp_path / "run"), new()).step == 1


@pytest.mark.parametrize("where", ["savez", "fsync", "link", "replace", "second replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_saving_that_is_broken_off_leaves_a_whole_checkpoint(where, error, tmp_path, monkeypatch):
    path, run = tmp_path / "run.ckpt", new()
    for _ in range(2):
        run.advance()
        save_checkpoint(path, run)
    run.advance()
    holder, name = (np, "savez") if where == "savez" else (os, where.split()[-1])
    true, calls = getattr(holder, name), iter(range(9))

    def broken(*args, **options):
        if next(calls) == where.startswith("second"):
            raise error("stop")
        return true(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, broken)
        if (where, error) == ("link", OSError):
            save_checkpoint(path, run)  # a copy will do
        else:
            with pytest.raises(error):
                save_checkpoint(path, run)
    done = (where, error) == ("link", OSError)
    assert load_checkpoint(path, new()).step == 2 + done
    assert load_checkpoint(_previous(path), new()).step in (1, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"run.ckpt", "run.ckpt.previous"}
    save_checkpoint(path, run)
    assert load_checkpoint(path, new()).step == 3


@pytest.mark.parametrize("at", range(1, 7))
def test_an_interrupt_leaves_the_last_checkpoint_whole(at, tmp_path, monkeypatch):
    path, true, calls = tmp_path / "run.ckpt", optimiser.adam_into, iter(range(10**6))
    stop_at = (at - 1) * len(make().parameters()) + 7  # in the middle of a step

    def interrupted(*args, **options):
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        true(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(optimiser, "adam_into", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(make(), TEXT, SHORT, checkpoint=path, save_every=1, quiet=True)
    assert path.exists() == (at > 1)
    if at > 1:
        assert load_checkpoint(path, new()).step == at - 1
        resumed = train(make(9), TEXT, SHORT, resume=path, quiet=True)
        assert same(resumed.state_dict(), advanced(6).state_dict())


def test_saving_happens_as_often_as_asked(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(training, "save_checkpoint", lambda path, run: saved.append(run.step))
    run = _proceed(new(), checkpoint=tmp_path / "run", save_every=4, until=5, quiet=True)
    assert saved == [4, 5]
    _proceed(run, checkpoint=tmp_path / "run", save_every=4, quiet=True)
    assert saved == [4, 5, 6]
    _proceed(run, checkpoint=tmp_path / "run", quiet=True)  # nothing is left to do
    assert (run.step, saved) == (6, [4, 5, 6])
    with pytest.raises(ValueError, match=r"^save_every: 0"):
        _proceed(new(), save_every=0)


def test_nothing_is_shown_where_nobody_looks(capsys):
    train(make(), TEXT, SHORT)
    train(make(), TEXT, SHORT, quiet=True)
    assert capsys.readouterr() == ("", "")


# --- the task of memory


@given(seeds, st.integers(1, 5), st.integers(1, 60), st.integers(1, 9), st.floats(0, 1))
def test_what_is_to_be_named_is_the_last_key(seed, B, S, symbols, rate):
    ids, targets = _Recall(symbols, rate).draw(np.random.default_rng(seed), B, S)
    for row, names in zip(ids, targets, strict=True):
        assert row[0] < symbols
        last = None
        for token, name in zip(row, names, strict=True):
            assert 0 <= token < 2 * symbols
            last = token if token < symbols else last
            assert name == last


def test_a_task_of_memory_runs_and_resumes(tmp_path):
    task, small = _Recall(4, 0.2), dict(vocab=8, kind="SSM")
    whole = train(make(**small), task, SHORT, quiet=True)
    path = tmp_path / "run.ckpt"
    train(make(**small), task, SHORT, until=3, checkpoint=path, quiet=True)
    resumed = train(make(5, **small), task, SHORT, resume=path, quiet=True)
    assert same(resumed.state_dict(), whole.state_dict())
    for other in (_Recall(4, 0.3), _Recall(3, 0.2), TEXT):
        with pytest.raises(ValueError, match="task is "):
            load_checkpoint(path, _Run(make(**small), other, SHORT))
    judged = []

    class Model:
        def loss(self, *batch, learn):
            judged.append(np.stack(batch))
            assert not learn
            return float(len(judged))

    assert task.judge(Model(), SHORT) == np.mean(range(1, len(judged) + 1))
    assert len(judged) == SHORT.windows // SHORT.batch
    assert not any(
        np.array_equal(batch, task.batch(step, SHORT)) for batch in judged for step in range(1, 7)
    )


# --- a denoiser in the same loop


def denoiser(seed=0, **options):
    options = dict(n_blocks=3, strength=0.5, max_len=8) | options
    return Denoiser(5, 8, 2, 12, rng=np.random.default_rng(seed), **options)


TOKENS = _Tokens(*np.split(np.random.default_rng(1).standard_normal((50, 5), np.float32), [30]))


def test_a_denoiser_trains_and_resumes_to_the_bit(tmp_path):
    path = tmp_path / "run.ckpt"
    whole = train(denoiser(), TOKENS, SHORT, quiet=True)
    train(denoiser(), TOKENS, SHORT, until=3, checkpoint=path, quiet=True)
    resumed = train(denoiser(5), TOKENS, SHORT, resume=path, quiet=True)
    assert same(resumed.state_dict(), whole.state_dict())
    assert len(whole.judged) == 3
    assert len({error for _, error in whole.judged}) == 3


def test_a_denoiser_in_the_loop_learns():
    tokens = _Tokens(np.ones((40, 5), np.float32), np.ones((20, 5), np.float32))
    changed = dict(steps=60, judge_every=60, lr=1e-2, windows=40)
    run = _Run(denoiser(), tokens, Settings(**asdict(SHORT) | changed))
    before = tokens.judge(run.model, run.settings)
    assert _proceed(run, quiet=True).judged[-1][1] < 0.7 * before


def test_a_judgement_of_a_denoiser_is_its_error_on_what_is_kept_away():
    model, seen = denoiser(), []
    x0, noise, t = TOKENS.questions(TOKENS.valid, SHORT)
    model.error = lambda *batch: seen.append(batch) or 0.5
    assert TOKENS.judge(model, SHORT) == 0.5
    assert same(dict(enumerate(seen[0])), {0: x0, 1: noise, 2: t})
    rows = {row.tobytes() for row in TOKENS.valid}
    assert all(row.tobytes() in rows for row in x0.reshape(-1, 5))
    assert sorted(t) == list(t)


@pytest.mark.parametrize(
    "other",
    [
        lambda: _Run(denoiser(n_blocks=2), TOKENS, SHORT),
        lambda: _Run(denoiser(strength=None), TOKENS, SHORT),
        lambda: _Run(denoiser(floor=0.1), TOKENS, SHORT),
        lambda: _Run(denoiser(), _Tokens(TOKENS.train, TOKENS.train), SHORT),
        lambda: _Run(denoiser(), TOKENS._replace(n_steps=999), SHORT),
        new,
    ],
)
def test_a_checkpoint_of_a_denoiser_fits_no_other_run(tmp_path, other):
    path = tmp_path / "run.ckpt"
    train(denoiser(), TOKENS, SHORT, until=2, checkpoint=path, quiet=True)
    run = other()
    before = run.state_dict()
    with pytest.raises(ValueError, match=r"^state: is of (another run|no run, or of another kind)"):
        load_checkpoint(path, run)
    assert same(run.state_dict(), before)


@pytest.mark.parametrize(
    ("tokens", "error", "says"),
    [
        (_Tokens(TOKENS.train[:5], TOKENS.valid), ValueError, "tokens: 5 in train, needed at"),
        (_Tokens(TOKENS.train, TOKENS.valid[:5]), ValueError, "tokens: 5 in valid, needed at"),
        (_Tokens(TOKENS.train[0], TOKENS.valid), TypeError, "tokens: train is no table"),
        (_Tokens(TOKENS.train, TOKENS.valid.astype(int)), TypeError, "tokens: valid is no table"),
        (_Tokens(TOKENS.train, [[1.0]]), TypeError, "tokens: valid is no table"),
    ],
)
def test_tokens_that_do_not_do(tokens, error, says):
    with pytest.raises(error, match="^" + says):
        _Run(denoiser(), tokens, SHORT)


def test_a_denoiser_that_is_not_finite_names_its_layer():
    model = denoiser()
    model.parameters()["blocks.1.linear1.weight"][0, 0] = np.nan
    model.parameters()["blocks.1.modulation.bias"][:] = 1  # all gates are open
    with pytest.raises(FloatingPointError, match=r"is blocks\.1$"):
        train(model, TOKENS, SHORT, quiet=True)


# --- what watches a run


def test_a_callback_sees_each_step_after_it_was_saved(tmp_path):
    seen, path = [], tmp_path / "run"

    def callback(run):
        seen.append(run.step)
        assert load_checkpoint(path, new(seed=9)).step == run.step

    train(make(), TEXT, SHORT, checkpoint=path, save_every=1, callback=callback, quiet=True)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_an_error_of_a_callback_passes_and_what_was_saved_stays(tmp_path):
    path = tmp_path / "run"

    def stop(run):
        if run.step == 4:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match=r"^enough$"):
        train(make(), TEXT, SHORT, checkpoint=path, save_every=1, callback=stop, quiet=True)
    resumed = train(make(4), TEXT, SHORT, resume=path, quiet=True)
    assert same(resumed.state_dict(), advanced(6).state_dict())


# --- the optimiser


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "text", "nan", "half", "large"])
def test_a_state_of_the_optimiser_that_does_not_fit_changes_nothing(change):
    run = advanced(2)
    state, before = run.optimiser.state_dict(), run.state_dict()
    if change == "missing":
        del state["v.norm.bias"]
    elif change == "extra":
        state["v.more"] = np.zeros(1)
    elif change == "shape":
        state["m.embedding"] = state["m.embedding"].T
    elif change == "large":
        state["m.embedding"] = state["m.embedding"].astype(np.float64) + 1e300
    else:
        state["count"] = np.array({"text": "two", "nan": np.nan, "half": 1.5}[change])
    state["m.norm.bias"] = state["m.norm.bias"] + 1
    with pytest.raises(ValueError, match=r"^state: "):
        run.optimiser.load_state_dict(state)
    assert same(before, run.state_dict())


def test_targets_that_do_not_count():
    model, rng = make(strength=None), np.random.default_rng(0)
    ids, targets = rng.integers(0, 23, (2, 2, 6))
    some = rng.random(targets.shape) < 0.5
    masked = np.where(some, targets, -1)
    loss = model.loss(ids, masked, ignore_index=-1)
    model.backward()
    found = {n: g.copy() for n, g in model.gradients().items()}
    z = model.forward(ids).astype(np.float64)
    z -= z.max(axis=2, keepdims=True)
    logs = z - np.log(np.exp(z).sum(axis=2, keepdims=True))
    picked = np.take_along_axis(logs, targets[:, :, None], 2)[:, :, 0]
    assert loss == pytest.approx(-picked[some].mean(), rel=1e-5)
    grad = np.exp(logs) * some[:, :, None] / some.sum()
    b, s = np.nonzero(some)
    grad[b, s, targets[some]] -= 1 / some.sum()
    model.backward(grad.astype(np.float32))
    for n, g in model.gradients().items():
        assert_equiv(g, found[n], depth=200, scale=np.abs(found[n]).max() + 1e-3)
    for bad in (masked, np.where(some, targets, 23)):
        with pytest.raises(ValueError, match=r"^targets: "):
            model.loss(ids, bad)
    with pytest.raises(ValueError, match=r"^targets: -2"):
        model.loss(ids, np.where(some, targets, -2), ignore_index=-1)


def test_a_step_that_is_refused_is_no_step():
    run = advanced(2)
    before = run.state_dict()
    for bad in (np.nan, -1.0, "fast"):
        with pytest.raises((TypeError, ValueError), match=r"^lr: "):
            run.optimiser.step(bad)
    run.model.blocks[0].name = "renamed"
    with pytest.raises(RuntimeError, match="step: a block has another name"):
        run.optimiser.step(0.1)
    run.model.blocks[0].name = "blocks.0"
    assert same(before, run.state_dict())
