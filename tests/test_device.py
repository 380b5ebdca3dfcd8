"""What a GPU would notice, on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration as registration

TESTS = Path(__file__).resolve().parent


@pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
def test_no_layer_of_any_network_leaves_the_device_that_it_computes_on():
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, TESTS / "on_no_device.py"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "tuners" in done.stdout, done.stderr[-2000:]
