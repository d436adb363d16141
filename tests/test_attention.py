"""Attention against its reference, central differences and PyTorch: masks, blocks, strides,
memory.
"""

import gc

import numpy as np
import pytest
from conftest import DTYPES, dtypes, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.gemm import _PANEL_BYTES, unbuffered
from ctxlab.measure import traced_peak
from ctxlab.models.attention import (
    _attention_requirement,
    _block_rows,
    _visible,
    attention,
    attention_backward_into,
    attention_into,
    attention_vjp,
)
from ctxlab.testing import assert_equiv, numeric_gradient
from ctxlab.workspace import Workspace

LONG = 371  # 176 or 88 rows a block: several blocks, the last one short
PLACES = ("apart", "in one layer", "with gaps")  # where heads lie in memory


pytestmark = pytest.mark.usefixtures("one_thread")


def place(arrays, where):
    """Copies of (B, H, S, E) arrays: each by itself, side by side as in a layer, or with gaps."""
    n, (B, H, S, E) = len(arrays), arrays[0].shape
    if where == "in one layer":
        rows = np.full((B, S, n, H, E), np.nan, arrays[0].dtype)
        views = [rows[:, :, i].swapaxes(1, 2) for i in range(n)]
    elif where == "with gaps":
        views = [
            np.full((H, B, S, E + 3), np.nan, arrays[0].dtype).swapaxes(0, 1)[..., 1 : E + 1]
            for _ in range(n)
        ]
    else:
        views = [np.full((B, H, S, E), np.nan, arrays[0].dtype) for _ in range(n)]
    for view, a in zip(views, arrays, strict=True):
        view[...] = a
    return views


def padding(rng, B, S, kind):
    """A mask of the kind: lengths, holes, one sequence without a visible token, or none at all."""
    if kind == "lengths":
        return np.arange(S) < rng.integers(1, S + 1, (B, 1))
    if kind == "holes":
        return rng.random((B, S)) < 0.6
    if kind == "nothing":
        return np.arange(B)[:, None] + np.zeros(S, int) > 0
    return None


MASKS = ("none", "lengths", "holes", "nothing")
masks, places = st.sampled_from(MASKS), st.sampled_from(PLACES)


def forward(q, k, v, ws, *, keep_weights=False, where="apart", **case):
    """What `attention_into` writes: out, lse, weights. All that it is given holds NaN before."""
    (out,) = place([np.full_like(q, np.nan)], where)
    lse = np.full(q.shape[:3], np.nan, q.dtype)
    weights = np.full((*q.shape[:3], k.shape[2]), np.nan, q.dtype) if keep_weights else None
    assert attention_into(q, k, v, out, lse, ws, weights=weights, **case) is out
    return out, lse, weights


def backward(q, k, v, G, ws, *, keep_weights=False, where="apart", **case):
    """The three gradients, and the result they belong to."""
    out, lse, weights = forward(q, k, v, ws, keep_weights=keep_weights, where=where, **case)
    if k.shape == q.shape:
        grads = place([np.full_like(q, np.nan)] * 3, where)
    else:
        grads = [np.full_like(a, np.nan) for a in (q, k, v)]
    attention_backward_into(q, k, v, out, lse, G, *grads, ws, weights=weights, **case)
    return grads, out


def sizes(q, k, v, G=None, *, causal=False, keep=None):
    """Size of the terms behind each entry: of the result, or of dq, dk and dv; absolute values
    throughout.
    """
    seen, root, tiny = (
        _visible(q.shape[2], causal, keep),
        np.sqrt(q.shape[3]),
        np.finfo(q.dtype).tiny,
    )
    Q, K, V = (np.abs(a, dtype=np.float64) for a in (q, k, v))
    scores = q.astype(np.float64) @ k.swapaxes(-1, -2).astype(np.float64) / root
    weights = np.exp(
        np.where(
            seen, scores - scores.max(axis=-1, keepdims=True, where=seen, initial=-1e300), -np.inf
        )
    )
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1)
    # An error of a score is a relative one of its exponential.
    weights *= 1 + (Q @ K.swapaxes(-1, -2)).max(axis=-1, keepdims=True, initial=0) / root
    if G is None:
        return weights @ V + tiny
    G = np.abs(G, dtype=np.float64)
    pull = G @ V.swapaxes(-1, -2)
    slope = weights * (pull + np.sum(weights * pull, axis=-1, keepdims=True)) / root
    back, along = slope.swapaxes(-1, -2), weights.swapaxes(-1, -2)
    return slope @ K + tiny, back @ Q + tiny, along @ G + tiny


def largest_size(q, k, v, G=None):
    """One size for all entries of a result, or of all gradients: the largest of `sizes`' terms."""
    value = max(1.0, float(np.abs(v).max(initial=0)))
    if G is None:
        return value

    def norm(a):
        return float(np.sqrt(np.max(np.sum(np.square(a, dtype=np.float64), axis=-1), initial=0)))

    score = norm(q) * norm(k) / np.sqrt(q.shape[3])  # an error of a score is one of its exponential
    ds = 2 * norm(G) * norm(v) * (1 + score) / np.sqrt(q.shape[3])
    rows = min(q.shape[2], 50)
    return max(ds * norm(k), ds * norm(q) * rows, norm(G) * rows * (1 + score), 1.0)


# --- against the reference ---


@given(
    seeds,
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 9),
    st.integers(1, 5),
    dtypes,
    st.booleans(),
    masks,
    places,
)
def test_attention_is_the_reference(seed, B, H, S, E, dtype, causal, mask, where):
    rng, ws = np.random.default_rng(seed), Workspace(debug=True)
    q, k, v, G = place([make(rng, (B, H, S, E), dtype) for _ in range(4)], where)
    kept = [a.copy() for a in (q, k, v, G)]
    case = dict(causal=causal, keep=padding(rng, B, S, mask) if S else None)
    want = attention(q, k, v, **case) if S else np.zeros_like(q)
    wants = attention_vjp(q, k, v, G, **case) if S else [want] * 3
    for keep_weights in (False, True):
        grads, out = backward(q, k, v, G, ws, keep_weights=keep_weights, where=where, **case)
        assert_equiv(out, want, depth=S + E, scale=sizes(q, k, v, **case))
        for grad, expected, size in zip(grads, wants, sizes(q, k, v, G, **case), strict=True):
            assert_equiv(grad, expected, depth=S + E, scale=size)
    assert all(map(np.array_equal, (q, k, v, G), kept))
    assert ws.used_bytes == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("where", PLACES)
def test_many_blocks_are_the_reference(where, causal, mask, dtype):
    rng, ws, shape = np.random.default_rng(0), Workspace(), (2, 2, LONG, 8)
    assert LONG / 6 < _block_rows(LONG, dtype) < LONG / 2
    q, k, v, G = place([make(rng, shape, dtype) for _ in range(4)], where)
    case = dict(causal=causal, keep=padding(rng, 2, LONG, mask))
    want, wants = attention(q, k, v, **case), attention_vjp(q, k, v, G, **case)
    results = {
        kept: backward(q, k, v, G, ws, keep_weights=kept, where=where, **case)
        for kept in (False, True)
    }
    for grads, out in results.values():
        assert_equiv(out, want, depth=8, scale=sizes(q, k, v, **case))
        for grad, expected, size in zip(grads, wants, sizes(q, k, v, G, **case), strict=True):
            assert_equiv(grad, expected, depth=8, scale=size)


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 362, 363, 513])
def test_lengths_around_the_edges_of_a_block(length):
    # 256 rows of 256 float32 are a panel to the byte; 362 and 363 leave a last block of 0 and of 1
    # row more.
    rng, ws = np.random.default_rng(length), Workspace()
    q, k, v, G = make(rng, (4, 1, 1, length, 4))
    for causal in (False, True):
        grads, out = backward(q, k, v, G, ws, causal=causal)
        want, wants = attention(q, k, v, causal=causal), attention_vjp(q, k, v, G, causal=causal)
        assert_equiv(out, want, depth=8, scale=sizes(q, k, v, causal=causal))
        for grad, expected, size in zip(
            grads, wants, sizes(q, k, v, G, causal=causal), strict=True
        ):
            assert_equiv(grad, expected, depth=8, scale=size)


def test_one_row_may_be_more_than_a_panel():
    S = _PANEL_BYTES // 4 + 5
    assert _block_rows(S) == 1
    assert _block_rows(S // 2 + 1) == 1
    assert _block_rows(S // 2 - 5) == 2
    assert _block_rows(0) == 0
    assert _block_rows(1) == 1
    assert _block_rows(100) == 100


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_agree_with_each_other(dtype, monkeypatch):
    # The same sequence in one block and in blocks of any size: 1 row, 7 rows, ...
    rng = np.random.default_rng(0)
    q, k, v, G = make(rng, (4, 2, 2, 23, 5), dtype)
    keep = padding(rng, 2, 23, "lengths")
    want = {
        causal: backward(q, k, v, G, Workspace(), causal=causal, keep=keep)
        for causal in (False, True)
    }
    for rows in (1, 2, 7, 22):
        monkeypatch.setattr("ctxlab.models.attention._PANEL_BYTES", rows * 23 * q.itemsize)
        assert _block_rows(23, dtype) == rows
        for causal in (False, True):
            for kept in (False, True):
                grads, out = backward(
                    q, k, v, G, Workspace(debug=True), keep_weights=kept, causal=causal, keep=keep
                )
                case = dict(causal=causal, keep=keep)
                assert_equiv(out, want[causal][1], depth=10, scale=sizes(q, k, v, **case))
                size = sizes(q, k, v, G, **case)
                for a, b, terms in zip(grads, want[causal][0], size, strict=True):
                    assert_equiv(a, b, depth=10, scale=terms)


@given(seeds, st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), dtypes, st.booleans(), masks)
def test_kept_weights_and_sums_are_what_they_claim(seed, B, S, E, dtype, causal, mask):
    rng = np.random.default_rng(seed)
    q, k, v = make(rng, (3, B, 2, S, E), dtype)
    keep = padding(rng, B, S, mask)
    out, lse, weights = forward(q, k, v, Workspace(), keep_weights=True, causal=causal, keep=keep)
    seen = np.broadcast_to(_visible(S, causal, keep), weights.shape)
    assert not weights[~seen].any()  # also above the diagonal, which is never computed
    some = seen.any(axis=-1)
    assert_equiv(weights.sum(axis=-1), some.astype(dtype), depth=S)
    scores = np.where(
        seen, q.astype(np.float64) @ k.swapaxes(-1, -2).astype(np.float64) / np.sqrt(E), -np.inf
    )
    with np.errstate(divide="ignore"):
        want = np.log(np.exp(scores).sum(axis=-1))
    assert_equiv(
        lse[some],
        want[some].astype(dtype),
        depth=E + S,
        scale=1 + np.abs(scores[seen]).max(initial=0),
    )
    assert np.isfinite(lse).all()
    size = sizes(q, k, v, causal=causal, keep=keep)
    assert_equiv(out, weights @ v, depth=S, scale=size)


def test_kept_weights_are_zero_where_no_block_reaches():
    q, k, v = make(np.random.default_rng(0), (3, 1, 1, LONG, 4))
    _, _, weights = forward(q, k, v, Workspace(), keep_weights=True, causal=True)
    assert np.array_equal(weights, np.tril(weights))
    assert_equiv(weights.sum(axis=-1), np.ones((1, 1, LONG), np.float32), depth=LONG)


# --- gradients ---


@given(
    seeds,
    st.integers(1, 2),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    masks,
    st.booleans(),
)
def test_gradients(seed, B, S, E, causal, mask, kept):
    rng = np.random.default_rng(seed)
    q, k, v, G = make(rng, (4, B, 1, S, E), np.float64)
    case = dict(causal=causal, keep=padding(rng, B, S, mask))
    grads, _ = backward(q, k, v, G, Workspace(), keep_weights=kept, **case)
    for i, grad in enumerate(grads):
        inputs = [q, k, v]

        def of(a, inputs=inputs, i=i):
            return float(np.sum(G * attention(*inputs[:i], a, *inputs[i + 1 :], **case)))

        assert_equiv(
            grad, numeric_gradient(of, inputs[i]), c=3e7, scale=max(1.0, np.abs(grad).max())
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("S", [5, LONG])
def test_who_sees_nothing_gets_nothing(S, causal, kept, dtype):
    rng, ws = np.random.default_rng(0), Workspace(debug=True)
    q, k, v, G = make(rng, (4, 2, 2, S, 4), dtype)
    keep = np.ones((2, S), bool)
    keep[0] = False
    keep[1, : S // 2] = False  # with the causal mask these see nothing either
    grads, out = backward(q, k, v, G, ws, keep_weights=kept, causal=causal, keep=keep)
    assert not out[0].any()
    assert not any(grad[0].any() for grad in grads)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert not any(grad[1, :, : S // 2].any() for grad in grads[1:])  # hidden keys and values
    if causal:
        assert not out[1, :, : S // 2].any()
        assert not grads[0][1, :, : S // 2].any()
        seen = [a[1:, :, S // 2 :].copy() for a in (q, k, v, G)]
        alone, _ = backward(*seen, ws, keep_weights=kept, causal=True)
        size = sizes(*seen, causal=True)
        for grad, want, terms in zip(grads, alone, size, strict=True):
            # as if the padding had not been there
            assert_equiv(grad[1:, :, S // 2 :], want, depth=8, scale=terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [False, True])
def test_what_is_hidden_has_no_influence(kept, dtype):
    rng, ws = np.random.default_rng(0), Workspace()
    q, k, v, G = make(rng, (4, 1, 2, 300, 4), dtype)
    keep = np.arange(300)[None] < 200
    (dq, dk, dv), out = backward(q, k, v, G, ws, keep_weights=kept, keep=keep)
    k[:, :, 200:], v[:, :, 200:] = 1e6, -1e6
    again, out2 = backward(q, k, v, G, ws, keep_weights=kept, keep=keep)
    assert np.array_equal(out, out2)
    assert all(map(np.array_equal, (dq, dk, dv), again))
    later = [a.copy() for a in (q, k, v)]
    first = forward(q, k, v, ws, causal=True)[0]
    for a in later:
        a[:, :, 150:] = 7
    assert_equiv(
        forward(*later, ws, causal=True)[0][:, :, :150],
        first[:, :, :150],
        depth=8,
        scale=sizes(*(a[:, :, :150] for a in later), causal=True),
    )
    k[:, :, 200:] = np.nan
    assert np.array_equal(
        forward(q, k, v, ws, keep_weights=kept, keep=keep)[0], out
    )  # and no warning


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_large_scores_do_no_harm(causal, kept, dtype):
    rng, ws = np.random.default_rng(0), Workspace()
    q, k, v, G = make(rng, (4, 1, 2, 40, 4), dtype)
    big = float(np.finfo(dtype).max) ** 0.45
    for a in backward(big * q, big * k, v, G, ws, keep_weights=kept, causal=causal)[0][2:]:
        assert np.isfinite(a).all()  # one key takes it all
    q, k = 100 * q, 100 * k  # scores of 10^4
    (dq, dk, dv), out = backward(q, k, v, G, ws, keep_weights=kept, causal=causal)
    want, wants = attention(q, k, v, causal=causal), attention_vjp(q, k, v, G, causal=causal)
    assert_equiv(out, want, depth=8, scale=sizes(q, k, v, causal=causal))
    for got, grad, size in zip((dq, dk, dv), wants, sizes(q, k, v, G, causal=causal), strict=True):
        assert_equiv(got, grad, depth=8, scale=size)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kept", [False, True])
def test_values_that_are_not_finite_stay_in_their_head(bad, kept):
    q, k, v, G = make(np.random.default_rng(0), (4, 2, 2, 6, 3))
    want = backward(q, k, v, G, Workspace(), keep_weights=kept, causal=True)
    q[0, 1, 2, 0] = bad
    with np.errstate(invalid="ignore"):
        grads, out = backward(q, k, v, G, Workspace(), keep_weights=kept, causal=True)
        reference = attention(q, k, v, causal=True)
    assert np.array_equal(np.isnan(out), np.isnan(reference))
    assert np.isnan(out[0, 1, 2]).all()
    for got, clean in zip((*grads, out), (*want[0], want[1]), strict=True):
        others = np.ones((2, 2), bool)
        others[0, 1] = False
        assert np.array_equal(got[others], clean[others])


# --- PyTorch ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["full", "causal", "padding", "causal and padding"])
@pytest.mark.parametrize("S", [1, 7, LONG])
@pytest.mark.parametrize("where", PLACES[:2])
def test_attention_is_that_of_pytorch(torch, where, S, mask, dtype):
    rng, ws, shape = np.random.default_rng(0), Workspace(), (2, 3, S, 8)
    q, k, v, G = place([make(rng, shape, dtype) for _ in range(4)], where)
    keep = padding(rng, 2, S, "lengths") if "padding" in mask else None
    case = dict(causal="causal" in mask, keep=keep)
    real = np.ones((2, S), bool) if keep is None else keep
    G *= real[:, None, :, None]  # PyTorch masks keys only: what padding asks for must not count
    seen = torch.tensor(_visible(S, case["causal"], None) & real[:, None, None, :])
    tensors = [torch.tensor(a.copy(), requires_grad=True) for a in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(
        *tensors, attn_mask=None if mask == "full" else seen
    )
    (want * torch.tensor(G.copy())).sum().backward()
    rows = np.broadcast_to(real[:, None], (2, 3, S))
    for kept in (False, True):
        grads, out = backward(q, k, v, G, ws, keep_weights=kept, where=where, **case)
        assert_equiv(out[rows], want.detach().numpy()[rows], depth=8, scale=largest_size(q, k, v))
        # A single key takes all weight, so dL/dq is exactly 0: ours is, PyTorch's is rounding.
        for grad, tensor in zip(grads, tensors, strict=True):
            assert_equiv(grad, tensor.grad.numpy(), depth=32, scale=largest_size(q, k, v, G) / 50)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 5, LONG - 3])
@pytest.mark.parametrize("causal", [False, True])
def test_the_last_queries_are_those_of_pytorch(torch, causal, T, dtype):
    rng = np.random.default_rng(0)
    q, k, v, G = (make(rng, (2, 3, n, 8), dtype) for n in (T, LONG, LONG, T))
    mask = torch.tensor(_visible(LONG, causal, None, T))
    tensors = [torch.tensor(a, requires_grad=True) for a in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
    (want * torch.tensor(G)).sum().backward()
    for kept in (False, True):
        grads, out = backward(q, k, v, G, Workspace(), keep_weights=kept, causal=causal)
        assert_equiv(out, want.detach().numpy(), depth=8, scale=largest_size(q, k, v))
        for grad, tensor in zip(grads, tensors, strict=True):
            assert_equiv(grad, tensor.grad.numpy(), depth=32, scale=largest_size(q, k, v, G) / 50)


# --- fewer queries than keys ---


@given(seeds, st.integers(1, 9), st.integers(1, 9), dtypes, st.booleans(), masks, st.booleans())
def test_fewer_queries_are_the_last_of_the_sequence(seed, T, S, dtype, causal, mask, kept):
    T = min(T, S)
    rng, ws = np.random.default_rng(seed), Workspace(debug=True)
    q, k, v, G = make(rng, (4, 2, 2, S, 3), dtype)
    keep = padding(rng, 2, S, mask)
    if keep is not None:
        keep[:, S - T :] = True  # as queries they are real
    G[:, :, : S - T] = 0
    case = dict(causal=causal, keep=keep)
    (dq, dk, dv), out = backward(q, k, v, G, ws, keep_weights=kept, **case)
    last = [a[:, :, S - T :] for a in (q, G)]
    grads, part = backward(last[0], k, v, last[1], ws, keep_weights=kept, **case)
    wants = attention_vjp(last[0], k, v, last[1], **case)
    assert_equiv(part, out[:, :, S - T :], depth=S, scale=largest_size(q, k, v))
    assert_equiv(part, attention(last[0], k, v, **case), depth=S, scale=largest_size(q, k, v))
    for grad, whole, want in zip(grads, (dq[:, :, S - T :], dk, dv), wants, strict=True):
        assert_equiv(grad, whole, depth=8 + S, scale=largest_size(q, k, v, G))
        assert_equiv(grad, want, depth=8 + S, scale=largest_size(q, k, v, G))


def test_no_query_gives_gradients_of_zero():
    k, v = make(np.random.default_rng(0), (2, 1, 2, 5, 3))
    q = np.empty((1, 2, 0, 3), np.float32)
    (dq, dk, dv), out = backward(q, k, v, q, Workspace(), causal=True)
    assert dq.size == out.size == 0
    assert not dk.any()
    assert not dv.any()


# --- what is refused ---


def operands(T=4, S=5, dtype=np.float32):
    rng = np.random.default_rng(0)
    a = lambda *shape: make(rng, shape, dtype)  # noqa: E731
    given = dict(q=a(2, 3, T, 4), k=a(2, 3, S, 4), v=a(2, 3, S, 4))
    back = dict(o=a(2, 3, T, 4), lse=a(2, 3, T), grad_out=a(2, 3, T, 4))
    grads = dict(grad_q=a(2, 3, T, 4), grad_k=a(2, 3, S, 4), grad_v=a(2, 3, S, 4))
    forward_ = given | dict(out=a(2, 3, T, 4), lse=a(2, 3, T), weights=a(2, 3, T, S))
    return forward_, given | back | grads | dict(weights=a(2, 3, T, S))


def refused(arrays, kind, match, **case):
    before = {n: a.tobytes() for n, a in arrays.items()}
    weights = arrays["weights"]
    form = attention_backward_into if "grad_q" in arrays else attention_into
    given = [a for n, a in arrays.items() if n != "weights"]
    with pytest.raises(kind, match=match):
        form(*given, Workspace(), weights=weights, **case)
    assert before == {n: a.tobytes() for n, a in arrays.items()}


@pytest.mark.parametrize("arrays", operands(), ids=["forward", "backward"])
def test_misfits_of_attention_are_named(arrays):
    written = [n for n in arrays if n.startswith("grad_") and n != "grad_out"]
    written = written or ["out", "lse", "weights"]
    for name, a in arrays.items():
        wrong = np.concatenate([a, a], axis=0)
        refused(arrays | {name: wrong}, ValueError, "^k: " if name == "q" else f"^{name}: ")
        double = arrays | {name: a.astype(np.float64)}
        refused(double, TypeError, "^k: " if name == "q" else f"^{name}: ")
        if a.ndim == 4:
            gaps = np.zeros((*a.shape[:3], 2 * a.shape[3]), a.dtype)[..., ::2]
            refused(arrays | {name: gaps}, ValueError, f"^{name}: strides")
    for name in written:
        frozen = arrays[name].copy()
        frozen.flags.writeable = False
        refused(arrays | {name: frozen}, ValueError, f"^{name}: is read-only")
        for other, b in arrays.items():
            if other != name:
                store = np.zeros(arrays[name].size + b.size, np.float32)
                n = arrays[name].size
                near, far = store[:n].reshape(arrays[name].shape), store[n - 1 : n - 1 + b.size]
                pair = {name: near, other: far.reshape(b.shape)}
                refused(arrays | pair, ValueError, "overlaps")


@pytest.mark.parametrize("arrays", operands(5, 4), ids=["forward", "backward"])
def test_more_queries_than_keys_have_no_place_under_a_causal_mask(arrays):
    refused(arrays, ValueError, "^q: 5 queries for 4 keys", causal=True)
    with pytest.raises(ValueError, match=r"^q: 5 queries for 4 keys"):
        attention(arrays["q"], arrays["k"], arrays["v"], causal=True)


@pytest.mark.parametrize("arrays", operands(), ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("keep", "kind"),
    [
        (np.ones((2, 4), bool), ValueError),
        (np.ones((1, 5), bool), ValueError),
        (np.ones(5, bool), ValueError),
        (np.ones((2, 5)), TypeError),
        (np.ones((2, 5), int), TypeError),
        ([[True] * 5] * 2, TypeError),
    ],
    ids=str,
)
def test_masks_that_do_not_fit_are_named(arrays, keep, kind):
    refused(arrays, kind, "^keep: ", keep=keep)


# --- padding ---


@given(seeds, st.integers(1, 9), dtypes, st.booleans(), masks, st.booleans())
def test_padding_may_hold_anything(seed, S, dtype, causal, mask, kept):
    rng, ws = np.random.default_rng(seed), Workspace(debug=True)
    clean = make(rng, (4, 2, 2, S, 3), dtype)
    keep = padding(rng, 2, S, mask)
    if keep is None:
        keep = rng.random((2, S)) < 0.5
    dirty = clean.copy()
    junk = np.array([np.nan, np.inf, -np.inf, 1e30], dtype)
    for a in dirty:
        places = np.broadcast_to(~keep[:, None, :, None], a.shape)
        a[places] = rng.choice(junk, places.sum())
    case = dict(causal=causal, keep=keep)
    want, out = backward(*clean, ws, keep_weights=kept, **case)  # warnings are errors
    got, out2 = backward(*dirty, ws, keep_weights=kept, **case)
    assert np.array_equal(out, out2)
    assert np.array_equal(attention(*clean[:3], **case), attention(*dirty[:3], **case))
    hidden = np.broadcast_to(~keep[:, None], (2, 2, S))
    for a, b, c in zip(want, got, attention_vjp(*dirty, **case), strict=True):
        assert np.array_equal(a, b)
        assert not a[hidden].any()
        assert_equiv(a, c, depth=8 + S, scale=largest_size(*clean))
    assert not out[hidden].any()


@pytest.mark.parametrize("kept", [False, True])
def test_padding_over_several_blocks_and_fewer_queries(kept):
    rng, ws = np.random.default_rng(0), Workspace(debug=True)
    q, k, v, G = (make(rng, (2, 2, n, 8)) for n in (200, LONG, LONG, 200))
    keep = np.arange(LONG) >= np.array([[0], [90]])
    case = dict(causal=True, keep=keep)
    want, out = backward(q, k, v, G, ws, keep_weights=kept, **case)
    assert_equiv(out, attention(q, k, v, **case), depth=8, scale=largest_size(q, k, v))
    for a in (k, v):
        a[1, :, :90] = np.nan
    got, again = backward(q, k, v, G, ws, keep_weights=kept, **case)
    assert np.array_equal(out, again)
    assert all(map(np.array_equal, want, got))


# --- memory ---


@given(
    seeds,
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([1, 2, 37, 255, 256, 257, 300, 513]),
    dtypes,
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_what_a_call_takes_is_known_before_it_runs(seed, B, H, S, dtype, causal, masked, kept):
    rng = np.random.default_rng(seed)
    arrays = np.zeros((8, B, H, S, 2), dtype)
    lse, keep = np.empty((B, H, S), dtype), rng.random((B, S)) < 0.5 if masked else None
    weights = np.empty((B, H, S, S), dtype) if kept else None
    for back in (False, True):
        need, ws = _attention_requirement(dtype, back, causal, masked), Workspace(growth="exact")
        sizes_ = dict(B=B, S=S, E=2, r=_block_rows(S, dtype))
        ws.ensure_capacity(need.requests(**sizes_))
        count = ws.allocation_count
        if back:
            attention_backward_into(
                *arrays[:4], lse, *arrays[4:], ws, weights=weights, causal=causal, keep=keep
            )
        else:
            attention_into(*arrays[:4], lse, ws, weights=weights, causal=causal, keep=keep)
        assert ws.peak_bytes == need.nbytes(**sizes_)
        assert ws.used_bytes == 0
        assert ws.allocation_count - count <= (not causal)  # the empty triangle has a name, too
        lse.fill(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [64, 300])
@pytest.mark.parametrize("where", PLACES)
def test_the_steady_state_allocates_no_array(where, S, dtype):
    arrays = place(list(make(np.random.default_rng(0), (8, 2, 2, S, 16), dtype)), where)
    lse, ws = np.zeros((2, 2, S), dtype), Workspace()
    weights, keep = np.zeros((2, 2, S, S), dtype), np.arange(S) < np.array([[S], [S // 2]])
    peaks = {}
    gc.collect()  # or cycles of other tests are collected, or not, while bytes are counted
    with unbuffered():
        for causal in (False, True):
            for mask in (None, keep):
                for P in (None, weights):
                    case = dict(causal=causal, keep=mask, weights=P)
                    name = f"causal={causal}, keep={mask is not None}, kept={P is not None}"
                    peaks[name] = traced_peak(
                        lambda case=case: attention_into(*arrays[:4], lse, ws, **case)
                    )
                    peaks[f"{name}, backward"] = traced_peak(
                        lambda case=case: attention_backward_into(
                            *arrays[:4], lse, *arrays[4:], ws, **case
                        )
                    )
    # Small objects of Python; the smallest array that could be made takes 16 KB (64 x 64 float32).
    assert {name: peak for name, peak in peaks.items() if peak >= 12_000} == {}


def test_no_array_of_the_size_of_the_weights_is_ever_made():
    S = 3000
    arrays, lse = np.zeros((8, 1, 1, S, 4), np.float32), np.zeros((1, 1, S), np.float32)

    def both():
        ws = Workspace(growth="exact")
        attention_into(*arrays[:4], lse, ws, causal=True)
        attention_backward_into(*arrays[:4], lse, *arrays[4:], ws, causal=True)

    with unbuffered():
        assert traced_peak(both, warmup=0) < 3 * _PANEL_BYTES < S * S * 4 / 40


# --- masks of pairs, and scales


MASKS = {
    "flags of all": lambda rng, B, H, T, S: rng.random((T, S)) < 0.6,
    "flags of heads": lambda rng, B, H, T, S: rng.random((H, T, S)) < 0.6,
    "flags of sequences": lambda rng, B, H, T, S: rng.random((B, 1, 1, S)) < 0.6,
    "numbers": lambda rng, B, H, T, S: rng.standard_normal((B, H, T, S)),
    "numbers and nothing": lambda rng, B, H, T, S: np.where(rng.random((T, S)) < 0.6, 0, -np.inf),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    seeds,
    st.integers(1, 12),
    st.integers(0, 40),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0.0, -0.7, 2.0]),
)
def test_masks_of_pairs_are_those_of_the_reference(kind, dtype, seed, T, more, causal, pads, scale):
    rng, B, H, S, E = np.random.default_rng(seed), 2, 3, T + more, 4
    q, G, out, dq = (rng.standard_normal((B, H, T, E)).astype(dtype) for _ in range(4))
    k, v, dk, dv = (rng.standard_normal((B, H, S, E)).astype(dtype) for _ in range(4))
    mask = MASKS[kind](rng, B, H, T, S)
    mask = mask if mask.dtype == bool else mask.astype(dtype)
    keep = padding(rng, B, S, "holes") if pads else None
    case = dict(causal=causal, keep=keep, mask=mask, scale=scale)
    ws, lse = Workspace(debug=True), np.empty((B, H, T), dtype)
    want = attention(q, k, v, **case)
    attention_into(q, k, v, out, lse, ws, **case)
    assert_equiv(out, want, depth=E + S, scale=4.0)
    weights = np.empty((B, H, T, S), dtype)
    attention_into(q, k, v, out, lse, ws, weights=weights, **case)
    assert_equiv(out, want, depth=E + S, scale=4.0)
    hidden = ~np.broadcast_to(mask, weights.shape) if mask.dtype == bool else mask == -np.inf
    assert not weights[np.broadcast_to(hidden, weights.shape)].any()
    for kept in (None, weights):
        attention_backward_into(q, k, v, out, lse, G, dq, dk, dv, ws, weights=kept, **case)
        for got, exact in zip((dq, dk, dv), attention_vjp(q, k, v, G, **case), strict=True):
            assert_equiv(got, exact, depth=E + S, scale=np.abs(exact).max() + 4)


def test_gradients_under_a_mask_are_the_differences():
    rng = np.random.default_rng(0)
    q, k, v, G = rng.standard_normal((4, 1, 2, 4, 3))
    case = dict(mask=rng.standard_normal((2, 4, 4)), scale=0.8)
    for i, got in enumerate(attention_vjp(q, k, v, G, **case)):
        arrays = [q, k, v]

        def loss(a, i=i, arrays=arrays):
            return np.sum(G * attention(*arrays[:i], a, *arrays[i + 1 :], **case))

        assert_equiv(got, numeric_gradient(loss, arrays[i]), c=1e7, scale=1.0)


def test_a_mask_of_several_blocks_has_its_bytes_in_the_requirement():
    rng, (B, H, S, E) = np.random.default_rng(0), (1, 2, LONG, 8)
    q, k, v, out = rng.standard_normal((4, B, H, S, E)).astype(np.float32)
    for mask in (rng.random((S, S)) < 0.5, rng.standard_normal((S, S)).astype(np.float32)):
        ws = Workspace(growth="exact")
        attention_into(q, k, v, out, np.empty((B, H, S), np.float32), ws, mask=mask)
        assert_equiv(out, attention(q, k, v, mask=mask), depth=S, scale=4.0)
        need = _attention_requirement(np.float32, mask=mask.dtype == bool)
        assert ws.peak_bytes == need.nbytes(r=_block_rows(S), S=S)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mask=np.ones((4, 5), bool)), r"^mask: shape \(4, 5\) cannot be repeated to .*4, 4\)"),
        (dict(mask=np.ones((2, 1, 1, 4, 4), bool)), r"^mask: shape"),
        (dict(mask=np.ones((4, 4))), r"^mask: a NumPy array is needed, of bool"),
        (dict(mask=np.ones((4, 4), np.uint8)), r"^mask: a NumPy array"),
        (dict(mask=[[True] * 4] * 4), r"^mask: a NumPy array"),
        (dict(scale=np.nan), r"^scale: nan"),
        (dict(scale=np.inf), r"^scale: inf"),
        (dict(scale="half"), r"^scale: "),
    ],
)
def test_bad_masks_and_scales_write_nothing(options, message):
    q, k, v, out = np.ones((4, 1, 2, 4, 3), np.float32)
    out[...] = 7
    lse = np.full((1, 2, 4), 7, np.float32)
    for call in (
        lambda: attention(q, k, v, **options),
        lambda: attention_into(q, k, v, out, lse, Workspace(), **options),
        lambda: attention_vjp(q, k, v, q, **options),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert (out == 7).all()
    assert (lse == 7).all()
    mask = out[0, 0, :, :1]  # of the memory that is written to
    with pytest.raises(ValueError, match=r"^out: overlaps mask"):
        attention_into(q, k, v, out, lse, Workspace(), mask=mask)
