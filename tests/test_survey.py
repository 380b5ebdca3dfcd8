"""`benchmark.py device`: the report of a device, its deadline, and runs that are killed."""

import json
import time

import pytest
import torch
from test_speed import case

from engine import plan, speed, survey
from engine.console import Mistake, Parser
from engine.device import compute_deterministically, pick_device
from engine.settings import Settings
from engine.survey import Survey, take
from fast import accelerate

# Stands for train.py: writes a run's files, and with `wait` only after a long time.
FAKE_TRAIN = """
import json, pathlib, shutil, sys, time
words = sys.argv[1:]
run = pathlib.Path(words[words.index("--out") + 1])
run.mkdir(exist_ok=True)
if "fail" in words:
    sys.exit("error: it cannot be")
if "quick" not in words:
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps(words) + "\\n")
if "wait" in words and "--resume" not in words and run.name != "whole":
    time.sleep(100)
model = "other.pt" if "other" in words or run.name == "killed" and OTHER else "model.pt"
shutil.copy(pathlib.Path(model), run / "model.pt")
(run / "scores.json").write_text(json.dumps({"miou": 0.25}))
"""


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """asked(words, other=False) -> a Survey of the CPU with a stand-in for train.py, which with
    `other` trains the killed run to another end."""

    def make(words, other=False):
        (tmp_path / "train.py").write_text(f"OTHER = {other}\n{FAKE_TRAIN}")
        for name, value in (("model.pt", 1.0), ("other.pt", 1 + 2**-23)):
            torch.save({"state": {"a": torch.ones(2), "b": torch.tensor(value)}}, tmp_path / name)
        monkeypatch.setattr(survey, "TRAIN", tmp_path / "train.py")
        monkeypatch.setattr(survey, "open_city", lambda root: None)
        parser = Parser()
        survey.add_flags(parser)
        args = parser.parse_args(["--device", "cpu", "--out", f"{tmp_path}/D.csv", *words.split()])
        limit = time.monotonic() + 60 * args.minutes
        return Survey(args, torch.device("cpu"), limit, tmp_path)

    return make


def test_a_run_that_was_killed_is_compared_with_one_that_was_not_to_the_bit(asked, tmp_path):
    same = asked("--train wait").killed_and_resumed()
    assert same == "0 of 2 tensors differ; the same scores"
    log = (tmp_path / "killed" / "log.jsonl").read_text().splitlines()
    assert "--resume" in json.loads(log[1]) and "--deterministic" in json.loads(log[0])


def test_a_last_bit_that_differs_is_counted(asked):
    assert asked("--train wait", other=True).killed_and_resumed().startswith("1 of 2 tensors")


def test_a_run_that_ended_before_it_was_killed_shows_nothing_and_says_so(asked):
    with pytest.raises(RuntimeError, match="ended before it could be killed"):
        asked("--train quick").from_cpu_to_device()


def test_every_part_is_written_down_as_it_is_done_and_failures_stay_in(asked, tmp_path):
    s = asked("--parts resume runs --seeds 0 1 --train fail")
    take(s)
    text = (tmp_path / "D.md").read_text()
    assert text.count("error: it cannot be") == 2 + 4 and text.count("\n## ") == 3
    take(asked("--parts runs --seeds 0 1"))
    text = (tmp_path / "D.md").read_text()
    assert "fp32-0: mIoU 25.00\nfp32-1: mIoU 25.00\nbf16-0: mIoU 25.00" in text


def test_what_no_time_is_left_for_is_said_and_a_run_is_ended_in_time(asked, tmp_path):
    s, start = (
        asked("--parts runs plan --encoders vit_t --minutes 0.02 --train wait"),
        time.monotonic(),
    )
    take(s)
    assert time.monotonic() - start < 20
    assert (tmp_path / "D.md").read_text().count("not measured: no time was left") == 6 + 2


@pytest.mark.parametrize("words", ["--crop 32 --more-crops", "--more-crops 32", "--batch 0"])
def test_sizes_that_cannot_work_are_refused_before_anything_is_measured(asked, words):
    with pytest.raises(Mistake, match="begin at 1"):
        survey.survey_device(asked(words).args)


def test_speed_is_asked_of_every_encoder_tuner_and_crop(asked, monkeypatch):
    s = asked("--parts speed tile --encoders vit_l vit_b vit_h --crop 256 --batch 10")
    measured = []
    monkeypatch.setattr(Survey, "measure", lambda self, c, *more, **how: measured.append(c) or "")
    take(s)
    steps = {(c.encoder, c.tuner, c.crop, c.batch) for c in measured if c.task == "step"}
    sizes = {(e, "adapter", 256, 10) for e in ("vit_l", "vit_b", "vit_h")}
    crops = {("vit_l", "adapter", crop, 10) for crop in (224, 448)}
    assert steps == sizes | crops | {("vit_l", "lora", 256, 10)}
    assert {c.task for c in measured} == {"step", "network", "encoder", "tile"}


def test_rows_are_kept_with_images_a_second(asked, tmp_path, monkeypatch):
    s = asked("--parts speed --encoders vit_t --crop 64 --more-crops --batch 2 --repeats 1")
    monkeypatch.setattr(Survey, "parts", lambda self: iter([("", lambda: self.measure(case()))]))
    take(s)
    rows = (tmp_path / "D.csv").read_text().splitlines()
    head, plain = (line.split(",") for line in rows[:2])
    found = dict(zip(head, plain))
    assert len(rows) == 5 and "| plain | bf16 |" in (tmp_path / "D.md").read_text()
    assert float(found["per_second"]) == pytest.approx(1 / float(found["seconds"]), rel=1e-4)


def test_a_compiled_network_is_not_counted_while_it_is_compiled(monkeypatch):
    """Under a counter nothing is compiled, then or later: the eager network would be timed."""
    counting = []

    def prepare(case, model):
        def work():
            mode = torch.utils._python_dispatch._get_current_dispatch_mode()
            counting.append((case.order, mode is not None))
            return torch.ones(1)

        return work

    monkeypatch.setattr(speed, "prepare", prepare)
    cases = [case(order=order) for order in ("plain", "fast", "compiled")]
    monkeypatch.setattr(speed, "networks", lambda cases, device: dict.fromkeys(cases, network()))
    results = speed.measure(cases, 2, torch.device("cpu"))
    warm = [("plain", True), ("fast", True), ("compiled", False)]
    assert counting == warm + [(order, False) for order, _ in warm] * 2
    assert (
        results[cases[2]].gflop == results[cases[1]].gflop and results[cases[2]].of_ceiling is None
    )


def network():
    return accelerate(speed.random_network(case(), torch.device("cpu")))


def test_a_whole_tile_is_told_in_windows_a_second():
    published, ours = (
        speed.count_of(case(task="tile", crop=256, order=o)) for o in speed.ORDERS[:2]
    )
    assert (published, ours) == (32 * 32, 25 * 25)


def test_fp32_is_fp32_on_every_device():
    torch.backends.cudnn.allow_tf32 = True
    pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_on_a_gpu_deterministic_leaves_the_fused_attention_out(monkeypatch):
    """Its backward passes would warn, and go on as they are."""
    asked, kinds = [], ("flash_sdp", "mem_efficient_sdp", "cudnn_sdp")
    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda on, warn_only: asked.append(on)
    )
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "as it was")
    try:
        compute_deterministically(torch.device("cpu"))
        assert torch.backends.cuda.flash_sdp_enabled()
        compute_deterministically(torch.device("cuda"))
        assert not any(getattr(torch.backends.cuda, f"{kind}_enabled")() for kind in kinds)
        assert torch.backends.cuda.math_sdp_enabled() and asked == [True, True]
    finally:
        for kind in kinds:
            getattr(torch.backends.cuda, f"enable_{kind}")(True)


def test_on_a_gpu_a_plan_tries_a_whole_batch_where_it_fits(monkeypatch):
    tried = []

    def peak(case, device, *more, s):
        tried.append(case.batch)
        if case.batch > fits:
            raise RuntimeError("out of memory")
        return (100.0 + 10 * case.batch, 1.0 + case.batch / 4) + (case.batch / 8,) * len(more)

    monkeypatch.setattr(plan, "peak_of", peak)
    s = Settings(batch_size=10)
    for fits, expected in ((10, [1, 10]), (4, [1, 10, 1, 2])):
        tried.clear()
        needs = plan.measure_needs(s, torch.device("cuda"))
        assert tried == expected and needs.memory(10) == 200
        assert (needs.step, needs.window) == pytest.approx((3.5, 1 / 8))
