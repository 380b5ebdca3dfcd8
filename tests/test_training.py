"""Promises of a training run: the same bits again, after any interruption, on any number of
processes.
"""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, write_city
from processes import Script, two_processes

import evaluate
import train
from data import open_dataset
from engine import run as a_run
from engine.commandline import parse_settings
from engine.console import Mistake, run_script
from engine.device import autocast, store_frozen_weights
from engine.distributed import Team
from engine.folder import RunFolder
from engine.run import Run
from engine.signals import noted_signals
from engine.training import TrainingStopped
from geodata.crops import CropDataset
from geodata.rasters import DataError
from mfnet import build_mfnet
from sam_vit import SIZES, WeightsError

ROOT = Path(train.__file__).resolve().parent
SHORT = "--data vaihingen --encoder vit_t --weights none --epochs 2 --steps 6 --batch-size 2"
SHORT += " --crop 64 --stride 64 --class-weights balanced --balance-crops"


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    root = tmp_path_factory.mktemp("city")
    write_city(root, size=96)
    return root


def words_of(city, out, flags):
    return [*SHORT.split(), "--root", str(city), "--out", str(out), *flags.split()]


def start(city, out, flags="", launcher=()):
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *words_of(city, out, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, status=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, (out, err)
    return out, err


def call(city, out, flags="", status=0):
    """The same command inside this process -> (stdout, stderr)."""
    return call_script("train.py", train.main, *words_of(city, out, flags), status=status)


def call_script(name, main, *words, status=0):
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [name, *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with pytest.raises(SystemExit) as end:
                run_script(main, DataError, WeightsError)
    finally:
        sys.argv = argv
    assert (end.value.code or 0) == status, (out.getvalue(), err.getvalue())
    return out.getvalue(), err.getvalue()


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["state"]


def assert_same_bits(a, b):
    a, b = weights(a), weights(b)
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def wait_for_step(folder, process, beyond=-1):
    """Waits until last.pt holds a later step than `beyond`; None if the run ends before."""
    seen = None
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError, RuntimeError, EOFError):
            written = (folder / "last.pt").stat().st_mtime_ns
            if written != seen:
                step = torch.load(folder / "last.pt", weights_only=True)["progress"]["step"]
                if step > beyond:
                    return step
                seen = written
        time.sleep(0.01)
    return None


@pytest.fixture(scope="module")
def whole_run(city, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    call(city, folder)
    return folder


def test_the_same_command_twice_gives_the_same_bits_and_scores(city, whole_run, tmp_path):
    call(city, tmp_path / "again")
    assert_same_bits(whole_run, tmp_path / "again")
    assert (whole_run / "scores.json").read_bytes() == (
        tmp_path / "again" / "scores.json"
    ).read_bytes()


def test_a_run_killed_again_and_again_goes_on_to_the_bits_of_one_never_stopped(
    city, whole_run, tmp_path
):
    folder = tmp_path / "killed"
    process = start(city, folder, "--save-every 2")
    step = wait_for_step(folder, process)
    process.kill()
    process.communicate()
    again = Script(ROOT / "train.py", *words_of(city, folder, "--save-every 2 --resume"))
    wait_for_step(folder, again, step)
    again.kill()
    again.communicate()
    assert process.returncode == again.returncode == -signal.SIGKILL
    call(city, folder, "--resume")
    assert_same_bits(whole_run, folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (whole_run / "log.jsonl").read_text().splitlines()]
    assert [(e["step"], e["loss"]) for e in log] == [(e["step"], e["loss"]) for e in expected]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a program can answer")
def test_an_interrupted_run_saves_says_how_to_go_on_and_does(city, whole_run, tmp_path):
    folder = tmp_path / "interrupted"
    process = start(city, folder, "--save-every 1")
    wait_for_step(folder, process, 0)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, status=128 + signal.SIGTERM)
    assert f"--resume --out {folder}" in err and len(err.strip().splitlines()) == 1
    call(city, folder, "--resume")
    assert_same_bits(whole_run, folder)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_noted_and_a_second_one_does_what_it_did_before(name):
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"no {name} here")
    seen, before = [], signal.signal(number, lambda *_: seen.append("second"))
    try:
        with noted_signals() as noted:
            os.kill(os.getpid(), number)
            assert noted == [number] and not seen
            os.kill(os.getpid(), number)
            assert seen == ["second"]
        os.kill(os.getpid(), number)
        assert len(seen) == 2
    finally:
        signal.signal(number, before)


def test_resuming_with_another_setting_or_other_data_or_another_base_is_refused(city, tmp_path):
    folder = tmp_path / "run"
    short_run(city, folder).folder.release()
    assert "--lr 0.5 contradicts" in call(city, folder, "--resume --lr 0.5", status=2)[1]
    other = tmp_path / "other"
    write_city(other, seed=1, size=96)
    assert "not the training tiles" in call(other, folder, "--resume", status=2)[1]
    last = torch.load(folder / "last.pt", weights_only=True)
    torch.save({**last, "base": {**last["base"], "sha256": "0" * 64}}, folder / "last.pt")
    _, err = call(city, folder, "--resume", status=2)
    assert "was begun on" in err and "0" * 64 in err and "--weights" in err
    for content in (
        {**last, "progress": {}},
        {**last, "progress": {**last["progress"], "best": "x", "step": None}},
        {**last, "optimizer": {}},
        {**last, "settings": {**last["settings"], "colour": 1}},
    ):
        torch.save(content, folder / "last.pt")
        _, err = call(city, folder, "--resume", status=2)
        assert "last.pt" in err and len(err.strip().splitlines()) == 1
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:5000])
    _, err = call(city, folder, "--resume", status=2)
    assert "last.pt" in err and len(err.strip().splitlines()) == 1


def test_what_cannot_be_written_ends_the_run_and_leaves_the_last_checkpoint(
    monkeypatch, city, tmp_path
):
    run = short_run(city, tmp_path / "full")
    before = (run.folder / "last.pt").read_bytes()

    def no_space(content, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(TrainingStopped, match="No space left.*--resume"):
        run.save_last()
    assert (run.folder / "last.pt").read_bytes() == before
    assert sorted(p.name for p in run.folder.path.iterdir()) == ["config.json", "last.pt"]


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", TINY)


def short_run(city, folder, team=Team(), **changes):
    settings, _, _ = parse_settings([*SHORT.split(), "--root", str(city), "--out", str(folder)])
    for name, value in changes.items():
        setattr(settings, name, value)
    return Run(settings, open_dataset("vaihingen", city), team, torch.device("cpu"))


# ---------------------------------------------------------------------------------------- processes


PARITY = """
import os, sys, torch, torch.nn.functional as F
from engine.distributed import join_team, leave_team, wrap_distributed
from mfnet import build_mfnet
from sam_vit import WeightsError
torch.set_num_threads(1)
team, _ = join_team("cpu")

def network():
    torch.manual_seed(0)
    encoder = dict(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,))
    return build_mfnet(encoder, "lora").double().train()

g = torch.Generator().manual_seed(1)
x, y = torch.rand(4, 3, 64, 64, generator=g).double(), torch.rand(4, 64, 64, generator=g).double()
labels = torch.randint(0, 6, (4, 64, 64), generator=g)
alone, shared = network(), network()
together = wrap_distributed(shared, team)
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
    for process in two_processes(script):
        finish(process)


def test_a_run_on_two_processes_is_that_of_one_and_writes_one_folder(city, tmp_path):
    # At a rate at which training does not multiply rounding: at 0.01 one process with another
    # number of threads is as far off. What is no rounding shows in double precision, above.
    flags = "--steps 2 --batch-size 4 --lr 0.0001 --drop-modality 0.5"
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    out, _ = finish(start(city, tmp_path / "two", flags, launcher))
    call(city, tmp_path / "one", flags)
    one, two = (
        [json.loads(e)["loss"] for e in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    )
    assert len(one) == 2 and one == pytest.approx(two, rel=0, abs=1e-5)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((a[n].float() - b[n].float()).abs().max() for n in a) < 1e-4
    scores = [json.loads((tmp_path / n / "scores.json").read_text()) for n in ("one", "two")]
    assert scores[0]["confusion"] == scores[1]["confusion"] and out.count("2 processes") == 1


def test_a_killed_worker_ends_the_run_with_an_error(city, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    process = start(city, tmp_path / "two", "--steps 5000 --save-every 1", launcher)
    wait_for_step(tmp_path / "two", process, 0)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.terminate()
        pytest.skip("needs /proc to find a worker")
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode != 0


# -------------------------------------------------------------------------------- memory, precision


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
    call(
        city,
        folder,
        "--encoder tiny --precision bf16 --epochs 1 --steps 2 --gradient-checkpointing"
        " --accumulate 2",
    )
    before = (folder / "scores.json").read_bytes()
    call_script("evaluate.py", evaluate.main, "--run", folder)
    assert (folder / "scores.json").read_bytes() == before


# --------------------------------------------------------------------------- the epoch that is kept


@pytest.mark.parametrize("select, val", [("val", "7,32"), ("test", "")])
def test_the_best_epoch_is_kept_of_held_out_tiles_or_as_published_of_the_test_tiles(
    city, tmp_path, select, val
):
    run = short_run(
        city, tmp_path / "run", val=val, select=select, epochs=3, steps=1, encoder="tiny"
    )
    training = set("1 3 23 26 7 11 13 28 17 32 34 37".split())
    assert {t.name for t in run.tiles} == training - set(val.split(","))
    train.train(run, [])
    assert json.loads((run.folder / "log.jsonl").read_text().splitlines()[0])["miou"] is not None
    scores = [
        json.loads(line)["miou"] for line in (run.folder / "log.jsonl").read_text().splitlines()
    ]
    best = scores.index(max(scores)) + 1
    assert not torch.load(run.folder / "model.pt", weights_only=True)["finished"]
    final = train.finish(run, [])
    assert run.trainer.progress.best_epoch == best and run.trainer.progress.best == max(scores)
    kept = torch.load(run.folder / "model.pt", weights_only=True)
    assert (kept["finished"], kept["epoch"]) == (True, best)
    if select == "test":
        assert final["miou"] == max(scores)


def test_while_training_epochs_are_scored_at_their_own_stride(city, tmp_path, capsys):
    run = short_run(
        city,
        tmp_path / "run",
        encoder="tiny",
        select="test",
        epochs=1,
        steps=1,
        select_stride=48,
        eval_stride=32,
    )
    train.train(run, [])
    assert "test tiles at stride 48" in capsys.readouterr().out
    assert train.finish(run, [])["stride"] == 32


def test_one_command_trains_chooses_and_scores_potsdam_as_published(tmp_path, monkeypatch):
    """Windows in training and for the score are those of the published loop, each computed once."""
    side, window = 140, 128
    write_city(tmp_path / "potsdam", size=side, layout="potsdam")
    found, score = [], train.score_split

    def noted(*args, **options):
        found.append(score(*args, **options))
        return found[-1]

    monkeypatch.setattr(train, "score_split", noted)
    words = f"--data potsdam --root {tmp_path / 'potsdam'} --as-published --encoder tiny --epochs 1"
    words += f" --steps 1 --batch-size 2 --weights none --crop {window} --out {tmp_path / 'run'}"
    out, _ = call_script("train.py", train.main, *words.split())
    for scores, stride in zip(found, (128, 32), strict=True):
        # The published loop: a window past the edge is moved inwards, and so visited again.
        visits = [min(start, side - window) for start in range(0, side, stride)]
        assert scores["stride"] == stride and scores["repeat_border"] is True
        assert scores["windows"] == 6 * len({*visits}) ** 2 <= 6 * len(visits) ** 2
    assert "TEST tiles, as published" in out and "test tiles at stride 128" in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["stride"] == 32
    assert config["relative_positions"] == "zero" and config["labels"] == "published"


class Recorder(Team):
    """A team whose calls are noted."""

    def __new__(cls, events, rank=0, world=1):
        team = object.__new__(cls)
        object.__setattr__(team, "events", events)
        return team

    def __init__(self, events, rank=0, world=1):
        super().__init__(rank, world)

    def barrier(self):
        self.events.append("barrier")

    def broadcast(self, value):
        return value

    def gather(self, value):
        return [value]


@pytest.mark.parametrize("rank, first", [(0, "weights"), (1, "barrier")])
def test_on_a_fresh_machine_the_main_process_fetches_before_the_others_look(
    city, tmp_path, monkeypatch, rank, first
):
    class Enough(Exception):
        pass

    events, team = [], None
    monkeypatch.setattr("engine.run.base_file", lambda *_: events.append("weights"))

    def build(*_):
        events.append("built")
        raise Enough

    monkeypatch.setattr("engine.run.build_model", build)
    team = Recorder(events, rank, 2)
    with pytest.raises(Enough):
        short_run(city, tmp_path / "run", team=team)
    assert events[0] == first and events[-1] == "built" and "barrier" in events


def test_the_best_model_is_read_after_it_was_written_and_before_it_is_written_again(
    city, tmp_path, monkeypatch
):
    events = []
    run = short_run(
        city, tmp_path / "run", Recorder(events), select="test", epochs=1, steps=1, encoder="tiny"
    )
    train.train(run, [])
    read, save = train.read_content, run.save_model
    monkeypatch.setattr(train, "read_content", lambda *a: events.append("read") or read(*a))
    monkeypatch.setattr(
        run, "save_model", lambda *a, **o: events.append("written") or save(*a, **o)
    )
    events.clear()
    train.finish(run, [])
    assert events == ["barrier", "read", "barrier", "written"]


def test_a_batch_that_processes_and_parts_do_not_divide_is_refused(city, tmp_path):
    for world, accumulate in ((3, 1), (2, 2)):
        with pytest.raises(Mistake, match=f"no multiple of {world} processes x {accumulate} parts"):
            short_run(
                city, tmp_path / "run", Recorder([], 0, world), batch_size=2, accumulate=accumulate
            )


def test_every_step_is_taken_in_training_mode_and_scoring_is_not_counted_as_training(
    city, tmp_path, monkeypatch
):
    run = short_run(city, tmp_path / "run", select="test", epochs=2, steps=1)
    modes, step = [], run.trainer.step

    def noted(*batch):
        modes.append(run.trainer.model.training)
        return step(*batch)

    def slow(model, *_):
        assert not model.training
        time.sleep(0.5)
        return {"miou": 0.5}

    monkeypatch.setattr(run.trainer, "step", noted)
    monkeypatch.setattr(train, "score_split", slow)
    monkeypatch.setattr(run, "save_last", lambda: None)
    start = time.monotonic()
    train.train(run, [])
    took = time.monotonic() - start
    log = [json.loads(line) for line in (run.folder / "log.jsonl").open()]
    assert modes == [True, True]
    assert sum(entry["seconds"] for entry in log) < took - 0.9
    for entry in log:
        assert entry["images_per_second"] == pytest.approx(2 / entry["seconds"], rel=1e-6)


def test_what_changes_no_number_is_done_all_the_same(city, tmp_path, monkeypatch):
    run = short_run(city, tmp_path / "run", checkpointing=True, accumulate=2, workers=1)
    seen = []
    run.trainer.model.image_encoder.blocks[1].norm1.register_forward_pre_hook(
        lambda module, x: seen.append(len(x[0]))
    )
    loader = train.loader(run)
    assert loader.num_workers == 1
    run.trainer.model.train()
    crops = CropDataset(run.tiles, 64, 0, ("image", "dsm"))
    rasters, labels = zip(*(crops[0, i] for i in range(2)))
    run.trainer.step([torch.stack(kind) for kind in zip(*rasters)], torch.stack(labels))
    assert seen == 2 * 3 * [2]  # each part of one crop, forward, again, and its blocks again
    call(city, tmp_path / "again", "--epochs 1 --steps 1 --deterministic")
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


def test_tiles_are_held_out_by_number_but_never_all_of_them(city, tmp_path):
    assert len(short_run(city, tmp_path / "two", val="2").dataset.tiles("val")) == 2
    with pytest.raises(DataError, match="some but not all of the training tiles"):
        short_run(city, tmp_path / "three", val="99")


# ---------------------------------------------------------------------------- stopped at any moment


def test_a_run_can_go_on_before_its_first_step(city, whole_run, tmp_path):
    folder = tmp_path / "run"
    short_run(city, folder).folder.release()  # and dies here
    assert torch.load(folder / "last.pt", weights_only=True)["progress"]["step"] == 0
    call(city, folder, "--resume")
    assert_same_bits(whole_run, folder)


@pytest.mark.parametrize("select", ["test", "last"])
def test_a_signal_while_tiles_are_scored_ends_the_run_at_once_and_loses_nothing(
    city, tmp_path, select, monkeypatch
):
    changes = dict(encoder="tiny", select=select, epochs=2, steps=2, eval_every=1)
    whole = short_run(city, tmp_path / "whole", **changes)
    train.train(whole, [])
    train.finish(whole, [])

    score, folder, ends = train.score_split, tmp_path / "killed", []
    run = short_run(city, folder, **changes)
    for _ in range(3):  # in the scores of both epochs, and in that of the end
        noted = []
        monkeypatch.setattr(
            train, "score_split", lambda *a, **o: noted.append(signal.SIGTERM) or score(*a, **o)
        )
        with pytest.raises(TrainingStopped, match="while scoring .*--resume") as end:
            train.train(run, noted)
            train.finish(run, noted)
        ends.append(end.value.status)
        monkeypatch.setattr(train, "score_split", score)
        run.folder.release()
        run = resumed(folder)
        if len(ends) < 3:  # the score that was interrupted comes first
            assert run.trainer.progress.unscored
            train.choose(run, [])
    train.train(run, [])
    train.finish(run, [])
    assert ends == [128 + signal.SIGTERM] * 3
    assert_same_bits(tmp_path / "whole", folder)
    logs = [
        [(e["step"], e["loss"], e["miou"]) for e in map(json.loads, (f / "log.jsonl").open())]
        for f in (tmp_path / "whole", folder)
    ]
    assert logs[0] == logs[1] and all(miou is not None for _, _, miou in logs[0])
    assert (folder / "scores.json").read_bytes() == (tmp_path / "whole/scores.json").read_bytes()


def resumed(folder):
    held = RunFolder(folder)
    s = train.stored_settings(held)
    return Run(s, open_dataset("vaihingen", s.root), Team(), torch.device("cpu"), held)


def test_a_run_can_be_lengthened_and_says_that_it_was(city, tmp_path, capsys):
    run = short_run(city, tmp_path / "run", encoder="tiny", epochs=1, steps=2)
    train.train(run, [])
    train.finish(run, [])
    held = RunFolder(tmp_path / "run")
    assert held.is_finished()
    s = train.stored_settings(held)
    s.epochs = 2
    longer = Run(s, open_dataset("vaihingen", s.root), Team(), torch.device("cpu"), held)
    assert not held.is_finished() and "lengthened from 1 to 2 epochs" in capsys.readouterr().out
    assert longer.trainer.progress.lengthened == [[2, 1]]
    train.train(longer, [])
    assert longer.trainer.progress.step == 4
    assert resumed(tmp_path / "run").trainer.progress.lengthened == [[2, 1]]


def test_a_finished_run_is_left_as_it_is(city, whole_run):
    before = {p: p.read_bytes() for p in whole_run.rglob("*") if p.is_file()}
    out, _ = call(city, whole_run, "--resume")
    assert "is finished" in out and "evaluate.py --run" in out
    assert {p: p.read_bytes() for p in whole_run.rglob("*") if p.is_file()} == before


def test_what_needs_less_memory_may_be_given_when_a_run_goes_on(city, tmp_path):
    short_run(city, tmp_path / "run", epochs=1, steps=2).folder.release()
    more = "--gradient-checkpointing --accumulate 2"
    call(city, tmp_path / "run", f"--resume --epochs 1 --steps 2 {more}")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["checkpointing"], config["accumulate"]) == (True, 2)


def test_a_run_keeps_the_precision_that_it_began_with(city, tmp_path, monkeypatch):
    """`auto` on a GPU is bf16, and so it stays where the run goes on without one."""
    out, flags = tmp_path / "run", "--precision auto --steps 2 --seed 0 --epochs"
    with monkeypatch.context() as patch:
        patch.setattr(a_run, "resolve_precision", lambda given, device: "bf16")
        call(city, out, f"{flags} 1 --start-or-continue")
    call(city, out, f"{flags} 1 --start-or-continue")  # finds it finished
    words = "--resume --epochs 2 --precision auto".split()
    call_script("train.py", train.main, *words, "--out", out)
    assert json.loads((out / "config.json").read_text())["precision"] == "bf16"
    assert torch.load(out / "last.pt", weights_only=True)["settings"]["precision"] == "bf16"


def test_a_second_run_on_the_same_folder_is_refused(city, tmp_path):
    run = short_run(city, tmp_path / "run")
    _, err = call(city, run.folder, "--resume", status=2)
    assert "is being trained by another process" in err and len(err.splitlines()) == 1


# --------------------------------------------------------------------------------------- many seeds


@pytest.mark.skipif(os.name == "nt", reason="Windows locks no folder")
def test_a_process_that_cuts_crops_does_not_hold_the_folder(tmp_path):
    """It outlives a run that was killed by seconds."""
    run = RunFolder(tmp_path)
    run.hold()
    forked = multiprocessing.get_context("fork")
    begun = forked.Event()
    worker = forked.Process(target=lambda: (begun.set(), time.sleep(60)))
    worker.start()
    try:
        assert begun.wait(20)
        with pytest.raises(Mistake, match="being trained by another"):
            RunFolder(tmp_path).hold()
        run.release()
        other = RunFolder(tmp_path)
        other.hold()
        other.release()
    finally:
        worker.kill()
        worker.join()


def test_seeds_are_trained_in_turn_and_shown_as_one_row_with_what_was_there(city, tmp_path):
    words = "--encoder tiny --epochs 1 --steps 1"
    out, _ = call(city, tmp_path, f"--seeds 0 1 {words}")
    times = {i: (tmp_path / f"seed-{i}" / "last.pt").stat().st_mtime_ns for i in (0, 1)}
    (tmp_path / "seed-1" / "scores.json").unlink()  # stopped in its last score
    again, _ = call(city, tmp_path, f"--seeds 1 2 {words}")
    scores = [
        100 * json.loads((tmp_path / f"seed-{i}" / "scores.json").read_text())["miou"]
        for i in (0, 1, 2)
    ]
    assert f"{statistics.fmean(scores[:2]):.2f} +- {statistics.stdev(scores[:2]):.2f}" in out
    assert f"{statistics.fmean(scores):.2f} +- {statistics.stdev(scores):.2f}" in again
    assert (tmp_path / "seed-0" / "last.pt").stat().st_mtime_ns == times[0]  # not trained again
    assert not (tmp_path / "seeds.json").exists()


def test_the_same_command_begins_a_run_goes_on_with_it_and_leaves_it(city, tmp_path, whole_run):
    words = "--start-or-continue --seed 0 "
    process = Script(ROOT / "train.py", *words_of(city, tmp_path / "run", words))
    wait_for_step(tmp_path / "run", process, 0)
    process.kill()
    process.communicate()
    _, err = call(city, tmp_path / "run", words + "--lr 0.5", status=2)
    assert "contradicts the run in" in err and "another --out" in err and len(err.splitlines()) == 1
    call(city, tmp_path / "run", words)
    assert_same_bits(whole_run, tmp_path / "run")
    before = (tmp_path / "run" / "model.pt").stat().st_mtime_ns
    assert "is finished" in call(city, tmp_path / "run", words)[0]
    assert (tmp_path / "run" / "model.pt").stat().st_mtime_ns == before
    _, err = call(city, tmp_path / "run", status=2)  # without the flag nothing is taken for granted
    assert "--resume --out" in err


def test_seeds_of_different_experiments_are_never_averaged(city, tmp_path):
    call(city, tmp_path, "--encoder tiny --seeds 0 --epochs 1 --steps 1")
    for flags in ("--tuner lora", "--lr 0.02", "--epochs 2", "--tuner-option ratio=0.5"):
        words = f"--encoder tiny --seeds 0 1 --epochs 1 --steps 1 {flags}"
        _, err = call(city, tmp_path, words, status=2)
        assert "contradicts the run in" in err and len(err.splitlines()) == 1
        assert not (tmp_path / "seed-1").exists()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_s_network_keeps_activations_or_computes_them_again_as_it_was_told(
    city, tmp_path, checkpointing
):
    run, kept = short_run(city, tmp_path / "run", checkpointing=checkpointing), []
    block = run.trainer.model.image_encoder.blocks[0]
    x = torch.randn(2, 4, 4, block.norm1.normalized_shape[0], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        block(x)
    run.folder.release()
    assert (set(kept) <= {x.shape}) == checkpointing
