"""Which workers there are, in Redis.

Keys. All expire, and share a slot of a cluster through the braces, so scripts may touch several:

    outrider:1:{w}:index            zset   "role:worker" -> expiry, in ms of Redis' own clock
    outrider:1:{w}:{role}:{worker}  hash   the record (the braces around `w` are literal)

A worker renews its record; what is not renewed is gone after `ttl_s`. Redis is a notice board and
never the judge of who is alive: that is gRPC health and the streams. With Redis away, what was
known stays known, and when it is back, even empty, all workers are there again within seconds.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, cast, get_args

from outrider.errors import ConfigError, RegistryUnavailable
from outrider.registry.connection import KEY_PREFIX, Connection
from outrider.registry.renewal import Renewal

logger = logging.getLogger(__name__)

Role = Literal["verifier", "drafter"]
WorkerState = Literal["ready", "draining"]

RECORD_TTL_S: Final = 10.0
RENEWAL_INTERVAL_S: Final = 3.0
"""Three renewals per lifetime: two may be lost before a worker seems gone."""
WATCH_INTERVAL_S: Final = 1.0
WORKERS_MAX: Final = 4096
"""Workers read at most, those that expire last first: a bound on what a stranger can cost us."""
NAME_CHARACTERS_MAX: Final = 512

_PREFIX: Final = KEY_PREFIX + "{w}:"
_INDEX: Final = f"{_PREFIX}index"

# Publishes a worker's record for a while, replacing what was there.
# KEYS[1] index (zset), KEYS[2] record (hash)
# ARGV[1] index member, ARGV[2] time to live in ms, ARGV[3..] field, value, field, value, ...
# Returns the record's expiry in ms of Redis' clock.
_PUBLISH: Final = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local ttl_ms = tonumber(ARGV[2])
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[2], ttl_ms)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
redis.call('ZADD', KEYS[1], now_ms + ttl_ms, ARGV[1])
if redis.call('PTTL', KEYS[1]) < ttl_ms then
    redis.call('PEXPIRE', KEYS[1], ttl_ms)
end
return now_ms + ttl_ms
"""

# Removes a worker's record unless a later incarnation has replaced it.
# KEYS[1] index (zset), KEYS[2] record (hash)
# ARGV[1] index member, ARGV[2] incarnation
# Returns 1 if it was removed, 0 if it was not ours or not there.
_WITHDRAW: Final = """
if redis.call('HGET', KEYS[2], 'incarnation') ~= ARGV[2] then
    return 0
end
redis.call('DEL', KEYS[2])
redis.call('ZREM', KEYS[1], ARGV[1])
return 1
"""


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """What a worker says of itself. Raises `ConfigError` if that cannot be right."""

    role: Role
    worker: str
    """Id of the worker; survives restarts."""
    incarnation: str
    """Nonce of the process: what a worker held in another incarnation is gone."""
    address: str
    """host:port where others reach it."""
    model: str
    model_fingerprint: str
    capacity: int
    """Sessions at most."""
    load: int
    """Sessions in use; may exceed the capacity while it shrinks."""
    state: WorkerState
    tokenizer_fingerprint: str = ""
    """Empty: it only handles ids, or does not say."""
    kv_tokens_used: int = 0
    """Tokens of KV that sessions hold."""
    kv_tokens_max: int = 0
    """Tokens of KV that it has room for; 0: it does not say."""

    def __post_init__(self) -> None:
        _check(self.role in get_args(Role), "role", self.role)
        _check(self.state in get_args(WorkerState), "state", self.state)
        for name in ("worker", "incarnation", "address"):
            _check(bool(getattr(self, name)), name, "")
        for name in (
            "worker",
            "incarnation",
            "address",
            "model",
            "model_fingerprint",
            "tokenizer_fingerprint",
        ):
            text: str = getattr(self, name)
            # Ids and addresses turn up in logs and terminals.
            printable = text.isprintable() and len(text) <= NAME_CHARACTERS_MAX
            _check(printable, name, text[:NAME_CHARACTERS_MAX])
        host, _, port = self.address.rpartition(":")
        port_valid = port.isascii() and port.isdigit() and 0 < int(port) < 65536
        _check(bool(host) and port_valid, "address", self.address)
        _check(0 <= self.capacity < 2**31, "capacity", self.capacity)
        _check(0 <= self.load < 2**31, "load", self.load)
        _check(0 <= self.kv_tokens_used < 2**53, "kv_tokens_used", self.kv_tokens_used)
        _check(0 <= self.kv_tokens_max < 2**53, "kv_tokens_max", self.kv_tokens_max)


def _check(condition: bool, name: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{name} of a worker cannot be {value!r}")


class Registry:
    """Which workers there are, as they say themselves."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.place: Final = connection.place
        """Where Redis is, fit for logs."""
        self._publish = connection.redis.register_script(_PUBLISH)
        self._withdraw = connection.redis.register_script(_WITHDRAW)
        self.malformed_records = 0
        """How many records could not be read, counted at each reading."""
        self._malformed_before: frozenset[str] = frozenset()

    async def publish(self, record: WorkerRecord, ttl_s: float = RECORD_TTL_S) -> None:
        """Announce a worker for `ttl_s`, replacing its earlier record of any incarnation.

        Raises `RegistryUnavailable`.
        """
        member, key = _names(record.role, record.worker)
        fields = [word for pair in _fields(record).items() for word in pair]
        async with self._connection.call():
            await self._publish(keys=[_INDEX, key], args=[member, int(ttl_s * 1000), *fields])

    async def withdraw(self, record: WorkerRecord) -> bool:
        """Take a worker back; false if the record is another incarnation's, or gone.

        Raises `RegistryUnavailable`.
        """
        member, key = _names(record.role, record.worker)
        async with self._connection.call():
            return bool(await self._withdraw(keys=[_INDEX, key], args=[member, record.incarnation]))

    async def workers(self) -> list[WorkerRecord]:
        """Return the workers whose records have not expired, sorted by role and id.

        What cannot be read is counted and skipped. Two round trips. Raises `RegistryUnavailable`.
        """
        async with self._connection.call():
            members = await self._members()
            answers: list[Any] = []
            if members:
                pipeline = self._connection.redis.pipeline(transaction=False)
                for member in members:
                    pipeline.hgetall(_PREFIX.encode() + member)
                # A key of the wrong type is an error of its own, not of the whole.
                answers = await pipeline.execute(raise_on_error=False)
        return self._records(dict(zip(members, answers, strict=True)))

    async def _members(self) -> list[bytes]:
        """Return the names in the index that have not expired by Redis' clock."""
        pipeline = self._connection.redis.pipeline(transaction=False)
        pipeline.time()
        pipeline.zrevrange(_INDEX, 0, WORKERS_MAX - 1, withscores=True)
        (now_s, now_us), indexed = await pipeline.execute()
        now_ms = now_s * 1000 + now_us / 1000
        return [member for member, expiry_ms in indexed if expiry_ms > now_ms]

    def _records(self, answers: Mapping[bytes, Any]) -> list[WorkerRecord]:
        records: list[WorkerRecord] = []
        malformed: set[str] = set()
        for member, answer in answers.items():
            if answer == {}:
                continue  # Expired or withdrawn between the two readings.
            try:
                records.append(_record(member, answer))
            # ConfigError from the record's own checks, the others from what is no record at all.
            except (ConfigError, ValueError, KeyError, AttributeError):
                malformed.add(repr(member)[:NAME_CHARACTERS_MAX])
        self._count_malformed(frozenset(malformed))
        return sorted(records, key=lambda record: (record.role, record.worker))

    def _count_malformed(self, malformed: frozenset[str]) -> None:
        self.malformed_records += len(malformed)
        for name in sorted(malformed - self._malformed_before):
            logger.warning("Redis holds a worker record that cannot be read: %s", name)
        self._malformed_before = malformed


class WorkerPublisher(Renewal):
    """Keeps a worker's record in the registry while the context lasts, then withdraws it.

    Every renewal carries the whole record, so a Redis that comes back empty is told all.
    """

    def __init__(
        self,
        registry: Registry,
        record: Callable[[], WorkerRecord],
        *,
        interval_s: float = RENEWAL_INTERVAL_S,
        ttl_s: float = RECORD_TTL_S,
    ) -> None:
        """`record` gives the current record; called on the event loop at each renewal.

        `wake` renews at once, for example when draining begins.
        """
        super().__init__("worker publisher", registry.place, interval_s)
        self._registry = registry
        self._record = record
        self._ttl_s = ttl_s
        self._published: WorkerRecord | None = None

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Withdraw the record; if Redis is away, it expires."""
        await super().__aexit__(kind, error, traceback)
        if self._published is not None and self.connected:
            with contextlib.suppress(RegistryUnavailable):
                await self._registry.withdraw(self._published)

    async def _act(self) -> None:
        # Before it is sent: a call that fails may have been carried out.
        self._published = self._record()
        await self._registry.publish(self._published, self._ttl_s)


@contextlib.asynccontextmanager
async def published(url: str | None, record: Callable[[], WorkerRecord]) -> AsyncIterator[None]:
    """Keep a worker's record in the Redis at `url` while the context lasts; None: do nothing."""
    if url is None:
        yield
        return
    connection = Connection(url)
    try:
        async with WorkerPublisher(Registry(connection), record):
            yield
    finally:
        await connection.close()


class WorkerWatch(Renewal):
    """Reports the list of workers at intervals while the context lasts.

    While Redis is away, nothing is reported: what was known stays known.
    """

    def __init__(
        self,
        registry: Registry,
        report: Callable[[list[WorkerRecord]], None],
        *,
        interval_s: float = WATCH_INTERVAL_S,
    ) -> None:
        """`report` is called on the event loop with each list, changed or not.

        `wake` reads at once.
        """
        super().__init__("worker watch", registry.place, interval_s)
        self._registry = registry
        self._report = report

    async def _act(self) -> None:
        self._report(await self._registry.workers())


def _names(role: str, worker: str) -> tuple[str, str]:
    """Return a worker's name in the index and its key."""
    member = f"{role}:{worker}"
    return member, f"{_PREFIX}{member}"


def _fields(record: WorkerRecord) -> dict[str, str]:
    return {
        "incarnation": record.incarnation,
        "address": record.address,
        "model": record.model,
        "model_fingerprint": record.model_fingerprint,
        "capacity": str(record.capacity),
        "load": str(record.load),
        "state": record.state,
        "tokenizer_fingerprint": record.tokenizer_fingerprint,
        "kv_tokens_used": str(record.kv_tokens_used),
        "kv_tokens_max": str(record.kv_tokens_max),
    }


def _record(member: bytes, answer: Mapping[bytes, bytes]) -> WorkerRecord:
    """Read a record; raises what comes up if it is none. Fields that we do not know are fine."""
    role, _, worker = member.decode().partition(":")
    text = {key.decode(): value.decode() for key, value in answer.items()}
    return WorkerRecord(
        role=cast(Role, role),
        worker=worker,
        incarnation=text["incarnation"],
        address=text["address"],
        model=text["model"],
        model_fingerprint=text["model_fingerprint"],
        capacity=int(text["capacity"]),
        load=int(text["load"]),
        state=cast(WorkerState, text["state"]),
        # Later fields, which workers of earlier releases lack.
        tokenizer_fingerprint=text.get("tokenizer_fingerprint", ""),
        kv_tokens_used=int(text.get("kv_tokens_used", "0")),
        kv_tokens_max=int(text.get("kv_tokens_max", "0")),
    )
