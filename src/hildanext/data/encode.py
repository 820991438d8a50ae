"""Encodes documents (text, token ids or conversations) as token ids and the loss mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hildanext.data.conversations import encode_conversations
from hildanext.data.documents import Document
from hildanext.data.tokenizer import eos_id, leading_ids
from hildanext.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """An encoded document: `input_ids` [n] int32, `loss_mask` [n] bool (tokens that may be noised and supervised)."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


def encode_document(doc: Document, tokenizer: PreTrainedTokenizerBase, all_tokens: bool = False) -> Encoded:
    """Encode one document, see `encode_documents`. Raises DataError naming the document."""
    (result,) = encode_documents([doc], tokenizer, all_tokens)
    if isinstance(result, DataError):
        raise DataError(f"document '{doc.id}' of '{doc.source}': {result}")
    return result


def encode_documents(
    docs: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    all_tokens: bool = False,
    unread: Counter[str] | None = None,
) -> list[Encoded | DataError]:
    """Encode documents, in order. A document that cannot be encoded gives a DataError with the reason instead.

    Text is encoded without special tokens: a literal '<|endoftext|>' is ordinary text. The begin-of-text token is put
    before it, if the tokenizer adds that token, and the end-of-text token after it. Token ids are used unchanged and
    must be tokens of the tokenizer. Messages are rendered with the chat template. `all_tokens` supervises every
    token; otherwise only the assistant turns of messages and the answers after `n_prompt` token ids are supervised.
    Documents that contain the mask token are rejected. `unread` counts, by field, the conversations with a field that
    the chat template does not write. Raises DataError for a tokenizer that is not fast or has no end-of-text token.
    """
    eos, leading = eos_id(tokenizer), leading_ids(tokenizer)
    results: list[Encoded | DataError] = [DataError("empty document")] * len(docs)
    known: set[int] = set()  # token ids of documents that have been found in the vocabulary
    for index, ids in _encode_texts(docs, tokenizer):
        if ids:
            results[index] = _supervise_after(len(leading), [*leading, *ids, eos])
    for index, doc in enumerate(docs):
        if doc.input_ids is None:
            continue
        n_given = 0 if all_tokens else doc.n_prompt or 0
        if not _are_tokens(set(doc.input_ids) - known, tokenizer):
            results[index] = DataError("token ids outside the tokenizer's vocabulary")
            continue
        known.update(doc.input_ids)
        if n_given < len(doc.input_ids):
            results[index] = _supervise_after(n_given, doc.input_ids)
        else:
            results[index] = DataError("no supervised turn")
    chats = [index for index, doc in enumerate(docs) if doc.messages is not None]
    conversations = [(docs[index].messages or [], docs[index].tools) for index in chats]
    for index, encoded in zip(chats, encode_conversations(conversations, tokenizer, eos, unread), strict=True):
        if isinstance(encoded, DataError):
            results[index] = encoded
            continue
        array, loss_mask = encoded
        if all_tokens:
            loss_mask = np.ones_like(loss_mask)
        results[index] = Encoded(array, loss_mask) if loss_mask.any() else DataError("no supervised turn")
    mask = tokenizer.mask_token_id
    if mask is not None:
        for index, result in enumerate(results):
            if isinstance(result, Encoded) and (result.input_ids == mask).any():
                results[index] = DataError("contains the mask token")
    return results


def _encode_texts(docs: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, list[int]]]:
    """(index, token ids) of each text document, without special tokens."""
    indices = [index for index, doc in enumerate(docs) if doc.text is not None]
    backend = tokenizer.backend_tokenizer
    # transformers sets all three before each of its own calls.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        encodings = backend.encode_batch_fast([docs[index].text for index in indices], add_special_tokens=False)
    finally:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    for index, encoding in zip(indices, encodings, strict=True):
        yield index, encoding.ids


def _are_tokens(ids: set[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has a token for each id. There may be ids without one below its largest id."""
    backend = tokenizer.backend_tokenizer
    return all(0 <= i < 1 << 31 and backend.id_to_token(i) is not None for i in ids)


def _supervise_after(n_given: int, ids: list[int]) -> Encoded:
    """Supervise every token except the first `n_given`, which the model is given."""
    array = np.array(ids, dtype=np.int32)
    return Encoded(array, np.arange(len(array)) >= n_given)


def fill_block(encoded: Encoded, block_size: int, limit: int, eos: int) -> Encoded:
    """Pad a document to whole blocks with supervised end-of-text tokens, so that the model learns to stop.

    Padding ends at `limit` tokens (the row length). A document that does not end with end-of-text was truncated and is
    returned unchanged.
    """
    if encoded.input_ids[-1] != eos:
        return encoded
    n = len(encoded.input_ids)
    missing = min(-n % block_size, max(limit - n, 0))
    return Encoded(
        np.concatenate([encoded.input_ids, np.full(missing, eos, dtype=np.int32)]),
        np.concatenate([encoded.loss_mask, np.ones(missing, dtype=bool)]),
    )
