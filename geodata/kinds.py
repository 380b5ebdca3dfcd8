"""Kinds of rasters: which there are besides image and heights, and which of their bands count.

A layout lists them, or the `classes.json` of own tiles:

    {"rasters": {"sar": {"bands": [1, 2], "scaling": "-30:0", "unit": "dB"},
                 "nir": {"from": "image", "bands": [4]},
                 "ndsm": {"kind": "height"}}}

The image and the heights have switches of their own (`--bands`, `--heights`). A run keeps the kinds
that it was trained on, in this form."""

from __future__ import annotations

import re
from dataclasses import dataclass

from geodata.scaling import BAND_SCALINGS, fixed_range
from geodata.slices import DataError

TAKEN = ("image", "images", "dsm", "labels")  # names that mean something already
NAME = r"[A-Za-z0-9_-]+"
KEYS = ("kind", "from", "bands", "unit", "scaling", "nodata")


@dataclass(frozen=True)
class Kind:
    """One kind of raster. Its own file has a folder of its name beside `images`, or the `patterns`
    of a layout."""

    bands: tuple[int, ...] = (0,)  # from 0
    scaling: str = "percentiles"  # of BAND_SCALINGS, or LOW:HIGH
    unit: str = ""  # beside its values in pictures
    nodata: float | None = None  # besides what the file says
    source: str = ""  # "image": bands of the image's file
    patterns: tuple[str, ...] = ()

    def as_dict(self) -> dict:
        """In the form of a classes.json; what `read_kind` reads."""
        form = {"bands": [band + 1 for band in self.bands], "scaling": self.scaling}
        more = {"unit": self.unit, "nodata": self.nodata, "from": self.source}
        return form | {key: value for key, value in more.items() if value not in ("", None)}


def read_kind(name: str, form: object, where: str) -> Kind:
    """Raises DataError, which begins with `where`, for what is no kind of raster."""

    def need(fits: bool, what: str) -> None:
        if not fits:
            raise DataError(f"{where}: the raster {name}: {what}")

    fits = re.fullmatch(NAME, name) and name.casefold() not in TAKEN  # folders, of any system
    need(fits, "give another name, of letters and digits")
    need(isinstance(form, dict), 'a list of its properties is needed, as {"bands": [1, 2]}')
    unknown = ", ".join(sorted(form.keys() - set(KEYS)))
    need(not unknown, f"has no property {unknown}; there are {', '.join(KEYS)}")
    height = form.get("kind", "bands") == "height"
    need(form.get("kind", "bands") in ("height", "bands"), "its kind is height or bands")
    bands, nodata = form.get("bands", [1]), form.get("nodata")
    whole = isinstance(bands, list) and all(type(band) is int and band > 0 for band in bands)
    need(whole and bands and len(bands) <= 99, "its bands are numbers from 1 on, as [1, 2]")
    need(nodata is None or type(nodata) in (int, float), "its nodata is a number")
    need(form.get("from", "") in ("", "image"), "it comes from image, or from files of its own")
    scaling = str(form.get("scaling", "minmax" if height else "percentiles"))
    fits = scaling in BAND_SCALINGS or fixed_range(scaling) is not None
    need(fits, f"scaling {scaling}: give {', '.join(BAND_SCALINGS)}, or a range LOW:HIGH")
    unit = str(form.get("unit", "m" if height else ""))
    return Kind(tuple(b - 1 for b in bands), scaling, unit, nodata, form.get("from", ""))


def ordered(modalities: str, flag: str = "--modalities") -> str:
    """ "sar+dsm+image" -> "image+dsm+sar": image and heights first, then by name. Raises DataError
    for what is no list of names that differ, by more than capitals."""
    names = [name.strip() for name in modalities.split("+")]
    different = len({name.casefold() for name in names}) == len(names)
    if not all(re.fullmatch(NAME, name) for name in names) or not different:
        raise DataError(f"{flag} {modalities}: give different names with +, as image+dsm")
    return "+".join(sorted(names, key=lambda name: (name != "image", name != "dsm", name)))
