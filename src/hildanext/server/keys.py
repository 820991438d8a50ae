"""Who may ask: API keys, and what counts as this machine's own address."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from hildanext.config import ServerConfig
from hildanext.errors import ConfigError

KEYS_VARIABLE = "HILDANEXT_API_KEYS"


def read_keys(server: ServerConfig, environment: Mapping[str, str]) -> list[bytes]:
    """API keys of `server.api_key_file` (one a line) and of HILDANEXT_API_KEYS (commas between them).

    Raises ConfigError for an address beyond loopback without keys, and for a file that cannot be read or holds none.
    """
    keys = [key.strip().encode() for key in environment.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if server.api_key_file is not None:
        try:
            lines = Path(server.api_key_file).read_bytes().splitlines()
        except OSError as error:
            raise ConfigError(f"'server.api_key_file': cannot read {server.api_key_file}: {error.strerror}") from None
        in_file = [line.strip() for line in lines if line.strip()]
        if not in_file:
            raise ConfigError(f"'server.api_key_file': {server.api_key_file} holds no key; write one a line")
        keys += in_file
    if not keys and not is_loopback(server.host):
        raise ConfigError(
            f"'server.host': {server.host} can be reached from other machines; set server.api_key_file or "
            f"{KEYS_VARIABLE}, or use 127.0.0.1"
        )
    return keys


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own. A name other than localhost counts as reachable from outside."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_authorized(header: str, keys: list[bytes]) -> bool:
    """Whether an Authorization header carries one of the keys. Every key is compared, each in constant time."""
    scheme, _, given = header.partition(" ")
    matches = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


def is_own_page(host: str, origin: str) -> bool:
    """Without keys: whether a request names a loopback host, and comes from a page of that host if from any.

    A page elsewhere could otherwise reach this server through its visitor's browser (DNS rebinding, cross-site posts).
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return is_loopback(name) and (not origin or urlsplit(origin).netloc == host)
    except ValueError:  # half of an IPv6 address
        return False
