"""The benchmarks as tables of data: classes, splits, and where the files of a tile lie.

Paths are patterns below the root, of which the first that exists counts: {id} is the tile's number
as the splits spell it, {padded} the same with two digits in each part (2_10 -> 02_10), {folder} one
of the folders that a split is listed from. Bands count from zero."""

from __future__ import annotations

from dataclasses import dataclass, field

from geodata.kinds import Kind
from geodata.slices import DataError

Classes = tuple[tuple[str, tuple[int, int, int]], ...]

IGNORE = 255
LABELS = ("dataset", "published")  # decoded with their defects repaired, or as published


@dataclass(frozen=True)
class Layout:
    classes: Classes  # name and colour of class 0, 1, ...
    scored: tuple[int, ...]  # the classes that mF1 and mIoU average
    splits: dict[str, dict[str, tuple[str, ...]]]  # paper, official -> split -> tile numbers
    validation: tuple[str, ...]  # training tiles to hold out when nobody names others
    # Name of the bands -> pattern and bands of each possible file; the first name is the default.
    image: dict[str, tuple[tuple[str, tuple[int, ...]], ...]]
    dsm: dict[str, tuple[float, tuple[str, ...]]]  # kind -> metres of one count, patterns
    labels: tuple[str, ...]  # for training
    test_labels: tuple[str, ...]  # for scoring
    labels_note: str  # how the scored labels are to be called beside a score
    pixel: float  # metres
    source: str  # where the data come from
    unscored_color: tuple[int, int, int] | None = None  # a colour of the labels that is read as 255
    nested: tuple[str, ...] = ("",)  # folders below the root in which some copies keep everything
    # Split -> folders whose labels list the tiles
    listed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    codes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # LABELS -> class of raw codes
    coded: tuple[str, ...] = ()  # the label patterns that hold raw codes
    rasters: dict[str, Kind] = field(default_factory=dict)  # besides image and heights

    def describe(self) -> str:
        """The files of a tile, by their first patterns."""
        image, heights = (next(iter(kinds.values())) for kinds in (self.image, self.dsm))
        first = image[0][0], heights[1][0], self.labels[0], self.test_labels[0]
        return ", ".join(dict.fromkeys(first))


ISPRS_SOURCE = "ISPRS commission II, working group 4, '2D semantic labeling' (data request form)"
ISPRS_CLASSES = (
    ("impervious", (255, 255, 255)),
    ("building", (0, 0, 255)),
    ("low vegetation", (0, 255, 255)),
    ("tree", (0, 255, 0)),
    ("car", (255, 255, 0)),
    ("clutter", (255, 0, 0)),
)

UNSCORED_COLOR = (0, 0, 0)  # ISPRS's eroded labels: class borders
RGB = (0, 1, 2)

_TOP = "top_mosaic_09cm_area{id}.tif"
_ERODED = "top_mosaic_09cm_area{id}_noBoundary.tif"
_COMPLETE = "ISPRS_semantic_labeling_Vaihingen_ground_truth_"
VAIHINGEN = Layout(
    classes=ISPRS_CLASSES,
    scored=(0, 1, 2, 3, 4),
    splits={
        "paper": {
            "train": tuple("1 3 23 26 7 11 13 28 17 32 34 37".split()),
            "test": tuple("5 21 15 30".split()),
        },
        "official": {
            "train": tuple("1 3 5 7 11 13 15 17 21 23 26 28 30 32 34 37".split()),
            "test": tuple("2 4 6 8 10 12 14 16 20 22 24 27 29 31 33 35 38".split()),
        },
    },
    validation=("11", "28"),
    image={"irrg": (("top/" + _TOP, RGB),)},
    # differs: the paper says normalised heights, its code reads these
    dsm={"absolute": (1.0, ("dsm/dsm_09cm_matching_area{id}.tif",))},
    labels=("gts_for_participants/" + _TOP, _COMPLETE + "COMPLETE/" + _TOP, _TOP),
    test_labels=(
        "gts_eroded_for_participants/" + _ERODED,
        _COMPLETE + "eroded_COMPLETE/" + _ERODED,
        _ERODED,
    ),
    labels_note="eroded labels",
    pixel=0.09,
    source=ISPRS_SOURCE,
    unscored_color=UNSCORED_COLOR,
    # Of a laser scan, gridded; ISPRS gives points.
    rasters={
        "intensity": Kind(scaling="unit", patterns=("intensity/intensity_09cm_area{id}.tif",))
    },
)

_POTSDAM_TRAIN = tuple(
    "6_10 7_10 2_12 3_11 2_10 7_8 5_10 3_12 5_12 7_11 7_9 6_9 7_7 4_12 6_8 6_12 6_7 4_11".split()
)
_POTSDAM_TEST = tuple("4_10 5_11 2_11 3_10 6_11 7_12".split())
_POTSDAM_OTHERS = "2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 7_13"
_RGBIR = "4_Ortho_RGBIR/top_potsdam_{id}_RGBIR.tif"
_LASTOOLS = "1_DSM_normalisation/dsm_potsdam_%s_normalized_lastools."
POTSDAM = Layout(
    classes=ISPRS_CLASSES,
    scored=(0, 1, 2, 3, 4),
    splits={
        "paper": {"train": _POTSDAM_TRAIN, "test": _POTSDAM_TEST},
        "official": {
            "train": (*_POTSDAM_TRAIN, *_POTSDAM_TEST),
            "test": tuple(_POTSDAM_OTHERS.split()),
        },
    },
    validation=("3_11", "5_12", "7_8"),
    image={
        "rgb": ((_RGBIR, RGB), ("2_Ortho_RGB/top_potsdam_{id}_RGB.tif", RGB)),
        "irrg": (("3_Ortho_IRRG/top_potsdam_{id}_IRRG.tif", RGB), (_RGBIR, (3, 0, 1))),
        "rgbir": ((_RGBIR, (0, 1, 2, 3)),),
    },
    dsm={
        # Decimetres above the ground; the published code reads the .jpg, and a .tif is the same
        # rewritten without compression, to be read crop by crop.
        "normalised": (
            0.1,
            tuple(_LASTOOLS % n + end for end in ("jpg", "tif") for n in ("{padded}", "{id}")),
        ),
        "absolute": (1.0, ("1_DSM/dsm_potsdam_{padded}.tif", "1_DSM/dsm_potsdam_{id}.tif")),
    },
    labels=tuple(
        folder + "top_potsdam_{id}_label.tif"
        for folder in ("5_Labels_for_participants/", "5_Labels_all/", "")
    ),
    test_labels=tuple(
        folder + "top_potsdam_{id}_label_noBoundary.tif"
        for folder in ("5_Labels_for_participants_no_Boundary/", "5_Labels_all_noBoundary/", "")
    ),
    labels_note="eroded labels",
    pixel=0.05,
    source=ISPRS_SOURCE,
    unscored_color=UNSCORED_COLOR,
    rasters={"nir": Kind((3,), "unit", patterns=(_RGBIR,))},
)


def _of_folder(name: str) -> tuple[str, str]:
    return f"{{folder}}/{name}/{name}_{{id}}.tif", f"{{folder}}/{name}/{{id}}.tif"


_LAND_COVER = _of_folder("lc")
_PREPARED = "masks_png/{id}.tif"
_HUNAN_TEST = """
    11767 11816 1239 12626 12815 1290 1303 13254 13257 13515 13765 14108 14293 15426 1625 16373
    16750 16890 17039 17055 17107 17455 17821 17980 18958 1908 1923 20028 2106 21385 21423 22312
    2256 2265 2442 2603 27264 28965 29287 30275 3280 4017 4166 4886 5215 5233 5410 639 7176 11624
"""
_X = IGNORE
HUNAN = Layout(
    classes=(
        ("cropland", (196, 90, 17)),
        ("forest", (51, 129, 88)),
        ("grassland", (177, 205, 61)),
        ("wetland", (228, 84, 96)),
        ("water", (91, 154, 214)),
        ("unused land", (225, 174, 110)),
        ("built-up", (239, 159, 2)),
    ),
    scored=(0, 1, 2, 3, 4, 5, 6),
    # Of the prepared folders, which keep all tiles together: what is not tested trains.
    splits={"paper": {"test": tuple(_HUNAN_TEST.split())}},
    validation=(),  # the tiles of the folder val
    image={
        "rgb": (
            *((pattern, (3, 2, 1)) for pattern in _of_folder("s2")),
            ("images_png/{id}.png", RGB),
        )
    },
    dsm={"absolute": (1.0, (*_of_folder("topo"), "dsm_pngs/{id}.png"))},
    labels=(*_LAND_COVER, _PREPARED),
    test_labels=(*_LAND_COVER, _PREPARED),
    labels_note="all labels",
    pixel=10.0,
    source="the authors of MMHunan (folders train, val, test of s2, s1, topo, lc)",
    nested=("", "Hunan_Dataset", "Hunan_Dataset/Hunan_Dataset"),
    listed={"train": ("train", "val"), "val": ("val",), "test": ("test",)},
    codes={
        # differs: the published code ignores 4 and 7, and exchanges 8 and 9 (docs/method.md
        # 3.8). 7, tundra, becomes 6; 11, cloud, would be class 7, which does not exist; a raw 255
        # reads as 12.
        "dataset": (_X, 0, 1, 2, 1, 3, 4, 6, 6, 5, 6, _X, _X),
        "published": (_X, 0, 1, 2, _X, 3, 4, _X, 5, 6, _X, _X, _X),
    },
    coded=_LAND_COVER,
    rasters={
        "s1": Kind((0, 1), "-30:0", "dB", patterns=_of_folder("s1")),
        # Near infrared and two of short waves: B08, B11, B12
        "infrared": Kind((7, 11, 12), "reflectance", patterns=_of_folder("s2")),
    },
)

LAYOUTS: dict[str, Layout] = {
    "vaihingen": VAIHINGEN,
    "synthetic": VAIHINGEN,
    "potsdam": POTSDAM,
    "hunan": HUNAN,
    "mmhunan": HUNAN,
}

# Scored pixels of the paper's Vaihingen test tiles with eroded labels, by class: who counts the
# same reads the same.
VAIHINGEN_TEST_PIXELS = (4_804_365, 5_422_947, 2_902_710, 4_392_760, 148_677, 6_216)


def image_bands(layout: Layout | None, bands: str, count: int) -> tuple[int, ...]:
    """The bands, from 0, that `bands` means in an image file of `count` bands. Raises DataError."""
    if bands and all(part.strip().isdigit() for part in bands.split(",")):
        chosen = tuple(int(part) - 1 for part in bands.split(","))
        if min(chosen) >= 0:
            return chosen
    elif layout is None and not bands:
        return (0, 1, 2)
    elif layout is not None and (bands in layout.image or not bands):
        variants = [numbers for _, numbers in layout.image[bands or next(iter(layout.image))]]
        return max((v for v in variants if max(v) < count), key=max, default=variants[0])
    names = "".join(f"{name}, " for name in layout.image) + "or " if layout else ""
    raise DataError(f"--bands {bands}: give {names}bands counted from 1, as in 4,3,2")
