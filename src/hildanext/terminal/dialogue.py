"""A conversation with an engine: its messages, the ids they were decoded as, and what to drop when it grows too long."""

from __future__ import annotations

import json
from pathlib import Path

from hildanext.data.conversations import check_messages
from hildanext.decoding.engines import Engine, Request
from hildanext.decoding.settings import Settings, check_request, tokens_needed
from hildanext.errors import DataError
from hildanext.files import atomic_open, write_json

ROOM = 0.75  # a conversation that no longer fits is cut down to this share of the context


class Dialogue:
    """Turn by turn: `ask`, then `answered` or `take_back`.

    `known` are the ids of the turns so far, the answers' as they were decoded: a slot of the cache has them.
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
        """Put a system message first, in place of the one that is there; None takes it away."""
        del self.messages[: self.n_system]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def reset(self) -> None:
        """Begin anew; the system message stays."""
        del self.messages[self.n_system :]
        self.known = []

    def ask(self, text: str, settings: Settings) -> tuple[Request, int]:
        """Add a message: the request for its answer, and how many of the oldest messages were dropped to make room.

        Raises UsageError, with the conversation as it was, for a message that does not even fit alone.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self.engine.encode(self.messages, self.known)
            if self._fits(ids, settings, 1.0):
                return Request(ids, settings), 0
            # To a part of the context only: else every further turn would drop one, and the texts that slots hold would
            # begin otherwise each time.
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
        """The oldest message that is not the system's, with the answers to it."""
        first = self.n_system
        del self.messages[first]
        while len(self.messages) > first + 1 and self.messages[first]["role"] == "assistant":
            del self.messages[first]

    def answered(self, request: Request, token_ids: list[int], text: str) -> None:
        """The answer, or what there is of it."""
        self.messages.append({"role": "assistant", "content": text})
        self.known = request.prompt_ids + token_ids

    def take_back(self) -> None:
        """The last message got no answer."""
        self.messages.pop()

    def save(self, path: Path) -> None:
        """Write the messages as JSON, or as Markdown for `.md`, atomically."""
        if path.suffix == ".md":
            with atomic_open(path) as file:
                file.write("\n\n".join(f"**{one['role']}**\n\n{one['content']}" for one in self.messages) + "\n")
        else:
            write_json(path, self.messages)

    def load(self, path: Path) -> None:
        """Go on with a conversation that `save` wrote as JSON. Raises DataError for any other file."""
        try:
            found = check_messages(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError, DataError) as error:
            raise DataError(f"{path}: not a conversation that /save wrote as JSON: {error}") from None
        self.messages = [{"role": one["role"], "content": one["content"]} for one in found]
        self.known = []
