"""The procedural city of `city.py` in the layouts of the benchmarks, so that everything can be
tried without real tiles.

    python -m geodata.synthetic --root DIR [--seed N] [--size N] [--layout vaihingen|potsdam|hunan]

The sixteen tiles carry the numbers of the paper's split and are read by the ordinary Vaihingen
reader:

    top/top_mosaic_09cm_area{N}.tif                                     uint8   (H, W, 3)  near infrared, red, green
    dsm/dsm_09cm_matching_area{N}.tif                                   float32 (H, W)     metres above sea level
    gts_for_participants/top_mosaic_09cm_area{N}.tif                    uint8   (H, W, 3)  class colours
    gts_eroded_for_participants/top_mosaic_09cm_area{N}_noBoundary.tif  uint8   (H, W, 3)  black near class borders
    city.json                                                           what wrote the folder, and whether it finished

The same kind of scenes can be written in the layouts of ISPRS Potsdam and of MMHunan
(`write_city`), to try their readers."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from geodata.city import CLASSES, GENERATOR_VERSION, PALETTE, Scene, make_tile

TRAIN_AREAS = (1, 3, 23, 26, 7, 11, 13, 28, 17, 32, 34, 37)


TEST_AREAS = (5, 21, 15, 30)


ALL_AREAS = TRAIN_AREAS + TEST_AREAS


IGNORE = 255


def erode_labels(labels: np.ndarray, radius: int = 3) -> np.ndarray:
    """Labels uint8 (H, W) with 255 wherever the disc of `radius` pixels about a pixel holds a
    second class.
    """
    rows, columns = labels.shape
    border = np.zeros(labels.shape, bool)
    for dy in range(radius + 1):
        for dx in range(
            -radius, radius + 1
        ):  # half of the disc: each pair of pixels marks both its ends
            if dy * dy + dx * dx > radius * radius or dy >= rows or abs(dx) >= columns:
                continue
            here = slice(0, rows - dy), slice(max(0, -dx), columns - max(0, dx))
            there = slice(dy, rows), slice(max(0, dx), columns - max(0, -dx))
            differs = labels[here] != labels[there]
            border[here] |= differs
            border[there] |= differs
    return np.where(border, np.uint8(IGNORE), labels)


def tile_paths(root: Path, area: int) -> dict[str, Path]:
    """The four files of a tile in Vaihingen's layout."""
    name = f"top_mosaic_09cm_area{area}"
    return {
        "image": root / "top" / f"{name}.tif",
        "dsm": root / "dsm" / f"dsm_09cm_matching_area{area}.tif",
        "labels": root / "gts_for_participants" / f"{name}.tif",
        "eroded": root / "gts_eroded_for_participants" / f"{name}_noBoundary.tif",
    }


def write_city(
    root: Path,
    seed: int = 0,
    size: int | tuple[int, int] = 640,
    areas: tuple[int, ...] = ALL_AREAS,
    layout: str = "vaihingen",
) -> None:
    """Writes the tiles into root, over files of the same names; size is the side in pixels, or
    (height, width). `city.json` says complete only after the last tile. Layouts potsdam and
    hunan have tiles of their own, not areas.
    """
    root, marker = Path(root), describe_city(seed, size)
    if layout != "vaihingen":
        write, tiles = OTHER_LAYOUTS[layout]
        write_marker(root, {**marker, "layout": layout}, complete=False)
        for number, tile in enumerate(tiles):
            write(root, tile, make_tile(seed, number, *marker["size"]))
        write_marker(root, {**marker, "layout": layout}, complete=True)
        return
    write_marker(root, marker, complete=False)
    colours = np.zeros((256, 3), np.uint8)  # everything that is no class, 255 above all, is black
    colours[: len(PALETTE)] = PALETTE
    for area in areas:
        scene, paths = make_tile(seed, area, *marker["size"]), tile_paths(root, area)
        write_tiff(paths["image"], scene.image, photometric="rgb")
        write_tiff(paths["dsm"], scene.dsm, photometric="minisblack")
        write_tiff(paths["labels"], colours[scene.labels], photometric="rgb", compression="zlib")
        write_tiff(
            paths["eroded"],
            colours[erode_labels(scene.labels)],
            photometric="rgb",
            compression="zlib",
        )
    write_marker(root, marker, complete=True)


def write_potsdam(root: Path, tile: str, scene: Scene) -> None:
    """A scene as a tile r_c of Potsdam, uncompressed: red, green, a blue that follows green, near
    infrared; heights in decimetres above the tile's lowest as JPEG, and in metres.
    """
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(PALETTE)] = PALETTE
    padded = "_".join(part.zfill(2) for part in tile.split("_"))
    infrared, red, green = np.moveaxis(scene.image, -1, 0)
    image = np.stack([red, green, (0.9 * green).astype(np.uint8), infrared], axis=-1)
    above = np.clip(10 * (scene.dsm - scene.dsm.min()), 0, 255).astype(np.uint8)
    write_tiff(
        root / f"4_Ortho_RGBIR/top_potsdam_{tile}_RGBIR.tif",
        image,
        photometric="rgb",
        extrasamples=["unspecified"],
    )
    write_tiff(root / f"1_DSM/dsm_potsdam_{padded}.tif", scene.dsm, photometric="minisblack")
    jpeg = root / f"1_DSM_normalisation/dsm_potsdam_{padded}_normalized_lastools.jpg"
    jpeg.parent.mkdir(exist_ok=True)
    Image.fromarray(above).save(jpeg, quality=95)
    for folder, name, labels in (
        ("", "", scene.labels),
        ("_no_Boundary", "_noBoundary", erode_labels(scene.labels)),
    ):
        path = root / f"5_Labels_for_participants{folder}/top_potsdam_{tile}_label{name}.tif"
        write_tiff(path, colours[labels], photometric="rgb")


def write_hunan(root: Path, tile: str, scene: Scene) -> None:
    """A scene as a patch split/number of MMHunan: 13 bands of reflectance x 10000, radar, height
    and slope, raw codes.
    """
    codes = np.array(
        (9, 8, 3, 2, 1, 6), np.uint8
    )  # bare, impervious, grassland, forest, cropland, water
    folder, number = tile.split("/")
    s2 = np.repeat(scene.image[..., 2:].astype(np.int16) * 12, 13, axis=-1)
    s2[..., [7, 3, 2]] = scene.image.astype(np.int16) * 12
    topo = np.stack([scene.dsm, np.zeros_like(scene.dsm)], axis=-1)
    radar = np.repeat(-scene.image[..., :1].astype(np.float32) / 10, 2, axis=-1)
    for kind, array in (("s2", s2), ("s1", radar), ("topo", topo), ("lc", codes[scene.labels])):
        options = {"photometric": "minisblack", "compression": "zlib"}
        if array.ndim == 3:
            options["planarconfig"] = "contig"
        write_tiff(root / folder / kind / f"{kind}_{number}.tif", array, **options)


POTSDAM_TILES = tuple(
    f"{r}_{c}"
    for r, columns in (
        (2, (10, 11, 12)),
        (3, (10, 11, 12)),
        (4, (10, 11, 12)),
        (5, (10, 11, 12)),
        (6, range(7, 13)),
        (7, range(7, 13)),
    )
    for c in columns
)


HUNAN_TILES = ("train/101", "train/7", "val/23", "test/5")


OTHER_LAYOUTS = {"potsdam": (write_potsdam, POTSDAM_TILES), "hunan": (write_hunan, HUNAN_TILES)}


def ensure_city(root: Path, seed: int = 0, size: int | tuple[int, int] = 640) -> bool:
    """Makes sure that root holds this city; True if it had to be written. A city left half-written
    is finished. Raises ValueError, and writes nothing, where root holds anything else.
    """
    root, wanted = Path(root), describe_city(seed, size)
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file; name a new folder for the synthetic city")
    if not root.exists() or not any(not path.name.startswith(".") for path in root.iterdir()):
        write_city(root, seed, size)
        return True
    try:
        found = json.loads((root / "city.json").read_text())
        complete = found.pop("complete")
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        raise ValueError(
            f"{root} is not empty and holds no synthetic city; name a new or empty folder"
        ) from None
    if found != wanted:
        raise ValueError(
            f"{root} holds another synthetic city, {found}, not {wanted}; delete it or name a new folder"
        )
    if complete and all(
        path.is_file() for area in ALL_AREAS for path in tile_paths(root, area).values()
    ):
        return False
    write_city(root, seed, size)
    return True


def describe_city(seed: int, size: int | tuple[int, int]) -> dict:
    """What `city.json` says of a city, apart from `complete`."""
    height, width = (size, size) if isinstance(size, int) else (int(side) for side in size)
    if min(height, width) < 64 or seed < 0:
        raise ValueError(
            f"a synthetic city needs a size of 64 or more and a seed of 0 or more, not {size} and {seed}"
        )
    return {"generator_version": GENERATOR_VERSION, "seed": seed, "size": [height, width]}


def write_tiff(path: Path, array: np.ndarray, **options) -> None:
    """Writes a TIFF under a temporary name and renames it, so that a file with its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    tifffile.imwrite(temporary, array, **options)
    os.replace(temporary, path)


def write_marker(root: Path, marker: dict, complete: bool) -> None:
    """Writes `city.json`, whole or not at all."""
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".city.json.{os.getpid()}.part"
    temporary.write_text(json.dumps({**marker, "complete": complete}) + "\n")
    os.replace(temporary, root / "city.json")


def class_shares(root: Path, areas: tuple[int, ...] = ALL_AREAS) -> list[float]:
    """The share of each class in the labels of a written city."""
    images = [tifffile.imread(tile_paths(Path(root), area)["labels"]) for area in areas]
    return [
        float(np.mean([(image == colour).all(-1).mean() for image in images])) for colour in PALETTE
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Writes a synthetic city in the layout of a benchmark."
    )
    parser.add_argument("--root", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=640, help="side of a tile in pixels of 9 cm")
    parser.add_argument("--layout", choices=("vaihingen", *OTHER_LAYOUTS), default="vaihingen")
    args = parser.parse_args()
    try:
        if args.layout != "vaihingen":
            if args.root.exists() and any(args.root.iterdir()):
                raise ValueError(
                    f"{args.root} is not empty; name a new folder for the synthetic city"
                )
            write_city(args.root, args.seed, args.size, layout=args.layout)
            print(
                f"{args.root}: wrote {len(OTHER_LAYOUTS[args.layout][1])} tiles in the layout of {args.layout}"
            )
            return 0
        written = ensure_city(args.root, args.seed, args.size)
    except (ValueError, OSError) as error:
        print(f"synthetic.py: {error}", file=sys.stderr)
        return 2
    shares = ", ".join(
        f"{name} {100 * share:.1f}" for name, share in zip(CLASSES, class_shares(args.root))
    )
    print(
        f"{args.root}: {'wrote' if written else 'already holds'} {len(ALL_AREAS)} tiles; % of pixels: {shares}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
