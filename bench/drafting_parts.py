"""The parts of the benchmark of drafters, each a function that returns what it measured."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.calibrated import deciles
from bench.coupling import Coupling, logits_along, measure_coupling
from bench.drafting_fleet import BUDGET, DraftingFleet
from bench.drafting_results import TARGET_ONLY, Ahead, Calibrated, Run
from bench.engine_driver import GREEDY, EngineDriver, ModelThread, Trace
from bench.lockstep import Known, Lockstep, decided
from bench.pipeline_prompts import load_prompts
from bench.sharing import Sharing, measure_sharing
from drafter_service.datastore import open_datastore
from drafter_service.proposers.base import Proposer
from drafter_service.proposers.cascade import CascadeProposer
from drafter_service.proposers.datastore import DatastoreProposer
from drafter_service.proposers.language_model import LanguageModelProposer
from drafter_service.proposers.leaf_queue import LeafQueue
from drafter_service.proposers.lookup import LookupProposer
from drafter_service.proposers.recycling import RecyclingProposer
from orchestrator.text import TextCodec
from outrider.config import Dtype
from outrider.domain import BindSpec, DraftBudget, SamplingParams
from outrider.errors import InvalidRequest
from outrider.model.info import model_info
from outrider.model.language_model import LanguageModel
from outrider.model.loading import load_language_model
from outrider.model.threads import set_threads
from verifier_service.config import EngineConfig

CONTENDERS: dict[str, tuple[str, ...]] = {
    TARGET_ONLY: (),
    "lookup": ("lookup",),
    "model": ("model",),
    "union": ("lookup", "model"),
    "recycling": ("recycling",),
    "cascade": ("cascade",),
    "datastore": ("datastore",),
}
"""Which drafters serve a session."""
TEMPERATURES = (0.0, 0.8)
LEAVES = 8
_SAMPLED = SamplingParams(temperature=1.0)
_AHEAD_TEXT = b"Once upon a time"
_ENOUGH_TOKENS = 2.0
"""That lookups must promise for a cascade to spare the model."""
_AGREE = ("0.8,0.1,0.05", "0.8")


@dataclass(frozen=True, slots=True)
class Models:
    """Target and draft model, and how they are loaded."""

    target: str
    drafter: str | None
    dtype: Dtype
    cache_dir: Path
    datastore: Path | None = None

    def load(self, spec: str) -> LanguageModel:
        """Load a model. Raises `ModelLoadError`."""
        return load_language_model(spec, dtype=self.dtype, device="cpu", cache_dir=self.cache_dir)

    def makers(self) -> dict[str, Callable[[], Proposer]]:
        """Return what makes each proposer that there is."""
        makers: dict[str, Callable[[], Proposer]] = {
            "lookup": LookupProposer,
            "recycling": RecyclingProposer,
        }
        if self.drafter is not None:
            makers["model"] = self.propose
            makers["cascade"] = lambda: CascadeProposer(
                [LookupProposer(), self.propose()], enough_tokens=_ENOUGH_TOKENS
            )
        if self.datastore is not None:
            index = self.datastore
            makers["datastore"] = lambda: DatastoreProposer(open_datastore(index))
        return makers

    def propose(self) -> Proposer:
        """Load the draft model as a proposer."""
        assert self.drafter is not None, "asked for only where there is one"
        return proposer_of(self.load(self.drafter))


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    repeats: int = 1
    prompts_max: int = 99
    """Of a category."""
    tokens: int = 96
    contexts: int = 240
    draws: int = 128
    """Of noise, in each context."""
    claimed_tokens: int = 384
    """Of each prompt, for calibration."""
    ahead_tokens: int = 3_000
    sessions: int = 200
    session_steps: int = 16
    categories: tuple[str, ...] = ()
    """Of the prompts for proposers; empty: all."""


QUICK = Effort(1, 1, 32, 24, 32, 48, 300, 40, 8)


def proposer_of(
    model: LanguageModel, leaves_max: int = LEAVES, queue: LeafQueue | None = None
) -> LanguageModelProposer:
    """Return a proposer with a draft model."""
    info = model_info(model, proposer="language-model")
    return LanguageModelProposer(model, info, leaves_max=leaves_max, queue=queue)


def prompts_of(effort: Effort, codec: TextCodec) -> list[tuple[str, tuple[int, ...]]]:
    """Return (category, ids) of the benchmark's prompts."""
    counts: dict[str, int] = {}
    chosen = []
    for entry in load_prompts():
        category = entry["category"]
        counts[category] = counts.get(category, 0) + 1
        if counts[category] <= effort.prompts_max:
            chosen.append((category, _encode(codec, entry["prompt"])))
    return chosen


def _encode(codec: TextCodec, prompt: str) -> tuple[int, ...]:
    """Lay a prompt out as the model's template says, if it has one."""
    try:
        return codec.encode_chat([("user", prompt)])
    except InvalidRequest:
        return codec.encode(prompt)


def measure_proposers(
    models: Models, effort: Effort, say: Callable[[str], None]
) -> Iterator[list[Run]]:
    """Decode every prompt with every contender, in turn, greedy and sampled; yields a prompt's."""
    thread = ModelThread()
    thread.run(set_threads, 1)
    target: LanguageModel = thread.run(models.load, models.target)
    driver = EngineDriver(target, EngineConfig(), thread)
    fleet = DraftingFleet(driver, target.vocabulary_size, target.tokenizer_fingerprint)
    try:
        for name, make in models.makers().items():
            fleet.add(name, make)
        prompts = prompts_of(effort, TextCodec.from_files(target.tokenizer_files))
        for number, (category, prompt) in enumerate(prompts):
            if effort.categories and category not in effort.categories:
                continue
            say(f"{category} ({number + 1} of {len(prompts)})")
            yield _contend(fleet, category, number, prompt, effort)
    finally:
        fleet.close()
        driver.stop()
        thread.close()


def _contend(
    fleet: DraftingFleet, category: str, number: int, prompt: Sequence[int], effort: Effort
) -> list[Run]:
    runs = []
    for repeat in range(effort.repeats):
        for temperature in TEMPERATURES:
            for contender, names in CONTENDERS.items():
                if not fleet.drafters.keys() >= set(names):
                    continue
                for name in names:
                    fleet.drafters[name].proposer.reset()
                sampling = SamplingParams(temperature=temperature)
                # Prompts are shared among contenders, so none computes more than another.
                trace = fleet.run(
                    names, prompt, effort.tokens, sampling, seed=repeat, salt=f"prompt-{number}"
                )
                steps_ms = [fleet.drafters[name].proposer.step_ms for name in names]
                runs.append(_read(trace, contender, category, number, temperature, steps_ms))
    return runs


def _read(
    trace: Trace,
    contender: str,
    category: str,
    number: int,
    temperature: float,
    steps_ms: Sequence[float],
) -> Run:
    sizes = [count for _, count in trace.commits]
    return Run(
        contender=contender,
        category=category,
        prompt=number,
        temperature=temperature,
        tokens=sum(sizes[1:]),
        decode_s=trace.commits[-1][0] - trace.commits[0][0],
        accepted=tuple(size - 1 for size in sizes[1:-1]),
        # The slowest, which is what a step waits for.
        draft_ms=max(steps_ms, default=0.0),
    )


def measure_couplings(
    models: Models, effort: Effort, say: Callable[[str], None]
) -> dict[str, Coupling]:
    """Couple the real pair, if there is one, and tiny random models."""
    set_threads(1)
    found = {}
    if models.drafter is not None:
        say("the draft model's noise")
        target, draft = models.load(models.target), models.load(models.drafter)
        codec = TextCodec.from_files(target.tokenizer_files)
        prompts = [ids for _, ids in prompts_of(effort, codec)]
        found[f"{models.target}, {Path(models.drafter).name}"] = _coupling(
            target, draft, prompts, effort
        )
    say("tiny random models' noise")
    target, draft = (models.load(f"random:tiny?seed=1{noise}") for noise in ("", "&noise=0.2"))
    prompts = [tuple(b"Text %d" % number) for number in range(8)]
    found["random:tiny, noise 0.2"] = _coupling(target, draft, prompts, effort)
    return found


def _coupling(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    effort: Effort,
) -> Coupling:
    """Couple two models at places of the target's own texts, at temperature 1."""
    each = max(1, effort.contexts // len(prompts))
    stride = 4
    parts = []
    for known in decided(target, specs_of(target, prompts, _SAMPLED), each * stride):
        text, begin = (*known.spec.prompt, *known.text), len(known.spec.prompt)
        likely = logits_along(target, text, begin, stride)
        guessed = logits_along(draft, text, begin, stride)
        positions = range(begin + 1, len(text) + 1, stride)
        parts.append(measure_coupling(likely, guessed, positions, _SAMPLED, effort.draws))
    # Texts have the same number of contexts each, so that means of means are means.
    return Coupling(
        contexts=sum(part.contexts for part in parts),
        draws=sum(part.draws for part in parts),
        measured=statistics.fmean(part.measured for part in parts),
        exact=statistics.fmean(part.exact for part in parts),
        independent=statistics.fmean(part.independent for part in parts),
        rejection=statistics.fmean(part.rejection for part in parts),
    )


def specs_of(
    target: LanguageModel, prompts: Sequence[tuple[int, ...]], sampling: SamplingParams
) -> list[BindSpec]:
    """Return a session for each prompt."""
    return [
        BindSpec(
            session=number + 1,
            epoch=1,
            binding=1,
            prompt=prompt,
            committed=(),
            sampling=sampling,
            seed=number,
            tokenizer_fingerprint=target.tokenizer_fingerprint,
            vocabulary_size=target.vocabulary_size,
            budget=BUDGET,
        )
        for number, prompt in enumerate(prompts)
    ]


def measure_claims(models: Models, effort: Effort, say: Callable[[str], None]) -> list[Calibrated]:
    """Compare claims with what the target decides, proposer by proposer.

    Once of a proposer that has seen nothing yet, and once after it has seen half of the texts, by
    its claims for the other half.
    """
    set_threads(1)
    target = models.load(models.target)
    codec = TextCodec.from_files(target.tokenizer_files)
    prompts = [ids for _, ids in prompts_of(effort, codec)]
    found = []
    for temperature in (0.0, 1.0):
        say(f"claims at temperature {temperature:g}")
        sampling = SamplingParams(temperature=temperature)
        known = decided(target, specs_of(target, prompts, sampling), effort.claimed_tokens)
        for name, make in models.makers().items():
            if name not in ("lookup", "model", "datastore"):
                continue  # these need the target's candidates, or are made of the others
            fresh = _claims(make(), known)
            found.append(Calibrated(name, temperature, tuple(deciles(fresh))))
            learnt = []
            for before, after in _halves(known):
                proposer = make()
                _claims(proposer, before)
                learnt += _claims(proposer, after)
            found.append(Calibrated(name, temperature, tuple(deciles(learnt)), learnt=True))
    return found


def _halves(known: Sequence[Known]) -> list[tuple[Sequence[Known], Sequence[Known]]]:
    return [(known[::2], known[1::2]), (known[1::2], known[::2])]


def _claims(proposer: Proposer, known: Sequence[Known]) -> list[tuple[float, bool]]:
    rounds = Lockstep(proposer, known, grows=2 * len(known) / LEAVES, verified_max=8 * len(known))
    rounds.warm_up()
    while rounds.running:
        rounds.step()
    return rounds.claims


def measure_ahead(
    effort: Effort, say: Callable[[str], None], verify_ms: float = 20.0, draft_ms: float = 2.5
) -> list[Ahead]:
    """Draft ahead of a synthetic target, in real time; neither model computes anything."""
    found = []
    for agree in _AGREE:
        say(f"ahead, agreement {agree}")
        found.append(_ahead(agree, verify_ms, draft_ms, effort.ahead_tokens))
    return found


def _ahead(agree: str, verify_ms: float, draft_ms: float, tokens: int) -> Ahead:
    models = Models("", None, "float32", Path())
    thread = ModelThread()
    target: LanguageModel = thread.run(models.load, f"synthetic:target?step=1:{verify_ms:g}")
    driver = EngineDriver(target, EngineConfig(kv_tokens_max=1 << 16), thread)
    fleet = DraftingFleet(driver, target.vocabulary_size, target.tokenizer_fingerprint)
    spec = f"synthetic:draft?step=1:{draft_ms:g}&agree={agree}"
    try:
        drafter = fleet.add("model", lambda: proposer_of(models.load(spec), leaves_max=16))
        driver.reports.clear()
        trace = fleet.run(["model"], tuple(_AHEAD_TEXT), tokens, GREEDY, seed=1, salt="ahead")
        # The first commit is the prompt's, the others are the last steps'.
        sizes = [count for _, count in trace.commits]
        lengths = itertools.accumulate(sizes, initial=len(_AHEAD_TEXT))
        guessed = [drafter.proposer.on_path.get(length, False) for length in lengths][2:]
        reports = [report for report in driver.reports if report.rows][1 - len(sizes) :]
        ready = [report.tokens > report.rows for report in reports][1:]
        on_path = [now for now, path in zip(ready, guessed, strict=False) if path]
        return Ahead(
            agree=agree,
            verify_ms=verify_ms,
            draft_ms=drafter.proposer.step_ms,
            steps=len(ready),
            tau=statistics.fmean(sizes[1:-1]),
            ready=statistics.fmean(ready),
            ready_on_path=statistics.fmean(on_path) if on_path else 0.0,
        )
    finally:
        fleet.close()
        driver.stop()
        thread.close()


def measure_sessions(effort: Effort, say: Callable[[str], None]) -> Sharing:
    """Let one drafter serve many sessions, greedy and sampled, with tiny random models."""
    set_threads(1)
    say(f"{effort.sessions} sessions on one drafter")
    models = Models("", None, "float32", Path())
    target, draft = (models.load(f"random:tiny?seed=1{noise}") for noise in ("", "&noise=0.15"))
    budget = DraftBudget(nodes_max=256, depth_max=24, width_max=3)
    prompts = [tuple(b"Session %d: " % number) for number in range(effort.sessions)]
    specs = [
        replace(spec, budget=budget, sampling=GREEDY if spec.session % 2 else _SAMPLED)
        for spec in specs_of(target, prompts, _SAMPLED)
    ]
    known = decided(target, specs, 4 * effort.session_steps)
    return measure_sharing(
        lambda queue: proposer_of(draft, 64, queue),
        known,
        {"one": 1.0, "two": 2.0, "five": 5.0},
        grows=4,
        verified_max=3 * effort.sessions,
        steps=effort.session_steps,
    )
