"""Outputs as this tool leaves them, and what is compared of a directory."""

import functools

import pytest

from propulsion_export.artifacts.staging import check_replaceable, staged_directory
from propulsion_export.errors import UsageError

ADAPTER = "adapter_config.json"


def content_of(directory):
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def ours(directory, content=b"old"):
    """A directory as this tool leaves it."""
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes(b"{}")
    (directory / "weights").write_bytes(content)
    return directory


def refused(destination, match, *, force):
    """The refusal comes from the check and from the context, before anything is written."""
    top = destination.parent
    before = content_of(top), sorted(top.iterdir())
    early = functools.partial(check_replaceable, destination, marker=ADAPTER, force=force)
    for attempt in (early, staged_directory(destination, force=force, marker=ADAPTER).__enter__):
        with pytest.raises(UsageError, match=match) as caught:
            attempt()
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
    assert (content_of(top), sorted(top.iterdir())) == before
