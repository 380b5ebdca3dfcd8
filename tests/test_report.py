"""The page of a run: everything in it, nothing from outside."""

import html.parser
import json
import re

import numpy as np
import pytest

from engine.scoring import ConfusionMatrix
from geodata.tiles import LoadedTile
from reports.report import save_panel, write_report

CLASSES = (("ground", (255, 255, 255)), ("<b>roof</b>", (0, 0, 255)))


class Reader(html.parser.HTMLParser):
    """Collects what the page shows and what it would fetch."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.links, self.open = [], "", [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "img", "path", "polyline", "circle"):
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
        data="vaihingen", encoder="vit_l", tuner="adapter", modalities="image+dsm", fusion="dfm", lr=0.125,
        version="commit & co", parameters={"encoder": 1234567}, base={"weights": "sam.pth"}, classes=[],
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    entry = dict(loss=0.5, images_per_second=7.5, peak_memory_mb=None, seconds=60)
    lines = [json.dumps({**entry, "epoch": e + 1, "miou": 0.1 * e}) for e in range(request.param)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "pictures").mkdir()
    image = rng.integers(0, 256, (90, 70, 3)).astype(np.uint8)
    dsm = rng.normal(size=(90, 70)).astype(np.float32)
    tile, sure = (
        LoadedTile("7", image, dsm, truth, (-3.0, 3.0)),
        rng.integers(50, 101, (90, 70)).astype(np.uint8),
    )
    save_panel(tmp_path / "pictures" / "test_7.png", tile, pred, sure, CLASSES)
    return tmp_path, scores


def test_the_page_holds_the_run_and_needs_nothing_from_outside(run):
    folder, scores = run
    write_report(folder)
    page = Reader()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    assert (
        all(link.startswith("data:image/jpeg;base64,") for link in page.links)
        and len(page.links) == 1
    )
    assert "script" not in page.tags and "link" not in page.tags and "b" not in page.tags
    shown = [f"{100 * scores[k]:.2f}" for k in ("oa", "mf1", "miou", "kappa")]
    for part in [
        *shown,
        "84.72",
        "<b>roof</b>",
        "each window <once>",
        "1,234,567",
        "lr: 0.125",
        "test tile 7",
        "commit & co",
    ]:
        assert part in page.text, part
    assert page.tags.count("svg") == 2


def test_scores_by_other_labels_are_a_row_and_notes_are_shown(run):
    folder, scores = run
    matrix = ConfusionMatrix(2)
    matrix.update(np.array([0, 0, 1]), np.array([0, 1, 1]))
    scores = {**scores, "full_labels": matrix.scores(), "notes": ["tile 7 lacks <something>"]}
    (folder / "scores.json").write_text(json.dumps(scores))
    write_report(folder)
    page = Reader()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    assert "this run, full labels66.67" in page.text and "tile 7 lacks <something>" in page.text


def test_a_run_that_the_paper_has_no_row_for_shows_none(run):
    folder, _ = run
    config = json.loads((folder / "config.json").read_text())
    for other in ({"modalities": "image"}, {"fusion": "sum"}, {"mixing": False}):
        (folder / "config.json").write_text(json.dumps({**config, **other}))
        write_report(folder)
        assert not re.search("the paper", (folder / "report.html").read_text(encoding="utf-8"))
