"""Trains MFNet, scores the test tiles, and writes pictures.

    python train.py                                              a synthetic city, on any laptop
    python train.py --data vaihingen --root DIR                  the paper's recipe
    python train.py --data vaihingen --root DIR --tuner lora --tuner-option rank=8
    python train.py --data vaihingen --root DIR --as-published   as the published code does it
    python train.py --data tiles --root DIR                      own tiles
    python train.py --seeds 0 1 2 --out runs/NAME                three runs, and their mean
    python train.py --resume --out runs/NAME                     go on with an interrupted run
    python train.py --start-or-continue --out runs/NAME ...      the same command, again and again
    torchrun --nproc_per_node=5 train.py --data vaihingen ...    the same run on five GPUs

A run's folder holds config.json, log.jsonl (a line per epoch), last.pt (everything to go on), and
at the end model.pt (what was trained), scores.json, pictures/ and report.html. Every random choice
is a function of --seed and the step: on a CPU with as many threads the same command gives the same
weights (on a GPU as far as --deterministic can), a resumed run those of one that was never stopped,
and N processes the weights of one, up to rounding.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data import Dataset, open_from_settings
from engine.budget import explain_failure
from engine.checkpoints import load_trained_state, read_content, read_settings
from engine.commandline import parse_settings, resumed_settings
from engine.console import Mistake, Ticker, clock, run_script, typed
from engine.device import compute_deterministically, peak_memory, pick_device, use_large_pages
from engine.distributed import Team, join_team, leave_team
from engine.folder import RunFolder, check_new, read_last, unfinished_run
from engine.run import Run
from engine.scoring import format_scores, score_split
from engine.settings import Settings
from engine.signals import leave_signals_to_the_parent, noted_signals
from engine.training import TrainingStopped, learning_rate
from geodata.crops import CropDataset, CropOrder
from geodata.rasters import DataError
from reports.panels import save_panel
from reports.report import write_report
from reports.table import markdown, read_runs
from sam_vit import WeightsError

# ---------------------------------------------------------------------------------------- training


def train(run: Run, noted: list[int]) -> None:
    """Takes the steps that are left, and saves. `noted` are the signals that asked to stop."""
    s, team, trainer = run.s, run.team, run.trainer
    first, total = trainer.progress.step, s.epochs * s.steps
    if trainer.progress.unscored:  # stopped between the end of an epoch and its score
        choose(run, noted)
    batches, ticker = iter(loader(run)), Ticker("step")
    seconds, taken = 0.0, 0
    for step in range(first + 1, total + 1):
        start = time.monotonic()
        trainer.model.train()
        loss = trainer.step(*next(batches))
        seconds, taken = seconds + time.monotonic() - start, taken + 1
        speed = taken * s.batch_size / seconds
        if team.is_main:
            ticker(step, total, f", loss {loss:.3f}, {speed:.3g} images/s")
        signals = [numbers[0] for numbers in team.gather(noted) if numbers]
        if step % s.steps == 0:
            ticker.close()
            end_epoch(run, seconds, speed, noted)
            seconds, taken = 0.0, 0
        elif signals or (s.save_every and step % s.save_every == 0):
            run.save_last()
        if signals and step < total:
            stop(run, signals[0], f"after step {step} of {total}")


def loader(run: Run) -> torch.utils.data.DataLoader:
    """The batches (rasters, labels) of this process, from where the run stands to its end."""
    s, on_gpu = run.s, run.device.type == "cuda"
    modalities, first = s.rasters, run.trainer.progress.step
    last_pixel, rotations = s.crop_range == "full", s.augment == "flips+rotations"
    balanced = len(run.classes) if s.balance_crops else 0
    how = last_pixel, rotations, balanced, s.may_lack
    crops = CropDataset(run.tiles, s.crop, s.seed, modalities, *how)
    place = run.team.rank, run.team.world
    order = CropOrder(s.epochs, s.steps, s.batch_size, first, *place, s.drop_modality)
    return torch.utils.data.DataLoader(
        crops,
        batch_sampler=order,
        num_workers=s.workers if s.workers >= 0 else 4 * on_gpu,
        pin_memory=on_gpu,
        worker_init_fn=leave_signals_to_the_parent,
    )


def end_epoch(run: Run, seconds: float, speed: float, noted: list[int]) -> None:
    """Logs and saves an epoch, and then scores it where --select or --eval-every asks to."""
    s, progress = run.s, run.trainer.progress
    epoch, loss = progress.step // s.steps, progress.loss_sum / s.steps
    if not progress.scored:
        look = f"look at the labels: python data.py --data {s.data} --root {s.root}"
        raise TrainingStopped(f"no pixel of epoch {epoch} had a label that counts; {look}")
    run.trainer.check_weights()
    rate = learning_rate(progress.step - 1, s)
    run.say(f"epoch {epoch}/{s.epochs}: loss {loss:.4f}, lr {rate:.3g}, {speed:.3g} images/s")
    progress.loss_sum = progress.scored = 0.0
    every = s.eval_every or (1 if s.select != "last" else 0)
    progress.unscored = bool(every) and (epoch % every == 0 or epoch == s.epochs)
    if run.team.is_main:
        entry = dict(epoch=epoch, step=progress.step, loss=loss, lr=rate, images_per_second=speed)
        run.folder.append_log(entry | dict(peak_memory_mb=peak_memory(run.device), seconds=seconds))
    run.save_last()
    if progress.unscored:
        choose(run, noted)


def choose(run: Run, noted: list[int]) -> None:
    """Scores the tiles that --select looks at; keeps the epoch as model.pt if it is the best."""
    s, progress = run.s, run.trainer.progress
    epoch, split = progress.step // s.steps, "val" if s.val and s.select != "test" else "test"
    stride = s.select_stride or s.eval_stride
    found = score(run, split, stride, noted)["miou"]
    miou = found or 0
    if s.select != "last" and (progress.best is None or miou > progress.best):
        progress.best, progress.best_epoch = miou, epoch
        run.save_model(epoch, finished=False)
    run.say(f"epoch {epoch}: mIoU {100 * miou:.2f}, {split} tiles at stride {stride}")
    progress.unscored = False
    if run.team.is_main:
        run.folder.amend_log(miou=found)
    run.save_last()


# ----------------------------------------------------------------------------------------- scoring


def finish(run: Run, noted: list[int]) -> dict:
    """Writes model.pt, scores.json and pictures/ of the chosen epoch; returns the scores."""
    s, epoch, chosen = run.s, run.s.epochs, "the last epoch is scored"
    if s.select != "last":
        run.team.barrier()
        epoch, path = run.trainer.progress.best_epoch, run.folder / "model.pt"
        load_trained_state(run.trainer.model, read_content(path, ("state",))["state"], str(path))
        optimistic = "TEST tiles, as published: an optimistic choice"
        tiles = optimistic if s.select == "test" else "held-out tiles"
        chosen = f"epoch {epoch} is scored, the best on the {tiles}"
        run.team.barrier()  # before the main process writes the file again
    run.save_model(epoch, finished=True)
    with run.folder.writing():
        (run.folder / "pictures").mkdir(exist_ok=True)
        scores = score(run, "test", s.eval_stride, noted, pictures=True)
    run.say(f"{format_scores(scores)}\n({chosen})")
    if run.team.is_main:
        run.folder.write_json("scores.json", scores)
        with run.folder.writing():
            write_report(run.folder.path)
    run.say(f"{run.folder}: model.pt, scores.json, pictures/, report.html")
    run.say(f"next: {typed('explain.py', '--run', run.folder)}")
    return scores


def score(run: Run, split: str, stride: int, noted: list[int], pictures: bool = False) -> dict:
    """The scores of a split. Everything is saved by now: a signal ends the run at once."""

    def keep(tile, pred, confidence) -> None:
        path = run.folder / "pictures" / f"{split}_{tile.name}.png"
        save_panel(path, tile, pred, confidence, run.dataset.classes)

    def pause() -> None:
        if noted:
            stop(run, noted[0], f"while scoring the {split} tiles")

    model, keep = run.trainer.model.eval(), keep if pictures else None
    return score_split(model, run.dataset, split, run.s, stride, keep, run.team, pause)


def stop(run: Run, number: int, where: str) -> None:
    again = typed("train.py", "--resume", "--out", run.folder)
    raise TrainingStopped(f"interrupted {where}; go on with {again}", status=128 + number)


# ------------------------------------------------------------------------------------------ script


def open_data(s: Settings, team: Team) -> Dataset:
    """The data set; the main process alone makes the synthetic city."""
    if team.is_main:
        if s.data == "synthetic" and not Path(s.root).exists():
            print(f"making a synthetic city in {s.root}, a few seconds", flush=True)
        open_from_settings(s)
    team.barrier()
    return open_from_settings(s)


def one_run(
    s: Settings, given: dict | None, team: Team, device: torch.device, lengthen: bool = True
) -> None:
    """A run from settings to scores; `given` by hand where one is to be gone on with."""
    folder = None
    if given is not None:
        folder = RunFolder(Path(s.out or unfinished_run()))
        s = resumed_settings(stored_settings(folder), given, folder.path, lengthen)
        step = read_last(folder.path)["progress"]["step"]
        if step == s.epochs * s.steps and folder.is_finished():
            print(f"{folder} is finished; {typed('evaluate.py', '--run', folder)} scores it again")
            return
        if team.is_main:
            folder.hold()
    elif s.out:
        check_new(Path(s.out))
    try:
        run = Run(s, open_data(s, team), team, device, folder)
        folder = run.folder
        with noted_signals() as noted:
            start = time.monotonic()
            train(run, noted)
            used, took = peak_memory(device), clock(time.monotonic() - start)
            run.say(f"trained in {took}" + (f", peak memory {used:,.0f} MB" if used else ""))
            finish(run, noted)
    except (RuntimeError, MemoryError) as error:
        raise explain_failure(error, s, device) or error
    finally:
        if folder is not None:
            folder.release()


def stored_settings(folder: RunFolder) -> Settings:
    return read_settings(read_last(folder.path), folder / "last.pt")


def all_seeds(s: Settings, seeds: list[int], team: Team, device: torch.device) -> None:
    """One run after the other, in folders of their own below --out; a finished one is kept, an
    interrupted one gone on with, one of other settings refused. Prints their table."""
    if not s.out:
        raise Mistake("--seeds needs --out: the folder that the runs are written below")
    for seed in dict.fromkeys(seeds):
        folder = str(Path(s.out) / f"seed-{seed}")
        start_or_continue(replace(s, seed=seed, out=folder), team, device)
    if team.is_main:
        print(markdown(read_runs([Path(s.out)])[0]))
        print(f"next: {typed('explain.py', '--run', Path(s.out) / f'seed-{seeds[0]}')}")


def start_or_continue(s: Settings, team: Team, device: torch.device) -> None:
    """A run that goes on if --out holds it, and is refused if that holds one of other settings."""
    # A run fills in which kind of heights there is; see `Run.open_data`.
    given = {k: v for k, v in asdict(s).items() if (k, v) != ("heights_kind", "")}
    begun = (Path(s.out) / "last.pt").exists()
    one_run(s, given if begun else None, team, device, lengthen=False)


def main() -> None:
    use_large_pages()
    s, given, args = parse_settings(description=__doc__)
    team, device_name = join_team(s.device)
    try:
        s = team.broadcast(s)  # a seed that was drawn is the main process's
        device = pick_device(device_name)
        if s.deterministic:
            compute_deterministically(device)
        if args.seeds:
            all_seeds(s, args.seeds, team, device)
        elif args.start_or_continue:
            start_or_continue(s, team, device)
        else:
            one_run(s, given if args.resume else None, team, device)
    finally:
        leave_team()


if __name__ == "__main__":
    run_script(main, DataError, WeightsError)
