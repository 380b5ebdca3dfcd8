"""Where rasters lie, what their numbers mean in metres, and files that show another place."""

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_rasters import geo_tags, image, write

from geodata.grids import Grid, read_grid, same_grid
from geodata.grids import geo_tags as tags_of
from geodata.loading import facts_of, load_tiles
from geodata.maps import Output, write_maps
from geodata.rasters import DataError, open_raster
from geodata.scaling import Scaling
from geodata.tiles import Tile

TWO_CLASSES = (("ground", (10, 20, 30)), ("house", (200, 100, 0)))
WORLD = "0.5\n0.0\n0.0\n-0.5\n{}\n{}\n"  # of the middle of the first pixel


def world(path, left, top):
    path.write_text(WORLD.format(left + 0.25, top - 0.25))


# -------------------------------------------------------------------------- world files and endings


@pytest.mark.parametrize(
    "name, beside",
    [
        ("a.tif", "a.tfw"),
        ("a.tif", "a.TFW"),
        ("a.tif", "a.wld"),
        ("a.tif", "a.tifw"),
        ("a.png", "a.pgw"),
        ("a.jpg", "a.jgw"),
        ("a.jpg", "a.jpgw"),
    ],
)
def test_a_world_file_says_where_a_raster_without_tags_lies(tmp_path, name, beside):
    Image.fromarray(image(20, 30)).save(tmp_path / name)
    world(tmp_path / beside, 1000, 2000)
    assert read_grid(tmp_path / name) == Grid(1000, 2000, 0.5, 0.5)


def test_tags_count_before_a_world_file_and_a_broken_one_is_named(tmp_path):
    write(tmp_path / "a.tif", image(4, 4), geo_tags(10, 20))
    world(tmp_path / "a.tfw", 1000, 2000)
    assert read_grid(tmp_path / "a.tif").left == 10
    Image.fromarray(image(4, 4)).save(tmp_path / "b.png")
    (tmp_path / "b.pgw").write_text("none\n")
    with pytest.raises(DataError, match="b.pgw: not the six numbers"):
        read_grid(tmp_path / "b.png")


def test_heights_that_a_world_file_places_elsewhere_do_not_count_as_overlapping(tmp_path):
    write(tmp_path / "i.tif", image(20, 20), geo_tags(0, 100, (0.5, 0.5)))
    tifffile.imwrite(tmp_path / "d.tif", np.ones((20, 20), np.float32))
    world(tmp_path / "d.tfw", 400, 100)
    tile = Tile("a", {"image": tmp_path / "i.tif", "dsm": tmp_path / "d.tif"}, TWO_CLASSES)
    with pytest.raises(DataError, match="d.tif: does not overlap"):
        tile.read_dsm()


@pytest.mark.parametrize("source", ["a.tif", "a.png"])
@pytest.mark.parametrize("out", ["map.tif", "map.png"])
def test_a_map_lies_where_the_world_file_of_its_image_says(tmp_path, source, out):
    Image.fromarray(image(20, 30)).save(tmp_path / source)
    world(tmp_path / ("a.tfw" if source == "a.tif" else "a.pgw"), 1000, 2000)
    strips = [np.zeros((1, 20, 30), np.uint8)]
    write_maps(
        [Output(tmp_path / out, ("class",), TWO_CLASSES)], strips, (20, 30), tmp_path / source
    )
    assert read_grid(tmp_path / out) == Grid(1000, 2000, 0.5, 0.5)


@pytest.mark.parametrize("name", ["a.gtiff", "a", "a.TIF", "a.data"])
def test_the_ending_of_a_geotiff_does_not_matter(tmp_path, name):
    write(tmp_path / "t.tif", image(4, 4), geo_tags(10, 20, nodata=7))
    (tmp_path / "t.tif").rename(tmp_path / name)
    assert read_grid(tmp_path / name) == Grid(10, 20, 1, 1, 2154, True)
    assert open_raster(tmp_path / name).nodata == 7 and len(tags_of(tmp_path / name)) == 3


def test_gdal_s_sidecar_tells_place_no_data_scale_and_unit(tmp_path):
    Image.fromarray(np.full((4, 4), 100, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png.aux.xml").write_text(
        "<PAMDataset><GeoTransform> 10, 0.5, 0, 20, 0, -0.5</GeoTransform><PAMRasterBand band='1'>"
        "<NoDataValue>0</NoDataValue><UnitType>ft</UnitType><Offset>10</Offset><Scale>0.5</Scale>"
        "</PAMRasterBand></PAMDataset>"
    )
    raster = open_raster(tmp_path / "a.png")
    assert read_grid(raster) == Grid(10, 20, 0.5, 0.5) and raster.nodata == 0
    dsm = Tile("a", {"dsm": tmp_path / "a.png"}, TWO_CLASSES).read_dsm()
    assert np.allclose(dsm, (100 * 0.5 + 10) * 0.3048)


@pytest.mark.parametrize("point", [1, 2])
def test_what_is_written_lies_where_the_image_is_read_whatever_says_so(tmp_path, point):
    """GDAL's sidecar moves an image that has tags of another place."""
    write(tmp_path / "a.tif", image(8, 8), geo_tags(10, 20, (0.5, 0.5), raster=point))
    place = "<GeoTransform>100, 0.25, 0.1, 200, 0.05, -0.5</GeoTransform>"
    for sidecar in (None, place.replace("0.1,", "0,").replace("0.05", "0"), place):
        if sidecar:
            (tmp_path / "a.tif.aux.xml").write_text(f"<PAMDataset>{sidecar}</PAMDataset>")
        own = read_grid(tmp_path / "a.tif")
        write(tmp_path / "b.tif", image(5, 6), tags_of(tmp_path / "a.tif", 3, 2))
        moved = read_grid(tmp_path / "b.tif")
        assert (moved.system, moved.turn) == (own.system, own.turn) == (2154, own.turn)
        assert np.allclose(moved.corner(0, 0), own.corner(3, 2), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------- coordinate systems


def by_parameters(meridian, **changes):
    """UTM-like keys without a number of EPSG's."""
    numbers = [meridian, 0.0, 0.9996, 500_000.0, 0.0]
    keys = [1, 1, 0, 8, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32767, 3075, 0, 1, 1]
    for i, key in enumerate((3080, 3081, 3092, 3082)):
        keys += [key, 34736, 1, i]
    return [
        (33550, "d", 3, (1.0, 1.0, 0.0), True),
        (33922, "d", 6, (0.0, 0.0, 0.0, 500_000.0, 5e6, 0.0), True),
        (34735, "H", len(keys), keys, True),
        (34736, "d", len(numbers), numbers, True),
    ]


def test_two_systems_given_by_parameters_are_two_where_a_parameter_differs(tmp_path):
    pixels, dsm = image(20, 20), np.ones((10, 10), np.float32)
    write(tmp_path / "i.tif", pixels, by_parameters(9.0))
    paths = {
        "image": tmp_path / "i.tif",
        "dsm": write(tmp_path / "d.tif", dsm, by_parameters(15.0)),
    }
    with pytest.raises(
        DataError, match="d.tif: lies in another coordinate system.*gdalwarp -t_srs"
    ):
        Tile("a", paths, TWO_CLASSES).read_dsm()
    write(tmp_path / "d.tif", dsm, by_parameters(9.0))
    assert (Tile("a", paths, TWO_CLASSES).read_dsm() == 1).all()


# ------------------------------------------------------------------------------------------- labels


def labelled(tmp_path, labels, tags):
    paths = {
        "image": write(tmp_path / "i.tif", image(20, 20), geo_tags(1000, 2000)),
        "labels": write(tmp_path / "l.tif", labels, tags),
    }
    return Tile("a", paths, TWO_CLASSES)


@pytest.mark.parametrize("left", [1100, 3000])
def test_labels_of_another_place_are_refused(tmp_path, left):
    labels = np.random.default_rng(0).integers(0, 2, (20, 20), dtype=np.uint8)
    with pytest.raises(DataError, match="l.tif: does not overlap") as caught:
        labelled(tmp_path, labels, geo_tags(left, 2000)).load(("image",))
    assert "height" not in str(caught.value)


def test_labels_on_another_grid_are_those_of_the_nearest_pixel_and_none_beyond(tmp_path):
    labels = np.random.default_rng(0).integers(0, 2, (10, 5), dtype=np.uint8)
    tile = labelled(tmp_path, labels, geo_tags(1000, 2000, (2.0, 2.0)))
    found = tile.load(("image",)).labels
    assert (
        np.array_equal(found[:, :10], labels.repeat(2, 0).repeat(2, 1))
        and (found[:, 10:] == 255).all()
    )
    assert any("labels resampled" in note for note in tile.notes)
    colours = np.array([c for _, c in TWO_CLASSES], np.uint8)[labels]
    again = labelled(tmp_path, colours, geo_tags(1000, 2000, (2.0, 2.0)))
    assert np.array_equal(again.read_labels(), found)


# ----------------------------------------------------------------------------------- units and kind


def heights(tmp_path, array, *metadata, tags=()):
    items = "".join(
        f'<Item name="X" sample="0" role="{role}">{value}</Item>' for role, value in metadata
    )
    tags = [*tags, (42112, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>", True)]
    return Tile("a", {"dsm": write(tmp_path / "d.tif", array, tags)}, TWO_CLASSES)


@pytest.mark.parametrize(
    "metadata, metres",
    [
        ([("scale", 0.01)], 121.0),
        ([("scale", 0.01), ("offset", 100)], 221.0),
        ([("unittype", "cm")], 121.0),
        ([("unittype", "ft"), ("scale", 0.1)], 1210 * 0.3048),
        ([("unittype", "metre"), ("scale", 0.05)], 605.0),
    ],
)
def test_scale_offset_and_unit_of_a_file_make_metres(tmp_path, metadata, metres):
    array = np.full((6, 6), 12_100, np.uint16)
    array[0, 0] = 12_200
    tile = heights(tmp_path, array, *metadata)
    found, opened = tile.read_dsm(), tile.open(("dsm",)).dsm[0:6, 0:6]
    assert (
        np.allclose(found[1:], metres)
        and not tile.missing_heights
        and np.array_equal(found, opened)
    )


def test_the_scale_of_another_band_is_none_of_the_heights(tmp_path):
    items = '<Item name="SCALE" sample="1" role="scale">0.01</Item>'
    tags = [(42112, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>", True)]
    path = write(tmp_path / "d.tif", np.full((6, 6, 2), 121, np.uint16), tags)
    assert (Tile("a", {"dsm": path}, TWO_CLASSES).read_dsm() == 121).all()


def test_centimetres_that_are_not_declared_are_refused_and_not_taken_for_holes(tmp_path):
    array = np.random.default_rng(0).integers(9_900, 10_300, (20, 20)).astype(np.uint16)
    with pytest.raises(DataError, match="d.tif: heights such as .* gdal_translate -a_scale 0.01"):
        heights(tmp_path, array).read_dsm()


def test_pixels_in_feet_are_not_metres(tmp_path):
    dsm = np.random.default_rng(0).uniform(1, 9, (20, 20)).astype(np.float32)
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 3072, 0, 1, 2263, 3076, 0, 1, 9003)
    tags = [*geo_tags(0, 100)[:2], (34735, "H", 16, keys, True)]
    grid = read_grid(write(tmp_path / "d.tif", dsm, tags))
    assert grid.pixel_size() == pytest.approx(1200 / 3937)
    assert Tile("a", {"dsm": tmp_path / "d.tif"}, TWO_CLASSES).pixel_size() == grid.pixel_size()


@pytest.mark.parametrize("photometric", ["rgb", "minisblack"])
@pytest.mark.parametrize("pixels", [image(8, 8), np.dstack([image(8, 8), image(8, 8)[..., :1]])])
def test_an_orthophoto_is_no_height_raster(tmp_path, pixels, photometric):
    path = tmp_path / "d.tif"
    tifffile.imwrite(path, pixels, photometric=photometric, planarconfig="contig")
    for way in ("load", "open"):
        with pytest.raises(DataError, match=r"d.tif: heights are one band.*gdal_translate -b 1"):
            getattr(Tile("a", {"dsm": path}, TWO_CLASSES), way)(("dsm",))


def test_heights_on_another_grid_are_resampled_once_and_held_in_memory(tmp_path):
    labels = np.ones((20, 20), np.uint8)
    tile = labelled(tmp_path, labels, geo_tags(1000, 2000))
    dsm = write(tmp_path / "d.tif", np.ones((10, 10), np.float32), geo_tags(1000, 2000, (2.0, 2.0)))
    tile.paths["dsm"] = dsm
    (loaded,) = load_tiles([tile], ("image", "dsm"), 1700e-9)  # of 400, 1,600 and 1,200 bytes
    assert isinstance(loaded.dsm, np.ndarray) and loaded.nbytes() == 1600
    assert load_tiles([tile], ("image", "dsm"), 2e-6)[0].nbytes() == 2000  # the labels just fit
    with pytest.raises(DataError, match="d.tif: only TIFFs.*more than --memory-gb"):
        load_tiles([tile], ("image", "dsm"), 1500e-9)


def test_a_note_says_how_much_of_the_tile_a_height_raster_leaves_open(tmp_path):
    paths = {
        "image": write(tmp_path / "i.tif", image(40, 40), geo_tags(0, 100)),
        "dsm": write(tmp_path / "d.tif", np.ones((10, 20), np.float32), geo_tags(0, 100)),
    }
    tile = Tile("a", paths, TWO_CLASSES)
    tile.open(("image", "dsm"))
    assert any("87.5 % of the tile" in note for note in tile.notes)


@pytest.mark.parametrize("message, dsm", [("no valid height", np.full((8, 8), np.nan, np.float32))])
def test_advice_about_heights_is_given_once_and_names_the_file_once(tmp_path, message, dsm):
    tile = Tile("a", {"dsm": write(tmp_path / "d.tif", dsm)}, TWO_CLASSES)
    for call in (tile.read_dsm, lambda: tile.open(("dsm",))):
        with pytest.raises(DataError, match=message) as caught:
            call()
        text = str(caught.value)
        assert text.count("d.tif") == 1 and text.count("replace the file") == 1


# -------------------------------------------------------------------------------- images with holes


@pytest.mark.parametrize(
    "dtype, hole", [(np.uint16, 65535), (np.float32, -9999), (np.float32, np.nan)]
)
def test_pixels_without_data_enter_no_range_and_reach_the_network_inside_it(tmp_path, dtype, hole):
    array = np.random.default_rng(0).integers(100, 4080, (20, 20, 3)).astype(dtype)
    array[0, 0], array[0, 1], array[:3, 5:] = 100, 4079, hole
    path = write(tmp_path / "i.tif", array, [(42113, "s", 0, str(hole), True)])
    for way in ("load", "open"):
        loaded = getattr(
            Tile("a", {"image": path}, TWO_CLASSES, scaling=Scaling(images="minmax")), way
        )(("image",))
        low, span = loaded.scale.image
        assert (low >= 100).all() and (low + span <= 4080).all()
        found = loaded.scale.image_input(loaded.image[0:20, 0:20])
        assert found.min() >= 0 and found.max() <= 1


def test_float_images_in_0_to_1_with_declared_holes_are_read(tmp_path):
    array = np.random.default_rng(0).uniform(0, 1, (20, 20, 3)).astype(np.float32)
    array[:3] = -9999
    path = write(tmp_path / "i.tif", array, [(42113, "s", 0, "-9999", True)])
    tile = Tile("a", {"image": path}, TWO_CLASSES)
    assert (tile.read_image()[:3] == 0).all() and tile.without_data()(slice(0, 5)).sum() == 60


# ---------------------------------------------------------------------------- far from the training


def tile_of(folder, pixel, low, high):
    folder.mkdir()
    dsm = np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)
    paths = {
        "image": write(folder / "i.tif", image(8, 8), geo_tags(0, 100, (pixel, pixel))),
        "dsm": write(folder / "d.tif", dsm, geo_tags(0, 100, (pixel, pixel))),
        "labels": write(folder / "l.tif", np.ones((8, 8), np.uint8)),
    }
    return Tile("a", paths, TWO_CLASSES)


@pytest.mark.parametrize(
    "pixel, low, high, said",
    [
        (0.09, 240, 260, []),
        (0.1, 235, 262, []),
        (0.2, 240, 260, ["pixels of 0.2 m"]),
        (0.09, 2400, 2600, ["heights of"]),
        (0.09, 0, 30, ["heights of"]),
        (0.2, 0, 3000, ["pixels of 0.2 m", "heights of"]),
    ],
)
def test_a_pixel_or_heights_far_from_those_of_the_training_are_told(
    tmp_path, pixel, low, high, said
):
    trained = [tile_of(tmp_path / "train", 0.09, 240, 260)]
    load_tiles(trained, ("image", "dsm"), 1)
    facts = facts_of(trained)
    assert facts == {"pixel": pytest.approx(0.09), "heights": [240, 260]}
    tile = tile_of(tmp_path / "new", pixel, low, high)
    tile.open(("image", "dsm"))
    lines = tile.far_from(facts)
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines))
    assert tile.far_from({}) == []  # a run from before


def test_grids_of_a_hundredth_of_a_pixel_are_one():
    one = Grid(0.0, 0.0, 0.5, 0.5, 2154, True)
    assert same_grid(one, Grid(0.004, 0.0, 0.5, 0.5, 2154, True), (99, 99))
    assert not same_grid(one, Grid(0.006, 0.0, 0.5, 0.5, 2154, True), (99, 99))
    assert not same_grid(one, Grid(0.004, 0.0, 0.5, 0.5, 32632, True), (99, 99))
