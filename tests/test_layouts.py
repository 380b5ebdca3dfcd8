"""The benchmarks as their owners and others lay them out, with every defect that has cost somebody
a week.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from data import image_bands, open_dataset, open_from_settings
from engine.settings import Settings
from geodata import synthetic
from geodata.crops import CropDataset, CropOrder, draw_crop
from geodata.layouts import HUNAN, ISPRS_CLASSES, POTSDAM, VAIHINGEN
from geodata.loading import fingerprint, load_tiles, memory_line
from geodata.rasters import read_raster
from geodata.scaling import Scaling
from geodata.slices import DataError, View
from geodata.tiles import Tile

PALETTE = np.array([color for _, color in ISPRS_CLASSES], np.uint8)
SHARED = Path(__file__).parents[2] / "shared" / "data"
LASTOOLS = "1_DSM_normalisation/dsm_potsdam_{}_normalized_lastools.jpg"


@pytest.fixture(scope="session")
def cities(tmp_path_factory):
    """A city in each layout, to be copied before it is changed."""
    root = tmp_path_factory.mktemp("cities")
    for layout in ("vaihingen", "potsdam", "hunan"):
        synthetic.write_city(root / layout, seed=1, size=64, layout=layout)
    return root


@pytest.fixture
def city(cities, tmp_path):
    """layout -> a copy to change."""

    def copy(layout):
        return Path(shutil.copytree(cities / layout, tmp_path / layout))

    return copy


def scene(layout, tile):
    """The tile as the city has it, its holes filled as a reader fills them."""
    whole = synthetic.make_scene(layout, tile, seed=1, size=(64, 64))
    whole.dsm[np.isnan(whole.dsm)] = np.nanmin(whole.dsm)
    return whole


def by_name(tiles):
    return {tile.name: tile for tile in tiles}


def rewrite(path, change, **options):
    """Changes the pixels of a TIFF."""
    array = change(read_raster(path))
    tifffile.imwrite(path, array, photometric="rgb" if array.ndim == 3 else "minisblack", **options)


# --------------------------------------------------------------------------------------- the tables


def test_the_splits_are_the_papers_and_the_official_ones():
    for layout, (train, test), (all_train, all_test) in (
        (VAIHINGEN, (12, 4), (16, 17)),
        (POTSDAM, (18, 6), (24, 14)),
    ):
        paper, official = layout.splits["paper"], layout.splits["official"]
        assert (len(set(paper["train"])), len(set(paper["test"]))) == (train, test)
        assert (len(set(official["train"])), len(set(official["test"]))) == (all_train, all_test)
        assert set(paper["train"]) | set(paper["test"]) == set(official["train"])
        assert not set(official["train"]) & set(official["test"]) and set(layout.validation) < set(
            paper["train"]
        )
    assert set(VAIHINGEN.splits["official"]["train"] + VAIHINGEN.splits["official"]["test"]) == (
        {str(n) for n in range(1, 39)} - {"9", "18", "19", "25", "36"}
    )
    assert len(set(HUNAN.splits["paper"]["test"])) == 50


def test_the_official_split_is_asked_for_by_name_and_named_beside_the_score(city):
    root = city("vaihingen")
    dataset = open_dataset("vaihingen", root, splits="official")
    assert [
        t.name for t in dataset.tiles("train")
    ] == "1 3 5 7 11 13 15 17 21 23 26 28 30 32 34 37".split()
    assert "official" in dataset.labels_note
    with pytest.raises(DataError, match="test split are missing.*area2.tif"):
        dataset.tiles("test")
    with pytest.raises(DataError, match="--splits mine: vaihingen has paper, official"):
        open_dataset("vaihingen", root, splits="mine")


# ---------------------------------------------------------------------------------------- Vaihingen


def test_full_labels_are_scored_when_asked_for_and_the_score_says_so(city):
    root = city("vaihingen")
    eroded, full = (open_dataset("vaihingen", root, full_labels=flag) for flag in (False, True))
    assert (eroded.tiles("test")[0].read_labels() == 255).any() and not (
        full.tiles("test")[0].read_labels() == 255
    ).any()
    assert "eroded" in eroded.labels_note and "full labels" in full.labels_note


def test_heights_that_lack_a_row_and_a_column_are_cut_to_and_said(city):
    root = city("vaihingen")
    whole = scene("vaihingen", 5)
    rewrite(root / "dsm/dsm_09cm_matching_area5.tif", lambda a: a[:-1, :-1])
    tile = by_name(open_dataset("vaihingen", root).tiles("test"))["5"]
    loaded = tile.load()
    seen = (whole.dsm > whole.dsm.min())[:-1, :-1]  # the rest is filled
    assert loaded.image.shape == (63, 63, 3) and seen.mean() > 0.5
    assert np.array_equal(loaded.dsm[seen], whole.dsm[:-1, :-1][seen])
    assert any("cut to the common 63 x 63" in note for note in tile.notes)


def test_tags_of_a_benchmark_s_files_move_nothing(city):
    root = city("vaihingen")
    for path, left in (
        (root / "top/top_mosaic_09cm_area5.tif", 0.0),
        (root / "dsm/dsm_09cm_matching_area5.tif", 7000.0),
    ):
        place = [
            (33550, "d", 3, (1.0, 1.0, 0.0), True),
            (33922, "d", 6, (0.0, 0.0, 0.0, left, 9.0, 0.0), True),
        ]
        rewrite(path, lambda a: a, extratags=place)
    tile = by_name(open_dataset("vaihingen", root).tiles("test"))["5"]
    assert np.array_equal(tile.read_dsm(), scene("vaihingen", 5).dsm)
    assert not any("cut" in note for note in tile.notes)


# ------------------------------------------------------------------------------------------ Potsdam


def test_potsdam_reads_its_official_layout(city):
    dataset = open_dataset("potsdam", city("potsdam"))
    assert dataset.classes == ISPRS_CLASSES and dataset.scored == (0, 1, 2, 3, 4)
    train, test = by_name(dataset.tiles("train")), by_name(dataset.tiles("test"))
    assert (
        tuple(train) == POTSDAM.splits["paper"]["train"]
        and tuple(test) == POTSDAM.splits["paper"]["test"]
    )
    whole, loaded = scene("potsdam", "2_10"), train["2_10"].load()
    assert np.array_equal(loaded.labels, whole.labels)
    assert np.array_equal(loaded.image[..., :2], whole.image[..., 1:])  # red and green lead
    assert (
        np.abs(loaded.dsm - (whole.dsm - whole.dsm.min()).clip(0, 25.5)).max() < 1.5
    )  # decimetres, JPEG
    assert (test["4_10"].load().labels == 255).any()


@pytest.mark.parametrize("rename", [lambda name: name, lambda name: name.replace("_0", "_")])
def test_height_files_are_found_padded_and_unpadded(city, rename):
    root = city("potsdam")
    for path in [*(root / "1_DSM_normalisation").iterdir(), *(root / "1_DSM").iterdir()]:
        path.rename(path.with_name(rename(path.name)))
    tiles = open_dataset("potsdam", root).tiles("train")
    assert len(tiles) == 18 and all(
        "1_DSM_normalisation" in str(tile.paths["dsm"]) for tile in tiles
    )
    assert {tile.height_unit for tile in tiles} == {0.1}


def test_absolute_heights_serve_where_normalised_ones_are_not_complete(city):
    root = city("potsdam")
    (root / LASTOOLS.format("07_08")).unlink()
    tiles = by_name(open_dataset("potsdam", root).tiles("train"))
    assert {tile.paths["dsm"].parent.name for tile in tiles.values()} == {"1_DSM"}
    assert np.array_equal(tiles["7_8"].read_dsm(), scene("potsdam", "7_8").dsm)


def test_one_kind_of_heights_serves_all_splits_and_is_kept_by_name(city):
    root = city("potsdam")
    normalised = open_dataset("potsdam", root)
    assert normalised.chosen_heights() == ("normalised", 0.1)
    (root / LASTOOLS.format("07_08")).unlink()  # a training tile's
    dataset = open_dataset("potsdam", root)
    assert dataset.chosen_heights() == ("absolute", 1.0)
    for split in ("train", "test"):
        tiles = dataset.tiles(split)
        assert {tile.paths["dsm"].parent.name for tile in tiles} == {"1_DSM"}
    kept = open_from_settings(Settings("potsdam", str(root), heights_kind="normalised"))
    assert {tile.height_unit for tile in kept.tiles("test")} == {0.1}
    with pytest.raises(DataError, match="1 files of the train split are missing.*07_08"):
        kept.tiles("train")
    with pytest.raises(DataError, match="no heights of the kind 'mine'"):
        open_dataset("potsdam", root, heights_kind="mine")


@pytest.mark.parametrize("dtype, metres", [(np.uint8, 4.2), (np.float32, 42.0), (np.uint16, 42.0)])
@pytest.mark.parametrize("kind", ["normalised", "absolute"])
def test_heights_to_predict_from_are_in_the_unit_of_their_own_kind(tmp_path, dtype, metres, kind):
    tifffile.imwrite(tmp_path / "d.tif", np.full((8, 8), 42, dtype))
    tile = Tile("a", {"dsm": tmp_path / "d.tif"}, ISPRS_CLASSES)
    tile.use_heights_of(POTSDAM, kind)
    assert np.allclose(tile.read_dsm(), metres if kind == "normalised" else 42)


def test_the_pixel_of_a_layout_gives_way_to_that_of_a_geotiff(tmp_path):
    tags = [(33550, "d", 3, (0.2, 0.2, 0.0), True), (33922, "d", 6, (0, 0, 0, 0, 9.0, 0), True)]
    tifffile.imwrite(tmp_path / "d.tif", np.ones((8, 8), np.float32), extratags=tags)
    tile = Tile("a", {"dsm": tmp_path / "d.tif"}, ISPRS_CLASSES, pixel=POTSDAM.pixel)
    assert tile.pixel_size() == 0.2
    tile.one_grid = True  # the benchmark's own
    assert tile.pixel_size() == POTSDAM.pixel


def test_bands_are_chosen_by_name_or_number_whatever_file_is_there(city):
    root = city("potsdam")
    raw = read_raster(root / "4_Ortho_RGBIR/top_potsdam_2_10_RGBIR.tif")
    orders = {
        "": (0, 1, 2),
        "rgb": (0, 1, 2),
        "irrg": (3, 0, 1),
        "rgbir": (0, 1, 2, 3),
        "4,3,2": (3, 2, 1),
    }
    for bands, order in orders.items():
        tile = by_name(open_dataset("potsdam", root, bands=bands).tiles("train"))["2_10"]
        assert np.array_equal(tile.read_image(), raw[..., list(order)])
    for name, order in (
        ("2_Ortho_RGB/{}_RGB.tif", (0, 1, 2)),
        ("3_Ortho_IRRG/{}_IRRG.tif", (3, 0, 1)),
    ):
        for tile_id in synthetic.POTSDAM_TILES:
            source = read_raster(root / f"4_Ortho_RGBIR/top_potsdam_{tile_id}_RGBIR.tif")
            path = root / name.format(f"top_potsdam_{tile_id}")
            path.parent.mkdir(exist_ok=True)
            tifffile.imwrite(path, source[..., list(order)], photometric="rgb")
    shutil.rmtree(root / "4_Ortho_RGBIR")
    for bands in ("rgb", "irrg"):
        tile = by_name(open_dataset("potsdam", root, bands=bands).tiles("train"))["2_10"]
        assert np.array_equal(tile.read_image(), raw[..., list(orders[bands])])


def test_normalised_heights_written_as_tiff_stay_in_their_files(city):
    root = city("potsdam")
    for path in (root / "1_DSM_normalisation").iterdir():
        tifffile.imwrite(path.with_suffix(".tif"), np.asarray(Image.open(path)))
        path.unlink()
    tiles = open_dataset("potsdam", root).tiles("train")
    (loaded, *_) = mapped = load_tiles(tiles, BOTH, 0)
    assert sum(t.nbytes() for t in mapped) == 0 and np.array_equal(
        loaded.dsm[0:64, 0:64], tiles[0].read_dsm()
    )


def test_four_bands_are_read_as_one_image_and_near_infrared_as_a_raster_of_its_own(city):
    names = ("image", "dsm", "nir")
    tile = open_dataset("potsdam", city("potsdam"), bands="rgbir").tiles("train", names)[0]
    loaded, box = tile.load(names), np.s_[:20, :20]
    assert loaded.image.shape[2] == 4 and loaded.input("image", box).shape == (4, 20, 20)
    assert np.allclose(loaded.input("nir", box)[0], loaded.input("image", box)[3])


def test_radar_and_infrared_of_hunan_are_rasters_of_their_own(city):
    names = ("image", "infrared", "s1")
    dataset = open_dataset("hunan", city("hunan"), scaling=Scaling(images="reflectance"))
    tile = dataset.tiles("test", names)[0].load(names)
    radar = tile.input("s1", np.s_[:20, :20])
    assert radar.shape == (2, 20, 20) and tile.input("infrared", np.s_[:9, :9]).shape == (3, 9, 9)
    assert np.allclose(
        radar, np.clip((tile.more["s1"][:20, :20] + 30) / 30, 0, 1).transpose(2, 0, 1)
    )


@pytest.mark.parametrize("bands", ["bgr", "0,1,2", "1,2,x"])
def test_bands_that_mean_nothing_are_refused(city, bands):
    with pytest.raises(DataError, match="--bands .*rgb, irrg.*counted from 1"):
        open_dataset("potsdam", city("potsdam"), bands=bands)


def test_a_file_for_prediction_gets_the_bands_that_fit_it():
    assert image_bands(POTSDAM, "irrg", 4) == (3, 0, 1) and image_bands(POTSDAM, "irrg", 3) == (
        0,
        1,
        2,
    )
    assert image_bands(HUNAN, "", 13) == (3, 2, 1) and image_bands(HUNAN, "", 3) == (0, 1, 2)
    assert image_bands(None, "", 5) == (0, 1, 2) and image_bands(None, "4,3,2", 5) == (3, 2, 1)


@pytest.mark.parametrize("full, eroded", [("5_Labels_all", "5_Labels_all_noBoundary"), (".", ".")])
def test_labels_lie_in_the_folders_of_either_archive_or_flat(city, full, eroded):
    root = city("potsdam")
    for old, new in (
        ("5_Labels_for_participants", full),
        ("5_Labels_for_participants_no_Boundary", eroded),
    ):
        (root / new).mkdir(exist_ok=True)
        for path in (root / old).iterdir():
            path.rename(root / new / path.name)
    dataset = open_dataset("potsdam", root)
    assert not (dataset.tiles("train")[0].read_labels() == 255).any()
    assert (dataset.tiles("test")[0].read_labels() == 255).any()


def test_off_palette_labels_are_repaired_and_what_fits_no_colour_is_counted(city):
    root = city("potsdam")
    path = root / "5_Labels_for_participants/top_potsdam_{}_label.tif"
    lossy = np.random.default_rng(0)

    def smear(rgb):  # 4_12: re-encoded with loss
        off = lossy.integers(1, 91, rgb.shape, np.uint8)
        off[0, 0] = 0
        return np.where(rgb > 127, rgb - off, rgb + off)

    def cars(rgb):  # 6_7: cars of another yellow; and three pixels of no colour at all
        rgb = np.where((rgb == PALETTE[4]).all(-1, keepdims=True), np.uint8([252, 255, 0]), rgb)
        rgb[0, :3] = (255, 0, 255)
        rgb[5, 5] = (252, 255, 0)
        return rgb

    rewrite(Path(str(path).format("4_12")), smear)
    rewrite(Path(str(path).format("6_7")), cars)
    tiles = by_name(open_dataset("potsdam", root).tiles("train"))
    assert np.array_equal(tiles["4_12"].read_labels(), scene("potsdam", "4_12").labels)
    wanted = scene("potsdam", "6_7").labels.copy()
    wanted[0, :3], wanted[5, 5] = 255, 4
    assert np.array_equal(tiles["6_7"].read_labels(), wanted)
    assert (
        tiles["6_7"].notes == ["tile 6_7: 3 label pixels fit no class, not scored"]
        and not tiles["4_12"].notes
    )

    published = open_dataset("potsdam", root, labels="published")
    tiles = by_name(published.tiles("train"))
    labels = tiles["4_12"].read_labels()
    assert not labels.ravel()[1:].any()  # "impervious" all over, as the paper trained on
    assert (tiles["6_7"].read_labels()[0, :3] == 0).all() and tiles["6_7"].read_labels()[5, 5] == 0
    assert "matched exactly" in published.labels_note and "class 0" in tiles["6_7"].notes[0]


def test_one_missing_tile_is_one_line_that_names_its_files(city):
    root = city("potsdam")
    missing = root / "4_Ortho_RGBIR/top_potsdam_7_8_RGBIR.tif"
    missing.unlink()
    with pytest.raises(DataError, match="1 files of the train split are missing") as caught:
        open_dataset("potsdam", root).tiles("train")
    assert str(missing) in str(caught.value) and "\n" not in str(caught.value)


def test_labels_of_another_size_are_one_line_that_names_both_files(city):
    root = city("potsdam")
    path = root / "5_Labels_for_participants/top_potsdam_7_8_label.tif"
    rewrite(path, lambda rgb: rgb[:-9])
    tile = by_name(open_dataset("potsdam", root).tiles("train"))["7_8"]
    with pytest.raises(
        DataError, match="more than two pixels.*RGBIR.tif 64 x 64.*label.tif 55 x 64"
    ) as caught:
        tile.load()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ MMHunan

CODES = {
    "dataset": [255, 0, 1, 2, 1, 3, 4, 6, 6, 5, 6, 255, 255],
    "published": [255, 0, 1, 2, 255, 3, 4, 255, 5, 6, 255, 255, 255],
}


def test_hunan_trains_on_train_and_val_and_scores_all_seven_classes(city):
    dataset = open_dataset("mmhunan", city("hunan"))
    assert [t.name for t in dataset.tiles("train")] == ["7", "101", "23"] and [
        t.name for t in dataset.tiles("test")
    ] == ["5"]
    assert [t.name for t in dataset.tiles("val")] == ["23"] and dataset.scored == tuple(range(7))
    held = dataset.hold_out()
    assert [t.name for t in held.tiles("train")] == ["7", "101"] and [
        t.name for t in held.tiles("val")
    ] == ["23"]


def test_hunan_patches_hold_red_green_blue_heights_and_classes(city):
    whole, scaling = scene("hunan", "test/5"), Scaling(images="reflectance")
    tile = open_dataset("hunan", city("hunan"), scaling=scaling).tiles("test")[0]
    # Red, green, blue: bands 3, 2, 1 of those that the generator writes; its blue is its green.
    assert np.array_equal(tile.read_image(), whole.image.astype(np.int16)[..., [1, 2, 2]] * 12)
    assert np.array_equal(tile.read_dsm(), whole.dsm)
    assert np.array_equal(tile.read_labels(), np.array([5, 6, 2, 1, 0, 4], np.uint8)[whole.labels])


@pytest.mark.parametrize("rule", ["dataset", "published"])
def test_raw_codes_become_classes_by_either_rule(city, rule):
    root = city("hunan")
    raw = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)  # every code 16 times
    tifffile.imwrite(root / "test/lc/lc_5.tif", raw)
    tile = open_dataset("hunan", root, labels=rule).tiles("test")[0]
    assert (
        tile.read_labels()[0, :13].tolist() == CODES[rule]
        and (tile.read_labels()[raw > 12] == 255).all()
    )
    assert f"{(255 - 13) * 16} label pixels fit no class" in tile.notes[0]  # 255 itself is known


@pytest.mark.parametrize("nested", ["Hunan_Dataset", "Hunan_Dataset/Hunan_Dataset"])
@pytest.mark.parametrize("prefix", [True, False])
def test_hunan_is_found_nested_and_without_prefixes(city, tmp_path, nested, prefix):
    source, root = city("hunan"), tmp_path / "copy"
    shutil.copytree(source, root / nested)
    if not prefix:
        for path in (root / nested).glob("*/lc/*.tif"):
            path.rename(path.with_name(path.name.removeprefix("lc_")))
    tiles = open_dataset("hunan", root).tiles("train")
    assert [tile.name for tile in tiles] == ["7", "101", "23"]
    assert np.array_equal(
        tiles[0].read_labels(), open_dataset("hunan", source).tiles("train")[0].read_labels()
    )


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_the_prepared_folders_are_read_with_minus_one_not_scored(tmp_path, dtype):
    labels = np.array([[0, 6], [-1, 3]], np.int8).view(dtype)
    for kind, ending, array in (
        ("images_png", "png", np.full((2, 2, 3), 9, np.uint8)),
        ("dsm_pngs", "png", labels.view(np.uint8)),
    ):
        for name in ("639", "7", "12"):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / kind / f"{name}.{ending}")
    (tmp_path / "masks_png").mkdir()
    for name in ("639", "7", "12"):
        tifffile.imwrite(tmp_path / f"masks_png/{name}.tif", labels)
    dataset = open_dataset(
        "hunan", tmp_path, scaling=Scaling(images="reflectance")
    )  # as `--data hunan` sets it
    assert [t.name for t in dataset.tiles("train")] == ["7", "12"] and [
        t.name for t in dataset.tiles("test")
    ] == ["639"]
    tile = dataset.tiles("test")[0]
    assert tile.read_labels().tolist() == [[0, 6], [255, 3]] and not tile.notes
    assert (tile.load().scale.image_input(tile.read_image()) == np.float32(9 / 255)).all()


def test_an_empty_folder_is_one_line_that_says_what_belongs_there(tmp_path):
    with pytest.raises(
        DataError, match="train/lc/lc_NUMBER.tif or val/lc/.*masks_png.*MMHunan"
    ) as caught:
        open_dataset("hunan", tmp_path).tiles("train")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder_of_the_training_split_is_not_passed_over(city):
    root = city("hunan")
    shutil.rmtree(root / "val")
    with pytest.raises(DataError, match="val/lc: no labels; the train split takes train, val"):
        open_dataset("hunan", root).tiles("train")


# ----------------------------------------------------------------------------------------- held out


def test_validation_tiles_are_taken_out_of_training_by_name_count_or_the_own_list(city):
    dataset = open_dataset("vaihingen", city("vaihingen"))
    whole = [tile.name for tile in dataset.tiles("train")]
    for names, wanted in ((("26", "3"), {"26", "3"}), (None, set(VAIHINGEN.validation)), (3, None)):
        held = dataset.hold_out(names)
        train, val = [t.name for t in held.tiles("train")], [t.name for t in held.tiles("val")]
        assert sorted(train + val) == sorted(whole) and len(val) == (
            len(wanted) if wanted else names
        )
        assert wanted is None or set(val) == wanted
        assert all(
            "noBoundary" in t.paths["labels"].name for t in held.tiles("val")
        )  # scored like the test tiles
        assert (
            not any("noBoundary" in t.paths["labels"].name for t in held.tiles("train"))
            and len(held.tiles("test")) == 4
        )
    assert dataset.hold_out(3) == dataset.hold_out(3)


@pytest.mark.parametrize("names", [("5",), ("nowhere",), 0, 12, 13, -1])
def test_what_cannot_be_held_out_is_refused_with_the_training_tiles(city, names):
    with pytest.raises(DataError, match="training tiles 1, 3, 23"):
        open_dataset("vaihingen", city("vaihingen")).hold_out(names)


# ---------------------------------------------------------------------- memory, workers, same crops

BOTH = ("image", "dsm")


def crops_of(loaded, workers, epochs=2, first=0, seed=3):
    order = CropOrder(epochs, 3, 4, first)
    dataset = CropDataset(loaded, 32, seed, BOTH)
    return [
        (*r, y)
        for r, y in torch.utils.data.DataLoader(dataset, batch_sampler=order, num_workers=workers)
    ]


def same_crops(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other) for a, b in zip(x, y)
    )


@pytest.mark.parametrize("heights", ["minmax", "percentiles", "ground"])
@pytest.mark.parametrize("normalised", [True, False])
def test_crops_are_the_same_from_memory_from_files_and_from_plain_arrays(city, normalised, heights):
    root = city("potsdam")
    if not normalised:
        shutil.rmtree(root / "1_DSM_normalisation")
        rewrite(
            root / "1_DSM/dsm_potsdam_07_08.tif",
            lambda a: np.where(np.arange(64) < 3, np.float32(-9999), a),
        )
    dataset = open_dataset("potsdam", root, bands="irrg", scaling=Scaling(heights))
    tiles = dataset.tiles("train")
    plain = [tile.load(BOTH) for tile in tiles]
    roomy, tight = load_tiles(tiles, BOTH, 1), load_tiles(tiles, BOTH, 18 * 64 * 64 * 1.5e-9)
    assert all(isinstance(t.image, np.ndarray) and isinstance(t.labels, np.ndarray) for t in roomy)
    assert all(isinstance(t.dsm, View if normalised else np.ndarray) for t in roomy)
    assert all(isinstance(t.image, View) for t in tight)
    assert any(isinstance(t.labels if normalised else t.dsm, View) for t in tight)
    assert sum(
        t.nbytes() for t in tight
    ) <= 18 * 64 * 64 * 1.5 and "read crop by crop" in memory_line(tight)
    assert sum(t.nbytes() for t in roomy) == 18 * 64 * 64 * (3 + 1 + (1 if normalised else 4))
    for one, *others in zip(plain, roomy, tight):
        assert all(np.array_equal(one.dsm, other.dsm[0:64, 0:64]) for other in others)
        assert all(np.array_equal(one.labels, other.labels[0:64, 0:64]) for other in others)
    assert fingerprint(plain) == fingerprint(roomy) == fingerprint(tight) != fingerprint(plain[1:])
    crops = crops_of(plain, 0)
    assert same_crops(crops, crops_of(roomy, 0)) and same_crops(crops, crops_of(tight, 0))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_and_a_resume_give_the_same_crops_and_another_epoch_others(city):
    loaded = load_tiles(
        open_dataset("potsdam", city("potsdam")).tiles("train"), BOTH, 18 * 64 * 64 * 2e-9
    )
    crops = crops_of(loaded, 0)
    assert all(same_crops(crops, crops_of(loaded, workers)) for workers in (1, 4))
    assert same_crops(crops[3:], crops_of(loaded, 1, first=3))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(crops[:3], crops[3:]))
    assert not same_crops(crops, crops_of(loaded, 0, seed=4))


def test_every_pixel_of_a_tile_can_be_drawn():
    seen = np.zeros((11, 9), int)
    for index in range(400):
        crop = draw_crop(0, 0, index, [seen.shape], 4)
        seen[crop.top : crop.top + 4, crop.left : crop.left + 4] += 1
    assert seen.min() > 0


def test_a_budget_below_the_compressed_files_is_one_line_that_names_one(city):
    tiles = open_dataset("potsdam", city("potsdam")).tiles("train")
    with pytest.raises(
        DataError, match="lastools.jpg: only TIFFs.*18 files.*--memory-gb"
    ) as caught:
        load_tiles(tiles, BOTH, 1e-6)
    assert "\n" not in str(caught.value)


def test_training_on_the_image_alone_keeps_no_heights_in_memory(city):
    loaded = load_tiles(open_dataset("potsdam", city("potsdam")).tiles("train"), ("image",), 1)
    assert all(tile.dsm is None and tile.nbytes() == 64 * 64 * 4 for tile in loaded)


def test_a_run_is_read_again_as_it_was_trained(city):
    root = city("potsdam")
    settings = Settings(
        data="potsdam",
        root=str(root),
        bands="irrg",
        labels="published",
        heights="0:20",
        image_scaling="sam",
    )
    dataset = open_from_settings(settings)
    assert (
        dataset.bands == "irrg"
        and dataset.labels == "published"
        and dataset.scaling == Scaling("0:20", "sam")
    )


# --------------------------------------------------------------------------------------- real files


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs shared/data")
def test_the_real_patches_of_hunan_are_read():
    dataset = open_dataset(
        "hunan", SHARED / "sentinel_hunan_layout", scaling=Scaling(images="reflectance")
    )
    assert [t.name for t in dataset.tiles("train")] == ["1", "2"]
    for split in ("train", "test"):
        for tile in dataset.tiles(split):
            loaded = tile.load()
            image = loaded.scale.image_input(loaded.image)
            assert (
                loaded.size == (224, 224) and 0 <= image.min() < image.max() <= 1 and not tile.notes
            )
