"""What several test files share: a small encoder, random weights, hypothesis without a clock."""

import os
import subprocess
import sys
import tempfile

import pytest
import torch
from hypothesis import settings

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


def small_encoder(seed=0, **overrides):
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return randomise(build_image_encoder(TINY, **overrides), seed)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_state(module, state):
    now = module.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[n], state[n]) for n in state)


# ---------------------------------------------------------------- the whole suite on two processors

HALF = "MFNET_HALF_OF_THE_SUITE"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session, config, items):
    """A whole suite is shared with a second process, which runs every other file."""
    files = sorted({item.path for item in items})
    if len(files) < 20 or (os.cpu_count() or 1) < 2:
        return
    half = os.environ.get(HALF)
    if half is None:
        config.other_output = tempfile.TemporaryFile("w+", encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        config.other_half = subprocess.Popen(
            [*command, *config.invocation_params.args],
            env={**os.environ, HALF: "1"},
            stdout=config.other_output,
            stderr=subprocess.STDOUT,
        )
    items[:] = [item for item in items if files.index(item.path) % 2 == int(half or 0)]


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
