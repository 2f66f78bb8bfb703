"""Finding pods through the API: a list, and a watch that goes on from there for ever.

While the API server is away what was known stays known. A watch that was cut goes on from the last
version that it saw; one that is too old is begun anew with a list.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from orchestrator.cluster.api import Change, Cluster, ClusterUnavailable, Endpoints, Expired
from outrider.errors import ConfigError

SELECTOR = "app.kubernetes.io/name=outrider"
"""EndpointSlices have the labels of their Service."""
COMPONENT = "app.kubernetes.io/component"
GRPC_PORT = "grpc"

WATCH_S = 60.0
"""A watch is ended by the server after so long: a broken connection is noticed by then."""
_BACKOFF_MIN_S, _BACKOFF_MAX_S = 0.2, 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where to look: what follows `kubernetes:` in --discover."""

    namespace: str
    selector: str = SELECTOR

    @classmethod
    def read(cls, text: str) -> Place:
        """Read `kubernetes:NAMESPACE` or `kubernetes:NAMESPACE/SELECTOR`. Raises `ConfigError`."""
        scheme, colon, rest = text.partition(":")
        namespace, slash, selector = rest.partition("/")
        if scheme != "kubernetes" or not colon or not namespace or (slash and not selector):
            raise ConfigError(
                f"--discover: {text!r} is not understood; write kubernetes:NAMESPACE, or"
                " kubernetes:NAMESPACE/LABEL=VALUE,... for Services of other labels"
            )
        return cls(namespace, selector or SELECTOR)


@dataclass(frozen=True, slots=True)
class Pace:
    """Times of a watch; tests are in more of a hurry."""

    watch_s: float = WATCH_S
    backoff_min_s: float = _BACKOFF_MIN_S
    backoff_max_s: float = _BACKOFF_MAX_S


class EndpointWatch:
    """Keeps a list of EndpointSlices up to date while the context lasts."""

    def __init__(
        self,
        cluster: Cluster,
        selector: str,
        report: Callable[[list[Endpoints]], None],
        pace: Pace | None = None,
    ) -> None:
        """`report` is called on the event loop with all there are, whenever that has changed."""
        self._cluster, self._selector, self._report = cluster, selector, report
        self._pace = pace or Pace()
        self._known: dict[str, Endpoints] = {}
        self._version = ""
        self._task: asyncio.Task[None] | None = None
        self.connected: bool | None = None
        """Whether the API server answered when it was asked last; None: not asked yet."""
        self.lists = self.watches = 0
        """How often it was asked for all there is, and for what has changed."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="endpoint watch")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        failures = 0
        while True:
            seen = self._version
            try:
                await self._follow()
                # A server that ends each watch at once must not be asked in a tight loop.
                failures = 0 if self._version != seen else min(failures + 1, 3)
            except Expired:
                _log.info("the API server has forgotten version %s: listing anew", self._version)
                self._version = ""
                continue
            except ClusterUnavailable as error:
                if self.connected is not False:
                    _log.warning("going on with the workers that are known: %s", error)
                self.connected = False
                failures += 1
            except Exception:
                # A defect, or an answer that makes no sense. The task must live.
                _log.exception("watching endpoints failed; listing anew")
                self._version = ""
                failures += 1
            await asyncio.sleep(self._backoff_s(failures))

    def _backoff_s(self, failures: int) -> float:
        if not failures:
            return 0.0
        most_s = min(self._pace.backoff_max_s, self._pace.backoff_min_s * 2.0 ** min(failures, 16))
        # Many orchestrators lose the same API server at once.
        return most_s * random.uniform(0.5, 1.0)

    async def _follow(self) -> None:
        if not self._version:
            self.lists += 1
            found, self._version = await self._cluster.endpoints(self._selector)
            self._answered()
            self._take({each.name: each for each in found})
        self.watches += 1
        await self._cluster.watch(self._selector, self._version, self._pace.watch_s, self._changed)
        self._answered()

    def _changed(self, change: Change) -> None:
        self._answered()
        self._version = change.version
        if change.endpoints is None:
            return
        known = dict(self._known)
        if change.deleted:
            known.pop(change.endpoints.name, None)
        else:
            known[change.endpoints.name] = change.endpoints
        self._take(known)

    def _take(self, known: dict[str, Endpoints]) -> None:
        if known != self._known or self.lists == 1:
            self._known = known
            self._report(list(known.values()))

    def _answered(self) -> None:
        if self.connected is False:
            _log.info("the API server answers again")
        self.connected = True


def workers(found: Iterable[Endpoints]) -> tuple[list[str], list[str]]:
    """Addresses of verifiers and of drafters among endpoints, by their Service's component."""
    by_component: dict[str, set[str]] = {"verifier": set(), "drafter": set()}
    for each in found:
        if each.labels.get(COMPONENT) in by_component:
            by_component[each.labels[COMPONENT]].update(each.addresses(GRPC_PORT))
    return sorted(by_component["verifier"]), sorted(by_component["drafter"])
