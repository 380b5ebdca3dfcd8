"""The encoder that learned to see on dead leaves: its pictures, its training, its file."""

import hashlib
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_city
from hypothesis import given
from hypothesis import strategies as st

from engine import pretrained, pretraining
from engine.networks import build_model
from engine.pretrained import find_weights
from engine.settings import Settings
from geodata.leaves import make_picture
from sam_vit import WeightsError, build_image_encoder, load_sam_weights, read_state_dict

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "weights" / "vit_t.pth"

seeds = st.integers(0, 2**31)


# -------------------------------------------------------------------------------------- dead leaves


@given(seeds, st.integers(0, 10**6), st.integers(32, 96))
def test_a_picture_is_a_function_of_its_seed_and_shows_what_its_map_says(seed, index, size):
    picture, again = make_picture(seed, index, size), make_picture(seed, index, size)
    for name in ("image", "shapes", "colors"):
        assert np.array_equal(getattr(picture, name), getattr(again, name))
    assert picture.image.shape == picture.colors[picture.shapes].shape == (size, size, 3)
    assert picture.image.dtype == picture.colors.dtype == np.uint8
    assert len(np.unique(picture.shapes)) > 1


@pytest.mark.parametrize("seed, index", [(0, 1), (1, 0)])
def test_another_seed_or_index_is_another_picture(seed, index):
    one, other = make_picture(0, 0, 64), make_picture(seed, index, 64)
    assert not np.array_equal(one.shapes, other.shapes)


def test_pictures_show_shapes_of_many_sizes_and_their_colors():
    pictures = [make_picture(0, i, 160) for i in range(8)]
    areas = np.concatenate([np.unique(p.shapes, return_counts=True)[1] for p in pictures])
    assert (areas < 50).any() and (areas > 2000).any()
    # Light moves what a shape looks like, but its own colour remains the best guess of it.
    for p in pictures:
        flat = p.colors[p.shapes].mean(axis=-1)
        seen = p.image.mean(axis=-1)
        assert np.corrcoef(flat.ravel(), seen.ravel())[0, 1] > 0.3


@pytest.fixture(scope="module")
def pictures():
    return [make_picture(0, i, 256) for i in range(2)]


@given(seed=seeds, step=st.integers(0, 10**4))
def test_a_batch_is_a_function_of_seed_and_step_and_its_maps_fit_its_images(pictures, seed, step):
    batch, again = (pretraining.make_batch(pictures, seed, step, 256) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(vars(batch).values(), vars(again).values()))
    B, _, H, W = batch.images.shape
    assert H == W == (256 if step % 4 == 0 else 128) and B * H * W == 256 * 256
    assert batch.shapes.shape == batch.edges.shape == (B, H // 4, W // 4)
    assert batch.colors.shape == (B, 3, H // 4, W // 4)
    for values in (batch.images, batch.edges, batch.colors):
        assert 0 <= values.min() and values.max() <= 1
    assert ((batch.edges == 0) | (batch.edges == 1)).all()
    colors = batch.colors.permute(0, 2, 3, 1)
    for b in range(B):
        shape = batch.shapes[b, 0, 0]
        assert (colors[b][batch.shapes[b] == shape] == colors[b, 0, 0]).all()


def test_cells_of_one_shape_attract_and_of_two_repel():
    shapes = torch.zeros(1, 8, 8, dtype=torch.long)
    shapes[:, :, 4:] = 1
    apart, radius = torch.zeros(1, 2, 8, 8), torch.ones(())
    apart[:, 0] = 3.0 * shapes
    torch.manual_seed(0)
    for other in (torch.zeros_like(apart), torch.randn(1, 2, 8, 8), apart.flip(1) + apart.mT):
        right, wrong = (pretraining.affinity_loss(e, shapes, radius) for e in (apart, other))
        assert right < 0.2 < wrong


def test_features_that_all_say_the_same_or_nothing_cost_more_than_spread_ones():
    torch.manual_seed(0)
    spread = torch.randn(4, 8, 32, 32)
    same, nothing = spread[:, :1].expand_as(spread), 0.01 * spread
    right, *wrong = (pretraining.spread_loss(x).item() for x in (spread, same, nothing))
    assert right < 0.01 and min(wrong) > 0.1


# ----------------------------------------------------------------------------------------- training

SHORT = "--seed 3 --steps 6 --pictures 2 --tokens 64 --save-every 2"


def run(out, words=SHORT):
    pretraining.main(["--out", str(out), *words.split()])
    return out.read_bytes()


def test_the_same_command_writes_the_same_bytes_and_another_seed_others(tmp_path):
    first = run(tmp_path / "a.pth")
    assert run(tmp_path / "b.pth") == first
    assert run(tmp_path / "c.pth", SHORT.replace("--seed 3", "--seed 4")) != first
    assert {p.name for p in tmp_path.iterdir()} == {"a.pth", "b.pth", "c.pth"}


def test_an_interrupted_training_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    whole, steps, make_batch = run(tmp_path / "a.pth"), [], pretraining.make_batch

    def interrupted(pictures, seed, step, tokens):
        steps.append(step)
        if steps == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return make_batch(pictures, seed, step, tokens)

    monkeypatch.setattr(pretraining, "make_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b.pth")
    assert not (tmp_path / "b.pth").exists()
    assert run(tmp_path / "b.pth") == whole and steps == [0, 1, 2, 3, 4, 4, 5]
    assert not (tmp_path / "b.pth.part").exists()


def test_what_another_command_left_is_refused(tmp_path, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "save_encoder", broken)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth.part.*remove it"):
        run(tmp_path / "a.pth", SHORT.replace("--steps 6", "--steps 7"))


def test_training_moves_every_tensor_of_the_encoder(tmp_path):
    run(tmp_path / "a.pth")
    state = read_state_dict(tmp_path / "a.pth")
    torch.manual_seed(3)
    before = pretraining.Student().image_encoder.state_dict()
    assert state.keys() == {f"image_encoder.{name}" for name in before}
    assert not [n for n, t in before.items() if torch.equal(state[f"image_encoder.{n}"], t)]


# ------------------------------------------------------------------------------------ the file here


def test_the_file_is_small_and_loads_in_total():
    assert FILE.stat().st_size <= 4.5e6
    state = read_state_dict(FILE)
    assert all(
        t.dtype == torch.bfloat16 and n.startswith("image_encoder.") for n, t in state.items()
    )
    encoder = build_image_encoder("vit_t")
    report = load_sam_weights(encoder, FILE)
    assert sorted(report.loaded) == sorted(encoder.state_dict())
    assert not (report.resized or report.ignored or report.zeroed)
    assert all(t.isfinite().all() for t in encoder.state_dict().values())
    assert find_weights("auto", "vit_t") == FILE


def test_its_page_says_its_hash_and_size():
    page = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() in page
    assert f"{FILE.stat().st_size:,} bytes" in page


@pytest.mark.parametrize("how", ["missing", "one byte differs", "cut"])
def test_a_missing_or_damaged_file_is_refused_in_one_line(how, tmp_path, monkeypatch):
    shutil.copy(FILE, tmp_path / "vit_t.pth")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    assert find_weights("auto", "vit_t") == tmp_path / "vit_t.pth"
    content = bytearray(FILE.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "missing":
        (tmp_path / "vit_t.pth").unlink()
    else:
        (tmp_path / "vit_t.pth").write_bytes(content if how.startswith("one") else content[:1000])
    with pytest.raises(WeightsError) as raised:
        find_weights("auto", "vit_t")
    line = str(raised.value)
    assert "\n" not in line and str(tmp_path / "vit_t.pth") in line
    assert "git checkout -- weights/vit_t.pth" in line and "weights/README.md" in line
    assert find_weights("none", "vit_t") is None


def test_a_damaged_file_ends_a_run_with_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    write_city(tmp_path / "city", size=64)
    (tmp_path / "vit_t.pth").write_bytes(FILE.read_bytes()[:-1])
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    words = ["--root", str(tmp_path / "city"), "--data", "vaihingen", "--encoder", "vit_t"]
    words += ["--crop", "64", "--stride", "64", "--device", "cpu"]
    words += ["--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.count("\n") == 1 and "vit_t.pth" in err
    assert "it is damaged; git checkout" in err and not (tmp_path / "run").exists()


def test_a_run_stands_on_the_file_whatever_its_seed():
    bases = []
    for seed in (0, 1):
        s = Settings(data="synthetic", encoder="vit_t", weights="auto", seed=seed)
        s.complete()
        model, base, report = build_model(s, 6)
        assert base["weights"] == "vit_t.pth" and len(report.loaded) > 50
        bases.append(base["sha256"])
    assert bases[0] == bases[1]


# -------------------------------------------------------------------------------------------- probe


def test_the_probe_reads_classes_off_features_that_hold_them_and_not_off_noise():
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (400, 16))
    told = torch.nn.functional.one_hot(labels, 3).flatten(1).float()
    noise = torch.randn(400, 48)
    fit, score = pretraining.fit_linear, pretraining.mean_iou
    assert score(fit(told[:200], labels[:200], 3)(told[200:]), labels[200:], 3) > 99
    assert score(fit(noise[:200], labels[:200], 3)(noise[200:]), labels[200:], 3) < 40
