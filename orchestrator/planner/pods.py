"""The pods of one role in a simulated fleet, as placement sees them. Pure."""

from __future__ import annotations

import bisect

from orchestrator.placement import WorkerView
from outrider.domain import ModelInfo


class Pods:
    """Pods with their sessions, in the order of their load.

    The order makes it cheap to show a policy the least loaded only. A policy that takes the least
    loaded of equals decides on such a shortlist exactly as on all.
    """

    def __init__(self, role: str, count: int, info: ModelInfo, sessions_max: int) -> None:
        self._info = info
        self._sessions_max = sessions_max
        self._views = [
            WorkerView(f"{role}-{index:05d}", info, 0, sessions_max) for index in range(count)
        ]
        self._index = {view.address: index for index, view in enumerate(self._views)}
        self._order = sorted(_key(view) for view in self._views)
        self._down: set[int] = set()

    def __len__(self) -> int:
        return len(self._views)

    @property
    def up(self) -> int:
        """How many pods serve."""
        return len(self._order)

    def serves(self, index: int) -> bool:
        """Whether a pod is up."""
        return index not in self._down

    def index_of(self, view: WorkerView) -> int:
        """Number of the pod behind a view."""
        return self._index[view.address]

    def sessions(self, index: int) -> int:
        """Sessions on a pod."""
        return self._views[index].sessions

    def shortlist(self, count: int) -> list[WorkerView]:
        """The `count` least loaded pods that are up, or all, in no particular order, if 0."""
        if not count:
            return [v for index, v in enumerate(self._views) if index not in self._down]
        return [self._views[self._index[address]] for _, address in self._order[:count]]

    def change(self, index: int, sessions: int) -> None:
        """A pod has so many sessions more or, if negative, fewer."""
        view = self._views[index]
        changed = WorkerView(view.address, self._info, view.sessions + sessions, self._sessions_max)
        self._views[index] = changed
        if index not in self._down:
            del self._order[bisect.bisect_left(self._order, _key(view))]
            bisect.insort(self._order, _key(changed))

    def kill(self, index: int) -> None:
        """A pod that is up dies; its sessions are still counted until they are taken away."""
        del self._order[bisect.bisect_left(self._order, _key(self._views[index]))]
        self._down.add(index)

    def restart(self, index: int) -> None:
        """A dead pod is back."""
        self._down.remove(index)
        bisect.insort(self._order, _key(self._views[index]))


def _key(view: WorkerView) -> tuple[float, str]:
    return view.sessions / max(1, view.sessions_max), view.address
