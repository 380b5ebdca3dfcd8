"""The paper's numbers as data, and what sets a run apart from the paper's method.

A run's settings are a dictionary here, as its config.json holds them; those of earlier versions
have `mixing` and `rank` in place of `tuner_option`."""

from __future__ import annotations

Scores = tuple[float, float, float]  # OA, mF1, mIoU in percent

# By (data set, tuner, encoder). The paper's standard tuners run in two streams without mixing.
PAPER_SCORES: dict[tuple[str, str, str], Scores] = {
    ("vaihingen", "lora", "vit_b"): (91.93, 89.89, 82.09),
    ("vaihingen", "lora", "vit_l"): (92.22, 91.09, 83.96),
    ("vaihingen", "lora", "vit_h"): (92.73, 91.50, 84.66),
    ("vaihingen", "adapter", "vit_b"): (92.62, 90.60, 83.24),
    ("vaihingen", "adapter", "vit_l"): (92.93, 91.51, 84.72),
    ("vaihingen", "adapter", "vit_h"): (92.97, 91.71, 85.03),
    ("vaihingen", "standard-lora", "vit_l"): (91.86, 89.90, 82.06),
    ("vaihingen", "standard-adapter", "vit_l"): (92.80, 91.30, 84.35),
    ("potsdam", "lora", "vit_b"): (90.57, 91.48, 84.61),
    ("potsdam", "lora", "vit_l"): (90.99, 92.13, 85.71),
    ("potsdam", "lora", "vit_h"): (91.43, 92.49, 86.34),
    ("potsdam", "adapter", "vit_b"): (90.89, 91.79, 85.14),
    ("potsdam", "adapter", "vit_l"): (91.62, 92.51, 86.37),
    ("potsdam", "adapter", "vit_h"): (91.71, 92.70, 86.69),
    ("hunan", "lora", "vit_b"): (79.35, 58.79, 46.54),
    ("hunan", "lora", "vit_h"): (78.87, 60.38, 47.63),
    ("hunan", "adapter", "vit_b"): (80.68, 62.10, 49.20),
    ("hunan", "adapter", "vit_l"): (80.93, 65.33, 51.82),
    ("hunan", "adapter", "vit_h"): (81.07, 64.13, 51.08),
}
DOUBTFUL = ("hunan", "lora", "vit_l")  # repeats another method's numbers, and is left out

# The ablations, all of Vaihingen with ViT-L, by (tuner, `variant`).
PAPER_ABLATIONS: dict[tuple[str, str], Scores] = {
    ("frozen", "image only"): (88.01, 85.34, 75.11),
    ("adapter", "image only"): (92.02, 90.94, 83.69),
    ("adapter", "fusion sum"): (92.73, 91.23, 84.25),
    ("lora", "image only"): (92.00, 90.35, 82.74),
    ("lora", "fusion sum"): (92.02, 90.64, 83.24),
}

# Parameters that the method trains, counted with six classes, and the millions that the paper
# prints: it counts SAM's unused prompt encoder and mask decoder too.
PAPER_TRAINED: dict[tuple[str, str], tuple[int, float]] = {
    ("lora", "vit_b"): (3_190_478, 7.25),
    ("lora", "vit_l"): (4_910_846, 8.97),
    ("lora", "vit_h"): (6_745_886, 10.81),
    ("adapter", "vit_b"): (16_360_118, 20.42),
    ("adapter", "vit_l"): (52_612_814, 56.67),
    ("adapter", "vit_h"): (107_220_702, 111.28),
}

# Of its tuners.
PAPER_OPTIONS = {"mixing": True, "rank": 4, "alpha": 1.0, "ratio": 0.25, "blocks": "all"}


def tuner_options(settings: dict) -> dict:
    """The tuner's options that are not the paper's."""
    given = settings.get("tuner_option")
    if given is None:
        given = {name: settings[name] for name in ("mixing", "rank") if name in settings}
    return {name: v for name, v in given.items() if PAPER_OPTIONS.get(name) != v}


def variant(settings: dict) -> str:
    """What sets a run apart from its tuner's row in the paper: its rasters, the share of dropped
    ones, no mixing, fusion sum, an option of the tuner; "" for the method itself.
    """
    options = tuner_options(settings)
    alone = "+" not in settings["modalities"]
    parts = [f"{settings['modalities']} only"] if alone else []
    parts += [] if alone or settings["modalities"] == "image+dsm" else [settings["modalities"]]
    parts += [f"drop-modality {drop:g}"] if (drop := settings.get("drop_modality")) else []
    parts += [f"of {only}"] if (only := settings.get("drop_only")) else []
    parts += ["no mixing"] if options.pop("mixing", True) is False and not alone else []
    parts += ["fusion sum"] if settings["fusion"] == "sum" else []
    return ", ".join([*parts, *(f"{name} {value}" for name, value in sorted(options.items()))])


def paper_scores(settings: dict) -> Scores | None:
    """The paper's row for a run. None has its number beside "no mixing": the paper's standard
    tuners are other models, and tuners of their own here.
    """
    data, tuner, encoder = (settings[name] for name in ("data", "tuner", "encoder"))
    if not (kind := variant(settings)):
        return PAPER_SCORES.get((data, tuner, encoder))
    of_ablations = (data, encoder) == ("vaihingen", "vit_l")
    return PAPER_ABLATIONS.get((tuner, kind)) if of_ablations else None


def paper_trained(settings: dict) -> tuple[int, float] | None:
    """What `PAPER_TRAINED` says of a run, for the rows of the method itself."""
    known = paper_scores(settings) and not variant(settings)
    return PAPER_TRAINED.get((settings["tuner"], settings["encoder"])) if known else None
