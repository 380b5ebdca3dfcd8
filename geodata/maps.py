"""Writing maps: TIFFs or PNGs that other programs understand and lay where the image lies.

A TIFF carries the image's georeference in its tags, and a large one smaller copies of itself
(overviews) in the order of a cloud-optimised GeoTIFF; a PNG has a world file (.pgw) beside it. A
class map holds class indices with a colour table; everything else is in whole percent, which a GIS
shows and thresholds without a scale factor, and which takes a quarter of the bytes of floats. 255
is no data in all of them. TIFFs name their bands for GDAL in a tag; the names of classes, and of
the band of a PNG, are in GDAL's sidecar (.aux.xml).

Shapes: `H, W` pixels of the map, `n` rows of a strip, `C` bands of all outputs, one after the
other."""

from __future__ import annotations

import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Callable, Iterable, Iterator
from xml.sax.saxutils import escape

import numpy as np
import tifffile
from PIL import Image

from engine.files import replace_together
from geodata.grids import geo_tags, read_grid
from geodata.layouts import Classes
from geodata.rasters import GDAL_METADATA, NODATA
from geodata.slices import DataError

TIFF_ENDINGS = (".tif", ".tiff")
ENDINGS = (".png", *TIFF_ENDINGS)
NO_DATA = 255  # no class, and no percentage
SIDE = 256  # pixels of a TIFF's tile
# Bytes that a TIFF of 32-bit offsets holds, with room for what is not pixels
CLASSIC = 2**32 - 2**25


@dataclass(frozen=True)
class Output:
    """A file to be written."""

    path: Path
    bands: tuple[str, ...]  # their names
    classes: Classes = ()  # whose indices it holds; without, it holds percent

    @property
    def palette(self) -> np.ndarray:
        """(256, 3) uint8."""
        palette = np.zeros((256, 3), dtype=np.uint8)
        palette[: len(self.classes)] = [color for _, color in self.classes]
        return palette


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
    beside = {path: text for output in outputs for path, text in sidecars(output, source).items()}
    texts = {path: text for path, text in beside.items() if text is not None}
    tags = geo_tags(source) if source else []

    def write(*temporary: Path) -> None:
        with tempfile.TemporaryFile(dir=temporary[0].parent) as file:
            bands = Scratch(file, (sum(len(output.bands) for output in outputs), *size))
            bands.write(strips)
            first = 0
            for path, output in zip(temporary, outputs):
                chosen = range(first, first + len(output.bands))
                if is_tiff(output.path):
                    _write_tiff(path, output, bands, chosen, tags)
                else:
                    _write_png(path, output, bands, first)
                first = chosen.stop
        for path, text in zip(temporary[len(outputs) :], texts.values()):
            path.write_text(text, encoding="utf-8")
        for path in beside.keys() - texts.keys():
            path.unlink(missing_ok=True)

    replace_together([*(output.path for output in outputs), *texts], write)


def is_tiff(path: Path) -> bool:
    return path.suffix.lower() in TIFF_ENDINGS


@dataclass
class Scratch:
    """Bands (C, H, W) uint8 in a file. It is mapped anew for each look, so that no page of it stays
    in memory."""

    file: IO[bytes]
    shape: tuple[int, int, int]

    def write(self, strips: Iterable[np.ndarray]) -> None:
        C, H, W = self.shape
        top = 0
        for strip in strips:  # (C, n, W)
            for band, rows in enumerate(strip):
                self.file.seek((band * H + top) * W)
                self.file.write(np.ascontiguousarray(rows))
            top += strip.shape[1]
        self.file.flush()

    def __getitem__(self, box) -> np.ndarray:
        return np.array(self.mapped()[box])

    def mapped(self) -> np.ndarray:
        return np.memmap(self.file, np.uint8, "r", shape=self.shape)


def sidecars(output: Output, source: Path | None) -> dict[Path, str | None]:
    """The text of each file that may lie beside an output; None where none belongs there."""
    path, metadata = output.path, ""
    if output.classes:
        metadata = "".join(f"<Category>{escape(name)}</Category>" for name, _ in output.classes)
        metadata = f"<CategoryNames>{metadata}</CategoryNames>"
    elif not is_tiff(path):
        name = escape(output.bands[0])
        metadata = f"<Description>{name}</Description><UnitType>percent</UnitType>"
    whole = f'<PAMDataset><PAMRasterBand band="1">{metadata}</PAMRasterBand></PAMDataset>\n'
    beside = {path.with_name(path.name + ".aux.xml"): whole if metadata else None}
    beside |= {path.with_name(path.name + ending): None for ending in (".ovr", ".msk")}
    if is_tiff(path):
        if source is None or source.with_suffix("") != path.with_suffix(""):
            beside[path.with_suffix(".tfw")] = None
    else:
        grid = None if source is None else read_grid(source)
        beside[path.with_suffix(".pgw")] = None if grid is None else grid.world_file()
    return beside


def _write_tiff(
    path: Path, output: Output, pixels: Scratch, bands: range, tags: list[tuple]
) -> None:
    """A TIFF in deflate tiles, band after band.

    A cloud-optimised one has the directories of all sizes first, and the tiles of the smallest
    before those of larger ones. tifffile puts tiles behind each directory, so it writes directories
    of empty tiles; what they hold is appended, and where it lies is entered at the end."""
    C, H, W = len(bands), *pixels.shape[1:]
    factors = [1]
    while max(H, W) > 2 * SIDE * factors[-1]:
        factors.append(2 * factors[-1])
    sizes = [(-(-H // f), -(-W // f)) for f in factors]
    tiles = [C * -(-h // SIDE) * -(-w // SIDE) for h, w in sizes]
    colours = {"photometric": "minisblack"}
    if output.classes:  # TIFF's colour tables are of 16 bit
        colours = {"photometric": "palette", "colormap": output.palette.T.astype(np.uint16) * 257}
    nodata = (NODATA, "s", 0, str(NO_DATA), True)
    about = [*tags, (GDAL_METADATA, "s", 0, _gdal_metadata(output), True)]
    # At the worst nothing can be compressed.
    with tifffile.TiffWriter(path, bigtiff=sum(tiles) * SIDE**2 > CLASSIC) as writer:
        for size, count in zip(sizes, tiles):
            writer.write(
                iter([b""] * count),
                shape=(C, *size) if C > 1 else size,
                dtype=np.uint8,
                tile=(SIDE, SIDE),
                planarconfig="separate" if C > 1 else None,
                compression="zlib",
                metadata=None,
                subfiletype=0 if size == (H, W) else 1,
                extratags=[nodata, *(about if size == (H, W) else [])],
                **colours,
            )
    places = []
    with open(path, "ab") as file:
        for factor in factors[::-1]:
            packed = (zlib.compress(tile) for tile in _tiles(pixels, bands, factor))
            places.append([(file.tell(), file.write(data)) for data in packed])
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for page, own in zip(tiff.pages, places[::-1]):
            for name, values in zip(("TileOffsets", "TileByteCounts"), zip(*own)):
                page.tags[name].overwrite(values)


def _tiles(pixels: Scratch, bands: range, factor: int) -> Iterator[np.ndarray]:
    """The tiles of every `factor`-th pixel, row by row, of one band after the other."""
    _, H, W = pixels.shape
    for band in bands:
        for top in range(0, H, SIDE * factor):
            rows = pixels[band, top : top + SIDE * factor : factor, ::factor]
            height, width = rows.shape
            edge = [(0, SIDE - height), (0, -width % SIDE)]
            rows = np.pad(rows, edge, constant_values=NO_DATA)
            for left in range(0, width, SIDE):
                yield np.ascontiguousarray(rows[:, left : left + SIDE])


def _gdal_metadata(output: Output) -> bytes:
    """The names of the bands as GDAL keeps them in a TIFF."""
    items = [
        f'name="DESCRIPTION" sample="{i}" role="description">{escape(band)}'
        for i, band in enumerate(output.bands)
    ]
    if not output.classes:
        items += [
            f'name="UNITTYPE" sample="{i}" role="unittype">percent'
            for i in range(len(output.bands))
        ]
    return (
        f"<GDALMetadata>{''.join(f'<Item {item}</Item>' for item in items)}</GDALMetadata>".encode()
    )


def _write_png(path: Path, output: Output, pixels: Scratch, band: int) -> None:
    _, H, W = pixels.shape
    mode = "P" if output.classes else "L"
    picture = Image.frombuffer(mode, (W, H), pixels.mapped()[band], "raw", mode, 0, 1)
    clear: bytes | int = NO_DATA
    if output.classes:
        picture.putpalette(output.palette.tobytes())
        clear = bytes(255 if i != NO_DATA else 0 for i in range(256))
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


def check_outputs(paths: dict[str, Path], sources: Iterable[Path]) -> None:
    """Raises DataError, by flag, for a map that could not be written, or would overwrite another or
    a source of it."""
    taken = {}
    for flag, path in paths.items():
        place = path.resolve()
        if path.suffix.lower() not in ENDINGS:
            raise DataError(f"{flag} {path}: maps are written as .png or .tif")
        if flag == "--probabilities" and not is_tiff(path):
            raise DataError(f"{flag} {path}: a PNG has no bands for all classes; give a .tif")
        if not place.parent.is_dir():
            raise DataError(f"{flag} {path}: its folder does not exist")
        if path.is_dir():
            raise DataError(f"{flag} {path}: is a folder; give a file")
        if any(source.exists() and place == source.resolve() for source in sources):
            raise DataError(
                f"{flag} {path}: is one of the rasters to predict from; give another file"
            )
        other = taken.setdefault(
            str(place).casefold(), flag
        )  # on many systems A.tif and a.tif are one file
        if other != flag:
            raise DataError(f"{flag} {path}: is the file of {other} too; give another file")
