"""A conversation with an engine: its messages, their token ids, and dropping old messages when it is too long."""

from __future__ import annotations

import json
from pathlib import Path

from hildanext.data.conversations import check_messages
from hildanext.decoding.engines import Engine, Request
from hildanext.decoding.settings import Settings, check_request, tokens_needed
from hildanext.errors import DataError, UsageError
from hildanext.files import atomic_open, write_json

ANSWER = {"role": "assistant", "content": ""}  # training data needs an answer, a saved conversation does not
ROOM = 0.75  # a conversation that no longer fits is cut to this share of the context


class Dialogue:
    """The messages of a conversation. For each message call `ask`, then `answered` or `take_back`.

    `known` holds the token ids so far, with answers as they were decoded. The cache can reuse them for the next prompt.
    """

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        self.engine = engine
        self.messages: list[dict[str, str]] = []
        self.known: list[int] = []
        self.set_system(system)

    @property
    def n_system(self) -> int:
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def set_system(self, text: str | None) -> None:
        """Set or replace the system message; None removes it."""
        del self.messages[: self.n_system]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def reset(self) -> None:
        """Remove all messages except the system message."""
        del self.messages[self.n_system :]
        self.known = []

    def ask(self, text: str, settings: Settings) -> tuple[Request, int]:
        """Add a user message; return the request for its answer and the number of old messages dropped to make room.

        Raises UsageError if the message does not fit even alone; the conversation is then left unchanged.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self.engine.encode(self.messages, self.known)
            if self._fits(ids, settings, 1.0):
                return Request(ids, settings), 0
            # Cut well below the context: otherwise each later message would drop one again, and the changed beginning
            # would make the cached tokens useless each time.
            while len(self.messages) > self.n_system + 1 and not self._fits(ids, settings, ROOM):
                self._drop_oldest()
                ids = self.engine.encode(self.messages)
            check_request(ids, settings, self.engine.context)
        except BaseException:
            self.messages = before
            raise
        return Request(ids, settings), len(before) + 1 - len(self.messages)

    def _fits(self, ids: list[int], settings: Settings, share: float) -> bool:
        return self.engine.context is None or tokens_needed(len(ids), settings) <= share * self.engine.context

    def _drop_oldest(self) -> None:
        """Drop the oldest message after the system message, together with its answers."""
        first = self.n_system
        del self.messages[first]
        while len(self.messages) > first + 1 and self.messages[first]["role"] == "assistant":
            del self.messages[first]

    def answered(self, request: Request, token_ids: list[int], text: str) -> None:
        """Add the answer, or the part of it that was decoded before a stop."""
        self.messages.append({"role": "assistant", "content": text})
        self.known = request.prompt_ids + token_ids

    def take_back(self) -> None:
        """Remove the last message, which got no answer."""
        self.messages.pop()

    def save(self, path: Path) -> None:
        """Write the messages as JSON, or as Markdown for `.md`, atomically. Raises UsageError if there are none."""
        if not self.messages:
            raise UsageError("the conversation is empty; there is nothing to save yet")
        if path.suffix == ".md":
            with atomic_open(path) as file:
                file.write(
                    "\n\n".join(f"**{message['role']}**\n\n{message['content']}" for message in self.messages) + "\n"
                )
        else:
            write_json(path, self.messages)

    def load(self, path: Path) -> None:
        """Load a conversation that `save` wrote as JSON, with or without an answer. Raises DataError for any other file."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            check_messages([*found, ANSWER] if isinstance(found, list) and found else found)
        except (json.JSONDecodeError, UnicodeDecodeError, DataError) as error:
            raise DataError(f"{path}: not a conversation saved as JSON by /save: {error}") from None
        self.messages = [{"role": message["role"], "content": message["content"]} for message in found]
        self.known = []
