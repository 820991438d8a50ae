"""HTTP clients for serve.py, in a separate process: `python client.py PLAN.json OUT.json`. Standard library only.

Each client keeps its connection and sends the next request as soon as it has an answer. After a 429 it waits for
Retry-After and retries.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


class Connection:
    """HTTP/1.1 on a kept connection, with the features that the server uses: lengths, chunks, server-sent events."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.host = "{}:{}".format(*writer.get_extra_info("peername"))

    async def post(self, path: str, body: bytes, request_id: str) -> tuple[int, dict[str, str]]:
        """Send a request; return (status, headers). Read the body with `body` or `chunk`."""
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        self.writer.write(f"{head}X-Request-Id: {request_id}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        return int(first.split()[1]), {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines)}

    async def body(self, headers: dict[str, str]) -> bytes:
        return await self.reader.readexactly(int(headers["content-length"]))

    async def chunk(self) -> bytes:
        """Read the next chunk of a stream; empty at its end."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]


async def ask(connection: Connection, plan: dict[str, Any], number: int, row: Row) -> None:
    """Send a request until it is accepted, read its answer, and record the results in `row`."""
    row |= {"prompt": number % len(plan["prompts"]), "refused": 0, "answers": 0}
    stream = number % plan["stream_every"] == 0
    body = json.dumps(plan["settings"] | {"prompt": plan["prompts"][row["prompt"]], "stream": stream}).encode()
    asked = began = time.perf_counter()
    while True:
        row["id"] = f"{plan['name']}-{number}-{row['refused']}"
        status, headers = await connection.post("/generate", body, row["id"])
        if status != 429:
            break
        await connection.body(headers)
        row["refused"] += 1
        await asyncio.sleep(float(headers["retry-after"]))
        began = time.perf_counter()
    row["status"] = status
    if stream and status == 200:
        done = await _events(connection, row, began)
    else:
        done = json.loads(await connection.body(headers))
        row["answers"] += 1
    row |= {"s": time.perf_counter() - began, "with_retries_s": time.perf_counter() - asked}
    if headers["x-request-id"] != row["id"] or done is None or "token_ids" not in done:
        row["error"] = f"{status} {headers['x-request-id']}: {done}"
    else:
        row |= {"tokens": len(done["token_ids"]), "text": done["text"], "forwards": done["stats"]["forwards"]}


async def _events(connection: Connection, row: Row, began: float) -> Any:
    """Read a stream to its end; return the data of its last event and record the time to the first block in `row`."""
    rest, done = b"", None
    while chunk := await connection.chunk():
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            if event.startswith(b"event: block"):
                row.setdefault("first_s", time.perf_counter() - began)
            elif event.startswith((b"event: done", b"event: error")):
                row["answers"] += 1
                done = json.loads(event.split(b"data: ", 1)[1])
    return done


async def client(plan: dict[str, Any], numbers: Iterator[int], rows: list[Row], until: float) -> None:
    """Send requests until no numbers are left or the time is over."""
    connection: Connection | None = None
    for number in numbers:
        rows.append(row := {})
        try:
            if connection is None:
                connection = Connection(*await asyncio.open_connection("127.0.0.1", plan["port"]))
            await ask(connection, plan, number, row)
        except (OSError, EOFError, ValueError, KeyError) as error:  # no answer, or an unreadable one
            row["error"] = repr(error)
        if "error" in row and connection is not None:
            connection.writer.close()
            connection = None
        if time.monotonic() > until:
            break
    if connection is not None:
        connection.writer.close()


async def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Send `requests` in total, shared by all clients, for at most `seconds`."""
    rows: list[Row] = []
    numbers, until = iter(range(plan["requests"])), time.monotonic() + plan["seconds"]
    began = time.perf_counter()
    await asyncio.gather(*[client(plan, numbers, rows, until) for _ in range(plan["clients"])])
    return {"seconds": time.perf_counter() - began, "rows": rows}


if __name__ == "__main__":
    source, target = sys.argv[1:]
    with open(source, encoding="utf-8") as file:
        found = asyncio.run(run(json.load(file)))
    with open(target, "w", encoding="utf-8") as file:
        json.dump(found, file)
