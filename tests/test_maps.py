"""The maps that are written: class indices, percent, colours, names, no-data, and where on earth
they lie.
"""

import os
from contextlib import nullcontext
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from geodata import maps
from geodata.grids import read_grid
from geodata.labels import labels_to_colors
from geodata.maps import NO_DATA, Output, cut_out, write_maps
from geodata.rasters import DataError, open_raster, read_raster
from geodata.tiles import Tile

CLASSES = tuple(
    (f"class <{k}>", color)
    for k, color in enumerate([(1, 2, 3), (255, 255, 255), (0, 9, 99), (200, 0, 0)])
)
TAGS = [
    (33550, "d", 3, (0.2, 0.25, 0.0), True),
    (33922, "d", 6, (0.0, 0.0, 0.0, 770549.8, 6277600.2, 0.0), True),
    (34735, "H", 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 2154), True),
    (34736, "d", 2, (49.0, 44.5), True),
    (34737, "s", 0, "EPSG:2154|", True),
]


def write_map(path, strips, size, classes, source=None):
    """A class map alone."""
    write_maps([Output(path, ("class",), classes)], (strip[None] for strip in strips), size, source)


def all_three(folder, classes=CLASSES, ending=".tif"):
    """A class map, its confidence, and a band for each class."""
    names = tuple(name for name, _ in classes)
    confidence = Output(folder / f"sure{ending}", ("confidence",))
    return [
        Output(folder / f"map{ending}", ("class",), classes),
        confidence,
        Output(folder / "all.tif", names),
    ]


def random_bands(C, H, W, seed=0):
    return np.random.default_rng(seed).integers(0, len(CLASSES), (C, H, W), dtype=np.uint8)


def state_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    style = name.rsplit(".", 1)[0] + ".qml"
    assert files_in(tmp_path) == sorted([name, name + ".aux.xml", style])


@given(
    st.integers(1, 600),
    st.integers(1, 300),
    st.lists(st.integers(1, 300), max_size=6),
    st.sampled_from(["png", "tif"]),
)
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
        assert (
            page.is_tiled
            and page.compression in (8, 32946)
            and page.photometric == 3
            and page.dtype == np.uint8
        )
    assert read_grid(path) == read_grid(image) and open_raster(path).nodata == NO_DATA


def test_a_png_has_a_world_file_of_the_middle_of_its_first_pixel(tmp_path, image):
    write_map(tmp_path / "map.png", [random_map(5, 6)], (5, 6), CLASSES, image)
    lines = [float(line) for line in (tmp_path / "map.pgw").read_text().splitlines()]
    assert lines == pytest.approx([0.2, 0, 0, -0.25, 770549.9, 6277600.075])


@pytest.mark.parametrize("name", ["map.tif", "map.png"])
def test_without_georeferencing_there_is_neither_a_tag_nor_a_world_file(tmp_path, name):
    tifffile.imwrite(tmp_path / "image.tif", np.zeros((5, 6), np.uint8))
    write_map(tmp_path / name, [random_map(5, 6)], (5, 6), CLASSES, tmp_path / "image.tif")
    assert files_in(tmp_path) == sorted(["image.tif", name, name + ".aux.xml", "map.qml"])
    assert name == "map.png" or read_grid(tmp_path / name) is None


@pytest.mark.parametrize("name", ["map.tif", "map.png"])
def test_a_style_beside_the_map_tells_qgis_the_name_and_colour_of_each_class(tmp_path, name):
    classes = (("Straße & Weg", (1, 2, 3)), ('"<b>"', (255, 0, 10)))
    write_map(tmp_path / name, [random_map(5, 6)], (5, 6), classes)
    root = ElementTree.parse(tmp_path / "map.qml").getroot()
    renderer = root.find("pipe/rasterrenderer")
    assert root.tag == "qgis" and renderer.get("type") == "paletted" and renderer.get("band") == "1"
    found = [e.attrib for e in renderer.findall("colorPalette/paletteEntry")]
    assert [(e["value"], e["label"], e["color"]) for e in found] == [
        ("0", "Straße & Weg", "#010203"),
        ("1", '"<b>"', "#ff000a"),
    ]


def test_the_sidecar_names_the_classes_for_gdal(tmp_path):
    write_map(
        tmp_path / "map.tif",
        [random_map(5, 6)],
        (5, 6),
        (("Straße & Weg", (1, 2, 3)), ("<b>", (4, 5, 6))),
    )
    found = ElementTree.parse(tmp_path / "map.tif.aux.xml").findall(
        "PAMRasterBand[@band='1']/CategoryNames/Category"
    )
    assert [name.text for name in found] == ["Straße & Weg", "<b>"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")], ids=str)
@pytest.mark.parametrize("name", ["map.png", "map.tif"])
def test_a_map_that_breaks_off_leaves_the_earlier_one_and_nothing_else(
    tmp_path, image, name, error
):
    def strips():
        yield random_map(400, 6)
        raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        write_map(tmp_path / name, strips(), (800, 6), CLASSES, image)
    assert files_in(tmp_path) == ["image.tif"]
    write_map(tmp_path / name, [random_map(5, 6)], (5, 6), CLASSES, image)
    before = state_of(tmp_path)
    with pytest.raises((KeyboardInterrupt, OSError)):
        write_map(tmp_path / name, strips(), (800, 6), CLASSES, image)
    assert state_of(tmp_path) == before


def test_strips_are_written_as_they_come_and_not_gathered(tmp_path, monkeypatch):
    opened, waiting = [], []
    monkeypatch.setattr(
        maps.tempfile,
        "TemporaryFile",
        lambda make=maps.tempfile.TemporaryFile, **where: opened.append(make(**where)) or opened[0],
    )

    def strips():
        for top in range(0, 5000, 100):
            waiting.append(os.fstat(opened[0].fileno()).st_size)
            yield random_map(100, 300, top)

    write_map(tmp_path / "map.tif", strips(), (5000, 300), CLASSES)
    assert waiting[25] > 600_000 and waiting[-1] > 1.8 * waiting[25]


@pytest.mark.parametrize("H, W", [(256, 512), (513, 300), (600, 2100)])
def test_a_large_map_holds_smaller_copies_in_the_order_of_a_cloud_optimised_geotiff(
    tmp_path, image, H, W
):
    outputs, bands = all_three(tmp_path), random_bands(6, H, W)
    write_maps(outputs, [bands], (H, W), image)
    for output, wanted in zip(outputs, (bands[:1], bands[1:2], bands[2:])):
        with tifffile.TiffFile(output.path) as tiff:
            pages = list(tiff.pages)
            assert [page.subfiletype for page in pages] == [0] + [1] * (len(pages) - 1)
            assert max(pages[-1].shape[-2:]) <= 512 and pages[0].offset <= 16
            assert all(max(page.shape[-2:]) > 512 for page in pages[:-1])
            assert max(page.offset for page in pages) < min(min(p.dataoffsets) for p in pages)
            starts = [min(page.dataoffsets) for page in pages]
            assert starts == sorted(starts, reverse=True)
            for level, page in enumerate(pages):
                found = page.asarray().reshape(len(wanted), *page.shape[-2:])
                assert np.array_equal(found, wanted[:, :: 2**level, :: 2**level])
                assert page.tags[42113].value == "255" and page.photometric == pages[0].photometric


@pytest.mark.parametrize("stale", ["map.tif.ovr", "map.tfw", "map.tif.msk"])
def test_what_lay_beside_an_earlier_map_does_not_speak_for_the_new_one(tmp_path, image, stale):
    for _ in range(2):
        (tmp_path / stale).write_bytes(b"stale")
        write_map(tmp_path / "map.tif", [random_map(5, 6)], (5, 6), CLASSES, image)
        assert files_in(tmp_path) == ["image.tif", "map.qml", "map.tif", "map.tif.aux.xml"]


def test_the_world_file_of_the_image_itself_is_not_taken_for_the_map_s(tmp_path):
    tifffile.imwrite(tmp_path / "a.tiff", np.zeros((5, 6, 3), np.uint8), photometric="rgb")
    (tmp_path / "a.tfw").write_text("1\n0\n0\n-1\n10.5\n19.5\n")
    write_map(tmp_path / "a.tif", [random_map(5, 6)], (5, 6), CLASSES, tmp_path / "a.tiff")
    assert (tmp_path / "a.tfw").is_file() and read_grid(tmp_path / "a.tif").left == 10


def test_files_of_the_user_s_are_left_alone(tmp_path, image):
    for name in ("map.tif.tmp", "map.tif.aux.xml.tmp", "map.png.tmp"):
        (tmp_path / name).write_bytes(b"mine")
    for name in ("map.tif", "map.png"):
        write_map(tmp_path / name, [random_map(5, 6)], (5, 6), CLASSES, image)
    assert (
        (tmp_path / "map.tif.tmp").read_bytes()
        == b"mine"
        == (tmp_path / "map.png.tmp").read_bytes()
    )
    assert (tmp_path / "map.tif.aux.xml.tmp").read_bytes() == b"mine"


def test_a_link_is_followed(tmp_path, image):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "map.tif"
    link.symlink_to(tmp_path / "disk" / "far.tif")
    for seed in (0, 1):
        write_map(link, [random_map(5, 6, seed)], (5, 6), CLASSES, image)
        assert link.is_symlink() and not (tmp_path / "disk" / "far.tif").is_symlink()
        assert np.array_equal(read_raster(tmp_path / "disk" / "far.tif"), random_map(5, 6, seed))
    assert files_in(tmp_path / "disk") == ["far.tif"]


# ---------------------------------------------------------------------------- several from one pass


@given(
    st.integers(1, 600),
    st.integers(1, 600),
    st.integers(1, 4),
    st.lists(st.integers(1, 300), max_size=6),
)
def test_any_strips_make_up_all_files_of_one_pass(tmp_path_factory, H, W, K, heights):
    outputs, bands = (
        all_three(tmp_path_factory.mktemp("maps"), CLASSES[:K]),
        random_bands(K + 2, H, W),
    )
    ends = [n for n in np.cumsum(heights) if n < H]
    write_maps(outputs, iter(np.split(bands, ends, axis=1)), (H, W))
    for output, wanted in zip(outputs, (bands[:1], bands[1:2], bands[2:])):
        assert np.array_equal(tifffile.imread(output.path).reshape(wanted.shape), wanted)


def test_every_file_lies_where_the_image_lies_and_names_its_bands_and_its_no_data(tmp_path, image):
    outputs = all_three(tmp_path, (("Straße & Weg", (1, 2, 3)), ("<b>", (4, 5, 6))))
    write_maps(outputs, [random_bands(4, 5, 6)], (5, 6), image)
    names = {"map.tif": ["class"], "sure.tif": ["confidence"], "all.tif": ["Straße & Weg", "<b>"]}
    for output in outputs:
        with tifffile.TiffFile(output.path) as found, tifffile.TiffFile(image) as source:
            page, wanted = found.pages[0], names[output.path.name]
            assert all(
                page.tags[code].value == source.pages[0].tags[code].value for code, *_ in TAGS
            )
            assert page.shape[-2:] == (5, 6) and page.is_tiled and page.compression in (8, 32946)
            items = ElementTree.fromstring(page.tags[42112].value).findall("Item")
        found = {(item.get("role"), item.get("sample")): item.text for item in items}
        units = (
            {} if output.classes else {("unittype", str(i)): "percent" for i in range(len(wanted))}
        )
        assert found == units | {("description", str(i)): name for i, name in enumerate(wanted)}
        assert open_raster(output.path).nodata == NO_DATA and read_grid(output.path) == read_grid(
            image
        )
    others = ["map.qml", "map.tif", "map.tif.aux.xml", "sure.tif"]
    assert files_in(tmp_path) == ["all.tif", "image.tif", *others]


def test_a_confidence_png_is_grey_clear_without_data_and_has_both_sidecars(tmp_path, image):
    percent = np.array([[0, 50, 100, 255, 99, 1]] * 5, np.uint8)
    write_maps([Output(tmp_path / "sure.png", ("confidence",))], [percent[None]], (5, 6), image)
    with Image.open(tmp_path / "sure.png") as picture:
        assert picture.mode == "L" and np.array_equal(np.asarray(picture), percent)
        assert np.array_equal(np.asarray(picture.convert("RGBA"))[..., 3] == 0, percent == NO_DATA)
    band = ElementTree.parse(tmp_path / "sure.png.aux.xml").find("PAMRasterBand[@band='1']")
    assert band.findtext("Description") == "confidence" and band.findtext("UnitType") == "percent"
    assert files_in(tmp_path) == ["image.tif", "sure.pgw", "sure.png", "sure.png.aux.xml"]


def test_a_class_map_png_is_clear_without_data_alone(tmp_path):
    classes = np.array([[0, 1, 2, 3, 4, 255]], np.uint8)
    write_map(tmp_path / "map.png", [classes], (1, 6), CLASSES)
    with Image.open(tmp_path / "map.png") as picture:
        clear = np.asarray(picture.convert("RGBA"))[..., 3] == 0
    assert np.array_equal(clear, classes == NO_DATA)


def test_only_a_file_that_could_outgrow_32_bit_offsets_has_64_bit_ones(tmp_path, monkeypatch):
    outputs, bands = all_three(tmp_path), random_bands(6, 300, 513)  # 2 x 3 tiles
    monkeypatch.setattr(maps, "CLASSIC", 30 * 256**2)
    write_maps(outputs, [bands], (300, 513))
    for output, big in zip(outputs, (False, False, True)):
        with tifffile.TiffFile(output.path) as tiff:
            assert tiff.is_bigtiff == big
    assert np.array_equal(tifffile.imread(tmp_path / "all.tif"), bands[2:])


# ---------------------------------------------------------------------------------- all, or no file


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")], ids=str)
def test_files_of_one_pass_that_breaks_off_leave_the_earlier_ones_and_nothing_else(
    tmp_path, image, error
):
    def strips():
        yield random_bands(6, 400, 6)
        raise error

    outputs = all_three(tmp_path, ending=".png")
    for before in ({"image.tif": image.read_bytes()}, None):
        if before is None:
            write_maps(outputs, [random_bands(6, 5, 6)], (5, 6), image)
            before = state_of(tmp_path)
        with pytest.raises((KeyboardInterrupt, OSError)):
            write_maps(outputs, strips(), (800, 6), image)
        assert state_of(tmp_path) == before


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_a_map_without_a_place_leaves_no_sidecar_of_an_earlier_one_that_had_one(
    tmp_path, image, ending
):
    outputs = all_three(tmp_path, ending=ending)
    write_maps(outputs, [random_bands(6, 5, 6)], (5, 6), image)
    for output in outputs[1:]:  # as GDAL writes them for statistics
        output.path.with_name(output.path.name + ".aux.xml").write_text("stale")
    image.unlink()
    write_maps(outputs, [random_bands(6, 5, 6)], (5, 6))
    left = set(files_in(tmp_path)) - {output.path.name for output in outputs} - {"map.qml"}
    assert (
        left == {"map.tif.aux.xml"} if ending == ".tif" else {"map.png.aux.xml", "sure.png.aux.xml"}
    )
    assert not any(path.read_bytes() == b"stale" for path in tmp_path.iterdir())


@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("renamed", range(8))
def test_an_interruption_between_two_files_leaves_files_of_one_pass_only(
    tmp_path, image, monkeypatch, renamed, placed
):
    def write(folder, source, seed):
        folder.mkdir(exist_ok=True)
        write_maps(all_three(folder, ending=".png"), [random_bands(6, 5, 6, seed)], (5, 6), source)
        return state_of(folder)

    def rename_some(*paths, rename=os.replace):
        calls.append(paths)
        if len(calls) > renamed:
            raise KeyboardInterrupt
        rename(*paths)

    elsewhere, calls = tmp_path / "elsewhere.tif", []
    tags = [TAGS[0], (33922, "d", 6, (0, 0, 0, 5, 9, 0), True)]
    tifffile.imwrite(elsewhere, np.zeros((5, 6), np.uint8), extratags=tags)
    wanted = write(tmp_path / "wanted", elsewhere if placed else None, 1)
    earlier = write(tmp_path / "maps", image, 0)
    monkeypatch.setattr(os, "replace", rename_some)
    with nullcontext() if renamed >= len(wanted) else pytest.raises(KeyboardInterrupt):
        write(tmp_path / "maps", elsewhere if placed else None, 1)
    if renamed == 0:
        assert state_of(tmp_path / "maps") == {"map.png": earlier["map.png"]}
    else:
        found = state_of(tmp_path / "maps")
        assert (
            len(found) == min(renamed, len(wanted))
            and found.items() <= wanted.items()
            and "map.png" in found
        )


# ------------------------------------------------------------------------------------------ no data


def write_image(path, array, nodata=None, alpha=False):
    tags = [] if nodata is None else [(42113, "s", 0, str(nodata), True)]
    extra = dict(extrasamples=["unassalpha"]) if alpha else {}
    tifffile.imwrite(path, array, photometric="rgb", extratags=tags, **extra)
    return path


def map_of(path, classes):
    missing = Tile("a", {"image": path}, CLASSES).without_data()
    strips = [np.stack([strip, strip]) for strip in cut(classes, [3, 4, 1])]
    one, other = np.concatenate(list(cut_out(strips, missing)), axis=1)
    assert np.array_equal(one, other)  # in every band
    return one


@pytest.mark.parametrize("kind", ["nodata", "alpha", "both", "neither"])
def test_there_is_no_class_where_the_image_has_no_data(tmp_path, kind):
    array = np.random.default_rng(0).integers(1, 250, (20, 9, 4), dtype=np.uint8)
    array[:2, :, :3], array[5, 5, :2], array[:, -1, 3] = (
        255,
        255,
        0,
    )  # a white place, one white in two bands, a clear one
    wanted = random_map(20, 9)
    path = write_image(
        tmp_path / "a.tif",
        array if kind in ("alpha", "both") else array[..., :3],
        255 if kind in ("nodata", "both") else None,
        kind in ("alpha", "both"),
    )
    found = map_of(path, wanted)
    if kind in ("nodata", "both"):
        wanted[:2] = NO_DATA
    if kind in ("alpha", "both"):
        wanted[:, -1] = NO_DATA
    assert np.array_equal(found, wanted)


def test_a_fourth_band_that_is_near_infrared_is_no_alpha(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.zeros((4, 4, 4), np.uint8),
        photometric="rgb",
        extrasamples=["unspecified"],
    )
    Image.new("RGBA", (4, 4)).save(tmp_path / "a.png")
    assert open_raster(tmp_path / "a.tif").alpha is None
    assert open_raster(tmp_path / "a.png").alpha == 3


@pytest.mark.parametrize(
    "out, part",
    [
        ("map.jpg", "png or .tif"),
        ("no/map.png", "folder"),
        ("dir.tif", "is a folder"),
        ("image.tif", "is one of"),
        ("dir.tif/../image.tif", "is one of"),
    ],
)
@pytest.mark.parametrize("flag", ["--out", "--confidence", "--probabilities"])
def test_a_place_where_no_map_can_be_is_refused_before_anything_is_computed(
    tmp_path, image, flag, out, part
):
    (tmp_path / "dir.tif").mkdir()
    paths = {"--out": tmp_path / "a.tif"} | {flag: tmp_path / out.replace(".png", ".tif")}
    with pytest.raises(DataError, match=f"{flag} .*{part}"):
        maps.check_outputs(paths, [image])


@pytest.mark.parametrize("name", ["a.tif", "A.TIF", "b/../a.tif"])
def test_two_outputs_of_one_name_are_refused(tmp_path, name):
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="--confidence .* is the file of --out too"):
        maps.check_outputs({"--out": tmp_path / "a.tif", "--confidence": tmp_path / name}, [])
    maps.check_outputs({"--out": tmp_path / "a.tif", "--confidence": tmp_path / "b.tif"}, [])


def test_a_png_of_probabilities_is_refused(tmp_path):
    with pytest.raises(DataError, match="--probabilities .*give a .tif"):
        maps.check_outputs({"--probabilities": tmp_path / "a.png"}, [])
