"""Files of weights: find and fetch SAM's, save a run, load it again, hand it on.

    python checkpoints.py --run runs/NAME --whole FILE    a model.pt that needs no checkpoint of SAM beside it
    python checkpoints.py --run runs/NAME --sam FILE      the run's image encoder alone, in the names of Meta's files

A run's `model.pt` holds what was trained (tuner, fusion, decoder; the encoder only for `full`), the buffers that
training changed, and which base it stands on: the name and the SHA-256 of SAM's tensors in the encoder. The base itself
is found again by that name, or made again from its seed, and checked by that hash; a whole file brings it along.
`last.pt` holds what it takes to go on with a run. All are plain dicts of tensors and built-ins, read with
`weights_only=True` and written to a temporary name first.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from console import Parser, Ticker, run_script
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
    replace_together([path], write)


def replace_together(paths: list[Path], write: Callable[..., None]) -> None:
    """The same for files that belong together, with a temporary path for each: all are whole before one is renamed.

    What there is of the others is removed before the first takes its place, so that an interruption at the worst moment
    leaves too few of them, and never one beside a file that it does not belong to.
    """
    temporary = [path.with_name(path.name + ".tmp") for path in paths]
    try:
        write(*temporary)
        for path in paths[1:]:
            path.unlink(missing_ok=True)
        for finished, path in zip(temporary, paths):
            os.replace(finished, path)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


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
    fetch(ADDRESS + name, target, md5, progress)
    return target


def fetch(url: str, target: Path, md5: str, progress: Progress | None = None) -> None:
    """Sees to it that `target` is the file with that md5: the one that is there, or else a download from `url`.

    A download becomes `target` only whole and with the right md5; what an interrupted one left (`target`.part) is
    continued. Raises WeightsError, one line with address, path and md5.
    """
    by_hand = f"fetch {url} by other means and put it to {target} (md5 {md5})"
    part = target.with_name(target.name + ".part")
    try:
        # At every start: it takes 2 s for a GB, and nobody would notice that a run stands on a damaged base.
        if target.exists():
            if (found := file_md5(target)) != md5:
                raise WeightsError(f"{target} has md5 {found}, it is damaged or another file; remove it, or {by_hand}")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(url, part, progress)
        if (found := file_md5(part)) != md5:
            part.unlink()
            raise WeightsError(f"the download has md5 {found} and was thrown away; try again, or {by_hand}")
        os.replace(part, target)
    except (OSError, http.client.HTTPException) as error:
        reason = first_line(error).removeprefix("<urlopen error ").removesuffix(">")
        raise WeightsError(f"the download failed ({reason}); try again (what arrived is kept), or {by_hand}") from error


def _download(url: str, part: Path, progress: Progress | None) -> None:
    """Makes `part` whole, as far as the server tells how long it is. Raises OSError or HTTPException."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # "range not satisfiable": the part is whole already, its md5 will tell
            return
        raise
    part.touch()
    # In place instead of appending: a second process at the same download then writes the same bytes over.
    with response, open(part, "r+b") as file:
        have = have if response.status == 206 else 0  # a server that does not know ranges begins again
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


def base_digest(encoder: ImageEncoderViT) -> str:
    """SHA-256 over SAM's tensors in the encoder, by sorted name and as float32: one hash for every format and spelling
    of a checkpoint, and for every tuner that stands on it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        if name not in encoder.added_names:
            digest.update(f"{name} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def build_network(settings: dict, num_classes: int) -> MFNet:
    """A network as a run's settings describe it, with random weights. Seeds torch with the run's seed: what
    `--weights none` trains on is a function of it."""
    options = {"adapter": ("mixing",), "lora": ("mixing", "rank")}.get(settings["tuner"], ())
    torch.manual_seed(settings["seed"])
    return build_mfnet(
        settings["encoder"],
        settings["tuner"],
        num_classes,
        modalities=len(settings["modalities"].split("+")),
        fusion=settings["fusion"],
        **{name: settings[name] for name in options},
    )


def build_model(
    settings: dict, num_classes: int, progress: Progress | None = None
) -> tuple[MFNet, dict, LoadReport | None]:
    """The network of a run on its base -> (model, base, report of loading SAM's weights; None for random ones).

    `base` names where the encoder's weights come from: {"weights", "seed", "sha256"}. Raises WeightsError.
    """
    path = find_weights(settings["weights"], settings["encoder"], progress)
    model = build_network(settings, num_classes)
    report = None
    if path is not None:
        report = load_sam_weights(model.image_encoder, path, settings.get("relative_positions", "sam"))
    name = "random" if path is None else path.name
    return model, {"weights": name, "seed": settings["seed"], "sha256": base_digest(model.image_encoder)}, report


# ------------------------------------------------------------------------------------------------------------- the run


MODEL_KEYS = ("settings", "base", "classes", "state")
IN_EVERY_BASE = "image_encoder.pos_embed"  # a state that holds it holds the whole encoder: of `full`, or a whole file


def changed_names(model: MFNet) -> list[str]:
    """What a run changes: the names of the trained parameters and of every buffer that is saved."""
    names = {*trained_names(model), *(n for n, _ in model.named_buffers())}
    return [n for n in model.state_dict() if n in names]


def trained_state(model: MFNet) -> dict[str, Tensor]:
    """The tensors of `changed_names`, on the CPU."""
    state = model.state_dict()
    return {n: state[n].detach().cpu() for n in changed_names(model)}


def load_trained_state(model: MFNet, state: dict[str, Tensor], what: str) -> None:
    """The counterpart of `trained_state`, which also takes a whole state with the base.

    Raises WeightsError with both differences, and changes nothing, unless every name and shape fits.
    """
    target = model.state_dict()
    names = target if IN_EVERY_BASE in state else changed_names(model)
    check_total({n: target[n] for n in names}, state, what)
    with torch.no_grad():
        for name, tensor in state.items():
            target[name].copy_(tensor)


def save_model(path: Path, model: MFNet, settings: dict, base: dict, classes: list) -> None:
    content = {"settings": settings, "base": base, "classes": classes, "state": trained_state(model)}
    replace_atomically(path, lambda p: torch.save(content, p))


def load_model(path: Path, weights: str | None = None, progress: Progress | None = None) -> tuple[MFNet, dict, list]:
    """A `model.pt` or a whole file -> (network in eval mode on the CPU, the run's settings, [[name, [r, g, b]], ...]).

    `weights` says where the base is now (as `--weights`), by default where the run found it; a file that holds its base
    needs none. Raises WeightsError when the file is damaged, when there is no base, or another one than the run's.
    """
    content = read_content(path, MODEL_KEYS)
    return restore_model(content, path, weights, progress), content["settings"], content["classes"]


def restore_model(content: dict, path: Path, weights: str | None, progress: Progress | None) -> MFNet:
    """The network of what `path` holds; see `load_model`."""
    settings, base, K = content["settings"], content["base"], len(content["classes"])
    whole = IN_EVERY_BASE in content["state"]
    try:
        if whole:
            model = build_network(settings, K)
        else:
            place = base_place(path, settings, weights)
            model, found, _ = build_model({**settings, "weights": place}, K, progress)
    except WeightsError:
        raise
    except (KeyError, TypeError, ValueError) as error:  # written by another version, or by hand
        raise WeightsError(f"{path}: its settings describe no network of this program ({error!r})") from error
    if not whole and found["sha256"] != base["sha256"]:
        raise WeightsError(
            f"{path} was trained on {base['weights']} (sha256 {base['sha256']}), not on {found['weights']} "
            f"(sha256 {found['sha256']}); give the base it was trained on by --weights, or a whole file "
            "(python checkpoints.py --whole FILE, where the base is)"
        )
    load_trained_state(model, content["state"], str(path))
    return model.eval()


def base_place(path: Path, settings: dict, weights: str | None) -> str:
    """`weights`, or what the run was given. Raises WeightsError if that was a path where no file is any more."""
    place = settings["weights"]
    if weights is None and place not in ("auto", "none") and not Path(place).is_file():
        raise WeightsError(f"{path} stands on {place}, where there is no file; say where it is now by --weights")
    return weights or place


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
    if device.type == "cpu":
        # For PyTorch, which looks at it before its first large tensor: large pages of Linux for large tensors. Measured:
        # a training step of ViT-L takes a seventh less memory, and the same time.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return device


# ----------------------------------------------------------------------------------------------------------- handing on


def export_whole(path: Path, out: Path, weights: str | None = None, progress: Progress | None = None) -> None:
    """Writes the run of a `model.pt` with its base: `load_model` needs no checkpoint of SAM for it.

    Raises WeightsError as `load_model` does, and if `out` exists or cannot be written.
    """
    check_new(out)
    content = read_content(path, MODEL_KEYS)
    model = restore_model(content, path, weights, progress)
    save_new(out, {**content, "state": dict(model.state_dict())})


def sam_state(model: MFNet) -> dict[str, Tensor]:
    """SAM's part of the encoder by the names of Meta's files, `image_encoder.*`: the base, and for `full` the trained
    one. What a tuner added is no part of it."""
    encoder = model.image_encoder
    state = encoder.state_dict()
    return {"image_encoder." + n: t.detach().cpu() for n, t in state.items() if n not in encoder.added_names}


def check_new(out: Path) -> None:
    """Raises WeightsError unless `out` is the name of a new file in a folder that exists."""
    if out.exists():
        raise WeightsError(f"{out} exists and is not overwritten; give another name, or remove it")
    if not out.resolve().parent.is_dir():
        raise WeightsError(f"{out}: its folder does not exist")


def save_new(out: Path, content: dict) -> None:
    """Writes a file that `check_new` let pass. Raises WeightsError, and leaves nothing, if that fails."""
    try:
        replace_atomically(out, lambda p: torch.save(content, p))
    except (OSError, RuntimeError) as error:  # torch tells of a full disk or a closed folder by RuntimeError
        raise WeightsError(f"{out} cannot be written ({first_line(error)})") from error


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="checkpoints.py", description="Writes a run's weights for use elsewhere.")
    parser.add_argument("--run", type=Path, help="folder of a run; by default the newest below runs/")
    parser.add_argument("--whole", type=Path, metavar="FILE", help="write the run with its base")
    parser.add_argument("--sam", type=Path, metavar="FILE", help="write the image encoder in Meta's names")
    parser.add_argument("--weights", help="where the base is now: auto or a path; by default as the run found it")
    args = parser.parse_args(argv)
    outs = [out for out in (args.whole, args.sam) if out is not None]
    if len({out.resolve() for out in outs}) != len(outs) or not outs:
        parser.error("give --whole FILE, --sam FILE, or both with different names")
    for out in outs:
        check_new(out)
    path = (args.run or newest_run()) / "model.pt"
    progress = Ticker("fetching SAM's weights, bytes")
    if args.whole:
        export_whole(path, args.whole, args.weights, progress)
    if args.sam:
        save_new(args.sam, sam_state(load_model(path, args.weights, progress)[0]))
    for out in outs:
        print(f"{out}: {out.stat().st_size:,} bytes, from {path}")


if __name__ == "__main__":
    run_script(main)
