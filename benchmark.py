"""How fast, and how close to what the machine can do: MFNet against the published order of
computation.

    python benchmark.py                                            ViT-B at 256 px: encoder, network, training step
    python benchmark.py --encoder vit_l --tasks step --batch 4 --precision bf16
    python benchmark.py --tasks tile --precision fp32 --repeats 1  a whole tile of 1000 x 1000 at stride 32
    python benchmark.py --plan vaihingen                           hours and memory of a run by the paper's recipe

Both orders run in one process, in turns, on the same weights, and their outputs are compared, so
that every figure is a ratio within one run. The ceiling is the time of the encoder's matrix
products alone, measured in this process at their shapes. Rows are kept in a CSV, and shown in a
Markdown file beside it; what failed stays in, with the reason."""

from __future__ import annotations

import copy
import csv
import multiprocessing
import platform
import statistics
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.console import Parser, run_script
from engine.cost import Product, ceiling, encoder_products, operations, timed
from engine.device import autocast, peak_memory, pick_device, store_frozen_weights, version
from engine.files import replace_atomically
from engine.inference import predict_tile
from engine.recipes import RECIPES
from engine.settings import Settings
from engine.training import segmentation_loss
from geodata.crops import sliding_windows
from geodata.rasters import DataError
from mfnet import MFNet, as_three_channels, build_mfnet
from published_order import published_encode, published_forward, published_predict
from sam_vit import SIZES
from tuners import TUNERS

TASKS = ("encoder", "network", "step", "tile")


PRECISIONS = ("fp32", "tf32", "bf16")  # tf32: GPUs alone


VARIANTS = ("checkpointed", "compiled")


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
    order: str  # published, ours, or ours in one of VARIANTS


@dataclass
class Result:
    """What was measured of a case: medians over the repeats."""

    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    times_published_fp32: float | None = None
    times_published: float | None = None  # of the same precision
    gflop: float | None = (
        None  # operations of all products and convolutions, counted while it ran, recomputed ones too
    )
    of_ceiling: float | None = None
    peak_mb: float | None = None  # of a process of its own: interpreter, weights and all
    error: float | None = None  # see `difference`; against the published order in fp32
    repeats: int = 0
    machine: str = ""
    version: str = ""
    note: str = ""


# --------------------------------------------------------------------------------- what is measured


def random_network(case: Case, device: torch.device) -> MFNet:
    """The network with random weights, also where training starts from zeros: every term takes
    part.
    """
    torch.manual_seed(0)
    model = build_mfnet(case.encoder, case.tuner, CLASSES)
    for p in model.parameters():
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model.to(device)


def networks(cases: list[Case], device: torch.device) -> dict[Case, MFNet]:
    """The network of each case: the same weights for all, in bf16 with ours stored as a run stores
    them.
    """
    plain, found = random_network(cases[0], device), {}
    for case in cases:
        stored = case.precision == "bf16" and case.order != "published"
        # Nothing is copied where one process measures one case: it is to hold what a run holds.
        model = (
            copy.deepcopy(plain) if len(cases) > 1 and (stored or case.order in VARIANTS) else plain
        )
        if stored:
            store_frozen_weights(model, "bf16", device)
        model.image_encoder.activation_checkpointing = case.order == "checkpointed"
        if case.order == "compiled":
            for block in model.image_encoder.blocks:
                block.compile()
        found[case] = model
    return found


def prepare(case: Case, model: MFNet) -> Callable[[], Tensor]:
    """A function that does the case's work once and returns what can be compared."""
    device = next(model.parameters()).device
    published = case.order == "published"
    precision = "bf16" if case.precision == "bf16" else "fp32"
    torch.manual_seed(1)
    image = torch.rand(case.batch, 3, case.crop, case.crop, device=device)
    dsm = torch.rand(case.batch, case.crop, case.crop, device=device)
    model.train(case.task == "step")

    def encoder() -> Tensor:
        rasters = [as_three_channels(image), as_three_channels(dsm)]
        return torch.cat(published_encode(model, rasters) if published else model.encode(*rasters))

    def network() -> Tensor:
        return published_forward(model, image, dsm) if published else model(image, dsm)

    def tile() -> Tensor:
        rng = np.random.default_rng(1)
        rasters = (
            rng.integers(0, 256, (TILE, TILE, 3), dtype=np.uint8),
            rng.random((TILE, TILE), dtype=np.float32),
        )
        sizes = case.crop, STRIDE, case.batch, (0.0, 1.0)
        if published:
            return torch.from_numpy(published_predict(model, *rasters, *sizes))
        return torch.from_numpy(
            predict_tile(model, *rasters, *sizes, repeat_border=True, precision=precision)
        )

    def forward() -> Tensor:
        with torch.inference_mode(), autocast(precision, device):
            return {"encoder": encoder, "network": network, "tile": tile}[case.task]()

    labels = torch.randint(CLASSES, dsm.shape, device=device)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9
    )

    def step() -> Tensor:
        torch.manual_seed(2)  # the same dropout for all
        optimizer.zero_grad()
        with autocast(precision, device):
            logits = network()
        segmentation_loss(logits, labels).backward()
        optimizer.step()  # all of its work, at a rate of 0: each repetition computes the same
        return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])

    return step if case.task == "step" else forward


# ---------------------------------------------------------------------------------------- measuring


def measure(cases: list[Case], repeats: int, device: torch.device) -> dict[Case, Result]:
    """All cases of one task in turns, in one process; the first is the published order in fp32."""
    models = networks(cases, device)
    works = {case: prepare(case, models[case]) for case in cases}
    results = {
        case: Result(repeats=repeats, machine=machine(device), version=version()) for case in cases
    }
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    outputs: dict[Case, Tensor] = {}
    warm_up = cases[0].task != "tile"  # a tile takes long enough without
    for turn in range(repeats + warm_up):
        for case, result in results.items():
            if result.note:
                continue
            set_matrix_precision(case)
            counting = FlopCounterMode(display=False) if warm_up and turn == 0 else nullcontext()
            try:
                with counting as counter:
                    spent = timed(lambda: outputs.update({case: works[case]()}), device)
            except RuntimeError as error:
                result.note = str(error).strip().splitlines()[0]
                continue
            if counter:
                result.gflop = counter.get_total_flops() / 1e9
            else:
                seconds[case].append(spent)
    for case, output in outputs.items():
        results[case].error = difference(output, outputs[cases[0]]) if cases[0] in outputs else None
    for case, result in results.items():
        if seconds[case]:
            result.seconds = statistics.median(seconds[case])
            result.fastest, result.slowest = min(seconds[case]), max(seconds[case])
    compare(results)
    if warm_up:
        add_ceiling(
            results, encoder_products(models[cases[0]], cases[0].batch, cases[0].crop), device
        )
    return results


def add_ceiling(
    results: dict[Case, Result], products: Counter[Product], device: torch.device
) -> None:
    """Writes which share of the ceiling ours reaches: its operations at the rate of the encoder's
    products.
    """
    rates: dict[str, float] = {}
    for case, result in results.items():
        if result.seconds and case.order != "published":
            if case.precision not in rates:
                set_matrix_precision(case)
                dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
                rates[case.precision] = operations(products) / ceiling(
                    products, dtype, device, result.repeats
                )
            counted = operations(products) if case.task == "encoder" else 1e9 * result.gflop
            result.of_ceiling = counted / rates[case.precision] / result.seconds


def set_matrix_precision(case: Case) -> None:
    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value; of class maps (H, W), the share of
    pixels that differ.
    """
    if expected.ndim == 2:
        return (found != expected).double().mean().item()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare(results: dict[Case, Result]) -> None:
    """Writes how many times as fast as the published order each case is, in fp32 and in its own
    precision.
    """
    published = {
        case.precision: r.seconds for case, r in results.items() if case.order == "published"
    }
    for case, result in results.items():
        if result.seconds and published.get("fp32"):
            result.times_published_fp32 = published["fp32"] / result.seconds
        if result.seconds and published.get(case.precision):
            result.times_published = published[case.precision] / result.seconds


def peak_of(case: Case, device: torch.device) -> tuple[float, float]:
    """(most memory in MB, seconds of a pass) of a case in a process of its own; raises RuntimeError
    if that fails.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_tell_peak, args=(case, str(device), sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("its process ended before it could tell its memory") from None
    finally:
        child.join()


def _tell_peak(case: Case, device_name: str, sender) -> None:
    device = torch.device(device_name)
    work = prepare(case, networks([case], device)[case])
    seconds = [timed(work, device) for _ in range(2)]
    sender.send((peak_memory(device), seconds[-1]))


# ----------------------------------------------------------------------------------------- the plan

TEST_TILES = {
    "vaihingen": (4, 2500, 1900),
    "potsdam": (6, 6000, 6000),
    "hunan": (50, 256, 256),
}  # how many, about H, W


UNPADDED = (224, 448, 672, 896)  # pixels: whole windows of 14 tokens


def plan(
    data: str, encoder: str | None, tuner: str, precision: str | None, device: torch.device
) -> str:
    """A Markdown table of what a run by the recipe of `data` takes, from one step each of one and
    of two images.

    Time and memory are taken to be linear in the images of a batch; crops beside the recipe's are
    scaled by the encoder's operations (time) and by their pixels (memory). The score is that of the
    last epoch, the recipe's."""
    s = Settings(**{**RECIPES[data], "tuner": tuner})
    s.encoder, s.precision = encoder or s.encoder, precision or s.precision
    tiles, H, W = TEST_TILES[data]
    one, two = (
        Case("step", s.encoder, tuner, s.crop, batch, s.precision, "ours") for batch in (1, 2)
    )
    (memory_one, step_one), (memory_two, step_two) = peak_of(one, device), peak_of(two, device)
    window = peak_of(replace(two, task="network"), device)[1] / 2
    with torch.device("meta"):
        model = build_mfnet(s.encoder, tuner)
    cost = {crop: operations(encoder_products(model, 1, crop)) for crop in (s.crop, *UNPADDED)}
    lines = [
        f"{data}: {s.encoder}, {tuner}, {s.precision}, {s.epochs} x {s.steps} steps of {s.batch_size}; {machine(device)}",
        "",
        "| crop | operations | a step | training | windows | scoring | memory |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for crop, needed in cost.items():
        times = needed / cost[s.crop]
        step = times * (step_one + (s.batch_size - 1) * (step_two - step_one))
        windows = tiles * len(sliding_windows(H, W, crop, s.eval_stride))
        memory = memory_one + (s.batch_size * (crop / s.crop) ** 2 - 1) * (memory_two - memory_one)
        hours = step * s.steps * s.epochs / 3600, windows * window * times / 3600
        lines.append(
            f"| {crop} | x {times:.2f} | {step:.3g} s | {hours[0]:,.1f} h "
            f"| {windows:,} | {hours[1]:,.2f} h | {memory / 1000:,.1f} GB |"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- keeping rows


def machine(device: torch.device) -> str:
    """The processor or the GPU, by name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name
        )
    return f"{name}, {torch.get_num_threads()} threads"


def keep(results: dict[Case, Result], path: Path) -> None:
    """Writes rows into a CSV, in place of those of the same cases, and the whole as Markdown beside
    it.
    """
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
    text = markdown(list(rows.values()))
    replace_atomically(path.with_suffix(".md"), lambda p: p.write_text(text, encoding="utf-8"))


def as_text(item: tuple[Case, Result]) -> dict[str, str]:
    """A row of the CSV; what was not measured is empty."""
    values = asdict(item[0]) | asdict(item[1])
    return {
        k: "" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v)
        for k, v in values.items()
    }


COLUMNS = {  # of the Markdown tables: their heads, and how their numbers are written
    "order": ("order", ""),
    "precision": ("precision", ""),
    "seconds": ("seconds", "{:.3f}"),
    "fastest": ("fastest", "{:.3f}"),
    "slowest": ("slowest", "{:.3f}"),
    "times_published_fp32": ("times published fp32", "{:.2f}"),
    "times_published": ("times published, same precision", "{:.2f}"),
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
            cells = ((row[name], form) for name, (_, form) in COLUMNS.items())
            lines.append(
                "| "
                + " | ".join(form.format(float(c)) if form and c else c for c, form in cells)
                + " |"
            )
        lines.append("")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- script


def main() -> None:
    parser = Parser(
        prog="benchmark.py",
        description="Measures MFNet against the published order of computation.",
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["encoder", "network", "step"])
    parser.add_argument(
        "--encoder", choices=list(SIZES), help="vit_b by default; with --plan the recipe's"
    )
    parser.add_argument("--tuner", choices=list(TUNERS), default="adapter")
    parser.add_argument("--crop", type=int, default=256, help="pixels")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, help="fp32 and bf16 by default"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=[], help="measure these of ours too"
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="measure peak memory too, each case in its own process",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results.csv"),
        help="CSV to write the rows into",
    )
    parser.add_argument(
        "--plan", choices=list(TEST_TILES), help="print what a run by this data set's recipe takes"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.plan:
        print(plan(args.plan, args.encoder, args.tuner, (args.precision or [None])[0], device))
        return
    if min(args.batch, args.repeats) < 1 or args.crop < 64:
        raise DataError("--batch and --repeats begin at 1, --crop at 64")
    if "tf32" in (args.precision or ()) and device.type != "cuda":
        raise DataError("--precision tf32: a GPU's; leave it out")
    for task in args.tasks:
        cases = [
            Case(task, args.encoder or "vit_b", args.tuner, args.crop, args.batch, precision, order)
            for precision in dict.fromkeys(["fp32", *(args.precision or ["bf16"])])
            for order in ("published", "ours", *args.variants)
        ]
        memory = {case: peak_of(case, device)[0] for case in cases} if args.memory else {}
        results = measure(cases, args.repeats, device)
        for case, peak in memory.items():
            results[case].peak_mb = peak
        keep(results, args.out)
        print(markdown([as_text(item) for item in results.items()]))


if __name__ == "__main__":
    run_script(main)
