"""The page of a run: everything in it, nothing from outside."""

import base64
import html.parser
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from engine.scoring import ConfusionMatrix
from geodata.rasters import DataError
from geodata.scaling import TileScale
from geodata.tiles import LoadedTile
from reports.page import COLORS, STYLE, class_legend, figure, percent, recolored, table
from reports.panels import save_panel, shade_confidence
from reports.report import text_on, write_report

CLASSES = (("ground", (255, 255, 255)), ("<b>roof</b>", (0, 0, 255)))


class Reader(html.parser.HTMLParser):
    """Collects what the page shows and what it would fetch."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.links, self.open = [], "", [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "img", "input", "path", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(params=[1, 5])
def run(request, tmp_path):
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 2, (2, 90, 70)).astype(np.uint8)
    matrix = ConfusionMatrix(2)
    matrix.update(pred, truth)
    scores = {**matrix.scores(), "split": "test", "convention": "each window <once>"}
    for row, (name, _) in zip(scores["per_class"], CLASSES):
        row["name"] = name
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    config = dict(
        data="vaihingen", encoder="vit_l", tuner="adapter", modalities="image+dsm", fusion="dfm",
        lr=0.125, version="commit & co", parameters={"encoder": 1234567},
        base={"weights": "sam.pth"}, classes=CLASSES, seed=17,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    entry = dict(loss=0.5, images_per_second=7.5, peak_memory_mb=None, seconds=60)
    lines = [json.dumps({**entry, "epoch": e + 1, "miou": 0.1 * e}) for e in range(request.param)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "pictures").mkdir()
    image = rng.integers(0, 256, (90, 70, 3)).astype(np.uint8)
    dsm = rng.normal(size=(90, 70)).astype(np.float32)
    tile = LoadedTile("7", image, dsm, truth, TileScale((-3.0, 3.0)))
    sure = rng.integers(50, 101, (90, 70)).astype(np.uint8)
    save_panel(tmp_path / "pictures" / "test_7.png", tile, pred, sure, CLASSES)
    return tmp_path, scores


def page_of(folder):
    write_report(folder)
    page = Reader()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    assert not page.open and not {"script", "link", "i"} & set(page.tags)
    return page


def edit(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def test_the_page_holds_the_run_and_needs_nothing_from_outside(run):
    folder, scores = run
    page = page_of(folder)
    inside = [link for link in page.links if link.startswith("data:image/")]
    assert set(page.links) - set(inside) == {"pictures/test_7.png"} and page.tags.count("a") == 1
    assert page.tags.count("b") == 3  # the large numbers
    titles = ["image", "truth", "prediction", "errors (magenta)", "confidence (dark: unsure)"]
    assert page.tags.count("figure") == 6 and all(title in page.text for title in titles)
    assert len(inside) == 6 + 2  # truth and prediction in two palettes
    shown = [f"{100 * scores[k]:.2f}" for k in ("oa", "mf1", "miou", "kappa")]
    for part in [*shown, "84.72", "<b>roof</b>", "each window <once>", "1,234,567", "lr: 0.125",
                 "test tile 7", "commit & co, seed 17"]:  # fmt: skip
        assert part in page.text, part
    assert page.tags.count("svg") == 2 and "scores do not compare" not in page.text


def test_the_means_say_how_many_classes_they_average_and_the_others_are_grey(run):
    folder, _ = run
    assert "mIoU (2 classes)" in page_of(folder).text
    matrix = ConfusionMatrix(6, scored=range(5))
    matrix.update(np.array([0, 1, 2, 3, 4, 5, 1]), np.array([0, 1, 2, 3, 3, 5, 0]))
    scores = json.loads((folder / "scores.json").read_text())
    scores |= matrix.scores()
    for row in scores["per_class"]:
        row["name"] = "k"
    (folder / "scores.json").write_text(json.dumps(scores))
    page = page_of(folder)
    assert "mIoU (5 classes)" in page.text and "mF1 (5 classes)" in page.text
    assert (folder / "report.html").read_text().count('class="dim"') == 6  # clutter's row
    matrix.counts[:, 4] = matrix.counts[4] = 0  # a class that occurs nowhere is in no mean
    scores |= matrix.scores()
    for row in scores["per_class"]:
        row["name"] = "k"
    (folder / "scores.json").write_text(json.dumps(scores))
    assert "mIoU (4 classes)" in page_of(folder).text
    edit(folder / "config.json", data="of a plugin")  # which classes it averages is not known
    assert "classes)" not in page_of(folder).text


def test_random_weights_the_command_and_the_date_stand_above_the_scores(run):
    folder, _ = run
    edit(folder / "config.json", base={"weights": "random"}, command="python <x>", date="1 May")
    text = page_of(folder).text
    for part in ("scores do not compare with the paper", "seed 17, 1 May", "python <x>"):
        assert text.index(part) < text.index("Scores"), part


def test_a_panel_of_an_earlier_version_is_shown_whole(run):
    folder, _ = run
    path = folder / "pictures" / "test_7.png"
    Image.open(path).convert("RGB").save(path)
    page = page_of(folder)
    assert page.tags.count("figure") == 1 and "test tile 7" in page.text


def test_scores_by_other_labels_are_a_row_and_notes_are_shown(run):
    folder, _ = run
    matrix = ConfusionMatrix(2)
    matrix.update(np.array([0, 0, 1]), np.array([0, 1, 1]))
    edit(folder / "scores.json", full_labels=matrix.scores(), notes=["tile 7 lacks <something>"])
    page = page_of(folder)
    assert "this run, full labels66.67" in page.text and "tile 7 lacks <something>" in page.text


def test_a_run_that_the_paper_has_no_row_for_shows_none(run):
    folder, _ = run
    assert "the paper (" in page_of(folder).text
    config = (folder / "config.json").read_text()
    for other in (
        dict(modalities="dsm"),
        dict(encoder="vit_b", fusion="sum"),
        dict(mixing=False),
        dict(tuner_option={"mixing": False}),
        dict(tuner_option={"ratio": 0.5}),
        dict(tuner="<i>own</i>", data="<i>"),
    ):
        (folder / "config.json").write_text(config)
        edit(folder / "config.json", **other)
        assert "the paper (" not in page_of(folder).text


# ------------------------------------------------------------------------ what is missing or broken


def test_a_page_is_made_of_what_there_is(run):
    folder, scores = run
    for path in [folder / "config.json", folder / "log.jsonl", *folder.glob("pictures/*")]:
        path.unlink()
        text = page_of(folder).text
        assert f"{100 * scores['miou']:.2f}" in text and "roof" in text
    assert "Run " + folder.name in text and "settings are not known" in text
    assert "no pictures" in text and "Training" not in text
    (folder / "scores.json").unlink()
    with pytest.raises(DataError, match="no scores.json .*evaluate.py --run"):
        write_report(folder)


def test_an_empty_log_null_scores_and_a_broken_picture_are_shown_as_what_they_are(run):
    folder, _ = run
    (folder / "log.jsonl").write_text("")
    (folder / "pictures" / "test_7.png").write_bytes(b"no picture")
    (folder / "pictures" / "train_7.png").write_bytes(b"of another split")
    rows = [{"name": f"k{i}", "iou": None, "f1": None, "precision": None, "recall": None,
             "pixels": 0} for i in range(2)]  # fmt: skip
    nothing = dict(oa=None, mf1=None, miou=None, kappa=None, per_class=rows, pixels=0)
    edit(folder / "scores.json", **nothing, confusion=[[0, 0], [0, 0]])
    text = page_of(folder).text
    assert "classes)" not in text and "test tile 7: cannot be read" in text
    assert "Training" not in text and "another split" not in text and "train tile" not in text


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"data": 1}'),
        ("log.jsonl", "7"),
        ("log.jsonl", '{"epoch": 1}'),
        ("scores.json", "\udcff"),
        ("scores.json", '{"split": "test"}'),
        ("scores.json", '{"oa": "<good>\\n"}'),
    ],
)
def test_a_damaged_file_is_one_line_and_the_page_of_before_stays(run, name, content):
    folder, _ = run
    (folder / "report.html").write_text("before")
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match="damaged") as caught:
        write_report(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert (folder / "report.html").read_text() == "before"


# ---------------------------------------------------------------------------------------- the parts


@given(st.lists(st.lists(st.text(), min_size=2, max_size=2), min_size=1, max_size=3), st.text())
def test_every_cell_of_a_table_is_text(rows, name):
    page = Reader()
    page.feed(table([name, "b"], rows))
    assert page.tags == ["div", "table", *["tr", "th", "th"], *["tr", "td", "td"] * len(rows)]


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=5))
def test_percent_is_the_mean_with_the_deviation_of_a_sample(values):
    known = 100 * np.array([value for value in values if value is not None])
    found = percent(*values)
    if len(known) == 0:
        assert found == "-"
    else:
        numbers = [float(part) for part in found.split(" +- ")]
        expected = [known.mean(), known.std(ddof=1)] if len(known) > 1 else [known.mean()]
        assert len(numbers) == len(expected) and np.allclose(numbers, expected, atol=0.00501)


def contrast(a, b):
    """WCAG's, of two colours of 0 to 255."""

    def luminance(rgb):
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(luminance([v / 255 for v in color]) for color in (a, b))
    return (high + 0.05) / (low + 0.05)


@given(st.tuples(*[st.floats(0, 255)] * 3))
def test_text_has_a_contrast_of_4_5_on_every_colour(color):
    ink = {"#000": (0, 0, 0), "#fff": (255, 255, 255)}[text_on(np.array(color))]
    assert contrast(ink, color) > 4.5


def hexed(code):
    code = code * 2 if len(code) == 3 else code
    return tuple(int(code[i : i + 2], 16) for i in (0, 2, 4)) if len(code) == 6 else None


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_a_page_is_readable_by_the_numbers_in_either_scheme(scheme):
    named = [dict(re.findall(r"--(\w+): #(\w+);", block)) for block in STYLE.split("@media")[:2]]
    ink, soft, page = (hexed(named[scheme][name]) for name in ("ink", "soft", "page"))
    assert min(contrast(ink, page), contrast(soft, page)) >= 4.5
    assert all(contrast(hexed(line[1:]), page) >= 3 for line in COLORS)  # lines, as WCAG 1.4.11
    sizes = re.findall(r"(?:font|font-size): ([\d.]+)(r?em|px)", STYLE)
    assert len(sizes) > 8 and min(float(n) * (1 if u == "px" else 16) for n, u in sizes) >= 12


def test_a_class_map_is_there_in_colours_that_are_safe_and_no_other_picture_is():
    maps = np.array([[(255, 255, 255), (0, 0, 255)], [(0, 0, 0), (255, 0, 0)]], np.uint8)
    palette = [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)]
    grey, blue, vermillion = (221, 221, 221), (0, 114, 178), (213, 94, 0)  # Okabe and Ito's
    other = np.asarray(recolored(Image.fromarray(maps), palette))
    assert other.tolist() == [[[*grey], [*blue]], [[0, 0, 0], [*vermillion]]]
    maps[0, 0] = (255, 255, 254)  # no class: an image, an error map
    assert recolored(Image.fromarray(maps), palette) is None
    assert recolored(Image.fromarray(maps), [(i, 0, 0) for i in range(9)]) is None
    text = class_legend([("a", (1, 2, 3)), ("<b>", (4, 5, 6))])
    assert "rgb(1, 2, 3)" in text and "rgb(0, 114, 178)" in text and text.count("&lt;b&gt;") == 2
    assert "checkbox" not in class_legend([(str(i), (i, 0, 0)) for i in range(9)])


def test_pages_and_panels_load_no_network():
    rooms = ("report", "panels", "paper", "stages")
    modules = ", ".join(f"reports.{name}" for name in rooms)
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert process.stdout == "False\n", process.stderr


def test_a_caption_is_text_and_the_picture_is_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    page = Reader()
    page.feed(figure('<b>"a"', Image.fromarray(pixels)))
    assert page.tags == ["figure", "img", "figcaption"] and page.text == '<b>"a"'
    found = base64.b64decode(page.links[0].removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found))), pixels)


def test_a_sure_pixel_is_white_and_a_guess_dark():
    shades = shade_confidence(np.array([[10, 25, 62, 63, 100]], np.uint8), 4)[0].astype(int)
    assert shades[[0, 1, 4]].tolist() == [[8, 48, 107], [8, 48, 107], [255, 255, 255]]
    assert np.abs(shades[2:4].mean(axis=0) - (shades[0] + shades[4]) / 2).max() < 1
    assert (shade_confidence(np.full((1, 1), 100, np.uint8), 1) == 255).all()


def test_a_class_is_never_drawn_in_the_mean_colour_of_two(tmp_path):
    truth = (np.indices((900, 700)).sum(0) % 2).astype(np.uint8)  # shown smaller
    tile = LoadedTile("a", None, truth.astype(np.float32), truth, TileScale((0.0, 1.0)))
    classes = (("a", (200, 30, 0)), ("b", (0, 30, 200)))
    save_panel(tmp_path / "a.png", tile, truth, np.full(truth.shape, 100, np.uint8), classes)
    pixels = np.asarray(Image.open(tmp_path / "a.png")).reshape(-1, 3)
    mixed = (pixels[:, 1] == 30) & ~(pixels[:, None] == [c for _, c in classes]).all(-1).any(-1)
    assert not mixed.any() and (pixels == classes[1][1]).all(-1).sum() > 1000
