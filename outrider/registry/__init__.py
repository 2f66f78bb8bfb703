"""What the fleets know of each other, in Redis; the only package that knows Redis."""

from outrider.registry.connection import KEY_PREFIX, Connection, redacted
from outrider.registry.held_blocks import HeldBlocks
from outrider.registry.kv_index import KvIndex, block_key, holder_field
from outrider.registry.kv_publisher import KvPublisher, published_blocks
from outrider.registry.leases import Leases
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
    "HeldBlocks",
    "KvIndex",
    "KvPublisher",
    "Leases",
    "Registry",
    "Renewal",
    "Role",
    "WorkerPublisher",
    "WorkerRecord",
    "WorkerState",
    "WorkerWatch",
    "block_key",
    "holder_field",
    "published",
    "published_blocks",
    "redacted",
]
