"""How fast, and how close to what the machine can do: the accelerated network against the plain.

Both networks run in one process, in turns, on the same weights, and their outputs are compared, so
every figure is a ratio within one run. Whole tiles are compared with the published loop, which
repeats the windows at the border. The ceiling is the time of the encoder's matrix products alone,
measured in this process at their shapes. Rows are kept in a CSV, and shown in a Markdown file
beside it; what failed stays in, with the reason.
"""

from __future__ import annotations

import argparse
import copy
import csv
import multiprocessing
import statistics
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.console import Mistake, Parser, say_next
from engine.cost import Product, ceiling, encoder_products, machine, operations, timed
from engine.device import (
    autocast,
    peak_memory,
    pick_device,
    set_tf32,
    store_frozen_weights,
    use_large_pages,
    version,
)
from engine.files import replace_atomically, write_text
from engine.inference import predict_tile
from engine.networks import build_network
from engine.settings import Settings
from engine.training import segmentation_loss
from fast import accelerate
from geodata.crops import sliding_windows
from mfnet import MFNet, build_mfnet
from sam_vit import SIZES
from tuners import TUNERS

TASKS = ("encoder", "network", "step", "tile")
PRECISIONS = ("fp32", "tf32", "bf16")  # tf32: GPUs alone
ORDERS = ("plain", "fast", "checkpointed", "compiled")  # the last two are fast too
CLASSES, TILE, STRIDE = 6, 1000, 32


@dataclass(frozen=True)
class Case:
    """One thing to measure; of a tile, `batch` is the number of windows at a time."""

    task: str
    encoder: str
    tuner: str
    crop: int
    batch: int
    precision: str
    order: str  # one of ORDERS


@dataclass
class Result:
    """What was measured of a case: medians over the repeats."""

    seconds: float | None = None
    per_second: float | None = None  # images; of a tile, windows
    fastest: float | None = None
    slowest: float | None = None
    times_plain_fp32: float | None = None  # how many times as fast as the plain network in fp32
    times_plain: float | None = None  # and in the same precision
    gflop: float | None = None  # products and convolutions, counted as they ran
    of_ceiling: float | None = None
    peak_mb: float | None = None  # of its process, weights and all; on a GPU what it takes there
    error: float | None = None  # see `difference`; against the plain network in fp32
    repeats: int = 0
    machine: str = ""
    version: str = ""
    note: str = ""


# -------------------------------------------------------------------------------- what is measured


def random_network(case: Case, device: torch.device, s: Settings | None = None) -> MFNet:
    """The network of a case, or of a run's settings, with random weights, also where training
    starts from zeros: every term counts."""
    torch.manual_seed(0)
    if s is None:
        model = build_mfnet(case.encoder, case.tuner, CLASSES)
    else:
        model = build_network(s, CLASSES)
    for p in model.parameters():
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model.to(device)


def networks(
    cases: list[Case], device: torch.device, s: Settings | None = None
) -> dict[Case, MFNet]:
    """The network of each case: the same weights for all; a fast one in bf16 stores its frozen
    weights so, as a run does."""
    plain, found = random_network(cases[0], device, s), {}
    for case in cases:
        # Where one process measures one case, nothing is copied: it is to hold what a run holds.
        model = copy.deepcopy(plain) if len(cases) > 1 else plain
        if case.order != "plain":
            accelerate(model, checkpointing=case.order == "checkpointed")
            store_frozen_weights(model, case.precision.replace("tf32", "fp32"), device)
        if case.order == "compiled":
            for block in model.image_encoder.blocks:
                block.compile()
        found[case] = model
    return found


def prepare(case: Case, model: MFNet) -> Callable[[], Tensor]:
    """A function that does the case's work once and returns what can be compared."""
    device = next(model.parameters()).device
    precision = "bf16" if case.precision == "bf16" else "fp32"
    torch.manual_seed(1)
    image = torch.rand(case.batch, 3, case.crop, case.crop, device=device)
    dsm = torch.rand(case.batch, case.crop, case.crop, device=device)
    labels = torch.randint(CLASSES, dsm.shape, device=device)
    more = [torch.rand(case.batch, C, case.crop, case.crop, device=device) for C in model.bands[2:]]
    rasters = (image, dsm, *more)[: model.modalities]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0, 0.9)
    model.train(case.task == "step")

    def tile() -> Tensor:
        rng = np.random.default_rng(1)
        image = rng.integers(0, 256, (TILE, TILE, 3), dtype=np.uint8)
        whole = image, rng.random((TILE, TILE), dtype=np.float32)
        sizes = case.crop, STRIDE, case.batch, (0.0, 1.0)
        if case.order == "plain":
            return torch.from_numpy(published_loop(model, *whole, *sizes))
        options = dict(repeat_border=True, precision=precision)
        return torch.from_numpy(predict_tile(model, *whole, *sizes, **options))

    def forward() -> Tensor:
        with torch.no_grad(), autocast(precision, device):
            if case.task == "encoder":
                return torch.cat(model.encode(*rasters))
            return model(*rasters) if case.task == "network" else tile()

    def step() -> Tensor:
        torch.manual_seed(2)  # the same dropout for all
        optimizer.zero_grad()
        with autocast(precision, device):
            logits = model(*rasters)
        segmentation_loss(logits, labels).backward()
        optimizer.step()  # all of its work, at a rate of 0: each repetition computes the same
        return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])

    return step if case.task == "step" else forward


@torch.inference_mode()
def published_loop(
    model: MFNet,
    image: np.ndarray,
    dsm: np.ndarray,
    window: int,
    stride: int,
    batch_size: int,
    heights: tuple[float, float],
) -> np.ndarray:
    """The class map (H, W) of an image (H, W, 3) uint8 and heights (H, W), both at least a window
    large, as the published code goes about it: a window that would pass the edge is moved inwards,
    and so computed again and again; the logits of the whole tile are summed at full size."""
    (H, W), device = dsm.shape, next(model.parameters()).device
    x = torch.from_numpy(image).permute(2, 0, 1) / 255
    y = (torch.from_numpy(dsm) - heights[0]) / (heights[1] - heights[0])
    tops, lefts = ([min(i, n - window) for i in range(0, n, stride)] for n in (H, W))
    places = [np.s_[..., i : i + window, j : j + window] for i in tops for j in lefts]
    sums = None
    for i in range(0, len(places), batch_size):
        cuts = places[i : i + batch_size]
        inputs = (torch.stack([raster[c] for c in cuts]).to(device) for raster in (x, y))
        out = model(*inputs).float()
        sums = out.new_zeros(out.shape[1], H, W) if sums is None else sums
        for cut, logits in zip(cuts, out):
            sums[cut] += logits
    return sums.argmax(dim=0).byte().cpu().numpy()


# --------------------------------------------------------------------------------------- measuring


def measure(cases: list[Case], repeats: int, device: torch.device) -> dict[Case, Result]:
    """All cases of one task in turns, in one process; the first is the plain network in fp32."""
    models = networks(cases, device)
    works = {case: prepare(case, models[case]) for case in cases}
    where = dict(repeats=repeats, machine=machine(device), version=version())
    results = {case: Result(**where) for case in cases}
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    outputs: dict[Case, Tensor] = {}
    tile, on_gpu = cases[0].task == "tile", device.type == "cuda"
    warm_up = not tile or on_gpu  # on a CPU a tile takes long enough without
    for turn in range(repeats + warm_up):
        for case, result in results.items():
            if result.note:
                continue
            set_tf32(case.precision == "tf32")
            warming = warm_up and turn == 0
            # Under a counter of operations nothing is compiled, then or later.
            counted = warming and not tile and case.order != "compiled"
            counting = FlopCounterMode(display=False) if counted else nullcontext()
            others = allocated_beside(models[case], device) if warming and on_gpu else 0.0
            try:
                with counting as counter:
                    spent = timed(lambda: outputs.update({case: works[case]()}), device)
                if warming and on_gpu:
                    result.peak_mb = peak_memory(device) - others
            except RuntimeError as error:
                result.note = str(error).strip().splitlines()[0]
                continue
            if counted:
                result.gflop = counter.get_total_flops() / 1e9
            elif not warming:
                seconds[case].append(spent)
    for case, result in results.items():
        if case.order == "compiled":
            result.gflop = getattr(results.get(replace(case, order="fast")), "gflop", None)
        if case in outputs and cases[0] in outputs:
            result.error = difference(outputs[case], outputs[cases[0]])
        if seconds[case]:
            result.seconds = statistics.median(seconds[case])
            result.per_second = count_of(case) / result.seconds
            result.fastest, result.slowest = min(seconds[case]), max(seconds[case])
    compare(results)
    if not tile:
        products = encoder_products(models[cases[0]], cases[0].batch, cases[0].crop)
        add_ceiling(results, products, device)
    return results


def add_ceiling(
    results: dict[Case, Result], products: Counter[Product], device: torch.device
) -> None:
    """Writes how much of the ceiling the fast network reaches: its operations at the rate of the
    encoder's products."""
    rates: dict[str, float] = {}
    for case, result in results.items():
        counted = operations(products) if case.task == "encoder" else 1e9 * (result.gflop or 0)
        if result.seconds and counted and case.order != "plain":
            if case.precision not in rates:
                set_tf32(case.precision == "tf32")
                dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
                seconds = ceiling(products, dtype, device, result.repeats)
                rates[case.precision] = operations(products) / seconds
            result.of_ceiling = counted / rates[case.precision] / result.seconds


def allocated_beside(model: MFNet, device: torch.device) -> float:
    """The MB of a GPU that are not those of a network; its peak is counted from now on."""
    torch.cuda.reset_peak_memory_stats(device)
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return (torch.cuda.memory_allocated(device) - own) / 2**20


def count_of(case: Case) -> int:
    """The images of a case; of a tile its windows."""
    if case.task != "tile":
        return case.batch
    if case.order == "plain":
        return (-(-TILE // STRIDE)) ** 2  # the published loop's
    return len(sliding_windows(TILE, TILE, case.crop, STRIDE))


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value; of class maps (H, W), the fraction of
    pixels that differ."""
    if expected.ndim == 2:
        return (found != expected).float().mean().item()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare(results: dict[Case, Result]) -> None:
    """Writes how many times as fast as the plain network each case is."""
    plain = {case.precision: r.seconds for case, r in results.items() if case.order == "plain"}
    for case, result in results.items():
        if result.seconds and plain.get("fp32"):
            result.times_plain_fp32 = plain["fp32"] / result.seconds
        if result.seconds and plain.get(case.precision):
            result.times_plain = plain[case.precision] / result.seconds


def peak_of(
    case: Case, device: torch.device, *more: Case, s: Settings | None = None
) -> tuple[float, ...]:
    """(most memory in MB, seconds of a pass) of a case in a process of its own, and then, in that
    process, the seconds of `more` cases of its network, by default that of the case's names, else
    that of the settings `s`. Raises RuntimeError if that fails."""
    use_large_pages()  # as a run does
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_tell_peak, args=((case, *more), s, str(device), sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("its process ended before it could tell its memory") from None
    finally:
        child.join()


def _tell_peak(cases: tuple[Case, ...], s: Settings | None, device_name: str, sender) -> None:
    device = torch.device(device_name)
    model, told = networks([cases[0]], device, s)[cases[0]], []
    for case in cases:
        work = prepare(case, model)
        *_, seconds = (timed(work, device) for _ in range(2))
        told += [seconds] if told else [peak_memory(device), seconds]
    sender.send(tuple(told))


# ------------------------------------------------------------------------------------ keeping rows


def keep(results: dict[Case, Result], path: Path) -> None:
    """Writes rows into a CSV, in place of those of the same cases."""
    case_names = [f.name for f in fields(Case)]
    rows: dict[tuple, dict[str, str]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = {tuple(row[name] for name in case_names): row for row in csv.DictReader(file)}
    for row in map(as_text, results.items()):
        rows[tuple(row[name] for name in case_names)] = row

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, case_names + [f.name for f in fields(Result)])
            writer.writeheader()
            writer.writerows(rows.values())

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, write)


def write_markdown(path: Path) -> None:
    """The rows of a CSV as Markdown, beside it."""
    with path.open(newline="", encoding="utf-8") as file:
        text = markdown(list(csv.DictReader(file)))
    write_text(path.with_suffix(".md"), text)


def as_text(item: tuple[Case, Result]) -> dict[str, str]:
    """A row of the CSV; what was not measured is empty."""
    values = asdict(item[0]) | asdict(item[1])
    form = {float: lambda v: f"{v:.6g}", type(None): lambda v: ""}
    return {k: form.get(type(v), str)(v) for k, v in values.items()}


COLUMNS = {  # of the Markdown tables: their heads, and how their numbers are written
    "order": ("network", ""),
    "precision": ("precision", ""),
    "seconds": ("seconds", "{:.3f}"),
    "per_second": ("images or windows/s", "{:.3g}"),
    "fastest": ("fastest", "{:.3f}"),
    "slowest": ("slowest", "{:.3f}"),
    "times_plain_fp32": ("times plain fp32", "{:.2f}"),
    "times_plain": ("times plain, same precision", "{:.2f}"),
    "gflop": ("GFLOP", "{:,.0f}"),
    "of_ceiling": ("of the ceiling", "{:.0%}"),
    "peak_mb": ("peak MB", "{:,.0f}"),
    "error": ("difference", "{:.1e}"),
    "note": ("note", ""),
}
HEAD = ("task", "encoder", "tuner", "crop", "batch", "machine", "version", "repeats")


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows of the CSV as tables of what was measured in one process."""
    tables: dict[tuple, list[dict[str, str]]] = {}
    for row in rows:
        tables.setdefault(tuple(row[name] for name in HEAD), []).append(row)
    lines = []
    for (task, encoder, tuner, crop, batch, where, what, repeats), members in tables.items():
        lines += [f"## {task}: {encoder}, {tuner}, {crop} px, batch {batch}", ""]
        lines += [f"{where}; {what}; medians of {repeats}", ""]
        lines.append("| " + " | ".join(title for title, _ in COLUMNS.values()) + " |")
        lines.append(
            "|" + "|".join("---:" if form else "---" for _, form in COLUMNS.values()) + "|"
        )
        for row in members:
            cells = [(row[name], form) for name, (_, form) in COLUMNS.items()]
            cells = [form.format(float(c)) if form and c else c for c, form in cells]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


# --------------------------------------------------------------------------------- the command line


def add_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=["encoder", "network", "step"])
    add("--encoder", choices=list(SIZES), default="vit_b")
    add("--tuner", choices=list(TUNERS), default="adapter")
    add("--crop", type=int, default=256, help="pixels")
    add("--batch-size", "--batch", dest="batch", type=int, default=2, help="images")
    add("--precision", nargs="+", choices=PRECISIONS, help="fp32 and bf16 by default")
    add("--variants", nargs="+", choices=ORDERS[2:], default=[], help="of the fast network, too")
    add("--memory", action="store_true", help="peak memory too, each case in its own process")
    add("--repeats", type=int, default=7)
    add("--out", type=Path, default=Path("benchmarks/results.csv"), help="CSV to write rows into")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def compare_networks(args: argparse.Namespace) -> None:
    """Measures what the flags ask for, keeps the rows and prints them. Raises Mistake."""
    device = pick_device(args.device)
    if min(args.batch, args.repeats) < 1 or args.crop < 64:
        raise Mistake("--batch-size and --repeats begin at 1, --crop at 64")
    if "tf32" in (args.precision or ()) and device.type != "cuda":
        raise Mistake("--precision tf32: a GPU's; leave it out")
    case = Case("", args.encoder, args.tuner, args.crop, args.batch, "", "")
    for task in args.tasks:
        precisions = args.precision or ["bf16"]
        cases = variants_of(replace(case, task=task), precisions, args.variants)
        print(measure_and_keep(cases, args.repeats, device, args.out, args.memory))
        write_markdown(args.out)
    say_next("python benchmark.py plan vaihingen")


def variants_of(case: Case, precisions: Iterable[str], more: Iterable[str]) -> list[Case]:
    """The plain and the fast network, and `more` orders, in fp32 and in `precisions`."""
    return [
        replace(case, precision=precision, order=order)
        for precision in dict.fromkeys(["fp32", *precisions])
        for order in ("plain", "fast", *more)
    ]


def measure_and_keep(
    cases: list[Case], repeats: int, device: torch.device, out: Path, memory: bool
) -> str:
    """Measures the cases of one task, writes their rows into the CSV `out` -> them in Markdown."""
    peaks = {case: peak_of(case, device)[0] for case in cases} if memory else {}
    results = measure(cases, repeats, device)
    for case, peak in peaks.items():
        results[case].peak_mb = peak
    keep(results, out)
    return markdown([as_text(item) for item in results.items()])
