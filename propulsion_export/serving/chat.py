"""A conversation with an artifact, turn by turn."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from propulsion_export.errors import ArtifactError
from propulsion_export.serving.generation import Settings
from propulsion_export.serving.loaded_model import Reply
from propulsion_export.serving.session import Session


class Chat:
    """What was said, and the session that answers.

    Args:
        session: a loaded artifact that generates text, with a chat template.
        adapter: the adapter that answers; None for the artifact's default.
        system: a system turn at the beginning; None for none.
        settings: how to generate.
    """

    def __init__(
        self,
        session: Session,
        adapter: str | None = None,
        *,
        system: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        self._session, self._adapter = session, adapter
        self._settings = settings or Settings()
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system turn."""
        self.messages: list[dict[str, Any]] = list(self._opening)

    def ask(self, text: str, on_piece: Callable[[str], None] = lambda _: None) -> Reply | None:
        """Answer a user's turn; both are remembered.

        Args:
            text: the user's turn.
            on_piece: called with each piece of the answer as it is generated.

        Returns:
            The reply; None where an interrupt (Ctrl-C) stopped it. What was generated until then is
            remembered as the answer.

        Raises:
            PropulsionExportError: it cannot be answered; then the turn is forgotten.
        """
        pieces: list[str] = []

        def take(number: int, piece: str) -> None:
            pieces.append(piece)
            on_piece(piece)

        asked = [*self.messages, {"role": "user", "content": text}]
        settings = replace(self._settings, on_text=take)
        reply: Reply | None = None
        try:
            (reply,) = self._session(asked, self._adapter, settings=settings)
        except KeyboardInterrupt:
            answer = "".join(pieces)
        else:
            answer = _generated(reply)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return reply


def _generated(reply: Reply) -> str:
    """The text of a reply.

    Raises:
        ArtifactError: its logits were no numbers.
    """
    if reply.has_nan:
        raise ArtifactError(
            f"the artifact computes NaN or infinity with {reply.adapter!r}",
            remedy="`propulsion-export parity` shows which check fails.",
        )
    return str((reply.prediction or {})["generated"])
