"""Documents to tokens: text, token ids and conversations, with the mask of what is supervised."""

from __future__ import annotations

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
    """A document's tokens. `input_ids` [n] int32, `loss_mask` [n] bool (tokens that may be noised and supervised)."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


def encode_document(doc: Document, tokenizer: PreTrainedTokenizerBase, all_tokens: bool = False) -> Encoded:
    """`input_ids` [n] int32 and `loss_mask` [n] bool of one document; see `encode_documents`. Raises DataError."""
    (result,) = encode_documents([doc], tokenizer, all_tokens)
    if isinstance(result, DataError):
        raise DataError(f"document '{doc.id}' of '{doc.source}': {result}")
    return result


def encode_documents(
    docs: Sequence[Document], tokenizer: PreTrainedTokenizerBase, all_tokens: bool = False
) -> list[Encoded | DataError]:
    """Tokens of each document, in order; a document that cannot be encoded gives a DataError with the reason instead.

    Text is encoded as text, whatever it looks like (a literal '<|endoftext|>' inside it is no special token), and gets
    the tokenizer's begin-of-text token, if it writes one, and one end-of-text token at its end. Token ids are taken as they are and must lie below the tokenizer's length.
    Messages are rendered with the chat template; their loss mask covers the assistant's turns, or every token with
    `all_tokens`. The mask token is allowed in none of them. Raises DataError for an unfit tokenizer.
    """
    eos, leading = eos_id(tokenizer), leading_ids(tokenizer)
    results: list[Encoded | DataError] = [DataError("empty document")] * len(docs)
    for index, ids in _encode_texts(docs, tokenizer):
        if ids:
            results[index] = _all_supervised([*leading, *ids, eos], len(leading))
    for index, doc in enumerate(docs):
        if doc.input_ids is not None:
            results[index] = _checked_ids(doc.input_ids, len(tokenizer), 0 if all_tokens else doc.n_prompt or 0)
    chats = [index for index, doc in enumerate(docs) if doc.messages is not None]
    conversations = [(docs[index].messages or [], docs[index].tools) for index in chats]
    for index, encoded in zip(chats, encode_conversations(conversations, tokenizer, eos), strict=True):
        results[index] = encoded if isinstance(encoded, DataError) else _conversation(*encoded, all_tokens)
    mask = tokenizer.mask_token_id
    if mask is not None:
        for index, result in enumerate(results):
            if isinstance(result, Encoded) and (result.input_ids == mask).any():
                results[index] = DataError("contains the mask token")
    return results


def _encode_texts(docs: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, list[int]]]:
    """(index, ids) of the documents that are text, without an end-of-text token."""
    indices = [index for index, doc in enumerate(docs) if doc.text is not None]
    backend = tokenizer.backend_tokenizer
    # transformers sets all three again before each call of its own.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        encodings = backend.encode_batch_fast([docs[index].text for index in indices], add_special_tokens=False)
    finally:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    for index, encoding in zip(indices, encodings, strict=True):
        yield index, encoding.ids


def _all_supervised(ids: list[int], n_given: int = 0) -> Encoded:
    """All tokens but the first `n_given`, which no model has to predict."""
    array = np.array(ids, dtype=np.int32)
    return Encoded(array, np.arange(len(array)) >= n_given)


def _checked_ids(ids: list[int], vocabulary: int, n_given: int) -> Encoded | DataError:
    if min(ids) < 0 or max(ids) >= vocabulary:
        return DataError("token ids outside the tokenizer's vocabulary")
    return _all_supervised(ids, n_given) if n_given < len(ids) else DataError("no supervised turn")


def _conversation(ids: np.ndarray, mask: np.ndarray, all_tokens: bool) -> Encoded | DataError:
    if all_tokens:
        return Encoded(ids, np.ones_like(mask))
    return Encoded(ids, mask) if mask.any() else DataError("no supervised turn")


def fill_block(encoded: Encoded, block_size: int, limit: int, eos: int) -> Encoded:
    """Round the length up to whole blocks with supervised end-of-text tokens, so that a model learns to stop.

    The fill never carries a document past `limit` tokens (the row), where it would be cut. A document that does not end
    with end-of-text was cut off itself and stays as it is.
    """
    if encoded.input_ids[-1] != eos:
        return encoded
    n = len(encoded.input_ids)
    missing = min(-n % block_size, max(limit - n, 0))
    return Encoded(
        np.concatenate([encoded.input_ids, np.full(missing, eos, dtype=np.int32)]),
        np.concatenate([encoded.loss_mask, np.ones(missing, dtype=bool)]),
    )
