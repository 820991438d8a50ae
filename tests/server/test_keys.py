"""API keys, and who may ask without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from hildanext.errors import ConfigError
from hildanext.server import keys as server_keys
from hildanext.server.keys import is_authorized, is_loopback, is_own_page, read_keys
from support import serving
from support.serving import dummy


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    (tmp_path / "keys").write_bytes("first\r\n\n  second key \nschlüssel\n".encode())
    return str(tmp_path / "keys")


def test_keys(key_file: str, subtests: pytest.Subtests) -> None:
    for header, status in [
        (b"Bearer first", 200),
        (b"bearer second key", 200),
        ("Bearer schlüssel".encode(), 200),
        (None, 401),
        (b"", 401),
        (b"Bearer", 401),
        (b"Bearer ", 401),
        (b"Bearer firs", 401),
        (b"Bearer firstt", 401),
        (b"Basic first", 401),
        (b"first", 401),
    ]:
        with subtests.test(header=header, status=status):
            headers = {} if header is None else {"Authorization": header}
            config = dummy(api_key_file=key_file, host="0.0.0.0")
            with serving.client(config, keys=read_keys(config.server, {})) as client:
                for answer in (
                    client.get("/health", headers=headers),
                    client.get("/metrics", headers=headers),
                    client.get("/v1/models", headers=headers),
                    client.post("/generate", json={"prompt": "x"}, headers=headers),
                ):
                    assert answer.status_code == status
                    assert ("WWW-Authenticate" in answer.headers) == (status == 401)
                # The key comes first: a stranger learns nothing about bodies or paths.
                assert client.post("/generate", content="{", headers=headers).status_code == (
                    401 if status == 401 else 422
                )
                assert client.get("/openapi.json", headers=headers).status_code == status
                # Probes carry no key, and learn nothing but whether it runs.
                assert client.get("/health/live").json() == {"status": "live"}
                assert client.get("/health/ready").json() == {"status": "ready"}


def test_pages_of_listed_origins_may_ask() -> None:
    page, other = {"Origin": "http://localhost:3000"}, {"Origin": "http://evil.example"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    for keys, sent in (([], {}), ([b"right"], {"Authorization": "Bearer right"})):
        with serving.client(dummy(cors_origins=["http://localhost:3000"]), keys=keys) as client:
            asked = client.options("/v1/models", headers=page | asks)  # without a key, as browsers do
            assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (200, page["Origin"])
            assert client.options("/v1/models", headers=other | asks).status_code == 400
            answer = client.post("/generate", json={"prompt": "x"}, headers=page | sent)
            assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, page["Origin"])
            answer = client.post("/generate", json={"prompt": "x"}, headers=other | sent)
            # With a key any program may ask; a page of another origin cannot read the answer.
            assert answer.status_code == (200 if keys else 403)
            assert "Access-Control-Allow-Origin" not in answer.headers
            assert client.post(
                "/generate", json={"prompt": "x"}, headers=page | {"Host": "evil.example"}
            ).status_code == (401 if keys else 403)
    with serving.client(dummy()) as client:
        assert client.options("/v1/models", headers=page | asks).status_code == 403


def test_every_origin_needs_keys_and_an_origin_is_no_path() -> None:
    server = dummy(cors_origins=["*"]).server
    assert read_keys(server, {"HILDANEXT_API_KEYS": "one"}) == [b"one"]
    with pytest.raises(ConfigError, match=r"'server.cors_origins': '\*' lets every web page use this server"):
        read_keys(server, {})
    for origin in ("localhost", "http://a/b", "file:///x", ""):
        with pytest.raises(ConfigError, match="cors_origins"):
            dummy(cors_origins=[origin])


def test_keys_of_the_environment_count_too(key_file: str) -> None:
    environment = {"HILDANEXT_API_KEYS": " one, two ,"}
    assert read_keys(dummy(host="0.0.0.0").server, environment) == [b"one", b"two"]
    assert read_keys(dummy(api_key_file=key_file).server, environment)[:3] == [b"one", b"two", b"first"]


def test_without_keys_other_sites_are_refused(subtests: pytest.Subtests) -> None:
    for host, origin, own in [
        ("127.0.0.1:8000", "", True),
        ("localhost:8000", "http://localhost:8000", True),
        ("[::1]:8000", "", True),
        ("localhost:8000", "http://evil.example", False),
        ("localhost:8000", "http://localhost:9000", False),
        ("localhost:8000", "null", False),
        ("evil.example:8000", "", False),
        ("evil.example:8000", "http://evil.example:8000", False),
        ("", "", False),
        ("[", "", False),
        ("localhost:8000", "http://[", False),
    ]:
        with subtests.test(host=host, origin=origin, own=own):
            assert is_own_page(host, origin) is own
            headers = {"Host": host} | ({"Origin": origin} if origin else {})
            with serving.client(dummy()) as client:
                assert client.post("/generate", json={"prompt": "x"}, headers=headers).status_code == (
                    200 if own else 403
                )
                assert client.get("/health/live", headers=headers).status_code == (200 if own else 403)


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    real = server_keys.hmac.compare_digest
    monkeypatch.setattr(server_keys.hmac, "compare_digest", lambda a, b: seen.append(b) or real(a, b))
    assert is_authorized("Bearer a", [b"a", b"b", b"c"])
    assert seen == [b"a", b"b", b"c"]


def test_loopback() -> None:
    for host, own in [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("example.org", False),
        ("localhost.example.org", False),
    ]:
        assert is_loopback(host) is own, (host, own)
