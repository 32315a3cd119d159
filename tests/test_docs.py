"""What README, CONTRIBUTING and docs/ name in backticks exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "propulsion_export"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Files of this repository. Others in backticks are what commands read and write.
FILE_ENDINGS = (".py", ".md", ".toml", ".txt")
OTHER_FILES = re.compile(
    r".*\.(json|jsonl|html|xml|safetensors|onnx_adapter|bin|sqlite|onnx|data|pbtxt|model|jinja)"
)


def rooms():
    """The packages and modules at the root of the package, and cli."""
    return {path.stem for path in PACKAGE.iterdir()} | {"cli"}


def backticked(page):
    """Every text in single backticks outside code blocks, with its line."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [match[1] for match in re.finditer(r"`([^`\n]+)`", text)]


def module_file(path):
    """The file of `package/module` or a folder of ours, or None."""
    base = ROOT if path.startswith("cli") else PACKAGE
    for candidate in (base / f"{path}.py", base / path, ROOT / path):
        if candidate.exists():
            return candidate
    return None


def names_in(file):
    """What a module defines, methods as `Class.method`."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else ()
            found |= {f"{node.name}.{part.name}" for part in inner if hasattr(part, "name")}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {
                name.id
                for target in targets
                for name in ast.walk(target)
                if isinstance(name, ast.Name)
            }
    return found


def missing(text):
    """What a backticked text names that does not exist, or None if it names nothing of ours."""
    if re.fullmatch(r"[\w./-]+", text) is None or OTHER_FILES.fullmatch(text):
        return None
    first = re.split(r"[./]", text)[0]
    if "/" in text and (first in rooms() or (ROOT / first).is_dir()):
        return None if module_file(text.rstrip("/")) else f"{text}: no such module or file"
    if text.endswith(FILE_ENDINGS) and text.count("/"):
        return None if module_file(text) else f"{text}: no such file"
    if "." in text and first in rooms() and not text.endswith(FILE_ENDINGS):
        return _missing_name(text)
    return None


def _missing_name(text):
    parts = text.split(".")
    for cut in range(len(parts), 0, -1):
        file = module_file("/".join(parts[:cut]))
        if file is None:
            continue
        rest = ".".join(parts[cut:])
        if file.is_dir():
            file = file / "__init__.py"
        return None if not rest or rest in names_in(file) else f"{text}: {file.name} has no {rest}"
    return f"{text}: no such module"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_named_in_backticks_exists(page):
    texts = backticked(page)

    assert texts
    assert [wrong for text in texts if (wrong := missing(text))] == []


@pytest.mark.parametrize(
    "text",
    ["graph/traces", "graph.trace.trace_nothing", "scaling/fold/memory", "tests/test_nothing.py",
     "adapters.adapter.Adapter.nothing", "cli/nothing.py"],
)  # fmt: skip
def test_what_does_not_exist_is_found(text):
    assert missing(text)


@pytest.mark.parametrize(
    "text",
    ["graph/trace", "graph.trace.trace_decoder", "scaling/fold/", "tests/test_docs.py",
     "adapters.adapter.Adapter.read", "cli/run.py", "--mode bank", "errors", "docs/parity.md"],
)  # fmt: skip
def test_what_exists_is_not(text):
    assert missing(text) is None


def test_the_pages_name_enough_of_ours_to_be_worth_checking():
    ours = [
        text
        for page in PAGES
        for text in backticked(page)
        if "/" in text and text.split("/")[0] in rooms()
    ]

    assert len(ours) > 40


def walks():
    """The modules of each walk of docs/architecture.md, hop by hop."""
    text = (ROOT / "docs/architecture.md").read_text()
    section = text.partition("## Three walks")[2].partition("\n## ")[0]
    tables = re.split(r"^\*\*A ", section, flags=re.MULTILINE)[1:]
    return [re.findall(r"^\| \d+ \| `([^`]+)` \|", table, flags=re.MULTILINE) for table in tables]


def test_no_walk_enters_a_module_more_than_twice_and_all_exist():
    assert [len(walk) > 5 for walk in walks()] == [True, True, True]
    for walk in walks():
        assert max(map(walk.count, walk)) <= 2
        assert [module for module in walk if not (PACKAGE / f"{module}.py").is_file()] == []
