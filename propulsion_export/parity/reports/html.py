"""The verdict as one self-contained HTML page with pictures."""

import math
from html import escape
from typing import Any

from propulsion_export.parity.comparison import FACTOR, OutputErrors
from propulsion_export.parity.reports.channels import channels_picture
from propulsion_export.parity.reports.junit import replace_forbidden
from propulsion_export.parity.reports.located import Located
from propulsion_export.parity.reports.picture import picture
from propulsion_export.parity.reports.report import Check, Coverage, ParityReport

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --panel: #f6f8fa; --ink: #1b1f24; --muted: #57606a;
  --line: #d0d7de; --candidate: #0b62c4; --reference: #b35900; --passed: #17722f;
  --failed: #c1202b; --unknown: #7a5200; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --panel: #171d24; --ink: #e6eaef;
  --muted: #9da7b3; --line: #343c46; --candidate: #62a9ff; --reference: #f2a65a;
  --passed: #4cc764; --failed: #ff7d76; --unknown: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1rem; font-weight: 600; color: var(--muted); }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.3rem; }
h3 { margin: 0; font-size: 1.05rem; }
p { margin: .5rem 0; max-width: 48rem; }
.passed { color: var(--passed); } .failed { color: var(--failed); }
.unknown { color: var(--unknown); }
.verdict { border-left: .6rem solid; padding: .25rem 0 .25rem 1.25rem; }
.verdict p { color: var(--ink); }
.verdict .word { margin: 0; font-size: 3.25rem; line-height: 1.1; font-weight: 800;
  color: inherit; }
dl { display: flex; flex-wrap: wrap; gap: .9rem 2.75rem; margin: 1.75rem 0; }
.facts div:first-child { flex-basis: 100%; }
dt { font-size: .8rem; color: var(--muted); } dd { margin: 0; font-variant-numeric: tabular-nums; }
.rule { padding: .75rem 1rem; background: var(--panel); border: 1px solid var(--line);
  border-radius: .5rem; max-width: none; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .4rem .9rem .4rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
td:last-child { min-width: 14rem; overflow-wrap: anywhere; }
thead th { font-size: .8rem; color: var(--muted); } tbody th { font-weight: 600; }
td.mark, .mark { font-weight: 700; white-space: nowrap; }
section > ul { margin: .25rem 0 1.25rem; padding: 0 0 0 1.4rem; max-width: 60rem; }
li { padding: .1rem 0 .1rem .25rem; } li span { color: var(--muted); }
.covered li::marker { content: "\u2713  "; color: var(--passed); }
.open li::marker { content: "\u2013  "; color: var(--unknown); }
.pictures { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; padding: 1rem 1.1rem; background: var(--panel); border: 1px solid var(--line);
  border-radius: .5rem; }
figure.beyond { border: 2px solid var(--failed); }
figcaption { display: flex; gap: 1rem; justify-content: space-between; align-items: baseline; }
figure svg { display: block; width: 100%; min-width: 30rem; height: auto; margin: .5rem 0; }
figure dl { gap: .4rem 1.75rem; margin: .5rem 0 0; font-size: .85rem; }
figure p { font-size: .85rem; margin: .6rem 0 .25rem; }
.bar { position: relative; height: .7rem; border: 1px solid var(--muted); border-radius: .2rem;
  overflow: hidden; }
.bar span { display: block; height: 100%; background: currentColor; }
.bar.failed span { background: repeating-linear-gradient(45deg, currentColor 0 .35rem,
  transparent .35rem .55rem); }
.bar b { position: absolute; top: 0; height: 100%; width: 2px; background: var(--ink); }
@media screen and (max-width: 40rem) { body { padding-top: 1.25rem; }
  dl { gap: .9rem 1.75rem; } .verdict .word { font-size: 2.5rem; }
  .found thead { position: absolute; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%); }
  .found tr { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .4rem 0;
    border-bottom: 1px solid var(--line); }
  .found tbody :is(th, td) { padding: .1rem 0; border: 0; }
  .found td:last-child { flex-basis: 100%; min-width: 0; } }
@media print { figure svg { min-width: 0; }
   body { padding: 0; font-size: .8rem; } figure, tr, .verdict { break-inside: avoid; }
  h2 { break-after: avoid; } }
"""


def to_html(report: ParityReport) -> str:
    """A page without scripts and external resources; the same report gives the same text."""
    pictured = [(check, errors) for check in report.checks for errors in check.outputs]
    panels = [
        _panel(check, errors, number) for number, (check, errors) in enumerate(pictured, start=1)
    ]
    not_run = [(entry.what, entry.reason) for entry in report.not_run]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{report.verdict.upper()}: parity of {_text(report.artifact)}</title>",
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
        _verdict(report),
        _facts(report),
        _tolerance(report),
        _section("Checks", _checks(report.checks)),
        _section("Coverage", _coverage(report.coverage)) if report.coverage else "",
        _section("Errors, output by output", f'<div class="pictures">{"".join(panels)}</div>')
        if panels
        else "",
        _section("The first wrong module", _located(report)) if report.located else "",
        _section("Price of quantisation", _price(report)) if report.price else "",
        _section("Not run", _table(("What", "Why"), not_run)) if not_run else "",
        _section("Tool versions", _table(("Tool", "Version"), sorted(report.tools.items())))
        if report.tools
        else "",
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _text(value: object) -> str:
    return escape(replace_forbidden(str(value)))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def _mark(passed: bool) -> str:
    name, sign = ("passed", "\u2713") if passed else ("failed", "\u2717")
    return f'<span class="mark {name}"><span aria-hidden="true">{sign}</span> {name}</span>'


def _verdict(report: ParityReport) -> str:
    name = {"passed": "passed", "failed": "failed", "not run": "unknown"}[report.verdict]
    held = sum(check.passed for check in report.checks)
    summary = (
        f"{held} of {len(report.checks)} checks hold" if report.checks else "Nothing was compared"
    )
    if report.passed and report.margin is not None:
        summary += f"; at worst {1 - report.margin:.0%} of the allowed error is used"
    if report.not_run:
        summary += f"; {len(report.not_run)} did not run or decided nothing, see below"
    return (
        f'<header class="verdict {name}">\n<h1>Parity with the trained PyTorch model</h1>\n'
        f'<p class="word">{report.verdict.upper()}</p>\n<p>{summary}.</p>\n</header>'
    )


def _facts(report: ParityReport) -> str:
    facts = {
        "Artifact": report.artifact,
        "Kind": report.kind,
        "Precision": report.dtype,
        "Runner": report.runner,
        "Inputs": f"{report.inputs:,}",
        "Seed": "none, inputs were given" if report.seed is None else report.seed,
    }
    return f'<dl class="facts">{_pairs(facts)}</dl>'


def _pairs(facts: dict[str, Any]) -> str:
    return "".join(
        f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items()
    )


def _tolerance(report: ParityReport) -> str:
    return (
        f'<p class="rule"><strong>What is allowed:</strong> an error of at most {FACTOR:g} times '
        f"the one that PyTorch itself makes in {_text(report.dtype)}, where the error of either is "
        "its largest distance from PyTorch in float64 on the same inputs.</p>"
    )


def _checks(checks: tuple[Check, ...]) -> str:
    if not checks:
        return "<p>No check ran, so nothing is known about this artifact.</p>"
    rows = "".join(
        f'<tr><th scope="row">{_text(check.case)}</th><td>{_text(check.adapter)}</td>'
        f"<td>{_mark(check.passed)}</td><td>{_text(check.detail)}</td></tr>\n"
        for check in checks
    )
    return _framed(("Case", "Adapter", "Verdict", "Found"), rows)


def _located(report: ParityReport) -> str:
    """The first wrong module of each failure, with the errors of its channels."""
    panels = [_culprit(one, number) for number, one in enumerate(report.located, start=1)]
    return f'<div class="pictures">{"".join(panels)}</div>'


def _culprit(located: Located, number: int) -> str:
    where, how = map(_text, located.lines())
    drawing = channels_picture(located, number) if located.channel_errors else ""
    return (
        f'<figure class="beyond">\n<figcaption><h3>{_text(located.path)}</h3>{_mark(False)}'
        f"</figcaption>\n<p>{where}.</p>\n{drawing}\n<p>{how}.</p>\n</figure>\n"
    )


def _coverage(coverage: tuple[Coverage, ...]) -> str:
    """What the verdict has looked at, then what it has not; each with how, or why not."""
    return _list("Compared", "covered", [one for one in coverage if one.covered]) + _list(
        "Not compared", "open", [one for one in coverage if not one.covered]
    )


def _list(title: str, name: str, entries: list[Coverage]) -> str:
    if not entries:
        return ""
    items = "".join(
        f"<li><strong>{_text(one.what)}</strong>: <span>{_text(one.detail)}</span></li>\n"
        for one in entries
    )
    return f'<h3>{title}: {len(entries)}</h3>\n<ul class="{name}">\n{items}</ul>\n'


def _price(report: ParityReport) -> str:
    """How far the quantised model is from the unquantised one, adapter by adapter."""
    rows = "".join(
        f'<tr><th scope="row">{_text(one.adapter)}</th><td>{_text(one.output)}</td>'
        f"<td>{one.compared:,}</td><td>{_text(one)}</td></tr>\n"
        for one in report.price
    )
    rounding = "".join(
        f"<p>The runtime rounds activations: {_text(one)}.</p>" for one in report.rounding
    )
    return (
        "<p>The distance from the unquantised model with the same adapter. It is told here, and "
        "judged only where --max-kl asks for it: then it is among the checks.</p>"
        f"{rounding}{_framed(('Adapter', 'Output', 'Compared', 'Found'), rows)}"
    )


def _table(headers: tuple[str, ...], entries: list[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>\n'
        for name, value in entries
    )
    return _framed(headers, rows)


def _framed(headers: tuple[str, ...], rows: str) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in headers)
    # Where the last column holds sentences, a narrow screen shows it below the others.
    name = "wide found" if len(headers) > 2 else "wide"
    return (
        f'<div class="{name}" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table></div>"
    )


def _panel(check: Check, errors: OutputErrors, number: int) -> str:
    numbers = {
        "Numbers": f"{errors.elements:,}",
        "Largest error": f"{errors.error:.3g}",
        "PyTorch's own": f"{errors.reference_error:.3g}",
        "Allowed": f"{errors.allowed:.3g}",
        "Largest value": f"{errors.scale:.3g}",
        "Worst element": errors.worst,
    }
    heading = f"{_text(check.adapter)}: {_text(errors.output)}"
    return (
        f'<figure class="{"within" if errors.passed else "beyond"}">\n'
        f"<figcaption><h3>{heading}</h3>{_mark(errors.passed)}</figcaption>\n"
        f'{_used(errors)}\n<div class="wide" tabindex="0">'
        f"{picture(errors, number, heading)}</div>\n"
        f"<dl>{_pairs(numbers)}</dl>\n</figure>\n"
    )


def _used(errors: OutputErrors) -> str:
    """How much of the allowed error is used up, in words and as a bar with a mark at 100 %."""
    share = errors.error / errors.allowed if errors.allowed else math.inf
    if errors.error == 0 and errors.passed:
        share = 0.0
    length = share if math.isfinite(share) else 1.0
    full = max(length, 1.0)
    name = "passed" if errors.passed else "failed"
    return (
        f'<p>{_used_in_words(errors, share)}</p>\n<div class="bar {name}" aria-hidden="true">'
        f'<span style="width:{length / full:.2%}"></span>'
        f'<b style="left:calc({1 / full:.2%} - 2px)"></b></div>'
    )


def _used_in_words(errors: OutputErrors, share: float) -> str:
    if not math.isfinite(errors.error):
        return (
            f"{errors.non_finite:,} of {errors.elements:,} numbers are NaN or infinite, or finite "
            "where PyTorch rules a token out (not drawn), which no tolerance allows"
        )
    if not math.isfinite(errors.allowed):
        return "no limit is known: PyTorch itself returns NaN or infinity at this precision"
    if not math.isfinite(share):
        return "any error is too much: the allowed error is 0"
    if share >= 10:
        times = f"{share:,.0f}" if share < 1e6 else f"{share:.2g}"
        return f"{times} times the allowed error"
    words = f"used {share:.1%} of the allowed error"
    if errors.allowed > 1.001 * FACTOR * errors.reference_error:
        words += "; PyTorch errs by less than one rounding here, so rounding sets the limit"
    return words
