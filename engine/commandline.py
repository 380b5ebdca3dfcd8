"""The command line of train.py: a flag for every setting, in the groups of `Settings`.

Plugins are loaded before anything else is read, because what they add is a choice of other flags.
The defaults that --help shows are those of the chosen --data.
"""

from __future__ import annotations

import argparse
import secrets
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

from engine.console import Mistake, Parser
from engine.plugins import load_plugins
from engine.recipes import recipe, with_optimizer
from engine.settings import FLAGS, GROUPS, Settings, choices_of, flag
from geodata.kinds import ordered
from tuners import parse_option, tuner_options

# What may differ between a run and its continuation: where things lie, and other ways to compute
# the same. Data and base are checked by what they hold.
FREE_ON_RESUME = ("out", "root", "weights", "workers", "device", "save_every", "memory_gb")
FREE_ON_RESUME += ("accumulate", "checkpointing")


def parse_settings(
    argv: list[str] | None = None, description: str = ""
) -> tuple[Settings, dict, argparse.Namespace]:
    """The command line -> (settings, those given by hand, the switches --resume, --seeds,
    --as-published, --start-or-continue). Raises Mistake or DataError."""
    first = Parser(prog="train.py", add_help=False)
    first.add_argument("--plugin", action="append", default=[])
    first.add_argument("--data", default="synthetic")
    first.add_argument("--encoder")
    first.add_argument("--as-published", action="store_true")
    early, _ = first.parse_known_args(argv)
    plugins = load_plugins(early.plugin)
    chosen = recipe(early.data, early.encoder, early.as_published)

    parser = build_parser(Settings(**{**chosen, "data": early.data}), description)
    args = parser.parse_args(argv)
    if args.resume and (args.as_published or args.seeds or args.start_or_continue):
        others = "--as-published, --seeds and --start-or-continue"
        parser.error(f"--resume has the run's own settings; leave {others} out")
    if args.seeds and min(args.seeds) < 0:
        parser.error("--seeds takes numbers of 0 and more")
    given = given_settings(args)
    if plugins:
        given["plugin"] = plugins
    s = Settings(**{**with_optimizer(given, chosen), **given, "tuner_option": {}})
    s.root = s.root or str(Path("data") / s.data)
    for stride in {"eval_stride", "select_stride"} - given.keys():
        # A recipe's stride does not forbid a smaller crop.
        setattr(s, stride, min(getattr(s, stride), s.crop))
    if s.val and s.select == "last" and "select" not in given:
        s.select = "val"
    if args.start_or_continue and (not s.out or s.seed == -1):
        parser.error("--start-or-continue needs --out and --seed, to know the run again")
    if not args.resume:  # a resumed run has its own settings; see `resumed_settings`
        if "tuner_option" in given:
            s.tuner_option = given["tuner_option"] = read_options(s.tuner, given["tuner_option"])
        s.complete()
        if s.seed == -1:
            s.seed = secrets.randbelow(2**31)
    return s, given, args


def build_parser(defaults: Settings, description: str) -> Parser:
    parser = Parser(prog="train.py", description=description)
    add_settings(parser, defaults)
    text = "go on with the run in --out, by default the newest that is not finished"
    parser.add_argument("--resume", action="store_true", help=text)
    text = "go on with the run in --out if it is this very one, or else begin it"
    parser.add_argument("--start-or-continue", action="store_true", help=text)
    text = "train once with each seed, below --out; what is there is kept or gone on with"
    parser.add_argument("--seeds", type=int, nargs="+", help=text)
    return parser


def add_settings(parser: Parser, defaults: Settings, without: tuple[str, ...] = ()) -> None:
    """Adds a flag for every setting, and --as-published; what is not given is in no namespace."""
    hints = get_type_hints(Settings)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for f in fields(Settings):
        if f.name in (*without, "kinds"):
            continue
        text, shown = f.metadata["help"], getattr(defaults, f.name)
        how = dict(type=hints[f.name], choices=choices_of(f) or None)
        if f.name == "plugin":
            how = dict(action="append", metavar="FILE")
        elif f.name == "tuner_option":
            how = dict(action="append", metavar="NAME=VALUE")
            options = [f"{n}={v}" for n, v in tuner_options(defaults.tuner).items()]
            shown = f"{defaults.tuner}: {', '.join(options) or 'none'}"
        elif hints[f.name] is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        text = text if f.name == "plugin" else f"{text} [{shown}]".replace("%", "%%")
        add = groups[f.metadata["group"]].add_argument
        add(flag(f.name), dest=f.name, default=argparse.SUPPRESS, help=text, **how)
        if f.name in FLAGS:
            old, how = "--" + f.name.replace("_", "-"), how | dict(help=argparse.SUPPRESS)
            add(old, dest=f.name, default=argparse.SUPPRESS, **how)
    text = "depart from the paper where the published code does, in training and scoring"
    parser.add_argument("--as-published", action="store_true", help=text)


def given_settings(args: argparse.Namespace) -> dict:
    """The settings on a command line by name, their rasters in the order of a network. Raises
    DataError."""
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    for name in ("modalities", "drop_only"):
        if given.get(name):
            given[name] = ordered(given[name], flag(name))
    return given


def read_options(tuner: str, words: list[str]) -> dict:
    """name=value, repeated -> a tuner's options. Raises Mistake."""
    try:
        return dict(parse_option(tuner, word) for word in words)
    except ValueError as error:
        raise Mistake(f"--tuner-option: {error}") from error


def resumed_settings(
    stored: Settings, given: dict, folder: Path, lengthen: bool = True
) -> Settings:
    """The settings of the run in `folder`, with what may be given anew; more --epochs lengthen it.
    Raises Mistake for a flag that contradicts the run."""
    given = {"tuner_option": {}, **given}
    if isinstance(given["tuner_option"], list):  # the words of the command line
        given["tuner_option"] = read_options(stored.tuner, given["tuner_option"])
    free = {name: given[name] for name in FREE_ON_RESUME if name in given}
    if lengthen and given.get("epochs", 0) > stored.epochs:
        free["epochs"] = given["epochs"]
    for name, value in given.items():
        ours = getattr(stored, name)
        agrees = value.items() <= ours.items() if isinstance(value, dict) else value == ours
        agrees = agrees or (name, value) == ("precision", "auto")  # the run filled it in
        if name not in free and not agrees:
            contradiction = f"{flag(name)} {value} contradicts the run in {folder}"
            remedy = "leave it out" if lengthen else "give another --out"
            raise Mistake(f"{contradiction}, which has {ours}; {remedy}")
    settings = replace(stored, **{**free, "out": str(folder)})
    settings.complete()
    return settings
