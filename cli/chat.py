"""A conversation on a terminal."""

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from propulsion_export.errors import ArtifactError, PropulsionExportError

from .streams import print_note, print_result

if TYPE_CHECKING:
    from propulsion_export.serving.chat import Chat

_PROMPT = "> "
_HELP = "/reset forgets the conversation, /help shows this, Ctrl-C stops an answer, Ctrl-D ends."


def is_terminal() -> bool:
    """Whether a person can type."""
    return sys.stdin is not None and sys.stdin.isatty()


def talk(chat: "Chat", *, read: Callable[[str], str] | None = None) -> None:
    """Read turns and print answers until the input ends.

    Args:
        chat: the conversation.
        read: returns a line for a prompt, or raises EOFError; default: `input`.

    Raises:
        ArtifactError: an answer was computed from NaN.
    """
    with suppress(ImportError):
        import readline  # noqa: F401 - lines can be edited then
    print_note(_HELP)
    while True:
        try:
            line = (read or input)(_PROMPT)
        except EOFError:
            print_result("")
            return
        except KeyboardInterrupt:
            print_note(f"\n{_HELP}")
            continue
        if line.strip() == "/reset":
            chat.reset()
            print_note("The conversation is forgotten.")
        elif line.strip() == "/help":
            print_note(_HELP)
        elif line.strip():
            _answer(chat, line)


def _answer(chat: "Chat", line: str) -> None:
    try:
        reply = chat.ask(line, lambda piece: print_result(piece, nl=False))
    except ArtifactError:
        raise
    except PropulsionExportError as error:
        print_note(str(error))
        return
    print_result("")
    if reply is None:
        print_note("Stopped.")
    elif (reply.prediction or {}).get("stopped") == "length":
        print_note("Stopped at the most tokens that an answer may have, see --max-new-tokens.")
