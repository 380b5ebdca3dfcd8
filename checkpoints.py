"""Files of weights: find and fetch SAM's, save a run, load it again.

A run's `model.pt` holds what was trained (tuner, fusion, decoder; the encoder only for `full`), the buffers that
training changed, and which base it stands on: the name and the SHA-256 of SAM's tensors in the encoder. The base itself
is found again by that name, or made again from its seed, and checked by that hash. `last.pt` holds what it takes to go
on with a run. Both are plain dicts of tensors and built-ins, read with `weights_only=True` and written to a temporary
name first.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from mfnet import MFNet, build_mfnet, trained_names
from sam_vit import ImageEncoderViT, LoadReport, WeightsError, check_total, first_line, load_sam_weights, read_tensors

# File and md5 of Meta's checkpoints, as in the README of facebookresearch/segment-anything.
OFFICIAL = {
    "vit_b": ("sam_vit_b_01ec64.pth", "01ec64d29a2fca3f0661936605ae66f8"),
    "vit_l": ("sam_vit_l_0b3195.pth", "0b3195507c641ddb6910d2bb5adee89c"),
    "vit_h": ("sam_vit_h_4b8939.pth", "4b8939a88964f0f4ff5f5b2642c598a6"),
}
ADDRESS = "https://dl.fbaipublicfiles.com/segment_anything/"
Progress = Callable[[int, int], None]  # bytes so far, bytes in all (0 if unknown)


def replace_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path beside `path` and renames it: the file is either the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- the base: SAM's


def find_weights(weights: str, size: str, progress: Progress | None = None) -> Path | None:
    """`--weights`: a path; "auto" for the official file of a size, fetched if need be; "none" -> None.

    Raises WeightsError in one line when the file is missing or cannot be fetched, or for a size that SAM does not have.
    """
    if weights == "none":
        return None
    if weights != "auto":
        if not Path(weights).is_file():
            raise WeightsError(f"{weights}: no such file; give a SAM checkpoint, --weights auto or --weights none")
        return Path(weights)
    if size not in OFFICIAL:
        raise WeightsError(f"SAM has no weights of size {size}; use --weights none, or {', '.join(OFFICIAL)}")
    name, md5 = OFFICIAL[size]
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not target.is_file():
        fetch(ADDRESS + name, target, md5, progress)
    return target


def fetch(url: str, target: Path, md5: str, progress: Progress | None = None) -> None:
    """Downloads `url` to `target`, which comes into being only whole and with the right md5.

    What an interrupted download left (`target`.part) is continued. Raises WeightsError with address, path and md5.
    """
    part = target.with_name(target.name + ".part")
    by_hand = f"fetch {url} by other means and put it to {target} (md5 {md5})"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(url, part, progress)
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or first_line(error)
        raise WeightsError(f"the download failed ({reason}); run again to continue it, or {by_hand}") from error
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest() if hasattr(hashlib, "file_digest") else _md5(file)
    if found != md5:
        part.unlink()
        raise WeightsError(f"the download has md5 {found} and was thrown away; {by_hand}")
    os.replace(part, target)


def _download(url: str, part: Path, progress: Progress | None) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # "range not satisfiable": the part is whole already, its md5 will tell
            raise
        return
    with response:
        have = have if response.status == 206 else 0  # a server that does not know ranges begins again
        length = int(response.headers.get("Content-Length", 0))
        total = have + length if length else 0
        with open(part, "ab" if have else "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                have += len(chunk)
                if progress:
                    progress(have, total)
    if total and have < total:
        raise OSError(f"the connection broke after {have} of {total} bytes")


def _md5(file) -> str:
    digest = hashlib.md5()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def base_digest(encoder: ImageEncoderViT) -> str:
    """SHA-256 over SAM's tensors in the encoder, by sorted name, so that every format of one checkpoint has one hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        if name not in encoder.added_names:
            digest.update(f"{name} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def build_model(
    settings: dict, num_classes: int, progress: Progress | None = None
) -> tuple[MFNet, dict, LoadReport | None]:
    """A network as a run's settings describe it, on its base -> (model, base, report of loading SAM's weights).

    `base` names where the encoder's weights come from: {"weights", "seed", "sha256"}. Seeds torch with the run's seed,
    which is what random weights (`--weights none`) are a function of.
    """
    path = find_weights(settings["weights"], settings["encoder"], progress)
    options = {"adapter": ("mixing",), "lora": ("mixing", "rank")}.get(settings["tuner"], ())
    torch.manual_seed(settings["seed"])
    model = build_mfnet(
        settings["encoder"],
        settings["tuner"],
        num_classes,
        modalities=len(settings["modalities"].split("+")),
        fusion=settings["fusion"],
        **{name: settings[name] for name in options},
    )
    report = load_sam_weights(model.image_encoder, path) if path else None
    name = "random" if path is None else path.name
    return model, {"weights": name, "seed": settings["seed"], "sha256": base_digest(model.image_encoder)}, report


# ------------------------------------------------------------------------------------------------------------- the run


def trained_state(model: MFNet) -> dict[str, Tensor]:
    """What a run changes: the trained parameters and every buffer, on the CPU."""
    names = set(trained_names(model)) | {n for n, _ in model.named_buffers()}
    return {n: t.detach().cpu() for n, t in model.state_dict().items() if n in names}


def load_trained_state(model: MFNet, state: dict[str, Tensor], what: str) -> None:
    """The counterpart of `trained_state`; raises WeightsError with both differences unless every name fits."""
    target = model.state_dict()
    check_total({n: target[n] for n in trained_state(model)}, state, what)
    with torch.no_grad():
        for name, tensor in state.items():
            target[name].copy_(tensor)


def save_model(path: Path, model: MFNet, settings: dict, base: dict, classes: list) -> None:
    content = {"settings": settings, "base": base, "classes": classes, "state": trained_state(model)}
    replace_atomically(path, lambda p: torch.save(content, p))


def load_model(path: Path) -> tuple[MFNet, dict, list]:
    """A `model.pt` -> (network in eval mode on the CPU, the run's settings, [[class name, [r, g, b]], ...]).

    Raises WeightsError when the file is damaged, or when the base that is found is not the one it was trained on.
    """
    content = read_content(path, ("settings", "base", "classes", "state"))
    settings, base = content["settings"], content["base"]
    model, found, _ = build_model(settings, len(content["classes"]))
    if settings["tuner"] != "full" and found["sha256"] != base["sha256"]:
        raise WeightsError(
            f"{path} was trained on {base['weights']} (sha256 {base['sha256']}), "
            f"not on {found['weights']} (sha256 {found['sha256']}); give the base it was trained on"
        )
    load_trained_state(model, content["state"], str(path))
    return model.eval(), settings, content["classes"]


def read_content(path: Path, keys: tuple[str, ...]) -> dict:
    """A file of ours as a dict that holds `keys`. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; is this the folder of a finished run?")
    content = read_tensors(path)
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise WeightsError(f"{path}: not a file of this program, it lacks {', '.join(keys)}")
    return content


def newest_run(runs: Path = Path("runs"), holding: str = "model.pt") -> Path:
    """The folder below `runs` whose file `holding` was written last. Raises WeightsError when there is none."""
    models = sorted(runs.glob(f"*/{holding}"), key=lambda p: p.stat().st_mtime)
    if not models:
        raise WeightsError(f"there is no finished run below {runs.resolve()}; train one, or give --run DIR")
    return models[-1].parent


def pick_device(name: str) -> torch.device:
    """"auto" -> CUDA, Apple's MPS, or the CPU. Raises WeightsError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(f"--device {name} cannot be used here ({first_line(error)}); try auto or cpu") from error
    return device
