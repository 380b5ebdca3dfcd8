"""Data: colours, heights, files, tiles, crops and windows."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from data import open_dataset
from geodata.crops import CropDataset, CropOrder, draw_crop, sliding_windows
from geodata.labels import colors_to_labels, labels_to_colors
from geodata.layouts import ISPRS_CLASSES
from geodata.rasters import DataError, read_raster
from geodata.scaling import TileScale, height_range, image_input, scale_heights, valid_heights
from geodata.tiles import LoadedTile, Tile

GOLDENS = Path(__file__).parent / "goldens"
PALETTE = [color for _, color in ISPRS_CLASSES]
NODATA_TAG = 42113
TWO_CLASSES = (("ground", (10, 20, 30)), ("house", (200, 100, 0)))

byte = st.integers(0, 255)
palettes = st.lists(st.tuples(byte, byte, byte), min_size=1, max_size=64, unique=True)
pixels = hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3)))
one_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # examples overwrite their files


def numbers(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def write(path, array, **options):
    """Writes a raster by its ending, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        rgb = array.ndim == 3 and array.shape[2] >= 3
        tifffile.imwrite(path, array, **{"photometric": "rgb" if rgb else "minisblack", **options})
    else:
        Image.fromarray(array).save(path, **options)
    return path


# ------------------------------------------------------------------------------------------ colours


@given(palettes, st.data())
def test_labels_survive_the_way_to_colours_and_back(palette, data):
    labels = data.draw(hnp.arrays(np.uint8, (4, 5), elements=st.integers(0, len(palette) - 1)))
    assert np.array_equal(colors_to_labels(labels_to_colors(labels, palette), palette), labels)


@given(palettes.filter(lambda p: len(p) > 1), pixels, st.data())
def test_a_pixel_gets_the_colour_that_no_channel_leaves_by_more_than_the_tolerance(
    palette, rgb, data
):
    def distance(a, b):
        return max(abs(int(x) - int(y)) for x, y in zip(a, b))

    closest = min(distance(a, b) for i, a in enumerate(palette) for b in palette[:i])
    tolerance = data.draw(st.integers(0, (closest - 1) // 2))
    rgb[0, 0] = palette[-1]
    expected = [
        [[k for k, c in enumerate(palette) if distance(p, c) <= tolerance] or [99] for p in row]
        for row in rgb
    ]
    found = colors_to_labels(rgb, palette, tolerance, unknown=99)
    assert np.array_equal(found, np.array(expected)[..., 0])


@given(pixels)
def test_isprs_colours_are_thresholded_at_127(rgb):
    codes = colors_to_labels(rgb, [*PALETTE, (0, 0, 0)])
    for pixel, code in zip(rgb.reshape(-1, 3), codes.ravel()):
        corner = tuple(255 if v > 127 else 0 for v in pixel)
        assert code == {**{c: k for k, c in enumerate(PALETTE)}, (0, 0, 0): 6}.get(corner, 255)


def test_the_cars_of_potsdam_6_7_are_cars_unless_colours_are_to_be_exact():
    rgb = np.array([[(252, 255, 0), (255, 255, 0)]], np.uint8)
    assert colors_to_labels(rgb, PALETTE).tolist() == [[4, 4]]
    assert colors_to_labels(rgb, PALETTE, tolerance=0).tolist() == [[255, 4]]
    assert colors_to_labels(rgb, PALETTE, tolerance=0, unknown=0).tolist() == [[0, 4]]


@pytest.mark.parametrize(
    "palette, tolerance", [([(0, 0, 0), (7, 9, 0)], 5), (PALETTE, 128), ([(1, 2, 3)] * 2, None)]
)
def test_an_ambiguous_palette_is_refused(palette, tolerance):
    with pytest.raises(ValueError, match="ambiguous"):
        colors_to_labels(np.zeros((2, 2, 3), np.uint8), palette, tolerance)


# ------------------------------------------------------------------------------------------ heights

holes = st.sampled_from(
    [np.nan, np.inf, -np.inf, -9999, 3.4e38, -3.4028235e38, 12345.0, 77.0]
)  # 77 by the file's tag
metres = st.floats(240, 300, width=32)


@one_folder
@given(
    hnp.arrays(np.float32, (4, 5), elements=metres),
    st.lists(st.tuples(st.integers(0, 18), holes), max_size=12),
)
def test_missing_heights_read_as_the_lowest_and_enter_neither_end_of_the_range(
    tmp_path, dsm, missing
):
    damaged, valid = dsm.copy(), np.ones(dsm.shape, bool)
    for place, value in missing:
        damaged.flat[place], valid.flat[place] = value, False
    tags = [(NODATA_TAG, "s", 0, "77", True)]
    path = write(tmp_path / "a.tif", damaged, extratags=tags)
    tile = Tile("a", {"dsm": path}, TWO_CLASSES)
    found = tile.read_dsm()
    assert tile.missing_heights == (~valid).sum()
    assert height_range(found) == tile.height_limits == (dsm[valid].min(), dsm[valid].max())
    assert np.array_equal(found, np.where(valid, dsm, dsm[valid].min()))


def test_heights_of_1_km_below_and_of_10_km_are_absurd():
    heights = np.array([-1000, -999.5, 9999.5, 10_000, np.nan, np.inf], np.float32)
    assert valid_heights(heights).tolist() == [False, True, True, False, False, False]


@given(hnp.arrays(np.float32, (3, 4), elements=metres))
def test_heights_are_scaled_to_0_and_1_over_the_tile(dsm):
    low, high = float(dsm.min()), float(dsm.max())
    found = scale_heights(dsm, height_range(dsm))
    expected = (dsm.astype(float) - low) / (high - low) if high > low else np.zeros(dsm.shape)
    assert found.dtype == np.float32 and np.allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "value, tag", [(np.nan, None), (-9999, None), (3.4e38, None), (5, "5"), (5, "5\x00")]
)
def test_a_height_file_s_missing_pixels_are_filled_and_noted(tmp_path, value, tag):
    dsm = np.full((6, 7), 250, np.float32)
    dsm[2, 3], dsm[0, 0] = value, 241
    tags = [(NODATA_TAG, "s", 0, tag, True)] if tag else []
    tile = Tile("a", {"dsm": write(tmp_path / "a.tif", dsm, extratags=tags)}, TWO_CLASSES)
    found = tile.load(("dsm",))
    assert found.dsm[2, 3] == 241 and found.scale.heights == (241, 250)
    assert len(tile.notes) == 1 and "1 pixels without height" in tile.notes[0]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_heights_of_every_type_are_read_as_float32(tmp_path, dtype):
    dsm = numbers(5, 6, dtype=dtype)
    found = Tile("a", {"dsm": write(tmp_path / "a.tif", dsm)}, TWO_CLASSES).read_dsm()
    assert found.dtype == np.float32 and np.array_equal(found, dsm)


def test_heights_without_any_valid_pixel_are_an_error_that_names_the_file(tmp_path):
    path = write(tmp_path / "empty.tif", np.full((4, 4), -9999, np.float32))
    with pytest.raises(DataError, match="empty.tif.*no valid height"):
        Tile("a", {"dsm": path}, TWO_CLASSES).read_dsm()


# ------------------------------------------------------------------------------------------ reading

RGB = numbers(24, 20, 3)
FILES = {  # name -> (what is written, how)
    "plain.tif": (RGB, {}),
    "deflate.tif": (RGB, {"compression": "zlib"}),
    "bits16.tif": (numbers(24, 20, 3, dtype=np.uint16), {}),
    "float.tif": (numbers(24, 20, dtype=np.float32), {}),
    "bands4.tif": (numbers(24, 20, 4), {"extrasamples": ["unassalpha"]}),
    "grey.png": (RGB[..., 0], {}),
    "bits16.png": (numbers(24, 20, dtype=np.uint16), {}),
    "rgb.png": (RGB, {}),
    "rgba.png": (numbers(24, 20, 4), {}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_reads_as_it_was_written(tmp_path, name):
    array, options = FILES[name]
    found = read_raster(write(tmp_path / name, array, **options))
    assert found.dtype == array.dtype and np.array_equal(found, array)


@pytest.mark.parametrize("bands", [3, 4])
def test_a_tiff_that_stores_its_bands_one_after_the_other_reads_like_any_other(tmp_path, bands):
    image = numbers(9, 8, bands)
    write(tmp_path / "a.tif", np.moveaxis(image, -1, 0), photometric="rgb", planarconfig="separate")
    assert np.array_equal(read_raster(tmp_path / "a.tif"), image)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_compressed_tiffs_of_other_programs_are_read(tmp_path, compression):
    Image.fromarray(RGB).save(tmp_path / "a.tif", compression=compression)
    assert np.array_equal(read_raster(tmp_path / "a.tif"), RGB)


def test_a_jpeg_is_read(tmp_path):
    found = read_raster(
        write(tmp_path / "a.jpg", np.full((16, 16, 3), (200, 100, 50), np.uint8), quality=100)
    )
    assert found.shape == (16, 16, 3) and np.abs(found - np.array((200.0, 100, 50))).max() <= 3


@pytest.mark.skipif(find_spec("imagecodecs") is not None, reason="imagecodecs reads it")
def test_an_unreadable_compression_is_named_with_the_package_that_reads_it(tmp_path):
    path = write(tmp_path / "a.tif", RGB)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(int(tifffile.COMPRESSION.LERC))
    with pytest.raises(DataError, match="a.tif: compressed by LERC; pip install imagecodecs"):
        read_raster(path)


@one_folder
@given(
    st.sampled_from(["plain.tif", "deflate.tif", "lzw.tif", "rgb.png", "rgb.jpg"]),
    st.floats(0, 1),
    st.booleans(),
)
def test_a_damaged_file_is_read_whole_or_is_an_error_of_one_line_that_names_it(
    tmp_path, name, where, cut_off
):
    path = tmp_path / name
    if name == "lzw.tif":
        Image.fromarray(RGB).save(path, compression="tiff_lzw")
    else:
        write(path, RGB, **({"compression": "zlib"} if name == "deflate.tif" else {}))
    whole, content = read_raster(path), path.read_bytes()
    place = int(where * (len(content) - 1))
    rest = b"" if cut_off else bytes(min(64, len(content) - place))
    path.write_bytes(content[:place] + rest + content[place + len(rest) :] * (not cut_off))
    tile = Tile("a", {"image": path}, TWO_CLASSES)
    try:
        found = tile.read_image()
    except DataError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:  # a PNG may lose its end mark without losing a pixel
        assert np.array_equal(found, whole) if cut_off else found.ndim == 3


@pytest.mark.parametrize("name", ["half.tif", "half.png", "half.jpg"])
def test_half_a_file_is_an_error(tmp_path, name):
    path = write(tmp_path / name, RGB)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=name):
        read_raster(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"II*\x00", bytes(500)])
@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
def test_a_file_that_is_no_picture_is_an_error_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_raster(tmp_path / name)


# -------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize(
    "bands, dtype", [(3, np.uint8), (4, np.uint8), (5, np.uint16), (3, np.float32)]
)
def test_the_image_of_a_tile_is_its_first_three_bands_in_0_to_1(tmp_path, bands, dtype):
    image = numbers(6, 5, bands, dtype=dtype) / (dtype(200) if dtype == np.float32 else 1)
    image = image.astype(dtype)
    found = Tile("a", {"image": write(tmp_path / "a.tif", image)}, TWO_CLASSES).read_image()
    assert found.dtype == dtype and np.array_equal(found, image[..., :3])
    top = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    assert np.allclose(
        image_input(found), np.moveaxis(image[..., :3], -1, 0) / top, rtol=0, atol=1e-7
    )


@pytest.mark.parametrize(
    "image", [np.zeros((6, 5), np.uint8), np.full((6, 5, 3), 7.0), np.full((6, 5, 3), np.nan)]
)
def test_an_image_of_one_band_or_beyond_1_or_with_holes_is_an_error_that_names_it(tmp_path, image):
    with pytest.raises(DataError, match="a.tif"):
        Tile("a", {"image": write(tmp_path / "a.tif", image)}, TWO_CLASSES).read_image()


@one_folder
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=3, max_size=3))
def test_files_that_differ_by_two_pixels_are_cut_to_their_common_size_with_a_note(tmp_path, extra):
    arrays = {
        "image": RGB,
        "dsm": numbers(24, 20, dtype=np.float32, seed=1),
        "labels": RGB[..., 0] % 2,
    }
    arrays = {kind: a[: 20 + i, : 15 + j] for (kind, a), (i, j) in zip(arrays.items(), extra)}
    tile = Tile(
        "a", {kind: write(tmp_path / f"{kind}.tif", a) for kind, a in arrays.items()}, TWO_CLASSES
    )
    H, W = tile.size
    assert (H, W) == (20 + min(i for i, _ in extra), 15 + min(j for _, j in extra))
    loaded = tile.load()
    for kind, array in arrays.items():
        assert np.array_equal(getattr(loaded, kind), array[:H, :W])
    assert len(tile.notes) == sum(a.shape[:2] != (H, W) for a in arrays.values())
    assert all(f"common {H} x {W}" in note for note in tile.notes)


@pytest.mark.parametrize("size", [(27, 20), (24, 23)])
def test_files_that_differ_by_three_pixels_are_an_error_that_names_them(tmp_path, size):
    paths = {
        "image": write(tmp_path / "image.tif", RGB),
        "dsm": write(tmp_path / "dsm.tif", numbers(*size)),
    }
    with pytest.raises(DataError, match=r"image\.tif 24 x 20.*dsm\.tif %d x %d" % size):
        Tile("a", paths, TWO_CLASSES).read_image()


@one_folder
@given(hnp.arrays(np.int16, (3, 4), elements=st.integers(-1, 300)), st.integers(-1, 300))
def test_a_single_band_holds_class_indices_and_the_rest_is_not_scored(tmp_path, raw, ignore):
    raw[0, 0] = 1 if ignore != 1 else 0
    tile = Tile("a", {"labels": write(tmp_path / "a.tif", raw)}, TWO_CLASSES, ignore_index=ignore)
    expected = [[v if v in (0, 1) and v != ignore else 255 for v in row] for row in raw.tolist()]
    assert tile.read_labels().tolist() == expected
    unknown = int((((raw < 0) | (raw > 1)) & (raw != ignore)).sum())
    assert len(tile.notes) == (unknown > 0) and all(
        f" {unknown} label pixels" in note for note in tile.notes
    )


def test_a_png_with_a_colour_table_holds_class_indices(tmp_path):
    picture = Image.fromarray(np.array([[0, 1], [1, 255]], np.uint8))
    picture.putpalette(numbers(256, 3).tobytes())
    picture.save(tmp_path / "a.png")
    assert Tile("a", {"labels": tmp_path / "a.png"}, TWO_CLASSES).read_labels().tolist() == [
        [0, 1],
        [1, 255],
    ]


def test_labels_in_colours_are_decoded_by_the_classes(tmp_path):
    rgb = np.array(
        [[(10, 20, 30), (200, 100, 0), (199, 104, 3), (0, 0, 0), (255, 255, 255)]], np.uint8
    )
    tile = Tile("a", {"labels": write(tmp_path / "a.png", rgb)}, TWO_CLASSES, unscored_color=None)
    assert tile.read_labels().tolist() == [[0, 1, 1, 0, 255]]
    assert len(tile.notes) == 1 and "1 label pixels fit no class" in tile.notes[0]


@pytest.mark.parametrize(
    "labels", [np.full((4, 4, 3), (255, 0, 255), np.uint8), np.full((4, 4), 9, np.uint8)]
)
def test_labels_with_no_known_class_are_an_error_that_names_the_file(tmp_path, labels):
    tile = Tile(
        "a",
        {"labels": write(tmp_path / "wrong.tif", labels)},
        ISPRS_CLASSES,
        unscored_color=(0, 0, 0),
    )
    with pytest.raises(DataError, match="wrong.tif.*no pixel has the colour"):
        tile.read_labels()


# ---------------------------------------------------------------------------------------- data sets

TRAIN, TEST = "1 3 23 26 7 11 13 28 17 32 34 37".split(), "5 21 15 30".split()
FULL, ERODED = "gts_for_participants", "gts_eroded_for_participants"
COMPLETE = "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE"
ERODED_COMPLETE = "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE"


def write_vaihingen(root, full=FULL, eroded=ERODED):
    """Buildings everywhere; black corners in the eroded labels; the tile's number in the image and
    the heights.
    """
    buildings = np.full((8, 9, 3), PALETTE[1], np.uint8)
    borders = buildings.copy()
    borders[:2] = 0
    for n in TRAIN + TEST:
        write(root / f"top/top_mosaic_09cm_area{n}.tif", np.full((8, 9, 3), int(n), np.uint8))
        write(
            root / f"dsm/dsm_09cm_matching_area{n}.tif", np.full((8, 9), 250 + int(n), np.float32)
        )
        write(root / full / f"top_mosaic_09cm_area{n}.tif", buildings)
        write(root / eroded / f"top_mosaic_09cm_area{n}_noBoundary.tif", borders)


@pytest.mark.parametrize("full, eroded", [(FULL, ERODED), (COMPLETE, ERODED_COMPLETE), (".", ".")])
def test_vaihingen_trains_on_full_labels_and_is_scored_on_eroded_ones(tmp_path, full, eroded):
    write_vaihingen(tmp_path, full, eroded)
    dataset = open_dataset("vaihingen", tmp_path)
    assert dataset.classes == ISPRS_CLASSES and dataset.scored == (0, 1, 2, 3, 4)
    for split, names, unscored in (("train", TRAIN, 0), ("test", TEST, 18)):
        tiles = dataset.tiles(split)
        assert [tile.name for tile in tiles] == names
        for tile in tiles:
            loaded = tile.load()
            assert (loaded.image == int(tile.name)).all() and (
                loaded.dsm == 250 + int(tile.name)
            ).all()
            assert (loaded.labels == 255).sum() == unscored and (
                loaded.labels == 1
            ).sum() == 72 - unscored
            assert not tile.notes


def test_vaihingen_s_missing_files_are_one_line_with_the_first_the_expected_tree_and_the_source(
    tmp_path,
):
    write_vaihingen(tmp_path)
    missing = [tmp_path / f"dsm/dsm_09cm_matching_area{n}.tif" for n in ("3", "37")]
    for path in missing:
        path.unlink()
    dataset = open_dataset("vaihingen", tmp_path)
    with pytest.raises(DataError) as caught:
        dataset.tiles("train")
    message = str(caught.value)
    assert (
        "\n" not in message
        and f"2 files of the train split are missing, first {missing[0]}" in message
    )
    assert all(
        part in message
        for part in ("top/top_mosaic_09cm_area{id}.tif", "dsm/dsm_09cm", FULL, "ISPRS")
    )
    assert len(dataset.tiles("test")) == 4 and len(dataset.tiles("train", ("image",))) == 12


@pytest.mark.parametrize("name", ["potsdamm", "", "Vaihingen"])
def test_an_unknown_data_set_is_an_error_that_lists_the_known_ones(tmp_path, name):
    with pytest.raises(DataError, match="unknown data set.*vaihingen.*tiles"):
        open_dataset(name, tmp_path)


def test_an_unknown_split_is_an_error_that_lists_the_known_ones(tmp_path):
    with pytest.raises(DataError, match="no split 'val'.*train, test"):
        open_dataset("vaihingen", tmp_path).tiles("val")


def test_the_synthetic_city_leaves_a_folder_of_other_files_alone(tmp_path):
    write_vaihingen(tmp_path)
    with pytest.raises(DataError, match="no synthetic city"):
        open_dataset("synthetic", tmp_path)


def write_own_tiles(root, dsm=True, **content):
    listed = [{"name": name, "color": color} for name, color in TWO_CLASSES]
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.json").write_text(json.dumps({"classes": listed, **content}))
    for name, ending in (("b", "tif"), ("a", "png")):
        write(root / f"train/images/{name}.{ending}", RGB)
        write(root / f"train/labels/{name}.png", RGB[..., 0] % 2)
        if dsm:
            write(root / f"train/dsm/{name}.tif", numbers(24, 20, dtype=np.float32))


def test_own_tiles_are_found_by_name_and_hold_what_is_in_their_files(tmp_path):
    write_own_tiles(tmp_path, ignore=0)
    (tmp_path / "train/images/notes.txt").write_text("mine")
    dataset = open_dataset("tiles", tmp_path)
    assert dataset.classes == TWO_CLASSES and dataset.scored == (0, 1)
    tiles = dataset.tiles("train")
    assert [tile.name for tile in tiles] == ["a", "b"]
    for tile in tiles:
        loaded = tile.load()
        assert np.array_equal(loaded.image, RGB) and loaded.dsm.shape == (24, 20)
        assert np.array_equal(
            loaded.labels, np.where(RGB[..., 0] % 2 == 1, 1, 255)
        )  # classes.json ignores 0


def test_own_tiles_without_heights_serve_a_network_of_the_image_alone(tmp_path):
    write_own_tiles(tmp_path, dsm=False)
    for tile in open_dataset("tiles", tmp_path).tiles("train"):
        assert tile.load(("image",)).dsm is None and tile.read_dsm() is None
        with pytest.raises(DataError, match=f"tile {tile.name} has no heights.*--modalities image"):
            tile.load(("image", "dsm"))


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_own_tiles_that_lack_a_folder_are_an_error_that_names_it(tmp_path, kind):
    write_own_tiles(tmp_path)
    for path in (tmp_path / "train" / kind).iterdir():
        path.unlink()
    with pytest.raises(DataError, match=f"train/{kind}"):
        open_dataset("tiles", tmp_path).tiles("train")


GOOD = {"name": "ground", "color": [1, 2, 3]}
BAD_CLASSES = [
    None, "{", "[]", '"classes"', "{}", '{"classes": []}', '{"classes": "ab"}',
    '{"classes": [1, 2]}',
    b"\xff\xfe{",
    *(
        json.dumps({"classes": [GOOD, second]})
        for second in (GOOD, {"name": "x"}, {"color": [4, 5, 6]}, {"name": "x", "color": None},
                       {"name": "x", "color": "red"}, {"name": "x", "color": [4, 5]},
                       {"name": "x", "color": [4, 5, 256]})
    ),
    json.dumps({"classes": [GOOD]}),
    json.dumps({"classes": [GOOD, {"name": "x", "color": [9, 9, 9]}], "ignore": None}),
]  # fmt: skip


@pytest.mark.parametrize("content", BAD_CLASSES)
def test_a_missing_or_bad_classes_json_is_an_error_that_names_it(tmp_path, content):
    if content is not None:
        (tmp_path / "classes.json").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    with pytest.raises(DataError, match="classes.json") as caught:
        open_dataset("tiles", tmp_path)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------- crops

sides = st.integers(1, 6)
sizes = st.lists(st.tuples(sides, sides), min_size=1, max_size=3)
keys = st.tuples(st.integers(0, 1000), st.integers(0, 50), st.integers(0, 10_000))


def numbered_tile(h, w, name="a"):
    """Every raster tells the pixel's place; no label is 255."""
    places = np.arange(h * w, dtype=np.uint8).reshape(h, w)
    return LoadedTile(
        name,
        np.stack([places] * 3, -1),
        places.astype(np.float32),
        places,
        TileScale((0, h * w - 1)),
    )


@given(sizes, sides, st.integers(0, 1000))
def test_crops_lie_inside_and_every_tile_place_and_flip_is_drawn(tile_sizes, crop, seed):
    crops = [draw_crop(seed, 0, i, tile_sizes, crop) for i in range(1200)]
    for t, size in enumerate(tile_sizes):
        places = [set(range(max(n - crop, 0) + 1)) for n in size]
        assert [
            {c.top for c in crops if c.tile == t},
            {c.left for c in crops if c.tile == t},
        ] == places
    assert len({(c.flip_rows, c.flip_columns) for c in crops}) == 4


@given(keys, keys)
def test_a_crop_is_a_function_of_seed_epoch_and_index_alone(key, other):
    large = [(5000, 4000)] * 16
    first = draw_crop(*key, large, 256)
    if other != key:
        assert draw_crop(*other, large, 256) != first
    assert draw_crop(*key, large, 256) == first


@given(sizes, sides, keys)
def test_a_sample_is_the_crop_flipped_alike_in_all_rasters_and_what_pads_it_is_not_scored(
    tile_sizes, crop, key
):
    tiles = [numbered_tile(*size) for size in tile_sizes]
    (image, dsm), labels = CropDataset(tiles, crop, key[0], ("image", "dsm"))[key[1:]]
    assert (
        image.shape == (3, crop, crop)
        and dsm.shape == labels.shape == (crop, crop)
        and labels.dtype == torch.int64
    )
    c = draw_crop(*key, tile_sizes, crop)
    tile = tiles[c.tile]
    cut = tile.labels[c.top : c.top + crop, c.left : c.left + crop]
    expected = np.full((crop, crop), 255)
    expected[: cut.shape[0], : cut.shape[1]] = cut
    expected = expected[:: -1 if c.flip_rows else 1, :: -1 if c.flip_columns else 1]
    assert np.array_equal(labels, expected)
    scored = labels != 255
    assert torch.allclose(image[:, scored], labels[scored] / 255.0, rtol=0, atol=1e-6)
    assert torch.allclose(
        dsm[scored], labels[scored] / max(tile.scale.heights[1], 1), rtol=0, atol=1e-6
    )
    assert 0 <= min(image.min(), dsm.min()) and max(image.max(), dsm.max()) <= 1


@settings(max_examples=20)
@given(sizes, sides, st.integers(0, 1000))
def test_a_balanced_crop_holds_a_class_drawn_with_equal_odds_at_any_place_that_holds_it(
    tile_sizes, crop, seed
):
    tiles = [numbered_tile(*size) for size in tile_sizes]
    for tile in tiles:
        tile.labels[:] = 0
    row, column = (n // 2 for n in tile_sizes[-1])
    tiles[-1].labels[row, column] = 3  # one pixel
    if tile_sizes == [(1, 1)]:
        return  # no pixel of class 0
    dataset = CropDataset(tiles, crop, seed, ("dsm",), balanced=6)
    plain = CropDataset(tiles, crop, seed, ("dsm",))
    assert all(dataset.draw(2, i) == plain.draw(2, i) for i in range(0, 20, 2))
    crops = [dataset.draw(2, i) for i in range(1, 800, 2)]
    for c in crops:
        assert all(
            0 <= top <= max(n - crop, 0) for top, n in zip((c.top, c.left), tile_sizes[c.tile])
        )
    last = [c for c in crops if c.tile == len(tiles) - 1]
    holds = [c for c in last if 0 <= row - c.top < crop and 0 <= column - c.left < crop]
    assert len(holds) >= 150  # of 400, at least about half
    tops, lefts = (
        range(max(p - crop + 1, 0), min(p, max(n - crop, 0)) + 1)
        for p, n in zip((row, column), tile_sizes[-1])
    )
    assert {(c.top, c.left) for c in holds} == {(top, left) for top in tops for left in lefts}


@pytest.mark.parametrize("modalities, shapes", [(("image",), [(3, 4, 4)]), (("dsm",), [(4, 4)])])
def test_a_sample_holds_the_rasters_that_are_asked_for(modalities, shapes):
    rasters, _ = CropDataset([numbered_tile(5, 5)], 4, 0, modalities)[0, 0]
    assert [tuple(r.shape) for r in rasters] == shapes


def test_any_number_of_workers_gives_the_same_samples_in_the_same_order():
    dataset = CropDataset([numbered_tile(15, 16), numbered_tile(6, 9)], 8, 3, ("image", "dsm"))
    batches = [
        list(torch.utils.data.DataLoader(dataset, batch_sampler=CropOrder(2, 3, 4), num_workers=n))
        for n in (0, 2)
    ]
    assert len(batches[0]) == 6
    for (rasters, labels), (others, other_labels) in zip(*batches, strict=True):
        assert torch.equal(labels, other_labels)
        assert all(torch.equal(a, b) for a, b in zip(rasters, others, strict=True))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.data())
def test_an_order_from_a_later_epoch_on_is_the_tail_of_the_whole_one(epochs, steps, batch, data):
    first = data.draw(st.integers(0, epochs))
    whole, tail = CropOrder(epochs, steps, batch), CropOrder(epochs, steps, batch, first * steps)
    assert list(tail) == list(whole)[first * steps :] and len(tail) == len(list(tail))
    drawn = [key for keys in whole for key in keys]
    assert len(set(drawn)) == len(drawn) == epochs * steps * batch


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_shares_of_all_processes_make_up_each_batch(world):
    shares = [CropOrder(2, 3, 6, 1, rank, world) for rank in range(world)]
    batches = [sorted(sum(parts, [])) for parts in zip(*shares)]
    assert batches == list(CropOrder(2, 3, 6, 1)) and {len(share) for share in shares} == {5}


# ------------------------------------------------------------------------------------------ windows


def published_windows(height, width, window, stride):
    """The published loop: a window that passes the edge is moved inwards, and so repeated."""
    tops, lefts = (range(0, n, stride) for n in (height, width))
    return [
        (min(top, height - window), min(left, width - window)) for top in tops for left in lefts
    ]


def repeated(windows):
    return sorted((top, left) for top, left, weight in windows for _ in range(weight))


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 30), st.data())
def test_windows_cover_every_pixel_from_inside_each_once_weighted_like_the_published_loop(
    height, width, window, data
):
    stride = data.draw(st.integers(1, window))
    windows = sliding_windows(height, width, window, stride)
    assert len({(top, left) for top, left, _ in windows}) == len(windows)
    covered = np.zeros((height, width), bool)
    for top, left, _ in windows:
        assert 0 <= top <= max(height - window, 0) and 0 <= left <= max(width - window, 0)
        covered[top : top + window, left : left + window] = True
    assert covered.all()
    if min(height, width) >= window:
        assert repeated(windows) == sorted(published_windows(height, width, window, stride))
    assert sum(weight for *_, weight in windows) == -(-height // stride) * -(-width // stride)


def test_windows_are_those_of_the_published_program():
    golden = json.loads((GOLDENS / "eval.json").read_text())
    windows = sliding_windows(*golden["shape"], 256, 96)
    assert repeated(windows) == sorted((top, left) for top, left, _, _ in golden["windows"])
    assert len(windows) < golden["count"]


@pytest.mark.parametrize("stride", [0, -1, 17])
def test_a_stride_that_leaves_gaps_is_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        sliding_windows(40, 50, 16, stride)
