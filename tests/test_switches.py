"""No dead switch: every setting changes what it says it changes, and nothing before it.

A run is looked at in stages. For each setting the table names the first stage in which a changed
value must show, or says that it must show in none. A setting without an entry fails.
"""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from conftest import TINY, small_encoder, write_city

import train
from data import open_from_settings
from engine.console import Mistake
from engine.distributed import Team
from engine.plugins import load_plugins
from engine.run import Run
from engine.scoring import score_split
from engine.settings import Settings
from engine.training import learning_rate
from geodata import synthetic
from geodata.layouts import LAYOUTS, VAIHINGEN
from geodata.rasters import read_raster
from sam_vit import SIZES

NEUTRAL = "neutral"  # the same in every stage, up to rounding

# setting: (changes from BASE, the first stage in which they must show)
TABLE = {
    "data": (dict(data="other"), "inputs"),
    "root": (dict(root="copy"), NEUTRAL),
    "bands": (dict(bands="3,2,1"), "inputs"),
    "labels": (dict(labels="published"), "inputs"),
    "splits": (dict(splits="official"), "inputs"),
    "full_labels": (dict(full_labels=True), "scores"),
    "heights": (dict(heights="percentiles"), "inputs"),
    "heights_kind": (dict(data="two kinds", heights="0:600", heights_kind="b"), "inputs"),
    "image_scaling": (dict(image_scaling="sam"), "inputs"),
    "share": (dict(share=0.5), "inputs"),
    "memory_gb": (dict(memory_gb=0.0), NEUTRAL),
    "encoder": (dict(encoder="wider", weights="none"), "trained"),
    "weights": (dict(weights="none"), "weights"),
    "relative_positions": (dict(relative_positions="zero"), "weights"),
    "tuner": (dict(tuner="adapter"), "trained"),
    "tuner_option": (dict(tuner_option={"rank": 2}), "trained"),
    # One that the network does not take; for those that it does see test_modalities.py.
    "kinds": (dict(kinds={"intensity": {"bands": [1], "scaling": "0:9"}}), NEUTRAL),
    "modalities": (dict(modalities="image"), "inputs"),
    "drop_modality": (dict(drop_modality=0.5), "inputs"),
    "drop_only": (dict(drop_modality=0.5, drop_only="dsm"), "inputs"),
    "fusion": (dict(fusion="sum"), "trained"),
    "plugin": (dict(plugin={}), NEUTRAL),  # this one adds nothing; see test_plugins.py
    "crop": (dict(crop=68), "inputs"),
    "crop_range": (dict(crop_range="published"), "inputs"),
    "augment": (dict(augment="flips+rotations"), "inputs"),
    "batch_size": (dict(batch_size=4), "inputs"),
    "epochs": (dict(epochs=3), "schedule"),
    "steps": (dict(steps=4), "inputs"),
    "optimizer": (dict(optimizer="adamw"), "curve"),
    "lr": (dict(lr=0.02), "schedule"),
    "weight_decay": (dict(weight_decay=0.5), "curve"),
    "schedule": (dict(schedule="cosine"), "schedule"),
    "early_drops": (dict(early_drops=True), "schedule"),
    "warmup": (dict(warmup=5), "schedule"),
    "clip": (dict(clip=1e-3), "curve"),
    "label_smoothing": (dict(label_smoothing=0.2), "curve"),
    "class_weights": (dict(class_weights="balanced"), "curve"),
    "balance_crops": (dict(balance_crops=True), "inputs"),
    "seed": (dict(seed=1), "inputs"),
    "val": (dict(val="23,34"), "inputs"),
    "select": (dict(select="test"), "files"),
    "eval_every": (dict(eval_every=1), "files"),
    "eval_stride": (dict(eval_stride=64), "scores"),
    "select_stride": (dict(select_stride=64, select="test"), "files"),
    "repeat_border": (dict(repeat_border=True), "scores"),
    "out": (dict(out="elsewhere"), NEUTRAL),
    "precision": (dict(precision="bf16"), "weights"),
    "accumulate": (dict(accumulate=2, lr=1e-4), NEUTRAL),
    "checkpointing": (dict(checkpointing=True), NEUTRAL),
    "compile": (dict(compile=True), "refused"),  # on a CPU
    "deterministic": (dict(deterministic=True), NEUTRAL),
    "save_every": (dict(save_every=7), "files"),
    "workers": (dict(workers=1), NEUTRAL),
    "device": (dict(device="auto"), NEUTRAL),
}
BASE = dict(
    data="vaihingen", root="city", encoder="tiny", weights="sam.pth", tuner="lora", crop=64,
    batch_size=2, epochs=2, steps=13, lr=0.01, eval_stride=32, precision="fp32", device="cpu",
    memory_gb=4.5, select="last", out="run", label_smoothing=0.0,
)  # fmt: skip
OTHER_BASE = {
    "select_stride": dict(select="test"),
    "accumulate": dict(lr=1e-4),  # a rate at which training does not multiply rounding
    "heights_kind": dict(data="two kinds", heights="0:600"),
}  # a setting that matters beside another alone


# ---------------------------------------------------------------------------------- the tiny world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A city of tiles of 64 x 100 pixels with every file that a setting may ask for, and a base."""
    here = tmp_path_factory.mktemp("world")
    write_city(here / "city", size=(64, 100))
    source = synthetic.tile_paths(here / "city", 5)
    for area in VAIHINGEN.splits["official"]["test"]:
        for kind, path in source.items():
            target = synthetic.tile_paths(here / "city", int(area))[kind]
            if not target.exists():
                shutil.copy(path, target)
    for area in synthetic.TRAIN_AREAS:  # colours that are off by a little, as Potsdam's
        path = synthetic.tile_paths(here / "city", area)["labels"]
        labels = read_raster(path).copy()
        labels[::2] = np.where(labels[::2] > 127, 250, 5)
        tifffile.imwrite(path, labels, photometric="rgb")
    shutil.copytree(here / "city", here / "copy")
    torch.save(small_encoder(seed=1).state_dict(), here / "sam.pth")
    (here / "nothing.py").write_text("")
    return here


@pytest.fixture(autouse=True)
def inside(world, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("city", "copy", "sam.pth", "nothing.py"):
        (tmp_path / name).symlink_to(world / name)
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setitem(SIZES, "wider", {**TINY, "embed_dim": 48})
    image = {"irrg": tuple((path, (2, 0, 1)) for path, _ in VAIHINGEN.image["irrg"])}
    ((_, paths),) = VAIHINGEN.dsm.values()
    kinds = {"a": (1.0, paths), "b": (2.0, paths)}
    monkeypatch.setitem(LAYOUTS, "two kinds", dataclasses.replace(VAIHINGEN, dsm=kinds))
    monkeypatch.setitem(LAYOUTS, "other", dataclasses.replace(VAIHINGEN, image=image))


# -------------------------------------------------------------------------------------- the stages


def first_batches(run):
    batches = iter(train.loader(run))
    return [tensor for _ in range(6) for tensor in flat(next(batches))]


def flat(batch):
    return [*batch[0], batch[1].float()]


def shapes(run):
    return {n: tuple(p.shape) for n, p in run.trainer.model.named_parameters() if p.requires_grad}


def state(run):
    return [t.float().clone() for t in run.trainer.model.state_dict().values()]


def schedule(run):
    return [learning_rate(step, run.s) for step in range(26)]


def scores(run):
    """Of the untrained network with another head, so that its map has several classes."""
    model, head = run.trainer.model.eval(), run.trainer.model.decoder.segmentation_head[2].weight
    before = head.detach().clone()
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
        confusion = score_split(model, run.dataset, "test", run.s)["confusion"]
        head.copy_(before)
    assert sum(any(row[k] for row in confusion) for k in range(6)) > 1
    return confusion


def curve(run):
    batches = iter(train.loader(run))
    run.trainer.model.train()
    return [run.trainer.step(*next(batches)) for _ in range(4)]


def files(run, monkeypatch):
    """What is saved and scored when, in a run whose steps compute nothing."""
    events, progress = [], run.trainer.progress
    progress.step = 0

    def step(rasters, labels):
        progress.step, progress.scored = progress.step + 1, 1.0
        return 0.0

    def score(model, dataset, split, s, stride, *_):
        events.append(("score", progress.step, split, stride))
        return {"miou": 0.5}

    saved = SimpleNamespace(append_log=lambda entry: None, amend_log=lambda **values: None)
    monkeypatch.setattr(run.trainer, "step", step)
    monkeypatch.setattr(run, "folder", saved)
    monkeypatch.setattr(run, "save_last", lambda: events.append(("last.pt", progress.step)))
    monkeypatch.setattr(run, "save_model", lambda *a, **o: events.append(("model.pt", *a)))
    monkeypatch.setattr(train, "score_split", score)
    monkeypatch.setattr(train, "loader", lambda run: iter([(None, None)] * 26))
    train.train(run, [])
    return events


STAGES = {
    "inputs": first_batches, "trained": shapes, "weights": state, "schedule": schedule,
    "scores": scores, "curve": curve, "files": files,
}  # fmt: skip


class Looked:
    """A run by some settings, looked at stage by stage, each once."""

    def __init__(self, changes):
        s = Settings(**{**BASE, **changes})
        s.complete()
        self.run = Run(s, open_from_settings(s), Team(), torch.device("cpu"))
        self.seen = {}

    def __getitem__(self, stage):
        if stage not in self.seen:
            more = ()
            if stage == "files":
                patch = pytest.MonkeyPatch()
                more = (patch,)
            self.seen[stage] = STAGES[stage](self.run, *more)
            if more:
                patch.undo()
        return self.seen[stage]


def differ(one, other):
    """Whether two looks at a stage differ by more than rounding."""
    if isinstance(one, dict) or (one and isinstance(one[0], tuple)):
        return one != other
    if len(one) != len(other):
        return True
    pairs = [(torch.as_tensor(a).double(), torch.as_tensor(b).double()) for a, b in zip(one, other)]
    return any(a.shape != b.shape or not torch.allclose(a, b, 1e-4, 1e-6) for a, b in pairs)


BASES = {}


def base_of(changes):
    """The run that a changed one is compared with; what it shows is kept from test to test."""
    key = repr(changes)
    if key not in BASES:
        BASES[key] = Looked({**changes, "out": f"base-{len(BASES)}"})
        for stage in STAGES:
            BASES[key][stage]
    return BASES[key]


def test_every_setting_has_an_entry():
    assert TABLE.keys() == {f.name for f in dataclasses.fields(Settings)}


@pytest.mark.parametrize("name", TABLE)
def test_a_setting_shows_where_it_says_and_not_before(name):
    changes, expected = TABLE[name]
    if name == "plugin":
        changes = dict(plugin=load_plugins(["nothing.py"]))
    if expected == "refused":
        with pytest.raises(Mistake, match="--" + name):
            Looked(changes)
        return
    base = base_of(OTHER_BASE.get(name, {}))
    looked = Looked(changes)
    shown = next((stage for stage in STAGES if differ(base[stage], looked[stage])), NEUTRAL)
    assert shown == expected
