"""Encoding documents in batches, in this process or several, always in the order of the documents."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from hildanext.data.conversations import tools_as_text
from hildanext.data.documents import Document
from hildanext.data.encode import Encoded, encode_documents, fill_block
from hildanext.data.mixing import DocumentPlace, Mix
from hildanext.data.tokenizer import eos_id
from hildanext.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text in one batch. Encodings take some 40 times their text, so this bounds memory; smaller batches gain nothing.
BATCH_BYTES = 1 << 20
SMALL_BYTES = 8 << 20


class DocumentBatch(NamedTuple):
    """Documents to encode. `state` is where their mix stands after the last of them, or after what follows it.

    `ends_group`: the next batch begins another group, which is packed by itself.
    """

    docs: list[Document]
    places: list[DocumentPlace]
    size: int
    state: list[dict[str, Any]]
    ends_group: bool


def batches(mix: Mix, keep: Callable[[Document], bool], group_bytes: int) -> Iterator[DocumentBatch]:
    """Cut the documents of a mix that `keep` wants into groups of about `group_bytes` of text, and these into batches.

    Where groups end depends on the documents alone. The last batch closes the mix and may be empty.
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
    """How documents of a split become tokens; it travels to the worker processes."""

    tokenizer: PreTrainedTokenizerBase
    all_tokens: bool
    seq_len: int
    block_size: int | None = None  # fill to whole blocks (SFT)
    foreign_ids: Literal["error", "unk", "retokenize"] = "error"
    source_tokenizer: PreTrainedTokenizerBase | None = None


@dataclass(frozen=True)
class Chunk:
    """Documents, encoded: `input_ids` [tokens] int32, `loss_mask` [tokens] bool, `lengths` [documents].

    `rejects` are (reason, index of the document); the counts are of this chunk.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    lengths: np.ndarray
    rejects: list[tuple[str, int]]
    given_ids: int = 0  # pretokenized ids read
    unknown_ids: int = 0  # of them, replaced by the unknown token
    tools_as_text: int = 0  # conversations whose tools the chat template does not know

    def documents(self) -> Iterator[Encoded]:
        """The documents in order."""
        ends = np.cumsum(self.lengths)
        for start, end in zip(ends - self.lengths, ends, strict=True):
            yield Encoded(self.input_ids[start:end], self.loss_mask[start:end])


def resolve_ids(doc: Document, job: Encoding) -> tuple[Document, int]:
    """Settle pretokenized ids that the tokenizer does not have; returns the document and the number of ids replaced.

    'error' raises DataError naming the id; 'unk' puts the unknown token; 'retokenize' turns all ids back into text.
    """
    if doc.input_ids is None:
        return doc, 0
    if job.foreign_ids == "retokenize" and job.source_tokenizer is not None:
        text = job.source_tokenizer.decode(doc.input_ids, skip_special_tokens=True)
        return Document(doc.id, doc.source, text=str(text)), 0
    vocabulary = len(job.tokenizer)
    if max(doc.input_ids) < vocabulary:
        return doc, 0
    if job.foreign_ids == "unk":
        unk = job.tokenizer.unk_token_id
        if unk is None:
            raise DataError(
                f"tokenizer '{job.tokenizer.name_or_path}' has no unknown token; set data.foreign_ids to 'retokenize'"
            )
        ids = [token if token < vocabulary else int(unk) for token in doc.input_ids]
        replaced = sum(token >= vocabulary for token in doc.input_ids)
        return Document(doc.id, doc.source, input_ids=ids), replaced
    raise DataError(
        f"document '{doc.id}' has token id {max(doc.input_ids)}, but tokenizer '{job.tokenizer.name_or_path}' has "
        f"{vocabulary} tokens; set data.foreign_ids to 'unk' or 'retokenize'"
    )


def encode(docs: list[Document], places: list[DocumentPlace], job: Encoding) -> Chunk:
    """Encode documents. Raises DataError naming file and document for foreign ids that are not allowed."""
    resolved: list[Document] = []
    given = unknown = 0
    for doc, place in zip(docs, places, strict=True):
        try:
            settled, replaced = resolve_ids(doc, job)
        except DataError as error:
            raise DataError(f"{place.file}: {error}") from None
        given += len(doc.input_ids or ())
        unknown += replaced
        resolved.append(settled)
    results = encode_documents(resolved, job.tokenizer, job.all_tokens)
    eos = eos_id(job.tokenizer)
    kept = [
        fill_block(result, job.block_size, job.seq_len, eos) if job.block_size else result
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
        tools_as_text=sum(_tools_as_text(doc, job.tokenizer) for doc in resolved),
    )


def _tools_as_text(doc: Document, tokenizer: PreTrainedTokenizerBase) -> bool:
    return doc.messages is not None and tools_as_text(
        doc.messages, doc.tools, tokenizer.get_chat_template(tools=doc.tools)
    )


def encode_batches(
    todo: Iterator[DocumentBatch], job: Encoding, workers: int
) -> Generator[tuple[DocumentBatch, Chunk], None, None]:
    """Encode batches with `workers` processes; they come back in order, whatever the number.

    At most two batches a worker are underway or waiting, so memory does not grow with what there is to do.
    """
    if workers == 1:
        return _in_thread(todo, job)
    # A worker takes seconds to start: with little to do this process is done sooner.
    head: list[DocumentBatch] = []
    for batch in todo:
        head.append(batch)
        if sum(one.size for one in head) > SMALL_BYTES:
            return _in_processes(chain(head, todo), job, workers)
    return _in_thread(iter(head), job)


def _in_thread(todo: Iterator[DocumentBatch], job: Encoding) -> Generator[tuple[DocumentBatch, Chunk], None, None]:
    # The tokenizer releases the GIL: it works on the next batch while the caller packs and writes this one.
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = None
        for batch in todo:
            last, ahead = ahead, (batch, pool.submit(encode, batch.docs, batch.places, job))
            if last is not None:
                yield last[0], last[1].result()
        if ahead is not None:
            yield ahead[0], ahead[1].result()


Asked = tuple[int, list[Document], list[DocumentPlace]]


def _receive(pipe: Connection, inbox: SimpleQueue[Asked | None]) -> None:
    while True:
        try:
            inbox.put(pipe.recv())
        except (EOFError, OSError):
            inbox.put(None)
            return


def _work(pipe: Connection, job: Encoding) -> None:
    """A worker process: (index, documents, places) in, (index, chunk or DataError) out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle; it ends the workers
    # A thread takes what comes, so that two processes never wait for each other with full pipes.
    inbox: SimpleQueue[Asked | None] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, inbox), daemon=True).start()
    while (asked := inbox.get()) is not None:
        index, docs, places = asked
        try:
            pipe.send((index, encode(docs, places, job)))
        except DataError as error:
            pipe.send((index, error))


def _in_processes(
    todo: Iterator[DocumentBatch], job: Encoding, workers: int
) -> Generator[tuple[DocumentBatch, Chunk], None, None]:
    context = multiprocessing.get_context("spawn")
    pipes: dict[Connection, int] = {}  # batches sent to it and not yet answered
    processes = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes[ours] = 0
        yield from _in_order(todo, pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.terminate()
            process.join()


def _in_order(todo: Iterator[DocumentBatch], pipes: dict[Connection, int]) -> Iterator[tuple[DocumentBatch, Chunk]]:
    """Keep every worker two batches ahead and yield their answers in the order asked. A dead worker raises DataError."""
    answers: dict[int, Chunk | DataError] = {}
    asked: dict[int, DocumentBatch] = {}
    count = yielded = 0
    while True:
        for pipe in sorted(pipes, key=pipes.__getitem__):
            while pipes[pipe] < 2 and count - yielded < 2 * len(pipes) and (batch := next(todo, None)):
                _ask(pipe, count, batch)
                asked[count] = batch._replace(docs=[])
                pipes[pipe] += 1
                count += 1
        if yielded == count:
            return
        while yielded not in answers:
            ready = wait(list(pipes))
            for pipe in [pipe for pipe in pipes if pipe in ready]:
                index, answer = _answer(pipe)
                answers[index] = answer
                pipes[pipe] -= 1
        answer = answers.pop(yielded)
        if isinstance(answer, DataError):
            raise answer
        yield asked.pop(yielded), answer
        yielded += 1


DEAD = "a tokenize process died; try fewer data.workers (is memory short?)"


def _ask(pipe: Connection, index: int, batch: DocumentBatch) -> None:
    try:
        pipe.send((index, batch.docs, batch.places))
    except OSError:
        raise DataError(DEAD) from None


def _answer(pipe: Connection) -> tuple[int, Chunk | DataError]:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        raise DataError(DEAD) from None
