"""TIFFs of every kind, written segment by segment, for tests of what reads them."""

import io
import lzma
import struct
import zlib

import numpy as np
import tifffile
from PIL import Image

CODES = {"none": 1, "lzw": 5, "deflate": 8, "packbits": 32773, "lzma": 34925, "zstd": 50000}
PLACEHOLDER = 65317
BY_PILLOW = {"lzw": "tiff_lzw", "packbits": "packbits", "zstd": "zstd"}


def packed(data: bytes, row: int, compression: str) -> bytes:
    """The bytes of a segment with `row` bytes a row, compressed."""
    if compression == "none":
        return data
    if compression in ("deflate", "lzma"):
        return {"deflate": zlib, "lzma": lzma}[compression].compress(data)
    picture = Image.frombytes("L", (row, len(data) // row), data)
    file = io.BytesIO()
    picture.save(file, "TIFF", compression=BY_PILLOW[compression], strip_size=1 << 30)
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        start, (count,) = page.dataoffsets[0], page.databytecounts
        return file.getvalue()[start : start + count]


def predicted(block: np.ndarray, predictor: int, byteorder: str) -> bytes:
    """A segment (h, w, S) as the bytes that are compressed."""
    stored = block.astype(block.dtype.newbyteorder(byteorder))
    if predictor == 1:
        return stored.tobytes()
    h, w, S = block.shape
    if predictor == 2:
        whole = block.view(f"u{block.dtype.itemsize}")
        differences = np.diff(whole, axis=1, prepend=np.zeros((h, 1, S), whole.dtype))
        return differences.astype(differences.dtype.newbyteorder(byteorder)).tobytes()
    planes = block.astype(block.dtype.newbyteorder(">")).view(np.uint8).reshape(h, w * S, -1)
    planes = np.ascontiguousarray(planes.transpose(0, 2, 1)).reshape(h, -1, S)
    return np.diff(planes, axis=1, prepend=np.zeros((h, 1, S), np.uint8)).tobytes()


def write_tiff(
    path,
    array: np.ndarray,
    compression: str = "none",
    tile: tuple[int, int] | None = None,
    rows: int = 0,
    separate: bool = False,
    predictor: int = 1,
    byteorder: str = "<",
    left_out: tuple[int, ...] = (),
    tags: dict | None = None,
    segments: list[bytes] | None = None,
):
    """An array (H, W, C); segments named in `left_out` are sparse. `tags` are entered by number;
    `segments` are already packed."""
    H, W, C = array.shape
    h, w = tile or (rows or H, W)
    planes = np.moveaxis(array, -1, 0)[..., None] if separate else array[None]
    given, segments = segments, []
    for plane in planes:
        for top in range(0, H, h):
            for left in range(0, W, w):
                block = plane[top : top + h, left : left + w]
                if tile:
                    block = np.pad(
                        block, [(0, h - block.shape[0]), (0, w - block.shape[1]), (0, 0)]
                    )
                row = w * block.shape[2] * array.dtype.itemsize
                data = predicted(np.ascontiguousarray(block), predictor, byteorder)
                segments.append(packed(data, row, compression))
    segments = given or segments
    extra = [(code, kind, n, value, True) for code, (kind, n, value) in (tags or {}).items()]
    extra.append(
        (PLACEHOLDER, "H", 1, predictor, True)
    )  # tifffile insists on a predictor of its own
    with tifffile.TiffWriter(path, byteorder=byteorder) as writer:
        writer.write(
            iter([b"" if i in left_out else data for i, data in enumerate(segments)]),
            shape=(C, H, W) if separate else (H, W, C) if C > 1 else (H, W),
            dtype=array.dtype,
            tile=tile,
            rowsperstrip=None if tile else h,
            planarconfig=None if C == 1 else "separate" if separate else "contig",
            photometric="minisblack",
            compression="zlib",
            metadata=None,
            extratags=extra,
        )
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(CODES[compression])
    data = path.read_bytes()
    old, new = (struct.pack(f"{byteorder}HHI", code, 3, 1) for code in (PLACEHOLDER, 317))
    path.write_bytes(data.replace(old, new, 1))
    return path
