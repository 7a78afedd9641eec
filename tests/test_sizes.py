"""The house stays thin: how long files and functions may be (lines: ruff), and how much of common/ a script takes."""

import ast

import pytest
from conftest import ROOT, SCRIPTS

LINES = {"deit3": 720, "deit": 620, "trex": 450}  # other scripts: 800
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("common/*.py")])


def length(path) -> int:
    return path.read_text().count("\n")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_function_fits_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= (60 if node.name == "train" else 50), node.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_above_all_what_is_not_the_papers(script):
    text = (ROOT / f"{script}.py").read_text()
    assert text.count("\n") <= LINES.get(script, 800)
    training = text.index("# ---- Training")
    assert text.count("\n", training) <= (220 if script == "grafit" else 130)
    imports = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]
    assert len({(n.module, a.name) for n in imports if n.module.startswith("common") for a in n.names}) <= 12


def test_common_is_thin():
    sizes = {path.stem: length(path) for path in ROOT.glob("common/*.py")}
    assert sizes.pop("transfer") <= 480
    assert sum(sizes.values()) <= 2700
