"""Two commits bit by bit: the same small runs by both, on this machine, in one command.

    python tests/compare_commits.py                 HEAD against the files as they lie here
    python tests/compare_commits.py COMMIT          a commit against the files as they lie here
    python tests/compare_commits.py COMMIT COMMIT

Each run is a command line that both commits understand: trains 20 steps on a made-up city, scores,
and keeps its weights. Prints a line for each run; the exit status is 1 if any differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SHORT = "--data vaihingen --encoder vit_t --weights none --epochs 4 --steps 5 --batch-size 2"
SHORT += " --crop 64 --eval-stride 64 --lr 0.001 --device cpu"
RUNS = {
    "adapter": "--tuner adapter",
    "lora": "--tuner lora",
    "frozen": "--tuner frozen",
    "full": "--tuner full",
    "bf16": "--tuner adapter --precision bf16",
    "image": "--modalities image",
    "sum": "--fusion sum",
    "adamw": "--optimizer adamw --weight-decay 0.01 --schedule cosine --warmup 5",
    "loss": "--label-smoothing 0.1 --class-weights 1,2,1,1,1,0 --clip 1",
}
CITY = "from pathlib import Path; import sys; sys.path.insert(0, '.'); "
CITY += "{module}.write_city(Path(sys.argv[1]), size=96)"


def call(folder: Path, *words: str) -> str:
    """A command in a tree -> "" or the last line of what went wrong."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    return "" if done.returncode == 0 else (done.stderr.strip() or "?").splitlines()[-1]


def result(run: Path) -> dict:
    """What must be equal: losses, confusion, and every tensor."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    scores = json.loads((run / "scores.json").read_text())
    state = torch.load(run / "model.pt", weights_only=True)["state"]
    return {"losses": [e["loss"] for e in log], "confusion": scores["confusion"], "state": state}


def difference(a: dict, b: dict) -> str:
    """How two results differ, "" for not at all."""
    parts = []
    if a["losses"] != b["losses"]:
        step = next(
            (i for i, pair in enumerate(zip(a["losses"], b["losses"])) if len({*pair}) > 1), 0
        )
        largest = max((abs(x - y) for x, y in zip(a["losses"], b["losses"])), default=0)
        parts.append(f"losses from epoch {step + 1} on, by up to {largest:.1e}")
    if a["confusion"] != b["confusion"]:
        parts.append("scores")
    names = a["state"].keys() & b["state"].keys()
    other = [n for n in names if not torch.equal(a["state"][n], b["state"][n])]
    if a["state"].keys() != b["state"].keys():
        parts.append(f"{len(a['state'].keys() ^ b['state'].keys())} tensors of one alone")
    return ", ".join([*parts, *([f"{len(other)} of {len(names)} tensors"] if other else [])])


def main() -> None:
    commits = [*sys.argv[1:], "HEAD"][:2] if len(sys.argv) < 3 else sys.argv[1:3]
    with tempfile.TemporaryDirectory() as folder:
        here, trees = Path(folder), []
        names = commits if len(sys.argv) > 2 else commits[:1]
        for i, commit in enumerate(names):
            tree = here / f"tree-{i}"
            command = ["git", "-C", ROOT, "worktree", "add", "--detach", "-f", tree, commit]
            subprocess.run(command, check=True, capture_output=True)
            trees.append((commit, tree))
        if len(trees) == 1:
            trees.append(("here", ROOT))
        try:
            sys.exit(compare(here, trees))
        finally:
            for _, tree in trees:
                if tree != ROOT:
                    remove = ["git", "-C", ROOT, "worktree", "remove", "--force", tree]
                    subprocess.run(remove, check=True, capture_output=True)


def compare(here: Path, trees: list[tuple[str, Path]]) -> int:
    """Runs everything by both trees; returns how many runs differ, at most 1."""
    rooms = (trees[1][1] / "geodata").is_dir()
    module = "geodata.synthetic" if rooms else "synthetic"
    code = f"import {module}; " + CITY.format(module=module)
    if error := call(trees[1][1], "-c", code, str(here / "city")):
        sys.exit(f"the city cannot be made: {error}")
    bad = 0
    for name, flags in RUNS.items():
        results, errors = [], []
        for i, (commit, tree) in enumerate(trees):
            out = here / f"{name}-{i}"
            words = [*SHORT.split(), *flags.split(), "--root", here / "city", "--out", out]
            error = call(tree, "train.py", *map(str, words))
            errors += [f"{commit}: {error}"] if error else []
            results += [] if error else [result(out)]
        text = "; ".join(errors) or difference(*results)
        bad = bad or int(bool(text))
        print(f"{name}: {text or 'equal bit by bit'}", flush=True)
    return bad


if __name__ == "__main__":
    main()
