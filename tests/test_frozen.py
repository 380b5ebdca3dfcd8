"""Frozen numerics: the losses of 20 steps for each tuner, precision and layout, as committed.

    PYTHONPATH=. python tests/test_frozen.py  writes tests/frozen/*.json anew, for a meant change

A change of the arithmetic, the samples or the recipe shows here before anybody trains for a day.
The committed numbers hold within the rounding of another processor or library: RTOL of a loss. For
two commits bit by bit on one machine see compare_commits.py.
"""

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, write_city

import train
from data import open_from_settings
from engine.device import autocast
from engine.distributed import Team
from engine.run import Run
from engine.settings import Settings
from sam_vit import SIZES
from tuners import TUNERS

FOLDER = Path(__file__).parent / "frozen"
RTOL = {"fp32": 3e-4, "bf16": 3e-2}
STEPS = 20

# Rates at which training does not multiply rounding: inputs that differ by 1e-6 change no loss by
# more than a tenth of RTOL.
PAPER = [name for name, tuner in TUNERS.items() if tuner.__module__ == "tuners"]
CASES = {tuner: dict(data="vaihingen", tuner=tuner, precision="fp32") for tuner in PAPER}
CASES["full"]["lr"] = 1e-5
CASES |= {
    "adapter-bf16": dict(data="vaihingen", tuner="adapter", precision="bf16"),
    "lora-bf16": dict(data="vaihingen", tuner="lora", precision="bf16"),
    "potsdam": dict(data="potsdam", tuner="lora", precision="fp32", image_scaling="sam"),
    "hunan": dict(data="hunan", tuner="lora", precision="fp32", image_scaling="reflectance"),
}


def curve(case: dict, root: Path) -> dict:
    """The losses of the steps, how far they moved the weights, and with what they learned the loss
    of a batch in evaluation mode.
    """
    s = Settings(
        **{"lr": 1e-4, **case}, root=str(root), encoder="tiny", weights="none", crop=64,
        batch_size=2, epochs=2, steps=STEPS // 2, warmup=3, device="cpu", out="run",
    )  # fmt: skip
    s.complete()
    run = Run(s, open_from_settings(s), Team(), torch.device("cpu"))
    run.trainer.model.train()
    batches = list(train.loader(run))
    before = [p.detach().clone() for p in run.trainer.trained()]
    losses = [run.trainer.step(*batch) for batch in batches]
    ways = [(p - old).norm() for p, old in zip(run.trainer.trained(), before)]
    run.folder.release()
    rasters, labels = batches[0]
    with torch.no_grad(), autocast(s.precision, run.device):
        logits = run.trainer.model.eval()(*rasters).float()
    evaluated = F.cross_entropy(logits, labels, ignore_index=255).item()
    moved = torch.stack(ways).norm().item()
    return {"losses": losses, "moved": moved, "evaluated": evaluated}


@contextlib.contextmanager
def tiny_world(folder: Path):
    """The encoder by its name, and an empty folder to work in."""
    before = os.getcwd()
    SIZES["tiny"] = TINY
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        del SIZES["tiny"]


def write_cities(folder: Path) -> dict[str, Path]:
    for layout in ("vaihingen", "potsdam", "hunan"):
        write_city(folder / layout, size=64, layout=layout)
    return {layout: folder / layout for layout in ("vaihingen", "potsdam", "hunan")}


@pytest.fixture(scope="module")
def cities(tmp_path_factory):
    return write_cities(tmp_path_factory.mktemp("cities"))


@pytest.mark.parametrize("name", CASES)
def test_the_losses_of_20_steps_are_those_that_were_committed(name, cities, tmp_path):
    case, frozen = CASES[name], json.loads((FOLDER / f"{name}.json").read_text())
    with tiny_world(tmp_path):
        found = curve(case, cities[case["data"]])
    rtol = RTOL[case["precision"]]
    assert found["losses"] == pytest.approx(frozen["losses"], rel=rtol)
    assert found["moved"] == pytest.approx(frozen["moved"], rel=3 * rtol)
    assert found["evaluated"] == pytest.approx(frozen["evaluated"], rel=3 * rtol)


def test_there_is_a_frozen_curve_for_each_case_and_no_other():
    assert {path.stem for path in FOLDER.glob("*.json")} == CASES.keys()


def main() -> None:
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        cities = write_cities(Path(folder))
        for name, case in CASES.items():
            with tempfile.TemporaryDirectory() as work, tiny_world(Path(work)):
                with contextlib.redirect_stdout(io.StringIO()):
                    found = curve(case, cities[case["data"]])
            (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}: {found['losses'][0]:.4f} to {found['losses'][-1]:.4f}")


if __name__ == "__main__":
    main()
