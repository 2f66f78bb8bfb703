"""Prometheus metrics, read off the orchestrator when they are asked for.

Each help text is the question that the metric answers. Nothing here runs on the token path.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from orchestrator.driver import Driver
from orchestrator.fleet import Fleet
from orchestrator.meters import LOOKUP_S, Histogram
from orchestrator.workers import DrafterLink, LinkState, VerifierLink
from outrider.domain import SpeculationCounters

NAMES: Mapping[str, str] = {
    "requests_total": "How do requests end? Answered ones by finish reason, others by error.",
    "http_responses_total": "What does the HTTP door answer, by route and status?",
    "prompt_tokens_total": "How much is read?",
    "completion_tokens_total": "How much was written in answers that have ended?",
    "rounds_total": "How many verify steps were taken, counted for each session in them?",
    "draft_tokens_total": "How many guesses were verified?",
    "accepted_tokens_total": "How many guesses were right? Over draft tokens: acceptance rate.",
    "proposer_draft_tokens_total": "How many guesses of each proposer and version were verified?",
    "proposer_accepted_tokens_total": "How many of them were right?",
    "accepted_tokens_per_position_total": "How deep do guesses stay right? Position 0 is next.",
    "fallback_rounds_total": "How many verify steps had nobody to guess for them: switched off by"
    " the request (off), or no drafter that pays (unbound)?",
    "received_draft_tokens_total": "How many guesses reached a verifier, verified or not?",
    "stale_proposals_total": "How many drafts were dropped whole, and why?",
    "dropped_draft_tokens_total": "How many single guesses were dropped, and why?",
    "session_migrations_total": "How often does a session leave a worker, of which role, and why?",
    "ttft_seconds": "How long does a client wait for the first token?",
    "itl_seconds": "How long for each further one? What one step commits shares its time.",
    "queue_wait_seconds": "How long until a verifier has taken a session?",
    "request_seconds": "How long does an answer take in all?",
    "verify_seconds": "How long does a verify step take?",
    "draft_rtt_seconds": "How far is a drafter from here, there and back?",
    "speculation_length": "How many guesses does a session bring into a step, on average?",
    "estimated_speedup_ratio": "How much faster is a session than without guesses, by its steps?",
    "sessions": "How many sessions does each role hold for this orchestrator?",
    "unread_answers": "How many answers are complete and wait for clients that read slowly?",
    "sessions_max": "How many sessions does this orchestrator take?",
    "connections": "How many HTTP clients are connected?",
    "connections_max": "How many are let in?",
    "cpu_seconds_total": "How much processor time has this process used?",
    "worker_sessions": "How many sessions does a worker hold for this orchestrator?",
    "worker_sessions_max": "How many does it take, whoever they are for?",
    "verify_rows": "How many sessions decode on a verifier, whoever they are for?",
    "plain_step_seconds": "How long would a verify step take without guesses?",
    "pay_probability_min": "How probable must a guess be to be worth verifying?",
    "verifier_rtt_seconds": "How far is a verifier from here, there and back?",
    "draft_step_seconds": "How long does a drafter's growing step take?",
    "draft_leaves_max": "How many guesses does such a step expand at most? 0: no bound.",
    "draft_gain_tokens": "What does a drafter win for a session, in tokens a verify step?",
    "queue_depth": "How many admitted sessions wait for room for their KV?",
    "kv_tokens_used": "How many tokens of KV are in use, by verifier?",
    "kv_used_ratio": "How full is a verifier's KV? As it told Redis; nothing without.",
    "kvindex_lookups_total": "How often was Redis asked who holds a prompt's beginning, and was it"
    " in time, late, or (being slow) not waited for?",
    "kvindex_lookup_seconds": "How long does such an answer take?",
    "kvindex_degraded": "Is placement going on without knowing who holds what?",
    "kv_pulls_total": "How often might a verifier have fetched a prompt's KV from another, and what"
    " came of it?",
    "kv_pulled_tokens_total": "How many tokens were fetched instead of computed?",
    "kv_pulled_bytes_total": "How many bytes of KV is that?",
    "kv_pull_seconds": "How long does a session wait for KV of another verifier?",
    "engine_silence_seconds": "For how long has a verifier with sessions taken no step?",
    "workers": "How many workers are known, by role and state?",
    "draining": "Is this orchestrator about to stop?",
}
"""What is exported, without the prefix; help texts."""
PREFIX = "outrider_"
VERSION_DIGITS = 12
"""Of a fingerprint, which tell versions apart."""


class Exposition(Collector):
    """The metrics of one orchestrator, as text."""

    media_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(
        self,
        driver: Driver,
        fleet: Fleet,
        responses: Mapping[tuple[str, int], int],
        *,
        vllm_names: bool,
        connections: Callable[[], int] = lambda: 0,
        connections_max: int = 0,
    ) -> None:
        """With `vllm_names`, what has a name in vLLM is exported under that, too."""
        self._connections, self._connections_max = connections, connections_max
        self._driver, self._fleet, self._responses = driver, fleet, responses
        self._vllm_names = vllm_names
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Read everything."""
        counters = self._driver.counters()
        yield from self._of_requests()
        yield from self._of_speculation(counters)
        yield from self._of_workers(counters)
        yield from self._of_the_index()
        yield from self._of_pulls()
        yield from self._of_sizes()
        if self._vllm_names:
            yield from self._under_vllm_names(counters)

    def _of_the_index(self) -> Iterator[Metric]:
        lookup = self._driver.placer.lookup
        outcomes: dict[str, int] = {}
        if lookup is not None:
            in_time = lookup.asked - lookup.late
            outcomes = {"in_time": in_time, "late": lookup.late, "skipped": lookup.skipped}
        yield _counter("kvindex_lookups_total", "outcome", outcomes.items())
        took_s = Histogram(LOOKUP_S) if lookup is None else lookup.took_s
        name = "kvindex_lookup_seconds"
        yield _histogram(PREFIX + name, NAMES[name], took_s)
        yield _gauge("kvindex_degraded", [], [((), float(lookup is not None and lookup.slow))])

    def _of_pulls(self) -> Iterator[Metric]:
        meters = self._driver.meters
        yield _counter("kv_pulls_total", "outcome", meters.kv_pulls.items())
        yield _counter("kv_pulled_tokens_total", "", [("", meters.kv_pulled_tokens)])
        yield _counter("kv_pulled_bytes_total", "", [("", meters.kv_pulled_bytes)])
        name = "kv_pull_seconds"
        yield _histogram(PREFIX + name, NAMES[name], meters.kv_pull_s)

    def _of_requests(self) -> Iterator[Metric]:
        meters = self._driver.meters
        yield _counter("requests_total", "outcome", meters.requests.items())
        family = CounterMetricFamily(
            PREFIX + "http_responses", NAMES["http_responses_total"], labels=("route", "status")
        )
        for (route, status), count in self._responses.items():
            family.add_metric((route, str(status)), count)
        yield family
        yield _counter("prompt_tokens_total", "", [("", meters.prompt_tokens)])
        yield _counter("completion_tokens_total", "", [("", meters.completion_tokens)])
        yield _histogram(PREFIX + "ttft_seconds", NAMES["ttft_seconds"], meters.first_token_s)
        yield _histogram(PREFIX + "itl_seconds", NAMES["itl_seconds"], meters.between_tokens_s)
        name = "queue_wait_seconds"
        yield _histogram(PREFIX + name, NAMES[name], meters.queued_s)
        yield _histogram(PREFIX + "request_seconds", NAMES["request_seconds"], meters.total_s)

    def _of_speculation(self, counters: SpeculationCounters) -> Iterator[Metric]:
        meters = self._driver.meters
        steps, drafted = counters.verify_steps, counters.verified_draft_tokens
        yield _counter("rounds_total", "", [("", steps)])
        yield _counter("draft_tokens_total", "", [("", drafted)])
        yield _counter("accepted_tokens_total", "", [("", counters.accepted_draft_tokens)])
        yield _counter("received_draft_tokens_total", "", [("", counters.received_draft_tokens)])
        yield self._by_proposer("proposer_draft_tokens_total", counters.verified_by_source)
        yield self._by_proposer("proposer_accepted_tokens_total", counters.accepted_by_source)
        positions = [(str(index), count) for index, count in enumerate(meters.accepted_at)]
        yield _counter("accepted_tokens_per_position_total", "position", positions)
        yield _counter("stale_proposals_total", "reason", counters.dropped_drafts.items())
        yield _counter("dropped_draft_tokens_total", "reason", counters.dropped_nodes.items())
        yield _counter("fallback_rounds_total", "reason", meters.fallback_rounds.items())
        family = CounterMetricFamily(
            PREFIX + "session_migrations",
            NAMES["session_migrations_total"],
            labels=("role", "cause"),
        )
        for (role, cause), count in meters.migrations.items():
            family.add_metric((role, cause), count)
        yield family
        yield _gauge("speculation_length", [], [((), drafted / steps if steps else 0.0)])

    def _by_proposer(self, name: str, by_source: Mapping[int, int]) -> Metric:
        counts: Counter[tuple[str, str]] = Counter()
        for source, guesser in self._fleet.guessers.items():
            # All drafters of a kind together: a fleet may have thousands.
            counts[guesser.proposer, guesser.version[:VERSION_DIGITS]] += by_source.get(source, 0)
        family = CounterMetricFamily(
            PREFIX + name.removesuffix("_total"), NAMES[name], labels=("proposer", "version")
        )
        for labels, count in counts.items():
            family.add_metric(labels, count)
        return family

    def _of_workers(self, counters: SpeculationCounters) -> Iterator[Metric]:
        meters, fleet = self._driver.meters, self._fleet
        verifiers, drafters = fleet.verifiers.values(), fleet.drafters.values()
        yield _histogram(PREFIX + "verify_seconds", NAMES["verify_seconds"], meters.step_s)
        ready = [drafter for drafter in drafters if drafter.state is LinkState.READY]
        rtts = [((drafter.address,), drafter.rtt_s) for drafter in ready]
        yield _gauge("draft_rtt_seconds", ["drafter"], rtts)
        steps = counters.verify_steps
        tokens = 1.0 + counters.accepted_draft_tokens / steps if steps else 1.0
        busy = [verifier for verifier in verifiers if verifier.state is LinkState.READY]
        speedups = [((verifier.address,), verifier.pace.speedup(tokens)) for verifier in busy]
        yield _gauge("estimated_speedup_ratio", ["verifier"], speedups)
        held = [
            (("verifier",), sum(len(verifier.sessions) for verifier in verifiers)),
            (("drafter",), sum(len(drafter.sessions) for drafter in drafters)),
            (("orchestrator",), self._driver.load),
        ]
        yield _gauge("sessions", ["role"], held)
        yield _gauge("unread_answers", [], [((), float(self._driver.unread))])
        waiting = sum(verifier.step.waiting for verifier in busy)
        yield _gauge("queue_depth", ["role"], [(("verifier",), waiting)])
        used = [((verifier.address,), verifier.step.kv_tokens_used) for verifier in busy]
        yield _gauge("kv_tokens_used", ["verifier"], used)
        shares = [((address,), share) for address, share in fleet.kv_shares().items()]
        yield _gauge("kv_used_ratio", ["verifier"], shares)
        now_s = time.monotonic()
        silence = [
            ((verifier.address,), now_s - verifier.stepped_s if verifier.sessions else 0.0)
            for verifier in busy
            if verifier.stepped_s or not verifier.sessions
        ]
        yield _gauge("engine_silence_seconds", ["verifier"], silence)
        known: dict[tuple[str, ...], float] = {}
        for status in fleet.statuses():
            known[status.role, status.state] = known.get((status.role, status.state), 0) + 1
        yield _gauge("workers", ["role", "state"], known.items())
        yield _gauge("draining", [], [((), float(self._driver.draining))])

    def _of_sizes(self) -> Iterator[Metric]:
        """What the fleet controller sizes fleets by."""
        fleet = self._fleet
        yield _gauge("sessions_max", [], [((), self._driver.sessions_max)])
        yield _gauge("connections", [], [((), self._connections())])
        yield _gauge("connections_max", [], [((), self._connections_max)])
        yield _counter("cpu_seconds_total", "", [("", time.process_time())])
        verifiers = [one for one in fleet.verifiers.values() if one.state is LinkState.READY]
        drafters = [one for one in fleet.drafters.values() if one.state is LinkState.READY]
        links: list[VerifierLink | DrafterLink] = [*verifiers, *drafters]
        held = [((link.role, link.address), len(link.sessions)) for link in links]
        yield _gauge("worker_sessions", ["role", "worker"], held)
        room = [((link.role, link.address), link.sessions_max) for link in links]
        yield _gauge("worker_sessions_max", ["role", "worker"], room)
        paced = [((one.address,), one) for one in verifiers if one.sessions and one.pace.plain_s]
        yield _gauge("verify_rows", ["verifier"], [(key, o.step.rows) for key, o in paced])
        plain = [(key, one.pace.plain_s) for key, one in paced]
        yield _gauge("plain_step_seconds", ["verifier"], plain)
        pays = [(key, one.pace.pay_min) for key, one in paced]
        yield _gauge("pay_probability_min", ["verifier"], pays)
        rtts = [((one.address,), one.rtt_s) for one in verifiers]
        yield _gauge("verifier_rtt_seconds", ["verifier"], rtts)
        grown = [((one.address,), one.grow) for one in drafters if one.grow is not None]
        steps = [(key, grow.duration_s) for key, grow in grown]
        yield _gauge("draft_step_seconds", ["drafter"], steps)
        leaves = [(key, grow.leaves_max) for key, grow in grown]
        yield _gauge("draft_leaves_max", ["drafter"], leaves)
        gains = [((one.address,), one.gain) for one in drafters if one.gain is not None]
        yield _gauge("draft_gain_tokens", ["drafter"], gains)

    def _under_vllm_names(self, counters: SpeculationCounters) -> Iterator[Metric]:
        meters = self._driver.meters
        rows: list[tuple[str, float]] = [
            ("spec_decode_num_drafts", counters.verify_steps),
            ("spec_decode_num_draft_tokens", counters.verified_draft_tokens),
            ("spec_decode_num_accepted_tokens", counters.accepted_draft_tokens),
            ("prompt_tokens", meters.prompt_tokens),
            ("generation_tokens", meters.completion_tokens),
        ]
        for name, value in rows:
            yield CounterMetricFamily(f"vllm:{name}", "As vLLM's.", value=value)
        by_position = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "As vLLM's.", labels=("position",)
        )
        for index, count in enumerate(meters.accepted_at):
            by_position.add_metric((str(index),), count)
        yield by_position
        waiting = sum(verifier.step.waiting for verifier in self._fleet.verifiers.values())
        running = max(0, self._driver.load - waiting)
        yield GaugeMetricFamily("vllm:num_requests_running", "As vLLM's.", value=running)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "As vLLM's.", value=waiting)
        for name, histogram in (
            ("vllm:time_to_first_token_seconds", meters.first_token_s),
            ("vllm:inter_token_latency_seconds", meters.between_tokens_s),
            ("vllm:e2e_request_latency_seconds", meters.total_s),
            ("vllm:request_queue_time_seconds", meters.queued_s),
        ):
            yield _histogram(name, "As vLLM's.", histogram)


def _counter(name: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
    labels = (label,) if label else ()
    family = CounterMetricFamily(PREFIX + name.removesuffix("_total"), NAMES[name], labels=labels)
    for value, count in values:
        family.add_metric((value,) if label else (), count)
    return family


def _gauge(name: str, labels: list[str], values: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, NAMES[name], labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, text)
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound_s, count in zip(
        (*map(str, histogram.bounds_s), "+Inf"), histogram.counts, strict=True
    ):
        total += count
        buckets.append((bound_s, total))
    family.add_metric((), buckets, histogram.sum_s)
    return family
