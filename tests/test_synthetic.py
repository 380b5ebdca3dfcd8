"""The synthetic city: its layout, what it promises about heights and colours, and its care with
folders.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from geodata import synthetic
from geodata.canvas import BUILDING, CAR, CLUTTER, IMPERVIOUS, LOW, PIXEL, TREE, Canvas
from geodata.city import make_tile
from geodata.layouts import ISPRS_CLASSES
from geodata.sensor import hidden, measure_heights, photograph, plan_flight
from geodata.synthetic import ensure_city, erode_labels, tile_paths, write_city
from geodata.things import draw_car, slab
from geodata.tiles import Tile

ROOT = Path(synthetic.__file__).resolve().parent.parent
TRAIN_AREAS, TEST_AREAS = (1, 3, 23, 26, 7, 11, 13, 28, 17, 32, 34, 37), (5, 21, 15, 30)
COLOURS = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))


@pytest.fixture(scope="module")
def scenes():
    """The four test tiles."""
    return [make_tile(0, area, 640, 640, later=True) for area in TEST_AREAS]


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "city"
    assert ensure_city(root, seed=3, size=(96, 112))
    return root


def same(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name == "dsm")
        for name in ("image", "dsm", "labels")
    )


def above_ground(scene, mask):
    """Median height of the mask's pixels above the ground found within 4 m of each (a sample of
    them).
    """
    ground = np.isin(scene.labels, (IMPERVIOUS, LOW))
    heights = []
    for row, column in np.argwhere(mask)[::499]:
        window = slice(max(0, row - 44), row + 45), slice(max(0, column - 44), column + 45)
        if np.isfinite(scene.dsm[window][ground[window]]).any():
            heights.append(scene.dsm[row, column] - np.nanmedian(scene.dsm[window][ground[window]]))
    return np.nanmedian(heights)


def overlap(one, other):
    """How much of two distributions of grey values in 0..255 is common, 0 to 1, in 16 bins."""
    shares = [
        np.histogram(values, bins=16, range=(0, 256))[0] / len(values) for values in (one, other)
    ]
    return np.minimum(*shares).sum()


def test_a_tile_is_a_function_of_seed_area_and_size():
    assert same(make_tile(5, 7, 160, 200), make_tile(5, 7, 160, 200))


@pytest.mark.parametrize("seed, area", [(6, 7), (5, 8), (7, 5)])
def test_other_seeds_and_areas_give_other_tiles(seed, area):
    one, other = make_tile(5, 7, 160, 160), make_tile(seed, area, 160, 160)
    assert (one.image != other.image).mean() > 0.5 and (one.dsm != other.dsm).mean() > 0.99


@pytest.mark.parametrize("height, width", [(64, 64), (65, 190), (201, 70)])
def test_any_size_gives_the_declared_types_and_shapes(height, width):
    for area in TRAIN_AREAS[:4]:
        scene = make_tile(1, area, height, width)
        assert (scene.image.shape, scene.image.dtype) == ((height, width, 3), np.uint8)
        assert (scene.dsm.shape, scene.dsm.dtype) == ((height, width), np.float32)
        assert (scene.labels.shape, scene.labels.dtype) == ((height, width), np.uint8)
        assert 240 < np.nanmin(scene.dsm) and np.nanmax(scene.dsm) < 330
        assert not np.isinf(scene.dsm).any() and np.isnan(scene.dsm).mean() < 0.25
        assert scene.labels.max() < len(COLOURS)


def test_every_test_tile_holds_all_classes(scenes):
    for scene in scenes:
        shares = np.bincount(scene.labels.ravel(), minlength=6) / scene.labels.size
        assert (shares[:CAR] > 0.12).all() and (shares[CAR:] > 0.01).all()


def test_the_shares_of_the_classes_are_those_of_a_town():
    labels = np.concatenate([make_tile(0, area, 400, 400).labels.ravel() for area in TRAIN_AREAS])
    shares = np.bincount(labels, minlength=6) / labels.size
    low = (0.20, 0.12, 0.12, 0.15, 0.015, 0.04)
    high = (0.40, 0.25, 0.30, 0.30, 0.06, 0.09)
    assert (shares > low).all() and (shares < high).all()


def test_roofs_and_crowns_stand_more_than_two_metres_above_the_ground_nearby(scenes):
    for scene in scenes:
        assert above_ground(scene, scene.labels == BUILDING) > 2
        assert above_ground(scene, scene.labels == TREE) > 2


def test_a_car_is_lower_than_a_roof_and_higher_than_the_street(scenes):
    assert 0.5 < np.median([above_ground(scene, scene.labels == CAR) for scene in scenes]) < 2


def test_shrubs_and_lawns_are_ground_in_height(scenes):
    for scene in scenes:
        assert abs(above_ground(scene, scene.labels == LOW)) < 0.7


@pytest.mark.parametrize("difficulty, low, high", [(0, 0.0, 0.05), (1, 0.15, 0.6)])
def test_heights_alone_tell_less_of_a_harder_city(difficulty, low, high):
    """How much the heights above sea level of roofs and of paved ground of a tile overlap."""
    shared = []
    for area in TEST_AREAS:
        scene = make_tile(0, area, 512, 512, difficulty, later=True)
        heights = 255 * (scene.dsm - np.nanmin(scene.dsm)) / np.ptp(scene.dsm[scene.dsm > 0])
        shared.append(overlap(*(heights[scene.labels == k] for k in (BUILDING, IMPERVIOUS))))
    assert low < np.mean(shared) < high


def test_many_roofs_have_the_colours_of_paved_ground_and_many_have_not(scenes):
    roofs, ground = (
        [scene.image[scene.labels == label] for scene in scenes] for label in (BUILDING, IMPERVIOUS)
    )
    for band in range(3):
        common = overlap(np.concatenate(roofs)[:, band], np.concatenate(ground)[:, band])
        assert 0.5 < common < 0.95


def test_much_low_vegetation_has_the_colours_of_crowns_and_much_has_not(scenes):
    """Lawn is paler than leaves in the green band, in the light as in the shade; shrubs are not."""

    def paleness(label):
        pixels = np.concatenate([scene.image[scene.labels == label] for scene in scenes]).astype(
            float
        )
        return 255 * pixels[:, 2] / pixels[:, 0].clip(1)

    low, tree = paleness(LOW), paleness(TREE)
    assert 0.4 < overlap(low, tree) < 0.9


def painted(draw, difficulty=1.0):
    """(image, heights above the sea, labels) of a lawn on which something is drawn."""
    flight = plan_flight(np.random.default_rng(4), difficulty, False)
    canvas = Canvas(np.random.default_rng(9), 200, 200, difficulty)
    canvas.labels[:] = IMPERVIOUS
    draw(canvas)
    image = photograph(canvas, flight)
    return image, measure_heights(canvas, image), canvas.labels


def test_a_roof_and_a_yard_of_the_same_draws_look_the_same_but_for_the_shadow():
    (roof, high, as_roof), (yard, low, as_yard) = (
        painted(lambda c: slab(c, 9.0, 9.0, 0.4, 9.0, 8.0, label, height, "gravel"), 0.0)
        for label, height in ((BUILDING, 5.0), (CLUTTER, 0.0))
    )
    inside = as_roof == BUILDING
    assert np.array_equal(inside, as_yard == CLUTTER)
    eroded = inside & ~(erode_labels(as_roof, 4) == 255)
    assert np.array_equal(roof[eroded], yard[eroded])
    assert (high - low)[eroded].mean() > 4


def test_what_moves_is_in_the_image_and_not_in_the_heights():
    for moving in (False, True):
        image, heights, labels = painted(lambda c: draw_car(c, 9.0, 9.0, 0.4, moving))
        car = labels == CAR
        assert car.sum() > 500
        without = painted(lambda c: draw_car(c, -99.0, 0.0, 0.4, moving))[0]
        assert np.abs(image[car].astype(int) - without[car]).mean() > 10
        lift = np.nanmedian(heights[car]) - np.nanmedian(heights[~car])
        assert abs(lift) < 0.4 if moving else lift > 0.6


def test_a_roof_is_level_on_a_slope():
    canvas = Canvas(np.random.default_rng(2), 200, 200, 1.0)
    canvas.ground += np.arange(200, dtype=np.float32) / 50
    slab(canvas, 9.0, 9.0, 0.4, 9.0, 8.0, BUILDING, 5.0)
    assert np.ptp((canvas.ground + canvas.height)[canvas.labels == BUILDING]) < 1e-3


def test_the_sun_of_a_later_flight_is_mostly_lower_and_their_days_overlap():
    rngs = np.random.default_rng(0).spawn(2)
    soon, late = ([plan_flight(rngs[k], 1.0, bool(k)) for _ in range(300)] for k in (0, 1))
    assert np.median([f.rise for f in late]) < np.median([f.rise for f in soon])
    lowest = min(f.season for f in late)
    assert 0.2 < np.mean([f.season > lowest for f in soon]) < 0.9
    assert same(make_tile(1, 2, 64, 64), make_tile(1, 2, 64, 64, later=False))
    assert not same(make_tile(1, 2, 64, 64), make_tile(1, 2, 64, 64, later=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 3), st.tuples(st.integers(-2, 2), st.integers(-2, 2)))
def test_what_is_hidden_is_what_lies_behind_something_on_the_ray(seed, rise, toward):
    """Against marching pixel by pixel, for directions that meet the pixels."""
    surface = np.random.default_rng(seed).uniform(0, 3, (9, 11)).astype(np.float32)
    found = hidden(surface, toward, rise, 3.0)
    for row, column in np.ndindex(*surface.shape):
        blocked, steps = 0.0, 1
        while steps * PIXEL * rise < 3:
            r, c = row + toward[1] * steps, column + toward[0] * steps
            if not (0 <= r < 9 and 0 <= c < 11):
                break
            blocked = max(blocked, surface[r, c] - steps * PIXEL * rise - surface[row, column])
            steps += 1
        assert found[row, column] == pytest.approx(min(1, blocked / 0.4), abs=1e-4)


def test_the_same_seed_makes_the_same_bits_everywhere():
    """As numpy 1.26 and 2.4 made them; raise GENERATOR_VERSION where this changes."""
    digest = hashlib.sha256()
    for difficulty, later in ((1.0, True), (0.3, False)):
        scene = make_tile(5, 7, 320, 300, difficulty, later)
        for array in (scene.image, scene.dsm, scene.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest()[:16] == "e07bbc5adfa1969b"


label_maps = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 2)
)


@settings(max_examples=60, deadline=None)
@given(label_maps, st.integers(0, 4))
def test_eroded_labels_are_the_labels_except_where_the_disc_holds_a_second_class(labels, radius):
    eroded = erode_labels(labels, radius)
    rows, columns = np.indices(labels.shape)
    for (row, column), label in np.ndenumerate(labels):
        disc = labels[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2]
        assert eroded[row, column] == (label if (disc == label).all() else 255)


def test_the_folders_are_those_of_vaihingen(city):
    expected = {"city.json"}
    for n in TRAIN_AREAS + TEST_AREAS:
        expected |= {
            f"top/top_mosaic_09cm_area{n}.tif",
            f"dsm/dsm_09cm_matching_area{n}.tif",
            f"intensity/intensity_09cm_area{n}.tif",
            f"gts_for_participants/top_mosaic_09cm_area{n}.tif",
            f"gts_eroded_for_participants/top_mosaic_09cm_area{n}_noBoundary.tif",
        }
    assert {
        path.relative_to(city).as_posix() for path in city.rglob("*") if path.is_file()
    } == expected


def test_the_files_hold_the_tile_in_the_official_types_and_colours(city):
    paths, scene = tile_paths(city, 5), make_tile(3, 5, 96, 112, later=True)
    image, dsm, full, eroded = (
        tifffile.imread(paths[name]) for name in ("image", "dsm", "labels", "eroded")
    )
    assert (
        np.array_equal(image, scene.image)
        and np.array_equal(dsm, np.where(np.isnan(scene.dsm), -9999, scene.dsm))
        and dsm.dtype == np.float32
    )
    assert np.array_equal(full, np.uint8(COLOURS)[scene.labels]) and full.dtype == np.uint8
    assert np.array_equal(tifffile.imread(paths["intensity"]), scene.intensity)
    black = (eroded == 0).all(-1)
    assert np.array_equal(black, erode_labels(scene.labels) == 255) and black.any()
    assert np.array_equal(eroded[~black], full[~black])


def test_the_laser_scan_changes_nothing_that_the_camera_sees(monkeypatch):
    whole = make_tile(3, 5, 96, 112)
    monkeypatch.setattr("geodata.city.scan", lambda canvas, rng: rng.random(canvas.shape))
    other = make_tile(3, 5, 96, 112)
    assert np.array_equal(whole.image, other.image) and np.array_equal(whole.labels, other.labels)
    assert np.array_equal(whole.dsm, other.dsm, equal_nan=True)
    assert whole.intensity.dtype == np.uint8 and whole.intensity.std() > 10


def test_holes_are_marked_as_gdal_does_and_read_as_the_lowest_height(tmp_path):
    size = (320, 320)
    write_city(tmp_path, seed=3, size=size, tiles=[5])
    path, scene = tile_paths(tmp_path, 5)["dsm"], make_tile(3, 5, *size, later=True)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].tags[42113].value == "-9999"
    holes = np.isnan(scene.dsm)
    assert 0.002 < holes.mean() < 0.1
    tile = Tile("5", {"dsm": path}, ISPRS_CLASSES)
    assert (tile.read_dsm()[holes] == np.nanmin(scene.dsm)).all()
    assert tile.missing_heights == holes.sum()


def test_training_takes_the_city_that_the_folder_says_it_holds(tmp_path):
    write_city(tmp_path, seed=3, size=64, tiles=TRAIN_AREAS[:1], difficulty=0.5)
    synthetic.open_city(tmp_path)
    assert not ensure_city(tmp_path, seed=3, size=64, difficulty=0.5)
    marker = json.loads((tmp_path / "city.json").read_text())
    (tmp_path / "city.json").write_text(json.dumps({**marker, "generator_version": 2}))
    with pytest.raises(ValueError, match="another synthetic city"):
        synthetic.open_city(tmp_path)


def test_a_complete_city_is_used_again(city):
    before = {path: path.stat().st_mtime_ns for path in city.rglob("*.tif")}
    assert not ensure_city(city, seed=3, size=(96, 112))
    assert before == {path: path.stat().st_mtime_ns for path in city.rglob("*.tif")}


def test_a_city_of_other_parameters_is_refused_and_kept(city):
    before = (city / "city.json").read_bytes()
    for seed, size, difficulty in ((4, (96, 112), 1), (3, 96, 1), (3, (96, 112), 0.5)):
        with pytest.raises(ValueError, match="another synthetic city"):
            ensure_city(city, seed, size, difficulty=difficulty)
    assert (city / "city.json").read_bytes() == before


@pytest.mark.parametrize(
    "name, text", [("notes.txt", "mine"), *(("city.json", text) for text in ("[1]", "{", "{}"))]
)
def test_a_foreign_folder_is_refused_and_kept(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="new or empty folder"):
        ensure_city(tmp_path, size=64)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (
        tmp_path / name
    ).read_text() == text


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "city").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        ensure_city(tmp_path / "city", size=64)


def test_a_missing_tile_is_written_again(tmp_path):
    write_city(tmp_path, seed=1, size=64, tiles=TRAIN_AREAS[:1])  # one of its tiles
    assert ensure_city(tmp_path, seed=1, size=64)
    assert not ensure_city(tmp_path, seed=1, size=64)


def test_an_interrupted_city_is_finished(tmp_path, monkeypatch):
    def interrupt(seed, area, *rest):
        if area == TRAIN_AREAS[2]:
            raise KeyboardInterrupt
        return make_tile(seed, area, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(synthetic, "make_tile", interrupt)
        ensure_city(tmp_path, size=64)
    assert json.loads((tmp_path / "city.json").read_text())["complete"] is False
    assert ensure_city(tmp_path, size=64)
    assert not ensure_city(tmp_path, size=64)


def test_a_file_interrupted_while_it_is_written_never_has_its_name(tmp_path, monkeypatch):
    def break_off(path, array, **options):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(tifffile, "imwrite", break_off)
        ensure_city(tmp_path, size=64)
    assert not list(tmp_path.rglob("*.tif"))
    assert ensure_city(tmp_path, size=64)


@pytest.mark.parametrize("layout, tiles", [("potsdam", ["2_10", "7_12"]), ("hunan", ["test/5"])])
def test_a_city_in_another_layout_is_used_again_finished_and_not_taken_for_another(
    tmp_path, layout, tiles
):
    write_city(tmp_path, 1, 64, tiles, layout)
    assert not ensure_city(tmp_path, 1, 64, layout)
    with pytest.raises(ValueError, match="another synthetic city"):
        ensure_city(tmp_path, 1, 64)
    marker = json.loads((tmp_path / "city.json").read_text())
    (tmp_path / "city.json").write_text(json.dumps({**marker, "complete": False}))
    before = len(list(tmp_path.rglob("*.tif")))
    assert ensure_city(tmp_path, 1, 64, layout)
    assert len(list(tmp_path.rglob("*.tif"))) > before


def test_the_numbers_of_the_tiles_have_not_moved():
    """`make_tile` draws a tile from its number: another order would be other pixels."""
    areas, potsdam, hunan = (synthetic.LAYOUTS[k][1] for k in ("vaihingen", "potsdam", "hunan"))
    assert areas == {area: area for area in TRAIN_AREAS + TEST_AREAS}
    assert list(potsdam) == [
        f"{row}_{column}"
        for row in range(2, 8)
        for column in (range(10, 13) if row < 6 else range(7, 13))
    ]
    assert list(hunan) == ["train/101", "train/7", "val/23", "test/5"]
    assert list(potsdam.values()) == list(range(24)) and list(hunan.values()) == [0, 1, 2, 3]


def command(*words):
    words = [sys.executable, "-m", "geodata.synthetic", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "words",
    [
        ["--size", "8"],
        ["--seed", "-1"],
        ["--difficulty", "3"],
        ["--root", __file__],
        ["--layout", "x"],
        ["--size", "big"],
    ],
    ids=str,
)
def test_a_mistake_on_the_command_line_ends_with_status_2_and_one_line(tmp_path, words):
    result = command("--root", tmp_path / "city", *words)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and not result.stdout
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "city").exists()


def test_the_command_line_writes_a_city_once_and_says_so(tmp_path):
    words = ["--root", tmp_path / "city", "--size", "64", "--layout", "hunan", "--seed", "3"]
    for done in ("wrote", "already holds"):
        result = command(*words)
        assert result.returncode == 0 and not result.stderr
        assert f"{done} 4 tiles of 64 x 64 pixels" in result.stdout
        assert len(result.stdout.splitlines()) == 1
    assert not ensure_city(tmp_path / "city", 3, 64, "hunan")
