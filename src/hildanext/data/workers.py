"""Tokenizes documents in batches, in a thread or in worker processes. Results keep the order of the documents."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from hildanext.data.chat_template import template_of
from hildanext.data.conversations import tools_as_text
from hildanext.data.documents import Document
from hildanext.data.encode import Encoded, encode_documents, fill_block
from hildanext.data.mixing import DocumentPlace, Mix
from hildanext.data.tokenizer import eos_id
from hildanext.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Bytes of text per batch. The tokenizer's encodings take about 40 times the memory of their text; smaller batches are
# not faster.
BATCH_BYTES = 1 << 20
SMALL_BYTES = 8 << 20  # inputs up to this size are encoded without worker processes


class DocumentBatch(NamedTuple):
    """Documents to encode, with their places and the bytes of their text."""

    docs: list[Document]
    places: list[DocumentPlace]
    size: int
    state: list[dict[str, Any]]  # of their mix, after the last document or after documents skipped since
    ends_group: bool  # the next batch begins a new group; groups are packed independently


def batches(mix: Mix, keep: Callable[[Document], bool], group_bytes: int) -> Iterator[DocumentBatch]:
    """Batches of the documents of a mix for which `keep` returns True, in groups of about `group_bytes` of text.

    Group boundaries depend only on the documents. The last batch may be empty; its state is the end of the mix.
    """
    docs: list[Document] = []
    places: list[DocumentPlace] = []
    size = group = 0
    for _, place, doc in mix:
        if not keep(doc):
            continue
        docs.append(doc)
        places.append(place)
        size += doc.size
        group += doc.size
        if size >= BATCH_BYTES or group >= group_bytes:
            ends = group >= group_bytes
            yield DocumentBatch(docs, places, size, mix.state(), ends)
            docs, places, size = [], [], 0
            group = 0 if ends else group
    yield DocumentBatch(docs, places, size, mix.state(), True)


@dataclass(frozen=True)
class Encoding:
    """How to tokenize the documents of a split. Sent to the worker processes."""

    tokenizer: PreTrainedTokenizerBase
    all_tokens: bool  # supervise every token, not only responses
    seq_len: int
    block_size: int | None = None  # pad responses to whole blocks (SFT)
    foreign_ids: Literal["error", "unk", "retokenize"] = "error"
    source_tokenizer: PreTrainedTokenizerBase | None = None


@dataclass(frozen=True)
class Chunk:
    """Encoded documents: `input_ids` [tokens] int32, `loss_mask` [tokens] bool, `lengths` [documents] int64.

    `rejects` holds (reason, index of the document in its batch).
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    lengths: np.ndarray
    rejects: list[tuple[str, int]]
    given_ids: int = 0  # pretokenized ids read
    unknown_ids: int = 0  # pretokenized ids replaced by the unknown token
    tools_as_text: int = 0  # conversations whose chat template does not support tools
    # Conversations with a field that the chat template does not write, by field.
    unread_fields: Counter[str] = field(default_factory=Counter)

    def documents(self) -> Iterator[Encoded]:
        """Yield the documents in order."""
        ends = np.cumsum(self.lengths)
        for start, end in zip(ends - self.lengths, ends, strict=True):
            yield Encoded(self.input_ids[start:end], self.loss_mask[start:end])


def resolve_ids(doc: Document, encoding: Encoding) -> tuple[Document, int]:
    """Handle pretokenized ids outside the tokenizer's vocabulary. Returns the document and the number of ids replaced.

    `foreign_ids` 'error' raises DataError naming the id, 'unk' inserts the unknown token, 'retokenize' decodes all ids
    to text; ids that the source tokenizer does not have leave no text and count as replaced. The base's own answers are
    returned unchanged.
    """
    if doc.input_ids is None or doc.n_prompt is not None:
        return doc, 0
    if encoding.foreign_ids == "retokenize" and encoding.source_tokenizer is not None:
        text = encoding.source_tokenizer.decode(doc.input_ids, skip_special_tokens=True)
        known = len(encoding.source_tokenizer)
        return Document(doc.id, doc.source, text=str(text)), sum(token >= known for token in doc.input_ids)
    vocabulary = len(encoding.tokenizer)
    if max(doc.input_ids) < vocabulary:
        return doc, 0
    if encoding.foreign_ids == "unk":
        unk = encoding.tokenizer.unk_token_id
        if unk is None:
            raise DataError(
                f"tokenizer '{encoding.tokenizer.name_or_path}' has no unknown token; "
                "set data.foreign_ids to 'retokenize'"
            )
        ids = [token if token < vocabulary else int(unk) for token in doc.input_ids]
        replaced = sum(token >= vocabulary for token in doc.input_ids)
        return Document(doc.id, doc.source, input_ids=ids), replaced
    raise DataError(
        f"document '{doc.id}' has token id {max(doc.input_ids)}, but tokenizer '{encoding.tokenizer.name_or_path}' has "
        f"{vocabulary} tokens; set data.foreign_ids to 'unk' or 'retokenize'"
    )


def encode(docs: list[Document], places: list[DocumentPlace], encoding: Encoding) -> Chunk:
    """Encode documents. Raises DataError naming file and document for foreign ids that are not allowed."""
    resolved: list[Document] = []
    given = unknown = 0
    for doc, place in zip(docs, places, strict=True):
        try:
            known, replaced = resolve_ids(doc, encoding)
        except DataError as error:
            raise DataError(f"{place.file}: {error}") from None
        given += len(doc.input_ids or ())
        unknown += replaced
        resolved.append(known)
    unread: Counter[str] = Counter()
    results = encode_documents(resolved, encoding.tokenizer, encoding.all_tokens, unread)
    eos = eos_id(encoding.tokenizer)
    kept = [
        fill_block(result, encoding.block_size, encoding.seq_len, eos) if encoding.block_size else result
        for result in results
        if isinstance(result, Encoded)
    ]
    return Chunk(
        input_ids=np.concatenate([np.empty(0, dtype=np.int32), *(doc.input_ids for doc in kept)]),
        loss_mask=np.concatenate([np.empty(0, dtype=bool), *(doc.loss_mask for doc in kept)]),
        lengths=np.array([len(doc.input_ids) for doc in kept], dtype=np.int64),
        rejects=[(str(result), index) for index, result in enumerate(results) if isinstance(result, DataError)],
        given_ids=given,
        unknown_ids=unknown,
        tools_as_text=sum(
            tools_as_text(doc.messages, doc.tools, template_of(encoding.tokenizer, doc.tools))
            for doc, result in zip(resolved, results, strict=True)
            if doc.messages is not None and isinstance(result, Encoded)
        ),
        unread_fields=unread,
    )


def encode_batches(
    todo: Iterator[DocumentBatch], encoding: Encoding, workers: int
) -> Generator[tuple[DocumentBatch, Chunk], None, None]:
    """Encode batches with `workers` processes and yield them in order, without their documents.

    At most two batches per worker are submitted at a time, so memory does not grow with the corpus. Raises DataError
    for documents that cannot be encoded (see `encode`) and when a worker process dies.
    """
    head: list[DocumentBatch] = []
    if workers > 1:
        # Worker processes take seconds to start, so small inputs are encoded in this process.
        for batch in todo:
            head.append(batch)
            if sum(queued.size for queued in head) > SMALL_BYTES:
                return _in_processes(chain(head, todo), encoding, workers)
    return _in_thread(chain(head, todo), encoding)


def _in_thread(todo: Iterator[DocumentBatch], encoding: Encoding) -> Generator[tuple[DocumentBatch, Chunk], None, None]:
    # The tokenizer releases the GIL: the thread encodes the next batch while the caller packs and writes this one.
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield from _in_order(todo, pool, partial(encode, encoding=encoding), limit=2)


def _in_processes(
    todo: Iterator[DocumentBatch], encoding: Encoding, workers: int
) -> Generator[tuple[DocumentBatch, Chunk], None, None]:
    """Encode in worker processes, each served by a thread of this process over a pipe of its own.

    ProcessPoolExecutor is not used: its workers share a result pipe that this process also holds open for writing. The
    executor therefore waits forever if a worker is killed while it sends a result, and idle workers outlive a killed
    main process.
    """
    context = multiprocessing.get_context("spawn")
    idle: SimpleQueue[Connection] = SimpleQueue()
    processes = []
    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, encoding), daemon=True)
                process.start()
                theirs.close()  # so that the worker's death ends the pipe
                processes.append(process)
                idle.put(ours)
            yield from _in_order(todo, pool, partial(_encode_remotely, idle), limit=2 * workers)
        finally:
            # Threads that wait for an answer fail at once when the workers end.
            for process in processes:
                process.terminate()
                process.join()


def _in_order(
    todo: Iterator[DocumentBatch],
    pool: ThreadPoolExecutor,
    call: Callable[[list[Document], list[DocumentPlace]], Chunk],
    limit: int,
) -> Generator[tuple[DocumentBatch, Chunk], None, None]:
    """Submit batches to `pool`, at most `limit` at a time, and yield the results in the order of submission."""
    submitted: deque[tuple[DocumentBatch, Future[Chunk]]] = deque()
    try:
        for batch in todo:
            submitted.append((batch._replace(docs=[]), pool.submit(call, batch.docs, batch.places)))
            if len(submitted) == limit:
                done, future = submitted.popleft()
                yield done, future.result()
        while submitted:
            done, future = submitted.popleft()
            yield done, future.result()
    finally:
        for _, future in submitted:
            future.cancel()


def _encode_remotely(idle: SimpleQueue[Connection], docs: list[Document], places: list[DocumentPlace]) -> Chunk:
    """`encode` in a worker process, over one of the `idle` pipes. Raises DataError when the worker dies."""
    pipe = idle.get()
    try:
        pipe.send((docs, places))
        answer: Chunk | DataError = pipe.recv()
    except (EOFError, OSError):
        raise DataError("a tokenize process died; try fewer data.workers (is memory short?)") from None
    finally:
        idle.put(pipe)
    if isinstance(answer, DataError):
        raise answer
    return answer


def _work(pipe: Connection, encoding: Encoding) -> None:
    """A worker process: receives (documents, places) and sends a Chunk or DataError until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C and terminates its workers
    answer: Chunk | DataError
    with contextlib.suppress(EOFError, OSError):  # the main process was killed
        while True:
            docs, places = pipe.recv()
            try:
                answer = encode(docs, places, encoding)
            except DataError as error:
                answer = error
            pipe.send(answer)
