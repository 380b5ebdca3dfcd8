"""SAM's encoder against oracles that pad, project and multiply everything out; and its loading,
total or not at all.
"""

import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise, same_state, small_encoder, snapshot
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import sam_vit
from sam_vit import Attention, WeightsError, build_image_encoder, load_sam_weights
from tuners import TUNERS, apply_tuner

GOLDENS = Path(__file__).parent / "goldens"
side = st.integers(1, 9)
SPELLINGS = {
    "bare": lambda name: name,
    "whole SAM": lambda name: "image_encoder." + name,
    "data parallel": lambda name: "module.image_encoder." + name,
    "hugging face": lambda name: "vision_encoder." + hugging_face(name),
}


def hugging_face(name):
    for ours, theirs in (
        (r"^blocks", "layers"),
        (r"\bnorm([12])", r"layer_norm\1"),
        (r"^patch_embed\.proj", "patch_embed.projection"),
        (r"neck\.0", "neck.conv1"),
        (r"neck\.1", "neck.layer_norm1"),
        (r"neck\.2", "neck.conv2"),
        (r"neck\.3", "neck.layer_norm2"),
    ):
        name = re.sub(ours, theirs, name)
    return name


# -------------------------------------------------------------------------------------- the encoder


def test_positions_of_the_stored_grid_stay_as_they_are():
    positions = torch.randn(1, 4, 6, 3)
    assert torch.equal(sam_vit.resize_positions(positions, (4, 6)), positions)


def cubic_matrix(n, n0):
    """(n, n0): the weights of n0 stored values in n resized ones, for torch's cubic kernel (a =
    -3/4).
    """
    weights = torch.zeros(n, n0)
    for i in range(n):
        at = (i + 0.5) * n0 / n - 0.5
        for tap in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            t = abs(at - tap)
            near, far = 1.25 * t**3 - 2.25 * t**2 + 1, -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            weights[i, min(max(tap, 0), n0 - 1)] += near if t <= 1 else far
    return weights


@given(h=st.integers(1, 12), w=st.integers(1, 12), h0=st.integers(1, 9), w0=st.integers(1, 9))
def test_positions_of_another_grid_are_resized_bicubically(h, w, h0, w0):
    positions = torch.randn(1, h0, w0, 2)
    wanted = torch.einsum("yi,xj,bijc->byxc", cubic_matrix(h, h0), cubic_matrix(w, w0), positions)
    assert_close(sam_vit.resize_positions(positions, (h, w)), wanted, atol=1e-5, rtol=1e-5)


@given(rows=st.integers(1, 6), cols=st.integers(1, 6))
def test_any_multiple_of_16_is_encoded(rows, cols):
    out = small_encoder()(torch.rand(1, 3, 16 * rows, 16 * cols))
    assert out.shape == (1, 256, rows, cols) and out.isfinite().all()


@given(
    rows=st.integers(1, 3), size=st.integers(1, 70).filter(lambda n: n % 16), first=st.booleans()
)
def test_other_heights_and_widths_are_refused(rows, size, first):
    H, W = (size, 16 * rows) if first else (16 * rows, size)
    with pytest.raises(ValueError, match="multiples of 16"):
        small_encoder()(torch.rand(1, 3, H, W))


def test_an_image_does_not_see_its_batch():
    encoder, x = small_encoder(), torch.rand(3, 3, 64, 80)
    assert_close(encoder(x)[1:2], encoder(x[1:2]))


@pytest.mark.parametrize(
    "size, count", [("vit_b", 89_670_912), ("vit_l", 308_278_272), ("vit_h", 637_026_048)]
)
def test_sizes_have_sams_parameter_counts(size, count):
    with torch.device("meta"):
        encoder = build_image_encoder(size)
    assert sum(p.numel() for p in encoder.parameters()) == count


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="vit_x.*vit_b"):
        build_image_encoder("vit_x")


def test_names_and_shapes_are_those_of_sam():
    golden = json.loads((GOLDENS / "sam_encoder.json").read_text())
    ours = build_image_encoder(golden["encoder"]).state_dict()
    assert {n: list(t.shape) for n, t in ours.items()} == {
        n: shape for n, (shape, _) in golden["keys"].items()
    }


# ------------------------------------------------------------------------------------ the attention


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


@given(B=st.integers(1, 2), h=side, w=side, rows=st.integers(1, 5), cols=st.integers(1, 5))
def test_windows_are_cut_row_by_row_from_a_grid_padded_with_zeros_and_merged_back(
    B, h, w, rows, cols
):
    x = torch.randn(B, h, w, 3)
    windows = sam_vit.window_partition(x, rows, cols)
    down, across = -(-h // rows), -(-w // cols)
    assert windows.shape == (B * down * across, rows, cols, 3)
    last = torch.zeros(rows, cols, 3)  # the lower right window of the last image
    part = x[-1, (down - 1) * rows :, (across - 1) * cols :]
    last[: part.shape[0], : part.shape[1]] = part
    assert torch.equal(windows[-1], last)
    assert torch.equal(sam_vit.window_unpartition(windows, h, w), x)


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


# ------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_sams_names_gives_the_same_output(spelling):
    source, x = small_encoder(seed=1), torch.rand(1, 3, 64, 48)
    extras = [
        "prompt_encoder.pe_layer.weight",
        "mask_decoder.iou_token.weight",
        "shared_image_embedding.embedding",
    ]
    state = {SPELLINGS[spelling](n): t for n, t in source.state_dict().items()}
    encoder = small_encoder(seed=2)
    report = load_sam_weights(encoder, {**state, **{n: torch.ones(1) for n in extras}})
    assert torch.equal(encoder(x), source(x))
    assert set(report.loaded) == set(source.state_dict()) and report.ignored == extras
    assert not report.resized and not report.zeroed


def without(state, name):
    del state[name]


def renamed(state, name):
    state[name.replace("rel_pos_h", "rel_h")] = state.pop(name)


def transposed(state, name):
    state[name] = state[name].mT.contiguous()


def misshapen(state, name):
    state[name] = state[name][:-1]


def foreign(state, name):
    state[name] = torch.zeros(1)


DAMAGES = [
    (without, "blocks.1.mlp.lin2.bias", "blocks.1.mlp.lin2.bias"),
    (without, "pos_embed", "pos_embed"),
    (renamed, "blocks.0.attn.rel_pos_h", "blocks.0.attn.rel_pos_h.*blocks.0.attn.rel_h"),
    (misshapen, "neck.0.weight", "neck.0.weight"),
    (transposed, "blocks.0.mlp.lin1.weight", "blocks.0.mlp.lin1.weight"),
    (transposed, "blocks.0.attn.rel_pos_w", "blocks.0.attn.rel_pos_w"),
    (foreign, "blocks.0.attn.lora", "blocks.0.attn.lora"),
    (foreign, "blocks.2.norm1.weight", "blocks.2.norm1.weight"),
]


@pytest.mark.parametrize(
    "damage, name, said", DAMAGES, ids=[f"{d.__name__}-{n}" for d, n, _ in DAMAGES]
)
@pytest.mark.parametrize("tuner", [None, "adapter", "lora"])
def test_a_damaged_state_dict_is_named_and_changes_nothing(damage, name, said, tuner):
    state = small_encoder(seed=1).state_dict()
    damage(state, name)
    encoder = small_encoder(seed=2)
    if tuner:
        apply_tuner(encoder, tuner)
    before = snapshot(encoder)
    with pytest.raises(WeightsError, match=said):
        load_sam_weights(encoder, state)
    assert same_state(encoder, before)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_loads_whole_and_is_refused_wherever_it_is_cut(zipped, tmp_path):
    source, encoder, path = small_encoder(seed=1), small_encoder(seed=2), tmp_path / "sam.pth"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=zipped)
    data, before = path.read_bytes(), snapshot(encoder)
    for size in [*range(0, 300, 7), *range(300, len(data), len(data) // 20), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(WeightsError, match="sam.pth"):
            load_sam_weights(encoder, path)
    assert same_state(encoder, before)
    path.write_bytes(data)
    load_sam_weights(encoder, path)
    assert same_state(encoder, source.state_dict())


class RunsCode:
    def __reduce__(self):
        return Path.touch, (Path("was_run"),)


def plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize(
    "content", [RunsCode(), [1, 2], {"pos_embed": 1}, {"model": {"a": "b"}}, {7: torch.ones(1)}]
)
@pytest.mark.parametrize("write", [torch.save, plain_pickle])
def test_a_pickle_that_is_not_tensors_is_refused(content, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(content, tmp_path / "sam.pth")
    encoder = small_encoder()
    before = snapshot(encoder)
    with pytest.raises(WeightsError, match="sam.pth"):
        load_sam_weights(encoder, tmp_path / "sam.pth")
    assert same_state(encoder, before) and not Path("was_run").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match="nowhere.pth"):
        load_sam_weights(small_encoder(), tmp_path / "nowhere.pth")


def test_safetensors_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "sam.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(WeightsError, match="pip install safetensors"):
        load_sam_weights(small_encoder(), tmp_path / "sam.safetensors")


def test_a_state_dict_under_model_is_found(tmp_path):
    source, encoder = small_encoder(seed=1), small_encoder(seed=2)
    torch.save({"model": source.state_dict()}, tmp_path / "sam.pth")
    load_sam_weights(encoder, tmp_path / "sam.pth")
    assert same_state(encoder, source.state_dict())


def test_resized_tables_are_reported_and_compute_the_same():
    source, encoder = small_encoder(seed=1, img_size=128), small_encoder(seed=2)
    state, x = source.state_dict(), torch.rand(1, 3, 64, 64)
    before = snapshot(source)
    report = load_sam_weights(encoder, state)
    tables = {"pos_embed", "blocks.1.attn.rel_pos_h", "blocks.1.attn.rel_pos_w"}
    assert {line.split(":")[0] for line in report.resized} == tables
    assert "pos_embed: (1, 8, 8, 32) -> (1, 4, 4, 32)" in report.resized
    assert set(report.loaded) == set(state) and "3 resized" in str(report)
    assert_close(encoder(x), source(x))
    assert same_state(source, before)


def test_zero_relative_positions_zero_the_tables_and_nothing_else():
    source, encoder = small_encoder(seed=1), small_encoder(seed=2)
    report = load_sam_weights(encoder, source.state_dict(), relative_positions="zero")
    tables = {f"blocks.{i}.attn.rel_pos_{axis}" for i in (0, 1) for axis in "hw"}
    assert set(report.zeroed) == tables and set(report.loaded) == set(source.state_dict()) - tables
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(
            tensor, torch.zeros_like(tensor) if name in tables else source.state_dict()[name]
        )


def test_another_word_for_the_relative_positions_is_refused():
    with pytest.raises(ValueError, match="'none'"):
        load_sam_weights(small_encoder(), small_encoder().state_dict(), relative_positions="none")


@pytest.mark.parametrize("tuner", TUNERS)
def test_loading_after_the_tuner_keeps_the_tuners_tensors(tuner):
    source = small_encoder(seed=1)
    encoder = randomise(apply_tuner(small_encoder(seed=2), tuner))
    before = snapshot(encoder)
    load_sam_weights(encoder, source.state_dict())
    assert same_state(encoder, {n: source.state_dict().get(n, before[n]) for n in before})
