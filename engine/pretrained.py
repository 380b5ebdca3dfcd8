"""An encoder's weights: SAM's, fetched and checked, or this repository's for `vit_t`."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable

import torch

from sam_vit import WeightsError, first_line

# File and md5 of Meta's checkpoints, as in the README of facebookresearch/segment-anything.
OFFICIAL = {
    "vit_b": ("sam_vit_b_01ec64.pth", "01ec64d29a2fca3f0661936605ae66f8"),
    "vit_l": ("sam_vit_l_0b3195.pth", "0b3195507c641ddb6910d2bb5adee89c"),
    "vit_h": ("sam_vit_h_4b8939.pth", "4b8939a88964f0f4ff5f5b2642c598a6"),
}

# The encoder that lies in the repository, made by `pretraining.py`: file and sha256.
OURS = {"vit_t": ("vit_t.pth", "5bfd0cf19f56dc8eaae5c83c33eab555ae583bb5aff0339fe2c20e45cfdf4435")}
FOLDER = Path(__file__).resolve().parent.parent / "weights"

ADDRESS = "https://dl.fbaipublicfiles.com/segment_anything/"


Progress = Callable[[int, int], None]  # bytes so far, bytes in all (0 if unknown)


# ---------------------------------------------------------------------------------- the base: SAM's


def find_weights(weights: str, size: str, progress: Progress | None = None) -> Path | None:
    """`--weights`: a path; "auto" for SAM's official file of a size, fetched if need be, or this
    repository's; "none" -> None.

    Raises WeightsError in one line when the file is missing, damaged or cannot be fetched, or for a
    size of which there is none."""
    if weights == "none":
        return None
    if weights != "auto":
        if not Path(weights).is_file():
            remedy = "give a SAM checkpoint, --weights auto or --weights none"
            raise WeightsError(f"{weights}: no such file; {remedy}")
        return Path(weights)
    if size in OURS:
        return check_ours(FOLDER / OURS[size][0], OURS[size][1])
    if size not in OFFICIAL:
        sizes = ", ".join((*OURS, *OFFICIAL))
        raise WeightsError(f"there are no weights of size {size}; use --weights none, or {sizes}")
    name, md5 = OFFICIAL[size]
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    fetch(ADDRESS + name, target, md5, progress)
    return target


def check_ours(path: Path, sha256: str) -> Path:
    """The path, if it is the file with that sha256. Raises WeightsError."""
    again = "make it again as weights/README.md says"
    remedy = f"git checkout -- weights/{path.name}, or {again}, or --weights none"
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({first_line(error)}); {remedy}") from error
    if found != sha256:
        raise WeightsError(f"{path} has sha256 {found}, not {sha256}: it is damaged; {remedy}")
    return path


def fetch(url: str, target: Path, md5: str, progress: Progress | None = None) -> None:
    """Makes `target` the file with that md5: the one that is there, or else a download from `url`.

    A download becomes `target` only whole and with the right md5; what an interrupted one left
    (`target`.part) is continued. Raises WeightsError, one line with address, path and md5."""
    by_hand = f"fetch {url} by other means and put it to {target} (md5 {md5})"
    part = target.with_name(target.name + ".part")
    try:
        # At every start: it takes 2 s for a GB, and nobody would notice that a run stands on a
        # damaged base.
        if target.exists():
            return check_md5(target, md5, by_hand)
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(url, part, progress)
        if (found := file_md5(part)) != md5:
            part.unlink()
            thrown = f"the download has md5 {found} and was thrown away"
            raise WeightsError(f"{thrown}; try again, or {by_hand}")
        os.replace(part, target)
    except FileNotFoundError as error:  # another process has renamed the part, or removed it
        if not target.exists():
            removed = f"the download was removed ({error})"
            raise WeightsError(f"{removed}; try again, or {by_hand}") from error
        check_md5(target, md5, by_hand)
    except (OSError, http.client.HTTPException) as error:
        reason = first_line(error).removeprefix("<urlopen error ").removesuffix(">")
        failed = f"the download failed ({reason}); try again (what arrived is kept)"
        raise WeightsError(f"{failed}, or {by_hand}") from error


def check_md5(target: Path, md5: str, by_hand: str) -> None:
    if (found := file_md5(target)) != md5:
        damaged = f"{target} has md5 {found}, it is damaged or another file"
        raise WeightsError(f"{damaged}; remove it, or {by_hand}")


def _download(url: str, part: Path, progress: Progress | None) -> None:
    """Makes `part` as long as the server says that it is. Raises OSError or HTTPException."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # "range not satisfiable": it is whole, its md5 will tell
            return
        raise
    part.touch()
    # In place instead of appending: a second process at the same download then writes the same
    # bytes over.
    with response, open(part, "r+b") as file:
        if response.status != 206:  # a server that does not know ranges begins again
            have = 0
        total = have + response.length if response.length else 0
        file.seek(have)
        while chunk := response.read(1 << 20):
            file.write(chunk)
            have += len(chunk)
            if progress:
                progress(have, total)
        if have < total:
            raise OSError(f"the connection broke after {have} of {total} bytes")
        file.truncate()


def file_md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
