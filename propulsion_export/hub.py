"""Find one file of a model, in a directory or by a hub's name."""

from pathlib import Path

from propulsion_export.quiet import quiet


def locate(source: str, name: str) -> Path | None:
    """Where the file lies, downloaded if need be; None if the model does not have it."""
    from transformers.utils import cached_file

    try:
        with quiet():
            file = cached_file(
                source,
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
    except OSError:  # neither a directory nor a possible name
        return None
    return Path(file) if file is not None else None
