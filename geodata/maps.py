"""Writing maps: strip by strip into TIFFs or PNGs that other programs understand and lay where the
image lies.

A TIFF carries the image's georeferencing in its tags, a PNG has a world file (.pgw) beside it. A
class map holds class indices with a colour table; everything else is in whole percent, which a GIS
shows and thresholds without a scale factor, and which takes a quarter of the bytes of floats. 255
is no data in all of them. TIFFs name their bands for GDAL in a tag; the names of classes, and of
the band of a PNG, are in GDAL's sidecar (.aux.xml).

Shapes: `H, W` pixels of the map, `n` rows of a strip, `C` bands of all outputs, one after the
other."""

from __future__ import annotations

import struct
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator
from xml.sax.saxutils import escape

import numpy as np
import tifffile

from engine.files import replace_together
from geodata.layouts import Classes
from geodata.rasters import (
    NODATA,
    TIFF_ENDINGS,
    DataError,
    alpha_band,
    geo_tags,
    is_tiff,
    nodata_value,
    read_grid,
)

ENDINGS = (".png", *TIFF_ENDINGS)


GDAL_METADATA = 42112


NO_DATA = 255  # no class, and no percentage


SIDE = 256  # pixels of a TIFF's tile


CLASSIC = (
    2**32 - 2**25
)  # bytes that a TIFF of 32-bit offsets holds, with room for what is not pixels


Write = Callable[
    [np.ndarray], object
]  # takes the next rows of a file, (C, SIDE, W) uint8, at the end what is left


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

    No file is there before all are whole, and none keeps the sidecar of an earlier one.
    """
    beside = {path: text for output in outputs for path, text in sidecars(output, source).items()}
    texts = {path: text for path, text in beside.items() if text is not None}
    tags = geo_tags(source) if source else []

    def write(*temporary: Path) -> None:
        with ExitStack() as stack:
            writers = []
            for path, output in zip(temporary, outputs):
                file = (
                    _tiff(path, output, size, tags)
                    if is_tiff(output.path)
                    else _png(path, output, size)
                )
                writers.append(stack.enter_context(file))
            ends = np.cumsum([len(output.bands) for output in outputs])
            for rows in _regroup(strips, SIDE):
                for writer, bands in zip(writers, np.split(rows, ends[:-1])):
                    writer(bands)
        for path, text in zip(temporary[len(outputs) :], texts.values()):
            path.write_text(text, encoding="utf-8")
        for path in beside.keys() - texts.keys():
            path.unlink(missing_ok=True)

    replace_together([*(output.path for output in outputs), *texts], write)


def sidecars(output: Output, source: Path | None) -> dict[Path, str | None]:
    """The text of each file that may lie beside an output; None where none belongs there."""
    path, metadata = output.path, ""
    if output.classes:
        metadata = "".join(f"<Category>{escape(name)}</Category>" for name, _ in output.classes)
        metadata = f"<CategoryNames>{metadata}</CategoryNames>"
    elif not is_tiff(path):
        metadata = (
            f"<Description>{escape(output.bands[0])}</Description><UnitType>percent</UnitType>"
        )
    metadata = (
        f'<PAMDataset><PAMRasterBand band="1">{metadata}</PAMRasterBand></PAMDataset>\n'
        if metadata
        else None
    )
    beside = {path.with_name(path.name + ".aux.xml"): metadata}
    if not is_tiff(path):
        beside[path.with_suffix(".pgw")] = None if source is None else world_file(source)
    return beside


def world_file(source: Path) -> str | None:
    """The six lines of a world file, None for a raster without georeferencing. Raises DataError for
    a rotated one.
    """
    grid = read_grid(source)
    if grid is None:
        return None
    x, y = grid.left + grid.step_x / 2, grid.top - grid.step_y / 2  # the middle of the first pixel
    return "".join(f"{value!r}\n" for value in (grid.step_x, 0.0, 0.0, -grid.step_y, x, y))


@contextmanager
def _tiff(path: Path, output: Output, size: tuple[int, int], tags: list[tuple]) -> Iterator[Write]:
    """A TIFF in deflate tiles, band after band.

    tifffile fetches all pixels of a file by itself, and here several files grow at once. So it
    writes a file of empty tiles; what they hold is appended row by row, and where they lie is
    entered at the end."""
    C, down, across = len(output.bands), -(-size[0] // SIDE), -(-size[1] // SIDE)
    colours = {"photometric": "minisblack"}
    if output.classes:  # TIFF's colour tables are of 16 bit
        colours = {"photometric": "palette", "colormap": output.palette.T.astype(np.uint16) * 257}
    tifffile.imwrite(
        path,
        iter([b""] * (C * down * across)),
        shape=(C, *size) if C > 1 else size,
        dtype=np.uint8,
        tile=(SIDE, SIDE),
        planarconfig="separate" if C > 1 else None,
        compression="zlib",
        bigtiff=C * down * across * SIDE**2
        > CLASSIC,  # at the worst, where nothing can be compressed
        metadata=None,
        extratags=[
            *tags,
            (NODATA, "s", 0, str(NO_DATA), True),
            (GDAL_METADATA, "s", 0, _gdal_metadata(output), True),
        ],
        **colours,
    )
    places = [[] for _ in range(C)]  # of each band's tiles: (offset, bytes)
    with open(path, "ab") as file:

        def write(rows: np.ndarray) -> None:
            padded = np.full((C, SIDE, across * SIDE), NO_DATA, np.uint8)
            padded[:, : rows.shape[1], : size[1]] = rows
            for band, i in np.ndindex(C, across):
                packed = zlib.compress(padded[band, :, i * SIDE : (i + 1) * SIDE].tobytes())
                places[band].append((file.tell(), len(packed)))
                file.write(packed)

        yield write
    with tifffile.TiffFile(path, mode="r+") as tiff:
        found = tiff.pages[0].tags
        for name, values in zip(
            ("TileOffsets", "TileByteCounts"), zip(*(place for band in places for place in band))
        ):
            found[name].overwrite(values)


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


def _regroup(strips: Iterable[np.ndarray], height: int) -> Iterator[np.ndarray]:
    """Strips (C, n, W) of any height -> strips of `height` rows, the last one of what is left."""
    waiting, n = [], 0
    for strip in strips:
        waiting.append(strip)
        n += strip.shape[1]
        if n >= height:
            rows = np.concatenate(waiting, axis=1)
            whole = n - n % height
            yield from (rows[:, top : top + height] for top in range(0, whole, height))
            waiting, n = [rows[:, whole:].copy()], n - whole
    if n:
        yield np.concatenate(waiting, axis=1)


@contextmanager
def _png(path: Path, output: Output, size: tuple[int, int]) -> Iterator[Write]:
    """A PNG of one band, by hand, because Pillow wants the whole map in memory."""
    with open(path, "wb") as file:

        def chunk(kind: bytes, data: bytes) -> None:
            file.write(
                struct.pack(">I", len(data))
                + kind
                + data
                + struct.pack(">I", zlib.crc32(kind + data))
            )

        file.write(b"\x89PNG\r\n\x1a\n")
        chunk(
            b"IHDR",
            struct.pack(">IIBBBBB", size[1], size[0], 8, 3 if output.classes else 0, 0, 0, 0),
        )  # palette, grey
        if output.classes:
            chunk(b"PLTE", output.palette.tobytes())
            chunk(b"tRNS", bytes(255 if i != NO_DATA else 0 for i in range(256)))
        else:
            chunk(b"tRNS", struct.pack(">H", NO_DATA))
        packer = zlib.compressobj(6)
        # A row begins with its filter, which is none.
        yield lambda rows: chunk(
            b"IDAT", packer.compress(np.pad(rows[0], [(0, 0), (1, 0)]).tobytes())
        )
        chunk(b"IDAT", packer.flush())
        chunk(b"IEND", b"")


def without_data(path: Path, raw) -> Callable[[slice], np.ndarray] | None:
    """For a slice of rows, where the image has no data: (n, W) bool; None for an image without such
    a thing.

    That is where its alpha band is 0, or where every other band has the file's no-data value. `raw`
    is the image as it is in the file, behind slices."""
    alpha, nodata = alpha_band(path), nodata_value(path)
    if alpha is None and nodata is None:
        return None

    def missing(rows: slice) -> np.ndarray:
        pixels = raw[rows, 0 : raw.shape[1]]
        colors = [band for band in range(pixels.shape[2]) if band != alpha]
        out = np.zeros(pixels.shape[:2], bool) if alpha is None else pixels[..., alpha] == 0
        return out if nodata is None else out | (pixels[..., colors] == nodata).all(axis=-1)

    return missing


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
    a source of it.
    """
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
