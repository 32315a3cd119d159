"""Digests of all that artifacts and results are made by, so that nothing stale is used.

An artifact is made by the modules that `baselines` imports, and by those that these import: an edit
of anything else, of parity above all, leaves it as it is. A result is also made by the whole
package and by the kinds of mistakes.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import propulsion_export
from propulsion_export.environment.machine import tool_versions

_ROOT = Path(__file__).parents[2]
_PACKAGE = propulsion_export.__name__
# What is imported and makes no artifact: the comparison of the builder's graph with PyTorch, which
# raises or changes nothing, and the runtimes of graphs that there are.
_NOT_MAKING = (f"{_PACKAGE}.parity.built_graph", f"{_PACKAGE}.runners")
_BASELINES = "mutation.baselines"
_REPORTING = {"mutation.report", "mutation.__main__"}


@cache
def exports_stamp() -> str:
    """The digest of what makes clean artifacts, as it was when this process first asked."""
    return _digest(sources_of(_BASELINES))


@cache
def results_stamp() -> str:
    """The digest of what makes results: the artifacts, parity, serving, the mistakes."""
    return _results_digest()


def check_unchanged() -> None:
    """Make sure that no source was edited while this process runs.

    Raises:
        RuntimeError: one was, so that it is not known what a result was made by.
    """
    if _results_digest() != results_stamp():
        raise RuntimeError("sources were edited during the run; run it in a checkout of its own")


def _results_digest() -> str:
    package = (_ROOT / _PACKAGE).rglob("*.py")
    return _digest({*sources_of("mutation.running"), *package})


@cache
def sources_of(module: str) -> frozenset[Path]:
    """The files of a module and of everything of ours that it imports, wherever it does."""
    found: dict[str, Path] = {}
    waiting = [module]
    left_out = tuple(f"{name}." for name in _NOT_MAKING) if module == _BASELINES else ()
    while waiting:
        name = waiting.pop()
        file = _file_of(name)
        if file is None or name in found or name in _REPORTING or f"{name}.".startswith(left_out):
            continue
        found[name] = file
        waiting += _imported(name, file)
    return frozenset(found.values())


def _imported(name: str, file: Path) -> Iterator[str]:
    """The modules that a module may import, with the packages that they are in.

    The package's own root imports names when they are asked for, so that it is looked up by name
    where it is imported from.
    """
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    for node in tree.body if name == _PACKAGE else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from _with_parents(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == _PACKAGE:
            yield from _with_parents(_home(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from _with_parents([node.module, *names])
    if "import_module(" in source and name.startswith(f"{_PACKAGE}."):  # any of its neighbours
        inside = name.rpartition(".")[0]
        yield from (f"{inside}.{each.stem}" for each in file.parent.glob("*.py"))


def _home(name: str) -> str:
    """The module that a name of the public interface comes from."""
    home = propulsion_export._HOMES.get(name, name)
    return f"{_PACKAGE}.{home.partition(':')[0]}"


def _with_parents(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _file_of(name: str) -> Path | None:
    """The file of a module of the package or of the tests; None for any other."""
    folder = _ROOT if name.partition(".")[0] == _PACKAGE else _ROOT / "tests"
    path = folder.joinpath(*name.split("."))
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256(f"{sorted(tool_versions().items())}".encode())
    for file in sorted(files):
        digest.update(f"\n{file.relative_to(_ROOT)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
