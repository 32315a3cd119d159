"""GitHub shows what the report says, whatever characters it holds; *not run* is not passed."""

import html
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from propulsion_export.parity.reports.github import (
    MOST_ANNOTATIONS,
    to_annotations,
    to_markdown,
)
from propulsion_export.parity.reports.report import Check, Coverage, NotRun, ParityReport

HELD = Check("parity", "base", True, "error 1e-07")
BROKEN = Check("effect", "tenant-a", False, "arrived by 0 %")


def report_with(*checks, **changes):
    values = {
        "artifact": "onnx/both",
        "kind": "onnx",
        "dtype": "float16",
        "runner": "a runner",
        "inputs": 16,
        "seed": 7,
    }
    return ParityReport(**(values | changes), checks=checks)


def shown(markdown):
    """Cells and text of the Markdown as a browser shows them; the tags are returned too."""
    page = MarkdownIt("gfm-like", {"linkify": False}).render(markdown)
    cells = re.findall(r"<(?:td|th|h3|p)>(.*?)</(?:td|th|h3|p)>", page, re.DOTALL)
    return [html.unescape(cell) for cell in cells], set(re.findall(r"</?([a-z0-9]+)", page))


def decoded(command):
    """Level, title and message of a workflow command, as GitHub's runner decodes them."""
    level, title, message = re.fullmatch(
        r"::(\w+) title=([^:,\r\n]*)::([^\r\n]*)", command
    ).groups()
    for code, character in (("%3A", ":"), ("%2C", ",")):
        title = title.replace(code, character)
    texts = []
    for text in (title, message):
        for code, character in (("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
            text = text.replace(code, character)
        texts.append(text)
    return level, *texts


@pytest.mark.parametrize(
    ("checks", "word"),
    [((HELD,), "passed"), ((HELD, BROKEN), "failed"), ((), "not run")],
)
def test_the_verdict_is_the_heading(checks, word):
    cells, _ = shown(to_markdown(report_with(*checks)))

    assert re.fullmatch(rf"\W+Parity {word}: onnx/both", cells[0])


def test_what_did_not_run_is_never_called_passed():
    report = report_with(not_run=(NotRun("the engine", "no GPU"),))

    assert "passed" not in to_markdown(report)
    assert "nothing is known" in to_markdown(report)
    assert to_annotations(report) == [
        "::warning title=parity not run%3A onnx/both::the engine: no GPU"
    ]


def test_failed_checks_and_what_is_not_covered_are_listed_and_the_rest_is_counted():
    gap = Coverage("long rows", False, "--thorough runs them")
    cells, _ = shown(
        to_markdown(report_with(HELD, BROKEN, coverage=(gap, Coverage("masks", True, "4"))))
    )

    assert "1 of 2 checks hold on 16 inputs (onnx in float16 with a runner)." in cells
    assert cells[5:8] == ["effect", "tenant-a", "arrived by 0 %"]
    assert cells[-2:] == ["long rows", "--thorough runs them"]
    assert "masks" not in cells


def test_a_clean_pass_annotates_nothing():
    assert to_annotations(report_with(HELD)) == []


def test_more_annotations_than_github_shows_are_counted():
    commands = to_annotations(report_with(*[BROKEN] * 14))

    assert len(commands) == MOST_ANNOTATIONS
    assert commands[-1].endswith("::and 5 more, see the report")


@given(st.text(), st.text())
@settings(deadline=None, max_examples=200)
def test_an_annotation_is_one_line_and_reads_as_written(artifact, detail):
    (command,) = to_annotations(report_with(Check("effect", "a", False, detail), artifact=artifact))

    assert decoded(command) == ("error", f"parity failed: {artifact}", f"effect of a: {detail}")


EVIL = st.text(st.sampled_from("ab1 |\\`*_{}[]()<>#+-.!~$&:@/\r\n\x85\u2028\x00\ud800=\"'"))


@given(EVIL, EVIL)
@settings(deadline=None, max_examples=300)
def test_markdown_shows_any_text_as_written(artifact, detail):
    report = report_with(Check("effect", "a", False, detail), artifact=artifact)

    markdown = to_markdown(report)

    cells, tags = shown(markdown)
    control = str.maketrans(dict.fromkeys("\r\n\x85\u2028\x00\ud800", " "))
    artifact, detail = (" ".join(text.translate(control).split()) for text in (artifact, detail))
    assert cells[0].endswith(f"Parity failed: {artifact}".rstrip())
    assert cells[-1] == detail
    assert tags <= {"h3", "p", "table", "thead", "tbody", "tr", "th", "td"}
    assert "$" not in markdown  # GitHub reads it as mathematics
    markdown.encode()
