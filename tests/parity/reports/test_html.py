"""The page for people: it says the verdict, all of it, and needs nothing beside it."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import matplotlib
import pytest

from propulsion_export.parity.comparison import DECADES, FACTOR, OutputErrors
from propulsion_export.parity.reports.html import to_html
from propulsion_export.parity.reports.report import Check, Coverage, NotRun, ParityReport

EMPTY = (0,) * (len(DECADES) - 1)


def histogram(**counts):
    """Counts by decade: `histogram(e7=3)` puts three elements between 1e-7 and 1e-6."""
    by_decade = {-int(name[1:]): count for name, count in counts.items()}
    return tuple(by_decade.get(decade, 0) for decade in DECADES[:-1])


GOOD = OutputErrors(
    "logits",
    3e-7,
    4e-8,
    2e-7,
    FACTOR * 2e-7,
    5.0,
    "[0, 1]: oracle 1.5, candidate 1.6",
    51,
    0,
    histogram(e9=2, e8=40, e7=9),
    histogram(e8=44, e7=7),
)
BAD = replace(GOOD, error=4e-3, histogram=histogram(e4=12, e3=3))
NAN = replace(GOOD, error=math.nan, non_finite=3)


def parity_of(*outputs):
    return Check("parity", "tenant-a", all(errors.passed for errors in outputs), "found", outputs)


def report_with(*checks, **changes):
    report = ParityReport("models/router", "onnx", "float16", "a runner", 16, 7, checks)
    return replace(report, **changes)


class Page(HTMLParser):
    """What a reader gets: tags with attributes, and text outside of styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self._inside = [], [], []
        self.feed(page)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside.append(tag)

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._inside:
            self.texts.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.mark.parametrize(
    ("checks", "word"),
    [
        pytest.param([parity_of(GOOD)], "PASSED", id="passed"),
        pytest.param([parity_of(GOOD), parity_of(BAD)], "FAILED", id="one-fails"),
        pytest.param([parity_of(NAN)], "FAILED", id="nan"),
        pytest.param([], "NOT RUN", id="nothing-ran"),
    ],
)
def test_the_verdict_stands_at_the_top_in_words(checks, word):
    page = to_html(report_with(*checks))

    assert re.findall(r'<p class="word">(.*?)</p>', page) == [word]
    assert f"<title>{word}: " in page


def test_the_page_says_what_was_judged_and_how():
    text = Page(to_html(report_with(parity_of(GOOD), tools={"torch": "2.13.0"}))).text

    for fact in ("models/router", "onnx", "float16", "a runner", "16", "7", "torch", "2.13.0"):
        assert fact in text
    assert f"at most {FACTOR:g} times the one that PyTorch itself makes in float16" in text


def test_inputs_that_were_given_have_no_seed():
    assert "none, inputs were given" in to_html(report_with(seed=None))


def test_every_check_and_every_reason_for_not_running_is_listed():
    checks = [
        Check("effect", f"tenant-{number}", number % 2 == 0, f"detail {number}")
        for number in range(30)
    ]
    not_run = (NotRun("the engine", "no GPU here"), NotRun("labels", "no head was saved"))

    page = Page(to_html(report_with(*checks, not_run=not_run)))

    for number in range(30):
        word = "\u2713 passed" if number % 2 == 0 else "\u2717 failed"
        assert f"effect tenant-{number} {word} detail {number}" in page.text
    assert "Not run What Why the engine no GPU here labels no head was saved" in page.text


def test_nothing_that_could_not_run_leaves_no_section_for_it():
    page = to_html(report_with(parity_of(GOOD)))

    assert "<h2>Checks</h2>" in page
    assert "<h2>Not run</h2>" not in page


def test_what_was_compared_stands_before_what_was_not():
    coverage = (Coverage("long rows", False, "--thorough"), Coverage("masks", True, "4 rows"))

    text = Page(to_html(report_with(parity_of(GOOD), coverage=coverage))).text

    assert "Compared: 1 masks : 4 rows Not compared: 1 long rows : --thorough" in text


EVIL = "<script>alert('\"$x_1$\\frac&')</script>\x00\ud800"


def test_names_from_outside_cannot_add_markup():
    evil = replace(GOOD, output=EVIL, worst=EVIL)
    checks = (Check("parity", EVIL, True, EVIL, (evil,)),)
    report = ParityReport(
        EVIL, EVIL, EVIL, EVIL, 16, 0, checks, (NotRun(EVIL, EVIL),), {EVIL: EVIL}
    )
    plain = report_with(parity_of(GOOD), not_run=(NotRun("a", "b"),), tools={"c": "d"})

    page = to_html(report)

    assert page.encode().decode() == page
    assert [tag for tag, _ in Page(page).tags] == [tag for tag, _ in Page(to_html(plain)).tags]
    assert "\x00" not in page
    assert unescape(page).count("<script>alert('\"$x_1$\\frac&')</script>\ufffd\ufffd") == 17


def test_the_page_needs_nothing_from_outside():
    page = to_html(report_with(parity_of(GOOD, BAD), tools={"torch": "2.13.0"}))

    assert "//" not in page.replace("</", "")
    assert not re.search(r"@import|url\((?!#)", page)
    tags = Page(page).tags
    assert {"svg", "table", "style"} <= {tag for tag, _ in tags}
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    references = [value for _, given in tags for name, value in given.items() if "href" in name]
    assert all(reference.startswith("#") for reference in references)


def test_the_same_report_gives_the_same_page_whatever_style_matplotlib_has():
    report = report_with(parity_of(GOOD, BAD))
    first = to_html(report)

    with matplotlib.rc_context({"font.size": 40, "svg.fonttype": "path", "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        second = to_html(report)
        assert dict(matplotlib.rcParams) == before

    assert second == first


def test_no_two_elements_share_an_id_and_every_reference_has_its_target():
    tags = Page(to_html(report_with(parity_of(GOOD, BAD), parity_of(GOOD)))).tags
    ids = [given["id"] for _, given in tags if "id" in given]
    named = [given["aria-labelledby"] for tag, given in tags if tag == "svg"]
    used = [value[1:] for _, given in tags for name, value in given.items() if "href" in name]
    clips = [given["clip-path"][5:-1] for _, given in tags if "clip-path" in given]

    assert len(named) == 3
    assert used
    assert clips
    assert len(ids) == len(set(ids))
    assert {*named, *used, *clips} <= set(ids)


def test_each_picture_has_its_numbers_as_text_for_those_who_do_not_see_it():
    page = to_html(report_with(parity_of(BAD)))

    titles = re.findall(r'<title id="picture-1-title">(.*?)</title>', page)
    assert len(titles) == 1
    assert "tenant-a: logits" in titles[0]
    assert "candidate at most 0.004, PyTorch at most 2e-07, allowed 8e-07" in titles[0]


def test_tables_name_their_columns_and_rows():
    page = Page(to_html(report_with(parity_of(GOOD), not_run=(NotRun("a", "b"),))))

    scopes = [given.get("scope") for given in page.all("th")]
    assert scopes == ["col"] * 4 + ["row"] + ["col"] * 2 + ["row"]


def figures_of(page):
    return re.findall(r"<figure.*?</figure>", page, re.DOTALL)


def test_within_a_failed_check_each_output_shows_its_own_verdict():
    good, bad, nan = figures_of(to_html(report_with(parity_of(GOOD, BAD, NAN))))

    assert "\u2713</span> passed" in good
    assert "used 37.5% of the allowed error" in good
    assert "\u2717</span> failed" in bad
    assert "5,000 times the allowed error" in bad
    assert "\u2717</span> failed" in nan
    assert "3 of 51 numbers are NaN or infinite" in nan


@pytest.mark.parametrize(
    ("share", "width", "limit"), [(0.25, "25.00%", "100.00%"), (2.0, "100.00%", "50.00%")]
)
def test_the_bar_is_as_long_as_the_share_used_and_marks_the_whole(share, width, limit):
    errors = replace(GOOD, error=share * GOOD.allowed)

    page = to_html(report_with(parity_of(errors)))

    assert re.findall(r'<span style="width:(.*?)">', page) == [width]
    assert re.findall(r'<b style="left:calc\((.*?) - 2px\)">', page) == [limit]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"error": 0.0, "histogram": EMPTY}, "used 0.0%", id="exact"),
        pytest.param(
            {"error": 0.0, "allowed": 0.0, "reference_error": 0.0, "scale": 0.0}
            | {"histogram": EMPTY, "reference_histogram": EMPTY},
            "No finite error above 0",
            id="all-zero",
        ),
        pytest.param({"allowed": 0.0, "reference_error": 0.0}, "allowed error is 0", id="none"),
        pytest.param({"allowed": math.nan, "reference_error": math.nan}, "no limit", id="no-limit"),
        pytest.param({"error": math.inf, "scale": math.inf}, "NaN or infinite", id="infinite"),
        pytest.param({"error": 3e9, "histogram": histogram(e7=1)}, "3.8e+15 times", id="far-off"),
        pytest.param({"allowed": 5e-324}, "allowed error is 0", id="overflowing-share"),
        pytest.param({"allowed": 8e-6}, "rounding sets the limit", id="floor"),
        pytest.param({"error": 1e-7, "histogram": histogram(e7=1)}, "used 12.5%", id="on-an-edge"),
    ],
)
def test_odd_numbers_are_told_in_words(changes, expected):
    [figure] = figures_of(to_html(report_with(parity_of(replace(GOOD, **changes)))))

    assert expected in figure
    assert f'class="mark {"passed" if replace(GOOD, **changes).passed else "failed"}"' in figure


def rightmost_x_of_the_candidate(page):
    path, _in_the_legend = re.findall(r'd="([^"]*)"[^>]*style="fill: var\(--candidate\)', page)
    return max(float(x) for x in re.findall(r"[ML] ([\d.]+)", path))


def x_of_the_limit(page):
    [path] = re.findall(r'd="([^"]*)"[^>]*style="[^"]*stroke: var\(--failed\)', page)
    return float(re.findall(r"M ([\d.]+)", path)[0])


@pytest.mark.parametrize(("share", "beyond"), [(0.9, False), (1.1, True)])
def test_the_bars_cross_the_line_of_the_allowed_error_only_when_it_is_exceeded(share, beyond):
    errors = replace(GOOD, error=share * GOOD.allowed)

    page = to_html(report_with(parity_of(errors)))

    assert (rightmost_x_of_the_candidate(page) > x_of_the_limit(page)) == beyond


def test_importing_the_page_loads_no_matplotlib():
    code = (
        "import sys, propulsion_export.parity.reports.html; sys.exit('matplotlib' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
