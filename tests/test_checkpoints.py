"""Files of weights: fetched whole or not at all, saved small, loaded on the base they were trained
on and no other.
"""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, randomise, same_state, small_encoder, snapshot

from engine import checkpoints, pretrained
from engine.checkpoints import export_whole, load_model, save_model
from engine.console import Mistake
from engine.networks import base_digest, build_model
from engine.pretrained import fetch, find_weights
from engine.settings import Settings
from mfnet import build_mfnet, count_parameters
from sam_vit import SIZES, WeightsError, build_image_encoder, load_sam_weights
from tuners import TUNERS, apply_tuner

CONTENT = bytes(range(256)) * 20_000  # 5 MB: several reads
MD5 = hashlib.md5(CONTENT).hexdigest()
CLASSES = [["roof", [255, 0, 0]], ["tree", [0, 255, 0]], ["road", [0, 0, 255]]]


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", TINY)


# ---------------------------------------------------------------------------------------- downloads


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` as the fields of the server say."""

    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        server.asked.append(wanted)
        server.everyone.wait(timeout=10)
        if not server.speaks_http:
            return self.wfile.write(b"welcome to the hotel's network\r\n")
        start = (
            int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        )
        if not self.path.endswith("/sam.pth") or start >= len(server.content):
            return self.send_error(416 if start else 404)
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if server.announced:
            self.send_header(
                "Content-Length", str(len(body) + server.announced - len(server.content))
            )
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            )
        self.end_headers()
        self.wfile.write(body[: server.sent])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.announced, server.sent, server.ranges = (
            CONTENT,
            len(CONTENT),
            None,
            True,
        )
        server.asked, server.everyone, server.speaks_http = [], threading.Barrier(1), True
        server.url = f"http://127.0.0.1:{server.server_port}/sam.pth"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "hub" / "sam.pth"


ROOT = Path(checkpoints.__file__).resolve().parent.parent


def part_of(target):
    return target.with_name(target.name + ".part")


def refused(url, target, said, md5=MD5):
    """The one line that a failed fetch says, and no target."""
    with pytest.raises(WeightsError, match=said) as raised:
        fetch(url, target, md5)
    line = str(raised.value)
    assert url in line and str(target) in line and md5 in line and "\n" not in line
    assert not target.is_file()


def leave_part(target, content):
    target.parent.mkdir()
    part_of(target).write_bytes(content)


def arrived(target):
    return target.read_bytes() == CONTENT and [p.name for p in target.parent.iterdir()] == [
        target.name
    ]


def test_a_download_arrives_whole_and_tells_how_far_it_is(server, target):
    seen = []
    fetch(server.url, target, MD5, lambda done, total: seen.append((done, total)))
    assert arrived(target) and server.asked == [None]
    assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_download_of_unknown_length_arrives(server, target):
    server.announced = None
    fetch(server.url, target, MD5)
    assert arrived(target)


@pytest.mark.parametrize(
    "ranges", [True, False], ids=["resumed", "begun again where the server knows no ranges"]
)
def test_an_interrupted_download_goes_on(server, target, ranges):
    server.sent = 3_000_000
    refused(server.url, target, "broke after 3000000 of 5120000 bytes")
    assert part_of(target).read_bytes() == CONTENT[:3_000_000]
    server.sent, server.ranges = None, ranges
    seen = []
    fetch(server.url, target, MD5, lambda done, total: seen.append((done, total)))
    assert arrived(target) and server.asked == [None, "bytes=3000000-"]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and (seen[0][0] > 3_000_000) == ranges


def test_a_part_that_is_whole_already_becomes_the_target(server, target):
    leave_part(target, CONTENT)
    fetch(server.url, target, MD5)
    assert arrived(target) and server.asked == ["bytes=5120000-"]


@pytest.mark.parametrize("part", [b"x" * 1000, CONTENT + b"x"], ids=["of another file", "too long"])
def test_a_part_that_does_not_fit_is_thrown_away(server, target, part):
    leave_part(target, part)
    refused(server.url, target, "thrown away")
    assert not part_of(target).exists()
    fetch(server.url, target, MD5)
    assert arrived(target)


def test_a_part_longer_than_the_file_is_cut_where_the_server_knows_no_ranges(server, target):
    server.ranges = False
    leave_part(target, b"x" * (len(CONTENT) + 1000))
    fetch(server.url, target, MD5)
    assert arrived(target)


def test_a_download_with_another_md5_is_thrown_away(server, target):
    refused(server.url, target, f"md5 {MD5} and was thrown away", md5="0" * 32)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    "by, said", [(1000, "broke after 5120000 of 5121000"), (-1000, "thrown away")]
)
def test_a_download_of_another_length_than_announced_is_refused(server, target, by, said):
    server.announced = len(CONTENT) + by
    refused(server.url, target, said)


def test_an_address_that_is_not_there_is_named(server, target):
    refused(server.url.replace("sam.pth", "sam2.pth"), target, "404")
    assert list(target.parent.iterdir()) == []


def test_an_answer_that_is_no_http_is_a_failed_download(server, target):
    server.speaks_http = False
    refused(server.url, target, "hotel")


def test_without_a_server_a_part_stays_for_later(server, target):
    server.shutdown()
    server.server_close()
    leave_part(target, CONTENT[:1000])
    refused(server.url, target, "refused")
    assert part_of(target).read_bytes() == CONTENT[:1000]


def test_a_folder_that_cannot_be_made_is_named(server, target):
    target.parent.write_text("a file")
    refused(server.url, target, "hub")
    assert target.parent.read_text() == "a file"


@pytest.mark.parametrize(
    "content, fits", [(CONTENT, True), (CONTENT[:-1], False)], ids=["right", "damaged"]
)
def test_a_file_that_is_there_is_used_or_refused_and_never_touched(server, target, content, fits):
    target.parent.mkdir()
    target.write_bytes(content)
    before = target.stat()
    if fits:
        fetch(server.url, target, MD5)
    else:
        with pytest.raises(WeightsError, match=f"{target} has md5 .*remove it.*{MD5}"):
            fetch(server.url, target, MD5)
    after = target.stat()
    assert not server.asked and (before.st_ino, before.st_mtime_ns) == (
        after.st_ino,
        after.st_mtime_ns,
    )


@pytest.mark.parametrize("have", [0, 1_000_000], ids=["from the beginning", "resumed"])
def test_two_downloads_at_once_leave_no_damaged_file(server, target, have):
    server.everyone = threading.Barrier(2)  # nobody gets a byte before both have asked
    if have:
        leave_part(target, CONTENT[:have])
    ends = []

    def one():
        try:
            fetch(server.url, target, MD5)
            ends.append("arrived")
        except WeightsError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(server.asked) == len(ends) == 2
    assert ends == ["arrived", "arrived"] and target.read_bytes() == CONTENT


def test_auto_fetches_the_official_file_into_torch_hubs_folder_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(pretrained, "ADDRESS", server.url.removesuffix("sam.pth"))
    monkeypatch.setitem(pretrained.OFFICIAL, "vit_b", ("sam.pth", MD5))
    for _ in range(2):
        assert find_weights("auto", "vit_b") == tmp_path / "hub" / "checkpoints" / "sam.pth"
    assert len(server.asked) == 1


def test_official_files_carry_the_beginning_of_their_md5_in_their_names():
    for size, (name, md5) in pretrained.OFFICIAL.items():
        assert name == f"sam_{size}_{md5[:6]}.pth"


def test_weights_that_cannot_be_found_are_named(tmp_path):
    assert find_weights("none", "vit_b") is None
    with pytest.raises(WeightsError, match="nowhere.pth"):
        find_weights(str(tmp_path / "nowhere.pth"), "vit_b")
    with pytest.raises(WeightsError, match="tiny.*none.*vit_t.*vit_l"):
        find_weights("auto", "tiny")


# -------------------------------------------------------------------------------------------- a run


BASE = {"image_encoder." + n: t for n, t in small_encoder(seed=1).state_dict().items()}
TRAINED = {}


def make_run(folder, tuner="lora", modalities="image+dsm", weights=None, **changes):
    """A finished run as train.py leaves it, on sam.pth: parameters and batch-norm statistics have
    moved. Runs of the same settings share the network that was saved.
    """
    if weights is None:
        weights = str(folder / "sam.pth")
        torch.save(BASE, weights)
    settings = Settings(
        encoder="tiny", weights=weights, tuner=tuner, modalities=modalities, seed=3, **changes
    )
    settings.complete()
    kind = repr(replace(settings, weights="" if weights != "none" else "none"))
    if kind not in TRAINED:
        TRAINED[kind] = trained_network(settings)
    model, base, found = TRAINED[kind]
    path = folder / "model.pt"
    save_model(path, model, settings, base, CLASSES, epoch=1, finished=True)
    return SimpleNamespace(path=path, model=model, settings=settings, base=base, logits=found)


def trained_network(settings):
    """(the network, its base, its logits)."""
    model, base, _ = build_model(settings, len(CLASSES))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    randomise(model, seed=4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(frozen.get(name, p))
        model.train()(*inputs(model, batch=2))
    return model.eval(), base, logits(model)


def inputs(model, batch=1):
    torch.manual_seed(0)
    return [torch.rand(batch, 3, 64, 64), torch.rand(batch, 64, 64)][: model.modalities]


@torch.no_grad()
def logits(model):
    return model(*inputs(model))


def assert_loads(run, path, **options):
    model, settings, classes = load_model(path, **options)
    assert torch.equal(logits(model), run.logits) and not model.training
    assert settings == run.settings and classes == CLASSES


def read(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("modalities", ["image", "image+dsm"])
def test_a_run_computes_the_same_after_saving_and_loading(tuner, modalities, tmp_path):
    run = make_run(tmp_path, tuner, modalities)
    assert_loads(run, run.path)


@pytest.mark.parametrize(
    "changes",
    [
        dict(fusion="sum"),
        dict(tuner_option={"mixing": False}),
        dict(tuner_option={"rank": 3, "alpha": 2.0}),
    ],
    ids=str,
)
def test_the_settings_of_a_run_are_those_of_the_loaded_network(changes, tmp_path):
    run = make_run(tmp_path, **changes)
    assert_loads(run, run.path)


def test_zeroed_relative_positions_are_zero_again_and_another_base(tmp_path):
    run = make_run(tmp_path, relative_positions="zero")
    assert_loads(run, run.path)
    model, base, _ = build_model(replace(run.settings, relative_positions="sam"), len(CLASSES))
    assert base["sha256"] != run.base["sha256"]
    assert model.image_encoder.blocks[0].attn.rel_pos_h.any()
    assert not run.model.image_encoder.blocks[0].attn.rel_pos_h.any()


def test_a_run_on_random_weights_finds_them_again_by_its_seed(tmp_path):
    run = make_run(tmp_path, weights="none")
    torch.manual_seed(99)
    assert_loads(run, run.path)


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_model_file_holds_what_was_trained_and_the_statistics_and_no_more(tuner, tmp_path):
    run = make_run(tmp_path, tuner)
    parameters = dict(run.model.named_parameters())
    wanted = {
        n: t
        for n, t in run.model.state_dict().items()
        if n not in parameters or parameters[n].requires_grad
    }
    state = read(run.path)["state"]
    assert state.keys() == wanted.keys() and all(torch.equal(state[n], wanted[n]) for n in wanted)
    assert any(n.endswith("running_mean") for n in state)
    assert ("image_encoder.pos_embed" in state) == (tuner == "full")


def kinds(value):
    inside = (
        [*value, *value.values()]
        if isinstance(value, dict)
        else value
        if isinstance(value, (list, tuple))
        else []
    )
    return {type(value)}.union(*(kinds(v) for v in inside))


def test_files_hold_tensors_and_built_ins_only(tmp_path):
    run = make_run(tmp_path)
    export_whole(run.path, tmp_path / "whole.pt")
    for name in ("model.pt", "whole.pt"):
        assert kinds(read(tmp_path / name)) <= {
            dict,
            list,
            tuple,
            str,
            int,
            float,
            bool,
            torch.Tensor,
        }


@pytest.mark.parametrize("tuner, limit", [("lora", 25e6), ("adapter", 215e6)])
def test_a_run_of_vit_l_is_small(tuner, limit):
    with torch.device("meta"):
        model = build_mfnet("vit_l", tuner)
        names = checkpoints.changed_names(model)
    size = sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if n in names)
    counts = count_parameters(model)
    assert 4 * (counts["total"] - counts["encoder"]) < size < limit


# ----------------------------------------------------------------------------------------- the base


@pytest.mark.parametrize("how", ["replaced under its name", "given from another place"])
def test_another_base_is_refused_with_both_hashes(how, tmp_path):
    run = make_run(tmp_path)
    other = small_encoder(seed=1)
    with torch.no_grad():
        other.neck[3].bias[7] += 1e-6
    place = tmp_path / ("sam.pth" if how.startswith("replaced") else "other.pth")
    torch.save(other.state_dict(), place)
    with pytest.raises(WeightsError) as raised:
        load_model(run.path, weights=None if how.startswith("replaced") else str(place))
    for said in (
        str(run.path),
        "sam.pth",
        place.name,
        run.base["sha256"],
        base_digest(other),
        "--weights",
    ):
        assert said in str(raised.value)


def test_random_weights_are_another_base_than_sams(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(WeightsError, match=f"{run.base['sha256']}.*random"):
        load_model(run.path, weights="none")


def test_a_base_that_moved_is_named_and_can_be_given(tmp_path):
    run = make_run(tmp_path)
    (tmp_path / "sam.pth").rename(tmp_path / "moved.pth")
    with pytest.raises(
        WeightsError, match=f"{run.path} stands on {tmp_path / 'sam.pth'}.*--weights"
    ):
        load_model(run.path)
    assert_loads(run, run.path, weights=str(tmp_path / "moved.pth"))
    with pytest.raises(WeightsError, match="nowhere.pth"):
        load_model(run.path, weights=str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_one_checkpoint_has_one_hash_in_every_format_and_under_every_tuner(tuner, dtype):
    source = small_encoder(seed=1).to(dtype).float()  # values that this format holds exactly
    encoder = apply_tuner(small_encoder(seed=2), tuner)
    state = {"module." + n: t.to(dtype) for n, t in reversed(source.state_dict().items())}
    load_sam_weights(encoder, state)
    assert base_digest(encoder) == base_digest(source)
    assert base_digest(source.to(dtype)) == base_digest(encoder)
    with torch.no_grad():
        encoder.blocks[0].attn.rel_pos_w[0, 0] += 1
    assert base_digest(encoder) != base_digest(source)


def test_the_hash_is_that_of_the_sorted_tensors_so_that_old_runs_stay_valid():
    encoder, digest = small_encoder(), hashlib.sha256()
    for name in sorted(encoder.state_dict()):
        tensor = encoder.state_dict()[name]
        digest.update(
            f"{name} {tuple(tensor.shape)};".encode() + tensor.numpy().astype("<f4").tobytes()
        )
    assert base_digest(encoder) == digest.hexdigest()


# --------------------------------------------------------------------------------------- handing on


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_whole_file_needs_no_base(tuner, tmp_path):
    run = make_run(tmp_path, tuner)
    export_whole(run.path, tmp_path / "whole.pt")
    (tmp_path / "sam.pth").unlink()
    assert_loads(run, tmp_path / "whole.pt")
    content = read(tmp_path / "whole.pt")
    assert content["base"] == run.base and same_state(run.model, content["state"])
    export_whole(tmp_path / "whole.pt", tmp_path / "again.pt")
    assert_loads(run, tmp_path / "again.pt")


def test_a_run_of_full_needs_no_base(tmp_path):
    run = make_run(tmp_path, "full")
    (tmp_path / "sam.pth").unlink()
    assert_loads(run, run.path)


@pytest.mark.parametrize("tuner", TUNERS)
def test_sams_part_loads_into_a_plain_encoder(tuner, tmp_path):
    run = make_run(tmp_path, tuner)
    checkpoints.main(["--run", str(tmp_path), "--sam", str(tmp_path / "out.pth")])
    plain = build_image_encoder(TINY)
    report = load_sam_weights(plain, tmp_path / "out.pth")
    trains_sam = tuner in ("full", "bitfit", "norm", "partial")
    wanted = run.model.image_encoder if trains_sam else small_encoder(seed=1)
    assert same_state(plain, wanted.state_dict()) and not report.ignored and not report.resized
    assert all(n.startswith("image_encoder.") for n in read(tmp_path / "out.pth"))
    assert same_state(small_encoder(seed=1), snapshot(plain)) != trains_sam


def test_the_command_writes_both_files_and_finds_a_moved_base(tmp_path, capsys):
    run = make_run(tmp_path)
    (tmp_path / "sam.pth").rename(tmp_path / "moved.pth")
    whole, sam = tmp_path / "whole.pt", tmp_path / "sam_again.pth"
    moved = ["--weights", str(tmp_path / "moved.pth")]
    checkpoints.main(["--run", str(tmp_path), "--whole", str(whole), "--sam", str(sam), *moved])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and f"{whole.stat().st_size:,}" in said[0] and str(sam) in said[1]
    assert_loads(run, whole)
    assert_loads(run, run.path, weights=str(sam))  # what goes out as SAM's is the base itself


def run_command(*args):
    command = [sys.executable, "-m", "engine.checkpoints", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_command_overwrites_nothing(tmp_path):
    run = make_run(tmp_path)
    (tmp_path / "there.pt").write_text("mine")
    done = run_command(
        "--run", tmp_path, "--whole", tmp_path / "new.pt", "--sam", tmp_path / "there.pt"
    )
    assert done.returncode == 2 and not done.stdout
    assert (
        done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
        and "there.pt" in done.stderr
    )
    assert (tmp_path / "there.pt").read_text() == "mine" and not (tmp_path / "new.pt").exists()
    with pytest.raises(WeightsError, match="model.pt exists"):
        export_whole(run.path, run.path)
    assert_loads(run, run.path)


@pytest.mark.parametrize(
    "args", [[], ["--whole", "a.pt", "--sam", "./a.pt"]], ids=["nothing to write", "one name"]
)
def test_the_command_wants_a_name_for_each_file(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        checkpoints.main(["--run", str(tmp_path), *args])
    error = capsys.readouterr().err
    assert error.startswith("error: give --whole FILE") and error.count("\n") == 1


def test_a_folder_that_is_not_there_is_named_before_anything_is_read(tmp_path):
    with pytest.raises(WeightsError, match="its folder does not exist"):
        export_whole(tmp_path / "model.pt", tmp_path / "nowhere" / "whole.pt")


# ------------------------------------------------------------------------------------------- damage


def fill_the_disk(content, path):
    Path(path).write_bytes(b"half")
    raise RuntimeError("PytorchStreamWriter failed writing file data/7: file write failed")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    names, old = sorted(os.listdir(tmp_path)), run.path.read_bytes()
    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="file write failed"):
        save_model(run.path, run.model, run.settings, run.base, CLASSES, 1, True)
    with pytest.raises(WeightsError, match="whole.pt cannot be written"):
        export_whole(run.path, tmp_path / "whole.pt")
    assert run.path.read_bytes() == old and sorted(os.listdir(tmp_path)) == names


def test_a_model_file_is_refused_wherever_it_is_cut(tmp_path):
    run = make_run(tmp_path)
    data = run.path.read_bytes()
    for size in [0, 1, 100, *range(1000, len(data), len(data) // 10), len(data) - 1]:
        run.path.write_bytes(data[:size])
        with pytest.raises(WeightsError, match="model.pt"):
            load_model(run.path)


FOREIGN = [
    lambda content: None,
    lambda content: small_encoder().state_dict(),
    lambda content: {**content, "state": {}},
    lambda content: {k: v for k, v in content.items() if k != "classes"},
    lambda content: {**content, "classes": CLASSES[:2]},
    lambda content: with_settings(content, tuner="prompt"),
    lambda content: with_settings(content, encoder="vit_x"),
    lambda content: with_settings(content, tuner="adapter"),
    lambda content: with_settings(content, tuner_option={"rank": 0}),
    lambda content: with_settings(content, tuner_option={"depth": 2}),
    lambda content: with_settings(content, crop="../.."),
    lambda content: with_settings(content, batch_size=0),
    lambda content: with_settings(content, batch_size=True),
    lambda content: with_settings(content, lr=float("nan")),
    lambda content: with_settings(content, plugin={"../../evil.py": "0" * 64}),
    lambda content: with_settings(content, plugin=["evil.py"]),
    lambda content: with_settings(content, colour="blue"),
    lambda content: {**content, "settings": ["lora"]},
    lambda content: {**content, "base": "sam.pth"},
    lambda content: {**content, "classes": [["roof", [1, 2]]]},
]


def with_settings(content, **changes):
    return {**content, "settings": {**content["settings"], **changes}}


@pytest.mark.parametrize("change", FOREIGN)
def test_a_file_that_is_not_this_run_is_refused_and_named(change, tmp_path):
    run = make_run(tmp_path)
    torch.save(change(read(run.path)), run.path)
    with pytest.raises((WeightsError, Mistake)) as raised:
        load_model(run.path)
    assert "\n" not in str(raised.value)
    assert "model.pt" in str(raised.value) or "evil.py" in str(raised.value)


def test_a_missing_model_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match="model.pt: no such file"):
        load_model(tmp_path / "model.pt")


@pytest.mark.parametrize("whole", [False, True], ids=["what was trained", "whole"])
@pytest.mark.parametrize("damage", ["missing", "unexpected", "of another shape"])
def test_a_damaged_state_is_named_and_changes_nothing(whole, damage, tmp_path):
    run = make_run(tmp_path)
    state = dict(run.model.state_dict()) if whole else checkpoints.trained_state(run.model)
    name = "image_encoder.blocks.1.attn.qkv." + ("weight" if whole else "lora_B")
    if damage == "unexpected":
        name += "_2"
        state[name] = torch.zeros(1)
    elif damage == "missing":
        del state[name]
    else:
        state[name] = state[name][:-1]
    target, _, _ = build_model(run.settings, len(CLASSES))
    before = snapshot(target)
    with pytest.raises(WeightsError, match=f"{damage}: {name}"):
        checkpoints.load_trained_state(target, state, "model.pt")
    assert same_state(target, before)


def test_the_folder_of_many_seeds_suggests_one_of_them(tmp_path):
    (tmp_path / "seed-1").mkdir()
    (tmp_path / "seed-1" / "model.pt").write_text("")
    with pytest.raises(WeightsError, match=f"give one of its seeds, as {tmp_path / 'seed-1'}"):
        load_model(tmp_path / "model.pt")


def test_a_network_of_another_version_is_refused_with_what_to_do(tmp_path):
    """As an image-only run of 8c97401, whose fusion had a squeeze-and-excitation."""
    run = make_run(tmp_path, modalities="image")
    content = read(run.path)
    content["state"]["fusion.levels.0.se.0.fc.0.weight"] = torch.zeros(16, 256, 1, 1)
    torch.save(content, run.path)
    with pytest.raises(WeightsError, match="unexpected.*another version.*config.json") as raised:
        load_model(run.path)
    assert "\n" not in str(raised.value)
