"""Sources behind URLs and globs: the same documents as from local files, broken connections, and one line for what fails."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard

from hildanext.config import SourceConfig
from hildanext.data.corpus import make_reader
from hildanext.data.documents import Document, Rejects
from hildanext.data.sources import find_files, opening
from hildanext.errors import DataError, UnreachableError, UsageError

TEXTS = [f"Document {i} says {'very ' * (i % 40)}little." for i in range(400)]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def read(kind: str, path: str, **more: Any) -> tuple[list[Document], Rejects]:
    source = SourceConfig(kind=kind, path=path, **more)
    reader = make_reader(source, find_files(source, "data"), seed=0)
    return [doc for _, doc in iter(reader.next, None)], reader.rejects


class Broken(SimpleHTTPRequestHandler):
    """Serves a folder with ranges, as object stores do; the first `failures` answers with a body break off half-way."""

    failures = 0
    ranges = True
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        wanted = self.headers.get("Range") if self.ranges else None
        start, end = 0, len(data) - 1
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or end), end)
        type(self).asked.append(f"{start}-{end}")
        self.send_response(206 if wanted else 200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start + 1))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.end_headers()
        body = data[start : end + 1]
        if type(self).failures > 0 and len(body) > 1000:
            type(self).failures -= 1
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
            return
        with contextlib.suppress(ConnectionError):  # a reader that wanted a part hangs up
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`serve(failures)`: the address of a server of the test's folder, whose first answers break off."""
    pytest.importorskip("aiohttp")
    servers = []

    def start(failures: int = 0) -> str:
        handler = type("Handler", (Broken,), {"failures": failures, "asked": []})
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
    fsspec.implementations.http.HTTPFileSystem.clear_instance_cache()


@pytest.fixture
def memory() -> Iterator[Callable[[str, bytes], None]]:
    """`memory(path, data)`: a file of fsspec's memory:// file system, empty again afterwards."""
    system = fsspec.filesystem("memory")

    def put(path: str, data: bytes) -> None:
        system.pipe_file(f"/{path}", data)

    yield put
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_a_tree_in_memory_is_read_like_a_local_one(tmp_path: Path, memory: Callable[[str, bytes], None]) -> None:
    files = {
        "a/0.jsonl": LINES,
        "a/deep/1.jsonl.gz": gzip.compress(LINES),
        "b/2.jsonl.zst": zstandard.ZstdCompressor().compress(LINES),
        "attributes/0.jsonl": b"no document\n",
        ".hidden.jsonl": b"no document\n",
        "notes.md": b"no document\n",
    }
    for name, data in files.items():
        memory(f"root/{name}", data)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for below in ("", "/a", "/a/deep/1.jsonl.gz", "/**/*.jsonl*", "/*/*.jsonl.zst"):
        local, _ = read("dolma", f"{tmp_path}{below}")
        found, rejects = read("dolma", f"memory://root{below}")
        assert found == local
        assert found
        assert rejects.total == 0
    source = SourceConfig(kind="dolma", path="memory://root")
    assert [file.size for file in find_files(source, "data")] == [
        len(files[name]) for name in sorted(files) if name[0] in "ab" and name[1] == "/"
    ]


def test_every_kind_opens_urls(memory: Callable[[str, bytes], None], tmp_path: Path) -> None:
    memory("x/chat.json", json.dumps([{"question": "a?", "answer": "b"}] * 3).encode())
    assert len(read("instruct", "memory://x/chat.json")[0]) == 3
    memory("x/stories.txt", b"One.\n<|endoftext|>\nTwo.\n")
    assert [doc.text for doc in read("tinystories", "memory://x/stories.txt")[0]] == ["One.", "Two."]
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "x.parquet")
    memory("x/stories.parquet", (tmp_path / "x.parquet").read_bytes())
    assert [doc.text for doc in read("tinystories", "memory://x/stories.parquet")[0]] == TEXTS
    memory("x/part.npy", np.array([1, 2, 3, 4], dtype=np.uint16).tobytes())
    memory("x/part.csv.gz", gzip.compress(b"0,3,a,s,1\r\n3,4,b,s,2\r\n"))
    assert [doc.input_ids for doc in read("pretokenized", "memory://x/part.npy")[0]] == [[1, 2, 3], [4]]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_server_is_read_to_the_end_though_connections_break(
    tmp_path: Path,
    serve: Callable[..., str],
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(opening, "FIRST_WAIT_S", 0.0)
    rng = np.random.default_rng(0)
    texts = [rng.bytes(400).hex() for _ in range(1500)]
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    (tmp_path / f"x.jsonl{suffix}").write_bytes(pack(data))
    docs, rejects = read("dolma", f"{serve(failures=3)}/x.jsonl{suffix}")
    assert [doc.text for doc in docs] == texts
    assert rejects.total == 0
    assert capsys.readouterr().err.count("connection lost at byte") == 3


def test_a_signed_address_is_read_by_the_name_before_its_query(tmp_path: Path, serve: Callable[..., str]) -> None:
    url = serve()
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(LINES))
    assert [doc.text for doc in read("dolma", f"{url}/x.jsonl.gz?signature=1.txt")[0]] == TEXTS
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "x.parquet")
    assert [doc.text for doc in read("tinystories", f"{url}/x.parquet?download=true")[0]] == TEXTS
    (tmp_path / "x.npy").write_bytes(np.array([1, 2, 3, 4], dtype=np.uint16).tobytes())
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(b"0,3,a,s,1\r\n3,4,b,s,2\r\n"))
    assert [doc.input_ids for doc in read("pretokenized", f"{url}/x.npy?download=true")[0]] == [[1, 2, 3], [4]]


def test_a_server_that_stays_broken_is_named_with_the_byte(
    tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "FIRST_WAIT_S", 0.0)
    (tmp_path / "x.jsonl").write_bytes(LINES)
    url = f"{serve(failures=1000)}/x.jsonl"
    with pytest.raises(UnreachableError) as error:
        read("dolma", url)
    assert str(error.value).startswith(f"{url}: cannot be read past byte 0 (")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "kind", "line"),
    [
        (
            "s3://bucket/x.jsonl",
            UsageError,
            "'s3://bucket/x.jsonl' needs a package that is not installed: pip install s3fs",
        ),
        (
            "gs://bucket/x.jsonl",
            UsageError,
            "'gs://bucket/x.jsonl' needs a package that is not installed: pip install gcsfs",
        ),
        ("nosuch://x.jsonl", UsageError, "'nosuch://x.jsonl': fsspec does not support the protocol 'nosuch'"),
        ("memory://nowhere/x.jsonl", UsageError, "path 'memory://nowhere/x.jsonl' does not exist"),
        ("memory://**x/y.jsonl", UsageError, "path 'memory://**x/y.jsonl': Invalid pattern"),
        ("http://127.0.0.1:9/x.jsonl", UsageError, "path 'http://127.0.0.1:9/x.jsonl' does not exist (Cannot connect"),
        ("nowhere/*.jsonl", DataError, "nowhere/*.jsonl: no files that end in"),
    ],
)
def test_what_cannot_be_opened_is_one_line(url: str, kind: type[Exception], line: str) -> None:
    with pytest.raises(kind) as error:
        read("dolma", url)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_the_hub_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real HfFileSystem against an address where nobody answers."""
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    monkeypatch.setattr(HfFileSystem, "__init__", partial_init(HfFileSystem.__init__, endpoint="http://127.0.0.1:9"))
    with pytest.raises(UnreachableError) as error:
        read("dolma", "hf://datasets/allenai/dolma/data/*.json.gz")
    HfFileSystem.clear_instance_cache()
    assert str(error.value).startswith("hf://datasets/allenai/dolma/data/*.json.gz: cannot be reached (")
    assert "\n" not in str(error.value)


def partial_init(init: Callable[..., None], **more: Any) -> Callable[..., None]:
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, **more})

    return call


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_tables_are_read_to_the_end_though_connections_break(
    tmp_path: Path,
    serve: Callable[..., str],
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(opening, "FIRST_WAIT_S", 0.0)
    rng = np.random.default_rng(0)
    table = pa.table({"text": [rng.bytes(400).hex() for _ in range(3000)]})
    if suffix == ".parquet":
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=1000)
    else:
        pa.feather.write_feather(table, str(tmp_path / f"x{suffix}"), chunksize=500)
    docs, rejects = read("text", f"{serve(failures=4)}/x{suffix}?signature=1")
    assert [doc.text for doc in docs] == table["text"].to_pylist()
    assert rejects.total == 0
    assert capsys.readouterr().err.count("connection lost at byte") == 4
    with pytest.raises(UnreachableError, match=r"cannot be (read past byte|opened)"):
        read("text", f"{serve(failures=1000)}/x{suffix}")


def test_a_server_without_ranges_cannot_send_a_table(
    tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"text": TEXTS * 5000}), tmp_path / "x.parquet", use_dictionary=False, compression="none")
    monkeypatch.setattr(Broken, "ranges", False)
    with pytest.raises(UnreachableError, match="sends only whole files; download it and give its local path"):
        read("text", f"{serve()}/x.parquet")
