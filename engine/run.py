"""A run before its first step: data, weights, what it had learned, its folder, what it says."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from engine.budget import check_budget
from engine.checkpoints import save_model, save_tensors
from engine.console import Mistake
from engine.device import resolve_precision, store_frozen_weights, version
from engine.distributed import Team
from engine.folder import RunFolder, new_folder, read_last
from engine.networks import base_file, build_model
from engine.plugins import keep_plugins
from engine.recipes import command_of, different_from_recipe
from engine.settings import Settings, held_out_tiles
from engine.training import Trainer
from fast import accelerate
from geodata.crops import crops_of_step
from geodata.loading import class_pixels, facts_of, fingerprint, load_tiles, memory_line, share_of
from geodata.rasters import DataError
from mfnet import MFNet, count_parameters, trained_names


class Run:
    """A run in its folder, ready to train. Only the main process prints and writes."""

    def __init__(
        self,
        s: Settings,
        dataset: Any,
        team: Team,
        device: torch.device,
        folder: RunFolder | None = None,
    ):
        """A new run on a `data.Dataset`, or with a `folder` the one that is in it."""
        self.s, self.team, self.device = s, team, device
        last = None if folder is None else read_last(folder.path)
        self.open_data(dataset, last)
        self.build(last)
        # What can be wrong with data or weights was found by now: from here on there is a folder.
        self.folder = folder or new_folder(s, team)
        s.out = str(self.folder)
        self.announce()
        self.begin(last)

    def open_data(self, dataset: Any, last: dict | None) -> None:
        s, modalities, world = self.s, self.s.rasters, self.team.world
        # From here on the run's own: it goes on, and is scored, in this precision on any device.
        s.precision = resolve_precision(s.precision, self.device)
        if s.batch_size % (world * s.accumulate):
            parts = f"{world} processes x {s.accumulate} parts"
            raise Mistake(f"--batch-size {s.batch_size} is no multiple of {parts}")
        self.crops = crops_of_step(s.batch_size, s.drop_modality, world)
        self.dataset = dataset.hold_out(held_out_tiles(s.val)) if s.val else dataset
        self.classes = [[name, list(color)] for name, color in dataset.classes]
        tiles = share_of(self.dataset.tiles("train", modalities), s.share, s.seed)
        # A test tile that is missing or broken is to be found now, not after the training.
        self.notes = self.dataset.lacking(tiles, "train", modalities)
        self.notes += self.dataset.check(modalities)
        if "dsm" in modalities:
            s.heights_kind, _ = self.dataset.chosen_heights()
        check_budget(s, len(self.classes), self.device, world)
        self.tiles = load_tiles(tiles, modalities, s.memory_gb)
        self.fingerprint, self.facts = fingerprint(self.tiles), facts_of(tiles)
        counted = self.tiles if s.class_weights == "balanced" else []  # seconds, of large tiles
        self.pixels = class_pixels(counted, len(self.classes))
        self.notes += [note for tile in tiles for note in tile.notes]
        if last is not None and last["data"] != self.fingerprint:
            others = f"{s.root}: not the training tiles that {s.out} began with"
            raise DataError(f"{others}; give them back, or begin anew")

    def build(self, last: dict | None) -> None:
        """The network on its base, fast, on its device, with what a resumed run had learned."""
        s, team = self.s, self.team
        if team.is_main:  # on a fresh machine one process downloads
            base_file(s)
        team.barrier()
        model, self.base, self.report = build_model(s, len(self.classes))
        if last is not None and last["base"]["sha256"] != self.base["sha256"]:
            named = "{weights} (sha256 {sha256})".format_map
            bases = f"{named(last['base'])}, not on {named(self.base)}"
            remedy = "give the base it was begun on by --weights"
            raise DataError(f"{s.out} was begun on {bases}; {remedy}")
        store_frozen_weights(model, s.precision, self.device)
        accelerate(model, checkpointing=s.checkpointing)
        self.trainer = Trainer(model.to(self.device), s, team, self.pixels)
        if self.trainer.weights is not None:
            self.facts["class_weights"] = self.trainer.weights.tolist()
        if last is not None:
            self.trainer.load_state_dict(last, f"last.pt of {s.out}")

    def announce(self) -> None:
        s, many = self.s, f", {self.team.world} processes" if self.team.world > 1 else ""
        self.say(f"MFNet, {version()}, device {self.device}{many}")
        self.say(f"{s.data}, {different_from_recipe(s)}; all settings: {self.folder}/config.json")
        self.say(f"training: {memory_line(self.tiles)}, from {s.root}")
        for note in self.notes:
            self.say(f"note: {note}")
        random = "NONE, the encoder is random; scores will be far below the paper"
        self.say(f"weights: {self.report or random}")
        self.say(describe_model(self.trainer.model))
        if s.class_weights == "balanced":
            named = zip(self.classes, self.facts["class_weights"])
            listed = ", ".join(f"{name} {weight:.2f}" for (name, _), weight in named)
            self.say(f"class weights: {listed}")
        again = self.crops - s.batch_size
        more = f", {again} of them again with rasters missing" if again else ""
        self.say(f"{s.epochs} epochs x {s.steps} steps x {s.batch_size} crops of {s.crop}{more}")

    def begin(self, last: dict | None) -> None:
        """Writes what there is before the first step: a run that dies in it can go on."""
        s, progress = self.s, self.trainer.progress
        if last is not None and s.epochs > last["settings"]["epochs"]:
            self.lengthen(last["settings"]["epochs"])
        if self.team.is_main:
            config = {
                **asdict(s),
                "base": self.base,
                "classes": self.classes,
                "version": self.folder.versions(version(), progress.step, s.epochs * s.steps),
                "processes": self.team.world,
                "parameters": count_parameters(self.trainer.model),
                "lengthened": progress.lengthened,
                "facts": self.facts,
                "command": command_of(s),
                "date": time.strftime("%Y-%m-%d %H:%M"),
            }
            self.folder.write_json("config.json", config)
            with self.folder.writing():
                keep_plugins(s.plugin, self.folder.path)
        if last is None:
            self.save_last()

    def lengthen(self, epochs: int) -> None:
        """Notes that a run which was to have `epochs` goes on for more."""
        s, progress = self.s, self.trainer.progress
        progress.lengthened.append([progress.step, epochs])
        until, goal = f"from {epochs} to {s.epochs} epochs after step {progress.step}", s.epochs
        schedule = f"the schedule is that of {goal} from here on"
        self.say(f"lengthened {until}: {schedule}, so this is no run of {goal} epochs")
        if self.team.is_main:
            self.folder.reopen()
        self.save_last()

    def say(self, text: str) -> None:
        if self.team.is_main:
            print(text, flush=True)

    def save_last(self) -> None:
        self.trainer.check_weights()
        if self.team.is_main:
            content = self.trainer.state_dict(self.base, self.fingerprint)
            with self.folder.writing():
                save_tensors(self.folder / "last.pt", content)

    def save_model(self, epoch: int, finished: bool) -> None:
        if self.team.is_main:
            path, model = self.folder / "model.pt", self.trainer.model
            with self.folder.writing():
                save_model(path, model, self.s, self.base, self.classes, epoch, finished)


def describe_model(model: MFNet) -> str:
    """Numbers of parameters; AssertionError unless exactly what the tuner lists is trained."""
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == trained_names(model), "what requires a gradient is not what the tuner trains"
    counts = count_parameters(model)
    counts["frozen"] = counts["total"] - counts["trainable"]
    return "parameters: " + ", ".join(f"{group} {n:,}" for group, n in counts.items())
