import pytest

from propulsion_export.errors import UsageError
from propulsion_export.pipeline.mode_options import check_mode_options


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("switchable", {"untie": True}, "--untie: does nothing with --mode switchable"),
        ("bank", {"untie": True}, "--untie: does nothing with --mode bank"),
        ("folded", {"allow_range": True}, "--allow-range: does nothing with --mode folded"),
        ("folded", {"untie": True, "adapters": 0}, "--untie: does nothing without adapters"),
        ("bank", {"allow_range": True, "adapters": 0}, "--allow-range: does nothing without adapt"),
    ],
)
def test_an_option_that_does_nothing_is_refused_by_name(mode, options, message):
    with pytest.raises(UsageError, match=message):
        check_mode_options([mode], **{"untie": False, "allow_range": False, **options})


def test_all_options_that_do_nothing_are_named_at_once():
    with pytest.raises(UsageError, match=r"--untie: .*; --allow-range: .* Leave it out"):
        check_mode_options(["folded"], untie=True, allow_range=True, adapters=0)


@pytest.mark.parametrize(
    ("mode", "untie", "allow_range"),
    [("folded", True, False), ("switchable", False, True), ("bank", False, True)],
)
def test_an_option_that_acts_is_accepted(mode, untie, allow_range):
    check_mode_options([mode], untie=untie, allow_range=allow_range)


@pytest.mark.parametrize("mode", ["folded", "switchable", "bank"])
def test_no_option_is_needed(mode):
    check_mode_options([mode], untie=False, allow_range=False, adapters=0)
