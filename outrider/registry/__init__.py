"""What the fleets know of each other, in Redis; the only package that knows Redis."""

from outrider.registry.connection import KEY_PREFIX, Connection, redacted
from outrider.registry.renewal import Renewal
from outrider.registry.workers import (
    NAME_CHARACTERS_MAX,
    RECORD_TTL_S,
    RENEWAL_INTERVAL_S,
    WATCH_INTERVAL_S,
    WORKERS_MAX,
    Registry,
    Role,
    WorkerPublisher,
    WorkerRecord,
    WorkerState,
    WorkerWatch,
    published,
)

__all__ = [
    "KEY_PREFIX",
    "NAME_CHARACTERS_MAX",
    "RECORD_TTL_S",
    "RENEWAL_INTERVAL_S",
    "WATCH_INTERVAL_S",
    "WORKERS_MAX",
    "Connection",
    "Registry",
    "Renewal",
    "Role",
    "WorkerPublisher",
    "WorkerRecord",
    "WorkerState",
    "WorkerWatch",
    "published",
    "redacted",
]
