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
from engine.settings import GROUPS, Settings, choices_of, flag
from tuners import parse_option, tuner_options

# What may differ between a run and its continuation: where things lie, and other ways to compute
# the same. Data and base are checked by what they hold.
FREE_ON_RESUME = ("out", "root", "weights", "workers", "device", "save_every", "memory_gb")
FREE_ON_RESUME += ("accumulate", "checkpointing")


def parse_settings(
    argv: list[str] | None = None, description: str = ""
) -> tuple[Settings, dict, argparse.Namespace]:
    """The command line -> (settings, those given by hand, the switches --resume, --seeds,
    --as-published). Raises Mistake.
    """
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
    if args.resume and (args.as_published or args.seeds):
        parser.error(
            "--resume goes on with a run by its own settings; leave --as-published and --seeds out"
        )
    if args.seeds and min(args.seeds) < 0:
        parser.error("--seeds takes numbers of 0 and more")
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    if plugins:
        given["plugin"] = plugins
    settings = Settings(**{**with_optimizer(given, chosen), **given, "tuner_option": {}})
    settings.root = settings.root or str(Path("data") / settings.data)
    for stride in ("eval_stride", "select_stride"):  # a recipe's does not forbid a smaller crop
        if stride not in given:
            setattr(settings, stride, min(getattr(settings, stride), settings.crop))
    if settings.val and settings.select == "last" and "select" not in given:
        settings.select = "val"
    if not args.resume:  # a resumed run has its own settings; see `resumed_settings`
        settings.tuner_option = read_options(settings.tuner, given.get("tuner_option", []))
        if settings.tuner_option:
            given["tuner_option"] = settings.tuner_option
        settings.complete()
        if settings.seed == -1:
            settings.seed = secrets.randbelow(2**31)
    return settings, given, args


def build_parser(defaults: Settings, description: str) -> Parser:
    """A parser with a flag for every setting; what is not given is not in its namespace."""
    parser = Parser(
        prog="train.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser, defaults)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, by default the newest that is not finished",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="train once with each seed, below --out; what is there is kept or gone on with",
    )
    return parser


def add_settings(parser: Parser, defaults: Settings, without: tuple[str, ...] = ()) -> None:
    """Adds a flag for every setting, and --as-published; what is not given is not in the
    namespace.
    """
    hints = get_type_hints(Settings)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    options = dict(default=argparse.SUPPRESS)
    for f in fields(Settings):
        if f.name in without:
            continue
        kind, value = hints[f.name], getattr(defaults, f.name)
        add = groups[f.metadata["group"]].add_argument
        shown = f"{f.metadata['help']} [{value}]".replace("%", "%%")
        if f.name == "plugin":
            add("--plugin", action="append", metavar="FILE", help=f.metadata["help"], **options)
        elif f.name == "tuner_option":
            listed = ", ".join(f"{n}={v}" for n, v in tuner_options(defaults.tuner).items())
            text = f"{f.metadata['help']} [{defaults.tuner}: {listed or 'none'}]"
            add(flag(f.name), action="append", metavar="NAME=VALUE", help=text, **options)
        elif kind is bool:
            add(flag(f.name), action=argparse.BooleanOptionalAction, help=shown, **options)
        else:
            choices = choices_of(f) or None
            add(flag(f.name), type=kind, choices=choices, help=shown, **options)
    parser.add_argument(
        "--as-published",
        action="store_true",
        help="depart from the paper where the published code does, in training and scoring",
    )


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
    options = given.get("tuner_option", {})
    if isinstance(options, list):  # the words of the command line
        options = read_options(stored.tuner, options)
    given = {**given, "tuner_option": options}
    free = {name: given[name] for name in FREE_ON_RESUME if name in given}
    if lengthen and given.get("epochs", 0) > stored.epochs:
        free["epochs"] = given["epochs"]
    for name, value in given.items():
        ours = getattr(stored, name)
        agrees = value.items() <= ours.items() if isinstance(value, dict) else value == ours
        if name not in free and not agrees:
            raise Mistake(
                f"{flag(name)} {value} contradicts the run in {folder}, which has {ours}; leave it "
                "out"
            )
    settings = replace(stored, **{**free, "out": str(folder)})
    settings.complete()
    return settings
