"""Round trips to workers as their callers find them: gRPC's own cost included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import grpc

from bench.links import LinkProxy
from outrider.serving.server import CHANNEL_OPTIONS
from outrider.v1 import worker_pb2, worker_pb2_grpc

CALLS = 200
_WARMING_CALLS = 20
_CALL_TIMEOUT_S = 30.0
_TOLERANCE = 0.03


def round_trip_s(address: str, calls: int = CALLS) -> float:
    """Median time of a call that does nothing, one after another on a connection of its own.

    Measure while the fleet is idle. Raises grpc.RpcError.
    """
    times_s = []
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        for _ in range(calls + _WARMING_CALLS):
            begin_s = time.perf_counter()
            stub.GetModelInfo(worker_pb2.GetModelInfoRequest(), timeout=_CALL_TIMEOUT_S)
            times_s.append(time.perf_counter() - begin_s)
    return statistics.median(times_s[_WARMING_CALLS:])


def total_round_trip_s(
    verifier: str, drafter: str, calls: int = CALLS, measure: Callable[..., float] = round_trip_s
) -> float:
    """Drafter to orchestrator to verifier and back: the orchestrator's round trips added up."""
    return measure(verifier, calls) + measure(drafter, calls)


def set_round_trip(
    proxy: LinkProxy,
    verifiers: dict[str, str],
    drafters: dict[str, str],
    wanted_s: float,
    calls: int = CALLS,
) -> float:
    """Delay all links (address by name) alike, so that the whole round trip comes near `wanted_s`.

    Half of it falls on either link. Returns the round trip that was measured in the end: what
    gRPC takes is its lower bound.
    """
    first_verifier, first_drafter = next(iter(verifiers.values())), next(iter(drafters.values()))
    names = [*verifiers, *drafters]

    def measure(delay_s: float) -> float:
        for name in names:
            proxy.delay(name, delay_s)
        return total_round_trip_s(first_verifier, first_drafter, calls)

    # Each of the two links is passed twice.
    return approached(wanted_s, measure, first=wanted_s / 4, gain=1 / 4)


def approached(
    wanted: float, measure: Callable[[float], float], *, first: float, gain: float, tries: int = 5
) -> float:
    """Look for the input, not negative, whose measure comes nearest to `wanted`.

    `gain` is what an input changes for a measure. Measures are noisy: the best one seen is measured
    again if it was not the last. Returns the last measure.
    """
    at, tried = first, []
    for _ in range(tries):
        found = measure(at)
        tried.append((abs(found - wanted), at))
        if tried[-1][0] <= _TOLERANCE * wanted or (at == 0.0 and found > wanted):
            return found
        at = max(0.0, at - gain * (found - wanted))
    return measure(min(tried)[1])
