"""Sweeps that are killed, shared and damaged give the table of an undisturbed one; keys change with
what computes and with nothing else; intervals and tables say what they should.

Most sweeps here train by a stand-in, which leaves the files of a run behind in a moment, takes a
while in two halves, and notes how often it was at work. One trains in earnest."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import write_city
from test_scripts import write_own_tiles

import benchmark
import train
from data import open_from_settings
from engine import identity, plan, sweep
from engine.commandline import parse_settings
from engine.console import Mistake
from engine.identity import Identities, code_digest, pixels_digest
from engine.locks import try_lock
from engine.scoring import ConfusionMatrix
from engine.settings import words_of
from engine.store import Store
from engine.sweep import check_given, in_shard
from engine.tables import TABLES, Row, rows_of
from geodata import synthetic
from geodata.loading import share_of
from geodata.rasters import DataError
from reports.competitors import PAPER
from reports.statistics import mean_iou, paired_difference, t_quantile
from reports.sweep import Line, as_latex, cells_of, lines_of, write_sweep_page
from sam_vit import build_image_encoder
from tuners import tuner_options

HOME = Path(benchmark.__file__).parent
TINY = "--weights none --epochs 1 --steps 1 --crop 64 --stride 64 --batch-size 2"
TINY = [*TINY.split(), "--encoder", "vit_t", "--device", "cpu"]
FLAGS = ["--data", "vaihingen", "--root", "city", *TINY]
NEXT = "next: python -m webbrowser {}/results.html\n"

STAND_IN = """
import json, os, shutil, sys, time, zlib
words = sys.argv[1:]
out = words[words.index("--out") + 1]
name = os.path.basename(out)
def note(what):
    with open("work.txt", "a") as file:
        file.write(f"{what} {name}\\n")
        file.flush()
note("resumed" if "--resume" in words else "begun")
os.makedirs(out, exist_ok=True)
shutil.copy("template/last.pt", out)
time.sleep(0.05)
if "BREAK" in os.environ and os.environ["BREAK"] in name:
    sys.exit("error: it broke")
scores = json.load(open("template/scores.json"))
scores["miou"] = zlib.crc32(name.rpartition("_")[0].encode()) / 2**32
for file in ("config.json", "log.jsonl", "model.pt"):
    shutil.copy(f"template/{file}", out)
with open(out + "/partial", "w") as file:
    json.dump(scores, file)
note("finished")
os.replace(out + "/partial", out + "/scores.json")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny city, the files of a run on it, and a stand-in for train.py."""
    here = tmp_path_factory.mktemp("harness")
    write_city(here / "city", size=(64, 100))
    before = Path.cwd()
    os.chdir(here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *FLAGS, "--out", "template"])
        train.main()
    os.chdir(before)
    (here / "stand_in.py").write_text(STAND_IN)
    return here


@pytest.fixture
def inside(world, tmp_path, monkeypatch):
    for name in ("city", "template", "stand_in.py"):
        (tmp_path / name).symlink_to(world / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "stand_in.py")
    return tmp_path


@pytest.fixture
def run(inside, monkeypatch, capsys):
    """benchmark.py WORDS in this process -> (exit status, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            benchmark.run_script(benchmark.main, DataError, benchmark.WeightsError)
        return end.value.code or 0, *capsys.readouterr()

    return call


def start(*words):
    """The same in a process and a group of its own."""

    def work():
        os.setsid()
        sys.stdout = sys.stderr = open("printed.txt", "a", buffering=1)
        sys.argv = ["benchmark.py", *map(str, words)]
        benchmark.run_script(benchmark.main)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def table_of(printed):
    return [line for line in printed.splitlines() if line.startswith("|")]


def finished():
    lines = Path("work.txt").read_text().splitlines()
    return sorted(line.split()[1] for line in lines if line.startswith("finished"))


def stored(out):
    return [json.loads(line) for line in (Path(out) / "results.jsonl").read_text().splitlines()]


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes by fork")

# ---------------------------------------------------------------------------- kills, others, shards


@needs_fork
@pytest.mark.parametrize("orphans", [False, True])
def test_a_sweep_that_is_killed_again_and_again_gives_the_undisturbed_table(run, orphans):
    rng = np.random.default_rng(int(orphans))
    words = ["table4", *FLAGS, "--seeds", "0"]
    status, expected, _ = run(*words, "--out", "calm")
    assert status == 0 and len(finished()) == 7
    Path("work.txt").unlink()
    for _ in range(3):
        process = start(*words, "--out", "wild")
        process.join(rng.uniform(0.3, 1.5))
        if orphans:
            process.kill()  # its training goes on
        elif process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    status, printed, errors = run(*words, "--out", "wild")
    assert (status, errors) == (0, NEXT.format("wild")) and table_of(printed) == table_of(expected)
    done = finished()
    assert len(done) == 7 == len(set(done)) and len(stored("wild")) == 7


@needs_fork
def test_two_sweeps_at_once_and_shards_make_no_cell_twice(run):
    words = ["table4", *FLAGS, "--seeds", "0"]
    both = [start(*words, "--out", "both") for _ in range(2)]
    parts = [start(*words, "--out", "parts", "--shard", f"{i}/4") for i in (1, 2, 3, 4)]
    for process in (*both, *parts):
        process.join()
        assert process.exitcode == 0
    assert len(stored("both")) == 7 == len(stored("parts"))
    assert len(finished()) == 14
    whole, other = (table_of(run(*words, "--out", name)[1]) for name in ("both", "parts"))
    assert whole == other and len(finished()) == 14


def test_cells_of_another_sweep_are_taken_over_by_their_keys_under_their_names_here(run):
    words = [*FLAGS, "--seeds", "0", "--only", "*Adapter*"]
    run("table4", *words, "--out", "four")
    done = len(finished())
    status, printed, _ = run("table5", *words, "--out", "five", "--reuse", "four")
    # DFM with the standard adapter, and with MMAdapter, are rows of both.
    assert status == 0 and len(finished()) == done + 1
    by_row = {entry["row"]: entry for entry in stored("five")}
    assert set(by_row) == {"Adapter-multimodal-tuning", "Adapter-DFM", "Adapter-both"}
    theirs = {entry["row"]: entry for entry in stored("four")}
    pairs = {"Adapter-DFM": "image+dsm-Adapter", "Adapter-both": "image+dsm-MMAdapter"}
    for here, there in pairs.items():
        assert by_row[here]["key"] == theirs[there]["key"]
        assert by_row[here]["cell"] == f"{here}/seed-0"
        assert by_row[here]["scores"] == theirs[there]["scores"]
    assert table_of(run("table5", *words, "--out", "five")[1]) == table_of(printed)


def test_an_interrupted_cell_is_gone_on_with_and_a_failed_one_spoils_no_other(run, monkeypatch):
    words = ["table4", *FLAGS, "--seeds", "0", "--out", "out"]
    monkeypatch.setenv("BREAK", "image-LoRA")
    monkeypatch.setattr(benchmark.plan, "in_words", lambda *_: "about an hour")
    status, printed, _ = run(*words)
    assert status == 1 and "image-LoRA/seed-0 failed: error: it broke" in printed
    assert len(stored("out")) == 6 and "1 of 7 cells are not made yet" in printed
    status, printed, _ = run(*words, "--list", "--only", "*LoRA*")
    assert status == 0
    assert re.match(r"image-LoRA/seed-0: interrupted at step \d of 1; about an hour\n", printed)
    assert re.search(r"image\+dsm-LoRA/seed-0: done; \d+ s of training", printed)
    monkeypatch.delenv("BREAK")
    assert run(*words)[0] == 0 and len(stored("out")) == 7
    work = Path("work.txt").read_text()
    assert work.count("resumed") == 1 == work.count("resumed image-LoRA")


# ---------------------------------------------------------------------------------------- the store


def test_a_damaged_line_is_named_and_left_alone_and_its_cell_is_made_again(run):
    words = ["table4", *FLAGS, "--seeds", "0", "--out", "out", "--only", "image-*"]
    _, expected, _ = run(*words)
    path = Path("out/results.jsonl")
    first, second, third = path.read_text().splitlines()
    changed = second.replace('"seed": 0', '"seed": 1', 1)
    path.write_text("\n".join([first, changed, third[: len(third) // 2]]))  # no newline at the end
    status, printed, errors = run(*words)
    assert status == 0 and table_of(printed) == table_of(expected)
    *told, last = errors.splitlines()
    assert [re.search(r"line (\d)", line)[1] for line in told] == ["2", "3"]
    assert f"{last}\n" == NEXT.format("out")
    lines = path.read_text().splitlines()
    assert lines[:3] == [first, changed, third[: len(third) // 2]] and len(lines) == 5


def test_the_folder_of_another_sweep_is_refused_and_stays_as_it_is(run):
    assert run("table4", *FLAGS, "--seeds", "0", "--out", "out", "--only", "image-frozen*")[0] == 0
    before = sorted(Path("out").rglob("*"))
    for name, out in (("table5", "out"), ("table5", "template")):
        status, printed, errors = run(name, *FLAGS, "--out", out)
        assert (status, printed) == (2, "") and errors.count("\n") == 1 and out in errors
    assert sorted(Path("out").rglob("*")) == before


@pytest.mark.parametrize(
    "words, part",
    [
        (["table7"], "table7"),
        (["table4", *FLAGS, "--tuner", "lora"], "--tuner lora contradicts the row image-frozen"),
        (["table1", "--data", "potsdam"], "--data potsdam contradicts table1"),
        (["table4", *FLAGS, "--shard", "0/2"], "--shard 0/2"),
        (["table4", *FLAGS, "--only", "nothing"], "nothing"),
        (["table4", *FLAGS, "--reuse", "nowhere"], "--reuse nowhere: holds no results.jsonl"),
        (["table6", *FLAGS, "--reuse", "nowhere"], "table6 times each cell itself"),
        (["table4", *FLAGS, "--reference", "nobody"], "image-frozen"),
        (["table4", *FLAGS, "--lr", "-1"], "--lr"),
        (["table4", *FLAGS, "--root", "nowhere"], "no row of table4 can be made"),
        (["fig12", *FLAGS, "--share", "0.5"], "--share 0.5 contradicts"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(run, inside, words, part):
    before = sorted(inside.iterdir())
    status, printed, errors = run(*words)
    assert (status, printed, errors.count("\n")) == (2, "", 1) and part in errors
    assert [p for p in inside.iterdir() if p.name != "results"] == before
    assert not list(inside.glob("results/*/cells/*"))


def test_a_row_whose_data_are_missing_is_named_and_the_others_are_made(run, inside):
    shutil.copytree(inside / "city", inside / "flat")
    shutil.rmtree(inside / "flat" / "dsm")
    words = ["table4", *FLAGS, "--root", "flat", "--seeds", "0", "--out", "out"]
    status, printed, errors = run(*words)
    assert status == 1 and len(stored("out")) == 3
    assert [line[:10] for line in errors.splitlines()] == [*["image+dsm-"] * 4, "next: pyth"]
    assert "| image-LoRA | ✓ |  | 1 |" in printed


def test_a_line_is_refused_a_second_time_and_a_lock_holds_until_it_is_closed(tmp_path):
    store = Store.open(tmp_path, "table4", "synthetic")
    entry = dict.fromkeys("cell row seed scores tiles scored trained".split(), 0)
    for _ in range(2):
        store.append({"key": "a", **entry})
    store.append({"key": "b", **entry})
    assert list(store.read()[0]) == ["a", "b"] and len(stored(tmp_path)) == 2
    held = store.claim("cell")
    assert store.claim("cell") is None and store.claim("other") is not None
    os.close(held)
    assert try_lock(tmp_path / "cells" / "cell.lock") is not None


# ----------------------------------------------------------------------------------------- the keys


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """A copy of the code, to be changed."""
    home = tmp_path_factory.mktemp("code")
    for folder in (".", "engine", "geodata", "reports"):
        (home / folder).mkdir(exist_ok=True)
        for path in (HOME / folder).glob("*.py"):
            shutil.copy(path, home / folder)
    return home


ALL = {"adapter", "lora", "frozen"}


@pytest.mark.parametrize(
    "file, old, new, changed",
    [
        ("tuners.py", "self.mlp(n) + mix_streams", "self.mlp(n) - mix_streams", {"adapter"}),
        ("tuners.py", "alpha / max(rank, 1), 1.0, mixing", "alpha / rank, 1.0, mixing", {"lora"}),
        ("mfnet.py", "nn.Dropout2d(0.1)", "nn.Dropout2d(0.2)", ALL),
        ("train.py", "trainer.model.train()", "trainer.model.eval()", ALL),
        ("engine/training.py", "momentum=0.9", "momentum=0.8", ALL),
        ("geodata/crops.py", "rng.integers(2)", "rng.integers(1)", ALL),
        ("tuners.py", '"adapter": MMAdapter,', '"mine": MMAdapter, "adapter": MMAdapter,', set()),
        (
            "tuners.py",
            "        n = self.norm2(z)",
            "        # why\n\n        n=self.norm2( z )",
            set(),
        ),
        ("tuners.py", "a bottleneck without a skip", "a bottleneck with no skip", set()),
        ("reports/page.py", "max-width: 1100px", "max-width: 900px", set()),
        ("engine/console.py", "interrupted", "stopped", set()),
    ],
)
def test_a_key_changes_with_what_computes_and_not_with_comments_or_pages(
    code, file, old, new, changed
):
    before = {name: code_digest(name, code) for name in ALL}
    assert before == {name: code_digest(name) for name in ALL}
    text = (code / file).read_text()
    assert old in text
    (code / file).write_text(text.replace(old, new))
    found = {name for name in ALL if code_digest(name, code) != before[name]}
    (code / file).write_text(text)
    assert found == changed


def key(*words, ids=None):
    s, *_ = parse_settings([*FLAGS, *words])
    return (ids or Identities(open_from_settings, torch.device("cpu"))).key(s)


def test_a_key_changes_with_settings_seed_and_backbone_and_not_with_places_and_threads(inside):
    ids = Identities(open_from_settings, torch.device("cpu"))
    before = key(ids=ids)
    others = ["--steps 2", "--lr 0.02", "--seed 1", "--tuner lora", "--tuner-option ratio=0.5"]
    others += ["--share 0.5", "--modalities image", "--precision bf16", "--full-labels"]
    torch.manual_seed(9)
    torch.save(build_image_encoder("vit_t").state_dict(), "sam.pth")
    others += ["--weights sam.pth"]
    keys = [key(*words.split(), ids=ids) for words in others]
    assert len({before, *keys}) == 1 + len(others)
    (inside / "other").symlink_to(inside / "city")
    same = [
        "--root other",
        "--out elsewhere",
        "--workers 1",
        "--save-every 5",
        "--gradient-checkpointing",
    ]
    same += ["--accumulate 2", "--memory-gb 1", "--precision fp32", "--device auto"]
    assert {key(*words.split()) for words in same} == {before}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert key() == before
    torch.set_num_threads(threads)


def test_a_key_changes_with_one_pixel_of_a_test_tile(inside):
    shutil.copytree(inside / "city", inside / "mine")
    s, *_ = parse_settings([*FLAGS, "--root", "mine"])
    found = [pixels_digest(open_from_settings(s), ("image",))]
    for kind in ("image", "eroded", "dsm"):
        path = synthetic.tile_paths(inside / "mine", 5)[kind]
        array = tifffile.imread(path)
        array[3, 4] = array[3, 4] // 2 + 1 if kind != "eroded" else 0
        options = dict(photometric="rgb") if array.ndim == 3 else {}
        tifffile.imwrite(path, array, **options)
        found.append(pixels_digest(open_from_settings(s), ("image",)))
    assert len(set(found[:3])) == 3 and found[3] == found[2]  # the image alone has no heights


def test_a_key_changes_with_one_pixel_of_the_folder_that_an_epoch_is_chosen_by(inside):
    write_own_tiles(inside / "mine")
    shutil.copytree("mine/train", "mine/val")
    words = "--data tiles --root mine --encoder vit_t --weights none --crop 64"

    def keys():
        ids = Identities(open_from_settings, torch.device("cpu"))
        return [ids.key(parse_settings([*words.split(), *v])[0]) for v in ([], ["--val", "val"])]

    before = keys()
    labels = tifffile.imread("mine/val/labels/a.tif")
    labels[3, 4] = 1 - labels[3, 4]
    tifffile.imwrite("mine/val/labels/a.tif", labels)
    after = keys()
    assert after[0] == before[0] and after[1] != before[1]


def test_a_result_whose_code_or_tiles_change_meanwhile_is_thrown_away(run, monkeypatch):
    digests = iter(range(1000))
    monkeypatch.setattr(identity, "code_digest", lambda tuner: next(digests))
    words = ["table4", *FLAGS, "--seeds", "0", "--out", "out", "--only", "image-frozen*"]
    status, printed, _ = run(*words)
    assert status == 1 and "changed while it was trained" in printed
    assert not Path("out/results.jsonl").exists() and not list(Path("out/cells").glob("*/"))


# --------------------------------------------------------------------------------------- statistics


def simulated(rng, S, T, gap=0.0, seeds=0.01, tiles=0.05, interaction=0.01, K=4, pixels=4000):
    """Counts (S, T, K, K) of two networks that are right as often, but for `gap`: a tile is hard
    for both, and each network has luck with its seed, with a tile, and with both."""
    right = 0.8 + rng.normal(0, tiles, T) + rng.normal(0, seeds, (2, S, 1))
    right = right + rng.normal(0, interaction, (2, 1, T)) + rng.normal(0, 0.005, (2, S, T))
    right = np.clip(right + np.array([gap, 0])[:, None, None], 0.05, 0.98)[..., None]
    truth = (rng.dirichlet(np.full(K, 3.0), T) * pixels).astype(int)
    hits = rng.binomial(truth, right)  # (2, S, T, K)
    wrong = (truth - hits)[..., None] * (1 - np.eye(K)) / (K - 1)
    return wrong + hits[..., None] * np.eye(K)


@pytest.mark.parametrize(
    "effects", [{}, dict(seeds=0.02, interaction=0.002), dict(interaction=0.03)]
)
def test_networks_without_a_difference_are_told_apart_at_most_70_times_of_1000(effects):
    rng = np.random.default_rng(0)
    told = sum(
        paired_difference(*simulated(rng, 3, 4, **effects), [0, 1, 2]).is_told for _ in range(1000)
    )
    assert told <= 70


def test_a_clear_difference_is_told_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    found = [paired_difference(*simulated(rng, 3, 4, gap=0.08), [0, 1, 2]) for _ in range(100)]
    assert sum(d.is_told and d.mean > 0 for d in found) >= 90


def test_one_seed_tells_nothing_and_equal_counts_differ_by_nothing():
    one, other = simulated(np.random.default_rng(0), 1, 4, gap=0.5)
    assert not paired_difference(one, other, [0]).is_told
    same = simulated(np.random.default_rng(0), 3, 4)[0]
    d = paired_difference(same, same, [0, 1])
    assert (d.mean, d.low, d.high, d.is_told) == (0, 0, 0, False)


@pytest.mark.parametrize("freedom, value", [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228)])
def test_quantiles_are_those_of_the_tables(freedom, value):
    assert t_quantile(freedom) == pytest.approx(value, abs=2e-3)


def test_the_mean_iou_is_that_of_the_scores():
    matrix = ConfusionMatrix(4, (0, 1, 3))
    matrix.counts = np.random.default_rng(0).integers(0, 9, (4, 4)) * np.array([1, 0, 1, 1])
    matrix.counts[1] = 0  # a class that neither occurs nor is predicted
    assert mean_iou(matrix.counts, [0, 1, 3]) == pytest.approx(matrix.scores()["miou"])


# ----------------------------------------------------------------------------------- tables, shares


@pytest.mark.parametrize("name", TABLES)
def test_every_row_can_be_parsed_and_every_row_of_the_paper_s_method_is_one(name):
    table = TABLES[name]
    rows = rows_of(name, table.data)
    assert len({row.name for row in rows}) == len(rows)
    assert table.reference in ("", *(row.name for row in rows))
    for row in rows:
        options = row.settings.get("tuner_option", {})
        if options.keys() <= tuner_options(row.settings["tuner"]).keys():
            s, *_ = parse_settings(words_of({"data": table.data, **row.settings}))
            assert all(getattr(s, k) == v for k, v in row.settings.items() if k != "tuner_option")
    if name in PAPER:
        ours = {
            row for row in PAPER[name].rows if row.startswith(("MM", "image", "Adapter", "LoRA"))
        }
        assert ours == {row.name for row in rows}


def test_the_paper_s_numbers_are_those_of_its_tables():
    def means(name, row):
        return tuple(PAPER[name].rows[row][1][column] for column in ("OA", "mF1", "mIoU"))

    assert len(PAPER["table1"].rows) == 21 == len(PAPER["table2"].rows) == len(PAPER["table6"].rows)
    assert len(PAPER["table3"].rows) == 13
    assert means("table1", "MMAdapter-vit_h") == (92.97, 91.71, 85.03)
    assert means("table2", "FTransUNet") == (91.34, 92.41, 86.20)
    assert means("table3", "MMAdapter-vit_l") == (80.93, 65.33, 51.82)
    assert means("table4", "image+dsm-LoRA") == (91.86, 89.90, 82.06)
    assert means("table5", "LoRA-multimodal-tuning") == (92.02, 90.64, 83.24)
    assert PAPER["table1"].rows["ESANet"][1]["car"] == 85.46


def test_flags_go_to_every_cell_unless_a_row_sets_them():
    rows = [Row("a", dict(tuner="lora", tuner_option=dict(rank=2)))]
    check_given(rows, dict(lr=0.1, tuner_option=["alpha=2", "rank=2"]))
    for given in (dict(tuner="adapter"), dict(tuner_option=["rank=4"])):
        with pytest.raises(Mistake, match="contradicts the row a"):
            check_given(rows, given)


@pytest.mark.parametrize("n", [1, 4, 8])
def test_shards_hold_every_cell_once(n):
    cells = list(range(21))
    parts = [in_shard(cells, f"{i}/{n}") for i in range(1, n + 1)]
    assert sorted(sum(parts, [])) == cells


def test_a_share_of_the_tiles_is_drawn_by_the_seed_and_grows():
    tiles = list("abcdefghijkl")
    quarter, half, whole = (share_of(tiles, share, 3) for share in (0.25, 0.5, 1.0))
    assert (len(quarter), len(half), whole) == (3, 6, tiles)
    assert set(quarter) < set(half) and half == sorted(half) == share_of(tiles, 0.5, 3)
    assert len({tuple(share_of(tiles, 0.25, seed)) for seed in range(10)}) > 5
    with pytest.raises(DataError, match="--share 0.25 of 1"):
        share_of(tiles[:1], 0.25, 0)


# -------------------------------------------------------------------------------- in earnest, pages


def test_a_sweep_in_earnest_from_nothing_to_the_page(world, tmp_path):
    (tmp_path / "city").symlink_to(world / "city")
    words = ["table4", *FLAGS, "--seeds", "0", "--only", "image-Adapter*", "--csv", "a.csv"]
    words += ["--latex", "a.tex", "--reference", "image-Adapter"]
    command = [sys.executable, str(HOME / "benchmark.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, NEXT.format("results/table4_vaihingen"))
    out = tmp_path / "results" / "table4_vaihingen"
    lines = stored(out)
    assert [line["cell"] for line in lines] == ["image-Adapter/seed-0"]
    run = out / "cells"
    for line in lines:
        (folder,) = run.glob(f"image-Adapter_seed-{line['seed']}_{line['key'][:16]}")
        scores = json.loads((folder / "scores.json").read_text())
        assert line["scores"]["miou"] == scores["miou"] and len(line["tiles"]) == 4
        total = np.sum(list(line["tiles"].values()), axis=0)
        assert np.array_equal(total, scores["confusion"])
        assert line["trained"] > 0 < line["memory_mb"] and "torch" in line["version"]
        assert {"device", "command", "base", "seconds", "settings"} <= line.keys()
    page = (out / "results.html").read_text(encoding="utf-8")
    assert "image-Adapter" in page and "building" in page and "http" not in page
    (row,) = [r for r in csv.DictReader((tmp_path / "a.csv").open()) if r["row"] == "image-Adapter"]
    mean = np.mean([100 * line["scores"]["miou"] for line in lines])
    assert float(row["mIoU"]) == pytest.approx(mean) and row["paper mIoU"] == "83.69"
    assert f"{mean:.2f}" in done.stdout and f"{mean:.2f}" in (tmp_path / "a.tex").read_text()


def result(row, seed, miou, modalities="image+dsm"):
    counts = (1000 * np.array([[miou, 1 - miou], [1 - miou, miou]])).astype(int).tolist()
    per_class = [dict(name=name, recall=miou) for name in ("road", "roof<b>")]
    scores = dict(oa=miou, mf1=miou, miou=miou, per_class=per_class, convention="as ever")
    return dict(
        row=row, seed=seed, cell=f"{row}/seed-{seed}", key="k" * 64, scores=scores, scored=[0, 1],
        tiles={"a": counts, "b": counts}, trained=2_000_000, seconds=9.0, memory_mb=500.0,
        settings=dict(modalities=modalities), device="a CPU", version="v", date="today",
        base=dict(sha256="b" * 64), command=["train.py", "--tuner=<x>"],
    )  # fmt: skip


def test_the_table_says_what_cannot_be_told_apart_and_the_page_draws_it(tmp_path):
    values = {"low": (0.5, 0.51, 0.52), "same": (0.9, 0.91, 0.92), "noisy": (0.7, 0.95, 0.99)}
    values["best"] = (0.9, 0.91, 0.92)
    results = [result(row, i, v) for row, found in values.items() for i, v in enumerate(found)]
    lines = lines_of("tuners", dict.fromkeys(values, "image+dsm"), results, "best")
    head, low, same, noisy, best = cells_of(lines, cost=False)
    column = head.index("difference of mIoU")
    assert "not told" not in low[column] and low[column].startswith("-")
    assert same[column] == "+0.00, the same scores" and best[column] == ""
    assert noisy[column].endswith("not told apart")
    assert low[:4] == ["low", "✓", "✓", "3"] and low[head.index("OA")] == "51.00 ± 1.00"
    write_sweep_page(tmp_path / "p.html", "tuners", "Tuners", lines, "best")
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert (
        page.count("<svg") == 4 and "roof&lt;b&gt;" in page and "<b>" not in page.split("</h1>")[1]
    )
    sizes = [float(size) for size in re.findall(r"font-size[:=]\"?\s*([\d.]+)px", page)]
    assert min(sizes) >= 11
    text = as_latex(lines)
    assert r"51.00 $\pm$ 1.00" in text and text.count(r"\\") == 5


def test_a_row_is_shown_by_its_own_name_whatever_letters_are_in_it():
    lines = [Line("finance", [], {}), Line("other", [], {"OA": 90.0})]
    assert [row[0] for row in cells_of(lines, cost=True)[1:]] == ["finance", "other"]


def test_a_competitor_s_row_has_its_numbers_alone():
    line = Line("ESANet", [], {"mIoU": 79.42}, backbone="R34")
    head, cells = cells_of([line], cost=True)
    assert cells[0] == "ESANet (R34)" and cells[-1] == "79.42" and set(cells[1:-1]) == {""}


def test_the_plan_of_a_run_counts_its_own_steps_windows_and_images(inside, monkeypatch):
    def peak(case, device, *more, s):
        return (1000 * case.batch, 2.0 * case.batch) + (0.5,) * len(more)

    monkeypatch.setattr(plan, "peak_of", peak)
    s, *_ = parse_settings([*FLAGS, "--steps", "3", "--epochs", "5", "--batch-size", "4"])
    told = plan.in_words(s, open_from_settings(s), torch.device("cpu"))
    # 15 steps of 4 images; 4 tiles of 2 windows of a quarter of a second; 4 images in memory
    assert told == "about 120 s of training, 2 s of scoring, 4.0 GB"


def test_a_sweep_leaves_signals_time_to_save(run, monkeypatch):
    """The cell that is trained is told to stop, and the sweep ends with the signal's status."""
    Path("slow.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(sweep, "TRAIN", Path("slow.py").absolute())
    process = start("table4", *FLAGS, "--seeds", "0", "--out", "out")
    while not list(Path("out/cells").glob("*.txt")):
        time.sleep(0.1)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "the same command goes on" in Path("printed.txt").read_text()
