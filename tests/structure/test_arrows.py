"""Who may import whom, who may do what, and that core names no method. Read off the syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from inlay.registry import registry

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted((ROOT / "core" / "inlay").rglob("*.py"))
PLUGINS = sorted(p.name for p in (ROOT / "plugins").iterdir() if (p / "pyproject.toml").exists())
CONTRIB = sorted(p.name for p in (ROOT / "contrib").iterdir() if (p / "pyproject.toml").exists())
PROSE = {"do"}  # an error's advice may give an example


def files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Return the top-level packages a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_the_folders_are_what_the_arrows_speak_of() -> None:
    assert {"lora", "adapter", "prefix", "scaling", "selective"} <= set(PLUGINS)
    assert "train" in CONTRIB
    assert len(CORE) > 25
    assert "torch" in imports(ROOT / "core" / "inlay" / "attach.py")


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.stem)
def test_core_imports_no_plugin(path: Path) -> None:
    assert [name for name in imports(path) if name.startswith("inlay_")] == []


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_imports_no_other_plugin_and_its_tests_neither(plugin: str) -> None:
    """So that its folder could be moved to a repository of its own unchanged."""
    others = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files(f"plugins/{plugin}")
        for name in imports(path)
        if name.startswith("inlay_") and name != f"inlay_{plugin}"
    }
    assert others == set()


def test_nothing_imports_contrib() -> None:
    """Benchmarks measure it too, so they may."""
    names = {f"inlay_{name}" for name in CONTRIB}
    found = {p.name for p in files("core", "plugins", "tests") if imports(p) & names}
    assert found == set()


def words_in_code(path: Path) -> Iterator[str]:
    """Yield every identifier of a file, and every word of its strings that are code.

    Prose is left out: comments, docstrings, and the advice of an error (`do=...`), where a method
    may be named as an example. Nothing core looks up, compares or calls is prose.
    """
    for node in _without_prose(ast.parse(path.read_text())):
        for name in ("id", "attr", "arg", "name", "module", "asname"):
            if isinstance(value := getattr(node, name, None), str):
                yield from re.findall(r"\w+", value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\w+", node.value)


def _without_prose(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.keyword) and node.arg in PROSE:
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _without_prose(child)


def method_names() -> set[str]:
    """Return ids and class names of all installed methods but core's own."""
    offers = [o for found in registry.origins().values() for o in found if o.distribution != "inlay"]
    return {o.name for o in offers} | {o.value.rpartition(":")[2] for o in offers}


def test_no_method_is_named_in_core() -> None:
    names = method_names()
    assert {"lora", "LoRA", "prefix_tuning", "BitFit"} <= names
    named = {f"{path.name}: {word}" for path in CORE for word in words_in_code(path) if word in names}
    assert named == set()


def test_the_search_for_names_would_find_one(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text('"""LoRA here is prose."""\nif method.id == "lora":\n    raise E("x", do="as in ia3")\n')
    assert set(words_in_code(file)) & method_names() == {"lora"}


def makes_a_manager(node: ast.AST) -> bool:
    """Whether `node` imports pluggy's PluginManager by name or makes one; annotations may name it."""
    if isinstance(node, ast.ImportFrom):
        return any(alias.name == "PluginManager" for alias in node.names)
    return isinstance(node, ast.Call) and "PluginManager" in ast.unparse(node.func)


def test_only_the_registry_makes_a_plugin_manager() -> None:
    sources = files("core", "plugins", "contrib")
    found = {p.name for p in sources if any(map(makes_a_manager, ast.walk(ast.parse(p.read_text()))))}
    assert found == {"registry.py"}


def sets_requires_grad(node: ast.AST) -> bool:
    """Whether `node` makes a tensor learn or not.

    Neither making a leaf of a fresh `.detach()` is that, nor making a parameter that does not
    learn (`requires_grad=False`), nor noting flags on the state (`state.requires_grad = ...`).
    """
    if isinstance(node, ast.Assign):
        targets = [t for t in node.targets if isinstance(t, ast.Attribute) and t.attr == "requires_grad"]
        return any(not (isinstance(t.value, ast.Name) and t.value.id == "state") for t in targets)
    if isinstance(node, ast.keyword) and node.arg == "requires_grad":
        return not (isinstance(node.value, ast.Constant) and node.value.value is False)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        inner = getattr(node.func.value, "func", None)
        return node.func.attr == "requires_grad_" and getattr(inner, "attr", "") != "detach"
    return False


def test_only_masks_sets_requires_grad() -> None:
    sources = [p for p in files("core", "plugins", "contrib") if "tests" not in p.parts]
    found = {p.name for p in sources if any(map(sets_requires_grad, ast.walk(ast.parse(p.read_text()))))}
    assert found == {"masks.py"}
