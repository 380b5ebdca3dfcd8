"""Every pixel is what was written, whatever the packing, or the file is refused in a line."""

import pickle
from importlib.util import find_spec

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiffs import write_tiff

from geodata.codecs import libtiff_knows_zstd
from geodata.rasters import DataError, open_raster, read_raster
from geodata.tiles import Tile

TWO_CLASSES = (("ground", (10, 20, 30)), ("house", (200, 100, 0)))
H, W = 41, 56
# A Pillow of long ago knows no ZSTD.
PACKINGS = ["none", "deflate", "lzw", "packbits", "lzma", *["zstd"] * libtiff_knows_zstd()]
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


def pixels(dtype, bands, seed=0):
    rng = np.random.default_rng(seed)
    steps = np.cumsum(rng.integers(-9, 10, (H, W, bands)), axis=1)
    dtype = np.dtype(dtype)
    return (steps / 7).astype(dtype) if dtype.kind == "f" else (steps * 311).astype(dtype)


def squeezed(array):
    return array[..., 0] if array.shape[2] == 1 else array


def refused(path, message, call=read_raster):
    with pytest.raises(DataError, match=message) as caught:
        call(path)
    text = str(caught.value)
    assert "\n" not in text and text.count(str(path)) == 1, text


@one_folder
@given(
    dtype=st.sampled_from(["u1", "i1", "u2", "i2", "u4", "f4", "f8"]),
    bands=st.sampled_from([1, 3, 4, 13]),
    compression=st.sampled_from(PACKINGS),
    tile=st.sampled_from([None, (16, 32), (64, 64)]),
    rows=st.sampled_from([1, 7, H]),
    separate=st.booleans(),
    predictor=st.sampled_from([1, 1, 2, 3]),
    byteorder=st.sampled_from("<>"),
    nodata=st.sampled_from([None, 7]),
    left_out=st.sets(st.integers(0, 5)),
    boxes=st.lists(
        st.tuples(*[st.tuples(st.integers(0, n - 1), st.integers(1, 60)) for n in (H, W)]),
        max_size=4,
    ),
)
def test_slices_and_the_whole_are_what_was_written(
    tmp_path,
    dtype,
    bands,
    compression,
    tile,
    rows,
    separate,
    predictor,
    byteorder,
    nodata,
    left_out,
    boxes,
):
    assume(predictor != 3 or dtype[0] == "f")
    array, separate = pixels(dtype, bands), separate and bands > 1
    tags = {} if nodata is None else {42113: ("s", 0, str(nodata))}
    path = write_tiff(
        tmp_path / "a.tif",
        array,
        compression,
        tile,
        rows,
        separate,
        predictor,
        byteorder,
        left_out,
        tags,
    )
    if predictor != 1 and compression in ("none", "packbits"):
        refused(path, "predictor")  # some programs undo it, some do not
        return
    raster = open_raster(path)
    h, w = tile or (rows, W)
    across, down = -(-W // w), -(-H // h)
    for i in (i for i in left_out if i < across * down * (bands if separate else 1)):
        plane, i = (i // (across * down), i % (across * down)) if separate else (slice(None), i)
        top, left = i // across * h, i % across * w
        array[top : top + h, left : left + w, plane] = nodata or 0
    for (top, height), (left, width) in boxes:
        box = np.s_[top : top + height, left : left + width]
        assert np.array_equal(raster[box], squeezed(array)[box])
    whole = raster[:, :]
    assert whole.dtype == array.dtype and np.array_equal(whole, squeezed(array))
    assert np.array_equal(pickle.loads(pickle.dumps(raster))[3:9, 2:50], whole[3:9, 2:50])
    valid = raster.valid(np.s_[0:H, 0:W], whole)
    assert valid is None if nodata is None else np.array_equal(valid, (array != nodata).any(-1))


@pytest.mark.parametrize("mode, bands", [("L", 1), ("RGB", 3), ("RGBA", 4)])
@pytest.mark.parametrize("rows", [8, 64])
def test_jpeg_segments_are_what_the_whole_file_is(tmp_path, mode, bands, rows):
    array = squeezed(pixels("u1", bands))
    path = tmp_path / "a.tif"
    Image.fromarray(array, mode).save(path, compression="jpeg", strip_size=rows * W * bands)
    with Image.open(path) as picture:
        wanted = np.asarray(picture)
    raster = open_raster(path)
    assert np.array_equal(raster[:, :], wanted)
    assert np.array_equal(raster[10:30, 7:50], wanted[10:30, 7:50])


def test_jpeg_of_two_bands_is_refused_with_the_command_that_helps(tmp_path):
    Image.fromarray(pixels("u1", 2), "LA").save(tmp_path / "a.tif", compression="jpeg")
    refused(tmp_path / "a.tif", "JPEG in 2 bands; rewrite it: gdal_translate", open_raster)


@pytest.mark.skipif(find_spec("imagecodecs") is not None, reason="imagecodecs reads it")
@pytest.mark.parametrize("code, name", [(34887, "LERC"), (50001, "WEBP"), (34933, "PNG")])
def test_a_compression_that_needs_imagecodecs_is_named_with_both_remedies(tmp_path, code, name):
    path = write_tiff(tmp_path / "a.tif", pixels("u1", 1))
    patch(path, Compression=code)
    refused(path, f"compressed by {name}; pip install imagecodecs.*gdal_translate -co COMPRESS")


def test_an_unknown_compression_or_predictor_is_refused_by_number(tmp_path):
    path = write_tiff(tmp_path / "a.tif", pixels("u1", 1), "deflate", predictor=2)
    patch(path, Predictor=5)
    refused(path, "predictor 5.*gdal_translate")
    patch(path, Compression=12345)
    refused(path, "unknown compression 12345.*gdal_translate")


def patch(path, **values):
    """Lets a header lie."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name, value in values.items():
            tiff.pages[0].tags[name].overwrite(value)
    return path


# ------------------------------------------------------------------------- what Pillow made of them


def test_16_bit_bands_packed_by_lzw_keep_their_16_bits(tmp_path):
    array = pixels("u2", 4)
    write_tiff(tmp_path / "a.tif", array, "lzw", (16, 16), predictor=2)
    assert np.array_equal(read_raster(tmp_path / "a.tif"), array)


@pytest.mark.parametrize("dtype", ["i2", "f4"])
def test_big_endian_heights_packed_by_lzw_are_in_their_order(tmp_path, dtype):
    dsm = pixels(dtype, 1)
    write_tiff(tmp_path / "a.tif", dsm, "lzw", byteorder=">")
    assert np.array_equal(read_raster(tmp_path / "a.tif"), dsm[..., 0])


@pytest.mark.parametrize("tag, value", [(262, 0), (274, 3)])
def test_white_is_zero_and_a_turned_orientation_leave_the_numbers_as_they_are(tmp_path, tag, value):
    """As GDAL does; labels and heights are numbers, and every file of a tile lies alike."""
    array = pixels("u1", 1)
    path = write_tiff(tmp_path / "a.tif", array, "lzw", tags={274: ("H", 1, 1)})
    patch(path, **{{262: "PhotometricInterpretation", 274: "Orientation"}[tag]: value})
    assert np.array_equal(read_raster(path), array[..., 0])


@pytest.mark.parametrize("bits", [1, 2, 4, 12])
def test_packed_bits_are_the_numbers_that_they_spell(tmp_path, bits):
    array = np.random.default_rng(0).integers(0, 1 << bits, (H, W))
    spelled = (array[..., None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)
    rows = np.packbits(spelled.reshape(H, -1), axis=1)
    path = write_tiff(tmp_path / "a.tif", rows[..., None], "lzw", rows=7)
    patch(path, ImageWidth=W, BitsPerSample=bits)
    assert np.array_equal(read_raster(path), array)


def test_premultiplied_alpha_is_left_as_it_is(tmp_path):
    array = pixels("u1", 4)
    path = write_tiff(tmp_path / "a.tif", array, "lzw")
    patch(path, PhotometricInterpretation=2, ExtraSamples=(1,))
    found = open_raster(path)
    assert np.array_equal(found[:, :], array) and found.alpha == 3


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_pixels_that_alpha_makes_clear_are_no_data(tmp_path, name):
    array = pixels("u1", 4)
    array[..., 3], array[:9, :5, 3] = 255, 0
    Image.fromarray(array, "RGBA").save(tmp_path / name)
    missing = Tile("a", {"image": tmp_path / name}, TWO_CLASSES).without_data()(slice(0, H))
    assert missing[:9, :5].all() and missing.sum() == 45


def test_cmyk_is_refused(tmp_path):
    Image.fromarray(pixels("u1", 4), "CMYK").save(tmp_path / "a.tif")
    Image.fromarray(pixels("u1", 4), "CMYK").save(tmp_path / "a.jpg")
    for name in ("a.tif", "a.jpg"):
        refused(tmp_path / name, "CMYK|SEPARATED")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_png_of_16_bits_that_pillow_would_cut_to_8_is_refused(tmp_path, mode):
    Image.fromarray(pixels("u1", len(mode) + (mode == "LA") - (mode == "LA")), mode).save(
        tmp_path / "a.png"
    )
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[24] = 16
    (tmp_path / "a.png").write_bytes(resigned(data))
    refused(tmp_path / "a.png", "PNG of 16 bits.*gdal_translate", open_raster)


def resigned(data: bytearray) -> bytes:
    """A PNG whose header was changed, with its checksum mended."""
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_pngs_of_few_bits_hold_the_numbers_of_the_file(tmp_path, bits):
    import struct
    import zlib

    array = np.random.default_rng(0).integers(0, 1 << bits, (H, W))
    spelled = (array[..., None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)
    rows = np.packbits(spelled.reshape(H, -1), axis=1)
    rows = np.pad(rows, [(0, 0), (1, 0)]).tobytes()

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", W, H, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert np.array_equal(read_raster(tmp_path / "a.png"), array)


# ----------------------------------------------------------------------------------- left-out parts


@pytest.mark.parametrize("compression", ["none", "deflate", "lzw"])
@pytest.mark.parametrize("tile, rows", [((16, 16), 0), (None, 9)])
@pytest.mark.parametrize("left_out", [(0,), (0, 3), range(99)])
def test_heights_of_left_out_segments_are_no_data_in_training_and_in_prediction(
    tmp_path, compression, tile, rows, left_out
):
    dsm = np.random.default_rng(0).uniform(21, 39, (H, W, 1)).astype(np.float32)
    path = write_tiff(
        tmp_path / "a.tif",
        dsm,
        compression,
        tile,
        rows,
        left_out=tuple(left_out),
        tags={42113: ("s", 0, "-9999")},
    )
    if len(left_out) == 99:
        refused(
            path,
            "no valid height",
            lambda path: Tile("a", {"dsm": path}, TWO_CLASSES).open(("dsm",)),
        )
        return
    loaded, opened = (
        getattr(Tile("a", {"dsm": path}, TWO_CLASSES), way)(("dsm",)) for way in ("load", "open")
    )
    assert loaded.scale.heights == opened.scale.heights and loaded.scale.heights[0] > 20
    assert np.array_equal(loaded.dsm, opened.dsm[0:H, 0:W])


def test_an_image_with_left_out_tiles_has_no_data_there(tmp_path):
    array = np.random.default_rng(0).integers(8, 255, (H, W, 3), dtype=np.uint8)
    path = write_tiff(
        tmp_path / "a.tif", array, "deflate", (16, 16), left_out=(0,), tags={42113: ("s", 0, "7")}
    )
    missing = Tile("a", {"image": path}, TWO_CLASSES).without_data()(slice(0, H))
    assert missing[:16, :16].all() and missing.sum() == 256


# -------------------------------------------------------------------------------------------- masks


def write_masked(path, array, mask, beside):
    """A raster with GDAL's mask: a second page of one bit a pixel, or a file of its own."""
    with tifffile.TiffWriter(path) as writer:
        writer.write(array, photometric="rgb" if array.ndim == 3 else "minisblack", metadata=None)
        if not beside:
            writer.write(mask, photometric="mask", subfiletype=4, metadata=None)
    if beside:
        tifffile.imwrite(path.with_name(path.name + ".msk"), np.uint8(255) * mask)
    return path


@pytest.mark.parametrize("beside", [True, False])
def test_masked_heights_and_pixels_are_no_data(tmp_path, beside):
    mask = np.ones((H, W), bool)
    mask[:20, :30] = False
    dsm = np.random.default_rng(0).uniform(21, 39, (H, W)).astype(np.float32)
    dsm[~mask] = 0
    tile = Tile("a", {"dsm": write_masked(tmp_path / "d.tif", dsm, mask, beside)}, TWO_CLASSES)
    assert tile.load(("dsm",)).scale.heights[0] > 20 and tile.missing_heights == 600
    assert tile.open(("dsm",)).scale.heights[0] > 20
    assert np.array_equal(tile.without_data()(slice(5, 25)), ~mask[5:25])  # a run on heights alone
    image = np.full((H, W, 3), 9, np.uint8)
    tile = Tile("a", {"image": write_masked(tmp_path / "i.tif", image, mask, beside)}, TWO_CLASSES)
    assert np.array_equal(tile.without_data()(slice(5, 25)), ~mask[5:25])


def test_a_mask_of_another_size_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((9, 9), np.uint8))
    tifffile.imwrite(tmp_path / "a.tif.msk", np.zeros((5, 9), np.uint8))
    with pytest.raises(DataError, match="a.tif.msk: a mask of"):
        read_raster(tmp_path / "a.tif")


# -------------------------------------------------------------------------------------- header lies


@pytest.mark.parametrize(
    "lie",
    [
        dict(ImageWidth=60_000),
        dict(ImageWidth=30),
        dict(ImageLength=9_000),
        dict(TileWidth=48),
        dict(TileLength=0),
        dict(TileWidth=0),
        dict(PlanarConfiguration=2),
        dict(SamplesPerPixel=4),
        dict(BitsPerSample=(16, 16, 16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("compression", ["none", "deflate", "lzw"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_a_header_that_lies_is_one_line(tmp_path, lie, compression, tile):
    array = pixels("u1", 3)
    path = write_tiff(tmp_path / "a.tif", array, compression, tile, rows=7)
    with tifffile.TiffFile(path) as tiff:
        assume_there = all(name in tiff.pages[0].tags for name in lie)
    if not assume_there:
        pytest.skip("strips have no tiles")
    patch(path, **lie)
    if tile and lie == dict(ImageWidth=30):  # fewer tiles than there are
        refused(path, "contradicts itself")
    else:
        refused(path, "a.tif")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["none", "deflate", "lzw"]),
    st.sampled_from([None, (16, 16)]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_whatever_byte_of_a_header_is_wrong_the_file_is_read_or_refused_in_a_line(
    tmp_path, compression, tile, changes
):
    path = write_tiff(tmp_path / "a.tif", pixels("u2", 3), compression, tile, rows=7)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        first = min(tiff.pages[0].dataoffsets)
    for place, value in changes:
        data[min(place, first - 1)] = value
    path.write_bytes(data)
    try:
        read_raster(path)
    except DataError as error:
        assert "\n" not in str(error) and str(error).count(str(path)) == 1


# ----------------------------------------------------------------------- with imagecodecs installed


def test_jpeg_tables_reach_every_segment_with_imagecodecs_too(tmp_path):
    pytest.importorskip("imagecodecs")
    path = tmp_path / "a.tif"
    Image.fromarray(pixels("u1", 3)).save(path, compression="jpeg", strip_size=8 * W * 3)
    with Image.open(path) as picture:
        wanted = np.asarray(picture)
    assert tifffile.TiffFile(path).pages[0].jpegtables
    tile = Tile("a", {"image": path}, TWO_CLASSES)
    assert np.array_equal(tile.open(("image",)).image[0:H, 0:W], wanted)
    assert np.array_equal(tile.load(("image",)).image, wanted)


@pytest.mark.parametrize("bands", [1, 3])
def test_holes_of_lerc_are_holes(tmp_path, bands):
    imagecodecs = pytest.importorskip("imagecodecs")
    array = np.random.default_rng(0).uniform(20, 30, (H, W, bands)).astype(np.float32)
    mask = np.ones((H, W), bool)
    mask[:9, :9] = False
    packed = imagecodecs.lerc_encode(squeezed(array), masks=mask, planar=False)
    path = write_tiff(tmp_path / "a.tif", array, segments=[packed])
    patch(path, Compression=34887)
    array[~mask] = np.nan
    assert np.array_equal(read_raster(path), squeezed(array), equal_nan=True)
    if bands == 1:
        tile = Tile("a", {"dsm": path}, TWO_CLASSES)
        assert tile.load(("dsm",)).scale.heights[0] >= 20 and tile.missing_heights == 81
