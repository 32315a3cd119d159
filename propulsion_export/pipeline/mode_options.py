"""Refuse options that do nothing in the chosen modes."""

from collections.abc import Sequence

from propulsion_export.artifacts.manifest import Mode
from propulsion_export.errors import UsageError


def check_mode_options(
    modes: Sequence[Mode], *, untie: bool, allow_range: bool, adapters: int = 1
) -> None:
    """Refuse options that do nothing in any of the export modes, or without adapters.

    Args:
        modes: how the adapters are exported.
        untie: whether `--untie` is given.
        allow_range: whether `--allow-range` is given.
        adapters: how many adapters are exported.

    Raises:
        UsageError: naming each of them.
    """
    reasons = {
        "--untie": untie and _reason(modes, adapters, acts="folded" in modes),
        "--allow-range": allow_range and _reason(modes, adapters, acts=set(modes) != {"folded"}),
    }
    if found := [f"{name}: does nothing {reason}" for name, reason in reasons.items() if reason]:
        raise UsageError(*found, remedy="Leave it out.")


def _reason(modes: Sequence[Mode], adapters: int, *, acts: bool) -> str:
    """Why an option does nothing; empty if it acts."""
    if not acts:
        return f"with --mode {' and '.join(modes)}"
    return "" if adapters else "without adapters"
