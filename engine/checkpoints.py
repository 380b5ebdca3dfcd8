"""Files of weights: save a run, load it again, hand it on.

    python -m engine.checkpoints --run runs/NAME --whole FILE    the run with SAM's weights in it
    python -m engine.checkpoints --run runs/NAME --sam FILE      its image encoder, in Meta's names

A run's `model.pt` holds what was trained (tuner, fusion, decoder; the encoder only for `full`), the
buffers that training changed, and which base it stands on: the name and the SHA-256 of SAM's
tensors in the encoder. The base itself is found again by that name, or made again from its seed,
and checked by that hash; a whole file brings it along. `last.pt` holds what it takes to go on with
a run. All are plain dicts of tensors and built-ins, read with `weights_only=True` and written to a
temporary name first."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.console import Mistake, Parser, run_script
from engine.files import replace_atomically
from engine.networks import build_model, build_network
from engine.plugins import load_run_plugins
from engine.settings import Settings
from mfnet import MFNet, trained_names
from sam_vit import WeightsError, check_keys_match, first_line, read_tensors

MODEL_KEYS = ("settings", "base", "classes", "state")
# A state that holds it holds the whole encoder: of `full`, or a whole file.
IN_EVERY_BASE = "image_encoder.pos_embed"

# ------------------------------------------------------------------------------------------ the run


def changed_names(model: MFNet) -> list[str]:
    """What a run changes: the names of the trained parameters and of every buffer that is saved."""
    names = {*trained_names(model), *(n for n, _ in model.named_buffers())}
    return [n for n in model.state_dict() if n in names]


def trained_state(model: MFNet) -> dict[str, Tensor]:
    """The tensors of `changed_names`, on the CPU."""
    state = model.state_dict()
    return {n: state[n].detach().cpu() for n in changed_names(model)}


def load_trained_state(model: MFNet, state: dict[str, Tensor], what: str) -> None:
    """The counterpart of `trained_state`, which also takes a whole state with the base. Raises
    WeightsError with both differences, and changes nothing, unless every name and shape fits."""
    target = model.state_dict()
    names = target if IN_EVERY_BASE in state else changed_names(model)
    check_keys_match({n: target[n] for n in names}, state, what)
    with torch.no_grad():
        for name, tensor in state.items():
            target[name].copy_(tensor)


def save_tensors(path: Path, content: dict) -> None:
    """Writes `content` to a temporary name and renames it. Raises OSError if that fails."""

    def write(temporary: Path) -> None:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # by which torch reports a full disk or a closed folder
            raise OSError(first_line(error)) from error

    replace_atomically(path, write)


def save_model(
    path: Path, model: MFNet, s: Settings, base: dict, classes: list, epoch: int, finished: bool
) -> None:
    """Writes `model.pt`; `finished` says whether the run came to its end. Raises OSError."""
    content = {"settings": asdict(s), "base": base, "classes": classes}
    content |= {"state": trained_state(model), "epoch": epoch, "finished": finished}
    save_tensors(path, content)


def load_model(path: str | Path, weights: str | None = None) -> tuple[MFNet, Settings, list]:
    """A `model.pt` or a whole file -> (network in eval mode on the CPU, the run's settings, [[name,
    [r, g, b]], ...]).

    `weights` says where the base is now (as `--weights`), by default where the run found it; a file
    that holds its base needs none. Raises WeightsError when the file is damaged, when there is no
    base, or another one than the run's; Mistake for settings that cannot be a run's."""
    path = Path(path)
    content = read_content(path, MODEL_KEYS)
    s = read_settings(content, path)
    base, classes, state = content["base"], content["classes"], content["state"]
    check_form(base, classes, path)
    whole, given = IN_EVERY_BASE in state, weights or s.weights
    if not (whole or weights or given in ("auto", "none") or Path(given).is_file()):
        remedy = "where there is no file; say where it is now by --weights"
        raise WeightsError(f"{path} stands on {given}, {remedy}")
    try:
        if whole:
            model, found = build_network(s, len(classes)), base
        else:
            model, found, _ = build_model(replace(s, weights=given), len(classes))
    except Mistake as error:
        raise Mistake(f"{path}: {error}") from None
    if found["sha256"] != base["sha256"]:
        named = "{weights} (sha256 {sha256})".format_map
        raise WeightsError(
            f"{path} was trained on {named(base)}, not on {named(found)}; give the base it was "
            "trained on by --weights, or a whole file (python -m engine.checkpoints --whole FILE, "
            "where the base is)"
        )
    try:
        load_trained_state(model, state, str(path))
    except WeightsError as error:
        remedy = "if another version wrote the file, use that one (config.json names it)"
        raise WeightsError(f"{error}; {remedy}") from error
    return model.eval(), s, classes


def read_content(path: Path, keys: tuple[str, ...]) -> dict:
    """A file of ours as a dict that holds `keys`. Raises WeightsError."""
    if not path.is_file():
        seeds = sorted(path.parent.glob(f"seed-*/{path.name}"))
        of_seeds = f"give one of its seeds, as {seeds[0].parent}" if seeds else ""
        raise WeightsError(f"{path}: no such file; {of_seeds or 'is this the folder of a run?'}")
    content = read_tensors(path)
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise WeightsError(f"{path}: not a file of this program, it lacks {', '.join(keys)}")
    return content


def read_settings(content: dict, path: Path) -> Settings:
    """The settings in a file of a run, after the plugins beside it were loaded. Raises Mistake."""
    plugins = content["settings"].get("plugin", {}) if type(content["settings"]) is dict else {}
    if type(plugins) is not dict or not all(type(v) is str for kv in plugins.items() for v in kv):
        raise Mistake(f"{path}: its plugins are no list of names and hashes")
    load_run_plugins(plugins, path.parent)
    return Settings.from_dict(content["settings"], str(path))


def check_form(base: object, classes: object, path: Path) -> None:
    """Raises WeightsError unless base and classes are what `save_model` writes."""
    try:
        sound = {(type(name), len(color)) for name, color in classes} == {(str, 3)}
        sound = sound and all(type(base[key]) is str for key in ("weights", "sha256"))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise WeightsError(f"{path}: its base or its classes are damaged")


def is_finished(path: Path) -> bool:
    """Whether a model.pt is of a run that came to its end; earlier versions did not note it."""
    return bool(read_content(path, MODEL_KEYS).get("finished", True))


def saved_files(runs: Path, name: str) -> list[Path]:
    """The files `name` of the runs below a folder, those of --seeds included, oldest first."""
    found = [*runs.glob(f"*/{name}"), *runs.glob(f"*/seed-*/{name}")]
    return sorted(found, key=lambda p: p.stat().st_mtime)


def newest_run(runs: Path = Path("runs")) -> Path:
    """The folder below `runs` whose model.pt was written last. Raises WeightsError."""
    models = saved_files(runs, "model.pt")
    if not models:
        there = f"there is no finished run below {runs.resolve()}"
        raise WeightsError(f"{there}; train one, or give --run DIR")
    return models[-1].parent


# --------------------------------------------------------------------------------------- handing on


def export_whole(path: Path, out: Path, weights: str | None = None) -> None:
    """Writes the run of a `model.pt` with its base: `load_model` needs no checkpoint of SAM for it.
    Raises WeightsError as `load_model` does, and if `out` exists or cannot be written."""
    check_new(out)
    model, _, _ = load_model(path, weights)
    save_new(out, {**read_content(path, MODEL_KEYS), "state": dict(model.state_dict())})


def sam_state(model: MFNet) -> dict[str, Tensor]:
    """SAM's part of the encoder by the names of Meta's files, `image_encoder.*`: the base, and for
    `full` the trained one. What a tuner added is no part of it."""
    state, added = model.image_encoder.state_dict(), model.image_encoder.added_names
    return {"image_encoder." + n: t.detach().cpu() for n, t in state.items() if n not in added}


def check_new(out: Path) -> None:
    """Raises WeightsError unless `out` is the name of a new file in a folder that exists."""
    if out.exists():
        raise WeightsError(f"{out} exists and is not overwritten; give another name, or remove it")
    if not out.resolve().parent.is_dir():
        raise WeightsError(f"{out}: its folder does not exist")


def save_new(out: Path, content: dict) -> None:
    """Writes a file that `check_new` let pass: whole, or not at all and WeightsError."""
    try:
        save_tensors(out, content)
    except OSError as error:
        raise WeightsError(f"{out} cannot be written ({first_line(error)})") from error


def main(argv: list[str] | None = None) -> None:
    text = "Writes a run's weights for use elsewhere."
    parser = Parser(prog="-m engine.checkpoints", description=text)
    add = parser.add_argument
    add("--run", type=Path, help="folder of a run; by default the newest below runs/")
    add("--whole", type=Path, metavar="FILE", help="write the run with its base")
    add("--sam", type=Path, metavar="FILE", help="write the image encoder in Meta's names")
    add("--weights", help="where the base is now: auto or a path; by default as the run found it")
    args = parser.parse_args(argv)
    outs = [out for out in (args.whole, args.sam) if out is not None]
    if len({out.resolve() for out in outs}) != len(outs) or not outs:
        parser.error("give --whole FILE, --sam FILE, or both with different names")
    for out in outs:
        check_new(out)
    path = (args.run or newest_run()) / "model.pt"
    if args.whole:
        export_whole(path, args.whole, args.weights)
    if args.sam:
        save_new(args.sam, sam_state(load_model(path, args.weights)[0]))
    for out in outs:
        print(f"{out}: {out.stat().st_size:,} bytes, from {path}")


if __name__ == "__main__":
    run_script(main, WeightsError)
