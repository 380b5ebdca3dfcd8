"""The paper's numbers for a run, and what sets a run apart from the paper's method.

A run's settings are a dictionary here, as its config.json holds them; those of earlier versions
have `mixing` and `rank` in place of `tuner_option`."""

from __future__ import annotations

from reports.competitors import MEANS, paper_row

Scores = tuple[float, float, float]  # OA, mF1, mIoU in percent
DOUBTFUL = ("hunan", "lora", "vit_l")  # repeats another method's numbers, and is left out
METHOD = {"lora": "MMLoRA", "adapter": "MMAdapter"}  # tuner -> its rows, which end in an encoder


def means_of(table: str, row: str) -> Scores:
    return tuple(paper_row(table, row)[column] for column in MEANS)


# By (data set, tuner, encoder). The paper's standard tuners run in two streams without mixing.
PAPER_SCORES: dict[tuple[str, str, str], Scores] = {
    ("vaihingen", "standard-lora", "vit_l"): means_of("table4", "image+dsm-LoRA"),
    ("vaihingen", "standard-adapter", "vit_l"): means_of("table4", "image+dsm-Adapter"),
}
PAPER_SCORES |= {
    (data, tuner, encoder): means_of(table, f"{row}-{encoder}")
    for data, table in (("vaihingen", "table1"), ("potsdam", "table2"), ("hunan", "table3"))
    for tuner, row in METHOD.items()
    for encoder in ("vit_b", "vit_l", "vit_h")
    if (data, tuner, encoder) != DOUBTFUL
}

# The ablations, all of Vaihingen with ViT-L, by (tuner, `variant`).
PAPER_ABLATIONS: dict[tuple[str, str], Scores] = {
    ("frozen", "image only"): means_of("table4", "image-frozen"),
    ("adapter", "image only"): means_of("table4", "image-Adapter"),
    ("adapter", "fusion sum"): means_of("table5", "Adapter-multimodal-tuning"),
    ("lora", "image only"): means_of("table4", "image-LoRA"),
    ("lora", "fusion sum"): means_of("table5", "LoRA-multimodal-tuning"),
}

# Parameters that the method trains, counted with six classes, and the millions that the paper
# prints: it counts SAM's unused prompt encoder and mask decoder too.
COUNTED = {
    "lora": {"vit_b": 3_190_478, "vit_l": 4_910_846, "vit_h": 6_745_886},
    "adapter": {"vit_b": 16_360_118, "vit_l": 52_612_814, "vit_h": 107_220_702},
}
PAPER_TRAINED: dict[tuple[str, str], tuple[int, float]] = {
    (tuner, encoder): (count, paper_row("table6", f"{METHOD[tuner]}-{encoder}")["trained, M"])
    for tuner, counts in COUNTED.items()
    for encoder, count in counts.items()
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
    ones, no mixing, fusion sum, an option of the tuner; "" for the method itself."""
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
    tuners are other models, and tuners of their own here."""
    data, tuner, encoder = (settings[name] for name in ("data", "tuner", "encoder"))
    if not (kind := variant(settings)):
        return PAPER_SCORES.get((data, tuner, encoder))
    of_ablations = (data, encoder) == ("vaihingen", "vit_l")
    return PAPER_ABLATIONS.get((tuner, kind)) if of_ablations else None


def paper_trained(settings: dict) -> tuple[int, float] | None:
    """What `PAPER_TRAINED` says of a run, for the rows of the method itself."""
    known = paper_scores(settings) and not variant(settings)
    return PAPER_TRAINED.get((settings["tuner"], settings["encoder"])) if known else None
