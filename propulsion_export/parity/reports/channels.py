"""The errors of a wrong module channel by channel, as an inline SVG like `picture`."""

import math
from html import escape
from typing import Any

from propulsion_export.parity.reports.located import Located
from propulsion_export.parity.reports.picture import CANDIDATE, FAILED, INK, MUTED, drawn, inlined


def channels_picture(located: Located, number: int) -> str:
    """An inline SVG of the largest error in each channel; a sentence where there is none to draw.

    A mistaken scale shows as single channels far above the others.
    """
    heights = [error if math.isfinite(error) else math.nan for error in located.channel_errors]
    if not any(height > 0 for height in heights):
        return "<p>No finite error above 0 to draw.</p>"
    title = (
        f"{escape(located.path)}: the largest error of each channel; {located.channels_off} of "
        f"{located.channels} channels exceed the allowed {located.allowed:.3g}"
    )
    return inlined(drawn(lambda axes: _draw(axes, located, heights)), f"channels-{number}", title)


def _draw(axes: Any, located: Located, heights: list[float]) -> None:
    finite = [height for height in heights if height > 0]
    low = min(*finite, located.allowed or math.inf)
    high = max(*finite, located.allowed)
    floor, roof = low / 3, high * 6
    edges = [place * located.per_bin for place in range(len(heights))] + [located.channels]
    for beyond, colour in ((False, CANDIDATE), (True, FAILED)):
        # What is not finite has no height of its own: it stands as high as the picture.
        tall = [high * 2 if math.isnan(height) else height for height in heights]
        shown = [
            height if (height > located.allowed) == beyond and height > 0 else floor
            for height in tall
        ]
        label = "out of tolerance" if beyond else "within"
        axes.stairs(shown, edges, baseline=floor, fill=True, color=colour, alpha=0.7, label=label)
    axes.axhline(located.allowed or floor, color=FAILED, linewidth=1.5)
    axes.annotate(
        f"allowed {located.allowed:.2g}",
        (0.995, located.allowed or floor),
        (0, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color=FAILED,
    )
    axes.set(yscale="log", ylim=(floor, roof), xlim=(0, located.channels))
    axes.minorticks_off()
    axes.set_xlabel("channel", color=MUTED)
    axes.set_ylabel("largest error", color=MUTED)
    axes.tick_params(color=MUTED, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set(color=MUTED, visible=side in ("left", "bottom"))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, labelcolor=INK)
