"""Polygons to pixels and back, and the files they come from and go to."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geodata.geojson import read_polygons, write_regions
from geodata.grids import Grid
from geodata.polygons import Region, burn, trace
from geodata.rasters import DataError

IGNORE = 255
sides = st.integers(1, 9)
seeds = st.integers(0, 10_000)


# ---------------------------------------------------------------------------------- two oracles


def is_inside(x, y, rings):
    """Whether a ray from (x, y) to the left crosses the rings an odd number of times."""
    odd = False
    for ring in rings:
        for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, axis=0)):
            if (y1 <= y) != (y2 <= y) and x1 + (y - y1) * (x2 - x1) / (y2 - y1) < x:
                odd = not odd
    return odd


def flood(classes):
    """The sets of pixels of one class that are joined along their sides, without 255."""
    H, W = classes.shape
    left, found = {(y, x) for y in range(H) for x in range(W) if classes[y, x] != IGNORE}, []
    while left:
        todo, region = [left.pop()], set()
        while todo:
            y, x = todo.pop()
            region.add((y, x))
            for near in {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left:
                if classes[near] == classes[y, x]:
                    left.discard(near)
                    todo.append(near)
        found.append(frozenset(region))
    return found


def star(rng, middle, radius, corners):
    turns, radii = np.sort(rng.random(corners)) * 2 * np.pi, radius * rng.uniform(0.3, 1, corners)
    return middle + radii[:, None] * np.stack([np.cos(turns), np.sin(turns)], 1)


@st.composite
def maps(draw):
    H, W, K, seed = draw(sides), draw(sides), draw(st.integers(1, 3)), draw(seeds)
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, K, (H, W), dtype=np.uint8)
    classes[rng.random((H, W)) < draw(st.sampled_from([0, 0.3]))] = IGNORE
    return classes, rng.integers(0, 101, (H, W), dtype=np.uint8)


def area(ring):
    """Positive for counter-clockwise as a map shows it, y upwards."""
    x, y = ring[:, 0], -ring[:, 1]
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


# ------------------------------------------------------------------------------------------ filling


@given(sides, sides, st.integers(0, 3), st.integers(3, 12), seeds)
def test_a_pixel_is_filled_if_its_middle_lies_inside_the_outline_and_in_no_hole(
    H, W, holes, corners, seed
):
    rng = np.random.default_rng(seed)
    middle = rng.uniform(-2, 2 + max(H, W), 2)
    rings = [star(rng, middle, rng.uniform(1, 9), corners)]
    rings += [star(rng, middle + rng.uniform(-2, 2, 2), 2, corners) for _ in range(holes)]
    labels = np.full((H, W), IGNORE, np.uint8)
    assert burn(labels, rings, 7) == 0
    wanted = [[is_inside(x + 0.5, y + 0.5, rings) for x in range(W)] for y in range(H)]
    assert np.array_equal(labels == 7, wanted) and set(np.unique(labels)) <= {7, IGNORE}


@given(seeds)
def test_neighbours_share_no_pixel_and_leave_none_out_though_middles_lie_on_their_border(seed):
    rng, labels = np.random.default_rng(seed), np.full((8, 10), IGNORE, np.uint8)
    x, y = rng.integers(1, 20) / 2, rng.integers(1, 16) / 2
    for k, (left, right) in enumerate(((0, x), (x, 10))):
        for n, (top, bottom) in enumerate(((0, y), (y, 8))):
            ring = np.array([(left, top), (right, top), (right, bottom), (left, bottom)], float)
            assert burn(labels, [ring], 2 * k + n) == 0
    assert (labels != IGNORE).all()


def test_a_later_polygon_counts_and_the_pixels_it_takes_are_told(monkeypatch):
    labels = np.full((4, 4), IGNORE, np.uint8)
    box = np.array([(0, 0), (3, 0), (3, 3), (0, 3)], float)
    assert [burn(labels, [box + shift], k) for k, shift in ((0, 0), (0, 1), (1, 1))] == [0, 0, 9]
    assert (labels[1:, 1:] == 1).all() and (labels == 0).sum() == 5
    monkeypatch.setattr("geodata.polygons.STRIP", 1)  # strips of rows change nothing
    again = np.full((4, 4), IGNORE, np.uint8)
    for k, shift in ((0, 0), (0, 1), (1, 1)):
        burn(again, [box + shift], k)
    assert np.array_equal(labels, again)


# ------------------------------------------------------------------------------------------ tracing


@given(maps())
def test_regions_are_those_of_a_flood_fill_and_their_outlines_fill_to_the_map(drawn):
    classes, confidence = drawn
    regions, again = list(trace(classes, confidence)), np.full(classes.shape, IGNORE, np.uint8)
    pixels = []
    for region in regions:
        own = np.full(classes.shape, IGNORE, np.uint8)
        burn(own, [ring.astype(float) for ring in region.rings], region.value)
        assert burn(again, [ring.astype(float) for ring in region.rings], region.value) == 0
        inside = own != IGNORE
        assert region.pixels == inside.sum() == sum(map(area, region.rings))
        assert region.confidence == pytest.approx(confidence[inside].mean())
        pixels.append(frozenset(zip(*(axis.tolist() for axis in np.nonzero(inside)))))
    assert np.array_equal(again, classes) and set(pixels) == set(flood(classes))


@given(maps())
def test_rings_are_simple_turn_at_every_corner_and_run_as_geojson_wants_them(drawn):
    for region in trace(*drawn):
        assert area(region.rings[0]) > 0 and all(area(hole) < 0 for hole in region.rings[1:])
        for ring in region.rings:
            assert len({tuple(corner) for corner in ring.tolist()}) == len(ring)
            steps = np.roll(ring, -1, axis=0) - ring
            flat = steps[:, 1] == 0
            assert ((steps == 0).sum(axis=1) == 1).all() and (flat != np.roll(flat, 1)).all()


@given(maps(), st.integers(2, 9))
def test_small_regions_join_what_is_beside_them_and_no_pixel_is_lost(drawn, smallest):
    classes, confidence = drawn
    again = np.full(classes.shape, IGNORE, np.uint8)
    for region in trace(classes, confidence, smallest):
        burn(again, [ring.astype(float) for ring in region.rings], region.value)
    assert np.array_equal(again == IGNORE, classes == IGNORE)
    known = classes.copy()
    known[known != IGNORE] = 0
    islands = {island for island in flood(known)}
    for region in flood(again):
        alone = len({again[pixel] for island in islands if region <= island for pixel in island})
        assert len(region) >= smallest or alone == 1
    kept = [region for region in flood(classes) if len(region) >= smallest]
    assert all(len({again[pixel] for pixel in region}) == 1 for region in kept)


def test_a_small_region_becomes_part_of_the_largest_beside_it():
    classes = np.array([[0, 0, 0, 2, 1, 1], [0, 0, 0, 2, 1, 1]], np.uint8)
    found = {r.value: r.pixels for r in trace(classes, classes, 3)}
    assert found == {0: 8, 1: 4}


# -------------------------------------------------------------------------------------------- files


LAMBERT = Grid(770_000, 6_277_000, 0.2, 0.2, 2154, True)
CRS = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::2154"}}
BOX = [[[770_000, 6_277_000], [770_001, 6_277_000], [770_001, 6_276_999], [770_000, 6_276_999]]]


def feature(name, rings, kind="Polygon"):
    geometry = {"type": kind, "coordinates": rings}
    return {"type": "Feature", "properties": {"class": name}, "geometry": geometry}


def write(path, features, **more):
    content = {"type": "FeatureCollection", "features": features, **more}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@given(
    maps(),
    st.booleans(),
    st.sampled_from([None, LAMBERT, Grid(3.9, 43.6, 1e-5, 1e-5, 4326, False)]),
)
def test_regions_that_are_written_are_read_again_to_the_pixel(
    tmp_path_factory, drawn, turned, grid
):
    classes, confidence = drawn
    classes[0, 0] = 0
    classes = np.pad(classes, 1, constant_values=1)
    if grid and turned:
        grid = Grid(grid.left, grid.top, grid.step_x, grid.step_y, grid.system, grid.projected,
                    (grid.step_x / 3, -grid.step_y / 4))  # fmt: skip
    path, names = tmp_path_factory.mktemp("files") / "a.geojson", tuple("abc")
    table = tuple((name, (k, k, k)) for k, name in enumerate(names))
    regions = list(trace(classes, np.pad(confidence, 1)))
    write_regions(path, regions, table, grid)
    again = np.full(classes.shape, IGNORE, np.uint8)
    for name, rings in read_polygons(path, "class", grid, classes.shape).polygons:
        burn(again, rings, names.index(name))
    assert np.array_equal(again, classes)


def test_a_polygon_tells_its_class_square_metres_and_mean_confidence(tmp_path):
    ring = np.array([(3, 0), (0, 0), (0, 2), (3, 2)])
    grid = Grid(10, 20, 0.5, 0.5, 2154, True)
    write_regions(tmp_path / "a", [Region(1, 6, 93.26, [ring])], (("x", ()), ("y", ())), grid)
    content = json.loads((tmp_path / "a").read_text())
    (found,) = content["features"]
    assert content["crs"] == CRS and content["type"] == "FeatureCollection"
    assert found["properties"] == {"class": "y", "value": 1, "area": 1.5, "confidence": 93.3}
    corners = [[11.5, 20], [10, 20], [10, 19], [11.5, 19], [11.5, 20]]
    assert found["geometry"] == {"type": "Polygon", "coordinates": [corners]}


def test_classes_are_sorted_multipolygons_are_parts_and_others_are_told(tmp_path):
    point = {"type": "Feature", "properties": {"class": "z"}, "geometry": {"type": "Point"}}
    features = [
        feature(10, [BOX, BOX], "MultiPolygon"),
        feature(9.0, BOX),
        feature(None, BOX),
        point,
    ]
    path = write(tmp_path / "a.geojson", [*features, feature("b", BOX)], crs=CRS)
    found = read_polygons(path, "class", LAMBERT, (9, 9))
    assert found.names == ["9", "10", "b"]
    assert [name for name, _ in found.polygons] == ["10", "10", "9", "b"]
    assert len(found.notes) == 2 and "1 features have nothing" in found.notes[0]


DEGREES = [[[3.9, 43.6], [3.91, 43.6], [3.91, 43.59]]]
AWAY = (np.array(BOX) + 5000).tolist()
UTM = {"type": "name", "properties": {"name": "EPSG:32631"}}
LONLAT = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}


@pytest.mark.parametrize(
    "rings, more, parts",
    [
        (BOX, dict(crs=UTM), ["EPSG:32631", "ogr2ogr -t_srs EPSG:2154 a_2154.geojson"]),
        (DEGREES, {}, ["longitude and latitude", "ogr2ogr -t_srs EPSG:2154"]),
        (DEGREES, dict(crs=LONLAT), ["longitude and latitude", "ogr2ogr -t_srs EPSG:2154"]),
        (AWAY, dict(crs=CRS), ["no polygon lies in the image"]),
        ([[["x", 1], [2, 2]]], dict(crs=CRS), ["damaged polygon"]),
        ([[[1]]], dict(crs=CRS), ["damaged polygon"]),
        (None, dict(crs=CRS), ["damaged polygon"]),
        (BOX, dict(crs=CRS, key="kind"), ["no field 'kind'", "class"]),
        (BOX, dict(crs=CRS, names=("a", "a")), ["1 different classes"]),
        (BOX, dict(crs=7), ["no collection of features"]),
        (BOX, dict(features=None), ["no collection of features"]),
        (BOX, dict(features=[3]), ["no collection of features"]),
        (BOX, dict(features=[]), ["no polygon"]),
    ],
)
def test_polygons_that_cannot_be_used_are_one_line_that_says_what_to_type(
    tmp_path, rings, more, parts
):
    key, names = more.pop("key", "class"), more.pop("names", ("a", "b"))
    path = tmp_path / "a.geojson"
    write(path, **{"features": [feature(name, rings) for name in names], **more})
    with pytest.raises(DataError) as error:
        read_polygons(path, key, LAMBERT, (9, 9))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts)


def test_a_file_without_a_system_is_in_the_image_s_where_it_cannot_be_in_degrees(tmp_path):
    path = write(tmp_path / "a.geojson", [feature(name, BOX) for name in "ab"])
    (_, rings), _ = read_polygons(path, "class", LAMBERT, (9, 9)).polygons
    assert np.allclose(rings[0], [(0, 0), (5, 0), (5, 5), (0, 5)])


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\xff", '{"type": "Feature", "geometry": 3}'])
def test_what_is_no_geojson_is_one_line_with_the_command_that_makes_it(tmp_path, text):
    path = tmp_path / "a.shp"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="ogr2ogr -f GeoJSON"):
        read_polygons(path, "class", LAMBERT, (9, 9))
