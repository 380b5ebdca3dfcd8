"""From an orthophoto and polygons drawn in a GIS to tiles that train.py reads.

    python prepare.py --image ortho.tif --dsm heights.tif --polygons labels.geojson --out DIR
    python prepare.py --image ortho.tif --polygons labels.geojson --field landuse --out DIR
    python prepare.py --image ortho.tif --dsm heights.tif --labels labels.tif --out DIR

What no polygon covers is not labelled. The image is cut into blocks that do not touch; a seeded
draw shares them out among DIR/train, DIR/val and DIR/test, so that each has some of every class if
that can be. DIR/classes.json names the classes, DIR/split.png shows which block went where.

Shapes: `H, W` pixels, `n` blocks, `K` classes."""

from __future__ import annotations

import colorsys
import json
import math
import secrets
import shlex
import shutil
from itertools import count
from pathlib import Path
from typing import Iterator
from xml.etree import ElementTree

import numpy as np
import tifffile
from PIL import Image, ImageDraw

from engine.console import Parser, Ticker, run_script
from geodata.blocks import cut_blocks, share_out
from geodata.geojson import MOST, read_polygons
from geodata.grids import geo_tags, read_grid
from geodata.labels import labels_to_colors
from geodata.layouts import IGNORE, Classes
from geodata.maps import Output, write_maps
from geodata.polygons import burn
from geodata.rasters import NODATA, DataError, one_line
from geodata.scaling import Scaling, valid_heights
from geodata.slices import Box, row_strips, strip_boxes
from geodata.tiles import Tile
from reports.panels import assemble

PARTS = {"train": (255, 255, 255), "test": (0, 0, 0), "val": (200, 0, 160)}  # colours in split.png
LEAST = 64  # pixels of a block: what the network takes
CROP = 256  # train.py's
SHOWN = 900  # pixels of the longer side of a picture
# Told apart also by those who do not tell red from green (M. Okabe, K. Ito, 2008)
SAFE = "e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 999999".split()

# ------------------------------------------------------------------------------------------- labels


def colours() -> Iterator[tuple[int, ...]]:
    """Colours without end: the safe ones, then around the circle."""
    yield from (tuple(bytes.fromhex(code)) for code in SAFE)
    for i in count():
        rgb = colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.55 + 0.09 * (i % 5), 0.95 - 0.17 * (i % 3))
        yield tuple(round(255 * v) for v in rgb)


def from_polygons(path: Path, field: str, tile: Tile) -> tuple[Classes, np.ndarray]:
    """Classes, and labels (H, W). Raises DataError."""
    found = read_polygons(path, field, read_grid(tile.raster("image")), tile.size)
    labels, twice = np.full(tile.size, IGNORE, np.uint8), 0
    for name, rings in found.polygons:
        twice += burn(labels, rings, found.names.index(name))
    tile.notes += found.notes
    if twice:
        tile.notes.append(
            f"{path}: {twice} pixels lie in polygons of two classes; the later counts"
        )
    return tuple(zip(found.names, colours())), labels


def from_raster(tile: Tile) -> tuple[Classes, np.ndarray]:
    """The same of the tile's label raster: a class for each colour, or for each number but 255 and
    no data."""
    raster = tile.raster("labels")
    many = raster.bands >= 3
    strips = (
        s[..., :3].astype(np.int32) @ (65536, 256, 1) if many else s for s in row_strips(raster)
    )
    values = np.unique(np.concatenate([np.unique(strip) for strip in strips])).tolist()
    if many:
        found = [(v >> 16, v >> 8 & 255, v & 255) for v in values]
        names = {v: "#{:02x}{:02x}{:02x}".format(*rgb) for v, rgb in zip(values, found)}
    else:
        values = [v for v in values if v not in (IGNORE, raster.nodata)]
        beside = raster.path.with_name(raster.path.name + ".aux.xml")
        categories = ElementTree.parse(beside).iter("Category") if beside.is_file() else ()
        names, found = dict(enumerate(e.text for e in categories)), list(zip(values, colours()))
        found = [color for _, color in found]
        if raster.palette is not None and max(values, default=0) < len(raster.palette):
            own = [tuple(raster.palette[v].tolist()) for v in values]
            found = own if len(set(own)) == len(own) else found
    if not 2 <= len(values) <= MOST or raster.dtype.kind not in "ui" or min(values) < 0:
        held = f"{len(values)} different values of {raster.dtype}"
        needed = f"labels are 2 to {MOST} class numbers from 0, or as many flat colours"
        raise DataError(
            f"{raster.path}: holds {held}; {needed}: gdal_translate -ot Byte IN OUT.tif"
        )
    tile.classes = tuple((names.get(v) or f"class {v}", color) for v, color in zip(values, found))
    if not many:
        number = {v: k for k, v in enumerate(values)}
        tile.codes = tuple(number.get(v, IGNORE) for v in range(max(values) + 1))
    return tile.classes, tile.read_labels()


# -------------------------------------------------------------------------------------------- tiles


def shares_of(n: int, test: float, val: float) -> tuple[int, ...]:
    """How many of n blocks, 3 or more, train, test and validate: one at least."""
    tested = min(max(1, round(test * n)), n - 2)
    held = min(max(1, round(val * n)), n - 1 - tested) if val else 0
    return n - tested - held, tested, held


def write_tile(folder: Path, tile: Tile, labels: np.ndarray, box: Box, classes: Classes) -> None:
    """Writes the files of a block below `folder`: GeoTIFFs that lie where the block lies."""
    raster, (rows, columns) = tile.raster("image"), box
    name, tags = (
        f"{rows.start:05}_{columns.start:05}.tif",
        geo_tags(raster.path, rows.start, columns.start),
    )
    paths = {kind: folder / kind / name for kind in ("images", "dsm", "labels")}
    options = dict(compression="zlib", metadata=None)
    extra = 3 if raster.colours == "rgb" else 1
    kinds = [
        "unassalpha" if i == raster.alpha else "unspecified" for i in range(extra, raster.bands)
    ]
    mode = dict(photometric="rgb" if extra == 3 else "minisblack", extrasamples=kinds)
    nodata = [] if raster.nodata is None else [(NODATA, "s", 0, f"{raster.nodata:.17g}", True)]
    paths["images"].parent.mkdir(parents=True, exist_ok=True)
    about = dict(planarconfig="contig", extratags=[*tags, *nodata])
    tifffile.imwrite(paths["images"], raster[box], **mode, **about, **options)
    if "dsm" in tile.paths:
        paths["dsm"].parent.mkdir(exist_ok=True)
        about = dict(photometric="minisblack", extratags=[*tags, (NODATA, "s", 0, "nan", True)])
        tifffile.imwrite(paths["dsm"], tile.heights()[box], **about, **options)
    paths["labels"].parent.mkdir(exist_ok=True)
    output, cut = Output(paths["labels"], ("class",), classes), labels[box]
    write_maps([output], [cut[None]], cut.shape, paths["images"])


def picture(tile: Tile, labels: np.ndarray, classes: Classes, blocks: list[Box], parts: list[str]):
    """The image, and on it the labels and the frame of each block in the colour of its part."""
    (H, W), raster = tile.size, tile.raster("image")
    step = -(-max(H, W) // SHOWN)
    image, seen = (
        np.concatenate([source[y : y + 1, 0:W][:, ::step] for y in range(0, H, step)])
        for source in (raster, labels)
    )
    image = image[..., :3].astype(np.float32)
    low, high = np.percentile(image, (2, 98))
    image = (255 * np.clip((image - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)
    known = (seen != IGNORE)[..., None]
    colors = labels_to_colors(seen, [color for _, color in classes])
    mixed = Image.fromarray(np.where(known, image // 3 + colors // 3 * 2, image))
    draw = ImageDraw.Draw(mixed)
    for (rows, columns), part in zip(blocks, parts):
        ends = columns.start, rows.start, columns.stop - 1, rows.stop - 1
        draw.rectangle([v // step for v in ends], outline=PARTS[part], width=3)
    shown = {"image": Image.fromarray(image), "labels, and the blocks of each part": mixed}
    return assemble(shown, (*classes, *((f"({part})", PARTS[part]) for part in sorted(set(parts)))))


def table(classes: Classes, pixels: dict[str, np.ndarray], counts: dict[str, int]) -> Iterator[str]:
    """Lines: the share of each class in the labelled pixels (K,) of each part."""
    yield f"{'class':<20}" + "".join(f"{part:>12}" for part in pixels)
    yield f"{'blocks':<20}" + "".join(f"{counts[part]:>12}" for part in pixels)
    for k, (name, _) in enumerate(classes):
        shares = (100 * own[k] / max(own.sum(), 1) for own in pixels.values())
        yield f"{name:<20}" + "".join(f"{share:>10.2f} %" for share in shares)
    for part, own in pixels.items():
        if lacking := [name for (name, _), n in zip(classes, own) if not n]:
            yield f"note: {part} has no {', '.join(lacking)}; label more, or try a smaller --block"


# ------------------------------------------------------------------------------------------ the way


def prepare(args, tile: Tile, folder: Path) -> list[str]:
    """Writes everything below `folder` -> what train.py is to be told of it. Raises DataError."""
    modalities, raster = (
        tuple(kind for kind in ("image", "dsm") if kind in tile.paths),
        tile.raster("image"),
    )
    told = [] if "dsm" in tile.paths else ["--modalities", "image"]
    if raster.dtype != np.uint8:  # one range for all tiles
        tile.scaling = Scaling(images="minmax")
    scale = tile.open(modalities).scale
    if raster.dtype != np.uint8:
        low, span = scale.image
        told.append(f"--image-scaling={low.min():.6g}:{(low + span).max():.6g}")
    if "dsm" in tile.paths:  # the same metres for every tile, and for the whole image later
        low, high = tile.height_limits
        told.append(f"--heights={math.floor(low)}:{math.floor(high) + 1}")
    classes, labels = (
        from_polygons(args.polygons, args.field, tile) if args.polygons else from_raster(tile)
    )
    if (missing := tile.without_data()) is not None:
        for rows, columns in strip_boxes(tile.size):
            labels[rows][missing(rows)] = IGNORE
    for note in tile.notes:
        print(f"note: {note}")

    K, found = len(classes), []
    for box in cut_blocks(tile.size, args.block):
        pixels = np.bincount(labels[box].ravel(), minlength=256)[:K]
        if pixels.any() and ("dsm" not in tile.paths or valid_heights(tile.heights()[box]).any()):
            found.append((box, pixels))
    if len(found) < 3:
        fits = max(LEAST, min(args.block - 1, min(tile.size) // 3))
        where = f"{args.image}: labels lie in {len(found)} blocks of {args.block}, and 3 are needed"
        raise DataError(
            f"{where}; " + (f"give --block {fits}" if fits < args.block else "label more")
        )
    blocks, pixels = [box for box, _ in found], np.stack([own for _, own in found])
    names = np.array(list(PARTS))
    parts = names[share_out(pixels, shares_of(len(found), args.test, args.val), args.seed)]
    ticker = Ticker("blocks")
    for i, (box, part) in enumerate(zip(blocks, parts)):
        write_tile(folder / part, tile, labels, box, classes)
        ticker(i + 1, len(blocks))
    named = [{"name": name, "color": color} for name, color in classes]
    content = json.dumps({"classes": named, "ignore": IGNORE}, indent=1, ensure_ascii=False)
    (folder / "classes.json").write_text(content + "\n", encoding="utf-8")
    picture(tile, labels, classes, blocks, parts.tolist()).save(folder / "split.png")
    used = [part for part in PARTS if (parts == part).any()]
    sums = {part: pixels[parts == part].sum(axis=0) for part in used}
    for line in table(classes, sums, {part: int((parts == part).sum()) for part in used}):
        print(line)
    least = min(part.stop - part.start for box in blocks for part in box)
    told += ["--val", "val"] if "val" in used else []
    if least < CROP:
        crop = max(LEAST, least // 16 * 16)
        told += ["--crop", str(crop), "--eval-stride", str(crop // 2)]
    return told


def main() -> None:
    parser = Parser(prog="prepare.py", description="Cuts an orthophoto with labels into tiles.")
    add = parser.add_argument
    add("--image", type=Path, required=True, help="image of three or more bands (TIFF, PNG, JPEG)")
    add("--dsm", type=Path, help="heights of the same size, or a GeoTIFF on another grid")
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--polygons", type=Path, help="GeoJSON of polygons in the image's system")
    one.add_argument("--labels", type=Path, help="a raster of class numbers or colours instead")
    add("--field", default="class", help="the field of a polygon that holds its class")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--block", type=int, default=512, help="pixels of a tile's side")
    add("--test", type=float, default=0.2, help="share of the blocks that are tested on")
    add("--val", type=float, default=0.1, help="share of the blocks to choose an epoch by; 0: none")
    add("--seed", type=int, default=0, help="of the draw of blocks")
    args = parser.parse_args()
    given = {"image": args.image, "dsm": args.dsm, "labels": args.labels}
    for flag, path in (given | {"polygons": args.polygons}).items():
        if path is not None and not path.is_file():
            raise DataError(f"--{flag} {path}: is no file; give one that is there")
    if args.block < LEAST:
        parser.error(f"--block {args.block}: give {LEAST} pixels or more")
    if not (0 < args.test < 1 and 0 <= args.val < 1 - args.test) or args.seed < 0:
        parser.error("--test and --val are shares above 0 and below 1 together, --seed 0 or more")
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise DataError(f"--out {args.out}: is there already; give a new folder")
    tile = Tile(
        args.image.stem, {k: p for k, p in given.items() if p}, (), scaling=Scaling(images="0:1")
    )
    folder = args.out.with_name(f"{args.out.name}.{secrets.token_hex(4)}.tmp")
    try:
        told = prepare(args, tile, folder)
        if args.out.exists():
            args.out.rmdir()
        folder.rename(args.out)
    except OSError as error:
        raise DataError(f"--out {args.out}: cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    words = shlex.join(["--data", "tiles", "--root", str(args.out), *told])
    print(f"{args.out}: look at {args.out / 'split.png'}")
    print(f"next: python train.py {words}  # without a GPU: --encoder vit_t")


if __name__ == "__main__":
    run_script(main, DataError)
