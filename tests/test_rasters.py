"""Raster files that are damaged or declare the wrong thing, GeoTIFF grids, and rasters that stay in
their files.
"""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from geodata.grids import Grid, bilinear, read_grid, resample, same_grid
from geodata.rasters import DataError, open_raster, read_raster
from geodata.tiles import Tile

TWO_CLASSES = (("ground", (10, 20, 30)), ("house", (200, 100, 0)))
REAL = Path(__file__).parents[2] / "shared" / "data" / "ign_tile" / "raw"


def geo_tags(left, top, step=(1.0, 1.0), epsg=2154, model=1, raster=1, text=None, nodata=None):
    """The tags of a GeoTIFF; `model` 1 is projected, 2 geographic; an `epsg` of 32767 is
    user-defined.
    """
    code = {1: 3072, 2: 2048}[model]
    keys = [1, 1, 0, 3, 1024, 0, 1, model, 1025, 0, 1, raster, code, 0, 1, epsg]
    tags = [
        (33550, "d", 3, (*step, 0.0), True),
        (33922, "d", 6, (0.0, 0.0, 0.0, left, top, 0.0), True),
        (34735, "H", len(keys), keys, True),
    ]
    tags += [(34737, "s", 0, text, True)] if text else []
    return tags + ([(42113, "s", 0, str(nodata), True)] if nodata is not None else [])


def write(path, array, tags=(), **options):
    photometric = "rgb" if array.ndim == 3 and array.shape[2] >= 3 else "minisblack"
    tifffile.imwrite(path, array, photometric=photometric, extratags=tags, **options)
    return path


def image(rows, columns):
    return np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def tile_of(tmp_path, array, image_tags, dsm, dsm_tags):
    paths = {
        "image": write(tmp_path / "i.tif", array, image_tags),
        "dsm": write(tmp_path / "d.tif", dsm, dsm_tags),
    }
    return Tile("a", paths, TWO_CLASSES)


# --------------------------------------------------------------------------------------- resampling

shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))
steps = st.tuples(*[st.sampled_from([0.2, 0.5, 1.0, 1.7])] * 2)  # of columns and of rows


def height_at(array, row, column):
    """The oracle: the mean of the valid ones of the four neighbours, weighted by nearness; NaN
    outside.
    """
    h, w = array.shape
    if not (-0.5 <= row <= h - 0.5 and -0.5 <= column <= w - 0.5):
        return np.nan
    row, column = min(max(row, 0), h - 1), min(max(column, 0), w - 1)
    total = weights = 0
    for i in range(h):
        for j in range(w):
            weight = max(0, 1 - abs(i - row)) * max(0, 1 - abs(j - column))
            if not np.isnan(array[i, j]):
                total, weights = total + weight * array[i, j], weights + weight
    return total / weights if weights > 1e-6 else np.nan


@given(
    hnp.arrays(np.float32, shapes, elements=st.sampled_from([1.0, 4.0, 9.5, np.nan])),
    shapes,
    steps,
    steps,
    st.data(),
)
def test_heights_on_another_grid_are_the_mean_of_their_valid_neighbours(
    array, size, source_step, target_step, data
):
    shift = st.floats(-2, 2)
    source = Grid(100 + data.draw(shift), 500 + data.draw(shift), *source_step, 2154, True)
    target = Grid(100.0, 500.0, *target_step, 2154, True)
    wanted = np.empty(size)
    for i in range(size[0]):
        for j in range(size[1]):
            x, y = target.left + (j + 0.5) * target_step[0], target.top - (i + 0.5) * target_step[1]
            row, column = (source.top - y) / source_step[1], (x - source.left) / source_step[0]
            wanted[i, j] = height_at(array, row - 0.5, column - 0.5)
    try:
        found = resample(array, source, target, size)
    except DataError:
        assert np.isnan(wanted).all()
        return
    close = np.isclose(found, wanted, atol=1e-3, equal_nan=True)
    assert (
        close.all() or np.isnan(wanted[~close]).all() or np.isnan(found[~close]).all()
    )  # a place on the very edge


def test_a_plane_stays_the_plane_on_a_finer_grid():
    rows, columns = np.mgrid[:20, :30]
    plane = (100 + 2 * rows + 3 * columns).astype(np.float32)
    found = resample(
        plane, Grid(0, 20, 1, 1, None, None), Grid(2, 18, 0.25, 0.25, None, None), (40, 60)
    )
    y, x = (np.arange(n) * 0.25 + 0.125 + 2 - 0.5 for n in (40, 60))
    assert np.allclose(found, 100 + 2 * y[:, None] + 3 * x, atol=1e-3)


@given(hnp.arrays(np.float32, shapes, elements=st.floats(0, 9, width=32)))
def test_bilinear_at_the_pixels_is_the_raster_and_beyond_the_edge_its_edge(array):
    h, w = array.shape
    assert np.allclose(bilinear(array, np.arange(h), np.arange(w)), array)
    assert np.allclose(
        bilinear(array, np.array([-3.0, h + 2.0]), np.array([-1.0])), array[[0, -1], :1]
    )


def test_a_tile_lays_coarse_heights_on_the_grid_of_its_image_and_fills_what_they_do_not_reach(
    tmp_path,
):
    dsm = np.full((10, 10), 250, np.float32)
    dsm[:, 5:] = 260
    dsm[0, 0] = -9999
    tile = tile_of(
        tmp_path,
        image(40, 52),
        geo_tags(1000, 2000, (0.5, 0.5)),
        dsm,
        geo_tags(1000, 2000, (2, 2), nodata=-9999),
    )
    found = tile.read_dsm()
    assert found.shape == tile.size == (40, 52)
    assert (
        (found[10, :18] == 250).all()
        and (found[10, 22:40] == 260).all()
        and 250 < found[10, 20] < 260
    )
    assert (found[:, 40:] == 250).all()  # the height model ends there
    assert any("resampled" in note for note in tile.notes) and any(
        "without height" in note for note in tile.notes
    )
    assert (
        tile.missing_heights == 40 * 12 + 2 * 2 * 1
    )  # and the corner whose only neighbour is no-data: 2 x 2 pixels


def test_files_on_one_grid_are_not_resampled_whatever_rounding_moves(tmp_path):
    dsm = np.random.default_rng(1).uniform(1, 9, (41, 52)).astype(np.float32)
    tile = tile_of(tmp_path, image(40, 52), geo_tags(1000, 2000), dsm, geo_tags(1000.001, 2000))
    assert tile.size == (40, 52) and np.array_equal(tile.read_dsm(), dsm[:40])
    one = Grid(0, 0, 1, 1, None, None)
    assert same_grid(one, Grid(0.005, 0, 1, 1, None, None), (40, 40))
    assert not same_grid(one, Grid(0.1, 0, 1, 1, None, None), (40, 40))
    assert not same_grid(one, Grid(0, 0, 1.001, 1, None, None), (40, 40))


@pytest.mark.parametrize("shift", [0.05, 0.25, 0.5, 0.99])
def test_heights_a_part_of_a_pixel_away_are_resampled(tmp_path, shift):
    slope = np.arange(30, dtype=np.float32) * np.ones((20, 1), np.float32)
    tile = tile_of(tmp_path, image(20, 30), geo_tags(0, 99), slope, geo_tags(shift, 99))
    found = tile.read_dsm()
    assert np.allclose(found[:, 2:-2], slope[:, 2:-2] - shift, atol=1e-4)


def test_shifted_heights_of_the_same_size_are_resampled(tmp_path):
    dsm = np.arange(20 * 20, dtype=np.float32).reshape(20, 20)
    found = tile_of(tmp_path, image(20, 20), geo_tags(0, 100), dsm, geo_tags(3, 100)).read_dsm()
    assert np.array_equal(found[:, 3:], dsm[:, :-3])


# ----------------------------------------------------------------------------------- tags of a grid


def test_a_grid_is_read_from_its_tags(tmp_path):
    array = np.zeros((4, 4), np.float32)
    grid = read_grid(write(tmp_path / "a.tif", array, geo_tags(10, 20, (0.5, 0.25))))
    assert grid == Grid(10, 20, 0.5, 0.25, 2154, True) and grid.pixel_size() == 0.375
    point = read_grid(write(tmp_path / "b.tif", array, geo_tags(10, 20, (0.5, 0.5), raster=2)))
    assert (point.left, point.top) == (
        9.75,
        20.25,
    )  # the tie point is the middle of the first pixel
    degrees = read_grid(write(tmp_path / "c.tif", array, geo_tags(10, 20, model=2, epsg=4326)))
    assert degrees.system == 4326 and degrees.pixel_size() is None
    own = read_grid(
        write(tmp_path / "d.tif", array, geo_tags(10, 20, epsg=32767, text="EPSG:2154|"))
    )
    assert own.system == 2154
    assert read_grid(write(tmp_path / "e.tif", array, geo_tags(10, 20, epsg=32767))).system is None
    matrix = (0.5, 0.0, 0.0, 10.0, 0.0, -0.5, 0.0, 20.0, *[0.0] * 7, 1.0)
    assert read_grid(write(tmp_path / "f.tif", array, [(34264, "d", 16, matrix, True)])) == Grid(
        10, 20, 0.5, 0.5, None, None
    )
    assert read_grid(write(tmp_path / "g.tif", array)) is None


TURNED = (0.5, 0.1, 0.0, 10.0, 0.1, -0.5, 0.0, 20.0, *[0.0] * 7, 1.0)
SOUTH_UP = (0.5, 0.0, 0.0, 10.0, 0.0, 0.5, 0.0, 20.0, *[0.0] * 7, 1.0)


@pytest.mark.parametrize("matrix", [TURNED, SOUTH_UP])
def test_a_grid_that_does_not_go_north_serves_as_long_as_nothing_is_laid_on_it(tmp_path, matrix):
    tags, pixels = [(34264, "d", 16, matrix, True)], image(20, 20)
    dsm = np.random.default_rng(0).uniform(1, 9, (20, 20)).astype(np.float32)
    paths = {
        "image": write(tmp_path / "i.tif", pixels, tags),
        "dsm": write(tmp_path / "d.tif", dsm, tags),
    }
    grid = read_grid(paths["image"])
    assert not grid.north_up and np.allclose(
        grid.corner(2, 4), (12 + matrix[1] * 2, 20 + matrix[4] * 4 + matrix[5] * 2)
    )
    assert np.array_equal(Tile("a", paths, TWO_CLASSES).read_dsm(), dsm)
    assert Tile("a", {"image": paths["image"]}, TWO_CLASSES).load(("image",)).size == (20, 20)
    write(tmp_path / "d.tif", dsm, geo_tags(10, 20, (0.5, 0.5)))
    with pytest.raises(DataError, match="d.tif.*rotated or goes south.*gdalwarp"):
        Tile("a", paths, TWO_CLASSES).read_dsm()


UNFIT = {
    "two projections": (
        geo_tags(0, 100),
        geo_tags(0, 100, (2, 2), epsg=32631),
        "coordinate system",
    ),
    "metres and degrees": (
        geo_tags(0, 100),
        geo_tags(0, 100, (2, 2), epsg=4326, model=2),
        "coordinate system",
    ),
    "another place": (geo_tags(0, 100), geo_tags(5000, 100, (2, 2)), "does not overlap"),
    "no tags": (geo_tags(0, 100), [], "GeoTIFF tags"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_heights_that_cannot_be_laid_on_the_image_are_one_line_that_names_their_file(
    tmp_path, case
):
    image_tags, dsm_tags, message = UNFIT[case]
    tile = tile_of(tmp_path, image(20, 20), image_tags, np.ones((10, 10), np.float32), dsm_tags)
    with pytest.raises(DataError, match=message) as caught:
        tile.load(("image", "dsm"))
    assert str(tmp_path / "d.tif") in str(caught.value) and "\n" not in str(caught.value)


def test_a_system_without_a_number_is_taken_for_the_other_files(tmp_path):
    tags = geo_tags(0, 100, (2, 2), epsg=32767)
    tile = tile_of(tmp_path, image(20, 20), geo_tags(0, 100), np.ones((10, 10), np.float32), tags)
    assert (tile.read_dsm() == 1).all()


@pytest.mark.skipif(not REAL.is_dir(), reason="needs shared/data")
def test_the_real_files_of_two_grids_lie_on_each_other():
    tile = Tile("a", {"image": REAL / "irrg_20cm.tif", "dsm": REAL / "dsm_50cm.tif"}, TWO_CLASSES)
    found = tile.read_dsm()
    own = REAL.parent / "train" / "dsm" / "770550_6277550_train.tif"
    wanted = read_raster(own)  # 0.2 m, from the image's second row and column on
    errors = [
        np.median(np.abs(found[i : i + 248, j : j + 158] - wanted[:248, :158]))
        for i, j in ((1, 1), (0, 0), (3, 3))
    ]
    assert found.shape == (252, 252) and 20 < found.min() < found.max() < 40
    assert errors[0] < 0.1 and errors[0] == min(errors)


# ------------------------------------------------------------------------------------ damaged files


def test_a_16_bit_image_declared_as_8_bit_is_one_line_that_names_it(tmp_path):
    for name, options in (("a.tif", {}), ("b.tif", {"compression": "zlib"})):
        path = write(tmp_path / name, image(20, 20).astype(np.uint16) * 200, **options)
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            tiff.pages[0].tags["BitsPerSample"].overwrite((8, 8, 8))
        with pytest.raises(
            DataError, match=f"{name}.*bytes of pixels where .* header declares"
        ) as caught:
            read_raster(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", ["dsm", "labels"])
def test_a_damaged_raster_is_named_and_no_other(tmp_path, broken):
    paths = {
        "image": write(tmp_path / "image.tif", image(20, 20)),
        "dsm": write(tmp_path / "dsm.tif", np.zeros((20, 20), np.float32)),
        "labels": write(tmp_path / "labels.tif", np.zeros((20, 20), np.uint8)),
    }
    paths[broken].write_bytes(b"II*\0" + bytes(60))
    tile = Tile("a", paths, TWO_CLASSES)
    for look in (tile.check, tile.load):
        with pytest.raises(DataError) as caught:
            look(("image", "dsm"))
        assert str(caught.value).startswith(f"{paths[broken]}: ")


def test_an_uncompressed_strip_of_other_bytes_than_its_rows_is_found_when_it_is_opened(tmp_path):
    path = write(tmp_path / "short.tif", image(60, 60), rowsperstrip=10)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        counts = list(tiff.pages[0].databytecounts)
        tiff.pages[0].tags["StripByteCounts"].overwrite([*counts[:3], counts[3] - 5, *counts[4:]])
    with pytest.raises(DataError, match="short.tif: segments hold .* its header declares"):
        open_raster(path)


@pytest.mark.parametrize("lacking", [1, 3000])
def test_a_truncated_tiff_names_itself_and_what_it_lacks_when_it_is_opened(tmp_path, lacking):
    path = write(tmp_path / "cut.tif", image(60, 60))
    path.write_bytes(path.read_bytes()[:-lacking])
    with pytest.raises(DataError, match="cut.tif: truncated, .* fetch the file again"):
        open_raster(path)


def test_a_picture_of_any_size_is_read_and_the_limit_that_pillow_has_for_others_is_left_as_it_was(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # twice as many pixels are refused by Pillow
    pixels = np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    path = tmp_path / "ortho.png"
    Image.fromarray(pixels).save(path)
    assert np.array_equal(read_raster(path), pixels) and open_raster(path).shape[:2] == (11, 13)
    (tmp_path / "broken.png").write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="broken.png"):
        read_raster(tmp_path / "broken.png")
    assert Image.MAX_IMAGE_PIXELS == 50
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)


def test_headers_tell_bands_and_bytes(tmp_path):
    path = write(tmp_path / "a.tif", np.zeros((5, 4, 4), np.uint16), extrasamples=["unspecified"])
    raster = open_raster(path)
    assert (raster.bands, raster.dtype) == (4, np.uint16)
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(tmp_path / "a.png")
    raster = open_raster(tmp_path / "a.png")
    assert (raster.bands, raster.dtype) == (1, np.uint8)
