"""Tiles as a network is trained on them, in memory as far as it goes.

Shapes: `H, W` pixels of a tile."""

from __future__ import annotations

import zlib

import numpy as np

from geodata.layouts import IGNORE
from geodata.slices import DataError, row_strips
from geodata.tiles import LoadedTile, Tile


def load_tiles(
    tiles: list[Tile], modalities: tuple[str, ...], memory_gb: float
) -> list[LoadedTile]:
    """Training tiles in at most `memory_gb` (10^9 bytes); what does not fit stays in its files,
    labels last. Raises DataError when the files that cannot be read crop by crop are larger than
    that, and when no pixel of any tile is scored."""
    kinds = ("labels", *reversed(modalities))  # the smallest, and the dearest to decode, first
    rasters = [(i, kind) for kind in kinds for i, tile in enumerate(tiles) if kind in tile.paths]
    sizes = {(i, kind): tiles[i].memory(kind) for i, kind in rasters}
    held = {(i, kind) for i, kind in rasters if not tiles[i].stays_in_file(kind)}
    budget, used = memory_gb * 1e9, sum(sizes[raster] for raster in held)
    if used > budget:
        i, kind = max(sorted(held), key=sizes.get)
        raise DataError(
            f"{tiles[i].paths[kind]}: only TIFFs that are uncompressed or in small tiles or strips "
            f"can be read crop by crop, and the {len(held)} files that are none take "
            f"{used / 1e9:.3g} GB, more than --memory-gb {memory_gb:g}; raise it, or rewrite them: "
            f"gdal_translate -co TILED=YES IN OUT.tif"
        )
    for raster in rasters:
        if raster not in held and used + sizes[raster] <= budget:
            held.add(raster)
            used += sizes[raster]
    loaded = [
        tile.load(modalities, {kind for j, kind in held if j == i}) for i, tile in enumerate(tiles)
    ]
    strips = (strip for tile in loaded for strip in row_strips(tile.labels))
    if tiles and not any((strip != IGNORE).any() for strip in strips):
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


def class_pixels(tiles: list[LoadedTile], num_classes: int) -> list[int]:
    """The pixels of each class in training tiles."""
    counts = np.zeros(256, np.int64)
    for tile in tiles:
        for strip in row_strips(tile.labels):
            counts += np.bincount(strip.ravel(), minlength=256)
    return counts[:num_classes].tolist()


def fingerprint(tiles: list[LoadedTile]) -> str:
    """A checksum of training tiles, of about a thousand rows of each, so that a run is not resumed
    on other data."""
    code = 0
    for tile in tiles:
        for raster in tile.rasters():
            H, W = raster.shape[:2]
            code = zlib.crc32(f"{tile.name}{raster.shape}".encode(), code)
            for row in range(0, H, max(1, H // 1000)):
                code = zlib.crc32(np.ascontiguousarray(raster[row : row + 1, 0:W]), code)
    return f"{code:08x}"


def memory_line(loaded: list[LoadedTile]) -> str:
    """How much memory tiles take, and how much of them stays in files."""
    in_files = sum(not raster.nbytes for tile in loaded for raster in tile.rasters())
    files = f", {in_files} rasters are read crop by crop from their files" if in_files else ""
    size = sum(tile.nbytes() for tile in loaded) / 1e6
    return f"{len(loaded)} tiles take {size:,.1f} MB of memory{files}"


def facts_of(tiles: list[Tile]) -> dict:
    """What is kept with a run about its training tiles, once they are loaded."""
    pixels = sorted(size for tile in tiles if (size := tile.pixel_size()))
    limits = [tile.height_limits for tile in tiles if tile.height_limits]
    ends = [min(low for low, _ in limits), max(high for _, high in limits)] if limits else None
    return {"pixel": pixels[len(pixels) // 2] if pixels else None, "heights": ends}
