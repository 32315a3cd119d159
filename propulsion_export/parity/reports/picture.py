"""One output's errors against PyTorch's own, as an inline SVG that follows the page's colours."""

import io
import math
import re
from collections.abc import Callable
from typing import Any

from propulsion_export.parity.comparison import DECADES, OutputErrors

# Where the axis of counts begins; below one, so that a single element is seen.
_BASELINE = 0.5
# Stand-ins for the page's own colours, so that a picture follows light and dark.
INK, MUTED, CANDIDATE, _REFERENCE, FAILED = (
    "#010101",
    "#020202",
    "#030303",
    "#040404",
    "#050505",
)
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    CANDIDATE: "var(--candidate)",
    _REFERENCE: "var(--reference)",
    FAILED: "var(--failed)",
}
# Parts to remove: the header, the date, style rules for the whole page, comments, fonts.
_USELESS = re.compile(
    r"^.*?<svg[^>]*>|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"
    r"|font-family: [^;\"]*;? ?",
    re.DOTALL,
)


def picture(errors: OutputErrors, number: int, heading: str) -> str:
    """An inline SVG of both error histograms and the limits; a sentence when there is none."""
    if not any(errors.histogram) and not any(errors.reference_histogram):
        return "<p>No finite error above 0 to draw.</p>"
    title = (
        f"{heading}: how many elements err by how much; candidate at most {errors.error:.3g}, "
        f"PyTorch at most {errors.reference_error:.3g}, allowed {errors.allowed:.3g}"
    )
    return inlined(_draw(errors), f"picture-{number}", title)


def inlined(svg: str, name: str, title: str) -> str:
    """Matplotlib's SVG document as a part of a page, in the page's colours.

    Args:
        svg: drawn with the colours of `INK`, `MUTED`, `CANDIDATE` and `FAILED`.
        name: begins every id; several pictures share the page.
        title: what the picture shows, for those who do not see it.
    """
    view = re.findall(r'viewBox="[^"]*"', svg)[0]
    svg = _USELESS.sub("", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return (
        f'<svg role="img" aria-labelledby="{name}-title" {view}>\n'
        f'<title id="{name}-title">{title}</title>{svg}'
    )


def _draw(errors: OutputErrors) -> str:
    """Both histograms over the decades of the error, as matplotlib's SVG document."""

    def draw(axes: Any) -> None:
        _draw_histograms(axes, errors)
        _draw_limits(axes, errors)
        _arrange(axes, errors)

    return drawn(draw)


def drawn(draw: Callable[[Any], None]) -> str:
    """What `draw` puts on matplotlib's axes, as an SVG document; equal input, equal text."""
    # Not pyplot: a figure of its own needs no display and leaves no global state.
    from matplotlib import style
    from matplotlib.figure import Figure

    # The default style, so that a user's matplotlibrc changes nothing.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "parity", "font.size": 9}
    with style.context(["default", settings]):
        figure = Figure(figsize=(6.2, 3.0))
        draw(figure.add_axes((0.085, 0.155, 0.88, 0.72)))
        document = io.StringIO()
        figure.savefig(document, format="svg", transparent=True)
    return document.getvalue()


def _draw_histograms(axes: Any, errors: OutputErrors) -> None:
    filled = {"fill": True, "alpha": 0.45, "color": CANDIDATE, "linewidth": 0}
    outlined = {"color": _REFERENCE, "linewidth": 1.8, "linestyle": (0, (4, 1.5))}
    series = [
        (errors.histogram, errors.error, "candidate", filled),
        (errors.reference_histogram, errors.reference_error, "PyTorch at this precision", outlined),
    ]
    for histogram, largest, label, look in series:
        if any(histogram):
            counts, edges = _bins(histogram, largest)
            axes.stairs(counts, edges, baseline=_BASELINE, label=label, **look)


def _bins(histogram: tuple[int, ...], largest: float) -> tuple[list[float], list[float]]:
    """Counts and edges (log10 of the error) from the first to the last decade with elements.

    The last one ends at the largest error: a whole decade would reach past what is allowed.
    """
    filled = [place for place, count in enumerate(histogram) if count]
    first, last = filled[0], filled[-1]
    edges = [float(decade) for decade in DECADES[first : last + 2]]
    if (end := _log(largest)) is not None:
        edges[-1] = max(end, edges[-2] + 0.05)
    return [max(count, _BASELINE) for count in histogram[first : last + 1]], edges


def _log(value: float) -> float | None:
    return math.log10(value) if math.isfinite(value) and value > 0 else None


def _draw_limits(axes: Any, errors: OutputErrors) -> None:
    near = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
    if (own := _log(errors.reference_error)) is not None:
        axes.axvline(own, color=_REFERENCE, linewidth=1.2, linestyle=":")
        text = f"PyTorch's largest {errors.reference_error:.2g}"
        axes.annotate(text, (own, 0.97), (-4, 0), ha="right", color=_REFERENCE, **near)
    if (allowed := _log(errors.allowed)) is not None:
        axes.axvline(allowed, color=FAILED, linewidth=1.8)
        text = f"allowed {errors.allowed:.2g}"
        axes.annotate(text, (allowed, 0.97), (5, 0), ha="left", color=FAILED, **near)


def _arrange(axes: Any, errors: OutputErrors) -> None:
    """Room for the labels beside the limits, and ticks at powers of ten."""
    limits = [x for x in (_log(errors.reference_error), _log(errors.allowed)) if x is not None]
    left, right = axes.dataLim.intervalx
    left, right = min([left, *limits]), max([right, *limits])
    room = 0.3 * max(right - left, 2.0)
    if limits:
        left, right = min(left, limits[0] - 1.2 * room), max(right, limits[-1] + room)
    left, right = math.floor(left), math.ceil(right)
    peak = max(*errors.histogram, *errors.reference_histogram)
    axes.set(xlim=(left, right), yscale="log", ylim=(_BASELINE, 2 * peak**1.25))
    step = max(1, math.ceil((right - left) / 9))
    decades = range(left, right + 1, step)
    axes.set_xticks(decades, [_power(decade) for decade in decades])
    tens = range(0, math.ceil(math.log10(peak)) + 1, 1 + int(math.log10(peak)) // 5)
    axes.set_yticks([10.0**ten for ten in tens], [_power(ten) for ten in tens])
    axes.minorticks_off()
    axes.set_xlabel("absolute error against float64", color=MUTED)
    axes.set_ylabel("elements", color=MUTED)
    axes.tick_params(color=MUTED, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set(color=MUTED, visible=side in ("left", "bottom"))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, labelcolor=INK)


def _power(ten: int) -> str:
    superscript = str.maketrans(
        "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
    )
    return "10" + str(ten).translate(superscript) if ten else "1"
