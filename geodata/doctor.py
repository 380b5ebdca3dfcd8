"""Looks through a data set's folder before anybody trains: python data.py --data NAME --root DIR.

Prints what is there and what is missing, sizes, ranges, class shares, what was repaired, and what
looks wrong. Exit status 2 if training cannot run."""

from __future__ import annotations

import numpy as np

from geodata.layouts import IGNORE, VAIHINGEN_TEST_PIXELS
from geodata.rasters import DataError
from geodata.tiles import Tile

LISTED = 20  # missing files that are named


MUCH = 0.05  # the share of pixels without height, or without class, from which a tile looks wrong


def check_dataset(dataset, modalities: tuple[str, ...]) -> bool:
    """Prints the findings of the training and the test split -> whether training can run."""
    return all([check_split(dataset, split, modalities) for split in ("train", "test")])


def check_split(dataset, split: str, modalities: tuple[str, ...]) -> bool:
    """Prints the findings of a split -> whether all its tiles can be used."""
    try:
        tiles, missing = dataset.find_tiles(split, modalities)
    except DataError as error:
        print(f"{split}: {error}")
        return False
    absent = set(missing)
    whole = [tile for tile in tiles if not absent & set(tile.paths.values())]
    print(
        f"{split}: {len(whole)} of {len(tiles)} tiles are complete"
        + (f", {len(missing)} files missing" if missing else "")
    )
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
    return good


def check_tile(tile: Tile, modalities: tuple[str, ...]) -> tuple[str, list[str], np.ndarray]:
    """(what there is, what looks wrong, labels) of a tile. Raises DataError for one that cannot be
    used.
    """
    line, remarks = [f"{tile.size[0]} x {tile.size[1]}"], []
    if "dsm" in modalities and "dsm" not in tile.paths:
        raise DataError(
            f"tile {tile.name} has no heights; add them, or check with --modalities image"
        )
    if "image" in modalities:
        image = tile.read_image()
        low, high = image.min(), image.max()
        line.append(f"image {image.dtype} {low:g} to {high:g}")
        if high == low:
            remarks.append(f"SUSPICIOUS: all pixels of the image are {low:g}")
        elif (dark := float((image == 0).all(axis=-1).mean())) > MUCH:
            remarks.append(f"SUSPICIOUS: {100 * dark:.1f} % of the image are black")
        if image.dtype == np.uint16 and high < 4096 and tile.scaling.images in ("unit", "sam"):
            remarks.append(
                f"SUSPICIOUS: 16-bit pixels that end at {high}; --image-scaling 0:{high} would use the whole range"
            )
        del image
    if "dsm" in modalities:
        dsm = tile.read_dsm()
        line.append(f"heights {dsm.min():.2f} to {dsm.max():.2f} m")
        if dsm.min() == dsm.max():
            remarks.append(f"SUSPICIOUS: all heights are {dsm.min():.2f} m")
        if (share := tile.missing_heights / dsm.size) > MUCH:
            remarks.append(f"SUSPICIOUS: {100 * share:.1f} % of the pixels have no height")
    labels = tile.read_labels()
    present = np.unique(labels[labels != IGNORE])
    line.append(
        f"{len(present)} classes, {100 * float((labels == IGNORE).mean()):.2f} % not scored"
    )
    if len(present) < 2:
        names = [tile.classes[k][0] for k in present]
        remarks.append(
            f"SUSPICIOUS: the labels hold {f'{names[0]} alone' if names else 'no scored pixel'}"
        )
    if (share := tile.unknown_labels / labels.size) > MUCH:
        remarks.append(f"SUSPICIOUS: {100 * share:.1f} % of the label pixels fit no class")
    return ", ".join(line), remarks, labels


def print_classes(dataset, split: str, counts: np.ndarray) -> None:
    """The pixels of each class, beside the paper's where they are known."""
    counts = counts[: len(dataset.classes)]
    total = int(counts.sum())
    known = (
        dataset.name == "vaihingen"
        and split == "test"
        and dataset.splits == "paper"
        and not dataset.full_labels
    )
    print(
        f"  {'class':<16} {'pixels':>13} {'share':>8}"
        + ("  of the paper's test tiles" if known else "")
    )
    names, constants = (
        [*dataset.class_names, "all"],
        [*VAIHINGEN_TEST_PIXELS, sum(VAIHINGEN_TEST_PIXELS)],
    )
    for i, (name, count) in enumerate(zip(names, [*counts.tolist(), total])):
        share = 100 * count / total if total else 0
        beside = (
            f"{constants[i]:>13,}  {'the same' if constants[i] == count else 'DIFFERENT'}"
            if known
            else ""
        )
        print(f"  {name:<16} {count:>13,} {share:>6.2f} %{beside}")
