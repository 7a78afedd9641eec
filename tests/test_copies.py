"""Blocks that stand in several scripts: copies are identical, and whatever two scripts both define carries a mark."""

import ast

import pytest
from conftest import ROOT, SCRIPTS

# What every script has of its own under the same name.
OWN = {
    "Recipe", "TEACHER", "RECIPES", "MODELS", "TRANSFER", "paper_recipe", "build_model", "parse_args",
    "make_model", "load_model", "train", "main"
}


def definitions(source: str) -> dict[str, tuple[str, str]]:
    """Name of every class, function and constant: (its code without docstrings, the comment line above it)."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names, first = [node.name], min(n.lineno for n in (node, *node.decorator_list))
        elif isinstance(node, ast.Assign):
            names, first = [t.id for t in node.targets if isinstance(t, ast.Name)], node.lineno
        else:
            continue
        above = lines[first - 2].strip() if first > 1 else ""
        code = ast.unparse(without_docstrings(node))
        found |= {name: (code, above) for name in names}
    return found


def without_docstrings(node: ast.AST) -> ast.AST:
    for part in ast.walk(node):
        body = getattr(part, "body", None)
        if not isinstance(part, (ast.ClassDef, ast.FunctionDef)):
            continue
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            part.body = body[1:] or [ast.Pass()]
    return node


def mistakes(scripts: dict[str, str]) -> list[str]:
    """scripts, in the order of the papers: name to source."""
    found, seen, wrong = {name: definitions(source) for name, source in scripts.items()}, {}, []
    for script, blocks in found.items():
        for name, (code, above) in blocks.items():
            if above.startswith("# Copied from "):
                owner = above.removeprefix("# Copied from ").removesuffix(".py")
                if found.get(owner, {}).get(name, ("", ""))[0] != code:
                    wrong.append(f"{script}.{name} differs from {owner}'s")
                elif "Copied from" in found[owner][name][1]:
                    wrong.append(f"{script}.{name}: {owner} has it from elsewhere")
            elif above.startswith("# Adapted from "):
                owner = above.removeprefix("# Adapted from ").partition(".py: ")[0]
                if name not in found.get(owner, {}):
                    wrong.append(f"{script}.{name}: {owner} has none")
                elif found[owner][name][0] == code:
                    wrong.append(f"{script}.{name} is a copy, not an adaptation")
            elif name in seen and name not in OWN:
                wrong.append(f"{script}.{name} stands in {seen[name]} too, without a mark")
            seen.setdefault(name, script)
    return wrong


def test_copies_are_identical_and_marked():
    assert not mistakes({name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS})


@pytest.mark.parametrize(
    "second, complaint",
    [
        ("# Copied from a.py\ndef f(x):\n    'Said otherwise.'\n    return x + 1\n", None),
        ("# Copied from a.py\ndef f(x):\n    return x + 2\n", "b.f differs from a's"),
        ("def f(x):\n    return x + 1\n", "b.f stands in a too, without a mark"),
        ("# Adapted from a.py: adds 3\ndef f(x):\n    return x + 3\n", None),
        ("# Adapted from a.py: not at all\ndef f(x):\n    return x + 1\n", "b.f is a copy, not an adaptation"),
        ("# Adapted from a.py: renamed\ndef g(x):\n    return x + 3\n", "b.g: a has none"),
        ("K = 2\n", "b.K stands in a too, without a mark"),
        ("def train():\n    return 5\n", None),
    ],
)
def test_the_check_itself_finds_what_it_looks_for(second, complaint):
    first = "K = 1\n\n\ndef f(x):\n    'Adds one.'\n    return x + 1\n\n\ndef train():\n    return 4\n"
    assert mistakes({"a": first, "b": second}) == ([complaint] if complaint else [])


def test_the_check_names_the_owner_of_a_copied_copy():
    code = "def f(x):\n    return x\n"
    assert mistakes(
        {"a": code, "b": "# Copied from a.py\n" + code, "c": "# Copied from b.py\n" + code}
    ) == ["c.f: b has it from elsewhere"]
