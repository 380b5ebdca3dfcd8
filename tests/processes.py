"""Python processes that begin at once: forked from a server that has imported what takes long.

Each is a process of its own, with its streams and its exit status, and has seen nothing of the
tests. How a script begins and ends as a command is tried through the shell.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
HOW = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
QUICK = multiprocessing.get_context(HOW)
if HOW == "forkserver":
    QUICK.set_forkserver_preload(["train", "evaluate", "predict", "torch._dynamo"])


class Script:
    """`python SCRIPT WORDS...` that goes on while the test does; to be used as a Popen."""

    def __init__(self, script, *words, cwd=".", **environment):
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name) / name for name in ("out", "err")]
        environment = {**os.environ, "PYTHONPATH": str(HOME), **environment}
        task = [str(script), *map(str, words)], str(Path(cwd).resolve()), environment, self.outputs
        self.process = QUICK.Process(target=run_script_here, args=task)
        self.process.start()

    @property
    def returncode(self):
        """None as long as it runs; -n where signal n ended it."""
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def communicate(self, timeout=240):
        """Waits for its end -> (stdout, stderr)."""
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"not at its end after {timeout} s")
        return [path.read_text(encoding="utf-8") for path in self.outputs]


def run_script_here(words, cwd, environment, outputs):
    """In the new process."""
    import torch

    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def two_processes(script, *words):
    """A script on two processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    return [
        Script(script, *words, RANK=rank, LOCAL_RANK=rank, MASTER_PORT=str(port), **place)
        for rank in "01"
    ]
