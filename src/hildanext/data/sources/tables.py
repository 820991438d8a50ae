"""Rows of parquet and Arrow files (also Feather), a few at a time: a row group may be larger than the memory.

Only the wanted columns are read. A damaged row group costs its rows and a bad value its own row; both are counted.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import pyarrow
from pyarrow import ipc, parquet, types

from hildanext.data.documents import Rejects
from hildanext.data.sources.lines import lost_records
from hildanext.data.sources.opening import file_name, is_url, open_file
from hildanext.errors import DataError

# Rows decoded at once. More are not faster, and a text of a long column can have megabytes.
BATCH_ROWS = 32
# Bytes of a column read at once. Without a buffer Arrow reads the column of a whole row group.
BUFFER_BYTES = 1 << 20
ARROW_MAGIC = b"ARROW1"  # of a file with a footer; a stream has none

# The columns to read, of a file's schema. Raises DataError with the reason if the file has none.
# A field of a struct is named by its path: 'meta.text'.
Choose = Callable[[pyarrow.Schema], Sequence[str]]


def read_schema(path: str) -> pyarrow.Schema | None:
    """The schema of a file; None if it is damaged. Raises OSError or UnreachableError for one that cannot be read."""
    with open_file(path) as file:
        try:
            return _open_arrow(path, file)[1].schema if _is_arrow(path) else _open_parquet(file).schema_arrow
        except (pyarrow.ArrowException, OSError) as error:
            _check_is_damage(error)
            return None


def read_rows(path: str, choose: Choose, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row from 1, value by column). Rows up to number `rejects.after` are skipped.

    A struct is a dictionary, a list a list. Raises OSError or UnreachableError for a file that cannot be read.
    """
    with open_file(path) as file:
        read_batches = _arrow_batches if _is_arrow(path) else _parquet_batches
        for first, batch in read_batches(path, file, choose, rejects):
            yield from _rows(first, batch, path, rejects)
    pyarrow.default_memory_pool().release_unused()


def paths(schema: pyarrow.Schema) -> list[str]:
    """The columns of a schema; a struct's fields by their path."""
    return [name for field in schema for name in _paths(field, "")]


def _paths(field: pyarrow.Field, before: str) -> Iterator[str]:
    if not types.is_struct(field.type):
        yield before + field.name
        return
    for inner in field.type:
        yield from _paths(inner, f"{before}{field.name}.")


def part_of(schema: pyarrow.Schema, column: str) -> str:
    """What to read of a table for `column`: its path up to the first list. Raises DataError for no or another column."""
    parts = [column] if column in schema.names else column.split(".")
    if schema.names.count(parts[0]) > 1:
        raise DataError(f"several columns '{parts[0]}'")
    if parts[0] not in schema.names:
        raise DataError(f"no column '{column}'")
    kind, read, in_list = schema.field(parts[0]).type, parts[:1], False
    for part in parts[1:]:
        if _is_list(kind) and part.isdecimal():
            kind, in_list = kind.value_type, True
        elif types.is_struct(kind) and kind.get_field_index(part) >= 0:
            kind = kind.field(part).type
            read += [] if in_list else [part]
        else:
            raise DataError(f"no column '{column}'")
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (_is_text(value) or types.is_null(value)):
        raise DataError(f"column '{column}' holds {kind}, not text")
    return ".".join(read)


def _is_list(kind: pyarrow.DataType) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_text(kind: pyarrow.DataType) -> bool:
    """Whether a type holds strings, or bytes that may be UTF-8."""
    tests = (types.is_string, types.is_large_string, types.is_string_view)
    return any(test(kind) for test in (*tests, types.is_binary, types.is_large_binary, types.is_binary_view))


def _rows(first: int, batch: pyarrow.RecordBatch, path: str, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row, value by column) of a batch whose first row is `first`."""
    columns = list(zip(batch.schema.names, batch.columns, strict=True))
    for index in range(max(0, rejects.after + 1 - first), batch.num_rows):
        try:
            row = {name: column[index].as_py() for name, column in columns}
        except UnicodeDecodeError:
            rejects.add("invalid UTF-8", path, first + index)
            continue
        yield first + index, row


def _chosen(schema: pyarrow.Schema, choose: Choose) -> list[str]:
    """The columns to read. Raises DataError for a name that several columns have."""
    columns = list(choose(schema))
    for name in columns:
        if schema.names.count(name) > 1:
            raise DataError(f"several columns '{name}'")
    return columns


def _open_parquet(file: IO[bytes]) -> parquet.ParquetFile:
    return parquet.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)


def _parquet_batches(
    path: str, file: IO[bytes], choose: Choose, rejects: Rejects
) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """Yield (first row, batch) of a parquet file."""
    try:
        table = _open_parquet(file)
        columns = _chosen(table.schema_arrow, choose)
    except (pyarrow.ArrowException, OSError) as error:
        _check_is_damage(error)
        rejects.add("damaged parquet file", path, 1, lost_records(0, 0, file.seek(0, 2)))
        return
    except DataError as error:
        rejects.add(str(error), path, 1, max(1, table.metadata.num_rows))
        return
    end = 0
    for group in range(table.num_row_groups):
        first, end = end + 1, end + table.metadata.row_group(group).num_rows
        if end <= rejects.after:
            continue
        try:
            for batch in table.iter_batches(BATCH_ROWS, [group], columns, use_threads=False):
                yield first, batch
                first += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            _check_is_damage(error)
            rejects.add("damaged parquet file", path, first, max(1, end + 1 - first))


def _is_arrow(path: str) -> bool:
    return not file_name(path).endswith(".parquet")


def _open_arrow(path: str, file: IO[bytes], columns: Sequence[int] | None = None) -> tuple[Any, Any]:
    """The source and a reader of an Arrow file or stream. A local file is mapped: its batches need no other memory."""
    source: Any = file
    if not is_url(path) and file.seek(0, 2) > 0:
        source = pyarrow.BufferReader(pyarrow.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    options = ipc.IpcReadOptions(included_fields=columns, use_threads=False)
    source.seek(0)
    has_footer = source.read(len(ARROW_MAGIC)) == ARROW_MAGIC
    try:
        source.seek(0)
        return source, (ipc.open_file if has_footer else ipc.open_stream)(source, options=options)
    except pyarrow.ArrowInvalid:
        if not has_footer:
            raise
    source.seek(8)  # a file that is cut off: behind its magic bytes it is a stream
    return source, ipc.open_stream(source, options=options)


def _read_arrow(
    path: str, file: IO[bytes], columns: Sequence[int] | None, size: int
) -> Iterator[tuple[float, pyarrow.RecordBatch]]:
    """Yield (about how many of the `size` bytes are read, batch)."""
    source, reader = _open_arrow(path, file, columns)
    if not isinstance(reader, ipc.RecordBatchFileReader):
        for batch in reader:
            yield source.tell(), batch
        return
    for index in range(reader.num_record_batches):
        yield size * (index + 1) / reader.num_record_batches, reader.get_batch(index)


def _arrow_batches(
    path: str, file: IO[bytes], choose: Choose, rejects: Rejects
) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """Yield (first row, batch) of an Arrow file. The rows behind damage are counted by an estimate."""
    first, used, size = 1, 0.0, file.seek(0, 2)
    columns, unusable = None, ""
    try:
        schema = _open_arrow(path, file)[1].schema
        try:
            names = _chosen(schema, choose)
            columns = [schema.names.index(n if n in schema.names else n.partition(".")[0]) for n in names]
        except DataError as error:
            unusable = str(error)
        for place, batch in _read_arrow(path, file, columns, size):
            if not unusable:
                yield from _valid(first, batch, path, rejects)
            first, used = first + batch.num_rows, place
    except (pyarrow.ArrowException, OSError) as error:
        _check_is_damage(error)
        rejects.add("damaged Arrow file", path, first, lost_records(first - 1, int(used), size))
    if unusable:
        rejects.add(unusable, path, 1, max(1, first - 1))


def _valid(
    first: int, batch: pyarrow.RecordBatch, path: str, rejects: Rejects
) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """Yield a batch with its first row, or its good rows one by one: Arrow reads offsets from a file unchecked."""
    if _problem(batch) is None:
        yield first, batch
        return
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        if (problem := _problem(row)) is None:
            yield first + index, row
        else:
            rejects.add(problem, path, first + index)


def _problem(batch: pyarrow.RecordBatch) -> str | None:
    """Why values of a batch cannot be read; None if they can."""
    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        return "invalid UTF-8" if "UTF8" in str(error) else "damaged value"
    return None


def _check_is_damage(error: Exception) -> None:
    """Raise `error` again if it comes from the system. Arrow raises OSError for damaged files too, without a number."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error
