"""The package's imports of its own modules have no cycle; lazy and type-checking imports count."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
PACKAGE = "gmail_hf"
# Each folder imports only from those before it.
ORDER = (
    *("metrics", "branches", "publishing", "models", "training", "generation"),
    *("captioners", "vlm", "evaluation", "digits", "commands"),
)

ANYWHERE = (f"{PACKAGE}.version", f"{PACKAGE}.files")


def module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def import_graph(root: Path) -> dict[str, set[str]]:
    """
    Each module of `root/gmail_hf` with the modules of the package that it imports, anywhere in its code.

    The package's own `__init__.py` is left out: it only re-exports public names.
    """
    paths = {module_of(path, root): path for path in root.joinpath(PACKAGE).rglob("*.py")}
    graph = {}
    for module, path in paths.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                for alias in node.names:
                    name = f"{source}.{alias.name}"
                    imported.add(name if name in paths else source)
        graph[module] = {name for name in imported if name in paths} - {module}
    importers = {module for module, imported in graph.items() if PACKAGE in imported}
    assert not importers, f"{sorted(importers)} import from {PACKAGE} itself: name the module."
    del graph[PACKAGE]
    return graph


def test_imports_have_no_cycle():
    TopologicalSorter(import_graph(SRC)).prepare()


def against_order(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Imports of a folder from one that comes after it in `ORDER`; files of `ANYWHERE` may be imported by all."""
    folder = {module: module.split(".")[1] for module in graph if module not in ANYWHERE}
    pairs = {(module, name) for module in folder for name in graph[module] if name in folder}
    return {pair for pair in pairs if ORDER.index(folder[pair[0]]) < ORDER.index(folder[pair[1]])}


def test_folders_import_in_order():
    assert against_order(import_graph(SRC)) == set()


def test_an_import_against_the_order_is_found():
    graph = {f"{PACKAGE}.metrics.a": {f"{PACKAGE}.models.b"}, f"{PACKAGE}.models.b": set()}
    assert against_order(graph) == {(f"{PACKAGE}.metrics.a", f"{PACKAGE}.models.b")}


@pytest.mark.parametrize(
    "back",
    ["from .a import x", "def f():\n    from ..sub import a", "if TYPE_CHECKING:\n    import gmail_hf.sub.a"],
)
def test_a_cycle_is_found(tmp_path, back):
    folder = tmp_path / PACKAGE / "sub"
    folder.mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("from .sub.a import x\n")
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text("from .b import y\nx = 1\n")
    (folder / "b.py").write_text(f"{back}\n")

    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(tmp_path)).prepare()


@pytest.mark.integration
def test_the_import_costs_next_to_nothing():
    """Public names load on first use; transformers still finds the models by their type, without an import of ours."""
    code = """
import sys, torch, transformers
before = set(sys.modules)
import gmail_hf
print(sorted(name for name in set(sys.modules) - before if not name.startswith("importlib")))
print(type(transformers.AutoConfig.for_model("gmail_siglip")).__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, found = done.stdout.splitlines()[-2:]
    assert modules == "['gmail_hf', 'gmail_hf.registration', 'gmail_hf.version']"
    assert found == "gmail_hf.models.siglip"
