"""From an orthophoto and polygons drawn in a GIS to tiles that train.py reads.

    python prepare.py --image ortho.tif --dsm heights.tif --polygons labels.geojson --out DIR
    python prepare.py --image ortho.tif --raster sar=radar.tif --labels labels.tif --out DIR

What no polygon covers is not labelled. The image is cut into blocks that do not touch; a seeded
draw shares them out among DIR/train, DIR/val and DIR/test, so that each has some of every class if
that can be. DIR/classes.json names the classes, DIR/split.png shows which block went where.

Shapes: `H, W` pixels, `n` blocks, `K` classes."""

from __future__ import annotations

import json
import math
import secrets
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Iterator

import numpy as np
import tifffile
from PIL import Image, ImageDraw

from engine.console import Parser, Ticker, run_script, typed
from engine.given import RASTER_FLAG, files_given
from geodata.annotation import from_polygons, from_raster
from geodata.blocks import cut_blocks, share_out
from geodata.doctor import MARKERS
from geodata.grids import geo_tags
from geodata.kinds import ordered, read_kind
from geodata.labels import labels_to_colors
from geodata.layouts import IGNORE, Classes
from geodata.maps import Output, write_maps
from geodata.rasters import GDAL_METADATA, NODATA, DataError, one_line
from geodata.scaling import Scaling, valid_heights
from geodata.slices import Box, Raster, View, strip_boxes
from geodata.tiles import Tile
from reports.panels import assemble

PARTS = {"train": (255, 255, 255), "test": (0, 0, 0), "val": (200, 0, 160)}  # colours in split.png
LEAST = 64  # pixels of a block: what the network takes
CROP = 256  # train.py's
IN_METRES = '<GDALMetadata><Item name="UNITTYPE" sample="0" role="unittype">m</Item></GDALMetadata>'
ENOUGH = 3  # blocks to choose an epoch by: one or two rather choose the luckiest
SHOWN = 900  # pixels of the longer side of a picture

# -------------------------------------------------------------------------------------------- tiles


def shares_of(n: int, test: float, val: float) -> tuple[int, ...]:
    """How many of n blocks, 3 or more, train, test and validate: one at least."""
    tested = min(max(1, round(test * n)), n - 2)
    held = min(max(1, round(val * n)), n - 1 - tested) if val else 0
    return n - tested - held, tested, held


def write_tile(
    folder: Path,
    image: Raster,
    others: dict[str, View],
    labels: np.ndarray,
    classes: Classes,
    box: Box,
) -> None:
    """Writes the files of a block below `folder`: GeoTIFFs that lie where the block lies."""
    name, cut = f"{box[0].start:05}_{box[1].start:05}.tif", labels[box]
    tags = geo_tags(image.path, box[0].start, box[1].start)
    rgb, nodata = image.colours == "rgb", [] if image.nodata is None else [image.nodata]
    kinds = {i: "unspecified" for i in range(3 if rgb else 1, image.bands)}
    kinds |= {} if image.alpha is None else {image.alpha: "unassalpha"}
    pixels = image[box]
    if image.mask is not None and pixels.dtype.kind == "f":  # no tile has a mask
        pixels, nodata = np.where(image.valid(box, pixels)[..., None], pixels, np.nan), [math.nan]
    files = {"images": (pixels, nodata, "rgb" if rgb else "minisblack", list(kinds.values()))}
    for kind, view in others.items():
        pixels = view[box]
        if pixels.shape[2:] == (1,):  # tifffile would make a page of every row
            pixels = pixels[..., 0]
        more = ["unspecified"] * (pixels.shape[2] - 1) if pixels.ndim == 3 else []
        files[kind] = pixels, [math.nan], "minisblack", more
    for kind, (pixels, holes, photometric, more) in files.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        extra = [*tags, *((NODATA, "s", 0, f"{value:.17g}", True) for value in holes)]
        # The tags, which are the image's, may name a unit of heights.
        extra += [(GDAL_METADATA, "s", 0, IN_METRES, True)] if kind == "dsm" else []
        options = dict(photometric=photometric, extrasamples=more, planarconfig="contig")
        options |= dict(compression="zlib", metadata=None, extratags=extra)
        tifffile.imwrite(folder / kind / name, pixels, **options)
    (folder / "labels").mkdir(exist_ok=True)
    output = Output(folder / "labels" / name, ("class",), classes)
    write_maps([output], [cut[None]], cut.shape, folder / "images" / name)


def picture(
    pixels: View, labels: np.ndarray, classes: Classes, blocks: list[Box], parts: list[str]
) -> Image.Image:
    """The image, and on it the labels and the frame of each block in the colour of its part."""
    H, W = labels.shape
    step = -(-max(H, W) // SHOWN)
    rows = [pixels[y : y + 1, 0:W][:, ::step] for y in range(0, H, step)]
    image, seen = np.concatenate(rows).astype(np.float32), labels[::step, ::step]
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
    named = *classes, *((f"({part})", PARTS[part]) for part in sorted(set(parts)))
    return assemble(shown, named)[0]


def table(classes: Classes, own: dict[str, np.ndarray]) -> Iterator[str]:
    """Lines: the blocks of each part, and of its labelled pixels (n, K) the share of each class."""
    sums = {part: pixels.sum(axis=0) for part, pixels in own.items()}
    yield f"{'class':<20}" + "".join(f"{part:>12}" for part in own)
    for k, (name, _) in enumerate(classes):
        shares = (100 * pixels[k] / pixels.sum() for pixels in sums.values())
        yield f"{name:<20}" + "".join(f"{share:>10.2f} %" for share in shares)
    yield f"{'blocks':<20}" + "".join(f"{len(pixels):>12}" for pixels in own.values())
    for part, pixels in sums.items():
        if lacking := [name for (name, _), n in zip(classes, pixels) if not n]:
            yield f"note: {part} has no {', '.join(lacking)}; label more, or try a smaller --block"


# ------------------------------------------------------------------------------------------ the way


def measured(tile: Tile) -> tuple[View, dict[str, View], list[str]]:
    """The image, the other rasters, NaN where they have no data, and what train.py is to be told of
    them. All get one scale for all tiles, which is that of the whole image: a block's own range is
    another."""
    others, told = [name for name in tile.paths if name not in ("image", "labels")], []
    bytes_ = tile.raster("image").dtype == np.uint8
    tile.scaling = Scaling(images="0:1" if bytes_ else "minmax")
    for name, kind in tile.kinds.items():
        raster = tile.raster(name)
        bands = tuple(band for band in range(raster.bands) if band != raster.alpha)
        if bands != tuple(range(len(bands))):
            remedy = f"{' '.join(f'-b {band + 1}' for band in bands)} IN OUT.tif"
            last = f"band {raster.alpha + 1} is alpha, which comes last"
            raise DataError(f"{raster.path}: {last}: gdal_translate {remedy}")
        tile.kinds[name] = replace(kind, bands=bands)
    loaded = tile.open(("image", *others))
    if not bytes_:
        told.append(f"--image-scaling={as_range(*loaded.scale.image)}")
    if "dsm" in others:
        low, high = tile.height_limits
        told.append(f"--heights={math.floor(low)}:{math.floor(high) + 1}")
    if others != ["dsm"]:
        told += ["--modalities", ordered("+".join(("image", *others)))]
    for name, scale in loaded.scales.items():
        tile.kinds[name] = replace(tile.kinds[name], scaling=as_range(*scale.image))
        for marker in set(MARKERS) & {*scale.image[0].tolist()}:
            said = f"if {marker} stands for no data, say so: gdal_edit.py -a_nodata {marker} FILE"
            tile.notes.append(f"{tile.paths[name]}: {said}")
    return loaded.image, ({"dsm": tile.heights()} if "dsm" in others else {}) | loaded.more, told


def as_range(low: np.ndarray, span: np.ndarray) -> str:
    """The one range LOW:HIGH of all bands."""
    return f"{low.min():.12g}:{(low + span).max():.12g}"


def has_data(name: str, pixels: np.ndarray) -> bool:
    return bool((valid_heights(pixels) if name == "dsm" else np.isfinite(pixels)).any())


def prepare(args: Namespace, tile: Tile, folder: Path) -> list[str]:
    """Writes everything below `folder` -> what train.py is to be told of it. Raises DataError."""
    image, others, told = measured(tile)
    drawn = args.polygons is not None
    classes, labels = from_polygons(args.polygons, args.field, tile) if drawn else from_raster(tile)
    if (missing := tile.without_data()) is not None:
        for rows, _ in strip_boxes(tile.size):
            labels[rows][missing(rows)] = IGNORE

    blocks, counts, empty = [], [], 0
    for box in cut_blocks(tile.size, args.block):
        own = np.bincount(labels[box].ravel(), minlength=256)[: len(classes)]
        if own.any() and all(has_data(name, view[box]) for name, view in others.items()):
            blocks.append(box)
            counts.append(own)
        else:
            empty += bool(own.any())
    if empty:
        tile.notes.append(f"{empty} labelled blocks are left out, where {' or '.join(others)} ends")
    if len(blocks) < 3:
        fits = max(LEAST, min(args.block - 1, min(tile.size) // 3))
        few = f"labels lie in {len(blocks)} blocks of {args.block} pixels, and 3 are needed"
        remedy = f"give --block {fits}" if fits < args.block else "label more of the image"
        raise DataError(f"{args.polygons or args.labels}: {few}; {remedy}")
    for note in tile.notes:
        print(f"note: {note}")
    pixels = np.stack(counts)
    drawn = share_out(pixels, shares_of(len(blocks), args.test, args.val), args.seed)
    parts, ticker = np.array(list(PARTS))[drawn], Ticker("blocks")
    for i, (box, part) in enumerate(zip(blocks, parts), 1):
        write_tile(folder / part, tile.raster("image"), others, labels, classes, box)
        ticker(i, len(blocks))
    picture(image, labels, classes, blocks, parts.tolist()).save(folder / "split.png")
    own = {part: pixels[parts == part] for part in PARTS if (parts == part).any()}
    for line in table(classes, own):
        print(line)
    if (held := len(own.get("val", ()))) >= ENOUGH:
        told += ["--val", "val"]
    elif held:
        few = f"val has {held} block{'s' * (held > 1)}, too few to choose an epoch by"
        print(f"note: {few}; a smaller --block makes more, and --val 0 trains on all but the test")
    if (least := min(side.stop - side.start for box in blocks for side in box)) < CROP:
        crop = max(LEAST, least // 16 * 16)
        told += ["--crop", str(crop), "--stride", str(crop // 2)]
    named = [{"name": name, "color": color} for name, color in classes]
    content = {"classes": named, "ignore": IGNORE, "train": told}
    if tile.kinds:
        content["rasters"] = {name: kind.as_dict() for name, kind in tile.kinds.items()}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / "classes.json").write_text(text + "\n", encoding="utf-8")
    return told


def main() -> None:
    parser = Parser(prog="prepare.py", description="Cuts an orthophoto with labels into tiles.")
    add = parser.add_argument
    add("--image", type=Path, required=True, help="image of three or more bands (TIFF, PNG, JPEG)")
    add("--dsm", type=Path, help="heights of the same size, or a GeoTIFF on another grid")
    about = "another raster for the tiles; may be repeated"
    add("--raster", **{**RASTER_FLAG, "help": about})
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
    kinds = {n: read_kind(n, {}, "--raster") for n, _ in args.raster if n not in ("image", "dsm")}
    ordered("+".join(["image", *kinds]), "--raster")
    given = files_given(args) | ({"labels": args.labels} if args.labels else {})
    drawn = {"polygons": args.polygons} if args.polygons else {}
    for name, path in (given | drawn).items():
        if not path.is_file():
            flag = f"--raster {name}" if name in dict(args.raster) else f"--{name}"
            raise DataError(f"{flag} {path}: is no file; give one that is there")
    if args.block < LEAST:
        parser.error(f"--block {args.block}: give {LEAST} pixels or more")
    if not (0 < args.test < 1 and 0 <= args.val < 1 - args.test) or args.seed < 0:
        parser.error("--test and --val are shares above 0 and below 1 together, --seed 0 or more")
    here = args.out.resolve() == Path.cwd()  # which cannot be replaced
    if args.out.exists() and (here or not args.out.is_dir() or any(args.out.iterdir())):
        raise DataError(f"--out {args.out}: is there already; give a new folder")
    tile = Tile(args.image.stem, given, (), kinds=kinds)
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
    command = typed("train.py", "--data", "tiles", "--root", args.out, *told)
    print(f"{args.out}: look at {args.out / 'split.png'}")
    print(f"next: {command}  # without a GPU: --encoder vit_t")


if __name__ == "__main__":
    run_script(main, DataError)
