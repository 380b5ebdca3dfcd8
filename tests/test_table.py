"""Runs beside the paper: what is one row, what stands in it, and what is said below it."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.recipes import PUBLISHED_STRIDES, recipe, with_optimizer
from engine.settings import Settings
from geodata.layouts import VAIHINGEN_TEST_PIXELS
from geodata.rasters import DataError
from mfnet import build_mfnet, count_parameters
from reports.paper import PAPER_ABLATIONS, PAPER_SCORES, PAPER_TRAINED, variant
from reports.runs import read_runs, result_of
from reports.table import HEAD, group, inline, markdown
from reports.table import notes as notes_of

SCORED = dict(labels="eroded labels", window=256, stride=32, repeat_border=False)
SPEED = [dict(epoch=50, images_per_second=20.0, seconds=3.0, peak_memory_mb=2048.0)]
MEANS = ("oa", "mf1", "miou", "kappa")


def made_up(
    folder="runs/a",
    scored=(),
    values=(0.9, 0.8, 0.7, 0.6),
    base=None,
    log=SPEED,
    version="commit a",
    pixels=None,
    **own,
):
    """A run of the recipe of its data set, but for what is given -> (config.json, scores.json,
    log.jsonl) as `result_of` takes.
    """
    data = own.get("data", "vaihingen")
    usual = with_optimizer(own, recipe(data.removeprefix("mm"), own.get("encoder")))
    config = {**dataclasses.asdict(Settings(**usual)), **own, "data": data}
    if "mixing" in own or "rank" in own:  # as runs of an earlier version have it
        config |= {"mixing": True, "rank": 4, **own}
        del config["tuner_option"]
    config |= dict(
        base=base or {"weights": "sam.pth", "sha256": "c0ffee"},
        version=version,
        classes=[["road", [1, 2, 3]]],
    )
    config |= dict(parameters={"trainable": 52_612_814}, processes=1)
    pixels = VAIHINGEN_TEST_PIXELS if pixels is None else pixels
    scores = {
        **SCORED,
        **dict(scored),
        **dict(zip(MEANS, values)),
        "per_class": [{"pixels": n} for n in pixels],
    }
    return Path(folder), config, scores, log


def run_of(*words, **own):
    return result_of(*made_up(*words, **own))


def cells(text):
    """The rows of the tables below their heads, as lists of cells; asserts that all are equally
    wide.
    """
    rows = [
        [cell.strip() for cell in line[1:-1].split(" | ")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert {len(row) for row in rows} == {len(HEAD)}
    return [dict(zip(HEAD, row)) for row in rows if row[0] not in ("run", "---")]


def notes(text, row):
    """What the numbers of a row stand for."""
    numbered = dict(line.split(". ", 1) for line in text.splitlines() if line[:1].isdigit())
    return [numbered[n] for n in row["notes"].split(", ")]


# --------------------------------------------------------------------------------------------- rows

SHARE = st.floats(0, 1)
RUNS = st.lists(
    st.fixed_dictionaries(
        dict(
            seed=st.integers(0, 3),
            workers=st.integers(0, 2),
            out=st.sampled_from(["x", "y"]),
            tuner=st.sampled_from(["adapter", "lora"]),
            lr=st.sampled_from([0.01, 0.5]),
            data=st.sampled_from(["vaihingen", "hunan", "mmhunan"]),
            version=st.sampled_from(["commit a", "commit b"]),
            scored=st.sampled_from(
                [{}, {"stride": 64}, {"repeat_border": True}, {"labels": "full labels"}]
            ),
            values=st.tuples(*[st.one_of(st.none(), SHARE)] * 4),
        )
    ),
    min_size=1,
    max_size=12,
)


@given(RUNS)
def test_every_run_is_in_one_row_with_all_that_differ_from_it_in_the_seed_and_the_machine_alone(
    drawn,
):
    runs = [run_of(f"runs/{i}", **own) for i, own in enumerate(drawn)]

    def kind(own):
        same = {k: v for k, v in own.items() if k not in ("seed", "workers", "out", "values")}
        return json.dumps({**same, "data": same["data"].removeprefix("mm")}, sort_keys=True)

    rows = group(runs)
    assert sorted(int(run.folder.name) for row in rows for run in row) == list(range(len(runs)))
    found = {frozenset(int(run.folder.name) for run in row) for row in rows}
    kinds = [kind(own) for own in drawn]
    assert found == {frozenset(i for i, k in enumerate(kinds) if k == one) for one in kinds}


@given(RUNS)
def test_a_row_holds_mean_and_deviation_of_its_runs_and_the_table_is_even(drawn):
    runs = [run_of(f"runs/{i}", **own) for i, own in enumerate(drawn)]
    text = markdown(runs)
    found = cells(text)
    expected = [
        row
        for data in ("hunan", "vaihingen")
        for row in group([r for r in runs if r.traits["data"] == data])
    ]
    assert len(found) == len(expected)
    for shown, row in zip(found, expected):
        for name, key in zip(("OA", "mF1", "mIoU", "kappa"), MEANS):
            values = 100 * np.array([run.scores[key] for run in row if run.scores[key] is not None])
            parts = (
                []
                if not len(values)
                else [values.mean()]
                if len(values) == 1
                else [values.mean(), values.std(ddof=1)]
            )
            numbers = (
                [float(part) for part in shown[name].split(" +- ")] if shown[name] != "-" else []
            )
            assert len(numbers) == len(parts) and np.allclose(numbers, parts, atol=0.00501)
        seeds = len({run.seed for run in row})
        assert shown["seeds"] == (
            f"{seeds}" if seeds == len(row) else f"{seeds} in {len(row)} runs"
        )
        assert float(shown["images/s"]) == 20 and shown["memory, GiB"] == "2.00"
    for run in runs:
        assert text.count(f"`{run.folder.as_posix()}`") == 1


@pytest.mark.parametrize("select", ["last", "test"])
def test_only_what_moves_no_score_is_left_out_of_what_makes_a_row(select):
    other = {"int": 7, "float": 0.25, "str": "x", "bool": None, "dict": {"own": 1}}
    _, config, scores, log = made_up(select=select, seed=0)
    apart = set()
    for f in dataclasses.fields(Settings):
        value = not config[f.name] if f.type == "bool" else other[f.type]
        changed = result_of(Path("b"), {**config, f.name: value}, scores, log)
        if len(group([result_of(Path("a"), config, scores, log), changed])) == 2:
            apart.add(f.name)
    free = set(
        "out root weights workers device save_every memory_gb seed checkpointing compile "
        "deterministic accumulate".split()
    )
    free |= (
        set("eval_every eval_stride select_stride repeat_border full_labels".split())
        if select == "last"
        else set()
    )
    assert apart == {f.name for f in dataclasses.fields(Settings)} - free


def test_other_code_another_base_and_other_pixels_are_other_rows_but_random_bases_are_one():
    assert len(group([run_of(), run_of(version="commit b")])) == 2
    assert len(group([run_of(), run_of(base={"weights": "sam.pth", "sha256": "beef"})])) == 2
    assert len(group([run_of(), run_of(pixels=(5, 6))])) == 2
    random = [run_of(seed=i, base={"weights": "random", "sha256": f"{i}"}) for i in range(3)]
    assert len(group(random)) == 1


# ---------------------------------------------------------------------------------------- the paper


@pytest.mark.parametrize("tuner, encoder", PAPER_TRAINED)
def test_the_parameters_beside_the_paper_s_scores_are_those_of_the_network(tuner, encoder):
    with torch.device("meta"):
        counts = count_parameters(build_mfnet(encoder, tuner))
    trained, printed = PAPER_TRAINED[tuner, encoder]
    assert counts["trainable"] == trained and printed == pytest.approx(
        counts["tuner"] / 1e6 + 6.22, abs=0.0051
    )


@pytest.mark.parametrize(
    "own, scores, trained",
    [
        (dict(), "92.93 / 91.51 / 84.72", "52.61 (it prints 56.67)"),
        (
            dict(tuner="lora", encoder="vit_b", data="potsdam"),
            "90.57 / 91.48 / 84.61",
            "3.19 (it prints 7.25)",
        ),
        (dict(data="mmhunan"), "80.93 / 65.33 / 51.82", "52.61 (it prints 56.67)"),
        (dict(modalities="image"), "92.02 / 90.94 / 83.69", ""),
        (dict(modalities="image", tuner="frozen"), "88.01 / 85.34 / 75.11", ""),
        (dict(tuner="standard-adapter"), "92.80 / 91.30 / 84.35", ""),
        (dict(tuner="standard-lora"), "91.86 / 89.90 / 82.06", ""),
        (dict(fusion="sum", tuner="lora"), "92.02 / 90.64 / 83.24", ""),
        (dict(tuner="lora", rank=4), "92.22 / 91.09 / 83.96", "4.91 (it prints 8.97)"),
        (dict(tuner="lora", rank=8), "", ""),
        (dict(mixing=False), "", ""),
        (dict(tuner="lora", mixing=False), "", ""),
        (dict(fusion="sum", mixing=False), "", ""),
        (dict(fusion="sum", modalities="image"), "", ""),
        (dict(modalities="image", encoder="vit_b"), "", ""),
        (dict(modalities="dsm"), "", ""),
        (dict(tuner="frozen"), "", ""),
        (dict(encoder="vit_t"), "", ""),
        (dict(data="hunan", tuner="lora"), "", ""),
        (dict(data="potsdam", mixing=False), "", ""),
        (dict(data="synthetic"), "", ""),
        (dict(data="tiles"), "", ""),
    ],
    ids=str,
)
def test_the_paper_s_row_stands_beside_runs_of_its_data_tuner_and_encoder_alone(
    own, scores, trained
):
    (row,) = cells(markdown([run_of(**own)]))
    assert row["the paper: OA / mF1 / mIoU"] == scores and row["the paper: trained, M"] == trained
    assert row["trained, M"] == "52.61"


def test_the_tables_of_the_paper_are_complete_but_for_the_row_that_is_doubtful():
    sizes = [(tuner, size) for tuner in ("adapter", "lora") for size in ("vit_b", "vit_l", "vit_h")]
    expected = {(data, *size) for data in ("vaihingen", "potsdam", "hunan") for size in sizes}
    expected |= {("vaihingen", f"standard-{tuner}", "vit_l") for tuner in ("lora", "adapter")}
    assert set(PAPER_SCORES) == expected - {("hunan", "lora", "vit_l")}
    assert set(PAPER_TRAINED) == set(sizes) and len(PAPER_ABLATIONS) == 5
    assert any(
        "another method's" in note for note in notes_of(run_of(data="hunan", tuner="lora").traits)
    )


options = st.dictionaries(st.sampled_from(["rank", "ratio", "alpha", "own"]), st.integers(2, 9))


@given(options, st.booleans(), st.sampled_from(["image", "image+dsm"]))
def test_options_of_the_tuner_are_part_of_a_row_s_name_in_runs_of_any_version(
    given_options, mixing, modalities
):
    settings = dict(tuner="lora", fusion="dfm", modalities=modalities)
    found = variant({**settings, "tuner_option": {**given_options, "mixing": mixing}})
    parts = set(found.split(", ")) - {""}
    expected = {f"{k} {v}" for k, v in given_options.items() if (k, v) != ("rank", 4)}
    expected |= {"image only"} if modalities == "image" else set() if mixing else {"no mixing"}
    assert parts == expected
    old = {**settings, "mixing": mixing, "rank": given_options.get("rank", 4)}
    kept = {k: v for k, v in given_options.items() if k == "rank"}
    new = {**settings, "tuner_option": {**kept, "mixing": mixing}}
    assert variant(old) == variant(new) and variant({**new, "mixing": not mixing}) == variant(new)


# ---------------------------------------------------------------------------------------- the notes


@pytest.mark.parametrize("data", PUBLISHED_STRIDES)
@pytest.mark.parametrize("encoder", ["vit_l", "vit_h"])
def test_a_run_as_published_differs_in_nothing_and_a_note_names_each_thing_that_does(data, encoder):
    during, final = PUBLISHED_STRIDES[data]
    own = dict(data=data, encoder=encoder, **recipe(data, encoder, as_published=True))
    scored = dict(stride=final, repeat_border=True)
    plain = notes_of(run_of(scored=scored, **own).traits)
    assert [note.split()[1] for note in plain] == ["pixels", "by"]
    for changed, note in (
        (dict(select="last"), "`--select`: last; the published code: test"),
        (dict(epochs=9), "`--epochs`: 9; the published code: 50"),
        (dict(relative_positions="sam"), "`--relative-positions`: sam; the published code: zero"),
        (dict(early_drops=False), "`--early-drops`: off; the published code: on"),
        (dict(splits="official"), "`--splits`: official; the published code: paper"),
        (dict(val="7,32"), "`--val`: 7,32; the published code: none"),
        (
            dict(optimizer="adamw", lr=0.01, weight_decay=5e-4),
            "`--optimizer`: adamw; the published code: sgd",
        ),
        (dict(labels="dataset"), "`--labels`: dataset; the published code: published"),
        (
            dict(select_stride=64),
            f"`--stride` while choosing the epoch: 64; the published code: {during}",
        ),
        (
            dict(scored={**scored, "stride": 64}),
            f"scored at stride: 64; the published code: {final}",
        ),
        (
            dict(scored={**scored, "repeat_border": False}),
            "border windows: once; the published code: repeated",
        ),
        (
            dict(scored={**scored, "labels": "full labels"}),
            "scored by labels: full; the published code: eroded",
        ),
        (dict(base={"weights": "random"}), "weights: random; the published code: SAM's"),
    ):
        found = notes_of(run_of(**{"scored": scored, **own, **changed}).traits)
        assert [
            line
            for line in found
            if line.split()[0] not in {n.split()[0] for n in plain} and line not in plain
        ] == [note]


def test_on_own_tiles_notes_name_what_the_recipe_has_not():
    found = notes_of(
        run_of(data="tiles", epochs=30, scored=dict(labels="all labels", stride=128)).traits
    )
    assert found[:-2] == ["`--epochs`: 30; the recipe: 8"] and found[-1].endswith("SHA-256 c0ffee")


def test_pixels_that_are_not_the_paper_s_are_told():
    for own, told in (
        (dict(), False),
        (dict(pixels=(5, 6)), True),
        (dict(pixels=(5, 6), scored=dict(labels="full labels")), False),
    ):
        assert any("so these are others" in note for note in notes_of(run_of(**own).traits)) == told


def test_rows_share_the_numbers_of_the_notes_that_they_share():
    text = markdown([run_of("a"), run_of("b", scored=dict(stride=64)), run_of("c", data="potsdam")])
    potsdam, one, other = cells(text)
    text = text[text.index("## vaihingen") :]
    assert set(notes(text, other)) - set(notes(text, one)) == {
        "scored at stride: 64; the published code: 32"
    }
    assert set(notes(text, one)) < set(notes(text, other)) and text.count("early-drops") == 1


# ------------------------------------------------------------------------------------------ reading


def write_run(folder, **own):
    folder.mkdir(parents=True)
    _, config, scores, log = made_up(folder, **own)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def edit(name, change):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda f: (f / "scores.json").unlink(), "not finished"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "log.jsonl").unlink(), "not finished, log.jsonl ends at epoch 0 of 50"),
        (lambda f: (f / "log.jsonl").write_text(""), "ends at epoch 0 of 50"),
        (lambda f: (f / "log.jsonl").write_text('{"epoch": 11}\n'), "ends at epoch 11 of 50"),
        (edit("scores.json", lambda s: s.update(stride=64)), "scored with stride 64, .* with 32"),
        (edit("scores.json", lambda s: s.update(window=128)), "scored with window 128"),
        (edit("scores.json", lambda s: s.update(repeat_border=True)), "repeat_border True"),
        (edit("scores.json", lambda s: s.update(labels="full labels")), "scored with full labels"),
        (edit("config.json", lambda c: c.update(full_labels=True)), "scored with eroded labels"),
        (lambda f: (f / "scores.json").write_text('{"oa": 0.'), "damaged"),
        (lambda f: (f / "scores.json").write_text("[]"), "damaged"),
        (lambda f: (f / "scores.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
        (lambda f: (f / "log.jsonl").write_text("7\n"), "damaged"),
        (edit("scores.json", lambda s: s.pop("miou")), "damaged"),
        (edit("scores.json", lambda s: s.update(miou="good\n## better")), "damaged"),
        (edit("scores.json", lambda s: s.pop("stride")), "evaluate.py --run"),
        (edit("config.json", lambda c: c.update(base=None)), "damaged"),
        (edit("config.json", lambda c: c.pop("version")), "damaged"),
        (edit("config.json", lambda c: c.update(epochs="many")), "damaged"),
    ],
)
def test_a_run_without_a_result_of_its_own_is_left_out_in_one_line_and_the_others_stay(
    tmp_path, damage, why
):
    good, bad = write_run(tmp_path / "many" / "seed-0"), write_run(tmp_path / "bad")
    damage(bad)
    runs, skipped = read_runs([tmp_path])
    assert [run.folder for run in runs] == [good] and runs[0] == run_of(good)
    (line,) = skipped
    assert line.startswith(f"skipped {bad}: ") and re.search(why, line) and "\n" not in line
    with pytest.raises(DataError, match="of 1 runs below .* none can be shown"):
        read_runs([bad])


def test_a_run_is_read_once_however_often_its_folder_is_named(tmp_path):
    folder = write_run(tmp_path / "runs" / "a")
    runs, _ = read_runs([tmp_path, tmp_path / "runs", folder, folder / ".." / "a"])
    (row,) = cells(markdown(runs))
    assert row["seeds"] == "1"
    with pytest.raises(DataError, match="nowhere: there is no run"):
        read_runs([folder, tmp_path / "nowhere"])


def test_memory_is_the_highest_and_speed_the_mean_of_all_epochs():
    memories, seconds = (1024.0, 3072.0, None, 2048.0), (1.0, 2.0, 3.0, 4.0)
    log = [
        dict(images_per_second=10 * t, seconds=t, peak_memory_mb=m)
        for t, m in zip(seconds, memories)
    ]
    (row,) = cells(markdown([run_of(log=log)]))
    assert (row["memory, GiB"], row["images/s"]) == ("3.00", "30")


def test_labels_of_one_kind_and_null_scores_are_results_and_unknown_figures_are_empty(tmp_path):
    log = [dict(epoch=50, images_per_second=0.0, seconds=0, peak_memory_mb=None)]
    own = dict(log=log, values=(0.5, None, None, None), scored=dict(labels="all labels (official)"))
    runs, skipped = read_runs([write_run(tmp_path / "a", full_labels=True, **own)])
    (row,) = cells(markdown(runs))
    assert not skipped and (row["OA"], row["mF1"], row["mIoU"], row["kappa"]) == ("50.00", *"---")
    assert (row["images/s"], row["memory, GiB"]) == ("", "")


HOSTILE = st.text(st.sampled_from("a|\n\r\u2028\\`<>*[]#& \t"), max_size=12)


@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
def test_no_text_of_a_run_s_files_opens_a_line_a_cell_or_a_tag(data, tuner, version, name):
    def shape(text):
        return [line[:2] for line in text.splitlines()]

    run = run_of(f"runs/{name}", data="tiles", class_weights="1", version="commit a")
    changed = {"data": data, "tuner": tuner, "class_weights": name or "1", "version": version}
    text = markdown([dataclasses.replace(run, traits={**run.traits, **changed})])
    calm = markdown([dataclasses.replace(run, traits={**run.traits, "data": "other"})])
    assert len(cells(text)) == 1 and shape(text) == shape(calm)
    folders = text[text.rindex("\n- ") :]  # a folder stands in code, where a tag is none
    assert "<" not in text.removesuffix(folders).replace("\\<", "")
    assert re.match(r"\n- .*: `[^`\n]*`\n\n", folders)


@given(HOSTILE)
def test_inline_text_is_one_line_without_bars_tags_and_links(text):
    found = inline(text)
    bare = re.sub(r"\\.", "", found)
    assert not re.search(r"[|<`*\[\n\r\u2028]", bare)
    assert re.sub(r"\\(.)", r"\1", found) == " ".join(text.split())
