"""Preference pairs: a prompt with the answer that was chosen and the one that was rejected, from the file to padded rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hildanext.data.conversations import Message
from hildanext.data.documents import Document, Rejects
from hildanext.data.encode import Encoded, encode_documents, fill_block
from hildanext.data.packing import Row
from hildanext.data.rows import RowOrder, to_batch
from hildanext.data.sources import instruct
from hildanext.data.sources.opening import file_name
from hildanext.data.sources.shapes import to_messages, to_tools
from hildanext.data.tokenizer import eos_id, pad_id
from hildanext.errors import CheckpointError, DataError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


WIDTHS = 128  # rows are as wide as a multiple of this: kernels are compiled for each width


class ConversationPair(NamedTuple):
    """Two conversations that differ in their last turn."""

    chosen: Document
    rejected: Document


class PreferencePair(NamedTuple):
    """The same as tokens; only the last turn is supervised."""

    chosen: Encoded
    rejected: Encoded


def read_pairs(path: str, rejects: Rejects) -> Iterator[ConversationPair]:
    """The pairs of JSON files: `chosen` and `rejected` beside a conversation, a prompt or an instruction, or whole ones each.

    What is no pair is counted in `rejects`. Raises UsageError for a path that does not exist.
    """
    try:
        files = instruct.find(path)
    except UsageError as error:
        raise UsageError(str(error).replace("data.sources", "dpo.pairs")) from None
    for file, _ in files:
        for number, record in instruct.read_records(file, rejects):
            try:
                yield _answers(record, f"{file_name(file)}:{number}", file_name(file).split(".")[0])
            except DataError as error:
                rejects.add(str(error), file, number)


def _answers(record: dict[str, Any], name: str, source: str) -> ConversationPair:
    found = []
    for side in ("chosen", "rejected"):
        answer, asked = record.get(side), record.get("prompt")
        if answer is None:
            raise DataError(f"no '{side}' answer")
        turns = answer if isinstance(answer, list) else [answer]
        shape = {**record, "chosen": answer}
        if isinstance(asked, list):  # a conversation, and the answer alone
            shape = {key: value for key, value in record.items() if key not in ("prompt", "chosen", "rejected")}
            said = [{"role": "assistant", "content": turn} if isinstance(turn, str) else turn for turn in turns]
            shape["messages"] = [*asked, *said]
        found.append(to_messages(shape))
    chosen, rejected = found
    if _shown(chosen[:-1]) != _shown(rejected[:-1]):
        raise DataError("the two answers have different prompts")
    if len(chosen) < 2:
        raise DataError("no prompt")
    if _shown(chosen) == _shown(rejected):
        raise DataError("the two answers are the same")
    tools = to_tools(record)
    documents = [Document(name, source, messages=_last_only(one), tools=tools) for one in found]
    return ConversationPair(*documents)


def _shown(messages: list[Message]) -> list[Message]:
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def _last_only(messages: list[Message]) -> list[Message]:
    """Earlier turns of the assistant belong to the prompt."""
    before = [{**m, "train": False} if m["role"] == "assistant" else m for m in messages[:-1]]
    return [*before, {**messages[-1], "train": True}]


class Fitted(NamedTuple):
    """Pairs as tokens, at most `seq_len` each."""

    pairs: list[PreferencePair]
    n_cut: int  # answers that were cut
    n_left_out: int  # pairs that differ in nothing within `seq_len`: the prompt fills it, or the answers begin alike


def encode_pairs(
    answers: Sequence[ConversationPair],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    block_size: int,
    rejects: Rejects,
) -> Fitted:
    """Render, tokenize and cut pairs. Ends are filled to whole blocks, as in instruction tuning.

    A pair of which one side cannot be encoded is counted in `rejects`.
    """
    pairs, n_cut, n_left_out, eos = [], 0, 0, eos_id(tokenizer)
    encoded = encode_documents([document for one in answers for document in one], tokenizer)
    for index, one in enumerate(answers):
        sides = encoded[2 * index : 2 * index + 2]
        if problems := [str(side) for side in sides if isinstance(side, DataError)]:
            file, _, number = one.chosen.id.rpartition(":")
            rejects.add(problems[0], file, int(number))
            continue
        whole = [side for side in sides if isinstance(side, Encoded)]
        cut = [Encoded(side.input_ids[:seq_len], side.loss_mask[:seq_len]) for side in whole]
        if np.array_equal(cut[0].input_ids, cut[1].input_ids) or not all(side.loss_mask.any() for side in cut):
            n_left_out += 1
            continue
        n_cut += sum(len(side.input_ids) > seq_len for side in whole)
        pairs.append(PreferencePair(*(fill_block(side, block_size, seq_len, eos) for side in cut)))
    return Fitted(pairs, n_cut, n_left_out)


class PreferencePairs:
    """A row source (`rows.RowSource`) whose sample is a pair: two rows, the chosen answer first."""

    def __init__(
        self, pairs: list[PreferencePair], tokenizer: PreTrainedTokenizerBase, seed: int, seq_len: int
    ) -> None:
        self.pairs, self.order, self.pad = pairs, RowOrder(max(len(pairs), 1), seed), pad_id(tokenizer)
        self.seq_len = seq_len  # no answer is longer

    def __len__(self) -> int:
        return len(self.pairs)

    def of(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows of pairs, [2P, L] each (see `rows.to_batch`), padded to the longest of them, or a little beyond."""
        sides = [side for index in indices for side in self.pairs[index]]
        longest, rows = max(len(side.input_ids) for side in sides), []
        length = min(-(-longest // WIDTHS) * WIDTHS, self.seq_len)
        for ids, mask in sides:
            missing = length - len(ids)
            docs = np.pad(np.zeros(len(ids), np.int32), (0, missing), constant_values=-1)
            rows.append(Row(np.pad(ids, (0, missing), constant_values=self.pad), docs, np.pad(mask, (0, missing))))
        return to_batch(rows)

    def batch(self, samples: Sequence[int]) -> dict[str, torch.Tensor]:
        return self.of([self.order.row(sample) for sample in samples])

    def describe(self, samples: Sequence[int] | None = None) -> str:
        if samples is None:
            return f"{len(self.pairs)} pairs"
        return f"pairs {sorted(self.order.row(sample) for sample in samples)}"

    def state(self, next_sample: int) -> dict[str, Any]:
        """The order is a function of the seed: only which pairs they are is kept."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            for side in pair:
                digest.update(side.input_ids.tobytes())
                digest.update(side.loss_mask.tobytes())
        return {"pairs_sha256": digest.hexdigest()}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError for other pairs than the run began with."""
        if state != self.state(0):
            raise CheckpointError("the preference pairs are not those the run began with; restore the file")

    def close(self) -> None:
        """Nothing runs."""
