"""Encoding a processed file in chunks of lines, in this process or several, always in the file's order."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from hildanext.conversations import tools_as_text
from hildanext.documents import Document, Encoded, encode_documents, eos_id, fill_block, parse_document
from hildanext.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text in one chunk. Encodings take some 40 times their text, so this bounds memory; smaller chunks gain nothing.
CHUNK_BYTES = 1 << 20
SMALL_FILE_BYTES = 8 << 20


class Span(NamedTuple):
    """Whole lines of a file: `size` bytes from `offset`."""

    path: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Job:
    """How documents of a split become tokens; it travels to the worker processes."""

    tokenizer: PreTrainedTokenizerBase
    all_tokens: bool
    seq_len: int
    block_size: int | None = None  # fill to whole blocks (SFT)
    foreign_ids: Literal["error", "unk", "retokenize"] = "error"
    source_tokenizer: PreTrainedTokenizerBase | None = None


@dataclass(frozen=True)
class Chunk:
    """The documents of a span, encoded: `input_ids` [tokens] int32, `loss_mask` [tokens] bool, `lengths` [documents].

    `rejects` are (reason, line within the span from 1); the counts are of this span.
    """

    span: Span
    input_ids: np.ndarray
    loss_mask: np.ndarray
    lengths: np.ndarray
    rejects: list[tuple[str, int]]
    lines: int
    given_ids: int = 0  # pretokenized ids read
    unknown_ids: int = 0  # of them, replaced by the unknown token
    tools_as_text: int = 0  # conversations whose tools the chat template does not know

    def documents(self) -> Iterator[Encoded]:
        """The documents in order."""
        ends = np.cumsum(self.lengths)
        for start, end in zip(ends - self.lengths, ends, strict=True):
            yield Encoded(self.input_ids[start:end], self.loss_mask[start:end])


def spans(path: Path, size: int) -> Iterator[Span]:
    """Cut a file into spans of whole lines of about `size` bytes (one line at least)."""
    with open(path, "rb") as file:
        start, end = 0, path.stat().st_size
        while start < end:
            file.seek(min(start + size, end) - 1)
            file.readline()
            yield Span(path, start, file.tell() - start)
            start = file.tell()


def resolve_ids(doc: Document, job: Job) -> tuple[Document, int]:
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


def encode_span(span: Span, job: Job) -> Chunk:
    """Encode the documents of a span. Raises DataError naming file and document for foreign ids that are not allowed."""
    with open(span.path, "rb") as file:
        file.seek(span.offset)
        lines = file.read(span.size).split(b"\n")
    rejects: list[tuple[str, int]] = []
    docs: list[tuple[int, Document]] = []
    given = unknown = 0
    for number, line in enumerate(lines, start=1):
        if not line or line.isspace():
            continue
        try:
            doc = parse_document(line)
        except DataError as error:
            rejects.append((str(error), number))
            continue
        try:
            resolved, replaced = resolve_ids(doc, job)
        except DataError as error:
            raise DataError(f"{span.path}: {error}") from None
        given += len(doc.input_ids or ())
        unknown += replaced
        docs.append((number, resolved))
    results = encode_documents([doc for _, doc in docs], job.tokenizer, job.all_tokens)
    eos = eos_id(job.tokenizer)
    kept: list[Encoded] = []
    for (number, _), result in zip(docs, results, strict=True):
        if isinstance(result, DataError):
            rejects.append((str(result), number))
        else:
            kept.append(fill_block(result, job.block_size, job.seq_len, eos) if job.block_size else result)
    return Chunk(
        span,
        input_ids=np.concatenate([np.empty(0, dtype=np.int32), *(doc.input_ids for doc in kept)]),
        loss_mask=np.concatenate([np.empty(0, dtype=bool), *(doc.loss_mask for doc in kept)]),
        lengths=np.array([len(doc.input_ids) for doc in kept], dtype=np.int64),
        rejects=sorted(rejects, key=lambda reject: reject[1]),
        lines=len(lines) - (not lines[-1]),
        given_ids=given,
        unknown_ids=unknown,
        tools_as_text=sum(_tools_as_text(doc, job.tokenizer) for _, doc in docs),
    )


def _tools_as_text(doc: Document, tokenizer: PreTrainedTokenizerBase) -> bool:
    return doc.messages is not None and tools_as_text(
        doc.messages, doc.tools, tokenizer.get_chat_template(tools=doc.tools)
    )


def encode_file(path: Path, job: Job, workers: int) -> Iterator[Chunk]:
    """Encode a processed file with `workers` processes; its chunks come in its order, whatever the number.

    At most two spans a worker are underway or waiting, so memory does not grow with the file.
    """
    # A worker takes seconds to start: for a small file this process is done sooner.
    if workers == 1 or path.stat().st_size < SMALL_FILE_BYTES:
        yield from _in_thread(spans(path, CHUNK_BYTES), job)
    else:
        yield from _in_processes(spans(path, CHUNK_BYTES), job, workers)


def _in_thread(todo: Iterator[Span], job: Job) -> Iterator[Chunk]:
    # The tokenizer releases the GIL: it works on the next span while the caller packs and writes this one.
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = None
        for span in todo:
            last, ahead = ahead, pool.submit(encode_span, span, job)
            if last is not None:
                yield last.result()
        if ahead is not None:
            yield ahead.result()


def _work(pipe: Connection, job: Job) -> None:
    """A worker process: (index, span) in, (index, chunk or DataError) out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle; it ends the workers
    while True:
        try:
            index, span = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((index, encode_span(span, job)))
        except DataError as error:
            pipe.send((index, error))


def _in_processes(todo: Iterator[Span], job: Job, workers: int) -> Iterator[Chunk]:
    context = multiprocessing.get_context("spawn")
    pipes: dict[Connection, int] = {}  # spans sent to it and not yet answered
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


def _in_order(todo: Iterator[Span], pipes: dict[Connection, int]) -> Iterator[Chunk]:
    """Keep every worker two spans ahead and yield their answers in the order asked. A dead worker raises DataError."""
    answers: dict[int, Chunk | DataError] = {}
    asked = yielded = 0
    while True:
        for pipe in sorted(pipes, key=pipes.__getitem__):
            while pipes[pipe] < 2 and asked - yielded < 2 * len(pipes) and (span := next(todo, None)):
                _ask(pipe, asked, span)
                pipes[pipe] += 1
                asked += 1
        if yielded == asked:
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
        yielded += 1
        yield answer


DEAD = "a tokenize process died; try fewer data.workers (is memory short?)"


def _ask(pipe: Connection, index: int, span: Span) -> None:
    try:
        pipe.send((index, span))
    except OSError:
        raise DataError(DEAD) from None


def _answer(pipe: Connection) -> tuple[int, Chunk | DataError]:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        raise DataError(DEAD) from None
