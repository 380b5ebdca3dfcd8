"""What several test files share: a small encoder, random weights, hypothesis without a clock."""

import copy
import os

# Before numpy is imported: beside other processes its threads wait for each other, and busily.
os.environ["OMP_NUM_THREADS"] = "1"

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from geodata import synthetic
from sam_vit import build_image_encoder

torch.set_num_threads(1)
settings.register_profile("house", deadline=None, max_examples=20)
settings.load_profile("house")

# A windowed and a global block; a grid of 4 is no multiple of the window of 3.
TINY = dict(
    embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=3, img_size=64
)


def randomise(module, seed=0):
    """Moves every parameter away from its start, so that no table, bias or LoRA is left at zero. In
    place.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            spread = p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
            p += spread * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


ENCODERS = {}


def small_encoder(seed=0, **overrides):
    """The same weights for the same seed; what is drawn afterwards depends on the seed, too."""
    key = seed, *sorted(overrides.items())
    if key not in ENCODERS:
        torch.manual_seed(seed)
        encoder = randomise(build_image_encoder(TINY, **overrides), seed)
        ENCODERS[key] = encoder, torch.get_rng_state()
    encoder, drawn = ENCODERS[key]
    torch.set_rng_state(drawn)
    return copy.deepcopy(encoder)


CITIES = tempfile.TemporaryDirectory()


def write_city(root, **how):
    """`synthetic.write_city`, of which each city is drawn once and then copied."""
    drawn = Path(CITIES.name) / re.sub(r"\W+", "-", repr(sorted(how.items())))
    if not drawn.exists():
        part = drawn.with_suffix(".part")
        synthetic.write_city(part, **how)
        part.rename(drawn)
    shutil.copytree(drawn, root, dirs_exist_ok=True)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_state(module, state):
    now = module.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[n], state[n]) for n in state)


# ---------------------------------------------------------------- the whole suite on two processors

CLAIMS = "MFNET_CLAIMS_OF_THE_SUITE"
# The files that take longest come first, so that both processes end at about the same time.
LONGEST = "training scripts harness switches checkpoints frozen synthetic zoo explain mfnet".split()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session, config, items):
    """A whole suite is shared with a second process. Who comes to a file first claims it in a
    folder.
    """
    files = sorted({item.path for item in items})
    if len(files) < 20 or (os.cpu_count() or 1) < 2:
        return
    config.claimed, folder = {}, os.environ.get(CLAIMS)
    if folder is None:
        config.claims = tempfile.TemporaryDirectory()
        folder = config.claims.name
        config.other_output = tempfile.TemporaryFile("w+", encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        config.other_half = subprocess.Popen(
            [*command, *config.invocation_params.args],
            env={**os.environ, CLAIMS: folder},
            stdout=config.other_output,
            stderr=subprocess.STDOUT,
        )
    first = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (first.get(item.path.name, len(first)), files.index(item.path)))
    config.claim_folder = Path(folder)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """Passes over the tests of a file that the other process has claimed."""
    config, name = item.config, item.path.name
    if not hasattr(config, "claim_folder"):
        return None
    if name not in config.claimed:
        try:
            (config.claim_folder / name).touch(exist_ok=False)
            config.claimed[name] = True
        except FileExistsError:
            config.claimed[name] = False
    return None if config.claimed[name] else True


def pytest_sessionfinish(session):
    """A failure in the second process is one of the suite."""
    other = getattr(session.config, "other_half", None)
    if other is not None and other.wait() != 0 and session.exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "other_output"):
        config.other_output.seek(0)
        terminalreporter.section("the second process")
        terminalreporter.write(config.other_output.read())
