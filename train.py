"""Trains MFNet, scores the test tiles, and writes pictures.

    python train.py                                              a synthetic city, on any laptop
    python train.py --data vaihingen --root DIR                  the paper's recipe: ViT-L, MMAdapter, 50 x 1000 x 10
    python train.py --data vaihingen --root DIR --tuner lora
    python train.py --data tiles --root DIR                      own tiles
    python train.py --resume --out runs/NAME                     go on with an interrupted run
    torchrun --nproc_per_node=4 train.py --data vaihingen ...    the same run on four GPUs

A run's folder holds config.json, log.jsonl (a line per epoch), last.pt (everything to go on), and
at the end model.pt (what was trained), scores.json, pictures/ and report.html. Every random choice
is a function of --seed and the step: the same command on the same machine gives the same weights, a
resumed run those of one that was never stopped, and N processes the weights of one, up to rounding.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Iterator

import torch

from data import Dataset, open_from_settings
from engine.checkpoints import build_model, load_trained_state, newest_run, read_content, save_model
from engine.console import Ticker, clock, run_script
from engine.device import peak_memory, pick_device, store_frozen_weights, version
from engine.distributed import Team, join_team, leave_team
from engine.files import replace_atomically
from engine.scoring import SUMMARY, format_scores, score_run, score_split
from engine.settings import (
    AS_PUBLISHED,
    AS_PUBLISHED_WITH,
    Settings,
    held_out_tiles,
    learning_rate,
    parse_settings,
    resumed_settings,
)
from engine.training import Trainer, TrainingStopped
from geodata.crops import CropDataset, CropOrder
from geodata.layouts import MODALITIES
from geodata.rasters import DataError
from geodata.tiles import facts_of, fingerprint, load_tiles, memory_line
from mfnet import MFNet, count_parameters, trained_names
from reports.report import write_report

# ---------------------------------------------------------------------------------------------- run


class Run:
    """One run in its folder: trains, saves, chooses, scores. Only the leader of the team prints and
    writes.
    """

    def __init__(
        self, s: Settings, dataset: Dataset, team: Team, device: torch.device, last: dict | None
    ):
        if s.val:
            dataset = dataset.hold_out(held_out_tiles(s.val))
        self.s, self.dataset, self.team = s, dataset, team
        modalities = MODALITIES[s.modalities]
        tiles = dataset.tiles("train", modalities)
        dataset.check(modalities)  # a broken test tile is to be found now, not after the training
        if "dsm" in modalities:
            s.heights_kind, _ = dataset.chosen_heights()
        self.tiles = load_tiles(tiles, modalities, s.memory_gb)
        self.data = fingerprint(self.tiles)
        self.classes = [[name, list(color)] for name, color in dataset.classes]
        model, self.base, report = build_model(
            asdict(s), len(dataset.classes), Ticker("fetching SAM's weights, bytes")
        )
        if last is not None and last["base"]["sha256"] != self.base["sha256"]:
            theirs, ours = (
                f"{b['weights']} (sha256 {b['sha256']})" for b in (last["base"], self.base)
            )
            raise DataError(
                f"{s.out} was begun on {theirs}, not on {ours}; give the base it was begun on by --weights"
            )
        if last is not None and last["data"] != self.data:
            raise DataError(
                f"{s.root}: not the training tiles that {s.out} began with; give them back, or begin anew"
            )
        store_frozen_weights(model, s.precision, device)
        self.trainer = Trainer(model.to(device), s, team, len(dataset.classes))
        if last is not None:
            self.trainer.restore(last, f"last.pt of {s.out}")
        # Everything that can be wrong with data or weights has been found by now: from here on
        # there is a folder.
        self.folder = Path(s.out) if last is not None else new_folder(s, team)
        s.out = str(self.folder)
        self.say(
            f"MFNet, {version()}, device {device}"
            + (f", {team.world} processes" if team.world > 1 else "")
        )
        self.say(", ".join(f"{k} {v}" for k, v in asdict(s).items()))
        self.say(f"training: {memory_line(self.tiles)}, from {s.root}")
        for note in (note for tile in tiles for note in tile.notes):
            self.say(f"note: {note}")
        self.say(
            f"weights: {report or 'NONE, the encoder is random; scores will be far below the paper'}"
        )
        self.say(describe_model(model))
        self.say(f"{s.epochs} epochs x {s.steps} steps x {s.batch_size} crops of {s.crop}")
        config = {
            **asdict(s),
            "base": self.base,
            "classes": self.classes,
            "version": version(),
            "processes": team.world,
            "facts": facts_of(tiles),
        }
        config["parameters"] = count_parameters(model)
        if team.leads:
            write_json(self.folder / "config.json", config)
        self.board = open_tensorboard(self.folder) if team.leads else None

    def say(self, text: str) -> None:
        if self.team.leads:
            print(text, flush=True)

    def train(self) -> None:
        """Trains from where the run stands to its end; writes log.jsonl and last.pt."""
        s, team, trainer = self.s, self.team, self.trainer
        first, total = trainer.progress.step, s.epochs * s.steps
        workers = s.workers if s.workers >= 0 else (0 if trainer.device.type == "cpu" else 4)
        loader = torch.utils.data.DataLoader(
            CropDataset(
                self.tiles, s.crop, s.seed, MODALITIES[s.modalities], s.crop_range == "full"
            ),
            batch_sampler=CropOrder(
                s.epochs, s.steps, s.batch_size, first, s.accumulate, team.rank, team.world
            ),
            num_workers=workers,
            pin_memory=trainer.device.type == "cuda",
            worker_init_fn=leave_signals_to_the_parent,
        )
        with noted_signals() as noted:
            batches, ticker = iter(loader), Ticker("step")
            start = epoch_start = time.monotonic()
            epoch_first = first
            for done in range(first + 1, total + 1):
                trainer.model.train()
                loss = trainer.step([next(batches) for _ in range(s.accumulate)])
                now = time.monotonic()
                if team.leads:
                    speed = (done - first) * s.batch_size / (now - start)
                    ticker(done, total, f", loss {loss:.3f}, {speed:.3g} images/s")
                signals = [n for n in team.gather(noted[0] if noted else 0) if n]
                if done % s.steps == 0:
                    self.end_epoch(done, (done - epoch_first) * s.batch_size, now - epoch_start)
                    epoch_start, epoch_first = time.monotonic(), done
                elif signals or (s.save_every and done % s.save_every == 0):
                    self.save_last()
                if signals and done < total:
                    again = f"python train.py --resume --out {self.folder}"
                    message = f"interrupted after step {done} of {total}; go on with {again}"
                    raise TrainingStopped(message, status=128 + signals[0])

    def end_epoch(self, step: int, images: int, seconds: float) -> None:
        s, progress = self.s, self.trainer.progress
        epoch = step // s.steps
        entry = {
            "epoch": epoch,
            "step": step,
            "loss": progress.loss_sum / s.steps,
            "lr": learning_rate(step - 1, s),
            "images_per_second": images / seconds,
            "peak_memory_mb": peak_memory(self.trainer.device),
            "seconds": seconds,
        }
        progress.loss_sum = 0.0
        every = s.eval_every or (1 if s.select != "last" else 0)
        if every and (epoch % every == 0 or epoch == s.epochs):
            entry["miou"] = self.choose(epoch)
        if self.team.leads:
            with self.writing():
                append_log(self.folder, entry)
            for name, value in entry.items():
                if self.board and value is not None:
                    self.board.add_scalar(name, value, step)
        self.save_last()

    def choose(self, epoch: int) -> float | None:
        """Scores the tiles that --select looks at; keeps the epoch as model.pt if it is the best so
        far.
        """
        s, progress, model = self.s, self.trainer.progress, self.trainer.model
        split = "val" if s.val and s.select != "test" else "test"
        scores = score_split(
            model.eval(), self.dataset, split, asdict(s), s.eval_stride, team=self.team
        )
        if s.select != "last" and (progress.best is None or (scores["miou"] or 0) > progress.best):
            progress.best, progress.best_epoch = scores["miou"] or 0, epoch
            self.save_model()
        self.say(f"epoch {epoch}: mIoU {100 * (scores['miou'] or 0):.2f} on the {split} tiles")
        return scores["miou"]

    def save_last(self) -> None:
        if self.team.leads:
            content = self.trainer.content(self.base, self.data)
            with self.writing():
                replace_atomically(self.folder / "last.pt", lambda p: torch.save(content, p))

    def save_model(self) -> None:
        if self.team.leads:
            with self.writing():
                save_model(
                    self.folder / "model.pt",
                    self.trainer.model,
                    asdict(self.s),
                    self.base,
                    self.classes,
                )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A full disk or a folder that is gone ends the run with a line; files that were written
        before stay whole.
        """
        try:
            yield
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch tells of a full disk by RuntimeError, in riddles
            free = (
                f", {shutil.disk_usage(self.folder).free / 1e6:,.0f} MB are free"
                if self.folder.exists()
                else ""
            )
            raise TrainingStopped(
                f"{self.folder} cannot be written ({str(error).splitlines()[0]}{free}); what was saved before is intact: "
                f"make room, then python train.py --resume --out {self.folder}"
            ) from error

    def finish(self) -> dict:
        """Writes model.pt, scores.json and pictures/ of the epoch that was chosen; returns the
        scores.
        """
        s, progress, model = self.s, self.trainer.progress, self.trainer.model
        chosen = "the last epoch is scored"
        if s.select == "last":
            self.save_model()
        else:
            self.team.wait()
            best = read_content(self.folder / "model.pt", ("state",))
            load_trained_state(model, best["state"], str(self.folder / "model.pt"))
            where = (
                "TEST tiles, as published: an optimistic choice"
                if s.select == "test"
                else "held-out tiles"
            )
            chosen = f"epoch {progress.best_epoch} is scored, the best on the {where}"
        scores = score_run(
            self.folder, model.eval(), self.dataset, "test", asdict(s), s.eval_stride, self.team
        )
        self.say(format_scores(scores))
        self.say(f"({chosen})")
        if self.team.leads:
            write_report(self.folder)
        self.say(f"{self.folder}: model.pt, scores.json, pictures/, report.html")
        return scores


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in a list, for the loop to look at after each step; a second one
    ends the program.
    """
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame) -> None:
        noted.append(number)
        signal.signal(number, before[number])

    try:
        for number in before:
            signal.signal(number, note)
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_parent(worker: int) -> None:
    """A terminal's Ctrl-C reaches the workers too; they go on until the parent has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def open_tensorboard(folder: Path):
    """A writer below the run's folder, or None where the package tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard")


def append_log(folder: Path, entry: dict) -> None:
    """Adds a line to log.jsonl, in place of what a run that was stopped had logged from this step
    on.
    """
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < entry["step"]]
    replace_atomically(
        path, lambda p: p.write_text("\n".join([*kept, json.dumps(entry)]) + "\n", encoding="utf-8")
    )


def describe_model(model: MFNet) -> str:
    """The numbers of parameters by group; raises AssertionError unless exactly what the tuner lists
    is trained.
    """
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == trained_names(model), "what requires a gradient is not what the tuner trains"
    counts = count_parameters(model)
    counts["frozen"] = counts["total"] - counts["trainable"]
    return "parameters: " + ", ".join(f"{group} {n:,}" for group, n in counts.items())


# ------------------------------------------------------------------------------------------- script


def new_folder(s: Settings, team: Team) -> Path:
    """The folder of a new run, made by the leader. Raises DataError if it holds a run already or
    cannot be made.
    """
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_{s.data}_{s.tuner}"
    folder, serial = Path(s.out or Path("runs") / name), 2
    while not s.out and folder.exists():
        folder, serial = Path("runs") / f"{name}-{serial}", serial + 1
    folder = Path(team.share(str(folder)))
    if (folder / "config.json").exists():
        raise DataError(
            f"{folder} holds a run already; go on with it by --resume, or give another --out"
        )
    team.wait()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {folder}: the folder cannot be made ({error.strerror})") from error
    return folder


def write_json(path: Path, content: dict) -> None:
    replace_atomically(
        path, lambda p: p.write_text(json.dumps(content, indent=1), encoding="utf-8")
    )


def run(s: Settings, given: dict, resume: bool, team: Team, device: torch.device) -> dict:
    """One run, new or resumed, from settings to scores."""
    last = None
    if resume:
        folder = Path(s.out) if s.out else newest_run(holding="last.pt")
        last = read_content(
            folder / "last.pt", ("settings", "base", "data", "state", "optimizer", "progress")
        )
        s = resumed_settings(last["settings"], given, folder)
    if s.batch_size % (team.world * s.accumulate):
        raise DataError(
            f"--batch-size {s.batch_size} is no multiple of {team.world} processes x {s.accumulate} parts"
        )
    if team.leads:
        if s.data == "synthetic" and not Path(s.root).exists():
            print(f"making a synthetic city in {s.root}", flush=True)
        open_from_settings(asdict(s))  # the leader alone makes the city
    team.wait()
    one = Run(s, open_from_settings(asdict(s)), team, device, last)
    start, first = time.monotonic(), one.trainer.progress.step
    one.train()
    seconds = time.monotonic() - start
    memory, images = peak_memory(device), (one.trainer.progress.step - first) * s.batch_size
    used = "unknown" if memory is None else f"{memory:,.0f} MB"
    one.say(f"trained in {clock(seconds)}, {images / seconds:.3g} images/s, peak memory {used}")
    return one.finish()


def run_seeds(s: Settings, given: dict, seeds: list[int], team: Team, device: torch.device) -> None:
    """One run after the other, in folders of their own below --out; a finished one is kept, an
    interrupted one resumed.

    Writes seeds.json: the scores of each seed, their mean and standard deviation.
    """
    if not s.out:
        raise DataError("--seeds needs --out: the folder that the runs are written below")
    rows = {}
    for seed in dict.fromkeys(seeds):
        folder = Path(s.out) / f"seed-{seed}"
        if (folder / "scores.json").exists():
            scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        else:
            own = {k: v for k, v in given.items() if k not in ("seed", "out")}
            scores = run(
                replace(s, seed=seed, out=str(folder)),
                own,
                (folder / "last.pt").exists(),
                team,
                device,
            )
        rows[seed] = {key: scores[key] for _, key in SUMMARY}
    values = {
        key: [row[key] for row in rows.values() if row[key] is not None] for _, key in SUMMARY
    }
    mean = {key: statistics.fmean(v) if v else None for key, v in values.items()}
    deviation = {key: statistics.stdev(v) if len(v) > 1 else None for key, v in values.items()}
    if team.leads:
        write_json(
            Path(s.out) / "seeds.json", {"seeds": rows, "mean": mean, "deviation": deviation}
        )
        for label, key in SUMMARY:
            spread = "" if deviation[key] is None else f" +- {100 * deviation[key]:.2f}"
            print(f"{label} {100 * (mean[key] or 0):.2f}{spread} over {len(rows)} seeds")


def main() -> None:
    s, given, args = parse_settings(description=__doc__)
    team, device_name = join_team(s.device)
    try:
        s = Settings(**team.share(asdict(s)))  # a seed that was drawn is the leader's
        device = pick_device(device_name)
        if s.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cudnn.benchmark = False
        if args.as_published and team.leads:
            names = {**AS_PUBLISHED, **AS_PUBLISHED_WITH.get(s.data, {})}
            print("as published: " + ", ".join(f"{name} {getattr(s, name)}" for name in names))
        if args.seeds:
            run_seeds(s, given, args.seeds, team, device)
        else:
            run(s, given, args.resume, team, device)
    except TrainingStopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(stopped.status)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(
            error
        ):
            raise
        print(f"stopped: {out_of_memory(s, device)}", file=sys.stderr)
        sys.exit(1)
    finally:
        leave_team()


def out_of_memory(s: Settings, device: torch.device) -> str:
    ways = [f"--accumulate {2 * s.accumulate}", f"a --batch-size below {s.batch_size}"]
    ways += [] if s.checkpointing else ["--checkpointing"]
    ways += [] if s.precision == "bf16" else ["--precision bf16"]
    used = peak_memory(device)
    return (
        f"out of memory after {used:,.0f} MB with --batch-size {s.batch_size}; try "
        + " or ".join(ways)
    )


if __name__ == "__main__":
    run_script(main)
