"""Attention against an oracle that pads, projects and multiplies everything out, one window and
head at a time.
"""

import numpy as np
import pytest
import torch
from conftest import randomise
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import attention
from sam_vit import Attention

side = st.integers(1, 9)


def resized(table, length):
    """Linear interpolation between the centres of the entries, constant beyond the first and the
    last.
    """
    table = table.detach().numpy()
    at = (np.arange(length) + 0.5) * len(table) / length - 0.5
    return torch.tensor(
        np.stack([np.interp(at, np.arange(len(table)), column) for column in table.T], axis=1)
    )


def attend_all_pairs(q, k, v, table_h, table_w, h, w):
    """One head on h x w tokens in rows, (tokens, d) each: softmax of the whole (tokens, tokens)
    matrix.
    """
    y, x = torch.arange(h * w) // w, torch.arange(h * w) % w
    of_rows = table_h[y[:, None] - y[None, :] + h - 1]  # (tokens, tokens, d)
    of_cols = table_w[x[:, None] - x[None, :] + w - 1]
    bias = (q[:, None] * of_rows).sum(-1) + (q[:, None] * of_cols).sum(-1)
    return torch.softmax(q @ k.T / q.shape[1] ** 0.5 + bias, dim=1) @ v


def pad_first_attention(attn, tokens):
    """As SAM tells it: zeros around the tokens, every token projected, every window and head on its
    own.
    """
    B, h, w, C = tokens.shape
    rows, cols = (attn.window, attn.window) if attn.window else (h, w)
    padded = tokens.new_zeros(B, -(-h // rows) * rows, -(-w // cols) * cols, C)
    padded[:, :h, :w] = tokens
    out, d = torch.empty_like(padded), C // attn.num_heads
    table_h, table_w = resized(attn.rel_pos_h, 2 * rows - 1), resized(attn.rel_pos_w, 2 * cols - 1)
    for b in range(B):
        for top in range(0, padded.shape[1], rows):
            for left in range(0, padded.shape[2], cols):
                here = b, slice(top, top + rows), slice(left, left + cols)
                qkv = attn.qkv(padded[here].reshape(rows * cols, C))
                for head in range(0, C, d):
                    q, k, v = (qkv[:, part + head : part + head + d] for part in (0, C, 2 * C))
                    found = attend_all_pairs(q, k, v, table_h, table_w, rows, cols)
                    out[here][..., head : head + d] = found.view(rows, cols, d)
    return attn.proj(out[:, :h, :w])


def random_attention(heads, table, window):
    return randomise(
        Attention(4 * heads, heads, table, window).double().requires_grad_(False), seed=table
    )


@given(rows=st.integers(1, 4), cols=st.integers(1, 4), a=st.integers(1, 5), b=st.integers(1, 5))
def test_windows_are_cut_row_by_row_and_merged_back(rows, cols, a, b):
    x = torch.randn(2, rows * a, cols * b, 3, 2)
    windows = attention.cut_windows(x, a, b)  # (images x windows, heads, a, b, d)
    second = x[1, :a, -b:]  # the top right window of the second image
    assert torch.equal(windows[rows * cols + cols - 1], second.permute(2, 0, 1, 3))
    assert torch.equal(attention.merge_windows(windows, *x.shape[1:3]), x.flatten(3))


@given(h=st.integers(1, 12), w=st.integers(1, 12), rows=st.integers(1, 9), cols=st.integers(1, 9))
def test_a_grid_is_split_into_whole_windows_and_what_is_left_at_its_end(h, w, rows, cols):
    x = torch.randn(2, h, w, 3)
    bands = attention.split_grid(x, rows, cols)
    assert torch.equal(torch.cat([torch.cat(band, dim=2) for band in bands], dim=1), x)
    for n, side, sizes in (
        (h, rows, [band[0].shape[1] for band in bands]),
        (w, cols, [part.shape[2] for part in bands[0]]),
    ):
        assert sizes == [size for size in (n // side * side, n % side) if size]


@given(
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    more_h=st.integers(0, 3),
    more_w=st.integers(0, 3),
    d=st.integers(1, 5),
)
def test_a_window_that_is_filled_up_is_the_softmax_of_all_pairs_with_the_copies(
    h, w, more_h, more_w, d
):
    rows, cols = h + more_h, w + more_w
    q, k, v = torch.randn(3, rows, cols, d, dtype=torch.float64)
    filling = torch.randn(2, d, dtype=torch.float64)
    table_h, table_w = (torch.randn(2 * n - 1, d, dtype=torch.float64) for n in (rows, cols))
    inside = torch.zeros(rows, cols, 1, dtype=torch.bool)
    inside[:h, :w] = True
    full = (t.where(inside, value).flatten(0, 1) for t, value in ((k, filling[0]), (v, filling[1])))
    expected = attend_all_pairs(q.flatten(0, 1), *full, table_h, table_w, rows, cols).view(
        rows, cols, d
    )[:h, :w]

    rel_h, rel_w = attention.relative_table(table_h, rows), attention.relative_table(table_w, cols)
    queries = attention.append_bias(
        q[None, :h, :w, None], rel_h[:h], rel_w[:w]
    )  # one image, one head
    windows = (
        attention.cut_windows(t, h, w)
        for t in (queries, k[None, :h, :w, None], v[None, :h, :w, None])
    )
    found = attention.windowed_attention(*windows, rows, cols, filling[:, None])
    assert_close(found[0, 0], expected)


@given(
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    more_h=st.integers(0, 3),
    more_w=st.integers(1, 3),
    size=st.integers(0, 300),
)
def test_the_weight_of_the_filling_is_a_sum_over_its_positions_at_any_size_of_the_numbers(
    h, w, more_h, more_w, size
):
    rows, cols = h + more_h, w + more_w
    to_rows, to_cols = (
        size * torch.randn(1, 1, h, w, n, dtype=torch.float64) for n in (rows, cols)
    )
    bias = to_rows[..., :, None] + to_cols[..., None, :]  # (1, 1, h, w, rows, cols)
    positions = [bias[..., y, x] for y in range(rows) for x in range(cols) if y >= h or x >= w]
    found = attention.filling_exponent(to_rows, to_cols)[..., 0]
    assert_close(found, torch.stack(positions).logsumexp(0))


@given(n=st.integers(1, 6), m=st.integers(1, 6), d=st.integers(1, 4), more=st.integers(0, 3))
def test_written_out_or_fused_attention_is_the_softmax_of_keys_with_their_codes(n, m, d, more):
    shapes = (2, 3, n, d + more), (2, 3, m, d), (m, more), (2, 3, m, d)
    q, k, codes, v = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    expected = (q @ torch.cat([k, codes.expand(2, 3, m, more)], dim=-1).mT).softmax(dim=-1) @ v
    assert_close(attention.softmax_attention(q, k, codes, v), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "WRITTEN_OUT", 0)
        assert_close(attention.softmax_attention(q, k, codes, v), expected)


@given(h=side, w=side, window=st.integers(2, 5))
def test_attention_in_bf16_stays_in_bf16_and_near_the_rest(h, w, window):
    attn, x = random_attention(2, window, window), torch.randn(2, h, w, 8, dtype=torch.float64)
    whole, half = attn(x), attn.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - whole).abs().max() < 0.05 * whole.abs().max()


@given(h=side, w=side, window=st.integers(2, 5), heads=st.integers(1, 2))
def test_padded_attention_equals_padding_first(h, w, window, heads):
    attn = random_attention(heads, window, window)
    x = torch.randn(2, h, w, 4 * heads, dtype=torch.float64)
    assert_close(attn(x), pad_first_attention(attn, x))


@given(h=side, w=side, table=st.integers(2, 9), heads=st.integers(1, 2))
def test_global_attention_resizes_its_tables_linearly(h, w, table, heads):
    attn = random_attention(heads, table, window=0)
    x = torch.randn(2, h, w, 4 * heads, dtype=torch.float64)
    assert_close(attn(x), pad_first_attention(attn, x))


@given(
    N=st.integers(1, 5),
    heads=st.integers(1, 2),
    n=st.integers(1, 4),
    m=st.integers(1, 4),
    at_a_time=st.integers(1, 40),
)
def test_the_way_back_of_written_out_attention_is_its_derivative(N, heads, n, m, at_a_time):
    q, k, v = (
        torch.randn(N, heads, *s, dtype=torch.float64, requires_grad=True)
        for s in ((n, 3), (m, 2), (m, 2))
    )
    codes = torch.randn(m, 1, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "AT_A_TIME", at_a_time)
        assert torch.autograd.gradcheck(attention.softmax_attention, (q, k, codes, v))


@given(
    N=st.integers(1, 9),
    heads=st.integers(1, 3),
    n=st.integers(1, 4),
    m=st.integers(1, 4),
    at_a_time=st.integers(1, 99),
)
def test_a_few_windows_at_a_time_stay_below_the_limit_and_leave_none_out(N, heads, n, m, at_a_time):
    q, k, v = torch.randn(N, heads, n, 2), torch.randn(N, heads, m, 2), torch.randn(N)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "AT_A_TIME", at_a_time)
        parts = list(attention.few_at_a_time(q, k, v))
    for whole, pieces in zip((q, k, v), zip(*parts)):
        assert torch.equal(torch.cat(pieces), whole)
    assert all(len(part) == 1 or part.shape[:3].numel() * m <= at_a_time for part, _, _ in parts)


def test_no_matrix_of_attention_is_kept():
    attn, x = randomise(Attention(32, 2, 16, 0)), torch.randn(2, 16, 16, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        attn(x)
    assert max(kept) < 4 * 2 * 2 * 256 * 256  # bytes, images, heads, queries, keys
