"""Tiles as a network is trained on them, in memory as far as it goes.

Shapes: `H, W` pixels of a tile."""

from __future__ import annotations

import zlib

import numpy as np

from geodata.layouts import IGNORE
from geodata.slices import DataError, View, row_strips
from geodata.tiles import LoadedTile, Tile


def load_tiles(
    tiles: list[Tile], modalities: tuple[str, ...], memory_gb: float
) -> list[LoadedTile]:
    """Training tiles in at most `memory_gb` (10^9 bytes); what does not fit stays in its files,
    labels last. Raises DataError when the files that cannot be read crop by crop are larger than
    that, and when no pixel of any tile is scored."""
    kinds = ("labels", *reversed(modalities))  # the smallest, and the dearest to decode, first
    budget, held, fixed = memory_gb * 1e9, [set() for _ in tiles], []
    for kind in kinds:
        for tile, chosen in zip(tiles, held):
            if kind in tile.paths and not tile.stays_in_file(kind):
                chosen.add(kind)
                fixed.append((tile.memory(kind), str(tile.paths[kind])))
    used = sum(size for size, _ in fixed)
    if used > budget:
        raise DataError(
            f"{max(fixed)[1]}: only TIFFs that are uncompressed or in small tiles or strips can "
            f"be read crop by crop, and "
            f"the {len(fixed)} files that are none take {used / 1e9:.3g} GB, more than "
            f"--memory-gb {memory_gb:g}; "
            f"raise it, or rewrite them: gdal_translate -co TILED=YES IN OUT.tif"
        )
    for kind in kinds:
        for tile, chosen in zip(tiles, held):
            if kind in tile.paths and kind not in chosen and used + tile.memory(kind) <= budget:
                chosen.add(kind)
                used += tile.memory(kind)
    loaded = [tile.load(modalities, chosen) for tile, chosen in zip(tiles, held)]
    scored = any((strip != IGNORE).any() for tile in loaded for strip in row_strips(tile.labels))
    if tiles and not scored:
        raise DataError(
            f"{tiles[0].paths['labels']}: no pixel of any training tile is scored; all labels are "
            f"the value that is ignored"
        )
    return loaded


def share_of(tiles: list[Tile], share: float, seed: int) -> list[Tile]:
    """So many of the tiles, rounded, in their order; which ones is a function of the seed.

    Whole tiles are what somebody would have to label less of. They keep the crops of a full run,
    also of patches that are no larger than a crop, and a smaller share is a part of a larger one.
    Raises DataError where not one tile is left."""
    count = round(share * len(tiles))
    if count < 1:
        raise DataError(f"--share {share:g} of {len(tiles)} training tiles is none; give more")
    drawn = np.random.default_rng((seed, len(tiles))).permutation(len(tiles))[:count]
    return [tiles[i] for i in sorted(drawn)]


def fingerprint(tiles: list[LoadedTile]) -> str:
    """A checksum of training tiles, of about a thousand rows of each, so that a run is not resumed
    on other data."""
    code = 0
    for tile in tiles:
        for raster in (tile.image, tile.dsm, tile.labels):
            if raster is not None:
                H, W = raster.shape[:2]
                code = zlib.crc32(f"{tile.name}{raster.shape}".encode(), code)
                for row in range(0, H, max(1, H // 1000)):
                    code = zlib.crc32(np.ascontiguousarray(raster[row : row + 1, 0:W]), code)
    return f"{code:08x}"


def memory_line(loaded: list[LoadedTile]) -> str:
    """How much memory tiles take, and how much of them stays in files."""
    rasters = [r for tile in loaded for r in (tile.image, tile.dsm, tile.labels)]
    mapped = sum(isinstance(r, View) and not r.nbytes for r in rasters)
    files = f", {mapped} rasters are read crop by crop from their files" if mapped else ""
    size = sum(tile.nbytes() for tile in loaded) / 1e6
    return f"{len(loaded)} tiles take {size:,.1f} MB of memory{files}"


def facts_of(tiles: list[Tile]) -> dict:
    """What is kept with a run about its training tiles, once they are loaded."""
    pixels = sorted(size for tile in tiles if (size := tile.pixel_size()))
    limits = [tile.height_limits for tile in tiles if tile.height_limits]
    return {
        "pixel": pixels[len(pixels) // 2] if pixels else None,
        "heights": [min(low for low, _ in limits), max(high for _, high in limits)]
        if limits
        else None,
    }
