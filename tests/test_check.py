"""python data.py --data NAME --root DIR: what is there, what is missing, what looks wrong."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import write_city
from PIL import Image
from test_rasters import geo_tags

from data import open_dataset
from geodata import synthetic
from geodata.layouts import VAIHINGEN_TEST_PIXELS
from geodata.loading import load_tiles
from geodata.rasters import DataError
from geodata.tiles import Tile

HOME = Path(__file__).parents[1]
SHARED = HOME.parent / "shared" / "data"


@pytest.fixture
def check(monkeypatch, capsys):
    """(exit status, stdout, stderr) of data.py."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(HOME / "data.py"), run_name="__main__")
        return end.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    root = tmp_path_factory.mktemp("city")
    write_city(root, size=64)
    return root


def write_tiles(root, splits=("train", "test"), **changes):
    """Own tiles of 20 x 20 with one defect, if any."""
    rng = np.random.default_rng(0)
    root.mkdir(exist_ok=True)
    listed = [{"name": "ground", "color": [90, 90, 90]}, {"name": "house", "color": [200, 0, 0]}]
    (root / "classes.json").write_text(json.dumps({"classes": listed}))
    for split in splits:
        labels = rng.integers(0, 2, (20, 20)).astype(np.uint8)
        rasters = {
            "images": rng.integers(1, 255, (20, 20, 3)).astype(np.uint8),
            "dsm": rng.uniform(200, 210, (20, 20)).astype(np.float32),
            "labels": labels,
        } | changes
        for kind, array in rasters.items():
            (root / split / kind).mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(
                root / split / kind / "a.tif",
                array,
                photometric="rgb" if array.ndim == 3 else "minisblack",
            )
    return root


def test_a_sound_folder_can_be_trained_on(check, tmp_path):
    status, out, err = check("--data", "tiles", "--root", write_tiles(tmp_path))
    assert (
        status == 0
        and not err
        and out.endswith(f"can run; next: python train.py --data=tiles --root={tmp_path}\n")
        and "SUSPICIOUS" not in out
    )
    assert (
        "train: 1 of 1 tiles are complete" in out
        and "20 x 20, image uint8" in out
        and "house" in out
    )


def holes():
    dsm = np.full((20, 20), 200, np.float32)
    dsm[:, 10:] = 210
    dsm[:4] = -9999
    return dsm


strange = np.zeros((20, 20, 3), np.uint8)
strange[:3] = (255, 0, 255)
strange[3:] = (90, 90, 90)
strange[9:] = (200, 0, 0)
SUSPICIONS = {
    "one class": (dict(labels=np.ones((20, 20), np.uint8)), "the labels hold house alone"),
    "flat": (dict(dsm=np.full((20, 20), 7, np.float32)), "all heights are 7.00 m"),
    "black": (dict(images=np.zeros((20, 20, 3), np.uint8)), "all pixels of the image are 0"),
    "half black": (
        dict(
            images=np.repeat(np.arange(20, dtype=np.uint8)[:, None, None] // 10, 20, 1).repeat(3, 2)
        ),
        "50.0 % of the image are black",
    ),
    "no-data": (dict(dsm=holes()), "20.0 % of the pixels have no height"),
    "colours": (dict(labels=strange), "15.0 % of the label pixels fit no class"),
    "dark 16 bit": (
        dict(images=np.random.default_rng(0).integers(0, 255, (20, 20, 3)).astype(np.uint16)),
        "16-bit pixels that end at",
    ),
}


@pytest.mark.parametrize("case", SUSPICIONS)
def test_a_suspicious_tile_is_pointed_at(check, tmp_path, case):
    changes, remark = SUSPICIONS[case]
    status, out, _ = check("--data", "tiles", "--root", write_tiles(tmp_path, **changes))
    assert status == 0 and f"SUSPICIOUS: {remark}" in out


UNUSABLE = {
    "another size": (dict(labels=np.ones((17, 20), np.uint8)), "more than two pixels"),
    "one band": (dict(images=np.zeros((20, 20), np.uint8)), "three or more bands"),
    "all no-data": (dict(dsm=np.full((20, 20), -9999, np.float32)), "no valid height"),
    "no class": (
        dict(labels=np.full((20, 20), 255, np.uint8)),
        "no pixel of any train tile is scored",
    ),
    "no class fits": (dict(labels=np.full((20, 20), 77, np.uint8)), "no pixel has the colour"),
    "float image": (dict(images=np.full((20, 20, 3), 700, np.float32)), "--image-scaling"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_tile_that_cannot_be_used_is_named_and_the_status_is_2(check, tmp_path, case):
    changes, message = UNUSABLE[case]
    status, out, err = check("--data", "tiles", "--root", write_tiles(tmp_path, **changes))
    assert status == 2 and "UNUSABLE" in out and message in out
    assert err.count("\n") == 1 and "training cannot run" in err


def test_missing_files_are_listed_and_the_rest_is_looked_at(check, city, tmp_path):
    tmp_path = Path(shutil.copytree(city, tmp_path / "copy"))
    gone = [
        tmp_path / "top/top_mosaic_09cm_area5.tif",
        tmp_path / "dsm/dsm_09cm_matching_area15.tif",
    ]
    for path in gone:
        path.unlink()
    status, out, err = check("--data", "vaihingen", "--root", tmp_path)
    assert (
        status == 2
        and "training cannot run" in err
        and all(f"missing {path}" in out for path in gone)
    )
    assert (
        "train: 12 of 12 tiles are complete" in out
        and "test: 2 of 4 tiles are complete, 2 files missing" in out
    )


def test_the_paper_s_pixel_counts_stand_beside_those_of_vaihingen_s_test_tiles(check, city):
    _, out, _ = check("--data", "vaihingen", "--root", city)
    assert sum(VAIHINGEN_TEST_PIXELS) == 17_677_675 and "17,677,675" in out and "4,804,365" in out
    test = out[out.index("test: ") :]
    paths = [synthetic.tile_paths(city, area)["eroded"] for area in synthetic.TEST_AREAS]
    scored = sum(int((tifffile.imread(path) != 0).any(-1).sum()) for path in paths)
    (line,) = [line for line in test.splitlines() if line.split()[0] == "all"]
    assert f" {scored:,} " in line and "DIFFERENT" in line
    _, out, _ = check("--data", "vaihingen", "--root", city, "--full-labels")
    assert "17,677,675" not in out  # other labels, other counts


def test_a_truncated_file_is_named(check, tmp_path):
    write_tiles(tmp_path)
    path = tmp_path / "train/images/a.tif"
    path.write_bytes(path.read_bytes()[:900])
    status, out, _ = check("--data", "tiles", "--root", tmp_path)
    assert status == 2 and f"UNUSABLE, {path}: truncated" in out


def test_lzw_is_read_without_imagecodecs_and_its_damage_is_named(check, tmp_path):
    write_tiles(tmp_path)
    path = tmp_path / "train/images/a.tif"
    Image.fromarray(tifffile.imread(path)).save(path, compression="tiff_lzw")
    assert check("--data", "tiles", "--root", tmp_path)[0] == 0
    path.write_bytes(path.read_bytes()[:400])
    status, out, _ = check("--data", "tiles", "--root", tmp_path)
    assert status == 2 and f"UNUSABLE, {path}" in out


def test_tiles_without_heights_are_looked_at_as_images(check, tmp_path):
    write_tiles(tmp_path)
    for path in tmp_path.glob("*/dsm/a.tif"):
        path.unlink()
    assert check("--data", "tiles", "--root", tmp_path)[0] == 2
    assert check("--data", "tiles", "--root", tmp_path, "--modalities", "image")[0] == 0


def test_every_raster_that_is_asked_for_is_looked_at(check, tmp_path):
    write_tiles(tmp_path)
    content = json.loads((tmp_path / "classes.json").read_text())
    (tmp_path / "classes.json").write_text(
        json.dumps(content | {"rasters": {"sar": {"unit": "dB"}}})
    )
    for split in ("train", "test"):
        (tmp_path / split / "sar").mkdir()
        for i, image in enumerate((tmp_path / split / "images").iterdir()):
            levels = np.full((20, 20), -7, np.float32)
            tifffile.imwrite(tmp_path / split / "sar" / f"{image.stem}.tif", levels)
    status, out, _ = check("--data", "tiles", "--root", tmp_path, "--modalities", "sar+image")
    assert status == 0 and "sar -7 to -7 dB" in out and "all of sar is -7" in out
    status, _, err = check("--data", "tiles", "--root", tmp_path, "--modalities", "image+nir")
    assert status == 2


def test_a_class_below_one_percent_of_the_training_pixels_is_named_with_what_helps(check, tmp_path):
    labels = np.zeros((20, 20), np.uint8)
    labels[0, :4] = 1
    write_tiles(tmp_path, labels=labels)
    assert "RARE" not in check("--data", "tiles", "--root", tmp_path)[1]  # one in a hundred
    labels[0, 3] = 0
    write_tiles(tmp_path, labels=labels)
    status, out, _ = check("--data", "tiles", "--root", tmp_path, "--modalities", "image")
    assert status == 0 and out.count("RARE: house") == 1  # the test tiles are not trained on
    assert "--class-weights balanced --balance-crops" in out
    assert out.endswith(f"python train.py --data=tiles --root={tmp_path} --modalities=image\n")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs shared/data")
@pytest.mark.parametrize(
    "name, folder", [("tiles", "ign_tile"), ("hunan", "sentinel_hunan_layout")]
)
def test_the_real_folders_are_sound(check, name, folder):
    status, out, _ = check("--data", name, "--root", SHARED / folder)
    assert status == 0 and "SUSPICIOUS" not in out and "UNUSABLE" not in out


# -------------------------------------------------------------------------- what it finds in labels


def of_labels(labels):
    return dict(labels=np.asarray(labels, np.uint8))


rng = np.random.default_rng(0)
FINDINGS = {
    "labels counted from 1": (
        of_labels(rng.integers(1, 3, (20, 20))),
        "labels up to 2, and the classes are 0 to 1",
    ),
    "unknown values": (
        of_labels(np.where(np.tri(20, k=-14), 7, rng.integers(0, 2, (20, 20)))),
        "fit no class: 7 (21 pixels)",
    ),
    "a photo": (of_labels(rng.integers(0, 255, (20, 20, 3))), "are these labels, or a photo?"),
    "a background": (
        of_labels(np.diag([1] * 20)),
        "95.0 % of the labels are 0, ground; if that is the background of gdal_rasterize",
    ),
    "-999": (
        dict(dsm=np.where(np.eye(20), -999, 200 + rng.uniform(0, 9, (20, 20))).astype(np.float32)),
        "20 pixels are -999 m high",
    ),
    "9999": (
        dict(dsm=np.where(np.eye(20), 9999, 200 + rng.uniform(0, 9, (20, 20))).astype(np.float32)),
        "20 pixels are 9999 m high",
    ),
}


@pytest.mark.parametrize("case", FINDINGS)
def test_what_looks_wrong_in_labels_and_heights_is_named_with_its_numbers(check, tmp_path, case):
    changes, remark = FINDINGS[case]
    status, out, _ = check("--data", "tiles", "--root", write_tiles(tmp_path, **changes))
    assert status == 0 and remark in out and "SUSPICIOUS" in out


def test_labels_of_two_unknown_values_are_not_taken_for_labels_counted_from_1(check, tmp_path):
    labels = rng.integers(0, 2, (20, 20)).astype(np.uint8)
    labels[0, :2] = 2, 7
    out = check("--data", "tiles", "--root", write_tiles(tmp_path, labels=labels))[1]
    assert "fit no class" in out and "counted from 1" not in out


def test_heights_of_three_bands_are_unusable(check, tmp_path):
    changes = dict(dsm=rng.integers(0, 255, (20, 20, 3)).astype(np.uint8))
    status, out, _ = check("--data", "tiles", "--root", write_tiles(tmp_path, **changes))
    assert status == 2 and "UNUSABLE" in out and "heights are one band" in out


def test_labels_elsewhere_are_unusable(check, tmp_path):
    root = write_tiles(tmp_path)
    for kind, left in (("images", 0), ("labels", 2000)):
        array = tifffile.imread(root / "train" / kind / "a.tif")
        rgb = {"photometric": "rgb" if array.ndim == 3 else "minisblack"}
        tifffile.imwrite(
            root / "train" / kind / "a.tif", array, extratags=geo_tags(left, 100), **rgb
        )
    status, out, _ = check("--data", "tiles", "--root", root)
    assert status == 2 and "labels/a.tif: does not overlap the image" in out


def test_a_broken_test_tile_is_named_by_the_doctor_and_before_any_training(check, tmp_path):
    root = write_tiles(tmp_path)
    path = root / "test/dsm/a.tif"
    path.write_bytes(path.read_bytes()[:900])
    status, out, _ = check("--data", "tiles", "--root", root)
    assert status == 2 and f"UNUSABLE, {path}: truncated" in out
    with pytest.raises(DataError, match="test/dsm/a.tif: truncated"):
        open_dataset("tiles", root).check(("image", "dsm"))
    open_dataset("tiles", root).check(("image",))


def test_the_folder_that_an_epoch_is_chosen_by_is_looked_into_before_training(check, tmp_path):
    dataset = open_dataset("tiles", write_tiles(tmp_path)).hold_out(("val",))
    with pytest.raises(DataError, match="val/images: no images"):
        dataset.check(("image", "dsm"))
    write_tiles(tmp_path, ("val",), labels=np.full((20, 20), 77, np.uint8))
    with pytest.raises(DataError, match="val/labels/a.tif"):
        dataset.check(("image", "dsm"))
    status, out, _ = check("--data", "tiles", "--root", tmp_path)
    assert status == 2 and f"UNUSABLE, {tmp_path}/val/labels/a.tif" in out


def test_the_doctor_ends_with_what_prepare_found_and_refuses_a_raster_without_data(check, tmp_path):
    root = write_tiles(tmp_path, sar=np.full((20, 20), -9999, np.float32))
    content = json.loads((root / "classes.json").read_text())
    more = {"train": ["--heights=-1:9"], "rasters": {"sar": {}, "dsm": {"kind": "height"}}}
    (root / "classes.json").write_text(json.dumps(content | more))
    words = ["--data", "tiles", "--root", root, "--modalities", "image+sar"]
    status, out, _ = check(*words)
    assert status == 0 and "next: python train.py --heights=-1:9 --data=tiles" in out
    assert "400 pixels are -9999 of sar; if that stands for no data" in out
    told = {"train": ["--heights=-1:9", "--modalities", "image+sar", "--crop", "64"]}
    (root / "classes.json").write_text(json.dumps(content | more | told))
    status, out, _ = check(*words[:-2])  # looks at what prepare.py prepared
    assert status == 0 and "of sar;" in out and "m high" not in out
    assert f"next: python train.py {' '.join(told['train'])} --data=tiles --root={root}" in out
    more["rasters"]["sar"]["nodata"] = -9999
    (root / "classes.json").write_text(json.dumps(content | more))
    status, out, err = check(*words)
    assert status == 2 and "sar/a.tif: holds no pixel with data" in out and "Warning" not in err
    more["rasters"]["dsm"] = {"scaling": "0:9"}
    (root / "classes.json").write_text(json.dumps(content | more))
    status, _, err = check(*words)
    assert status == 2 and "the raster dsm" in err and "--heights" in err


BROKEN = {
    "labels": np.full((20, 20), 77, np.uint8),
    "dsm": np.full((20, 20), np.nan, np.float32),
    "images": np.zeros((20, 20), np.uint8),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_in_a_test_tile_is_found_before_training(tmp_path, kind):
    write_tiles(tmp_path)
    open_dataset("tiles", tmp_path).check(("image", "dsm"))
    tifffile.imwrite(tmp_path / "test" / kind / "a.tif", BROKEN[kind], photometric="minisblack")
    with pytest.raises(DataError, match=f"test/{kind}/a.tif"):
        open_dataset("tiles", tmp_path).check(("image", "dsm"))


def test_a_turned_tile_that_the_doctor_passes_is_one_that_training_takes(check, tmp_path):
    root = write_tiles(tmp_path)
    matrix = (0.5, 0.1, 0.0, 10.0, 0.1, -0.5, 0.0, 20.0, *[0.0] * 7, 1.0)
    for path in root.glob("*/images/a.tif"):
        tags = [(34264, "d", 16, matrix, True)]
        tifffile.imwrite(path, tifffile.imread(path), photometric="rgb", extratags=tags)
    assert check("--data", "tiles", "--root", root, "--modalities", "image")[0] == 0
    tiles = open_dataset("tiles", root).tiles("train", ("image",))
    assert load_tiles(tiles, ("image",), 1)[0].size == (20, 20)


def test_training_on_labels_that_are_all_ignored_is_refused(tmp_path):
    write_tiles(tmp_path, labels=np.full((20, 20), 255, np.uint8))
    tiles = open_dataset("tiles", tmp_path).tiles("train")
    with pytest.raises(DataError, match="no pixel of any training tile is scored"):
        load_tiles(tiles, ("image", "dsm"), 1)


# ---------------------------------------------------------------------------------------- own tiles


def test_files_that_are_no_tiles_are_passed_over_and_two_of_one_name_are_refused(tmp_path):
    root = write_tiles(tmp_path)
    (root / "train/images/._a.tif").write_bytes(b"of macOS")
    (root / "train/images/.hidden.png").write_bytes(b"")
    assert [tile.name for tile in open_dataset("tiles", root).tiles("train")] == ["a"]
    Image.new("RGB", (20, 20)).save(root / "train/images/a.png")
    with pytest.raises(DataError, match="a.tif: is the same tile as a.png; delete one"):
        open_dataset("tiles", root).tiles("train")


@pytest.mark.parametrize("ending", ["jp2", "img", "vrt", "asc"])
def test_another_format_is_refused_with_the_command_that_converts_it(tmp_path, ending):
    root = write_tiles(tmp_path)
    (root / "train/images/a.tif").rename(root / f"train/images/a.{ending}")
    (root / f"train/images/a.{ending}").write_bytes(b"ncols 20\nnrows 20\n")
    with pytest.raises(
        DataError, match=f"a.{ending}: no TIFF, PNG or JPEG; convert it: gdal_translate"
    ):
        open_dataset("tiles", root).tiles("train")[0].load()


def test_a_byte_order_mark_before_the_classes_does_no_harm(tmp_path):
    root = write_tiles(tmp_path)
    text = (root / "classes.json").read_text()
    (root / "classes.json").write_text("\ufeff" + text, encoding="utf-8")
    assert open_dataset("tiles", root).class_names == ["ground", "house"]


def test_two_classes_of_one_name_are_refused(tmp_path):
    root = write_tiles(tmp_path)
    (root / "classes.json").write_text(
        (root / "classes.json").read_text().replace("house", "ground")
    )
    with pytest.raises(DataError, match="classes.json: two classes have the same name"):
        open_dataset("tiles", root)


def test_ignoring_a_class_is_remarked_on(check, tmp_path):
    root = write_tiles(tmp_path)
    listed = json.loads((root / "classes.json").read_text())
    (root / "classes.json").write_text(json.dumps({**listed, "ignore": 1}))
    out = check("--data", "tiles", "--root", root)[1]
    assert "SUSPICIOUS: classes.json ignores 1, the class house" in out


# ------------------------------------------------------------------------------------ colour tables


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_labels_with_a_colour_table_of_the_classes_are_read_by_colour(tmp_path, ending):
    classes = (("ground", (90, 90, 90)), ("house", (200, 0, 0)), ("tree", (0, 200, 0)))
    wanted = rng.integers(0, 3, (20, 20)).astype(np.uint8)
    order = np.array([2, 0, 1], np.uint8)  # index in the file -> class
    raw = np.argsort(order).astype(np.uint8)[wanted]
    table = np.zeros((256, 3), np.uint8)
    table[:3] = [classes[k][1] for k in order]
    path = tmp_path / f"l.{ending}"
    if ending == "png":
        picture = Image.fromarray(raw)
        picture.putpalette(table.tobytes())
        picture.save(path)
    else:
        colormap = table.T.astype(np.uint16) * 257
        tifffile.imwrite(path, raw, photometric="palette", colormap=colormap)
    assert np.array_equal(Tile("a", {"labels": path}, classes).read_labels(), wanted)


def test_a_colour_table_that_speaks_of_few_pixels_leaves_the_numbers_as_they_are(tmp_path):
    wanted = rng.integers(0, 2, (20, 20)).astype(np.uint8)
    wanted[0, :3] = 2
    table = np.arange(768, dtype=np.uint8).reshape(256, 3)
    table[2] = (90, 90, 90)
    picture = Image.fromarray(wanted)
    picture.putpalette(table.tobytes())
    picture.save(tmp_path / "l.png")
    classes = (("ground", (90, 90, 90)), ("house", (200, 0, 0)))
    tile = Tile("a", {"labels": tmp_path / "l.png"}, classes)
    assert np.array_equal(tile.read_labels(), np.where(wanted == 2, 255, wanted))
