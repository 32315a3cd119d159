"""Refuse options that do nothing in the chosen mode."""

from propulsion_export.artifacts.manifest import Mode
from propulsion_export.errors import UsageError


def check_mode_options(mode: Mode, *, untie: bool, allow_range: bool) -> None:
    """Refuse options that do nothing in an export mode.

    Raises:
        UsageError: naming each of them.
    """
    idle = {
        "--untie": untie and mode != "folded",
        "--allow-range": allow_range and mode == "folded",
    }
    if found := [option for option, applies in idle.items() if applies]:
        raise UsageError(
            *(f"{option}: does nothing with --mode {mode}" for option in found),
            remedy="Leave it out.",
        )
