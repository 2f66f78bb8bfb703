"""Who may ask, and how much: API keys, their concurrency and their rate."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.http.errors import RateLimited, Unauthorized
from outrider.errors import ConfigError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Somebody who may ask."""

    name: str
    """Empty for everybody, where no keys are needed."""
    sha256: bytes = b""
    requests_max: int | None = None
    """Generations at once."""
    requests_per_minute: float | None = None


ANYBODY = ApiKey("")


class Keyring:
    """The keys that are known. Secrets are kept as SHA-256, which suits long random ones."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    @classmethod
    def load(cls, path: Path) -> Keyring:
        """Read a TOML file. Raises `ConfigError` naming what is wrong.

        [keys.alice]
        sha256 = "9f86d0..."          # printf %s "$KEY" | sha256sum
        requests_max = 8              # at once; optional
        requests_per_minute = 600     # optional
        """
        try:
            table = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"the keys in {path} cannot be read: {error}") from error
        entries = table.get("keys")
        if not isinstance(entries, dict) or not entries or table.keys() != {"keys"}:
            raise ConfigError(f"{path} must hold tables [keys.NAME] and nothing else")
        if len(entries) > _KEYS_MAX:
            raise ConfigError(f"{path} holds {len(entries)} keys; at most {_KEYS_MAX} are taken")
        return cls([_key(path, name, entry) for name, entry in entries.items()])

    def find(self, authorization: str) -> ApiKey:
        """Return whose key a header holds. Raises `Unauthorized`.

        Takes as long for a key that is nearly right as for any other: hashes are compared, in
        constant time, and always all of them.
        """
        digest = hashlib.sha256(_secret(authorization)).digest()
        found: ApiKey | None = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        if found is None:
            raise Unauthorized(
                "authorization", "give a valid API key, as in 'Authorization: Bearer KEY'"
            )
        return found


def _key(path: Path, name: str, entry: object) -> ApiKey:
    place = f"{path}: keys.{name}"
    if not isinstance(entry, dict):
        raise ConfigError(f"{place} must be a table")
    unknown = entry.keys() - {"sha256", "requests_max", "requests_per_minute"}
    if unknown:
        raise ConfigError(f"{place}.{min(unknown)} is no setting of a key")
    sha256 = entry.get("sha256")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ConfigError(f"{place}.sha256 must be 64 hexadecimal digits in lower case")
    for limit, kinds in (("requests_max", int), ("requests_per_minute", (int, float))):
        value = entry.get(limit, 1)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e9:
            raise ConfigError(f"{place}.{limit} must be a positive number")
    limits = (entry.get("requests_max"), entry.get("requests_per_minute"))
    return ApiKey(name, bytes.fromhex(sha256), *limits)


def _secret(authorization: str) -> bytes:
    """The key in a header: a bearer's, or what a browser sends as a password."""
    scheme, _, value = authorization.partition(" ")
    value = value.strip()
    match scheme.lower():
        case "bearer":
            return value.encode("latin-1", "replace")
        case "basic":
            with contextlib.suppress(binascii.Error, ValueError):
                return base64.b64decode(value, validate=True).partition(b":")[2]
    return b""


@dataclass(slots=True)
class _Use:
    running: int = 0
    allowance: float = 0.0
    """Requests that may start at once."""
    at_s: float = 0.0
    """When that was so."""


class Limiter:
    """Keeps each key to its limits."""

    def __init__(self) -> None:
        self._uses: dict[str, _Use] = {}

    @contextlib.contextmanager
    def admit(self, key: ApiKey, now_s: float) -> Iterator[None]:
        """Count one request while the context lasts. Raises `RateLimited`."""
        rate = key.requests_per_minute
        use = self._uses.get(key.name)
        if use is None:
            use = self._uses[key.name] = _Use(allowance=rate or 0.0, at_s=now_s)
        if key.requests_max is not None and use.running >= key.requests_max:
            raise RateLimited(f"the key may have {key.requests_max} requests at once", 1.0)
        if rate is not None:
            filled = use.allowance + (now_s - use.at_s) * rate / 60.0
            use.allowance, use.at_s = min(max(1.0, rate), filled), now_s
            if use.allowance < 1.0:
                wait_s = (1.0 - use.allowance) * 60.0 / rate
                raise RateLimited(f"the key may send {rate:g} requests a minute", wait_s)
            use.allowance -= 1.0
        use.running += 1
        try:
            yield
        finally:
            use.running -= 1
