"""Files of weights: find and fetch SAM's, save a run, load it again, hand it on.

    python -m engine.checkpoints --run runs/NAME --whole FILE    a model.pt that needs no checkpoint of SAM beside it
    python -m engine.checkpoints --run runs/NAME --sam FILE      the run's image encoder alone, in the names of Meta's files

A run's `model.pt` holds what was trained (tuner, fusion, decoder; the encoder only for `full`), the
buffers that training changed, and which base it stands on: the name and the SHA-256 of SAM's
tensors in the encoder. The base itself is found again by that name, or made again from its seed,
and checked by that hash; a whole file brings it along. `last.pt` holds what it takes to go on with
a run. All are plain dicts of tensors and built-ins, read with `weights_only=True` and written to a
temporary name first."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from engine.console import Parser, Ticker, run_script
from engine.files import replace_atomically
from engine.pretrained import Progress, find_weights
from mfnet import MFNet, build_mfnet, trained_names
from sam_vit import (
    ImageEncoderViT,
    LoadReport,
    WeightsError,
    check_keys_match,
    first_line,
    load_sam_weights,
    read_tensors,
)


def base_digest(encoder: ImageEncoderViT) -> str:
    """SHA-256 over SAM's tensors in the encoder, by sorted name and as float32: one hash for every
    format and spelling of a checkpoint, and for every tuner that stands on it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        if name not in encoder.added_names:
            digest.update(f"{name} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def build_network(settings: dict, num_classes: int) -> MFNet:
    """A network as a run's settings describe it, with random weights. Seeds torch with the run's
    seed: what `--weights none` trains on is a function of it.
    """
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
    """The network of a run on its base -> (model, base, report of loading SAM's weights; None for
    random ones).

    `base` names where the encoder's weights come from: {"weights", "seed", "sha256"}. Raises
    WeightsError."""
    path = find_weights(settings["weights"], settings["encoder"], progress)
    model = build_network(settings, num_classes)
    report = None
    if path is not None:
        report = load_sam_weights(
            model.image_encoder, path, settings.get("relative_positions", "sam")
        )
    name = "random" if path is None else path.name
    return (
        model,
        {"weights": name, "seed": settings["seed"], "sha256": base_digest(model.image_encoder)},
        report,
    )


# ------------------------------------------------------------------------------------------ the run


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

    Raises WeightsError with both differences, and changes nothing, unless every name and shape
    fits."""
    target = model.state_dict()
    names = target if IN_EVERY_BASE in state else changed_names(model)
    check_keys_match({n: target[n] for n in names}, state, what)
    with torch.no_grad():
        for name, tensor in state.items():
            target[name].copy_(tensor)


def save_model(path: Path, model: MFNet, settings: dict, base: dict, classes: list) -> None:
    content = {
        "settings": settings,
        "base": base,
        "classes": classes,
        "state": trained_state(model),
    }
    replace_atomically(path, lambda p: torch.save(content, p))


def load_model(
    path: Path, weights: str | None = None, progress: Progress | None = None
) -> tuple[MFNet, dict, list]:
    """A `model.pt` or a whole file -> (network in eval mode on the CPU, the run's settings, [[name,
    [r, g, b]], ...]).

    `weights` says where the base is now (as `--weights`), by default where the run found it; a file
    that holds its base needs none. Raises WeightsError when the file is damaged, when there is no
    base, or another one than the run's."""
    content = read_content(path, MODEL_KEYS)
    return restore_model(content, path, weights, progress), content["settings"], content["classes"]


def restore_model(
    content: dict, path: Path, weights: str | None, progress: Progress | None
) -> MFNet:
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
        raise WeightsError(
            f"{path}: its settings describe no network of this program ({error!r})"
        ) from error
    if not whole and found["sha256"] != base["sha256"]:
        raise WeightsError(
            f"{path} was trained on {base['weights']} (sha256 {base['sha256']}), not on {found['weights']} "
            f"(sha256 {found['sha256']}); give the base it was trained on by --weights, or a whole file "
            "(python -m engine.checkpoints --whole FILE, where the base is)"
        )
    load_trained_state(model, content["state"], str(path))
    return model.eval()


def base_place(path: Path, settings: dict, weights: str | None) -> str:
    """`weights`, or what the run was given. Raises WeightsError if that was a path where no file is
    any more.
    """
    place = settings["weights"]
    if weights is None and place not in ("auto", "none") and not Path(place).is_file():
        raise WeightsError(
            f"{path} stands on {place}, where there is no file; say where it is now by --weights"
        )
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
    """The folder below `runs` whose file `holding` was written last. Raises WeightsError when there
    is none.
    """
    models = sorted(runs.glob(f"*/{holding}"), key=lambda p: p.stat().st_mtime)
    if not models:
        raise WeightsError(
            f"there is no finished run below {runs.resolve()}; train one, or give --run DIR"
        )
    return models[-1].parent


# --------------------------------------------------------------------------------------- handing on


def export_whole(
    path: Path, out: Path, weights: str | None = None, progress: Progress | None = None
) -> None:
    """Writes the run of a `model.pt` with its base: `load_model` needs no checkpoint of SAM for it.

    Raises WeightsError as `load_model` does, and if `out` exists or cannot be written.
    """
    check_new(out)
    content = read_content(path, MODEL_KEYS)
    model = restore_model(content, path, weights, progress)
    save_new(out, {**content, "state": dict(model.state_dict())})


def sam_state(model: MFNet) -> dict[str, Tensor]:
    """SAM's part of the encoder by the names of Meta's files, `image_encoder.*`: the base, and for
    `full` the trained one. What a tuner added is no part of it.
    """
    encoder = model.image_encoder
    state = encoder.state_dict()
    return {
        "image_encoder." + n: t.detach().cpu()
        for n, t in state.items()
        if n not in encoder.added_names
    }


def check_new(out: Path) -> None:
    """Raises WeightsError unless `out` is the name of a new file in a folder that exists."""
    if out.exists():
        raise WeightsError(f"{out} exists and is not overwritten; give another name, or remove it")
    if not out.resolve().parent.is_dir():
        raise WeightsError(f"{out}: its folder does not exist")


def save_new(out: Path, content: dict) -> None:
    """Writes a file that `check_new` let pass. Raises WeightsError, and leaves nothing, if that
    fails.
    """
    try:
        replace_atomically(out, lambda p: torch.save(content, p))
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch tells of a full disk or a closed folder by RuntimeError
        raise WeightsError(f"{out} cannot be written ({first_line(error)})") from error


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="-m engine.checkpoints", description="Writes a run's weights for use elsewhere."
    )
    parser.add_argument(
        "--run", type=Path, help="folder of a run; by default the newest below runs/"
    )
    parser.add_argument("--whole", type=Path, metavar="FILE", help="write the run with its base")
    parser.add_argument(
        "--sam", type=Path, metavar="FILE", help="write the image encoder in Meta's names"
    )
    parser.add_argument(
        "--weights", help="where the base is now: auto or a path; by default as the run found it"
    )
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
