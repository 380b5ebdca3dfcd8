"""Writing maps: TIFFs or PNGs that other programs understand and lay where the image lies.

A TIFF carries the image's georeference in its tags, and a large one smaller copies of itself
(overviews) in the order of a cloud-optimised GeoTIFF; a PNG has a world file (.pgw) beside it. A
class map holds class indices with a colour table; everything else is in whole percent, which a GIS
shows and thresholds without a scale factor, and which takes a quarter of the bytes of floats. 255
is no data in all of them. TIFFs name their bands for GDAL in a tag; the names of classes, and of
the band of a PNG, are in GDAL's sidecar (.aux.xml), names and colours in QGIS's (.qml). Polygons of
a map are a GeoJSON.

Shapes: `H, W` pixels of the map, `n` rows of a strip, `C` bands of all outputs, one after the
other."""

from __future__ import annotations

import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Callable, Iterable, Iterator
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import tifffile
from PIL import Image

from engine.files import replace_together
from geodata.geojson import write_regions
from geodata.grids import Grid, geo_tags, read_grid
from geodata.labels import labels_to_colors
from geodata.layouts import Classes
from geodata.polygons import trace
from geodata.rasters import GDAL_METADATA, NODATA
from geodata.slices import DataError, View

TIFF_ENDINGS = (".tif", ".tiff")
POLYGONS = ".geojson"
ENDINGS = (".png", *TIFF_ENDINGS)
NO_DATA = 255  # no class, and no percentage
SIDE = 256  # pixels of a TIFF's tile
CLASSIC = 2**32 - 2**25  # bytes that 32-bit offsets reach, with room for what is not pixels


@dataclass(frozen=True)
class Output:
    """A file to be written."""

    path: Path
    bands: tuple[str, ...]  # their names; of polygons the class and the confidence
    classes: Classes = ()  # whose indices it holds; without, it holds percent
    smallest: int = 1  # pixels of a polygon

    @property
    def is_polygons(self) -> bool:
        return self.path.suffix.lower() == POLYGONS

    @property
    def is_tiff(self) -> bool:
        return self.path.suffix.lower() in TIFF_ENDINGS

    @property
    def palette(self) -> np.ndarray:
        """(256, 3) uint8."""
        return labels_to_colors(np.arange(256), [color for _, color in self.classes])


def write_maps(
    outputs: list[Output],
    strips: Iterable[np.ndarray],
    size: tuple[int, int],
    source: Path | None = None,
) -> None:
    """Maps of `size` (H, W) that lie where the raster `source` does, from `strips` (C, n, W) uint8,
    top to bottom.

    No file is there before all are whole, and none keeps what lay beside an earlier one. The strips
    wait on the disk, because the tiles of overviews come first in a file."""
    tags, grid = (geo_tags(source), read_grid(source)) if source else ([], None)
    beside = {path: text for o in outputs for path, text in sidecars(o, source, grid).items()}
    texts = {path: text for path, text in beside.items() if text is not None}

    def write(*temporary: Path) -> None:
        with tempfile.TemporaryFile(dir=temporary[0].parent) as file:
            bands, first = Scratch(file, (sum(len(o.bands) for o in outputs), *size)), 0
            bands.write(strips)
            for path, output in zip(temporary, outputs):
                if output.is_polygons:
                    maps = bands.band(first), bands.band(first + 1)
                    write_regions(path, trace(*maps, output.smallest), output.classes, grid)
                elif output.is_tiff:
                    _write_tiff(path, output, bands, first, tags)
                else:
                    _write_png(path, output, bands, first)
                first += len(output.bands)
        for path, text in zip(temporary[len(outputs) :], texts.values()):
            path.write_text(text, encoding="utf-8")
        for path in beside.keys() - texts.keys():
            path.unlink(missing_ok=True)

    replace_together([*(output.path for output in outputs), *texts], write)


@dataclass
class Scratch:
    """Bands (C, H, W) uint8 in a file. It is mapped anew for each look, so that no page of it stays
    in memory."""

    file: IO[bytes]
    shape: tuple[int, int, int]

    def write(self, strips: Iterable[np.ndarray]) -> None:
        top, (_, H, W) = 0, self.shape
        for strip in strips:  # (C, n, W)
            for band, rows in enumerate(strip):
                self.file.seek((band * H + top) * W)
                self.file.write(np.ascontiguousarray(rows))
            top += strip.shape[1]
        self.file.flush()

    def mapped(self) -> np.ndarray:
        return np.asarray(np.memmap(self.file, np.uint8, "r", shape=self.shape))

    def band(self, number: int) -> View:
        return View(self.shape[1:], np.dtype(np.uint8), lambda box: self.mapped()[number][box])


def sidecars(output: Output, source: Path | None, grid: Grid | None) -> dict[Path, str | None]:
    """The text of each file that may lie beside an output; None where none belongs there."""
    path, about = output.path, ""
    if output.is_polygons:
        return {}
    if output.classes:
        names = "".join(f"<Category>{escape(name)}</Category>" for name, _ in output.classes)
        about = f"<CategoryNames>{names}</CategoryNames>"
    elif not output.is_tiff:
        name = escape(output.bands[0])
        about = f"<Description>{name}</Description><UnitType>percent</UnitType>"
    whole = f'<PAMDataset><PAMRasterBand band="1">{about}</PAMRasterBand></PAMDataset>\n'
    texts = {".aux.xml": whole if about else None, ".ovr": None, ".msk": None}
    beside = {path.with_name(path.name + ending): text for ending, text in texts.items()}
    # The world file and the style of the image itself are none of the map's.
    same = source is not None and source.with_suffix("") == path.with_suffix("")
    if not output.is_tiff:
        beside[path.with_suffix(".pgw")] = grid and grid.world_file()
    elif not same:
        beside[path.with_suffix(".tfw")] = None
    if output.classes and not same:
        beside[path.with_suffix(".qml")] = _qgis_style(output.classes)
    return beside


def _qgis_style(classes: Classes) -> str:
    """A layer style, which QGIS takes from beside a raster of the same name."""
    entry = '<paletteEntry value="{}" color="#{:02x}{:02x}{:02x}" alpha="255" label={}/>'
    entries = (entry.format(k, *rgb, quoteattr(name)) for k, (name, rgb) in enumerate(classes))
    return (
        '<qgis version="3.0"><pipe><rasterrenderer type="paletted" band="1" opacity="1" '
        f'alphaBand="-1"><colorPalette>{"".join(entries)}</colorPalette></rasterrenderer></pipe>'
        "</qgis>\n"
    )


def _write_tiff(path: Path, output: Output, pixels: Scratch, first: int, tags: list[tuple]) -> None:
    """A TIFF in deflate tiles, band after band.

    A cloud-optimised one has the directories of all sizes first, and the tiles of the smallest
    before those of larger ones. tifffile puts tiles behind each directory, so it writes directories
    of empty tiles; what they hold is appended, and where it lies is entered at the end."""
    C, (_, H, W), factors = len(output.bands), pixels.shape, [1]
    while max(H, W) > 2 * SIDE * factors[-1]:
        factors.append(2 * factors[-1])
    sizes = [(-(-H // f), -(-W // f)) for f in factors]
    tiles = [C * -(-h // SIDE) * -(-w // SIDE) for h, w in sizes]
    options = dict(dtype=np.uint8, tile=(SIDE, SIDE), compression="zlib", metadata=None)
    options |= dict(photometric="minisblack", planarconfig="separate" if C > 1 else None)
    if output.classes:  # TIFF's colour tables are of 16 bit
        options |= dict(photometric="palette", colormap=output.palette.T.astype(np.uint16) * 257)
    nodata = (NODATA, "s", 0, str(NO_DATA), True)
    about = [*tags, (GDAL_METADATA, "s", 0, _gdal_metadata(output), True)]
    # At the worst nothing can be compressed.
    with tifffile.TiffWriter(path, bigtiff=sum(tiles) * SIDE**2 > CLASSIC) as writer:
        for level, (size, count) in enumerate(zip(sizes, tiles)):
            options |= dict(shape=(C, *size) if C > 1 else size, subfiletype=min(level, 1))
            extra = [nodata] if level else [nodata, *about]
            writer.write(iter([b""] * count), extratags=extra, **options)
    places = []
    with open(path, "ab") as file:
        for factor in factors[::-1]:
            packed = map(zlib.compress, _tiles(pixels, range(first, first + C), factor))
            places.append([(file.tell(), file.write(data)) for data in packed])
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for page, own in zip(tiff.pages, places[::-1]):
            for name, values in zip(("TileOffsets", "TileByteCounts"), zip(*own)):
                page.tags[name].overwrite(values)


def _tiles(pixels: Scratch, bands: range, factor: int) -> Iterator[np.ndarray]:
    """The tiles of every `factor`-th pixel, row by row, of one band after the other."""
    for band in bands:
        for top in range(0, pixels.shape[1], SIDE * factor):
            rows = pixels.mapped()[band, top : top + SIDE * factor : factor, ::factor]
            height, width = rows.shape
            edge = [(0, SIDE - height), (0, -width % SIDE)]
            rows = np.pad(rows, edge, constant_values=NO_DATA)
            for left in range(0, width, SIDE):
                yield np.ascontiguousarray(rows[:, left : left + SIDE])


def _gdal_metadata(output: Output) -> bytes:
    """The names of the bands, and the unit of percentages, as GDAL keeps them in a TIFF."""
    item, items = '<Item name="{}" sample="{}" role="{}">{}</Item>', ""
    for i, band in enumerate(output.bands):
        items += item.format("DESCRIPTION", i, "description", escape(band))
        if not output.classes:
            items += item.format("UNITTYPE", i, "unittype", "percent")
    return f"<GDALMetadata>{items}</GDALMetadata>".encode()


def _write_png(path: Path, output: Output, pixels: Scratch, band: int) -> None:
    mode, (_, H, W) = "P" if output.classes else "L", pixels.shape
    picture = Image.frombuffer(mode, (W, H), pixels.mapped()[band], "raw", mode, 0, 1)
    clear: bytes | int = NO_DATA
    if output.classes:
        picture.putpalette(output.palette.tobytes())
        clear = b"\xff" * NO_DATA + b"\0"
    picture.save(path, "PNG", transparency=clear)


def cut_out(
    strips: Iterable[np.ndarray], missing: Callable[[slice], np.ndarray] | None
) -> Iterator[np.ndarray]:
    """Strips (C, n, W) with NO_DATA in every band where the image has no data."""
    top = 0
    for strip in strips:
        if missing is not None:
            strip = np.where(missing(slice(top, top + strip.shape[1])), np.uint8(NO_DATA), strip)
        top += strip.shape[1]
        yield strip


def check_outputs(
    paths: dict[str, Path], sources: Iterable[Path], folders: Iterable[Path] = ()
) -> None:
    """Raises DataError, by flag, for a map that could not be written, or would overwrite another or
    a source of it. `folders` are going to be made."""
    made = [folder.resolve() for folder in folders]
    taken, own = {}, [source.resolve() for source in sources if source.exists()]
    for flag, path in paths.items():
        place, ending, problem = path.resolve(), path.suffix.lower(), None
        # On many systems A.tif and a.tif are one file.
        other = taken.setdefault(str(place).casefold(), flag)
        if flag == "--polygons" and ending != POLYGONS:
            problem = f"polygons are written as {POLYGONS}"
        elif flag != "--polygons" and ending not in ENDINGS:
            problem = "maps are written as .png or .tif"
        elif flag == "--probabilities" and ending not in TIFF_ENDINGS:
            problem = "a PNG has no bands for all classes; give a .tif"
        elif not place.parent.is_dir() and place.parent not in made:
            problem = "its folder does not exist"
        elif path.is_dir():
            problem = "is a folder; give a file"
        elif place in own:
            problem = "is one of the rasters to predict from; give another file"
        elif other != flag:
            problem = f"is the file of {other} too; give another file"
        if problem:
            raise DataError(f"{flag} {path}: {problem}")
