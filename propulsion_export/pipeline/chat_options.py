"""The options of `run` for conversations, and the conversations that they ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propulsion_export.base_model.tasks import TASKS
from propulsion_export.base_model.tokenizer.words import joined
from propulsion_export.data.conversations import read_conversations
from propulsion_export.data.messages import Conversation
from propulsion_export.environment.cached import cached_property
from propulsion_export.errors import UsageError


@dataclass(frozen=True)
class ChatOptions:
    """How to read what is given.

    Attributes:
        chat: each text is a user's turn.
        system: a system turn before each conversation.
        conversation: file of conversations.
    """

    chat: bool = False
    system: str | None = None
    conversation: Path | None = None

    def check(self, task: str, *, text: bool = False, inputs: bool = False) -> None:
        """Refuse options that do not fit each other or the artifact's task.

        Args:
            task: what the artifact is for.
            text: whether texts are given.
            inputs: whether a file of texts is given.

        Raises:
            UsageError: they do not.
        """
        chats = self.chat or self.conversation is not None
        if self.system is not None and not chats:
            raise UsageError(
                "--system: is for conversations, expected --chat or --conversation beside it",
                remedy="Add --chat.",
            )
        if self.conversation is not None and (text or inputs):
            given = " and ".join(["--text"] * text + ["--inputs"] * inputs)
            raise UsageError(
                f"--conversation: is given with {given}, expected one of them",
                remedy="Write the turn into the file of the conversation.",
            )
        if chats and TASKS[task].architecture != "decoder":
            option = "--chat" if self.chat else "--conversation"
            raise UsageError(f"{option}: is for text-generation, the artifact is for {task}")

    def conversations(self, texts: Sequence[str]) -> list[Conversation]:
        """The conversations to answer; empty where the texts are prompts.

        Raises:
            DataError: the file cannot be used.
            UsageError: a conversation has a system turn, and another is given.
        """
        if self.conversation is not None:
            return self._from_file
        if not self.chat:
            return []
        return [self._opened([{"role": "user", "content": text}]) for text in texts]

    def shown(self, texts: Sequence[Any], row: int) -> dict[str, Any]:
        """What a result says was asked: the text, or the messages of a file."""
        if self.conversation is None:
            return {"text": joined(texts[row])}
        return {"messages": list(self._from_file[row].messages)}

    @cached_property
    def _from_file(self) -> list[Conversation]:
        assert self.conversation is not None
        found = read_conversations(self.conversation)
        begun = [
            f"--system: conversation {number} of {self.conversation} has a system turn already"
            for number, one in enumerate(found, 1)
            if self.system is not None and one.messages[0]["role"] == "system"
        ]
        if begun:
            raise UsageError(*begun, remedy="Leave --system out.")
        return [self._opened(one.messages, one.tools) for one in found]

    def _opened(self, messages: Sequence[Any], tools: Sequence[Any] | None = None) -> Conversation:
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        return Conversation([*opening, *messages], tools)
