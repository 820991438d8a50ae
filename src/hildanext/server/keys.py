"""Access control: API keys, and which addresses count as loopback."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from hildanext.config import ServerConfig
from hildanext.errors import ConfigError

KEYS_VARIABLE = "HILDANEXT_API_KEYS"


def read_keys(server: ServerConfig, environment: Mapping[str, str]) -> list[bytes]:
    """Return the API keys of `server.api_key_file` (one per line) and of HILDANEXT_API_KEYS (comma-separated).

    Raises ConfigError for a non-loopback address without keys, for a key file that is unreadable or empty, and for pages
    of every origin without keys.
    """
    keys = [key.strip().encode() for key in environment.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if server.api_key_file is not None:
        try:
            lines = Path(server.api_key_file).read_bytes().splitlines()
        except OSError as error:
            raise ConfigError(f"'server.api_key_file': cannot read {server.api_key_file}: {error.strerror}") from None
        in_file = [line.strip() for line in lines if line.strip()]
        if not in_file:
            raise ConfigError(f"'server.api_key_file': {server.api_key_file} contains no key; write one key per line")
        keys += in_file
    if not keys and not is_loopback(server.host):
        raise ConfigError(
            f"'server.host': {server.host} can be reached from other machines; set server.api_key_file or "
            f"{KEYS_VARIABLE}, or use 127.0.0.1"
        )
    if not keys and "*" in server.cors_origins:
        raise ConfigError(
            f"'server.cors_origins': '*' lets every web page use this server; list origins, or set server.api_key_file or "
            f"{KEYS_VARIABLE}"
        )
    return keys


def is_loopback(host: str) -> bool:
    """Whether an address is loopback. A name other than localhost counts as reachable from other machines."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_authorized(header: str, keys: list[bytes]) -> bool:
    """Whether an Authorization header contains one of the keys. All keys are compared, each in constant time."""
    scheme, _, given = header.partition(" ")
    matches = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


def is_own_page(host: str, origin: str, origins: Sequence[str] = ()) -> bool:
    """Whether Host is loopback and Origin, if present, is the same host or listed in `origins`.

    Checked when the server has no keys.

    Otherwise a page of another site could reach the server through a browser (DNS rebinding, cross-site requests).
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return is_loopback(name) and (not origin or origin in origins or urlsplit(origin).netloc == host)
    except ValueError:  # an incomplete IPv6 address
        return False
