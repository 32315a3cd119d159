"""Refuse options that do nothing in the chosen mode."""

from propulsion_export.artifacts.manifest import Mode
from propulsion_export.errors import UsageError


def check_mode_options(mode: Mode, *, untie: bool, allow_range: bool, adapters: int = 1) -> None:
    """Refuse options that do nothing in an export mode, or without adapters.

    Args:
        mode: how the adapters are exported.
        untie: whether `--untie` is given.
        allow_range: whether `--allow-range` is given.
        adapters: how many adapters are exported.

    Raises:
        UsageError: naming each of them.
    """
    reasons = {
        "--untie": untie and _reason(mode, adapters, acts=mode == "folded"),
        "--allow-range": allow_range and _reason(mode, adapters, acts=mode != "folded"),
    }
    if found := [f"{name}: does nothing {reason}" for name, reason in reasons.items() if reason]:
        raise UsageError(*found, remedy="Leave it out.")


def _reason(mode: Mode, adapters: int, *, acts: bool) -> str:
    """Why an option does nothing; empty if it acts."""
    if not acts:
        return f"with --mode {mode}"
    return "" if adapters else "without adapters"
