"""Settings: recipes, the command line, and what files hold of them."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.commandline import parse_settings, resumed_settings
from engine.console import Mistake
from engine.recipes import command_of, different_from_recipe
from engine.settings import Settings
from tuners import TUNERS, tuner_options

FIELDS = dataclasses.fields(Settings)


def parsed(words):
    return parse_settings(words.split())[0]


# ----------------------------------------------------------------------------------------- recipes


def test_the_recipe_of_vaihingen_is_the_paper_s():
    settings, given_by_hand, args = parse_settings(["--data", "vaihingen"])
    paper = dict(
        encoder="vit_l", weights="auto", tuner="adapter", modalities="image+dsm", fusion="dfm",
        tuner_option={"ratio": 0.25, "mixing": True, "blocks": "all"}, crop=256, augment="flips",
        batch_size=10, epochs=50, steps=1000, optimizer="sgd", lr=0.01, weight_decay=5e-4,
        schedule="multistep", eval_stride=32, select_stride=0, precision="fp32",
    )  # fmt: skip
    assert {name: getattr(settings, name) for name in paper} == paper
    assert given_by_hand == {"data": "vaihingen"} and not args.resume


@pytest.mark.parametrize(
    "data, changes",
    [
        ("potsdam", dict(precision="fp32")),
        ("hunan", dict(precision="fp32", steps=500, eval_stride=128, image_scaling="reflectance")),
    ],
)
def test_the_other_benchmarks_differ_from_vaihingen_in_this_alone(data, changes):
    plain = dataclasses.asdict(parsed(f"--data {data}"))
    paper = dataclasses.asdict(parsed("--data vaihingen"))
    assert plain == {**paper, **changes, "data": data, "root": f"data/{data}"}


@pytest.mark.parametrize("data", ["vaihingen", "potsdam", "hunan"])
@pytest.mark.parametrize("flags", ["", " --as-published"])
def test_the_largest_encoder_trains_with_a_batch_of_4_as_the_paper_says(data, flags):
    assert parsed(f"--data {data} --encoder vit_h{flags}").batch_size == 4
    assert parsed(f"--data {data} --encoder vit_h --batch-size 6{flags}").batch_size == 6
    assert parsed(f"--data {data} --encoder vit_b{flags}").batch_size == 10


@pytest.mark.parametrize(
    "data, encoder, weights", [("tiles", "vit_l", "auto"), ("synthetic", "vit_t", "auto")]
)
def test_the_other_recipes_are_short_ones_of_adamw(data, encoder, weights):
    settings = parsed(f"--data {data}")
    assert (settings.encoder, settings.weights, settings.optimizer) == (encoder, weights, "adamw")
    assert settings.epochs * settings.steps <= 500


@pytest.mark.parametrize("data", ["vaihingen", "tiles", "synthetic"])
def test_an_optimiser_brings_a_rate_and_a_decay_of_its_own(data):
    assert [
        (s.lr, s.weight_decay)
        for s in (parsed(f"--data {data} --optimizer {name}") for name in ("sgd", "adamw"))
    ] == [(0.01, 5e-4), (2e-3 if data == "synthetic" else 1e-3, 0.01)]
    own = parsed(f"--data {data} --optimizer adamw --lr 0.5 --weight-decay 0")
    assert (own.lr, own.weight_decay) == (0.5, 0)


PUBLISHED = dict(
    relative_positions="zero", labels="published", select="test", repeat_border=True,
    crop_range="published", early_drops=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "data, more",
    [
        ("vaihingen", {}),
        ("potsdam", dict(select_stride=128)),
        ("hunan", dict(select_stride=256, image_scaling="minmax8", heights="minmax8")),
    ],
)
def test_as_published_sets_all_that_the_published_code_does_otherwise_and_nothing_else(data, more):
    plain, published = parsed(f"--data {data}"), parsed(f"--data {data} --as-published")
    assert published.seed >= 0  # drawn
    expected = {**PUBLISHED, **more, "seed": published.seed}
    assert dataclasses.asdict(published) == {**dataclasses.asdict(plain), **expected}


@pytest.mark.parametrize("name, value", PUBLISHED.items())
def test_each_published_departure_goes_by_itself(name, value):
    flag = "--" + name.replace("_", "-")
    plain = dataclasses.asdict(parsed("--data vaihingen"))
    words = ["--data", "vaihingen", *([flag] if value is True else [flag, str(value)])]
    assert dataclasses.asdict(parse_settings(words)[0]) == {**plain, name: value}


def test_what_differs_from_the_recipe_is_said_by_name():
    assert different_from_recipe(parsed("--data vaihingen")) == "the recipe as it stands"
    assert different_from_recipe(parsed("--precision fp32")) == "the recipe as it stands"
    assert "--precision=fp32" in command_of(parsed("--precision fp32"))  # auto is bf16 elsewhere
    assert different_from_recipe(parsed("--precision bf16")) == "the recipe with precision bf16"
    words = "--data vaihingen --tuner lora --tuner-option rank=8 --epochs 3"
    text = different_from_recipe(parsed(words))
    assert all(part in text for part in ("tuner lora", "rank 8", "epochs 3")) and "lr" not in text


# --------------------------------------------------------------------------------- the command line


def test_the_command_line_without_a_word_is_the_synthetic_city():
    settings, given_by_hand, _ = parse_settings([])
    assert settings.data == "synthetic" and given_by_hand == {}
    assert settings.root == str(Path("data") / "synthetic")


def test_what_is_given_by_hand_overrides_the_recipe_and_nothing_else():
    words = "--data tiles --epochs 3 --lr 0.5 --clip 1 --root /a"
    changed = dict(data="tiles", epochs=3, lr=0.5, clip=1.0, root="/a")
    settings, given_by_hand, _ = parse_settings(words.split())
    assert given_by_hand == changed
    assert dataclasses.asdict(settings) == {**dataclasses.asdict(parsed("--data tiles")), **changed}


@pytest.mark.parametrize(
    "words",
    [
        "--data synthetic",
        "--data potsdam --root /a/b --tuner lora --tuner-option rank=8 --no-early-drops --val 7,32",
        "--data vaihingen --as-published --encoder vit_h --batch-size 2",
        "--data tiles --optimizer sgd --class-weights balanced --balance-crops --out o",
        "--data hunan --stride 64 --gradient-checkpointing --tuner-option mixing=false",
        "--data tiles --heights=-20:40 --image-scaling=-1:1 --drop-modality 0.3",
    ],
)
def test_the_command_that_is_kept_with_a_run_gives_its_settings(words):
    settings = parsed(words)
    settings.out = "runs/it's one"
    script, *again = shlex.split(command_of(settings))[1:]
    assert script == "train.py" and parse_settings(again)[0] == settings


def test_names_of_before_are_still_understood_and_not_shown(capsys):
    assert parsed("--eval-stride 48 --checkpointing") == parsed(
        "--stride 48 --gradient-checkpointing"
    )
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    out = capsys.readouterr().out
    assert "--stride" in out and "--eval-stride" not in out and "--checkpointing" not in out


def test_start_or_continue_wants_to_know_the_run_again(capsys):
    for words in ("", "--out run --seed -1", "--out run --data vaihingen --as-published"):
        with pytest.raises(SystemExit) as end:
            parse_settings(["--start-or-continue", *words.split()])
        assert end.value.code == 2 and "needs --out and --seed" in capsys.readouterr().err


@pytest.mark.parametrize("f", FIELDS, ids=lambda f: f.name)
def test_every_setting_is_a_flag_that_is_read_in_its_own_type(f):
    if f.name in ("plugin", "tuner_option", "kinds"):
        return
    flag = "--" + f.name.replace("_", "-")
    choices = f.metadata["choices"]
    choices = choices() if callable(choices) else choices
    texts = {"heights": "1:2", "image_scaling": "3:4", "drop_only": "dsm"}
    text = texts.get(f.name, (choices or ("x",))[-1])
    value = {"int": 65, "float": 0.25, "str": text, "bool": False}[f.type]
    words = ["--no-" + flag[2:]] if f.type == "bool" else [flag, str(value)]
    extra = {
        "crop": ["--stride", "65"],
        "select": ["--val", "2"],
        "accumulate": ["--batch-size", "130"],
        "val": ["--select", "last"],
        "drop_only": ["--drop-modality", "0.5"],
    }.get(f.name, [])
    settings, _, _ = parse_settings([*words, *extra])
    assert getattr(settings, f.name) == value and type(getattr(settings, f.name)) is type(f.default)


def test_held_out_tiles_are_chosen_by_unless_something_else_is_said():
    assert parsed("--val 2").select == "val" and parsed("--val 2 --select last").select == "last"


def test_two_runs_without_a_seed_differ():
    assert len({parsed("--seed -1").seed for _ in range(5)}) > 1


BAD = "crop 32, stride 0, stride 129, select-stride -1, select-stride 129, batch-size 0, "
BAD += "epochs 0, steps -1, lr 0, lr nan, lr inf, seed 12345678901234567890, seed -2, workers -2, "
BAD += "accumulate 3, clip nan, memory-gb -1, label-smoothing 1, select val, warmup -1, "
BAD += "weight-decay inf"


@pytest.mark.parametrize("words", BAD.split(", "))
def test_a_setting_that_cannot_work_is_refused_by_its_flag(words):
    with pytest.raises(Mistake, match=f"--{words}"):
        parsed(f"--{words}")


@pytest.mark.parametrize(
    "words, meant",
    [
        ("--batch_size 4", "--batch-size"),
        ("--batchsize 4", "--batch-size"),
        ("--ecoder vit_b", "--encoder"),
        ("--epoch 4", "--epochs"),
        ("--no-mixin", "no flag"),
        ("stray", "stray is no flag"),
    ],
)
def test_a_flag_that_is_not_quite_one_is_refused_with_the_one_that_was_meant(words, meant, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(words)
    err = capsys.readouterr().err
    assert end.value.code == 2 and meant in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("words", ["--seeds 0 -1", "--resume --seeds 1", "--resume --as-published"])
def test_switches_that_make_no_sense_together_are_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(words)
    assert end.value.code == 2 and "--seeds" in capsys.readouterr().err


@pytest.mark.parametrize("data, rate", [("vaihingen", "0.01"), ("synthetic", "0.002")])
def test_help_shows_the_defaults_of_the_chosen_data_set_in_five_groups(data, rate, capsys):
    with pytest.raises(SystemExit):
        parsed(f"--data {data} --help")
    text = " ".join(capsys.readouterr().out.split())
    assert f"learning rate at its highest [{rate}]" in text
    for group in ("network", "data", "training", "score", "machine"):
        assert f" {group}: --" in text
    assert "[adapter: ratio=0.25, mixing=True, blocks=all]" in text


# --------------------------------------------------------------------------- options of the tuner


@pytest.mark.parametrize("tuner", TUNERS)
def test_the_options_of_a_tuner_are_filled_in_and_kept(tuner):
    assert parsed(f"--tuner {tuner}").tuner_option == tuner_options(tuner)


def test_an_option_is_read_in_the_type_of_its_default():
    s = parsed("--tuner lora --tuner-option rank=2 --tuner-option mixing=false")
    assert s.tuner_option == {"rank": 2, "alpha": 1.0, "mixing": False, "blocks": "all"}
    assert parsed("--tuner ssf --tuner-option blocks=2").tuner_option["blocks"] == "2"
    assert parsed("--tuner partial").tuner_option == {"blocks": "2"}


@pytest.mark.parametrize(
    "words, parts",
    [
        ("--tuner frozen --tuner-option rank=2", ["frozen", "none"]),
        ("--tuner frozen --tuner-option blocks=late", ["frozen", "none"]),
        ("--tuner adapter --tuner-option rank=2", ["adapter", "ratio=0.25", "mixing=True"]),
        ("--tuner lora --tuner-option rank=two", ["rank"]),
        ("--tuner lora --tuner-option rank", ["rank"]),
        ("--tuner standard-adapter --tuner-option mixing=false", ["mixing", "ratio"]),
    ],
)
def test_an_option_that_a_tuner_does_not_have_is_refused_with_those_it_has(words, parts):
    with pytest.raises(Mistake) as raised:
        parsed(words)
    line = str(raised.value)
    assert "\n" not in line and all(part in line for part in ["--tuner-option", *parts]), line


# -------------------------------------------------------------------------------- files and resume

values = {int: st.integers(1, 100), float: st.floats(1e-6, 0.9), bool: st.booleans()}


@given(st.integers(1, 50), st.floats(1e-6, 1), st.booleans(), st.sampled_from(sorted(TUNERS)))
def test_settings_come_back_from_json_as_they_were(epochs, lr, border, tuner):
    s = Settings(epochs=epochs, lr=lr, repeat_border=border, tuner=tuner)
    s.complete()
    assert Settings.from_dict(json.loads(json.dumps(dataclasses.asdict(s))), "config.json") == s


OLD = dict(
    data="synthetic", root="city", out="run", encoder="vit_t", weights="none",
    relative_positions="sam", tuner="lora", mixing=False, rank=2, modalities="image+dsm",
    fusion="dfm", bands="", labels="dataset", splits="paper", full_labels=False, heights="minmax",
    image_scaling="unit", memory_gb=4.5, crop=128, crop_range="full", batch_size=8, epochs=10,
    steps=30, accumulate=1, optimizer="adamw", lr=0.002, weight_decay=0.01, schedule="cosine",
    early_drops=False, warmup=20, clip=0.0, label_smoothing=0.0, class_weights="", val="",
    select="last", eval_every=0, eval_stride=64, repeat_border=False, precision="auto",
    checkpointing=False, compile=False, deterministic=False, seed=0, save_every=0, workers=-1,
    device="auto",
)  # fmt: skip


@pytest.mark.parametrize(
    "tuner, options",
    [
        ("lora", {"rank": 2, "alpha": 1.0, "mixing": False, "blocks": "all"}),
        ("adapter", {"ratio": 0.25, "mixing": False, "blocks": "all"}),
        ("frozen", {}),
    ],
)
def test_settings_of_the_version_before_are_read_as_what_they_meant(tuner, options):
    s = Settings.from_dict({**OLD, "tuner": tuner}, "model.pt")
    same = {k: v for k, v in OLD.items() if k not in ("mixing", "rank", "tuner")}
    assert {name: getattr(s, name) for name in same} == same
    assert (s.tuner, s.tuner_option, s.augment, s.select_stride) == (tuner, options, "flips", 0)
    assert Settings.from_dict({**OLD, "data": "mmhunan"}, "model.pt").data == "hunan"


@pytest.mark.parametrize(
    "changes, part",
    [
        (dict(colour="blue"), "newer version (colour)"),
        (dict(crop="../.."), "crop"),
        (dict(crop=64.0), "crop"),
        (dict(batch_size=True), "batch_size"),
        (dict(batch_size=0), "--batch-size 0"),
        (dict(lr=float("nan")), "--lr nan"),
        (dict(schedule="onecycle"), "onecycle"),
        (dict(tuner="magic"), "magic"),
        (dict(tuner_option={"rank": "4"}), "rank"),
        (dict(root=None), "root"),
        (dict(heights="up"), "--heights up"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_a_run_s_are_one_line_that_names_the_file(changes, part):
    with pytest.raises(Mistake) as raised:
        Settings.from_dict({**OLD, **changes}, "some/model.pt")
    line = str(raised.value)
    assert line.startswith("some/model.pt: ") and part in line and "\n" not in line
    with pytest.raises(Mistake, match="some/model.pt"):
        Settings.from_dict(["--lr"], "some/model.pt")


def test_a_resumed_run_has_its_own_settings_and_what_may_be_given_anew():
    stored = parsed("--tuner lora --tuner-option rank=2")
    words = "--resume --workers 3 --accumulate 2 --gradient-checkpointing --epochs 20"
    words += " --tuner-option rank=2"
    _, given_by_hand, _ = parse_settings(words.split())
    s = resumed_settings(stored, given_by_hand, Path("run"))
    changed = dict(workers=3, accumulate=2, checkpointing=True, epochs=20, out="run")
    assert dataclasses.asdict(s) == {**dataclasses.asdict(stored), **changed}


@pytest.mark.parametrize(
    "words",
    ["--lr 0.5", "--epochs 9", "--tuner adapter", "--tuner-option rank=8", "--crop 64", "--seed 1"],
)
def test_a_flag_that_contradicts_the_resumed_run_is_refused(words):
    stored = parsed("--tuner lora --tuner-option rank=2")
    _, given_by_hand, _ = parse_settings(["--resume", *words.split()])
    with pytest.raises(Mistake, match="contradicts the run in run"):
        resumed_settings(stored, given_by_hand, Path("run"))


@pytest.mark.parametrize("data", ["tiles", "hunan", "vaihingen"])
def test_a_crop_below_the_recipe_s_stride_brings_a_stride_of_its_own(data):
    s, _, _ = parse_settings(["--data", data, "--crop", "64"])
    assert s.eval_stride == min(64, parse_settings(["--data", data])[0].eval_stride)
    with pytest.raises(Mistake, match="stride 65"):
        parse_settings(["--data", data, "--crop", "64", "--stride", "65"])
