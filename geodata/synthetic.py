"""The procedural city of `city.py` as files, so that everything can be tried without real tiles.

    python -m geodata.synthetic --root DIR [--seed N] [--size N] [--difficulty X]
                                [--layout vaihingen|potsdam|hunan]

The tiles have the names, types and colours of the benchmark whose layout is chosen, and the
ordinary reader of that benchmark reads them; `layouts.py` says where its files lie. Vaihingen's
sixteen carry the numbers of the paper's split. Where image matching found no height, the files in
metres hold -9999 and say so as GDAL does. `city.json` in the folder says what wrote it, and whether
it was finished."""

from __future__ import annotations

import json
from itertools import chain, product
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from engine.console import Parser, run_script
from engine.files import replace_atomically
from geodata.canvas import shifted
from geodata.city import GENERATOR_VERSION, HARDEST, Scene, make_tile
from geodata.labels import labels_to_colors
from geodata.layouts import HUNAN, IGNORE, ISPRS_CLASSES, POTSDAM, VAIHINGEN
from geodata.rasters import NODATA, DataError

TRAIN_AREAS, TEST_AREAS = (tuple(map(int, tiles)) for tiles in VAIHINGEN.splits["paper"].values())
ALL_AREAS = TRAIN_AREAS + TEST_AREAS
MISSING = -9999  # metres, where there is no height


def erode_labels(labels: np.ndarray, radius: int = 3) -> np.ndarray:
    """Labels uint8 (H, W) with 255 wherever the disc of `radius` pixels about a pixel holds a
    second class."""
    border = np.zeros(labels.shape, bool)
    for dy, dx in product(range(-radius, radius + 1), repeat=2):
        if dy * dy + dx * dx <= radius * radius:
            here, there = shifted(labels.shape, dy, dx)
            border[here] |= labels[here] != labels[there]
    return np.where(border, np.uint8(IGNORE), labels)


# ---------------------------------------------------------------------------------------- the files


def tile_paths(root: Path, area: int) -> dict[str, Path]:
    """The five files of a tile in Vaihingen's layout."""
    patterns = {"image": VAIHINGEN.image["irrg"][0][0], "dsm": VAIHINGEN.dsm["absolute"][1][0]}
    patterns |= {"labels": VAIHINGEN.labels[0], "eroded": VAIHINGEN.test_labels[0]}
    patterns["intensity"] = VAIHINGEN.rasters["intensity"].patterns[0]
    return {kind: Path(root) / pattern.format(id=area) for kind, pattern in patterns.items()}


def write_vaihingen(root: Path, area: int, scene: Scene) -> None:
    """Near infrared, red, green; heights in metres; full and eroded labels; a laser's echoes."""
    paths = tile_paths(root, area)
    write_tiff(paths["image"], scene.image)
    write_heights(paths["dsm"], scene.dsm)
    write_tiff(paths["intensity"], scene.intensity)
    write_tiff(paths["labels"], colored(scene.labels), compression="zlib")
    write_tiff(paths["eroded"], colored(erode_labels(scene.labels)), compression="zlib")


def write_potsdam(root: Path, tile: str, scene: Scene) -> None:
    """A tile r_c, uncompressed: red, green, a blue that follows green, near infrared; heights in
    decimetres above the tile's lowest as JPEG, and in metres."""
    padded = "_".join(part.zfill(2) for part in tile.split("_"))
    infrared, red, green = np.moveaxis(scene.image, -1, 0)
    image = np.stack([red, green, (0.9 * green).astype(np.uint8), infrared], axis=-1)
    above = np.nan_to_num(np.clip(10 * (scene.dsm - np.nanmin(scene.dsm)), 0, 255), nan=0)
    path = root / POTSDAM.image["rgbir"][0][0].format(id=tile)
    write_tiff(path, image, extrasamples=["unspecified"])
    metres = POTSDAM.dsm["absolute"][1][0]
    write_heights(root / metres.format(padded=padded), scene.dsm)
    jpeg = root / POTSDAM.dsm["normalised"][1][0].format(padded=padded)
    jpeg.parent.mkdir(exist_ok=True)
    picture = Image.fromarray(above.astype(np.uint8))
    replace_atomically(jpeg, lambda p: picture.save(p, "JPEG", quality=95))
    write_tiff(root / POTSDAM.labels[0].format(id=tile), colored(scene.labels))
    eroded = root / POTSDAM.test_labels[0].format(id=tile)
    write_tiff(eroded, colored(erode_labels(scene.labels)))


def write_hunan(root: Path, tile: str, scene: Scene) -> None:
    """A patch split/number: 13 bands of reflectance x 10000, radar, height and slope, raw codes."""
    # bare, impervious, grassland, forest, cropland, water
    codes = np.array((9, 8, 3, 2, 1, 6), np.uint8)
    folder, number = tile.split("/")
    bands = np.repeat(scene.image[..., 2:].astype(np.int16) * 12, 13, axis=-1)
    bands[..., [7, 3, 2]] = scene.image.astype(np.int16) * 12
    radar = np.repeat(-scene.image[..., :1].astype(np.float32) / 10, 2, axis=-1)
    topography = np.stack([scene.dsm, np.zeros_like(scene.dsm)], axis=-1)
    for write, pattern, array in (
        (write_tiff, HUNAN.image["rgb"][0][0], bands),
        (write_tiff, HUNAN.rasters["s1"].patterns[0], radar),
        (write_tiff, HUNAN.labels[0], codes[scene.labels]),
        (write_heights, HUNAN.dsm["absolute"][1][0], topography),
    ):
        path = root / pattern.format(folder=folder, id=number)
        write(path, array, photometric="minisblack", planarconfig="contig", compression="zlib")


def colored(labels: np.ndarray) -> np.ndarray:
    """Labels (H, W) -> ISPRS's colours (H, W, 3) uint8; what is no class is black."""
    return labels_to_colors(labels, [color for _, color in ISPRS_CLASSES])


def write_heights(path: Path, heights: np.ndarray, **options) -> None:
    """Metres with NaN, as a TIFF with -9999 that names it as no data."""
    tag = (NODATA, "s", 0, str(MISSING), True)
    write_tiff(path, np.nan_to_num(heights, nan=MISSING), extratags=[tag], **options)


def write_tiff(path: Path, array: np.ndarray, **options) -> None:
    """A TIFF, whole or not at all; (H, W, C) is a colour image unless told otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"photometric": "rgb" if array.ndim == 3 else "minisblack"} | options
    replace_atomically(path, lambda p: tifffile.imwrite(p, array, **options))


# ----------------------------------------------------------------------------------------- the city

POTSDAM_TILES = sorted(
    chain(*POTSDAM.splits["paper"].values()), key=lambda tile: [*map(int, tile.split("_"))]
)

# How a tile is written, its name -> the number by which `make_tile` knows it, and those to test on.
LAYOUTS = {
    "vaihingen": (write_vaihingen, {area: area for area in ALL_AREAS}, TEST_AREAS),
    "potsdam": (
        write_potsdam,
        {tile: i for i, tile in enumerate(POTSDAM_TILES)},
        POTSDAM.splits["paper"]["test"],
    ),
    "hunan": (write_hunan, {"train/101": 0, "train/7": 1, "val/23": 2, "test/5": 3}, ("test/5",)),
}


def make_scene(
    layout: str, tile, seed: int, size: tuple[int, int], difficulty: float = 1.0
) -> Scene:
    """The tile of a layout by its name."""
    _, numbers, later = LAYOUTS[layout]
    return make_tile(seed, numbers[tile], *size, difficulty, tile in later)


def write_city(
    root: Path,
    seed: int = 0,
    size: int | tuple[int, int] = 640,
    tiles: tuple | None = None,
    layout: str = "vaihingen",
    difficulty: float = 1.0,
) -> None:
    """Writes the tiles, by default all of the layout, over files of the same names. `size` is the
    side in pixels, or (height, width). `city.json` says complete only after the last tile."""
    root, marker = Path(root), describe_city(seed, size, layout, difficulty)
    root.mkdir(parents=True, exist_ok=True)
    write, numbers, _ = LAYOUTS[layout]

    def mark(complete: bool) -> None:
        text = json.dumps({**marker, "complete": complete}) + "\n"
        replace_atomically(root / "city.json", lambda p: p.write_text(text))

    mark(complete=False)
    for tile in numbers if tiles is None else tiles:
        write(root, tile, make_scene(layout, tile, seed, marker["size"], difficulty))
    mark(complete=True)


def ensure_city(
    root: Path,
    seed: int = 0,
    size: int | tuple[int, int] = 640,
    layout: str = "vaihingen",
    difficulty: float = 1.0,
) -> bool:
    """Makes sure that root holds this city; True if it had to be written. A city left half-written
    is finished. Raises DataError, and writes nothing, where root holds anything else."""
    root, wanted = Path(root), describe_city(seed, size, layout, difficulty)
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file; name a new folder for the synthetic city")
    if root.exists() and any(not path.name.startswith(".") for path in root.iterdir()):
        try:
            found = json.loads((root / "city.json").read_text())
            complete = found.pop("complete")
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            message = f"{root} is not empty and holds no synthetic city; name a new or empty folder"
            raise DataError(message) from None
        if found != wanted:
            raise DataError(
                f"{root} holds another synthetic city, {found}, not {wanted}; delete it or name a "
                "new folder"
            )
        paths = [path for area in ALL_AREAS for path in tile_paths(root, area).values()]
        if complete and (layout != "vaihingen" or all(path.is_file() for path in paths)):
            return False
    write_city(root, seed, size, layout=layout, difficulty=difficulty)
    return True


def open_city(root: Path) -> None:
    """Makes sure that root holds a city in Vaihingen's layout: the one that it says it holds, or
    else the usual one. Raises DataError as `ensure_city` does."""
    try:
        city = json.loads((Path(root) / "city.json").read_text())
        ensure_city(root, city["seed"], city["size"], difficulty=city["difficulty"])
    except (OSError, ValueError, TypeError, KeyError):
        ensure_city(root)


def describe_city(seed: int, size: int | tuple[int, int], layout: str, difficulty: float) -> dict:
    """What `city.json` says of a city, apart from `complete`. Raises DataError."""
    height, width = (size, size) if isinstance(size, int) else (int(side) for side in size)
    if min(height, width) < 64 or seed < 0:
        raise DataError(
            "a synthetic city needs a size of 64 or more and a seed of 0 or more, not "
            f"{size} and {seed}"
        )
    if not 0 <= difficulty <= HARDEST:
        raise DataError(f"a difficulty of 0 to {HARDEST:g}, not {difficulty:g}")
    city = {"generator_version": GENERATOR_VERSION, "seed": seed, "size": [height, width]}
    city["difficulty"] = float(difficulty)
    return city if layout == "vaihingen" else {**city, "layout": layout}


def main() -> None:
    about = "Writes a synthetic city in a benchmark's layout."
    parser = Parser(prog="-m geodata.synthetic", description=about)
    add, hardest = parser.add_argument, f"0 nearly solved, {HARDEST:g} hardest [1]"
    add("--root", type=Path, required=True, help="a new or empty folder")
    add("--seed", type=int, default=0, help="another seed, another city [0]")
    add("--size", type=int, default=640, help="pixels of a tile's side [640]")
    add("--difficulty", type=float, default=1.0, help=hardest)
    add("--layout", choices=tuple(LAYOUTS), default="vaihingen")
    args = parser.parse_args()
    written = ensure_city(args.root, args.seed, args.size, args.layout, args.difficulty)
    done, size = "wrote" if written else "already holds", f"{args.size} x {args.size}"
    count = len(LAYOUTS[args.layout][1])
    print(f"{args.root}: {done} {count} tiles of {size} pixels in the layout of {args.layout}")


if __name__ == "__main__":
    run_script(main, DataError, OSError)
