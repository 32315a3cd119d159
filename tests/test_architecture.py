import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "propulsion_export"


# A module or package imports only those above it in this list; see docs/architecture.md.


# A module or package imports only those above it in this list; see docs/architecture.md.
ORDER = (
    "errors",
    "environment",
    "base_model",
    "data",
    "adapters",
    "artifacts",
    "scaling",
    "merging",
    "tuning",
    "training",
    "graph",
    "engine",
    "runners",
    "serving",
    "parity",
    "packaging",
    "pipeline",
    "cli",
    "pytest_plugin",
)
RANK = {name: index for index, name in enumerate(ORDER)}


def modules():
    """Dotted name and file of every module, in propulsion_export/ and in cli/."""
    for folder, package in (("propulsion_export", PACKAGE), ("cli", f"{PACKAGE}.cli")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            inner = file.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *inner]).removesuffix(".__init__"), file


MODULES = dict(modules())


def part_of(module):
    """The entry of ORDER that a module belongs to; empty for the package's root."""
    return module.removeprefix(PACKAGE).lstrip(".").partition(".")[0]


def imports_of(source, module, is_package=False):
    """Every module of ours that the source imports, anywhere, in any spelling."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level + is_package or None]
                base = ".".join([*parents, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {base} if base != PACKAGE else set()
            found |= {name for name in names if name in MODULES or base == PACKAGE}
    return {name for name in found if name == PACKAGE or name.startswith(f"{PACKAGE}.")}


def violations(source, module, is_package=False):
    """What a module imports against the order, as sentences."""
    own = part_of(module)
    found = []
    for target in sorted(imports_of(source, module, is_package)):
        other = part_of(target)
        if other == own:
            continue
        if other not in RANK or own not in RANK:
            found.append(f"{module} imports {target}, which is not in the list")
        elif RANK[other] > RANK[own]:
            found.append(f"{module} imports {target}, which is below it in the list")
    return found


# The rule, and that it can be broken


def test_a_package_imports_only_what_is_above_it_in_the_list():
    assert [
        violation
        for module, file in MODULES.items()
        if module != PACKAGE
        for violation in violations(file.read_text(), module, file.name == "__init__.py")
    ] == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("adapters.adapter", "from propulsion_export.artifacts.artifact import Artifact", "it in"),
        ("adapters.adapter", "import propulsion_export.serving", "serving, which is below it in"),
        ("adapters.adapter", "from propulsion_export import graph", "graph, which is below it in"),
        ("tuning.layer", "from ..training import train", "training, which is below it in"),
        (
            "scaling.attach",
            "def f():\n    from propulsion_export.runners import x",
            "runners, which",
        ),
        ("scaling.attach", "if True:\n    import propulsion_export.parity.cases as c", "it in"),
        ("errors", "from propulsion_export.artifacts.staging import x", "staging, which is below"),
        ("engine.builder", "from ..pipeline.export import export", "export, which is below it"),
        ("pipeline.export", "from propulsion_export.cli.app import main", "app, which is below it"),
        ("graph.trace", "from propulsion_export.utils import x", "utils, which is not in"),
        ("utils", "from propulsion_export.errors import x", "errors, which is not in"),
    ],
)
def test_an_import_against_the_order_is_reported_by_name(module, source, expected):
    (violation,) = violations(source, f"{PACKAGE}.{module}")

    assert violation.startswith(f"{PACKAGE}.{module} imports {PACKAGE}.")
    assert violation.endswith("the list")
    assert expected in violation


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("graph.trace", "from propulsion_export.artifacts.artifact import Tensors"),
        ("scaling.fold.model", "from ..attach import check_fits"),
        ("scaling.fold.model", "from .shards import plan_shards"),
        ("training.run", "from propulsion_export.tuning import PropulsionConfig"),
        ("cli.run", "from propulsion_export.pipeline.run import predict"),
        ("cli.run", "from .console import Console"),
        ("graph.trace", "import torch\nfrom torch import nn"),
    ],
)
def test_an_import_in_the_order_is_not_reported(module, source):
    assert violations(source, f"{PACKAGE}.{module}") == []


def test_a_package_resolves_its_relative_imports_from_itself():
    assert imports_of("from .layer import x", f"{PACKAGE}.tuning", is_package=True) == {
        f"{PACKAGE}.tuning.layer"
    }
    assert imports_of("from .layer import x", f"{PACKAGE}.tuning.model") == {
        f"{PACKAGE}.tuning.layer"
    }


def test_the_list_names_every_package_and_no_other():
    assert {part_of(module) for module in MODULES} - {""} == set(ORDER)


def test_no_module_imports_itself_by_way_of_others():
    left = {
        module: imports_of(file.read_text(), module, file.name == "__init__.py")
        & MODULES.keys() - {module}
        for module, file in MODULES.items()
        if file.name != "__init__.py"
    }
    left = {module: needs & left.keys() for module, needs in left.items()}
    while ready := {module for module, needs in left.items() if not needs}:
        left = {module: needs - ready for module, needs in left.items() if module not in ready}

    assert left == {}


# House rules


@pytest.mark.parametrize("module", MODULES)
def test_a_module_starts_with_a_sentence(module):
    docstring = ast.get_docstring(ast.parse(MODULES[module].read_text()))

    assert docstring
    assert docstring.split("\n\n")[0].endswith((".", "?"))


def test_no_module_is_a_drawer_for_everything():
    drawers = {"utils", "util", "common", "helpers", "misc"}

    assert [module for module in MODULES if drawers & set(module.split("."))] == []


# Functions that may take any keyword although no library's class asks for them, and why.
TAKES_ANY_KEYWORD = {
    f"{PACKAGE}.base_model.chat.rendering:_TemplateDict.__call__": "is what templates call `dict`",
    f"{PACKAGE}.training.head:_cached_outputs.cached": "replaces forward() of any base model",
    f"{PACKAGE}.graph.trace:trace_encoder_decoder.lambda": "replaces forward() of any base model",
    f"{PACKAGE}.parity.stacks:returning.lambda": "replaces forward() of any base model's layers",
    f"{PACKAGE}.parity.by_layer:_only.recorded": "replaces forward() of any base model's layer",
}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
SCOPES = FUNCTIONS | ast.Lambda | ast.ClassDef
NO_LIBRARY = {"object", "Generic", "Protocol", "NamedTuple", "TypedDict", "Exception"}


def classes_of(source):
    """The classes that a source defines, with the last parts of their bases' names."""
    return {
        node.name: {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    }


def extends_a_library(name, classes):
    """Whether a base of the class, or of one of its bases, is a class of another library."""
    return any(
        extends_a_library(base, classes) if base in classes else base not in NO_LIBRARY
        for base in classes[name]
    )


def any_keywords(source, classes):
    """Functions that take keywords of any type, except methods for a library's base class."""
    yield from _any_keywords(ast.parse(source), (), classes, is_override=False)


def _any_keywords(tree, path, classes, *, is_override):
    for node in ast.iter_child_nodes(tree):
        inner = (*path, getattr(node, "name", "lambda")) if isinstance(node, SCOPES) else path
        keywords = node.args.kwarg if isinstance(node, FUNCTIONS | ast.Lambda) else None
        if keywords is not None and not is_override:
            annotation = keywords.annotation and ast.unparse(keywords.annotation)
            if annotation in (None, "Any", "typing.Any", "object"):
                yield ".".join(inner)
        extends = isinstance(node, ast.ClassDef) and extends_a_library(node.name, classes)
        yield from _any_keywords(node, inner, classes, is_override=extends)


def test_nobody_takes_keywords_that_mypy_does_not_see():
    sources = {module: file.read_text() for module, file in MODULES.items()}
    classes = {name: bases for s in sources.values() for name, bases in classes_of(s).items()}

    found = {
        f"{module}:{name}"
        for module, source in sources.items()
        for name in any_keywords(source, classes)
    }

    assert found == set(TAKES_ANY_KEYWORD)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("def f(**options: Any): ...", ["f"], id="any"),
        pytest.param("async def f(*a, **k: typing.Any): ...", ["f"], id="with-positional"),
        pytest.param("def f(**options): ...", ["f"], id="no-annotation"),
        pytest.param("f = lambda **options: 1", ["lambda"], id="lambda"),
        pytest.param("class A:\n    def f(self, **k: Any): ...", ["A.f"], id="no-base"),
        pytest.param("class A(Generic[T]):\n    def f(self, **k: Any): ...", ["A.f"], id="generic"),
        pytest.param(
            "class A: ...\nclass B(A):\n    def f(self, **k: Any): ...", ["B.f"], id="base-of-ours"
        ),
        pytest.param(
            "class A(nn.Module):\n    def f(self):\n        def g(**k: Any): ...",
            ["A.f.g"],
            id="inside-a-method",
        ),
        pytest.param("class A(nn.Module):\n    def f(self, **k: Any): ...", [], id="override"),
        pytest.param(
            "class A(nn.Module): ...\nclass B(A):\n    def f(self, **k: Any): ...",
            [],
            id="override-in-a-grandchild",
        ),
        pytest.param("def f(**options: Unpack[Options]): ...", [], id="typed-dict"),
        pytest.param("def f(*a: P.args, **k: P.kwargs): ...", [], id="param-spec"),
    ],
)
def test_keywords_that_mypy_does_not_see_are_found(source, expected):
    assert list(any_keywords(source, classes_of(source))) == expected


def test_nobody_swallows_every_exception():
    assert [
        f"{module}:{node.lineno}"
        for module, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    ] == []


def test_library_code_prints_nothing():
    assert [
        f"{module}:{node.lineno}"
        for module, file in MODULES.items()
        if part_of(module) != "cli"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "click.echo")
    ] == []


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {module for module, file in MODULES.items() if file.name == "__init__.py"}

    assert set(listed) == packages
    assert sorted(listed) == listed


def test_every_public_name_is_where_the_package_says():
    import propulsion_export

    homes = propulsion_export._HOMES
    assert set(homes) == set(propulsion_export.__all__)
    assert sorted(propulsion_export.__all__) == propulsion_export.__all__
    for home in homes.values():
        module, _, attribute = home.partition(":")
        tree = ast.parse(MODULES[f"{PACKAGE}.{module}"].read_text())
        assert attribute in bound_names(tree), home


def bound_names(tree):
    """What a module defines or imports at its top level."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def test_an_unknown_name_is_an_attribute_error():
    import propulsion_export

    with pytest.raises(AttributeError, match="no attribute 'adaptor'"):
        _ = propulsion_export.adaptor
