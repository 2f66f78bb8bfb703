"""The scenarios of the pipelining benchmark, measured over real services and real sockets."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from bench import relay
from bench.pipeline_effort import Effort, fleet_stretch
from bench.pipeline_prompts import load_prompts
from bench.pipeline_readings import Steps, rate, read_recovery, read_steps
from bench.pipeline_real import measure_real
from bench.pipeline_results import Disturbance, Results, Row
from bench.pipeline_setting import HOPELESS, POOR, Setting, expected
from bench.streams import Load, Observed, observe
from bench.synthetic_fleet import SyntheticFleet
from bench.timelines import spread, step_gaps_s
from orchestrator.planner.measured import measured_row, predict

DRAFT_RTT_MS = 2.0
FAR_RTT_MS = 50.0
DIRECT_MS = 0.5
"""Round trips up to this are those of services connected directly: a proxy costs as much."""


@dataclass(frozen=True, slots=True)
class Models:
    """Of the part with real ones."""

    model: str
    draft_model: str | None
    cache_dir: Path


class Bench:
    """Measures one part into `results`; a scenario that fails leaves its reason in `errors`."""

    def __init__(
        self,
        part: str,
        effort: Effort,
        models: Models,
        results: Results,
        report: Callable[[str], None],
        console: Console,
    ) -> None:
        """`report` hears what has been measured, after it is in the results."""
        self.errors: list[str] = []
        self._part = part
        self._results = results
        self._effort = effort
        self._models = models
        self._report = report
        self._console = console

    def run(self) -> None:
        """Measure all of the part."""
        parts: dict[str, Callable[[], None]] = {
            "rtt": self._rtt,
            "draft": self._draft,
            "slowed": self._slowed,
            "floor": self._floor,
            "fleet": self._fleet,
            "recover": self._recover,
            "drafters": self._drafters,
            "real": self._real,
            "orchestrator": self._orchestrator,
        }
        with self._surviving(self._part):
            parts[self._part]()

    @contextlib.contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """Take note of what goes wrong inside, and go on: the rest is worth having."""
        try:
            yield
        except Exception as error:
            self.errors.append(f"{name}: {type(error).__name__}: {error}")
            self._report(f"{name} FAILED: {type(error).__name__}: {error}")

    # --- one session ---

    def _rtt(self) -> None:
        """One session at several round trips."""
        setting = Setting()
        near = [ms for ms in self._effort.round_trips_ms if ms <= DIRECT_MS]
        far = [ms for ms in self._effort.round_trips_ms if ms > DIRECT_MS]
        for links, round_trips_ms in ((False, near), (True, far)):
            if not round_trips_ms:
                continue
            with self._surviving("fleet"), SyntheticFleet(setting, links=links) as fleet:
                for ms in round_trips_ms:
                    self._at_round_trip(fleet, setting, ms, f"rtt {ms:g} ms")

    def _draft(self) -> None:
        """Slower drafters, and one that expands one leaf a step."""
        for draft_ms in self._effort.draft_steps_ms:
            setting = Setting(draft_ms=draft_ms)
            self._one_row(setting, DRAFT_RTT_MS, f"draft step {draft_ms:g} ms")
        self._one_row(Setting(leaves=1), DRAFT_RTT_MS, "one leaf")

    def _slowed(self) -> None:
        """The same where the machine's own time weighs less: what the protocol itself loses."""
        factor = self._effort.slowed
        setting = Setting().slowed(factor)
        load = self._load(setting)
        load = replace(load, skipped_s=factor * load.skipped_s, window_s=factor * load.window_s)
        with self._surviving("fleet"), SyntheticFleet(setting) as fleet:
            for ms in self._effort.slowed_round_trips_ms:
                name = f"{factor:g} times rtt {ms:g} ms"
                with self._surviving(name):
                    rtt_s = fleet.set_round_trip(factor * ms / 1_000)
                    self._measure(fleet, setting, name, factor * ms, rtt_s, load, factor)

    def _floor(self) -> None:
        """Drafters that are of no use."""
        self._one_row(Setting(silent=True), DRAFT_RTT_MS, "silent drafter")
        self._one_row(Setting(agreement=POOR), FAR_RTT_MS, f"poor at {FAR_RTT_MS:g} ms")

    def _one_row(self, setting: Setting, rtt_ms: float, name: str) -> None:
        with self._surviving(name), SyntheticFleet(setting) as fleet:
            if setting.silent:
                fleet.change(silent=True)
            self._at_round_trip(fleet, setting, rtt_ms, name)

    def _at_round_trip(self, fleet: SyntheticFleet, setting: Setting, ms: float, name: str) -> None:
        with self._surviving(name):
            rtt_s = fleet.set_round_trip(ms / 1_000)
            self._measure(fleet, setting, name, ms, rtt_s, self._load(setting))

    # --- many sessions ---

    def _fleet(self) -> None:
        """Many sessions on four verifiers and eight drafters."""
        for slowed, counts in self._effort.fleets:
            base = Setting(verifiers=4, drafters=8).slowed(slowed)
            with self._surviving(f"fleet slowed {slowed:g} times"), SyntheticFleet(base) as fleet:
                rtt_s = fleet.set_round_trip(DRAFT_RTT_MS / 1_000 * slowed)
                for sessions in counts:
                    name = f"{sessions} sessions"
                    with self._surviving(name):
                        setting = replace(base, sessions=sessions)
                        load = self._fleet_load(sessions, slowed)
                        self._measure(
                            fleet, setting, name, None, rtt_s, load, 2 * fleet_stretch(slowed)
                        )

    def _fleet_load(self, sessions: int, slowed: float) -> Load:
        skipped_s = 2 * fleet_stretch(slowed) * self._effort.skipped_s
        return Load(sessions, True, 0, skipped_s, self._effort.fleet_window_s(sessions, slowed))

    def _measure(
        self,
        fleet: SyntheticFleet,
        setting: Setting,
        name: str,
        rtt_nominal_ms: float | None,
        rtt_s: float,
        load: Load,
        stretch: float = 1.0,
    ) -> None:
        """Target-only twice, its windows stretched, then speculated and target-only in turn."""
        plain = self._plain(setting, stretch)
        speculated, draft_ms = list[float](), list[float]()
        steps: list[Steps] = []
        target_only = [rate(observe(fleet.address, replace(plain, seed=seed))) for seed in (0, 0)]
        for seed in range(self._effort.repeats):
            fleet.reset_steps()
            seen = observe(fleet.address, replace(load, seed=seed))
            steps.append(read_steps(fleet.verify_steps(), seen, setting))
            drafted = [pair for pair in fleet.draft_steps() if pair[0]]
            if drafted:
                busy_s, count = sum(busy for _, busy in drafted), sum(n for n, _ in drafted)
                draft_ms.append(1_000 * busy_s / count)
            speculated.append(rate(seen))
            target_only.append(rate(observe(fleet.address, replace(plain, seed=seed))))
        row = Row(
            name=name,
            part=self._part,
            setting=setting,
            rtt_nominal_ms=rtt_nominal_ms,
            rtt_ms=1_000 * rtt_s,
            target_only=tuple(target_only),
            speculated=tuple(speculated),
            expected=expected(setting, rtt_s, self._effort.simulated_steps),
            occupancy=tuple(one.occupancy for one in steps),
            tau=tuple(one.tau for one in steps),
            step_stretch=tuple(one.stretch for one in steps),
            draft_step_ms=tuple(draft_ms),
        )
        figures = measured_row(name, row.planner_row())
        steps_simulated = max(500, self._effort.simulated_steps // 2)
        planned = predict(figures, session_steps=steps_simulated).tokens_per_s
        self._results.rows.append(replace(row, planned=planned))
        self._report(
            f"{name}: {row.rtt_ms:.2f} ms, {row.speedup:.2f} of target-only"
            f" (±{row.spread:.1%}, A/A {row.noise:.3f}), {row.vs_simulation:.2f} of simulated,"
            f" {row.tokens_per_s / planned:.2f} of planned"
        )

    def _load(self, setting: Setting) -> Load:
        return Load(setting.sessions, True, 0, self._effort.skipped_s, self._effort.window_s)

    def _plain(self, setting: Setting, stretch: float = 1.0) -> Load:
        skipped_s = self._effort.plain_skipped_s * stretch
        window_s = self._effort.plain_window_s * stretch
        return Load(setting.sessions, False, 0, skipped_s, window_s)

    # --- changes ---

    def _recover(self) -> None:
        """Acceptance dropped, raised, dropped for twice as long, raised."""
        effort, setting = self._effort, Setting()
        phase_s = effort.phase_s
        window_s = 6 * phase_s
        runs: list[Observed] = []
        target_only = []
        unbound = [0, 0]
        with SyntheticFleet(setting) as fleet:
            fleet.set_round_trip(DRAFT_RTT_MS / 1_000)

            def drop() -> None:
                fleet.change(agreement=HOPELESS)

            def rise(number: int) -> None:
                unbound[number] += not fleet.sessions_of_drafters()
                fleet.change(agreement=setting.agreement)

            script = [
                (phase_s, drop),
                (2 * phase_s, lambda: rise(0)),
                (3 * phase_s, drop),
                (5 * phase_s, lambda: rise(1)),
            ]
            for seed in range(effort.recoveries):
                plain = replace(self._plain(setting), seed=seed)
                target_only.append(rate(observe(fleet.address, plain)))
                load = replace(self._load(setting), seed=seed, window_s=window_s)
                runs.append(observe(fleet.address, load, script))
                self._results.recovery = read_recovery(
                    runs, statistics.median(target_only), window_s, unbound
                )
                self._report(f"recovery, repeat {seed + 1} of {effort.recoveries}")

    def _drafters(self) -> None:
        """Drafters that are slow or late among others that are not."""
        setting = Setting(sessions=4, drafters=4)
        kinds: dict[str, Sequence[dict[str, object]]] = {
            "all well": (),
            "one ten times slower": ({"slower": 10.0, "drafters": [0]},),
            "one 300 ms late": ({"late_s": 0.3, "drafters": [1]},),
        }
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        gaps: dict[str, list[float]] = {kind: [] for kind in kinds}
        with SyntheticFleet(setting) as fleet:
            fleet.set_round_trip(DRAFT_RTT_MS / 1_000)
            for seed in range(self._effort.repeats):
                for kind, commands in kinds.items():
                    fleet.change(slower=1.0, late_s=0.0)
                    for command in commands:
                        fleet.change(**command)
                    fleet.reset_steps()
                    seen = observe(fleet.address, replace(self._load(setting), seed=seed))
                    rates[kind].append(rate(seen))
                    for steps in fleet.verify_steps():
                        gaps[kind] += step_gaps_s(steps, seen.begin_s, seen.end_s)
                self._results.disturbances = [
                    Disturbance(kind, tuple(rates[kind]), spread(gaps[kind])) for kind in kinds
                ]
                self._report(f"slow and late drafters, repeat {seed + 1} of {self._effort.repeats}")

    # --- others' programs ---

    def _real(self) -> None:
        """Real models over the prompts."""
        effort, models = self._effort, self._models
        measured = measure_real(
            self._console,
            models.model,
            models.draft_model,
            models.cache_dir,
            load_prompts()[: effort.prompts],
            effort.prompt_repeats,
            effort.prompt_tokens,
        )
        for number, case in enumerate(measured, start=1):
            self._results.real.append(case)
            self._report(f"prompt {number}, {case.category}: {case.speedup:.2f} of target-only")

    def _orchestrator(self) -> None:
        """The orchestrator alone, without and with drafts."""
        options = relay.Options(window_s=self._effort.streams_window_s, flood=False)
        # Twice, in turn: what the machine does meanwhile must not look like the streams' doing.
        for drafting in (False,) * self._effort.streams_repeats + (True,):
            for streams in self._effort.streams:
                name = f"{streams:,} streams, {'with' if drafting else 'no'} drafts"
                with self._surviving(name), tempfile.TemporaryDirectory() as folder:
                    rows = relay.measure(streams, drafting, options, Path(folder), self._console)
                    self._results.relay += rows
                    self._report(f"{name}: {rows[0].tokens_per_core:,.0f} tokens/s a core")
