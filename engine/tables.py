"""The sweeps of `benchmark.py`: each table is its rows, and a row what it sets of a run.

The names of rows are those of the paper's rows in `reports/competitors.py`, beside which they are
shown. What a row does not set is the recipe's, or the command line's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable

from tuners import TUNERS

SIZES = ("vit_b", "vit_l", "vit_h")


@dataclass(frozen=True)
class Row:
    name: str
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    title: str
    rows: Callable[[tuple[str, ...]], list[Row]]  # of the encoders, where they are the rows
    reference: str = ""  # the row that the others are compared with; "": the last one
    data: str = "synthetic"
    sizes: bool = False  # whether the rows are those of SAM's encoders
    cost: bool = False  # whether one image is timed, too


METHODS = {"MMLoRA": "lora", "MMAdapter": "adapter"}  # the paper's, and their tuners


def of_methods(variants: dict[str, dict]) -> list[Row]:
    """A row for each method in each variant, which is what it sets by its name."""
    return [
        Row(f"{name}-{variant}", {"tuner": tuner, **settings})
        for name, tuner in METHODS.items()
        for variant, settings in variants.items()
    ]


def by_size(encoders: tuple[str, ...]) -> list[Row]:
    return of_methods({encoder: dict(encoder=encoder) for encoder in encoders})


def modalities_and_tuning(_) -> list[Row]:
    image = dict(modalities="image")
    return [
        Row("image-frozen", dict(tuner="frozen", **image)),
        Row("image-LoRA", dict(tuner="standard-lora", **image)),
        Row("image+dsm-LoRA", dict(tuner="standard-lora", modalities="image+dsm")),
        Row("image+dsm-MMLoRA", dict(tuner="lora", modalities="image+dsm")),
        Row("image-Adapter", dict(tuner="standard-adapter", **image)),
        Row("image+dsm-Adapter", dict(tuner="standard-adapter", modalities="image+dsm")),
        Row("image+dsm-MMAdapter", dict(tuner="adapter", modalities="image+dsm")),
    ]


def components(_) -> list[Row]:
    return [
        Row(f"{name}-{parts}", dict(tuner=standard + tuner, fusion=fusion))
        for name, tuner in (("Adapter", "adapter"), ("LoRA", "lora"))
        for parts, standard, fusion in (
            ("multimodal-tuning", "", "sum"),
            ("DFM", "standard-", "dfm"),
            ("both", "", "dfm"),
        )
    ]


SHARES = {f"{percent}%": dict(share=percent / 100) for percent in (25, 50, 75, 100)}
PLACES = {
    name: dict(tuner_option=dict(blocks=blocks))
    for name, blocks in (("all", "all"), ("late-half", "late"), ("last-two", "2"))
}
TABLES: dict[str, Table] = {
    "table1": Table("Vaihingen", by_size, data="vaihingen", sizes=True),
    "table2": Table("Potsdam", by_size, data="potsdam", sizes=True),
    "table3": Table("MMHunan", by_size, data="hunan", sizes=True),
    "table4": Table("Modalities and fine-tuning", modalities_and_tuning),
    "table5": Table("Components", components, "Adapter-both"),
    "table6": Table("Cost", by_size, data="vaihingen", sizes=True, cost=True),
    "fig12": Table("Share of the training data", lambda _: of_methods(SHARES)),
    # Asked when it is made: a plugin may add some.
    "tuners": Table("Tuners", lambda _: [Row(name, dict(tuner=name)) for name in TUNERS], "frozen"),
    "placement": Table("Where the tuner sits", lambda _: of_methods(PLACES), "MMAdapter-all"),
}


def rows_of(name: str, data: str, encoder: str | None = None) -> list[Row]:
    """The rows of a table. Another `encoder` than the paper's takes the place of its three; the
    made-up one of the city is beside them where the table is about cost."""
    table = TABLES[name]
    small = ("vit_t",) if table.cost and data == "synthetic" else ()
    return table.rows((encoder,) if encoder else (*small, *SIZES))
