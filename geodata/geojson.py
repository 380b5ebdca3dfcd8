"""Polygons in files: GeoJSON that a GIS wrote as rings on a raster's grid, and regions of a map as
GeoJSON that a GIS reads."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterable

import numpy as np

from geodata.grids import Grid, one_system
from geodata.layouts import Classes
from geodata.polygons import Region
from geodata.slices import DataError, one_line

DEGREES = 4326  # EPSG's number of the system of GeoJSON files that name none
MOST = 64  # classes
PARTS = ("geometry", "properties")  # of a feature
Rings = list[np.ndarray]  # (n, 2) each: x and y; the outline, then the holes


@dataclass
class Polygons:
    """What a file holds, in its order: class names, and rings in pixels of a raster."""

    names: list[str]
    polygons: list[tuple[str, Rings]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_polygons(path: Path, key: str, grid: Grid | None, size: tuple[int, int]) -> Polygons:
    """The polygons of a GeoJSON file on the grid of a raster of `size` (H, W), by the property that
    holds their class. Without a grid, coordinates are pixels, y upwards from the raster's upper
    edge, as QGIS shows such a raster. Raises DataError where they cannot be laid there."""
    features, system = _read(path)
    named = [(_class_of(feature, key), _rings(feature, path)) for feature in features]
    if not any(parts for _, parts in named):
        raise DataError(f"{path}: holds no polygon; draw some, or give another file")
    names = {name for name, parts in named if parts} - {None}
    if not names:
        known = dict.fromkeys(k for f in features for k in f.get("properties") or {})
        fields = ", ".join(known) or "none at all"
        raise DataError(f"{path}: has no field {key!r}; give one of its own by --field: {fields}")
    if not 2 <= len(names) <= MOST:
        held = f"holds {len(names)} different classes in the field {key!r}, and 2 to {MOST} are"
        raise DataError(f"{path}: {held} needed; give another one by --field")
    if odd := next((name for name in names if not name.isprintable()), None):
        problem = f"the class {odd!r} has a character that cannot be shown"
        raise DataError(f"{path}: {problem}; rename it in the field {key!r}")
    found, outside = Polygons(sorted(names, key=_natural)), 0
    to_pixels = (grid or Grid(0, 0, 1, 1)).pixels
    if grid:
        corners = np.concatenate([ring for _, parts in named for part in parts for ring in part])
        _check_system(path, system, grid, corners)
    for name, parts in named:
        for part in parts if name else ():
            rings = [np.stack(to_pixels(*ring.T), 1) for ring in part]
            low, high = rings[0].min(axis=0), rings[0].max(axis=0)
            outside += bool((high < 0).any() or (low > size[::-1]).any())
            found.polygons.append((name, rings))
    count = len(found.polygons)
    if outside == count:
        raise DataError(
            f"{path}: no polygon lies in the image; compare their places: ogrinfo -so -al {path}"
        )
    without = sum(name is None for name, parts in named if parts)
    others = sum(not parts for _, parts in named)
    told = {f"of {count} polygons lie outside the image": outside}
    told[f"features have nothing in the field {key!r} and are left out"] = without
    told["features are no polygons, or empty ones, and are left out"] = others
    found.notes = [f"{path}: {n} {what}" for what, n in told.items() if n]
    return found


def _read(path: Path) -> tuple[list[dict], str]:
    """The features of a file, and the name of its system, if any."""
    remedy = f"convert it: ogr2ogr -f GeoJSON {path.stem}_new.geojson {path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no GeoJSON ({one_line(error)}); {remedy}") from error
    try:
        kind = content["type"]
        features = {"FeatureCollection": content.get("features"), "Feature": [content]}[kind]
        crs = (content.get("crs") or {}).get("properties") or {}
        if not all(isinstance(f.get(k) or {}, dict) for f in features for k in PARTS):
            raise TypeError("not of its form")
        return features, str(crs.get("name") or "")
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no collection of features; {remedy}") from error


def _class_of(feature: dict, key: str) -> str | None:
    value = (feature.get("properties") or {}).get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None or not str(value).strip() else str(value).strip()


def _natural(name: str) -> tuple:
    """Numbers by their size, before names."""
    return (0, float(name), "") if re.fullmatch(r"-?\d+(\.\d+)?", name) else (1, 0.0, name)


def _rings(feature: dict, path: Path) -> list[Rings]:
    """The rings of each polygon of a feature, none where it is something else."""
    geometry = feature.get("geometry") or {}
    kind, parts = geometry.get("type"), geometry.get("coordinates")
    if kind not in ("Polygon", "MultiPolygon"):
        return []
    try:
        parts = [parts] if kind == "Polygon" else parts
        parts = [[np.array([p[:2] for p in ring], np.float64) for ring in part] for part in parts]
        if not all(r.shape[1] == 2 and np.isfinite(r).all() for part in parts for r in part):
            raise ValueError("coordinates are pairs of numbers")
    except (TypeError, ValueError, IndexError, KeyError) as error:
        problem = f"a damaged polygon ({one_line(error)})"
        raise DataError(f"{path}: {problem}; write the file again: ogr2ogr OUT {path}") from error
    return [part for part in parts if part]


def _check_system(path: Path, name: str, grid: Grid, corners: np.ndarray) -> None:
    """Raises DataError for polygons in another system than the raster's. A file that names none is
    in degrees, unless its numbers cannot be."""
    code = re.search(r"EPSG:(?:[\d.]*:)?(\d+)$", name)
    system = DEGREES if "CRS84" in name else int(code[1]) if code else None
    degrees = system == DEGREES or not name and (np.abs(corners) <= (180, 90)).all()
    if not one_system(replace(grid, system=system, projected=False if degrees else None), grid):
        target = f"EPSG:{grid.system}" if grid.system else "SYSTEM"
        own = "longitude and latitude" if degrees else f"EPSG:{system}"
        remedy = f"ogr2ogr -t_srs {target} {path.stem}_{grid.system or 'new'}.geojson {path}"
        raise DataError(f"{path}: is in {own}, and the image in {target}; convert it: {remedy}")


# ----------------------------------------------------------------------------------------- writing


def write_regions(
    path: Path, regions: Iterable[Region], classes: Classes, grid: Grid | None
) -> None:
    """A polygon for each region, with its class, its area in square metres (in pixels where the
    grid does not tell metres) and its mean confidence in percent."""
    area = (grid and grid.pixel_area()) or 1.0
    grid = grid or Grid(0, 0, 1, 1)
    head = {"type": "FeatureCollection"}
    if grid.system not in (None, DEGREES):
        name = f"urn:ogc:def:crs:EPSG::{grid.system}"
        head["crs"] = {"type": "name", "properties": {"name": name}}
    # A ten-thousandth of a pixel
    digits = max(0, 4 - math.floor(math.log10(min(map(abs, (grid.step_x, grid.step_y))))))
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(head)[:-1] + ', "features": [')
        for i, region in enumerate(regions):
            closed = [np.append(ring, ring[:1], axis=0) for ring in region.rings]
            places = [grid.corner(*ring.T[::-1]) for ring in closed]
            rings = [np.round(place, digits).T.tolist() for place in places]
            about = {"class": classes[region.value][0], "value": region.value}
            about |= {"area": round(region.pixels * area, 3)}
            about |= {"confidence": round(region.confidence, 1)}
            geometry = {"type": "Polygon", "coordinates": rings}
            feature = {"type": "Feature", "properties": about, "geometry": geometry}
            file.write(",\n" * bool(i) + json.dumps(feature))
        file.write("\n]}\n")
