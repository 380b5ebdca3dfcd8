"""Rasters behind slices give what reading the whole gives."""

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from test_rasters import geo_tags

from geodata.rasters import open_raster
from geodata.scaling import Scaling
from geodata.slices import DataError, Raster
from geodata.tiles import Tile

TWO_CLASSES = (("ground", (10, 20, 30)), ("house", (200, 100, 0)))
LAYOUTS = {
    "strips": dict(rowsperstrip=7),
    "deflate": dict(rowsperstrip=7, compression="zlib"),
    "one deflate strip": dict(rowsperstrip=1000, compression="zlib"),
    "tiles": dict(tile=(16, 32)),
    "deflate tiles": dict(tile=(32, 16), compression="zlib", predictor=2),
    "planes": dict(tile=(16, 16), compression="zlib", planarconfig="separate"),
    "plane strips": dict(rowsperstrip=5, planarconfig="separate"),
    "big endian": dict(byteorder=">", tile=(16, 16), compression="zlib"),
}


def write(path, array, layout):
    options = dict(LAYOUTS[layout])
    if array.ndim == 2:
        options.pop("planarconfig", None)
    elif "planarconfig" in options:
        array = np.moveaxis(array, -1, 0)
    tifffile.imwrite(path, array, photometric="minisblack" if array.ndim == 2 else "rgb", **options)
    return path


@pytest.fixture(
    scope="module", params=[(layout, C) for layout in LAYOUTS for C in (1, 3, 4)], ids=str
)
def raster(request, tmp_path_factory):
    layout, C = request.param
    array = np.random.default_rng(C).integers(0, 60_000, (75, 53, C), dtype=np.uint16)
    array = array[..., 0] if C == 1 else array
    return array, open_raster(write(tmp_path_factory.mktemp("a") / "a.tif", array, layout))


boxes = st.tuples(*[st.tuples(st.integers(0, n - 1), st.integers(1, 40)) for n in (75, 53)])


@given(boxes=st.lists(boxes, min_size=1, max_size=6))
def test_every_slice_is_that_of_the_array_in_any_order(raster, boxes):
    array, found = raster
    assert found.shape == array.shape and found.dtype == array.dtype
    for (top, h), (left, w) in boxes:
        box = np.s_[top : top + h, left : left + w]
        assert np.array_equal(found[box], array[box])


def test_windows_from_top_to_bottom_decode_each_tile_once_and_keep_few(tmp_path, monkeypatch):
    array = np.random.default_rng(0).integers(0, 255, (2000, 100, 3), dtype=np.uint8)
    found, decoded, kept = open_raster(write(tmp_path / "a.tif", array, "deflate tiles")), [], []
    monkeypatch.setattr(
        Raster,
        "_decode",
        lambda self, i, top, decode=Raster._decode: decoded.append(i) or decode(self, i, top),
    )
    for top in range(0, 1937, 16):
        for left in (0, 36):
            assert np.array_equal(
                found[top : top + 64, left : left + 64], array[top : top + 64, left : left + 64]
            )
        kept.append(len({row for row, _ in found.blocks}))
    assert sorted(decoded) == list(range(63 * 7)) and max(kept) <= 3


def test_random_crops_keep_few_tiles(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (4000, 60, 3), dtype=np.uint8)
    found = open_raster(write(tmp_path / "a.tif", array, "deflate tiles"))
    for top in np.random.default_rng(1).integers(0, 3900, 60):
        found[top : top + 64, 0:40]
        assert sum(block.nbytes for block in found.blocks.values()) < array.nbytes / 5


@pytest.mark.parametrize("layout", ["strips", "deflate tiles"])
def test_a_truncated_file_is_named_when_it_is_opened(tmp_path, layout):
    path = write(
        tmp_path / "a.tif",
        np.random.default_rng(0).integers(0, 255, (75, 53, 3), dtype=np.uint8),
        layout,
    )
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match="a.tif: truncated"):
        open_raster(path)


def test_a_damaged_tile_is_an_error_of_one_line_that_names_the_file(tmp_path):
    path = write(
        tmp_path / "a.tif",
        np.random.default_rng(0).integers(0, 255, (75, 53, 3), dtype=np.uint8),
        "deflate tiles",
    )
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages[0].dataoffsets[-1]
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    found = open_raster(path)
    with pytest.raises(DataError, match="a.tif.*cannot be read") as error:
        found[70:75, 40:53]
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------- whole tiles


def own_tile(folder, layout, scaling, other_grid=False):
    rng = np.random.default_rng(5)
    image = rng.integers(0, 255, (75, 53, 4), dtype=np.uint8)
    size = (33, 40) if other_grid else (75, 53)
    dsm = rng.uniform(100, 130, size).astype(np.float32)
    dsm[3:6, 5:9], dsm[7, 7], dsm[0, 0] = -9999, np.nan, 3e38
    options = {k: v for k, v in LAYOUTS[layout].items() if k not in ("predictor", "planarconfig")}
    paths = {"image": folder / "image.tif", "dsm": folder / "dsm.tif"}
    tags = geo_tags(1000, 2000, (0.5, 0.5))
    tifffile.imwrite(paths["image"], image, photometric="rgb", extratags=tags, **options)
    tags = geo_tags(998, 1998.7, (1.0, 1.0)) if other_grid else tags
    tifffile.imwrite(paths["dsm"], dsm, photometric="minisblack", extratags=tags, **options)
    return [
        Tile("a", paths, TWO_CLASSES, bands=(3, 0, 1), height_unit=0.5, scaling=scaling)
        for _ in range(2)
    ]


HEIGHTS, IMAGES = ("minmax", "percentiles", "90:120", "ground"), ("minmax", "sam", "unit", "20:200")


@pytest.mark.parametrize("scaling", [Scaling(*names) for names in zip(HEIGHTS, IMAGES)], ids=str)
@pytest.mark.parametrize("layout", ["strips", "deflate tiles"])
@pytest.mark.parametrize("other_grid", [False, True])
def test_an_opened_tile_is_the_loaded_one(tmp_path, layout, scaling, other_grid):
    one, other = own_tile(tmp_path, layout, scaling, other_grid)
    loaded, opened = one.load(), other.open(("image", "dsm"))
    assert opened.size == loaded.size == (75, 53) and one.notes == other.notes and one.notes
    if other_grid:
        assert opened.scale.heights == pytest.approx(loaded.scale.heights)
    else:
        assert opened.scale.heights == loaded.scale.heights
    for top, left in ((0, 0), (20, 11), (43, 21), (74, 52)):
        box = np.s_[top : top + 32, left : left + 32]
        inputs = [
            (t.scale.image_input(t.image[box]), t.scale.height_input(t.dsm[box], box))
            for t in (loaded, opened)
        ]
        assert np.array_equal(inputs[0][0], inputs[1][0])
        assert np.allclose(inputs[0][1], inputs[1][1], atol=1e-5 if other_grid else 0, rtol=0)


def test_heights_that_lie_elsewhere_are_refused_before_anything_is_computed(tmp_path):
    tile = own_tile(tmp_path, "tiles", Scaling())[0]
    tifffile.imwrite(tile.paths["dsm"], np.zeros((9, 9), np.float32), extratags=geo_tags(9e5, 9e5))
    with pytest.raises(DataError, match="dsm.tif: does not overlap"):
        tile.open(("image", "dsm"))
