"""The walls of the house: widths, arrows between modules, and the names that the documents cite."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("geodata", "engine", "reports")
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
)
LESSON = {"sam_vit", "tuners", "dfm", "mfnet", "zoo"}
SCRIPTS = {"train", "evaluate", "predict", "explain", "benchmark", "prepare"}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def imports(name):
    """The modules of the project that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (found & MODULES.keys()) - {name, *ROOMS}


ARROWS = {name: imports(name) for name in MODULES}


def test_no_line_is_longer_than_100_columns():
    sources = [*SOURCES, *(ROOT / "tests").glob("*.py")]
    lines = [(p, i, s) for p in sources for i, s in enumerate(p.read_text("utf-8").splitlines(), 1)]
    assert [f"{path.name}:{i}" for path, i, line in lines if len(line) > 100] == []


def test_no_module_imports_itself_by_way_of_others():
    def reached(name, seen):
        for other in ARROWS[name] - seen:
            reached(other, seen | {other}) if other != start else circles.append((start, name))
            seen.add(other)
        return seen

    circles = []
    for start in ARROWS:
        reached(start, set())
    assert circles == []


def test_arrows_point_down():
    """Scripts on top, then data.py, then the rooms, then the lesson, which knows only itself."""
    for name, found in ARROWS.items():
        room = name.split(".")[0]
        assert name in SCRIPTS or not found & SCRIPTS, (name, found & SCRIPTS)
        assert not (name in SCRIPTS and found & SCRIPTS), name
        if name in LESSON:
            assert found <= LESSON, (name, found)
        if name == "fast":
            assert found <= LESSON
        if room in ("geodata", "reports"):
            assert not found & (LESSON | {"fast", "data"}), (name, found)
        if room == "engine":
            assert not {f for f in found if f == "data" or f.startswith("reports.")}, (name, found)
    top = [name for name in MODULES if "." not in name and name not in ROOMS]
    assert len(top) <= 13


def test_a_progress_bar_imports_no_module_of_ours():
    assert ARROWS["engine.console"] == set()


def names_in(tree):
    """Every name that a module defines, those of methods as Class.method."""
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
    return found


def test_every_name_in_the_method_s_page_exists():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    cited = re.findall(r"`([\w/]+)\.py:([\w.]+)`", text)
    assert len(cited) > 30
    for file, name in cited:
        assert name in names_in(MODULES[file.replace("/", ".")]), f"{file}.py:{name}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_page_is_cited_that_is_not_in_the_repository(path):
    text = path.read_text(encoding="utf-8")
    cited = re.findall(r"\b((?:docs/)?\w+\.md)\b", text)
    assert [page for page in cited if not (ROOT / page).exists()] == []
