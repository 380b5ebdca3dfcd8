"""One way to pixels: a raster is opened from its header, and `raster[rows, columns]` reads what is
asked for. `raster[:, :]` is the whole. Knows no data set.

TIFFs are read segment by segment (see codecs.py), PNG and JPEG as a whole at the first slice. What
cannot be read exactly is refused. Every mistake is a DataError of one line that names the file.

Shapes: `H, W` pixels of a raster, `h, w` of a slice, `C` bands, bands last."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Callable, Iterator
from xml.etree import ElementTree

import numpy as np
import tifffile
from tifffile import PHOTOMETRIC

from geodata.codecs import JPEG, LZW, NONE, REWRITE, Codec, lzw_size, open_picture

GEO_TAGS = (
    33550,
    33922,
    34264,
    34735,
    34736,
    34737,
)  # scale, tie point, matrix; keys, their values
GDAL_METADATA, NODATA = 42112, 42113
LARGE = 1 << 18  # bytes of a segment of LZW beyond which its size is taken on trust
MASK = 4  # the bit of NewSubfileType
STRIP = 512  # rows that are worked on at a time, so that temporary arrays stay small
PNG, JFIF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
CONVERT = "gdal_translate IN OUT.tif"
COLOURS = {0: "grey", 1: "grey", 2: "rgb", 3: "palette", 4: "grey", 6: "rgb"}  # PHOTOMETRIC
METRES = {  # of GDAL's names of units; none and an unknown one are taken for metres
    **dict.fromkeys(("ft", "foot", "feet", "international foot"), 0.3048),
    **dict.fromkeys(("us survey foot", "us survey feet", "ftus", "us-ft"), 1200 / 3937),
    **dict.fromkeys(("cm", "centimetre", "centimeter", "centimetres", "centimeters"), 0.01),
    **dict.fromkeys(("dm", "decimetre", "decimeter", "decimetres", "decimeters"), 0.1),
    **dict.fromkeys(("mm", "millimetre", "millimeter", "millimetres", "millimeters"), 0.001),
}


METRES_OF_CODE = {9002: 0.3048, 9003: 1200 / 3937}  # GeoTIFF's numbers of feet


class DataError(ValueError):
    """A mistake in the data or in what was asked of them; the message names the file and says what
    to do."""


def unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path}: cannot be read ({one_line(error)}); replace the file")


def one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def row_strips(raster) -> Iterator[np.ndarray]:
    """An array, or what slices like one, from top to bottom in strips of at most STRIP rows."""
    for box in strip_boxes(raster.shape):
        yield raster[box]


def strip_boxes(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    for top in range(0, shape[0], STRIP):
        yield np.s_[top : min(top + STRIP, shape[0]), 0 : shape[1]]


def ranges(box: tuple[slice, slice], shape: tuple[int, ...]) -> tuple[range, range]:
    return tuple(range(*part.indices(n)) for part, n in zip(box, shape))


@dataclass
class Raster:
    """A file behind slices. A slice is an array in the type of the file, (h, w) or (h, w, C)."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    segment: tuple[int, int]  # height and width of the segments that the file is cut into
    codec: Codec | None = None  # None: a picture
    places: np.ndarray | None = None  # (segments, 2): offset and bytes; 0 bytes: left out
    colours: str = "grey"  # or rgb, palette
    palette: np.ndarray | None = None  # (N, 3) uint8
    nodata: float | None = None
    alpha: int | None = None  # the band that says how opaque a pixel is
    mask: Raster | None = None  # 0 where there is no data
    scale: float = 1.0  # of the first band: what is meant is value * scale + offset, in metres
    offset: float = 0.0
    geo: dict = field(default_factory=dict)  # tags and GeoTIFF keys that say where it lies
    blocks: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)  # decoded segments

    nbytes = 0  # of memory that lasts

    @property
    def bands(self) -> int:
        return self.shape[2] if len(self.shape) == 3 else 1

    @property
    def planes(self) -> int:
        """Bands that lie one after the other in the file; 1 where pixels lie side by side."""
        return self.bands if self.codec and self.codec.samples < self.bands else 1

    @property
    def across(self) -> int:
        """Segments side by side."""
        return -(-self.shape[1] // self.segment[1])

    @property
    def in_parts(self) -> bool:
        """Whether slices cost about what they hold: whether segments are small."""
        pixels = self.segment[0] * self.segment[1] * self.bands // self.planes
        return self._in_rows or bool(self.codec) and pixels * self.dtype.itemsize <= 1 << 22

    def __getitem__(self, box: tuple[slice, slice]) -> np.ndarray:
        rows, columns = ranges(box, self.shape)
        try:
            if self._in_rows:
                out = self._rows(rows, columns)
            else:
                out = self._from_blocks(rows, columns)
        except DataError:
            raise
        except Exception as error:  # a damaged file makes decoders raise anything
            raise unreadable(self.path, error) from error
        return out.reshape(len(rows), len(columns), *self.shape[2:])

    @cached_property
    def _in_rows(self) -> bool:
        """Whether rows lie uncompressed in one piece. They are then read one by one, which takes a
        third of the time of a memory map, whose every row is a page fault."""
        if self.codec is None or self.planes > 1 or self.segment[1] != self.shape[1]:
            return False
        plain = self.codec.compression == NONE and self.codec.predictor == 1
        ends = self.places.sum(axis=1)
        whole = self.codec.bits == 8 * self.dtype.itemsize and bool(self.places.all())
        return plain and whole and bool((ends[:-1] == self.places[1:, 0]).all())

    def _rows(self, rows: range, columns: range) -> np.ndarray:
        pixels = np.empty((len(rows), len(columns), self.bands), self.codec.dtype)
        pixel, start = self.codec.dtype.itemsize * self.bands, int(self.places[0, 0])
        with open(self.path, "rb", buffering=0) as file:
            for row, into in zip(rows, pixels):
                file.seek(start + (row * self.shape[1] + columns.start) * pixel)
                if file.readinto(into) < into.nbytes:
                    raise ValueError("truncated while it was in use")
        return pixels.astype(self.dtype, copy=False)

    def _from_blocks(self, rows: range, columns: range) -> np.ndarray:
        out = np.empty((len(rows), len(columns), self.bands), self.dtype)
        (height, width), samples = self.segment, self.bands // self.planes
        down = -(-self.shape[0] // height)
        # Made for reading downwards: segments above a slice go, and those far below it, so that
        # overlapping windows decode each once and random crops keep few.
        first, last = rows.start // height, (rows.stop + STRIP) // height
        self.blocks = {at: b for at, b in self.blocks.items() if first <= at[0] <= last}
        for i in range(first, -(-rows.stop // height)):
            for j in range(columns.start // width, -(-columns.stop // width)):
                top, left = i * height, j * width
                of_out, of_block = zip(*(
                    _common(part, start, n)
                    for part, start, n in ((rows, top, height), (columns, left, width))
                ))  # fmt: skip
                for plane in range(self.planes):
                    index = (plane * down + i) * self.across + j
                    if (i, index) not in self.blocks:
                        self.blocks[i, index] = self._decode(index, top)
                    bands = slice(plane * samples, (plane + 1) * samples)
                    out[(*of_out, bands)] = self.blocks[i, index][of_block]
        return out

    def _decode(self, index: int, top: int) -> np.ndarray:
        """A segment (h, w, S); one of strips ends where the raster does."""
        if self.codec is None:
            return _picture_pixels(self.path, self.shape)
        h, w = self.segment
        h = h if self.codec.tiled else min(h, self.shape[0] - top)
        if not self.places[index, 1]:  # left out, which means no data
            fill = 0 if self.nodata is None else self.nodata
            return np.full((h, w, self.codec.samples), fill, self.dtype)
        return self.codec.unpack(self.packed(index), h, w, index, self.segment[0])

    def packed(self, index: int) -> bytes:
        """A segment as it is in the file."""
        offset, count = map(int, self.places[index])
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(count)

    def valid(self, box: tuple[slice, slice], pixels: np.ndarray) -> np.ndarray | None:
        """(h, w) bool, where `pixels`, the slice of `box`, are data; None for a raster without such
        a thing. They are none where the mask or the alpha band is 0, and where every other band has
        the no-data value."""
        out = None if self.mask is None else self.mask[box] != 0
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        if self.alpha is not None:
            opaque = pixels[..., self.alpha] != 0
            out = opaque if out is None else out & opaque
        if self.nodata is not None:
            colors = [band for band in range(pixels.shape[2]) if band != self.alpha]
            is_data = pixels[..., colors] != self.dtype.type(self.nodata)
            if self.nodata != self.nodata:
                is_data = pixels[..., colors] == pixels[..., colors]
            out = is_data.any(axis=-1) if out is None else out & is_data.any(axis=-1)
        return out

    @property
    def has_holes(self) -> bool:
        return not self.mask is self.alpha is self.nodata is None

    def in_memory(self) -> Raster:
        """The same, held as it is in the file."""
        held = Held(**{name: getattr(self, name) for name in self.__dataclass_fields__})
        held.array = np.ascontiguousarray(self[:, :])
        held.mask = self.mask and self.mask.in_memory()
        return held

    def __getstate__(self) -> dict:
        return {**self.__dict__, "blocks": {}}


class Held(Raster):
    """A raster in memory, in the type of its file: uint8 heights take a quarter of float32."""

    array: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.array.nbytes + (self.mask.nbytes if self.mask else 0)

    def __getitem__(self, box: tuple[slice, slice]) -> np.ndarray:
        return self.array[box]


@dataclass
class View:
    """What `read(box)` gives, as far as `shape` reaches: slices like an array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, slice]], np.ndarray]
    nbytes: int = 0  # of memory that lasts

    def __getitem__(self, box: tuple[slice, slice]) -> np.ndarray:
        return self.read(tuple(slice(part.start, part.stop) for part in ranges(box, self.shape)))


def _common(part: range, start: int, n: int) -> tuple[slice, slice]:
    """Where `part` and the n pixels from `start` on meet: as a slice of either."""
    low, high = max(part.start, start), min(part.stop, start + n)
    return slice(low - part.start, high - part.start), slice(low - start, high - start)


# ------------------------------------------------------------------------------------------ opening


def open_raster(path: Path) -> Raster:
    """A TIFF, PNG or JPEG, whatever its ending, from its header. Raises DataError by file."""
    try:
        with open(path, "rb") as file:
            magic = file.read(8)
        if magic[:4] in TIFF:
            raster = _open_tiff(path)
        elif magic == PNG or magic[:3] == JFIF:
            raster = _open_picture(path)
        else:
            raise DataError(f"{path}: no TIFF, PNG or JPEG; convert it: {CONVERT}")
        _read_sidecar(raster)
        if raster.mask is None:
            raster.mask = _mask_beside(raster)
        return raster
    except DataError:
        raise
    except Exception as error:  # as above
        raise unreadable(path, error) from error


def read_raster(path: Path) -> np.ndarray:
    """(H, W) or (H, W, C) in the file's own type. Raises DataError by file."""
    return open_raster(path)[:, :]


def _open_tiff(path: Path) -> Raster:
    with _strict(), tifffile.TiffFile(path) as tiff:
        raster = _of_page(path, tiff, tiff.pages[0])
        for page in tiff.pages[1:]:
            if page.subfiletype == MASK and page.shape[:2] == raster.shape[:2]:
                raster.mask = _of_page(path, tiff, page)
                break
        return raster


def _of_page(path: Path, tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> Raster:
    tags, photometric = page.tags, int(page.photometric)
    if photometric not in COLOURS or photometric == PHOTOMETRIC.YCBCR and page.compression != JPEG:
        name = getattr(page.photometric, "name", photometric)
        raise DataError(f"{path}: its colours are {name}; convert them to RGB first")
    if page.dtype is None or page.dtype.kind not in "biuf" or page.imagedepth > 1:
        raise DataError(
            f"{path}: pixels of {page.bitspersample} bits "
            f"({getattr(page.sampleformat, 'name', '?')})"
            f" are not read; convert them: gdal_translate -ot Float32 IN OUT.tif"
        )
    if page.fillorder != 1:
        raise DataError(f"{path}: its bits lie backwards (FillOrder); rewrite it: {REWRITE}")
    separate = page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    dtype = np.dtype("u1") if page.dtype.kind == "b" else np.dtype(page.dtype)
    subsampling = page.subsampling or (2, 2)
    codec = Codec(
        path, int(page.compression), int(page.predictor), page.bitspersample,
        dtype.newbyteorder(tiff.byteorder), 1 if separate else page.samplesperpixel,
        photometric, page.jpegtables, tuple(int(n) for n in subsampling), page.is_tiled,
    )  # fmt: skip
    if problem := codec.problem():
        raise DataError(f"{path}: {problem}")
    height, width = page.chunks[:2]
    bands = (page.samplesperpixel,) if page.samplesperpixel > 1 else ()
    raster = Raster(
        path, (int(page.imagelength), int(page.imagewidth), *bands), dtype,
        (int(height), int(width)), codec, _places(path, tiff, page), COLOURS[photometric],
        nodata=_nodata(tags.valueof(NODATA), dtype), alpha=_alpha(page),
    )  # fmt: skip
    if photometric == PHOTOMETRIC.PALETTE:
        raster.palette = (np.array(page.colormap) >> 8).astype(np.uint8).T
    raster.geo = {code: tags.valueof(code) for code in GEO_TAGS if code in tags}
    raster.geo |= page.geotiff_tags or {}
    raster.geo["GDAL"] = _items(tags.valueof(GDAL_METADATA))
    _check_sizes(raster)
    return raster


def _places(path: Path, tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> np.ndarray:
    """(segments, 2) int64, offset and bytes. Raises DataError for a truncated file, and where the
    header contradicts itself."""
    lists = [page.tags.valueof(324) or page.tags.valueof(273)]
    lists.append(page.tags.valueof(325) or page.tags.valueof(279) or page.databytecounts)
    offsets, counts = (np.atleast_1d(np.array(values, np.int64)) for values in lists)
    wanted = int(np.prod(page.chunked))
    if min(page.chunks) < 1 or not len(offsets) == len(counts) == wanted:
        raise DataError(
            f"{path}: its header contradicts itself ({wanted} segments by the size of the raster, "
            f"{len(offsets)} listed); fetch the file again"
        )
    places = np.stack([offsets, np.where(offsets > 0, counts, 0)], axis=1)
    end = int(places.sum(axis=1)[places[:, 1] > 0].max(initial=0))
    if end > tiff.filehandle.size:
        raise DataError(
            f"{path}: truncated, {tiff.filehandle.size} bytes of {end}; fetch the file again"
        )
    return places


def _check_sizes(raster: Raster) -> None:
    """Raises DataError where segments are not of the bytes that the header declares: all those that
    are not compressed, and of LZW, of which that shows nowhere else, the first."""
    codec, (height, width) = raster.codec, raster.segment
    row, down = -(-width * codec.samples * codec.bits // 8), -(-raster.shape[0] // height)
    most = np.full((raster.planes, down, raster.across), row * height)
    least = most.copy()
    if not codec.tiled:
        least[:, -1] = row * (raster.shape[0] - height * (down - 1))
    sizes = raster.places[:, 1].reshape(least.shape)
    if codec.compression == LZW:
        first = int(np.argmax(sizes > 0))
        packed = b"" if sizes.flat[first] > LARGE else raster.packed(first)
        sizes = np.zeros_like(least)
        sizes.flat[first] = lzw_size(packed)
    elif codec.compression != NONE:
        return
    if ((sizes > 0) & ((sizes < least) | (sizes > most))).any():
        raise DataError(
            f"{raster.path}: segments hold {sizes.max()} bytes of pixels where its header declares "
            f"{most.flat[0]} ({codec.bits}-bit, {raster.shape[1]} columns); write the file again"
        )


def _alpha(page: tifffile.TiffPage) -> int | None:
    kinds = [int(kind) for kind in page.extrasamples]
    alpha = next((i for i, kind in enumerate(kinds) if kind in (1, 2)), None)
    return None if alpha is None else page.samplesperpixel - len(kinds) + alpha


def _nodata(text: object, dtype: np.dtype) -> float | None:
    """A no-data value as the file's type holds it; None where it cannot."""
    try:
        value = float(str(text).strip("\0 ").replace(",", "."))
    except ValueError:
        return None
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return float(dtype.type(value))
    ends = np.iinfo(dtype)
    return int(value) if value == value and ends.min <= value <= ends.max else None


def _open_picture(path: Path) -> Raster:
    with open_picture(path, "PNG", "JPEG") as image:
        if image.mode == "CMYK":
            raise DataError(f"{path}: its colours are CMYK; convert them to RGB first")
        bands, depth = image.getbands(), _png_depth(path)
        if depth == 16 and len(bands) > 1:  # which Pillow cuts to 8
            raise DataError(
                f"{path}: a PNG of 16 bits and {len(bands)} bands; convert it: {CONVERT}"
            )
        dtype = np.dtype("u2" if image.mode.startswith("I") else "u1")
        shape = (image.height, image.width, *([len(bands)] if len(bands) > 1 else []))
        raster = Raster(path, shape, dtype, (image.height, image.width))
        raster.colours = {"P": "palette", "RGB": "rgb", "RGBA": "rgb"}.get(image.mode, "grey")
        raster.alpha = bands.index("A") if "A" in bands else None
        if image.mode == "P":
            raster.palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        elif isinstance(clear := image.info.get("transparency"), int):
            raster.nodata = clear
        return raster


GREY_STEPS = {1: 255, 2: 85, 4: 17}  # by which Pillow stretches grey of few bits


def _png_depth(path: Path) -> int:
    with open(path, "rb") as file:
        head = file.read(26)
    return head[24] if head.startswith(PNG) else 8


def _picture_pixels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    with open_picture(path, "PNG", "JPEG") as image:
        pixels = np.asarray(image)
    if pixels.dtype != bool and image.mode == "L":
        pixels = pixels // np.uint8(GREY_STEPS.get(_png_depth(path), 1))
    return pixels.astype(np.uint16 if image.mode.startswith("I") else np.uint8).reshape(
        *shape[:2], -1
    )


# ---------------------------------------------------------------------- what stands beside the file


def _items(text: object) -> dict[str, str]:
    """Scale, offset and unit of the first band, out of the XML in GDAL's tag."""
    try:
        root = ElementTree.fromstring(str(text or "<none/>"))
    except ElementTree.ParseError:
        return {}
    return {e.get("role"): e.text for e in root.iter("Item") if e.get("sample", "0") == "0"}


def _read_sidecar(raster: Raster) -> None:
    """What GDAL says in a file of its own (.aux.xml), as far as the raster does not say it."""
    path, told = raster.path.with_name(raster.path.name + ".aux.xml"), {}
    if path.is_file():
        root = ElementTree.parse(path).getroot()
        band = root.find("PAMRasterBand[@band='1']")
        names = {"scale": "Scale", "offset": "Offset", "unittype": "UnitType"}
        if band is not None:
            told = {role: v for role, name in names.items() if (v := band.findtext(name))}
            if raster.nodata is None and (value := band.findtext("NoDataValue")):
                raster.nodata = _nodata(value, raster.dtype)
        if place := root.findtext("GeoTransform"):
            raster.geo["GeoTransform"] = tuple(float(part) for part in place.split(","))
    told |= raster.geo.pop("GDAL", {})
    unit = METRES_OF_CODE.get(int(raster.geo.get("VerticalUnitsGeoKey", 0)), 1.0)
    unit = METRES.get(str(told.get("unittype", "")).strip().lower(), unit)
    raster.scale = float(told.get("scale", 1)) * unit
    raster.offset = float(told.get("offset", 0)) * unit


def _mask_beside(raster: Raster) -> Raster | None:
    """The mask that GDAL keeps in a file of its own (.msk)."""
    path = raster.path.with_name(raster.path.name + ".msk")
    if not path.is_file():
        return None
    mask = _open_tiff(path)
    if mask.shape[:2] != raster.shape[:2]:
        raise DataError(
            f"{path}: a mask of {mask.shape[:2]} pixels for {raster.shape[:2]}; delete it, or make "
            f"it anew"
        )
    return mask


@contextmanager
def _strict() -> Iterator[None]:
    """tifffile logs what it stumbles over and reads on: an error of a header is one here."""
    logger, heard = logging.getLogger("tifffile"), []
    logger.addFilter(hear := lambda record: heard.append(record) or False)
    try:
        yield
    finally:
        logger.removeFilter(hear)
    for record in heard:
        if record.levelno >= logging.ERROR:
            raise ValueError(f"its header is damaged: {record.getMessage()}")
