"""Promises of a training run: the same bits again, after any interruption, on any number of
processes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from data import open_dataset
from engine.device import autocast, store_frozen_weights
from engine.distributed import Team
from engine.settings import AS_PUBLISHED, Settings, class_weights, learning_rate, parse_settings
from engine.training import TrainingStopped, scored_weight, segmentation_loss
from geodata import synthetic
from geodata.crops import draw_crop
from geodata.rasters import DataError
from mfnet import build_mfnet

ROOT = Path(train.__file__).resolve().parent
SHORT = "--data vaihingen --encoder vit_t --weights none --epochs 2 --steps 8 --batch-size 2 --crop 64 --eval-stride 64"


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    root = tmp_path_factory.mktemp("city")
    synthetic.write_city(root, size=96)
    return root


def start(city, out, flags="", launcher=()):
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "train.py"),
        *SHORT.split(),
        "--root",
        str(city),
        "--out",
        str(out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *flags.split()],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, status=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, (out, err)
    return out, err


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["state"]


def assert_same_bits(a, b):
    a, b = weights(a), weights(b)
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def wait_for_step(folder, process, beyond=-1):
    """Waits until last.pt holds a later step than `beyond`; None if the run ends before."""
    while process.poll() is None:
        try:
            step = torch.load(folder / "last.pt", weights_only=True)["progress"]["step"]
            if step > beyond:
                return step
        except (FileNotFoundError, RuntimeError, EOFError):
            pass
        time.sleep(0.01)
    return None


@pytest.fixture(scope="module")
def whole_run(city, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(city, folder))
    return folder


def test_the_same_command_twice_gives_the_same_bits_and_scores(city, whole_run, tmp_path):
    finish(start(city, tmp_path / "again"))
    assert_same_bits(whole_run, tmp_path / "again")
    assert (whole_run / "scores.json").read_bytes() == (
        tmp_path / "again" / "scores.json"
    ).read_bytes()


def test_a_run_killed_again_and_again_goes_on_to_the_bits_of_one_never_stopped(
    city, whole_run, tmp_path
):
    folder, step, kills = tmp_path / "killed", -1, 0
    while True:
        process = start(city, folder, "--save-every 1" + (" --resume" if kills else ""))
        step = wait_for_step(folder, process, step)
        if step is None or kills == 3:
            break
        process.kill()
        process.communicate()
        kills += 1
    finish(process)
    assert kills >= 2
    assert_same_bits(whole_run, folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (whole_run / "log.jsonl").read_text().splitlines()]
    assert [(e["step"], e["loss"]) for e in log] == [(e["step"], e["loss"]) for e in expected]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a program can answer")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_saves_says_how_to_go_on_and_does(city, whole_run, tmp_path, number):
    folder = tmp_path / "interrupted"
    process = start(city, folder, "--save-every 1")
    wait_for_step(folder, process)
    process.send_signal(number)
    _, err = finish(process, status=128 + number)
    assert f"--resume --out {folder}" in err and len(err.strip().splitlines()) == 1
    finish(start(city, folder, "--resume"))
    assert_same_bits(whole_run, folder)


def test_resuming_with_another_setting_or_other_data_is_refused(city, whole_run, tmp_path):
    _, err = finish(start(city, whole_run, "--resume --lr 0.5"), status=2)
    assert "--lr 0.5 contradicts" in err
    other = tmp_path / "other"
    synthetic.write_city(other, seed=1, size=96)
    _, err = finish(start(other, whole_run, "--resume"), status=2)
    assert "not the training tiles" in err
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "last.pt").write_bytes((whole_run / "last.pt").read_bytes()[:5000])
    _, err = finish(start(city, damaged, "--resume"), status=2)
    assert "last.pt" in err and len(err.strip().splitlines()) == 1


def test_what_cannot_be_written_ends_the_run_and_leaves_the_last_checkpoint(
    monkeypatch, city, tmp_path
):
    run = short_run(city, tmp_path / "full")
    run.save_last()
    before = (run.folder / "last.pt").read_bytes()

    def no_space(content, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(TrainingStopped, match="No space left.*--resume"):
        run.save_last()
    assert (run.folder / "last.pt").read_bytes() == before
    assert sorted(p.name for p in run.folder.iterdir()) == ["config.json", "last.pt"]


def short_run(city, folder, **changes):
    settings, _, _ = parse_settings([*SHORT.split(), "--root", str(city), "--out", str(folder)])
    for name, value in changes.items():
        setattr(settings, name, value)
    return train.Run(settings, open_dataset("vaihingen", city), Team(), torch.device("cpu"), None)


# ---------------------------------------------------------------------------------------- processes


PARITY = """
import os, sys, torch, torch.nn.functional as F
from engine.distributed import form_team, join_team, leave_team
from mfnet import build_mfnet
torch.set_num_threads(1)
team, _ = join_team("cpu")

def network():
    torch.manual_seed(0)
    return build_mfnet(dict(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,)), "lora").double().train()

g = torch.Generator().manual_seed(1)
x, y = torch.rand(4, 3, 64, 64, generator=g).double(), torch.rand(4, 64, 64, generator=g).double()
labels = torch.randint(0, 6, (4, 64, 64), generator=g)
alone, shared = network(), network()
together = form_team(shared, team)
mine = slice(2 * team.rank, 2 * team.rank + 2)
for step in range(3):
    losses = []
    for model, call, s in ((alone, alone, slice(None)), (shared, together, mine)):
        torch.manual_seed(step)
        model.zero_grad()
        loss = F.cross_entropy(call(x[s], y[s]), labels[s])
        loss.backward()
        losses.append(team.sum(loss.detach().clone()) / team.world)
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    assert abs(losses[0] - losses[1]) < 1e-10, losses
for (name, a), b in zip(alone.state_dict().items(), shared.state_dict().values()):
    assert (a - b).abs().max() < 1e-9, name
leave_team()
"""


def test_two_processes_compute_what_one_computes_in_double_precision(tmp_path):
    script = tmp_path / "parity.py"
    script.write_text(PARITY)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        str(script),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_run_on_two_processes_is_that_of_one_and_writes_one_folder(city, tmp_path):
    # At a rate at which training does not multiply rounding: at 0.01 one process with another
    # number of threads is as far off. What is no rounding shows in double precision, above.
    flags = "--epochs 20 --steps 1 --batch-size 4 --lr 0.0001"
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    out, _ = finish(start(city, tmp_path / "two", flags, launcher))
    finish(start(city, tmp_path / "one", flags))
    one, two = (
        [json.loads(e)["loss"] for e in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    )
    assert len(one) == 20 and one == pytest.approx(two, rel=0, abs=1e-5)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((a[n].float() - b[n].float()).abs().max() for n in a) < 1e-4
    scores = [json.loads((tmp_path / n / "scores.json").read_text()) for n in ("one", "two")]
    assert scores[0]["confusion"] == scores[1]["confusion"] and out.count("2 processes") == 1


def test_a_killed_worker_ends_the_run_with_an_error(city, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    process = start(city, tmp_path / "two", "--steps 5000 --save-every 1", launcher)
    wait_for_step(tmp_path / "two", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.terminate()
        pytest.skip("needs /proc to find a worker")
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode != 0


# -------------------------------------------------------------------------------- memory, precision


def test_recomputed_activations_give_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_mfnet("vit_t", "adapter")
        model.image_encoder.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        F.cross_entropy(
            model(torch.rand(2, 3, 64, 64), torch.rand(2, 64, 64)), torch.ones(2, 64, 64).long()
        ).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][n], g, rtol=1e-6, atol=1e-9) for n, g in grads[1].items())


def test_in_bf16_the_frozen_matrices_are_stored_so_and_what_is_trained_stays_fp32():
    model = build_mfnet("vit_t", "lora")
    store_frozen_weights(model, "bf16", torch.device("cpu"))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert model.image_encoder.blocks[0].mlp.lin1.weight.dtype == torch.bfloat16
    with autocast("bf16", torch.device("cpu")):
        model(torch.rand(1, 3, 64, 64), torch.rand(1, 64, 64)).float().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )


def test_a_run_in_bf16_is_scored_again_with_the_same_digits(city, tmp_path):
    folder = tmp_path / "bf16"
    finish(
        start(city, folder, "--precision bf16 --epochs 1 --steps 2 --checkpointing --accumulate 2")
    )
    before = (folder / "scores.json").read_bytes()
    command = [sys.executable, str(ROOT / "evaluate.py"), "--run", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, timeout=100, env=environment)
    assert (folder / "scores.json").read_bytes() == before


# --------------------------------------------------------------------------------- settings, choice


def test_as_published_sets_exactly_its_list_and_each_switch_goes_by_itself():
    plain, _, _ = parse_settings(["--data", "vaihingen"])
    published, _, _ = parse_settings(["--data", "vaihingen", "--as-published"])
    assert published.seed >= 0  # drawn
    differing = {n for n, v in asdict(plain).items() if getattr(published, n) != v}
    assert differing == set(AS_PUBLISHED)
    for name, value in AS_PUBLISHED.items():
        flag = "--" + name.replace("_", "-")
        one, _, _ = parse_settings(
            ["--data", "vaihingen", *([flag] if value is True else [flag, str(value)])]
        )
        assert {n for n, v in asdict(plain).items() if getattr(one, n) != v} == {name}


def test_as_published_the_rate_drops_one_epoch_earlier():
    ours = Settings(steps=2, epochs=50)
    theirs = Settings(steps=2, epochs=50, early_drops=True)
    drops = [
        {e for e in range(1, 50) if learning_rate(2 * e, s) < learning_rate(2 * e - 1, s)}
        for s in (ours, theirs)
    ]
    assert drops == [{25, 35, 45}, {24, 34, 44}]


def test_as_published_the_last_row_and_column_are_never_drawn():
    for last_pixel, reached in ((True, 70), (False, 69)):
        crops = [draw_crop(0, 0, i, [(70, 70)], 64, last_pixel) for i in range(300)]
        assert max(c.top + 64 for c in crops) == max(c.left + 64 for c in crops) == reached


def test_two_runs_without_a_seed_differ():
    assert len({parse_settings(["--seed", "-1"])[0].seed for _ in range(5)}) > 1


@pytest.mark.parametrize("select, val", [("val", "7,32"), ("test", "")])
def test_the_best_epoch_is_kept_of_held_out_tiles_or_as_published_of_the_test_tiles(
    city, tmp_path, select, val
):
    run = short_run(city, tmp_path / "run", val=val, select=select, epochs=3, steps=1)
    assert {t.name for t in run.tiles} == set("1 3 23 26 7 11 13 28 17 32 34 37".split()) - set(
        val.split(",")
    )
    run.train()
    scores = [
        json.loads(line)["miou"] for line in (run.folder / "log.jsonl").read_text().splitlines()
    ]
    best = scores.index(max(scores)) + 1
    final = run.finish()
    assert run.trainer.progress.best_epoch == best and run.trainer.progress.best == max(scores)
    if select == "test":
        assert final["miou"] == max(scores)


def test_tiles_are_held_out_by_number_but_never_all_of_them(city, tmp_path):
    assert len(short_run(city, tmp_path / "two", val="2").dataset.tiles("val")) == 2
    with pytest.raises(DataError, match="some but not all of the training tiles"):
        short_run(city, tmp_path / "three", val="99")


def test_seeds_are_trained_in_turn_and_summarised(city, tmp_path):
    finish(start(city, tmp_path, "--seeds 0 1 --epochs 1 --steps 1"))
    summary = json.loads((tmp_path / "seeds.json").read_text())
    scores = [
        json.loads((tmp_path / f"seed-{i}" / "scores.json").read_text())["miou"] for i in (0, 1)
    ]
    assert [summary["seeds"][i]["miou"] for i in "01"] == scores
    assert summary["mean"]["miou"] == pytest.approx(sum(scores) / 2)
    assert summary["deviation"]["miou"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)


def test_parts_of_a_batch_add_up_to_the_loss_of_the_whole():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 8, 8))
    labels[0] = 255
    weights = torch.tensor([1.0, 2.0, 0.5])
    whole = F.cross_entropy(logits, labels, weights, ignore_index=255, label_smoothing=0.1)
    total = float(scored_weight(labels, weights))
    parts = [
        segmentation_loss(logits[i : i + 2], labels[i : i + 2], total, weights, 0.1) for i in (0, 2)
    ]
    torch.testing.assert_close(sum(parts).float(), whole)


def test_out_of_memory_ends_with_the_ways_to_need_less(city, tmp_path, monkeypatch, capsys):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.Trainer, "step", no_memory)
    monkeypatch.setattr(
        sys,
        "argv",
        ["train.py", *SHORT.split(), "--root", str(city), "--out", str(tmp_path / "run")],
    )
    with pytest.raises(SystemExit) as end:
        train.main()
    err = capsys.readouterr().err
    assert end.value.code == 1 and len(err.splitlines()) == 1
    assert all(
        way in err
        for way in ("MB", "--batch-size 2", "--accumulate 2", "--checkpointing", "--precision bf16")
    )


def test_class_weights_are_one_number_for_each_class():
    assert class_weights(Settings(class_weights="1,2,0.5"), 3) == [1, 2, 0.5]
    assert class_weights(Settings(), 3) is None
    for bad in ("1,2", "1,2,x", "1,2,-1", "0,0,0", "1,2,inf"):
        with pytest.raises(DataError, match="--class-weights"):
            class_weights(Settings(class_weights=bad), 3)


def test_onecycle_rises_to_the_highest_rate_and_falls_to_nearly_nothing():
    s = Settings(schedule="onecycle", epochs=4, steps=25, lr=1.0)
    rates = [learning_rate(i, s) for i in range(100)]
    peak = rates.index(max(rates))
    assert (
        25 <= peak <= 35
        and max(rates) == pytest.approx(1.0)
        and rates[0] < 0.1
        and rates[-1] < 0.01
    )
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(
        rates[peak:], reverse=True
    )
