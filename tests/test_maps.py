"""The maps that are written: class indices, colours, names, no-data, and where on earth they lie."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import maps
from data import labels_to_colors, read_raster
from maps import NO_CLASS, cut_out, write_map
from maps import without_data as find_missing
from rasters import DataError, alpha_band, nodata_value, read_grid
from slices import open_raster

REAL = Path(__file__).parents[2] / "shared" / "data" / "ign_tile" / "raw"
CLASSES = tuple((f"class <{k}>", color) for k, color in enumerate([(1, 2, 3), (255, 255, 255), (0, 9, 99), (200, 0, 0)]))
TAGS = [
    (33550, "d", 3, (0.2, 0.25, 0.0), True),
    (33922, "d", 6, (0.0, 0.0, 0.0, 770549.8, 6277600.2, 0.0), True),
    (34735, "H", 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 2154), True),
    (34736, "d", 2, (49.0, 44.5), True),
    (34737, "s", 0, "EPSG:2154|", True),
]


def random_map(H, W, seed=0):
    return np.random.default_rng(seed).integers(0, len(CLASSES), (H, W), dtype=np.uint8)


def cut(array, heights):
    """The array in strips of the given heights, and the rest."""
    return np.split(array, [n for n in np.cumsum(heights) if n < len(array)])


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, np.zeros((5, 6, 3), np.uint8), photometric="rgb", extratags=TAGS)
    return path


@pytest.mark.parametrize("name", ["map.png", "map.tif", "map.TIFF", "MAP.PNG"])
def test_a_map_holds_the_class_indices_and_a_table_of_their_colours(tmp_path, name):
    for H, W in ((1, 1), (7, 30), (65, 64), (300, 513)):
        classes = random_map(H, W)
        write_map(tmp_path / name, [classes], (H, W), CLASSES)
        assert np.array_equal(read_raster(tmp_path / name), classes)
        with Image.open(tmp_path / name) as picture:
            colours = labels_to_colors(classes, [color for _, color in CLASSES])
            assert np.array_equal(np.asarray(picture.convert("RGB")), colours)
    assert files_in(tmp_path) == sorted([name, name + ".aux.xml"])


@given(st.integers(1, 600), st.integers(1, 300), st.lists(st.integers(1, 300), max_size=6), st.sampled_from(["png", "tif"]))
def test_any_strips_make_up_the_map(tmp_path_factory, H, W, heights, ending):
    path, classes = tmp_path_factory.mktemp("maps") / f"map.{ending}", random_map(H, W)
    write_map(path, iter(cut(classes, heights)), (H, W), CLASSES)
    assert np.array_equal(read_raster(path), classes)


def test_a_tiff_lies_where_the_image_lies_and_names_its_no_data(tmp_path, image):
    path = tmp_path / "map.tif"
    write_map(path, [random_map(5, 6)], (5, 6), CLASSES, image)
    with tifffile.TiffFile(path) as found, tifffile.TiffFile(image) as wanted:
        for code, *_ in TAGS:
            tag, other = found.pages[0].tags[code], wanted.pages[0].tags[code]
            assert (tag.dtype, tag.count, tag.value) == (other.dtype, other.count, other.value)
        page = found.pages[0]
        assert page.is_tiled and page.compression in (8, 32946) and page.photometric == 3 and page.dtype == np.uint8
    assert read_grid(path) == read_grid(image) and nodata_value(path) == NO_CLASS


def test_a_png_has_a_world_file_of_the_middle_of_its_first_pixel(tmp_path, image):
    write_map(tmp_path / "map.png", [random_map(5, 6)], (5, 6), CLASSES, image)
    lines = [float(line) for line in (tmp_path / "map.pgw").read_text().splitlines()]
    assert lines == pytest.approx([0.2, 0, 0, -0.25, 770549.9, 6277600.075])


@pytest.mark.parametrize("name", ["map.tif", "map.png"])
def test_without_georeferencing_there_is_neither_a_tag_nor_a_world_file(tmp_path, name):
    tifffile.imwrite(tmp_path / "image.tif", np.zeros((5, 6), np.uint8))
    write_map(tmp_path / name, [random_map(5, 6)], (5, 6), CLASSES, tmp_path / "image.tif")
    assert files_in(tmp_path) == sorted(["image.tif", name, name + ".aux.xml"])
    assert name == "map.png" or read_grid(tmp_path / name) is None


def test_the_sidecar_names_the_classes_for_gdal(tmp_path):
    from xml.etree import ElementTree

    write_map(tmp_path / "map.tif", [random_map(5, 6)], (5, 6), (("Straße & Weg", (1, 2, 3)), ("<b>", (4, 5, 6))))
    found = ElementTree.parse(tmp_path / "map.tif.aux.xml").findall("PAMRasterBand[@band='1']/CategoryNames/Category")
    assert [name.text for name in found] == ["Straße & Weg", "<b>"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")], ids=str)
@pytest.mark.parametrize("name", ["map.png", "map.tif"])
def test_a_map_that_breaks_off_leaves_the_earlier_one_and_nothing_else(tmp_path, image, name, error):
    def strips():
        yield random_map(400, 6)
        raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        write_map(tmp_path / name, strips(), (800, 6), CLASSES, image)
    assert files_in(tmp_path) == ["image.tif"]
    write_map(tmp_path / name, [random_map(5, 6)], (5, 6), CLASSES, image)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises((KeyboardInterrupt, OSError)):
        write_map(tmp_path / name, strips(), (800, 6), CLASSES, image)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_strips_are_written_as_they_come_and_not_gathered(tmp_path):
    waiting = []

    def strips():
        for top in range(0, 5000, 100):
            waiting.append((tmp_path / "map.png.tmp").stat().st_size)
            yield random_map(100, 300, top)

    write_map(tmp_path / "map.png", strips(), (5000, 300), CLASSES)
    assert waiting[25] > 100_000 and waiting[-1] > 1.8 * waiting[25]


# --------------------------------------------------------------------------------------------------------------- no data


def write_image(path, array, nodata=None, alpha=False):
    tags = [] if nodata is None else [(42113, "s", 0, str(nodata), True)]
    extra = dict(extrasamples=["unassalpha"]) if alpha else {}
    tifffile.imwrite(path, array, photometric="rgb", extratags=tags, **extra)
    return path


def map_of(path, classes):
    raw = open_raster(path)
    return np.concatenate(list(cut_out(cut(classes, [3, 4, 1]), find_missing(path, raw))))


@pytest.mark.parametrize("kind", ["nodata", "alpha", "both", "neither"])
def test_there_is_no_class_where_the_image_has_no_data(tmp_path, kind):
    array = np.random.default_rng(0).integers(1, 250, (20, 9, 4), dtype=np.uint8)
    array[:2, :, :3], array[5, 5, :2], array[:, -1, 3] = 255, 255, 0  # a white place, one white in two bands, a clear one
    wanted = random_map(20, 9)
    path = write_image(
        tmp_path / "a.tif",
        array if kind in ("alpha", "both") else array[..., :3],
        255 if kind in ("nodata", "both") else None,
        kind in ("alpha", "both"),
    )
    found = map_of(path, wanted)
    if kind in ("nodata", "both"):
        wanted[:2] = NO_CLASS
    if kind in ("alpha", "both"):
        wanted[:, -1] = NO_CLASS
    assert np.array_equal(found, wanted)


def test_a_fourth_band_that_is_near_infrared_is_no_alpha(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 4, 4), np.uint8), photometric="rgb", extrasamples=["unspecified"])
    Image.new("RGBA", (4, 4)).save(tmp_path / "a.png")
    assert alpha_band(tmp_path / "a.tif") is None and alpha_band(tmp_path / "a.png") == 3


def test_the_real_image_s_white_roofs_keep_their_class():
    path = REAL / "irrg_20cm.tif"
    if not path.exists():
        pytest.skip("needs the shared tile")
    assert nodata_value(path) == 255 and (map_of(path, random_map(252, 252)) != NO_CLASS).all()


@pytest.mark.parametrize(
    "out, part", [("map.jpg", "png or .tif"), ("no/map.png", "folder"), ("dir.tif", "is a folder"), ("image.tif", "is one of")]
)
def test_a_place_where_no_map_can_be_is_refused_before_anything_is_computed(tmp_path, image, out, part):
    (tmp_path / "dir.tif").mkdir()
    with pytest.raises(DataError, match=part):
        maps.check_out(tmp_path / out, [image])
