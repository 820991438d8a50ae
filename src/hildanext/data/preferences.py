"""Reads preference pairs (a prompt with a chosen and a rejected answer) from files and turns them into padded rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hildanext.data.documents import Document, Rejects
from hildanext.data.encode import Encoded, encode_documents, fill_block
from hildanext.data.packing import Row
from hildanext.data.rows import RowOrder, to_batch
from hildanext.data.sources import instruct
from hildanext.data.sources.opening import file_name
from hildanext.data.sources.shapes import to_pair, to_tools
from hildanext.data.tokenizer import eos_id, pad_id
from hildanext.errors import CheckpointError, DataError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


WIDTHS = 128  # row lengths are multiples of this, because kernels are compiled for each length


class ConversationPair(NamedTuple):
    """Two conversations that differ only in their last turn."""

    chosen: Document
    rejected: Document


class PreferencePair(NamedTuple):
    """A preference pair as tokens. Only the last turn is supervised."""

    chosen: Encoded
    rejected: Encoded


def read_pairs(path: str, rejects: Rejects) -> Iterator[ConversationPair]:
    """Read pairs from JSON files and tables.

    `chosen` and `rejected` are answers to a conversation, prompt or instruction of the same record, or whole
    conversations. Records that are not pairs are counted in `rejects`. Raises UsageError for a missing path.
    """
    try:
        files = instruct.find(path)
    except UsageError as error:
        raise UsageError(str(error).replace("data.sources", "dpo.pairs")) from None
    for file, _ in files:
        for number, record in instruct.read_records(file, rejects):
            try:
                yield _to_pair(record, f"{file_name(file)}:{number}", file_name(file).split(".")[0])
            except DataError as error:
                rejects.add(str(error), file, number)


def _to_pair(record: dict[str, Any], name: str, source: str) -> ConversationPair:
    """The pair of a record. Raises DataError with the reason when it has none."""
    conversations = to_pair(record)
    chosen, rejected = ([{**message, "train": None} for message in messages] for messages in conversations)
    if chosen[:-1] != rejected[:-1]:
        raise DataError("the two answers have different prompts")
    if len(chosen) < 2:
        raise DataError("no prompt")
    if chosen == rejected:
        raise DataError("the two answers are the same")
    tools = to_tools(record)
    documents = []
    for *before, last in conversations:  # earlier turns of the assistant belong to the prompt
        given = [{**message, "train": False} if message["role"] == "assistant" else message for message in before]
        documents.append(Document(name, source, messages=[*given, {**last, "train": True}], tools=tools))
    return ConversationPair(*documents)


class EncodedPairs(NamedTuple):
    """Pairs as tokens, at most `seq_len` per conversation."""

    pairs: list[PreferencePair]
    n_cut: int  # conversations that were truncated
    n_left_out: int  # pairs without a difference or an answer in their first `seq_len` tokens


def encode_pairs(
    conversations: Sequence[ConversationPair],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    block_size: int,
    rejects: Rejects,
) -> EncodedPairs:
    """Render, tokenize and truncate pairs, and pad them to whole blocks as in SFT (see `fill_block`).

    Pairs with a conversation that cannot be encoded are counted in `rejects`.
    """
    pairs, n_cut, n_left_out, eos = [], 0, 0, eos_id(tokenizer)
    encoded = encode_documents([document for pair in conversations for document in pair], tokenizer)
    for index, pair in enumerate(conversations):
        sides = encoded[2 * index : 2 * index + 2]
        if problems := [str(side) for side in sides if isinstance(side, DataError)]:
            file, _, number = pair.chosen.id.rpartition(":")
            rejects.add(problems[0], file, int(number))
            continue
        whole = [side for side in sides if isinstance(side, Encoded)]
        cut = [Encoded(side.input_ids[:seq_len], side.loss_mask[:seq_len]) for side in whole]
        if np.array_equal(cut[0].input_ids, cut[1].input_ids) or not all(side.loss_mask.any() for side in cut):
            n_left_out += 1
            continue
        n_cut += sum(len(side.input_ids) > seq_len for side in whole)
        pairs.append(PreferencePair(*(fill_block(side, block_size, seq_len, eos) for side in cut)))
    return EncodedPairs(pairs, n_cut, n_left_out)


class PreferencePairs:
    """A `rows.RowSource` whose samples are pairs. A pair gives two rows, the chosen answer first."""

    def __init__(
        self, pairs: list[PreferencePair], tokenizer: PreTrainedTokenizerBase, seed: int, seq_len: int
    ) -> None:
        self.pairs, self.order, self.pad = pairs, RowOrder(max(len(pairs), 1), seed), pad_id(tokenizer)
        self.seq_len = seq_len  # no row is longer

    def __len__(self) -> int:
        return len(self.pairs)

    def of(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows of P pairs (see `rows.to_batch`), [2P, L]: L is the longest, rounded up to a multiple of WIDTHS."""
        sides = [side for index in indices for side in self.pairs[index]]
        longest, rows = max(len(side.input_ids) for side in sides), []
        length = min(-(-longest // WIDTHS) * WIDTHS, self.seq_len)
        for ids, mask in sides:
            missing = length - len(ids)
            docs = np.pad(np.zeros(len(ids), np.int32), (0, missing), constant_values=-1)
            rows.append(Row(np.pad(ids, (0, missing), constant_values=self.pad), docs, np.pad(mask, (0, missing))))
        return to_batch(rows)

    def batch(self, samples: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows of the pairs of global samples, see `of`."""
        return self.of([self.order.row(sample) for sample in samples])

    def describe(self, samples: Sequence[int] | None = None) -> str:
        """The numbers of the pairs, or how many pairs there are."""
        if samples is None:
            return f"{len(self.pairs)} pairs"
        return f"pairs {sorted(self.order.row(sample) for sample in samples)}"

    def state(self, next_sample: int) -> dict[str, Any]:
        """SHA-256 of the pairs. Their order depends only on the seed."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            for side in pair:
                digest.update(side.input_ids.tobytes())
                digest.update(side.loss_mask.tobytes())
        return {"pairs_sha256": digest.hexdigest()}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the pairs have changed since the run started."""
        if state != self.state(0):
            raise CheckpointError("the preference pairs have changed since the run started; restore the file")

    def close(self) -> None:
        """Nothing to close."""
