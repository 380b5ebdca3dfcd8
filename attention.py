"""Attention with relative positions in windows, as free functions: what SAM's blocks do between
`qkv` and `proj`.

    q, k, v -> append_bias -> split_grid -> attend_part of each part -> together again
                                            cut_windows -> windowed_attention -> merge_windows

No padded token is computed, see `windowed_attention`, and no matrix of attention is kept, see
`softmax_attention`.

Shapes: `B` images, `h, w` tokens of a grid or of a window, `N` windows, `d` width of a head; `rows,
cols` of a full window."""

from __future__ import annotations

from typing import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

WRITTEN_OUT = 2**20  # entries of a matrix of attention, up to which a CPU writes it out


AT_A_TIME = 2**21  # entries of all matrices of attention that a CPU has written out at a time


def relative_table(table: Tensor, n: int) -> Tensor:
    """The (2L-1, d) table of relative positions, as (n, n, d): entry [query, key] belongs to the
    offset query - key.

    A table of another length is resized linearly to 2n - 1 offsets, as SAM does.
    """
    if table.shape[0] != 2 * n - 1:
        table = F.interpolate(table.T[None], size=2 * n - 1, mode="linear")[0].T
    position = torch.arange(n, device=table.device)
    return table[position[:, None] - position[None, :] + n - 1]


def append_bias(q: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """q (B, h, w, heads, d), rel_h (h, h', d), rel_w (w, w', d) -> (B, h, w, heads, d + h' + w').

    The bias of a query and a key, q . rel_h[qy, ky] + q . rel_w[qx, kx], is a product itself:
    behind the scaled query stand its products with rel_h and rel_w, and behind the key the one-hot
    codes of its row and column (`position_codes`). Whatever kernel multiplies queries and keys then
    gets the whole exponent."""
    to_rows = torch.einsum(
        "byxad,ykd->byxak", q, rel_h
    )  # (B, h, w, heads, h'), the query not scaled
    to_cols = torch.einsum("byxad,xkd->byxak", q, rel_w)  # (B, h, w, heads, w')
    return torch.cat([q * q.shape[-1] ** -0.5, to_rows, to_cols], dim=-1)


def position_codes(h: int, w: int, rows: int, cols: int, like: Tensor) -> Tensor:
    """(h*w, rows + cols): the one-hot row and column of each token of h x w, on the upper left of
    rows x cols.
    """
    row_code = torch.eye(h, rows, dtype=like.dtype, device=like.device).repeat_interleave(
        w, dim=0
    )  # (h*w, rows)
    col_code = torch.eye(w, cols, dtype=like.dtype, device=like.device).repeat(h, 1)  # (h*w, cols)
    return torch.cat([row_code, col_code], dim=1)


def append_codes(k: Tensor, codes: Tensor) -> Tensor:
    """k (N, heads, m, d), codes (m, c) -> (N, heads, m, d + c)."""
    return torch.cat([k, codes.expand(*k.shape[:2], -1, -1)], dim=-1)


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: int, cols: int, filling: tuple[Tensor, Tensor]
) -> Tensor:
    """softmax(exponents) v in windows of h x w tokens: q as of `append_bias` (N, heads, h, w, d +
    rows + cols), k and v (N, heads, h, w, d) -> (N, heads, h, w, d).

    A window smaller than rows x cols is filled up, below and on the right, with copies of one key
    and one value: `filling`, each (heads, d). They take part as one key, see `filling_exponent`.
    """
    N, heads, h, w, d = k.shape
    keys, values, codes = k.flatten(2, 3), v.flatten(2, 3), position_codes(h, w, rows, cols, k)
    if (h, w) != (rows, cols):
        key, value = (t[:, None].expand(N, -1, -1, -1) for t in filling)  # (N, heads, 1, d)
        q = torch.cat([q, filling_exponent(q[..., d : d + rows], q[..., d + rows :])], dim=-1)
        keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        codes = F.pad(codes, (0, 1, 0, 1))  # no row and no column is the filling's own,
        codes[-1, -1] = 1  # but the exponent
    return softmax_attention(q.flatten(2, 3), keys, codes, values).unflatten(2, (h, w))


def attend_part(
    q: Tensor, k: Tensor, v: Tensor, rows: int, cols: int, filling: tuple[Tensor, Tensor]
) -> Tensor:
    """`windowed_attention` in all windows of one part of a grid: (B, h, w, heads, .) -> (B, h, w,
    heads * d).
    """
    h, w = k.shape[1:3]
    windows = (cut_windows(t, min(rows, h), min(cols, w)) for t in (q, k, v))
    return merge_windows(windowed_attention(*windows, rows, cols, filling), h, w)


def filling_exponent(to_rows: Tensor, to_cols: Tensor) -> Tensor:
    """log(sum of exp(bias) over all filled positions) of each query: (N, heads, h, w, rows), (..,
    cols) -> (.., 1).

    They have the same key, so their exponents differ by the bias alone, a term of the row plus a
    term of the column; and the sum over a rectangle of positions is a product of two sums. They lie
    below the tokens (in all columns) and beside them (in the tokens' rows)."""
    h, w = to_rows.shape[2:4]
    dtype = to_rows.dtype
    to_rows, to_cols = (t.to(torch.promote_types(dtype, torch.float32)) for t in (to_rows, to_cols))
    below = to_rows[..., h:].logsumexp(-1, keepdim=True) + to_cols.logsumexp(-1, keepdim=True)
    beside = to_rows[..., :h].logsumexp(-1, keepdim=True) + to_cols[..., w:].logsumexp(
        -1, keepdim=True
    )
    return torch.logaddexp(below, beside).to(dtype)


def softmax_attention(q: Tensor, k: Tensor, codes: Tensor, v: Tensor) -> Tensor:
    """softmax(q [k, codes]^T) v: q (N, heads, n, d + c), k (N, heads, m, d), codes (m, c), without
    gradient, v (N, heads, m, d) -> (N, heads, n, d).

    On the CPU small matrices are written out: measured on two cores with the windows of ViT-L, this
    takes 5 ms forward and 16 ms with the way back in bf16, the fused kernel 14 and 49 ms; in fp32
    12 and 42 ms against 15 and 47 ms."""
    if q.device.type == "cpu" and q.shape[-2] * k.shape[-2] <= WRITTEN_OUT:
        return WrittenOut.apply(q, k, codes, v)
    padded = F.pad(
        v, (0, q.shape[-1] - v.shape[-1])
    )  # the fused kernels want one width for all three
    return F.scaled_dot_product_attention(q, append_codes(k, codes), padded, scale=1.0)[
        ..., : v.shape[-1]
    ]


class WrittenOut(torch.autograd.Function):
    """softmax(q [k, codes]^T) v, with `AT_A_TIME` entries of the matrices of attention written out
    at a time. They are not kept: going backward they are computed again.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, codes: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, codes, v)
        whole = q.new_empty(*q.shape[:-1], v.shape[-1])
        for q, k, v, out in few_at_a_time(q, k, v, whole):
            torch.matmul(attention_matrix(q, append_codes(k, codes)), v, out=out)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
        q, k, codes, v = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v)]
        for q, k, v, grad_out, grad_q, grad_k, grad_v in few_at_a_time(q, k, v, grad, *grads):
            keys = append_codes(k, codes)
            p = attention_matrix(q, keys)
            torch.matmul(p.mT, grad_out, out=grad_v)
            grad_s = (grad_out @ v.mT).mul_(
                p
            )  # that of p, times p; less p times the sum of its row: of the exponents
            grad_s.addcmul_(p, grad_s.sum(dim=-1, keepdim=True), value=-1)
            torch.matmul(grad_s, keys, out=grad_q)
            torch.matmul(grad_s.mT, q[..., : k.shape[-1]], out=grad_k)
        return grads[0], grads[1], None, grads[2]


def attention_matrix(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T), in one piece of memory: (..., n, e), (..., m, e) -> (..., n, m)."""
    s = q @ k.mT
    return torch.softmax(s, dim=-1, out=s)


def few_at_a_time(q: Tensor, k: Tensor, *more: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Splits them alike along the first axis: `AT_A_TIME` entries of the matrices of attention of q
    and k at most, or one window.
    """
    few = max(1, AT_A_TIME // (q.shape[1] * q.shape[2] * k.shape[2]))
    return zip(*(t.split(few) for t in (q, k, *more)))


def split_grid(x: Tensor, rows: int, cols: int) -> list[list[Tensor]]:
    """(B, h, w, ...) -> the part that whole windows of rows x cols cover, and what is left on the
    right; below, the same.
    """
    bands = x.split(whole_and_rest(x.shape[1], rows), dim=1)
    return [list(band.split(whole_and_rest(x.shape[2], cols), dim=2)) for band in bands]


def whole_and_rest(n: int, side: int) -> list[int]:
    """n tokens in windows of `side`: how many lie in whole windows, and how many in a last, smaller
    one; no zeros.
    """
    return [part for part in (n - n % side, n % side) if part]


def cut_windows(x: Tensor, rows: int, cols: int) -> Tensor:
    """(B, h, w, heads, d), h and w multiples of rows and cols -> (B * windows, heads, rows, cols,
    d), row by row.
    """
    B, h, w, heads, d = x.shape
    x = x.view(B, h // rows, rows, w // cols, cols, heads, d)
    return x.permute(0, 1, 3, 5, 2, 4, 6).contiguous().view(-1, heads, rows, cols, d)


def merge_windows(windows: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `cut_windows`: (B * windows, heads, rows, cols, d) -> (B, h, w, heads * d)."""
    _, heads, rows, cols, d = windows.shape
    x = windows.view(-1, h // rows, w // cols, heads, rows, cols, d)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, h, w, heads * d)
