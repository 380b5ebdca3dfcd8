"""From one image with labels to tiles, a run and a map with its polygons, as a user types it."""

import itertools
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import test_scripts
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_scripts import TINY, assert_refused, files_below

from data import open_dataset
from geodata.blocks import cut_blocks, share_out
from geodata.geojson import read_polygons
from geodata.grids import read_grid
from geodata.polygons import burn
from geodata.rasters import open_raster, read_raster
from geodata.scaling import Scaling
from geodata.tiles import Tile

script = test_scripts.script
H, W, K = 210, 280, 3
CRS = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::2154"}}


def tags(step, *more):
    keys = (1, 1, 0, 3 + len(more) // 4, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 2154, *more)
    tie = (0.0, 0.0, 0.0, 770_000.0, 6_277_000.0, 0.0)
    places = (33550, "d", 3, (step, step, 0.0), True), (33922, "d", 6, tie, True)
    return [*places, (34735, "H", len(keys), keys, True)]


def feature(name, top, left, bottom, right):
    x, y = (770_000 + 0.2 * v for v in (left, right)), (6_277_000 - 0.2 * v for v in (top, bottom))
    (x1, x2), (y1, y2) = x, y
    ring = [[x1, y1], [x2, y1], [x2, y2], [x1, y2], [x1, y1]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "properties": {"class": name}, "geometry": geometry}


@pytest.fixture
def place(script, tmp_path):
    """An image of four bands and 16 bit, heights and radar on coarser grids, and strips of three
    classes."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 4000, (H, W, 4), dtype=np.uint16)
    options = dict(photometric="rgb", extrasamples=["unspecified"], extratags=tags(0.2))
    tifffile.imwrite("ortho.tif", image, **options)
    heights = rng.uniform(20, 30, (H // 2, W // 2)).astype(np.float32)
    tifffile.imwrite("dsm.tif", heights, photometric="minisblack", extratags=tags(0.4))
    radar = rng.uniform(-30, -5, (H // 2, W // 2, 2)).astype(np.float32)
    options = dict(photometric="minisblack", planarconfig="contig", extrasamples=["unspecified"])
    tifffile.imwrite("radar.tif", radar, **options, extratags=tags(0.4))
    names = ("road", "roof", "tree")
    places = itertools.product(range(0, H, 30), range(0, W, 20))
    features = [feature(names[(y + x) // 10 % K], y, x, y + 28, x + 17) for y, x in places]
    content = {"type": "FeatureCollection", "crs": CRS, "features": features}
    Path("labels.geojson").write_text(json.dumps(content))
    return image


WORDS = "--image ortho.tif --dsm dsm.tif --polygons labels.geojson --block 64".split()

# ------------------------------------------------------------------------------------------ blocks


@given(st.integers(1, 700), st.integers(1, 700), st.integers(64, 600))
def test_blocks_reach_the_last_row_and_column_and_do_not_touch(height, width, block):
    blocks = cut_blocks((height, width), block)
    for box in blocks:
        for part, length in zip(box, (height, width)):
            side = part.stop - part.start
            assert 0 <= part.start and part.stop <= length
            assert side <= 1.6 * block and (side >= 0.6 * block or side == length)
    for (a, b), (c, d) in itertools.combinations(blocks, 2):
        apart = [max(p.start, q.start) - min(p.stop, q.stop) for p, q in ((a, c), (b, d))]
        assert max(apart) >= 1
    for axis, length in enumerate((height, width)):
        assert min(box[axis].start for box in blocks) == 0
        assert max(box[axis].stop for box in blocks) == length
    assert sum((a.stop - a.start) * (b.stop - b.start) for a, b in blocks) >= 0.9 * height * width


def can_be(has, sizes):
    """Whether some way of sharing out gives every part every class."""
    for parts in set(itertools.permutations(np.repeat(range(len(sizes)), sizes).tolist())):
        if all(has[np.array(parts) == p].any(axis=0).all() for p in range(len(sizes))):
            return True
    return False


@settings(max_examples=25)
@given(st.integers(3, 6), st.integers(1, 4), st.floats(0.3, 0.9), st.integers(0, 999))
def test_every_part_has_every_class_where_that_can_be(n, classes, share, seed):
    rng = np.random.default_rng(seed)
    pixels = (rng.random((n, classes)) < share) * rng.integers(1, 99, (n, classes))
    pixels[:, 0] += 1
    sizes = n - 2, 1, 1
    parts = share_out(pixels, sizes, seed)
    assert tuple(np.bincount(parts, minlength=3)) == sizes
    assert np.array_equal(parts, share_out(pixels, sizes, seed))
    found = np.stack([pixels[parts == p].sum(axis=0) > 0 for p in range(3)])
    assert found.all() or not can_be(pixels > 0, sizes)


# ------------------------------------------------------------------------------------------ the way


def test_an_image_and_polygons_become_tiles_a_run_and_a_map_with_its_polygons(
    place, script, tmp_path
):
    more = ["--raster", "sar=radar.tif", "--val", 0.25]
    status, out, err = script("prepare.py", *WORDS, *more, "--out", "tiles")
    assert (status, err) == (0, "") and "heights resampled" in out
    grid = read_grid(tmp_path / "ortho.tif")
    labels, names = np.full((H, W), 255, np.uint8), ["road", "roof", "tree"]
    for name, rings in read_polygons(Path("labels.geojson"), "class", grid, (H, W)).polygons:
        burn(labels, rings, names.index(name))
    dataset, boxes, scales = open_dataset("tiles", "tiles"), {}, []
    assert dataset.class_names == names
    for split in ("train", "val", "test"):
        for tile in dataset.tiles(split, ("image", "dsm", "sar")):
            own = read_grid(tile.paths["image"])
            column, row = (round(float(v)) for v in grid.pixels(own.left, own.top))
            box = np.s_[row : row + tile.size[0], column : column + tile.size[1]]
            boxes[tile.name] = split, box
            assert own.system == 2154 and own.step_x == 0.2
            assert np.array_equal(read_raster(tile.paths["image"]), place[box])
            assert np.array_equal(tile.read_labels(), labels[box]) and not tile.notes
            heights = tile.read_dsm()
            assert heights.shape == tile.size and 20 <= heights.min() < heights.max() <= 30
            radar = tile.read("sar")
            assert radar.shape == (*tile.size, 2) and -30 <= radar.min() < radar.max() <= -5
            scales.append(np.stack(tile.open(("image", "sar")).scales["sar"].image))
        assert len(np.unique([labels[box] for s, box in boxes.values() if s == split][0])) == 4
    (low, _), (span, _) = scales[0]
    assert np.ptp(scales, axis=0).max() == 0 and -28 < low < -26 and -9 < low + span < -7
    assert len(boxes) == 12 and len({split for split, _ in boxes.values()}) == 3
    with Image.open("tiles/split.png") as picture:
        assert min(picture.size) > 200

    words = shlex.split(out.splitlines()[-1].split("#")[0])
    assert words[:3] == ["next:", "python", "train.py"] and "--heights=20:30" in words
    assert any(w.startswith("--image-scaling=0:3") for w in words)
    once = ["--epochs", 1, "--steps", 1, *TINY, "--out", "run"]
    status, out, err = script("train.py", *words[3:], *once)
    assert status == 0, err
    assert "val tiles" in out
    rasters = ["--image", "ortho.tif", "--dsm", "dsm.tif", "--device", "cpu", "--run", "run"]
    rasters += ["--raster", "sar=radar.tif"]
    more = ["--confidence", "sure.tif", "--polygons", "map.geojson", "--min-area", 0.5]
    status, out, err = script("predict.py", *rasters, "--out", "map.tif", *more)
    assert (status, err) == (0, "") and out.splitlines()[-1].startswith("next: python explain.py")
    found, classes = json.loads(Path("map.geojson").read_text()), read_raster(Path("map.tif"))
    areas = [f["properties"]["area"] for f in found["features"]]
    assert sum(areas) == pytest.approx(0.04 * H * W) and min(areas) >= 0.5
    sure = [f["properties"]["confidence"] for f in found["features"]]
    mean = read_raster(Path("sure.tif")).mean()
    assert np.average(sure, weights=areas) == pytest.approx(mean, abs=0.05)
    assert found["crs"] == CRS and {f["properties"]["class"] for f in found["features"]} <= {*names}
    assert classes.shape == (H, W)

    Path("images").mkdir()
    for name in ("a.tif", "b.tif"):
        Path("images", name).write_bytes(Path("ortho.tif").read_bytes())
    rasters[1] = "images"
    assert script("predict.py", *rasters, "--out", "maps", "--polygons", "maps")[0] == 0
    for name in ("a", "b"):
        assert np.array_equal(read_raster(Path(f"maps/{name}.tif")), classes)
        regions = json.loads(Path(f"maps/{name}.geojson").read_text())["features"]
        assert sum(f["properties"]["area"] for f in regions) == pytest.approx(0.04 * H * W)


def test_a_label_raster_gives_the_tiles_that_the_same_polygons_give(place, script):
    status, out, _ = script("prepare.py", *WORDS, "--out", "a")
    assert status == 0 and "--val val" not in out and "val has 1 block, too few" in out
    labels = np.full((H, W), 255, np.uint8)
    grid = read_grid(Path("ortho.tif"))
    for name, rings in read_polygons(Path("labels.geojson"), "class", grid, (H, W)).polygons:
        burn(labels, rings, {"road": 3, "roof": 5, "tree": 9}[name])
    colours = np.zeros((256, 3), np.uint8)
    colours[[3, 5, 9, 255]] = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90)]
    table = dict(photometric="palette", colormap=colours.T.astype(np.uint16) * 257)
    tifffile.imwrite("numbers.tif", labels, extratags=tags(0.2), **table)
    tifffile.imwrite("plain.tif", labels, extratags=tags(0.2))
    for name, first in (("numbers", [200, 0, 0]), ("plain", [230, 159, 0])):
        words = ["--labels" if w == "--polygons" else w for w in WORDS]
        words[words.index("labels.geojson")] = f"{name}.tif"
        status, _, err = script("prepare.py", *words, "--out", name)
        assert (status, err) == (0, "")
        one, other = (
            {p: read_raster(Path(root, p)) for p in files_below(Path(root)) if p.endswith(".tif")}
            for root in ("a", name)
        )
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[p], other[p], equal_nan="dsm" in p) for p in one)
        listed = json.loads(Path(name, "classes.json").read_text())["classes"]
        assert listed[0] == {"name": "class 3", "color": first}


def test_what_a_label_raster_does_not_show_is_no_class(place, script):
    labels = np.full((H, W, 3), 40, np.uint8)
    labels[: H // 3], labels[H // 3 : H // 2] = 0, (0, 200, 0)
    clear = np.where(labels.any(axis=-1), 255, 0).astype(np.uint8)
    hole = [(42113, "s", 0, "0", True)]
    tifffile.imwrite("nodata.tif", labels, photometric="rgb", extratags=[*tags(0.2), *hole])
    Image.fromarray(np.dstack([labels, clear])).save("clear.png")
    Image.fromarray(np.dstack([labels[..., 1], clear])).save("grey.png")
    image = ["--image", "ortho.tif", "--block", 64, "--labels"]
    for name, of in (("nodata.tif", "#00c800"), ("clear.png", "#00c800"), ("grey.png", "class 40")):
        status, _, err = script("prepare.py", *image, name, "--out", name[:4])
        assert (status, err) == (0, "")
        dataset = open_dataset("tiles", name[:4])
        assert len(dataset.classes) == 2 and dataset.class_names[0] == of
        for tile in dataset.tiles("train", ("image",)):
            top, (h, w) = int(tile.name[:5]), tile.size
            assert np.array_equal(tile.read_labels() == 255, clear[top : top + h, :w] == 0)
    tifffile.imwrite("wide.tif", labels.astype(np.uint16) * 200, photometric="rgb")
    tifffile.imwrite("large.tif", labels[..., 0].astype(np.uint32) * 9_999_999)
    for name in ("wide.tif", "large.tif"):
        assert_refused(script("prepare.py", *image, name, "--out", "none"), name, "class numbers")


@pytest.mark.parametrize("bands", [1, 2])
def test_tiles_and_the_whole_image_give_a_network_the_same(place, script, bands):
    """Heights in metres below an image in feet; holes of heights, of one band, of a mask."""
    feet, rng = tags(0.2, 4099, 0, 1, 9003), np.random.default_rng(1)
    image = rng.uniform(0, 1, (H, W, 3)).astype(np.float32)
    tifffile.imwrite("ortho.tif", image, photometric="rgb", extratags=feet)
    mask = np.full((H, W), 255, np.uint8)
    mask[40:60, 50:90] = 0
    tifffile.imwrite("ortho.tif.msk", mask, photometric="minisblack")
    heights = np.linspace(0, 100, W, dtype=np.float32) + np.zeros((H, 1), np.float32)
    heights[80:90, 200:260] = np.nan
    tifffile.imwrite("dsm.tif", heights, photometric="minisblack")
    sar = rng.uniform(-20, -5, (H, W, bands)).astype(np.float32)
    sar[100:120, :, 0] = -9999
    about = dict(photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(
        "radar.tif", sar.squeeze(), **about, extratags=[(42113, "s", 0, "-9999", True)]
    )
    more = ["--raster", "sar=radar.tif", "--val", 0, "--out", "tiles"]
    status, out, err = script("prepare.py", *WORDS, *more)
    assert (status, err) == (0, "") and "--heights=0:101" in out
    words = dict(word.removeprefix("--").split("=") for word in out.split() if "=" in word[1:])
    scaling = Scaling(words["heights"], words["image-scaling"])
    dataset, names = open_dataset("tiles", "tiles", scaling=scaling), ("image", "dsm", "sar")
    paths = {"image": Path("ortho.tif"), "dsm": Path("dsm.tif"), "sar": Path("radar.tif")}
    whole = Tile("a", paths, dataset.classes, kinds=dataset.rasters, scaling=scaling).open(names)
    for tile in (*dataset.tiles("train", names), *dataset.tiles("test", names)):
        top, left = map(int, tile.name.split("_"))
        loaded = tile.load(names)
        box = np.s_[top : top + tile.size[0], left : left + tile.size[1]]
        for name in names:
            own = loaded.input(name, np.s_[0 : tile.size[0], 0 : tile.size[1]])
            assert np.array_equal(own, whole.input(name, box)), (tile.name, name)


def test_what_the_image_does_not_show_is_not_labelled(place, script):
    image = place[..., :3] // 16
    image[:100] = 0
    extra = [*tags(0.2), (42113, "s", 0, "0", True)]
    tifffile.imwrite("ortho.tif", image.astype(np.uint8), photometric="rgb", extratags=extra)
    status, out, err = script("prepare.py", *WORDS, "--out", "tiles")
    assert (status, err) == (0, "") and "--image-scaling" not in out
    for path in Path("tiles").glob("*/images/*.tif"):
        raster = open_raster(path)
        shown = read_raster(path).any(axis=-1)
        assert raster.nodata == 0 and shown.any()
        assert (read_raster(path.parent.parent / "labels" / path.name)[~shown] == 255).all()


@pytest.mark.parametrize(
    "flags, parts",
    [
        ({"--block": 512}, ["labels.geojson", "3 are needed", "give --block 70"]),
        ({"--block": 63}, ["--block 63", "64"]),
        ({"--test": 1}, ["--test"]),
        ({"--test": "nan"}, ["--test"]),
        ({"--field": "kind"}, ["'kind'", "--field: class"]),
        ({"--polygons": "nowhere.geojson"}, ["--polygons nowhere.geojson", "no file"]),
        ({"--polygons": None}, ["--polygons", "--labels"]),
        ({"--labels": "dsm.tif"}, ["--labels", "--polygons"]),
        ({"--polygons": None, "--labels": "dsm.tif"}, ["dsm.tif", "class numbers"]),
        ({"--polygons": "ortho.tif"}, ["ortho.tif", "ogr2ogr"]),
        ({"--image": "dsm.tif"}, ["dsm.tif", "three or more bands"]),
        ({"--dsm": "ortho.tif"}, ["ortho.tif", "heights are one band"]),
        ({"--raster": "sar=nowhere.tif"}, ["--raster sar nowhere.tif", "no file"]),
        ({"--raster": "labels=radar.tif"}, ["--raster", "labels", "another name"]),
        ({"--raster": "dsm=radar.tif"}, ["--raster dsm=radar.tif", "dsm.tif already"]),
        ({"--raster": "sar=plain.png"}, ["plain.png", "differ in size"]),
        ({"--raster": "Labels=radar.tif"}, ["--raster", "Labels", "another name"]),
        ({"--raster": "sar=alpha.tif"}, ["alpha.tif", "band 2 is alpha", "-b 1 -b 3"]),
        ({"--out": "."}, ["--out .", "new folder"]),
        ({"--out": "/proc/tiles"}, ["--out /proc/tiles"]),
    ],
    ids=str,
)
def test_a_mistake_in_preparing_is_one_line_and_leaves_nothing(
    place, script, tmp_path, flags, parts
):
    Image.new("L", (W // 2, H // 2)).save("plain.png")
    extra = ["unassalpha", "unspecified"]
    about = dict(photometric="minisblack", planarconfig="contig", extrasamples=extra)
    tifffile.imwrite("alpha.tif", place[..., :3], **about, extratags=tags(0.2))
    words = dict(zip(WORDS[::2], WORDS[1::2])) | {"--out": "tiles"} | flags
    given = [str(word) for pair in words.items() if pair[1] is not None for word in pair]
    assert_refused(script("prepare.py", *given), *parts)
    left = ["alpha.tif", "dsm.tif", "labels.geojson", "ortho.tif", "plain.png", "radar.tif"]
    assert files_below(tmp_path) == left
