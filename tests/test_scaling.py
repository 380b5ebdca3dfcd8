"""Heights and pixels on their way to a network: the choice is kept with a run, the numbers are the
tile's.
"""

import json

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data import open_dataset
from geodata.crops import CropDataset
from geodata.loading import load_tiles
from geodata.rasters import DataError
from geodata.scaling import (
    GROUND_SPAN,
    REFLECTANCE,
    SAM_MEAN,
    SAM_STD,
    Scaling,
    local_ground,
    measure_heights,
    measure_image,
    sliding_min,
)
from geodata.tiles import Tile

TWO_CLASSES = (("ground", (10, 20, 30)), ("house", (200, 100, 0)))
WHOLE = np.s_[0:1000, 0:1000]


def tile_of(folder, scaling=Scaling(), **arrays):
    paths = {}
    for kind, array in arrays.items():
        paths[kind] = folder / f"{kind}.tif"
        options = {"photometric": "rgb" if array.shape[-1] == 3 else "minisblack"}
        if array.ndim == 3 and array.shape[2] > 3:
            options |= {"photometric": "minisblack", "planarconfig": "contig"}
        tifffile.imwrite(paths[kind], array, **options)
    return Tile("a", paths, TWO_CLASSES, scaling=scaling)


# ------------------------------------------------------------------------------------------ heights


def heights_by(choice, dsm, unit=1.0, pixel=0.5):
    dsm = dsm * np.float32(unit)
    return measure_heights(choice, dsm, pixel).height_input(dsm, WHOLE)


def test_each_choice_of_heights_is_what_its_name_says():
    dsm = np.linspace(240, 300, 10_000, dtype=np.float32).reshape(100, 100)
    dsm[0, 0], dsm[-1, -1] = 100, 900  # a pit and a crane
    assert np.allclose(heights_by("minmax", dsm), (dsm - 100) / 800, atol=1e-6)
    low, high = np.percentile(dsm, (1, 99))
    assert np.allclose(
        heights_by("percentiles", dsm), ((dsm - low) / (high - low)).clip(0, 1), atol=1e-5
    )
    assert np.allclose(heights_by("250:290", dsm), ((dsm - 250) / 40).clip(0, 1), atol=1e-6)
    decimetres = np.array([[0, 50], [100, 255]], np.uint8)
    assert np.allclose(heights_by("0:20", decimetres, unit=0.1), [[0, 0.25], [0.5, 1]], atol=1e-6)


@pytest.mark.parametrize("choice", ["minmax", "percentiles", "ground", "240:300"])
def test_flat_heights_are_finite(choice):
    assert np.isfinite(heights_by(choice, np.full((20, 20), 250, np.float32))).all()


def test_height_above_ground_knows_no_hill_and_keeps_houses():
    rows, columns = np.mgrid[:400, :500]
    hill = (250 + 0.05 * rows + 0.03 * columns).astype(np.float32)
    dsm = hill.copy()
    dsm[150:190, 200:260] += 12
    found = GROUND_SPAN * heights_by("ground", dsm, pixel=0.5)  # the square is 120 pixels wide
    house = np.zeros(dsm.shape, bool)
    house[150:190, 200:260] = True
    assert (
        np.abs(found[house] - 12).max() < 3
        and found[~house].max() < 6.5
        and found[~house].mean() < 3
    )
    above = found[house].mean() - found[~house].mean()
    assert abs(above - 12) < 1.5


@settings(max_examples=10)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        elements=st.floats(-9, 9, width=32),
    ),
    st.sampled_from([1, 3, 5, 7, 15]),
)
def test_the_sliding_minimum_is_the_lowest_of_each_square(array, span):
    half = span // 2
    for i, j in np.ndindex(array.shape):
        square = array[max(i - half, 0) : i + half + 1, max(j - half, 0) : j + half + 1]
        assert sliding_min(array, span)[i, j] == square.min()


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        elements=st.floats(0, 30, width=32),
    ),
    st.floats(1, 90),
)
def test_the_ground_is_an_opening_it_lies_below_every_cell_s_lowest(dsm, width):
    ground, cell = local_ground(dsm, width)
    for i, j in np.ndindex(ground.shape):
        assert ground[i, j] <= dsm[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].min()


def test_the_ground_below_a_crop_is_that_of_the_tile(tmp_path):
    rng = np.random.default_rng(0)
    dsm = (250 + 10 * rng.random((90, 80))).astype(np.float32)
    tile = tile_of(tmp_path, Scaling("ground"), dsm=dsm, labels=(dsm > 255).astype(np.uint8))
    tile.pixel = 1.0
    scale = tile.load(("dsm",)).scale
    box = np.s_[31:70, 12:50]
    assert np.allclose(
        scale.height_input(dsm[box], box),
        scale.height_input(dsm, np.s_[0:90, 0:80])[box],
        atol=1e-6,
    )


def test_height_above_ground_without_the_size_of_a_pixel_is_one_line_that_names_the_file(tmp_path):
    tile = tile_of(tmp_path, Scaling("ground"), dsm=np.ones((8, 8), np.float32))
    with pytest.raises(DataError, match="dsm.tif.*size of a pixel"):
        tile.load(("dsm",))


# ------------------------------------------------------------------------------------------- images


def image_by(choice, image):
    return np.moveaxis(measure_image(choice, image).image_input(image), 0, -1)


def test_each_choice_of_images_is_what_its_name_says():
    image = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    assert np.allclose(image_by("unit", image), image / 255, atol=1e-6)
    assert np.allclose(image_by("sam", image), (image - np.array(SAM_MEAN)) / SAM_STD, atol=1e-5)
    assert np.allclose(image_by("50:150", image), ((image - 50.0) / 100).clip(0, 1), atol=1e-6)
    assert np.allclose(
        image_by("reflectance", image), image / 255, atol=1e-6
    )  # 8 bits are prepared pixels
    own = image_by("minmax", image)
    assert np.allclose(own.min((0, 1)), 0) and np.allclose(own.max((0, 1)), 1)
    deep = image.astype(np.uint16) * 257
    assert np.allclose(image_by("sam", deep), image_by("sam", image), atol=1e-5)


@pytest.mark.parametrize(
    "dtype, factor",
    [(np.int16, 10_000), (np.uint16, 10_000), (np.float32, 10_000), (np.float32, 1)],
)
def test_reflectance_is_one_range_for_whole_numbers_and_fractions(dtype, factor):
    reflectance = np.array([[[0.0, 0.1, 0.3]], [[0.2, 0.4, 0.9]]])
    found = image_by("reflectance", (reflectance * factor).astype(dtype))
    assert np.allclose(found, (reflectance / REFLECTANCE).clip(0, 1), atol=1e-3)


def test_an_image_of_one_grey_is_finite():
    assert (image_by("minmax", np.full((4, 4, 3), 7, np.uint8)) == 0).all()


def test_16_bit_and_float_images_with_a_fixed_range_reach_the_network(tmp_path):
    for dtype in (np.int16, np.uint16, np.float32):
        image = np.random.default_rng(0).integers(0, 3000, (16, 16, 5)).astype(dtype)
        tile = tile_of(
            tmp_path,
            Scaling(images="0:2000"),
            image=image,
            labels=(image[..., 0] > 99).astype(np.uint8),
        )
        tile.bands = (4, 1, 0)
        (loaded,) = load_tiles([tile], ("image",), 1)
        (found,), _ = CropDataset([loaded], 16, 0, ("image",))[0, 0]
        wanted = (image[..., [4, 1, 0]] / 2000).clip(0, 1).transpose(2, 0, 1)
        assert any(
            np.allclose(found, flipped, atol=1e-6)
            for flipped in (wanted, wanted[:, ::-1], wanted[:, :, ::-1], wanted[:, ::-1, ::-1])
        )


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_pixels_without_a_natural_range_ask_for_one_and_name_the_file(tmp_path, dtype):
    tile = tile_of(tmp_path, image=np.full((8, 8, 3), 700, dtype))
    with pytest.raises(DataError, match="image.tif.*--image-scaling LOW:HIGH"):
        tile.read_image()


def test_a_band_that_is_not_there_is_one_line_that_names_the_file(tmp_path):
    tile = tile_of(tmp_path, image=np.zeros((8, 8, 3), np.uint8))
    tile.bands = (3, 1, 0)
    with pytest.raises(DataError, match="image.tif: has 3 bands, and band 4 is asked for"):
        tile.read_image()


# --------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    "heights, images",
    [
        ("metres", "unit"),
        ("9:3", "unit"),
        ("nan:3", "unit"),
        ("1:2:3", "unit"),
        ("minmax", "8bit"),
        ("minmax", "percentiles"),
        ("", "unit"),
    ],
)
def test_an_unknown_choice_is_one_line_that_lists_the_known_ones(heights, images):
    with pytest.raises(DataError, match="give .*minmax.* or a range LOW:HIGH"):
        Scaling(heights, images)


def test_own_tiles_take_bands_counted_from_one_and_a_scaling(tmp_path):
    image = np.random.default_rng(0).integers(0, 4000, (12, 12, 6)).astype(np.uint16)
    (tmp_path / "classes.json").write_text(
        json.dumps({"classes": [{"name": n, "color": c} for n, c in TWO_CLASSES]})
    )
    for kind, array in (("images", image), ("labels", (image[..., 0] > 99).astype(np.uint8))):
        (tmp_path / "train" / kind).mkdir(parents=True)
        options = {"photometric": "minisblack"} | (
            {"planarconfig": "contig"} if array.ndim == 3 else {}
        )
        tifffile.imwrite(tmp_path / "train" / kind / "a.tif", array, **options)
    (tile,) = open_dataset(
        "tiles", tmp_path, bands="4,3,2", scaling=Scaling(images="0:4000")
    ).tiles("train", ("image",))
    assert np.array_equal(tile.read_image(), image[..., [3, 2, 1]])
    assert np.allclose(
        tile.load(("image",)).scale.image_input(image[..., :3]).max(), image[..., :3].max() / 4000
    )
    for wrong in ("rgb", "0,1,2", "1,2,2.5", "1,,2"):
        with pytest.raises(DataError, match="--bands"):
            open_dataset("tiles", tmp_path, bands=wrong)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_an_image_may_be_one_band(tmp_path, dtype):
    image = np.arange(64, dtype=dtype).reshape(8, 8) / dtype(64 if dtype == np.float32 else 1)
    tifffile.imwrite(tmp_path / "a.tif", image.astype(dtype))
    tile = Tile("a", {"image": tmp_path / "a.tif"}, TWO_CLASSES, bands=(0,))
    assert np.array_equal(tile.load(("image",)).image, image[..., None].astype(dtype))


@given(st.integers(0, 99), st.floats(0.1, 500))
def test_as_published_both_rasters_are_truncated_to_8_bits(seed, unit):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(7, 9, 3)).astype(np.float32) * np.float32(unit)
    dsm = rng.normal(size=(7, 9)).astype(np.float32) * np.float32(unit)
    of_image, of_heights = measure_image("minmax8", image), measure_heights("minmax8", dsm)

    def published(raster):
        low, high = raster.min(), raster.max()
        eight = (255 * ((raster - low) / (high - low)).astype(np.float64)).astype(np.uint8)
        return eight / 255

    box = np.s_[0:7, 0:9]
    found = of_image.image_input(image), of_heights.height_input(dsm, box)
    wanted = np.stack([published(image[..., k]) for k in range(3)]), published(dsm)
    for a, b in zip(found, wanted):
        assert np.abs(a - b).max() < 1.01 / 255 and np.mean(np.abs(a - b) < 1e-6) > 0.95
        assert np.allclose(255 * a, np.round(255 * a), atol=1e-3) and a.max() == 1 and a.min() == 0
    plain = measure_image("minmax", image)
    assert 0 <= (plain.image_input(image) - found[0]).max() <= 1.01 / 255


@pytest.mark.parametrize("modalities", [("image",), ("image", "dsm")])
def test_an_image_alone_is_truncated_to_8_bits_too(tmp_path, modalities):
    image = np.random.default_rng(0).integers(0, 9999, (8, 8, 3), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb")
    tifffile.imwrite(tmp_path / "h.tif", image[..., 0].astype(np.float32))
    paths = {"image": tmp_path / "a.tif", "dsm": tmp_path / "h.tif"}
    tile = Tile("a", paths, TWO_CLASSES, scaling=Scaling("minmax8", "minmax8"))
    found = 255 * tile.load(modalities).input("image", np.s_[0:8, 0:8])
    assert np.allclose(found, np.round(found), atol=1e-3)
