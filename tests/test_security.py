"""What holds for the whole tree: nothing unpickles, and docs/security.md names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UNPICKLING = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle")


def sources():
    folders = ("benchmarks", "exports", "serving", "tests", "trainer")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def faults(text):
    """Yields what in a source could run what it reads."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names] if node.level == 0 else []
            for name in names:
                if name.partition(".")[0] in UNPICKLING:
                    yield f"import {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: word.value for word in node.keywords}

        def is_set(name, given=given):
            return name in given and ast.unparse(given[name]) != "False"

        if called == "torch.load" and not (
            "weights_only" in given and ast.unparse(given["weights_only"]) == "True"
        ):
            yield "torch.load without weights_only=True"
        if is_set("allow_pickle"):
            yield f"{called} with allow_pickle"
        is_safe = called == "yaml.load" and "Safe" in ast.unparse(node)
        if called in ("yaml.load", "yaml.unsafe_load", "eval", "exec") and not is_safe:
            yield called


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import os, pickle as p",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=x)",
        "yaml.load(text)",
        "def f():\n    import cloudpickle",
    ],
)
def test_the_search_finds_what_it_searches_for(text):
    assert list(faults(text))


def test_nothing_unpickles():
    found = {
        str(path.relative_to(ROOT)): list(faults(path.read_text("utf-8"))) for path in sources()
    }
    assert len(found) > 200
    assert {path: names for path, names in found.items() if names} == {}


def test_every_test_that_the_threat_model_names_is_there():
    text = (ROOT / "docs" / "security.md").read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)\.(test_\w+)`", text))
    assert len(named) > 30
    there = {
        (path.stem, name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
    }
    assert named - there == set()


def test_every_row_of_the_threat_model_names_a_test():
    text = (ROOT / "docs" / "security.md").read_text("utf-8")
    table = text.partition("## Defended")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    assert [row for row in rows if not re.search(r"`test_\w+\.test_\w+`", row)] == []
