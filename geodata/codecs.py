"""The bytes of a TIFF's segments (strips or tiles) -> pixels.

Deflate and LZMA are Python's own. LZW, PackBits, ZSTD and 8-bit JPEG are left to the libtiff inside
Pillow: a segment is wrapped as a TIFF of one strip in memory, of which Pillow gives back the bytes.
Predictors, byte order and packed bits are undone here in numpy. Whatever else tifffile can decode
with the package imagecodecs is decoded by it.

Shapes: `h, w` pixels of a segment, `S` samples of a pixel in it."""

from __future__ import annotations

import io
import lzma
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Iterator

import numpy as np
import tifffile
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

NONE, DEFLATE, JPEG, PACKBITS, LERC = 1, (8, 32946), 7, 32773, 34887
LZW, LZMA, ZSTD = 5, 34925, 50000
BY_BYTES = (NONE, *DEFLATE, LZW, PACKBITS, LZMA, ZSTD)  # bytes in, bytes out
FLOATING_POINT = 3  # the predictor for floats
REWRITE = "gdal_translate -co COMPRESS=DEFLATE IN.tif OUT.tif"
SIZE = b"SIZE"  # stands in the head of a strip where its bytes are counted


@dataclass(frozen=True)
class Codec:
    """How the segments of a TIFF are packed."""

    path: Path
    compression: int  # of tifffile.COMPRESSION where it is known
    predictor: int
    bits: int
    dtype: np.dtype  # of a sample in the file, with its byte order
    samples: int  # S: all bands, or 1 where the file holds band after band
    photometric: int
    tables: bytes | None  # those that all JPEG segments share
    subsampling: tuple[int, int]  # of JPEG's chroma
    tiled: bool

    def problem(self) -> str | None:
        """Why segments cannot be decoded, with what helps; None where they can."""
        if self.compression in BY_BYTES and (self.compression != ZSTD or libtiff_knows_zstd()):
            floats = self.dtype.kind == "f" and self.bits == 8 * self.dtype.itemsize
            known = {2: self.bits in (8, 16, 32, 64), FLOATING_POINT: floats}.get(self.predictor)
            # Of what is packed by none or PackBits, some programs undo a predictor and some do not.
            if self.predictor == 1 or known and self.compression not in (NONE, PACKBITS):
                return None
            return f"packed with predictor {self.predictor}; rewrite it: {REWRITE}"
        if self.compression == JPEG and self.bits == 8:
            many = f"compressed by JPEG in {self.samples} bands; rewrite it: {REWRITE}"
            return None if self.samples in (1, 3, 4) else many
        name = getattr(self.compression, "name", None)
        if name is None:
            return f"packed by the unknown compression {self.compression}; rewrite it: {REWRITE}"
        if self.dtype.byteorder == ">":  # programs do not agree what that means
            return f"compressed by {name} in big-endian order; rewrite it: {REWRITE}"
        if find_spec("imagecodecs"):
            return None
        return f"compressed by {name}; pip install imagecodecs, or rewrite it: {REWRITE}"

    def unpack(self, data: bytes, h: int, w: int, index: int, most: int) -> np.ndarray:
        """Segment `index` as (h, w, S) in the file's type; one of strips may hold up to `most`
        rows, of which the first h count. Raises ValueError for any other number of bytes."""
        if self.compression == JPEG and self.bits == 8:
            return self._jpeg(data, h, w)
        if self.compression not in BY_BYTES:
            return self._by_tifffile(data, h, w, index)
        row = -(-w * self.samples * self.bits // 8)
        raw = self._bytes(data, row, h)
        rows, rest = divmod(len(raw), row)
        if rest or not h <= rows <= most:
            raise ValueError(
                f"a segment holds {len(raw)} bytes of pixels where the header declares {row * h}"
            )
        raw, native = np.frombuffer(raw, np.uint8, row * h), self.dtype.newbyteorder("=")
        if self.predictor == FLOATING_POINT:  # planes of bytes, the most significant one first
            summed = np.cumsum(raw.reshape(h, -1, self.samples), axis=1, dtype=np.uint8)
            planes = summed.reshape(h, self.dtype.itemsize, -1).transpose(0, 2, 1)
            big_endian = np.ascontiguousarray(planes).view(self.dtype.newbyteorder(">"))
            return big_endian.reshape(h, w, self.samples)
        if self.bits < 8 * self.dtype.itemsize:  # the highest bit first, rows padded to bytes
            bits = np.unpackbits(raw.reshape(h, row), axis=1)[:, : w * self.samples * self.bits]
            bits = bits.reshape(h, w, self.samples, self.bits)
            return bits @ (1 << np.arange(self.bits)[::-1]).astype(native)
        pixels = raw.view(self.dtype).reshape(h, w, self.samples)
        if self.predictor == 1:
            return pixels
        whole = np.dtype(f"u{self.dtype.itemsize}")  # differences are of bits, of floats too
        return np.cumsum(pixels.astype(native, copy=False).view(whole), axis=1, dtype=whole).view(
            native
        )

    def _bytes(self, data: bytes, row: int, h: int) -> bytes:
        if self.compression == NONE:
            return data
        if self.compression in DEFLATE:
            return zlib.decompress(data)
        if self.compression == LZMA:
            return lzma.decompress(data)
        if self.compression == ZSTD and not libtiff_knows_zstd():
            return tifffile.TIFF.DECOMPRESSORS[ZSTD](data)
        return _by_libtiff(data, row, h, self.compression).tobytes()

    def _jpeg(self, data: bytes, h: int, w: int) -> np.ndarray:
        with open_picture(io.BytesIO(data), "JPEG") as picture:  # of its own header
            if picture.size != (w, h):
                raise ValueError(f"a JPEG segment of {picture.size} pixels for one of {w, h}")
        photometric = self.photometric if self.samples > 2 else 1  # a band is grey by itself
        tags = {258: (8,) * self.samples, 262: photometric, 277: self.samples}
        if self.tables:
            tags[347] = self.tables
        if self.photometric == tifffile.PHOTOMETRIC.YCBCR:
            tags[530] = self.subsampling
        if self.samples == 4:
            tags[338] = 2  # read as it is: Pillow drops a fourth sample of no meaning
        return _by_libtiff(data, w, h, JPEG, tuple(tags.items())).reshape(h, w, self.samples)

    def _by_tifffile(self, data: bytes, h: int, w: int, index: int) -> np.ndarray:
        if self.compression == LERC:  # of which tifffile drops the mask
            import imagecodecs

            pixels, valid = imagecodecs.lerc_decode(data, masks=True)
            pixels = pixels.reshape(h, w, self.samples).astype(self.dtype.newbyteorder("="))
            if self.dtype.kind == "f" and valid is not None:
                valid = np.moveaxis(valid, 0, -1) if valid.ndim == 3 else valid[..., None]
                pixels[np.broadcast_to(valid == 0, pixels.shape)] = np.nan
            return pixels
        with tifffile.TiffFile(self.path) as tiff:
            return tiff.pages[0].decode(data, index, jpegtables=self.tables)[0][0, :h, :w]


@cache
def libtiff_knows_zstd() -> bool:
    """Whether Pillow was built with ZSTD."""
    try:
        _by_libtiff(bytes.fromhex("28b52ffd200109000061"), 1, 1, ZSTD)
    except OSError:
        return False
    return True


def lzw_size(data: bytes) -> int:
    """Bytes that LZW unpacks to. libtiff stops without a word where a header declares fewer."""
    sizes, first = [1] * 258, True
    total = held = bits = last = 0
    width = 9
    for byte in data:
        held, bits = held << 8 | byte, bits + 8
        if bits < width:
            continue
        bits -= width
        code, held = held >> bits, held & (1 << bits) - 1
        if code == 257:
            break
        if code == 256:
            sizes, first, width = [1] * 258, True, 9
            continue
        if not first:
            sizes.append(sizes[last] + 1)
            width = min(12, len(sizes).bit_length() + (len(sizes) & len(sizes) + 1 == 0))
        total, last, first = total + sizes[code], code, False
    return total


def _by_libtiff(data: bytes, w: int, h: int, compression: int, tags: tuple = ()) -> np.ndarray:
    """Packed bytes as a TIFF of one strip, read by Pillow: (h, w) bytes, unless `tags`, (code,
    value) each, say otherwise."""
    head = _head_of_strip(w, h, compression, tags)
    size = len(data).to_bytes(4, "little")
    with open_picture(io.BytesIO(head.replace(SIZE, size, 1) + data), "TIFF") as picture:
        return np.asarray(picture)


@lru_cache
def _head_of_strip(w: int, h: int, compression: int, tags: tuple) -> bytes:
    directory, file = ImageFileDirectory_v2(), io.BytesIO()
    about = {256: w, 257: h, 258: 8, 259: compression, 262: 1, 273: 0, 277: 1, 278: h}
    for code, value in (about | {279: int.from_bytes(SIZE, "little")} | dict(tags)).items():
        directory[code] = value
    directory.save(file)
    return file.getvalue()


@contextmanager
def open_picture(file, *formats: str) -> Iterator[Image.Image]:
    """A file as Pillow reads it, of any size: it takes an orthophoto for an attack."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(file, formats=formats) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


# ----------------------------------------------------------------------------------------- pictures

PNG = b"\x89PNG\r\n\x1a\n"
GREY_STEPS = {1: 255, 2: 85, 4: 17}  # by which Pillow stretches grey of few bits


def png_depth(path: Path) -> int:
    with open(path, "rb") as file:
        head = file.read(26)
    return head[24] if head.startswith(PNG) else 8


def picture_pixels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A PNG or JPEG of `shape` as (h, w, S) uint8 or uint16."""
    with open_picture(path, "PNG", "JPEG") as image:
        pixels = np.asarray(image)
    if image.mode == "L":
        pixels = pixels // np.uint8(GREY_STEPS.get(png_depth(path), 1))
    dtype = np.uint16 if image.mode.startswith("I") else np.uint8
    return pixels.astype(dtype).reshape(*shape[:2], -1)
