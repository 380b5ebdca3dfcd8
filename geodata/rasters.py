"""Opening rasters: what the header of a TIFF, PNG or JPEG says, and what GDAL keeps beside it.

TIFFs are read segment by segment (see codecs.py), PNG and JPEG as a whole at the first slice. What
cannot be read exactly is refused. Every mistake is a DataError of one line that names the file."""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator
from xml.etree import ElementTree

import numpy as np
import tifffile
from tifffile import PHOTOMETRIC

from geodata.codecs import JPEG, LZW, NONE, PNG, REWRITE, Codec, lzw_size, open_picture, png_depth
from geodata.slices import DataError, Raster, one_line, unreadable

__all__ = ["DataError", "Raster", "one_line", "open_raster", "read_raster"]

# Scale, tie point, matrix; keys, their values: with their types
GEO_TAGS = {33550: "d", 33922: "d", 34264: "d", 34735: "H", 34736: "d", 34737: "s"}
GDAL_METADATA, NODATA = 42112, 42113
LARGE = 1 << 18  # bytes of a segment of LZW beyond which its size is taken on trust
MASK = 4  # the bit of NewSubfileType
JFIF = b"\xff\xd8\xff"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
CONVERT = "gdal_translate IN OUT.tif"
COLOURS = {0: "grey", 1: "grey", 2: "rgb", 3: "palette", 4: "grey", 6: "rgb"}  # PHOTOMETRIC
FOOT, SURVEY_FOOT = 0.3048, 1200 / 3937
FEET = {9002: FOOT, 9003: SURVEY_FOOT, "ft": FOOT, "ftUS": SURVEY_FOOT}  # of GeoTIFF
METRES = {  # of GDAL's names of units; an unknown one is that of the system, or else metres
    **dict.fromkeys(("m", "metre", "meter", "metres", "meters"), 1.0),
    **dict.fromkeys(("ft", "foot", "feet", "international foot"), FOOT),
    **dict.fromkeys(("us survey foot", "us survey feet", "ftus", "us-ft"), SURVEY_FOOT),
    **dict.fromkeys(("cm", "centimetre", "centimeter", "centimetres", "centimeters"), 0.01),
    **dict.fromkeys(("dm", "decimetre", "decimeter", "decimetres", "decimeters"), 0.1),
    **dict.fromkeys(("mm", "millimetre", "millimeter", "millimetres", "millimeters"), 0.001),
}


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
        _read_sidecar(raster, path.with_name(path.name + ".aux.xml"))
        mask = path.with_name(path.name + ".msk")
        if raster.mask is None and mask.is_file():
            raster.mask = _open_tiff(mask)
            if raster.mask.shape[:2] != raster.shape[:2]:
                sizes = f"{raster.mask.shape[:2]} pixels for {raster.shape[:2]}"
                raise DataError(f"{mask}: a mask of {sizes}; delete it, or make it anew")
        return raster
    except DataError:
        raise
    except Exception as error:  # a damaged header makes libraries raise anything
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
    tags, photometric, S = page.tags, int(page.photometric), page.samplesperpixel
    if photometric not in COLOURS or photometric == PHOTOMETRIC.YCBCR and page.compression != JPEG:
        name = getattr(page.photometric, "name", photometric)
        raise DataError(f"{path}: its colours are {name}; convert them to RGB first")
    if page.dtype is None or page.dtype.kind not in "biuf" or page.imagedepth > 1:
        kind = f"{page.bitspersample} bits ({getattr(page.sampleformat, 'name', '?')})"
        remedy = "convert them: gdal_translate -ot Float32 IN OUT.tif"
        raise DataError(f"{path}: pixels of {kind} are not read; {remedy}")
    if page.fillorder != 1:
        raise DataError(f"{path}: its bits lie backwards (FillOrder); rewrite it: {REWRITE}")
    separate = S > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    dtype = np.dtype("u1") if page.dtype.kind == "b" else np.dtype(page.dtype)
    codec = Codec(
        path, page.compression, int(page.predictor), page.bitspersample,
        dtype.newbyteorder(tiff.byteorder), 1 if separate else S, photometric,
        page.jpegtables, tuple(map(int, page.subsampling or (2, 2))), page.is_tiled,
    )  # fmt: skip
    if problem := codec.problem():
        raise DataError(f"{path}: {problem}")
    shape = (int(page.imagelength), int(page.imagewidth), S)[: 3 if S > 1 else 2]
    extra = [int(kind) for kind in page.extrasamples]
    alpha = next((S - len(extra) + i for i, kind in enumerate(extra) if kind in (1, 2)), None)
    geo = {code: tags.valueof(code) for code in GEO_TAGS if code in tags}
    raster = Raster(
        path, shape, dtype, tuple(map(int, page.chunks[:2])), codec, _places(path, tiff, page),
        COLOURS[photometric], nodata=_nodata(tags.valueof(NODATA), dtype), alpha=alpha,
        geo=geo | (page.geotiff_tags or {}) | {"GDAL": _items(tags.valueof(GDAL_METADATA))},
    )  # fmt: skip
    if photometric == PHOTOMETRIC.PALETTE:
        raster.palette = (np.array(page.colormap) >> 8).astype(np.uint8).T
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
    size = tiff.filehandle.size
    if end > size:
        raise DataError(f"{path}: truncated, {size} bytes of {end}; fetch the file again")
    return places


def _check_sizes(raster: Raster) -> None:
    """Raises DataError where segments are not of the bytes that the header declares: all those that
    are not compressed, and of LZW, of which that shows nowhere else, the first."""
    codec, (height, width), (down, across) = raster.codec, raster.segment, raster.segments
    row = -(-width * codec.samples * codec.bits // 8)
    least, most = np.full((raster.planes, down, across), row * height), row * height
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
            f"{most} ({codec.bits}-bit, {raster.shape[1]} columns); write the file again"
        )


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
    return int(value) if ends.min <= value <= ends.max else None


def _open_picture(path: Path) -> Raster:
    with open_picture(path, "PNG", "JPEG") as image:
        bands, size = image.getbands(), (image.height, image.width)
        C = len(bands)
        if image.mode == "CMYK":
            raise DataError(f"{path}: its colours are CMYK; convert them to RGB first")
        if C > 1 and png_depth(path) == 16:  # which Pillow cuts to 8
            raise DataError(f"{path}: a PNG of 16 bits and {C} bands; convert it: {CONVERT}")
        dtype = np.dtype("u2" if image.mode.startswith("I") else "u1")
        raster = Raster(path, (*size, C)[: 3 if C > 1 else 2], dtype, size)
        raster.colours = {"P": "palette", "RGB": "rgb", "RGBA": "rgb"}.get(image.mode, "grey")
        raster.alpha = bands.index("A") if "A" in bands else None
        if image.mode == "P":
            raster.palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        elif isinstance(clear := image.info.get("transparency"), int):
            raster.nodata = clear
        return raster


# ---------------------------------------------------------------------- what stands beside the file


def _items(text: object) -> dict[str, str]:
    """Scale, offset and unit of the first band, out of the XML in GDAL's tag."""
    try:
        root = ElementTree.fromstring(str(text or "<none/>"))
    except ElementTree.ParseError:
        return {}
    return {e.get("role"): e.text for e in root.iter("Item") if e.get("sample", "0") == "0"}


def _read_sidecar(raster: Raster, path: Path) -> None:
    """What GDAL says in a file of its own (.aux.xml), as far as the raster does not say it."""
    told = {}
    if path.is_file():
        root = ElementTree.parse(path).getroot()
        band = root.find("PAMRasterBand[@band='1']")
        if band is not None:
            names = {"scale": "Scale", "offset": "Offset", "unittype": "UnitType"}
            told = {role: v for role, name in names.items() if (v := band.findtext(name))}
            if raster.nodata is None:
                raster.nodata = _nodata(band.findtext("NoDataValue"), raster.dtype)
        if place := root.findtext("GeoTransform"):
            raster.geo["GeoTransform"] = tuple(float(part) for part in place.split(","))
    told |= raster.geo.pop("GDAL", {})
    unit = feet(raster.geo, "VerticalUnitsGeoKey", 1)
    unit = METRES.get(str(told.get("unittype", "")).strip().lower(), unit)
    raster.scale = float(told.get("scale", 1)) * unit
    raster.offset = float(told.get("offset", 0)) * unit


def feet(geo: dict, key: str, part: int) -> float:
    """Metres of one unit of a coordinate system, horizontal (part 0 of its name) or vertical (1):
    by GeoTIFF's key or, where the system is told by its number alone, by its name."""
    if key in geo:
        return FEET.get(int(geo[key]), 1.0)
    parts = str(geo.get("GTCitationGeoKey", "")).split(" + ")
    named = re.search(r"\((ft|ftUS)\)", parts[part]) if part < len(parts) else None
    return FEET[named[1]] if named else 1.0


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
