"""How the scripts talk, and what they say of machine, processes and code."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import console, device
from engine.console import Mistake, Parser, Ticker, clock, run_script, say_mistake
from engine.distributed import Team, join_team
from engine.training import TrainingStopped

# ---------------------------------------------------------------------------------------- mistakes


class Foreign(ValueError):
    pass


SHORT = "stopped: out of memory; close other programs, or ask for less at a time"


@pytest.mark.parametrize(
    "error, status, line",
    [
        (Mistake("--lr 0"), 2, "error: --lr 0"),
        (Foreign("a.tif"), 2, "error: a.tif"),
        (TrainingStopped("full"), 1, "stopped: full"),
        (TrainingStopped("SIGTERM", 143), 143, "stopped: SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, SHORT),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, SHORT),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, SHORT),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_mistake_is_one_line_and_an_exit_status(error, status, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main, Foreign)
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.strip()) == (status, "", line)


def test_a_fault_of_ours_is_no_mistake_of_the_user_s():
    def main():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_script(main, Foreign)


@pytest.mark.parametrize(
    "words, part",
    [
        ("--tuner adaptr", "did you mean adapter?"),
        ("--tuner xyz", "xyz: give adapter, lora"),
        ("--batch_size=2", "did you mean --batch-size?"),
        ("swep", "did you mean sweep?"),
    ],
)
def test_a_near_miss_of_a_flag_or_a_name_is_one_line_with_what_was_meant(words, part, capsys):
    parser = Parser(prog="x.py")
    parser.add_argument("--tuner", choices=("adapter", "lora"))
    parser.add_argument("--batch-size", type=int)
    parser.add_subparsers(dest="name").add_parser("sweep")
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and part in err and len(err.splitlines()) == 1


def test_a_bug_is_no_mistake():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0, Foreign)


def test_a_mistake_of_all_processes_is_printed_by_the_main_one_first(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(console.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "0")
    say_mistake("error: no")
    assert not waited
    monkeypatch.setenv("RANK", "3")
    say_mistake("error: no")
    assert waited and capsys.readouterr().err == "error: no\nprocess 3: error: no\n"


def test_output_that_nobody_reads_is_no_traceback():
    code = "from engine.console import run_script; run_script(lambda: print('x' * 10 ** 6))"
    command = f'{sys.executable} -c "{code}" | head -c 1'
    home = Path(console.__file__).parent.parent
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=home)
    assert done.stdout == "x" and not done.stderr


# --------------------------------------------------------------------------------------- processes


@pytest.fixture
def torchrun(monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = dict(zip(names, ("1", "1", "2", "2", "127.0.0.1", "1")))
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_one_process_is_a_team_of_its_own(torchrun):
    torchrun.setenv("WORLD_SIZE", "1")
    assert join_team("auto") == (Team(0, 1), "auto") and Team().is_main


def test_a_stray_world_size_is_one_line(torchrun):
    torchrun.delenv("MASTER_ADDR")
    torchrun.delenv("RANK")
    with pytest.raises(Mistake, match="WORLD_SIZE=2 is set and RANK, MASTER_ADDR is not.*torchrun"):
        join_team("cpu")


@pytest.mark.parametrize("gpus", [0, 1])
def test_more_processes_than_gpus_is_one_line_on_each(torchrun, gpus):
    torchrun.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(Mistake, match=f"2 processes need 2 GPUs, and there are {gpus}"):
        join_team("cuda")


def test_processes_on_gpus_can_sum_what_lies_on_the_cpu(torchrun):
    begun = []
    torchrun.setattr(torch.cuda, "device_count", lambda: 2)
    torchrun.setattr(torch.cuda, "set_device", lambda device: None)
    torchrun.setattr(torch.distributed, "init_process_group", begun.append)
    torchrun.setattr(torch.distributed, "get_rank", lambda: 1)
    assert join_team("cuda")[0] == Team(1, 2)
    assert begun == ["cpu:gloo,cuda:nccl"]  # nccl alone refuses a tensor of the CPU


def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(Mistake, match="--device gpu7 cannot be used here"):
        device.pick_device("gpu7")


# --------------------------------------------------------------------------------------- the code


def git(folder, *words):
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", folder, *name, *words], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository in which the engine seems to lie."""
    home = tmp_path / "project"
    (home / "engine").mkdir(parents=True)
    (home / "engine" / "device.py").write_text("")
    (home / "README.md").write_text("")
    git(home, "init", "-q")
    git(home, "add", "-A")
    git(home, "commit", "-qm", "first")
    monkeypatch.setattr(device, "__file__", str(home / "engine" / "device.py"))
    return home


def test_the_commit_is_dirty_by_its_code_and_not_by_its_documents(project):
    commit = device.commit()
    assert len(commit) >= 7 and "dirty" not in commit and commit in device.version()
    (project / "README.md").write_text("edited")
    (project / "notes.py").write_text("untracked")
    assert device.commit() == commit
    (project / "engine" / "device.py").write_text("edited = 1")
    assert device.commit() == commit + "-dirty"


def test_a_copy_inside_another_repository_has_no_commit_of_that(project, monkeypatch):
    inside = project / "copies" / "mfnet" / "engine"
    inside.mkdir(parents=True)
    monkeypatch.setattr(device, "__file__", str(inside / "device.py"))
    assert device.commit() == "unknown"


def test_without_git_there_is_no_commit(project, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert device.commit() == "unknown"


# ---------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (62, "1:02"), (3599.6, "1:00:00"), (3723, "1:02:03")]
)
def test_a_clock_shows_hours_only_where_there_are_any(seconds, text):
    assert clock(seconds) == text


def test_progress_in_a_file_is_a_line_now_and_then_and_always_the_last(monkeypatch):
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    ticker = Ticker("step", out, every=10)
    for done in range(1, 31):
        now[0] += 1
        ticker(done, 30, ", loss 1")
    lines = out.getvalue().splitlines()
    assert lines == [
        "step 10/30, loss 1, 0:20 left",
        "step 20/30, loss 1, 0:10 left",
        "step 30/30, loss 1",
    ]


def test_progress_on_a_terminal_is_one_line_that_is_written_over(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    ticker = Ticker("bytes", out)
    ticker.last -= 1
    ticker(5, 0)
    ticker(7, 7)
    assert out.getvalue() == "\rbytes 5/?\r" + "bytes 7/7".ljust(len("bytes 5/?")) + "\n"


def test_a_progress_line_that_did_not_come_to_its_end_is_ended_once(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    ticker = Ticker("rows", out)
    ticker.last -= 1
    ticker(5, 9)
    ticker.close()
    ticker.close()
    assert out.getvalue() == "\rrows 5/9\n"
