"""Writing class maps: strip by strip into a TIFF or PNG that other programs understand and lay where the image lies.

A TIFF carries the image's georeferencing in its tags, a PNG has a world file (.pgw) beside it. Both hold class indices
with a colour table, 255 where there is no data, and GDAL's sidecar (.aux.xml), out of which it reads the classes' names.

Shapes: `H, W` pixels of the map, `n` rows of a strip.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Callable, Iterable, Iterator
from xml.sax.saxutils import escape

import numpy as np
import tifffile

from checkpoints import replace_atomically
from layouts import Classes
from rasters import NODATA, TIFF_ENDINGS, DataError, alpha_band, geo_tags, nodata_value, read_grid

ENDINGS = (".png", *TIFF_ENDINGS)
NO_CLASS = 255  # where the image has no data
SIDE = 256  # pixels of a TIFF's tile

Strips = Iterable[np.ndarray]  # (n, W) uint8, from top to bottom


def write_map(path: Path, strips: Strips, size: tuple[int, int], classes: Classes, source: Path | None = None) -> None:
    """A class map of `size` (H, W) that lies where the raster `source` does. No file is there before it is whole."""
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: len(classes)] = [color for _, color in classes]
    tiff = path.suffix.lower() in TIFF_ENDINGS
    world = None if tiff or source is None else world_file(source)
    if tiff:
        tags = geo_tags(source) if source else []
        replace_atomically(path, lambda p: _write_tiff(p, strips, size, palette, tags))
    else:
        replace_atomically(path, lambda p: _write_png(p, strips, size, palette))
    if world:
        replace_atomically(path.with_suffix(".pgw"), lambda p: p.write_text(world))
    names = "".join(f"<Category>{escape(name)}</Category>" for name, _ in classes)
    names = f'<PAMDataset><PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames></PAMRasterBand></PAMDataset>\n'
    replace_atomically(path.with_name(path.name + ".aux.xml"), lambda p: p.write_text(names, encoding="utf-8"))


def world_file(source: Path) -> str | None:
    """The six lines of a world file, None for a raster without georeferencing. Raises DataError for a rotated one."""
    grid = read_grid(source)
    if grid is None:
        return None
    x, y = grid.left + grid.step_x / 2, grid.top - grid.step_y / 2  # the middle of the first pixel
    return "".join(f"{value!r}\n" for value in (grid.step_x, 0.0, 0.0, -grid.step_y, x, y))


def _write_tiff(path: Path, strips: Strips, size: tuple[int, int], palette: np.ndarray, tags: list[tuple]) -> None:
    tifffile.imwrite(
        path,
        _tiles(strips, size),
        shape=size,
        dtype=np.uint8,
        tile=(SIDE, SIDE),
        photometric="palette",
        colormap=palette.T.astype(np.uint16) * 257,  # TIFF's colour tables are of 16 bit
        compression="zlib",
        maxworkers=1,  # more of them would fetch strips ahead
        metadata=None,
        extratags=[*tags, (NODATA, "s", 0, str(NO_CLASS), True)],
    )


def _tiles(strips: Strips, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The TIFF's tiles (SIDE, SIDE), row by row."""
    across = -(-size[1] // SIDE)
    for rows in _regroup(strips, SIDE):
        padded = np.full((SIDE, across * SIDE), NO_CLASS, np.uint8)
        padded[: len(rows), : size[1]] = rows
        for i in range(across):
            yield np.ascontiguousarray(padded[:, i * SIDE : (i + 1) * SIDE])


def _regroup(strips: Strips, height: int) -> Iterator[np.ndarray]:
    """Strips of any height -> strips of `height` rows, the last one of what is left."""
    waiting, n = [], 0
    for strip in strips:
        waiting.append(strip)
        n += len(strip)
        if n >= height:
            rows = np.concatenate(waiting)
            whole = n - n % height
            yield from (rows[top : top + height] for top in range(0, whole, height))
            waiting, n = [rows[whole:].copy()], n - whole
    if n:
        yield np.concatenate(waiting)


def _write_png(path: Path, strips: Strips, size: tuple[int, int], palette: np.ndarray) -> None:
    """By hand, because Pillow wants the whole map in memory."""
    transparent = bytes(255 if i != NO_CLASS else 0 for i in range(256))
    with open(path, "wb") as file:

        def chunk(kind: bytes, data: bytes) -> None:
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

        file.write(b"\x89PNG\r\n\x1a\n")
        chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8, 3, 0, 0, 0))  # 8 bits, with a palette
        chunk(b"PLTE", palette.tobytes())
        chunk(b"tRNS", transparent)
        packer = zlib.compressobj(6)
        for strip in strips:
            chunk(b"IDAT", packer.compress(np.pad(strip, [(0, 0), (1, 0)]).tobytes()))  # a row begins with its filter, none
        chunk(b"IDAT", packer.flush())
        chunk(b"IEND", b"")


def without_data(path: Path, raw) -> Callable[[slice], np.ndarray] | None:
    """For a slice of rows, where the image has no data: (n, W) bool; None for an image without such a thing.

    That is where its alpha band is 0, or where every other band has the file's no-data value. `raw` is the image as it
    is in the file, behind slices.
    """
    alpha, nodata = alpha_band(path), nodata_value(path)
    if alpha is None and nodata is None:
        return None

    def missing(rows: slice) -> np.ndarray:
        pixels = raw[rows, 0 : raw.shape[1]]
        colors = [band for band in range(pixels.shape[2]) if band != alpha]
        out = np.zeros(pixels.shape[:2], bool) if alpha is None else pixels[..., alpha] == 0
        return out if nodata is None else out | (pixels[..., colors] == nodata).all(axis=-1)

    return missing


def cut_out(strips: Strips, missing: Callable[[slice], np.ndarray] | None) -> Iterator[np.ndarray]:
    """Strips with NO_CLASS where the image has no data."""
    top = 0
    for strip in strips:
        if missing is not None:
            strip = np.where(missing(slice(top, top + len(strip))), np.uint8(NO_CLASS), strip)
        top += len(strip)
        yield strip


def check_out(path: Path, sources: Iterable[Path]) -> None:
    """Raises DataError for a map that could not be written, or would overwrite a raster it is made of."""
    folder = path.resolve().parent
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"--out {path}: the map is written as .png or .tif")
    if not folder.is_dir():
        raise DataError(f"--out {path}: its folder does not exist")
    if path.is_dir():
        raise DataError(f"--out {path}: is a folder; give a file")
    if any(source.exists() and path.resolve() == source.resolve() for source in sources):
        raise DataError(f"--out {path}: is one of the rasters to predict from; give another file")
