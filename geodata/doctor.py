"""Looks through a data set's folder before anybody trains: python data.py --data NAME --root DIR.

Prints what is there and what is missing, sizes, ranges, class shares, what was repaired, and what
looks wrong. Exit status 2 if training cannot run."""

from __future__ import annotations

import numpy as np

from geodata.labels import listed
from geodata.layouts import IGNORE, VAIHINGEN_TEST_PIXELS
from geodata.scaling import data_pixels
from geodata.slices import DataError
from geodata.tiles import MUCH, Tile

LISTED = 20  # missing files that are named
RARE = 0.01  # the share of the training pixels below which a class is often not learned
MOST = 0.8  # the share of class 0 from which it looks like a background
MARKERS = (-9999, -999, -99, 999, 9999)  # heights that often stand for no data


def check_dataset(dataset, modalities: tuple[str, ...]) -> bool:
    """Prints the findings of the training and the test split -> whether training can run."""
    ignored = dataset.ignore_index
    if dataset.layout is None and 0 <= ignored < len(dataset.classes):
        name = dataset.class_names[ignored]
        print(f"SUSPICIOUS: classes.json ignores {ignored}, the class {name}")
    held = dataset.layout is None and (dataset.root / "val").is_dir()
    splits = ("train", "val", "test") if held else ("train", "test")
    return all([check_split(dataset, split, modalities) for split in splits])


def check_split(dataset, split: str, modalities: tuple[str, ...]) -> bool:
    """Prints the findings of a split -> whether all its tiles can be used."""
    try:
        tiles, missing = dataset.find_tiles(split, modalities)
    except DataError as error:
        print(f"{split}: {error}")
        return False
    absent = set(missing)
    whole = [tile for tile in tiles if not absent & set(tile.paths.values())]
    gone = f", {len(missing)} files missing" if missing else ""
    print(f"{split}: {len(whole)} of {len(tiles)} tiles are complete{gone}")
    for path in missing[:LISTED]:
        print(f"  missing {path}")
    if len(missing) > LISTED:
        print(f"  and {len(missing) - LISTED} more")
    counts, good = np.zeros(256, np.int64), not missing and bool(tiles)
    for tile in whole:
        try:
            line, remarks, labels = check_tile(tile, modalities)
        except DataError as error:
            print(f"  {tile.name}: UNUSABLE, {error}")
            good = False
            continue
        print(f"  {tile.name}: {line}")
        for remark in [*tile.notes, *remarks]:
            print(f"    {remark}")
        counts += np.bincount(labels.ravel(), minlength=256)
    print_classes(dataset, split, counts)
    if good and not counts[: len(dataset.classes)].any():
        print(f"  UNUSABLE, no pixel of any {split} tile is scored")
        return False
    return good


def check_tile(tile: Tile, modalities: tuple[str, ...]) -> tuple[str, list[str], np.ndarray]:
    """(what there is, what looks wrong, labels) of a tile. Raises DataError for one that cannot be
    used."""
    line, remarks = [f"{tile.size[0]} x {tile.size[1]}"], []
    loaded = tile.load(modalities, held={"labels"})
    labels = loaded.labels
    if loaded.image is not None:
        more, looks_wrong = _look_at_image(tile, loaded.image)
        line.append(more)
        remarks += looks_wrong
    if loaded.dsm is not None:
        low, high = tile.height_limits
        line.append(f"heights {low:.2f} to {high:.2f} m")
        if low == high:
            remarks.append(f"SUSPICIOUS: all heights are {low:.2f} m")
        if (share := tile.missing_heights / labels.size) > MUCH:
            remarks.append(f"SUSPICIOUS: {100 * share:.1f} % of the pixels have no height")
        remarks += _markers("m high", loaded.dsm[:, :], low, high)
    for name, view in loaded.more.items():
        bands = view[:, :]
        low, high = float(np.nanmin(bands)), float(np.nanmax(bands))
        remarks += _markers(f"of {name}", bands, low, high)
        line.append(f"{name} {low:.4g} to {high:.4g} {tile.kinds[name].unit}".rstrip())
        if low == high:
            remarks.append(f"SUSPICIOUS: all of {name} is {low:g}")
        if (share := float(np.isnan(bands).all(axis=-1).mean())) > MUCH:
            remarks.append(f"SUSPICIOUS: {100 * share:.1f} % of {name} are no data")
    present, ignored = np.unique(labels[labels != IGNORE]), float((labels == IGNORE).mean())
    line.append(f"{len(present)} classes, {100 * ignored:.2f} % not scored")
    return ", ".join(line), remarks + _look_at_labels(tile, labels, present), labels


def _markers(what: str, values: np.ndarray, low: float, high: float) -> list[str]:
    return [
        f"SUSPICIOUS: {int((values == value).sum()):,} pixels are {value:g} {what}; if that stands "
        f"for no data, say so: gdal_edit.py -a_nodata {value:g} FILE"
        for value in {low, high} & set(MARKERS)
    ]


def _look_at_image(tile: Tile, image: np.ndarray) -> tuple[str, list[str]]:
    pixels, remarks = data_pixels(image, tile.raster("image").valid), []
    ends = [(p.min(), p.max(), (p == 0).all(axis=1).sum()) for p in pixels]
    low, high = min((e[0] for e in ends), default=0), max((e[1] for e in ends), default=0)
    dark = sum(e[2] for e in ends) / (image.shape[0] * image.shape[1])
    if high == low:
        remarks.append(f"SUSPICIOUS: all pixels of the image are {low:g}")
    elif dark > MUCH:
        remarks.append(f"SUSPICIOUS: {100 * dark:.1f} % of the image are black")
    if image.dtype == np.uint16 and high < 4096 and tile.scaling.images in ("unit", "sam"):
        remarks.append(
            f"SUSPICIOUS: 16-bit pixels that end at {high}; --image-scaling 0:{high} would use the "
            f"whole range"
        )
    return f"image {image.dtype} {low:g} to {high:g}", remarks


def _look_at_labels(tile: Tile, labels: np.ndarray, present: np.ndarray) -> list[str]:
    remarks, raster, K = [], tile.raster("labels"), len(tile.classes)
    if len(present) < 2:
        names = [tile.classes[k][0] for k in present]
        holds = f"{names[0]} alone" if names else "no scored pixel"
        remarks.append(f"SUSPICIOUS: the labels hold {holds}")
    if tile.unknown_labels:
        unknown, share = tile.unknown_values(), tile.unknown_labels / labels.size
        word = "SUSPICIOUS: " if share > MUCH else ""
        named = f"{100 * share:.1f} % of the label pixels fit no class: {listed(unknown)}"
        remarks.append(word + named)
        if set(unknown) == {K} and tile.codes is None:
            remarks.append(
                f"SUSPICIOUS: labels up to {K}, and the classes are 0 to {K - 1}; if they are "
                f"counted from 1, subtract it: gdal_calc.py -A IN --calc A-1 --outfile OUT.tif"
            )
    if raster.bands >= 3:
        raw, exact = raster[:, :][..., :3], False
        for color in tile.legend.palette:
            exact |= (raw == color).all(axis=-1)
        if (share := exact.mean()) < 0.5:
            remarks.append(
                f"SUSPICIOUS: {100 * share:.1f} % of the label pixels have the exact colour of a "
                f"class; are these labels, or a photo?"
            )
    elif tile.codes is None and (share := float((labels == 0).mean())) > MOST:
        remarks.append(
            f"SUSPICIOUS: {100 * share:.1f} % of the labels are 0, {tile.classes[0][0]}; if that "
            f"is the background of gdal_rasterize, burn it with -init {IGNORE}"
        )
    return remarks


def print_classes(dataset, split: str, counts: np.ndarray) -> None:
    """The pixels of each class, beside the paper's where they are known."""
    counts = counts[: len(dataset.classes)].tolist()
    known = dataset.name == "vaihingen" and split == "test" and dataset.splits == "paper"
    known = known and not dataset.full_labels
    beside = "  of the paper's test tiles" if known else ""
    print(f"  {'class':<16} {'pixels':>13} {'share':>8}{beside}")
    names, total = [*dataset.class_names, "all"], sum(counts)
    for i, (name, count) in enumerate(zip(names, [*counts, total])):
        if known:
            wanted = [*VAIHINGEN_TEST_PIXELS, sum(VAIHINGEN_TEST_PIXELS)][i]
            beside = f"{wanted:>13,}  {'the same' if wanted == count else 'DIFFERENT'}"
        print(f"  {name:<16} {count:>13,} {100 * count / max(total, 1):>6.2f} %{beside}")
    rare = [name for name, count in zip(names, counts) if 0 < count < RARE * total]
    if rare and split == "train":
        below = f"{', '.join(rare)}: below {RARE:.0%} of the pixels, and often not learned"
        print(f"  RARE: {below}; train with --class-weights balanced --balance-crops")
