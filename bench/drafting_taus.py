"""How many tokens a step proposers are worth over texts that are known: no clock, so no hurry."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.drafting_parts import CONTENDERS, TEMPERATURES, Effort, Models, prompts_of, specs_of
from bench.drafting_results import Tau
from bench.lockstep import decided
from bench.united import accepted_in_steps
from orchestrator.text import TextCodec
from outrider.domain import SamplingParams
from outrider.model.threads import set_threads

GROWS = 5
"""Steps of a drafter before each verify step, as in `outrider distill evaluate`."""
VERIFIED = 16
"""Nodes that the target takes in a step, likewise."""
_UNITED = ("lookup", "model", "union", "cascade", "datastore")
"""The others need what a target says beside its choice."""


def measure_taus(models: Models, effort: Effort, say: Callable[[str], None]) -> Iterator[list[Tau]]:
    """Unite trees over what the target is known to say; yields a prompt's."""
    set_threads(1)
    target = models.load(models.target)
    prompts = prompts_of(effort, TextCodec.from_files(target.tokenizer_files))
    if effort.categories:
        prompts = [entry for entry in prompts if entry[0] in effort.categories]
    makers = models.makers()
    names = {name for contender in _UNITED for name in CONTENDERS[contender]}
    proposers = {name: makers[name]() for name in sorted(names & makers.keys())}
    for temperature in TEMPERATURES:
        sampling = SamplingParams(temperature=temperature)
        say(f"what the target says at temperature {temperature:g}")
        specs = specs_of(target, [ids for _, ids in prompts], sampling)
        for (category, _), known in zip(
            prompts, decided(target, specs, effort.tokens), strict=True
        ):
            say(f"{category} at temperature {temperature:g}")
            yield [
                Tau(
                    contender,
                    category,
                    temperature,
                    accepted_in_steps(
                        [proposers[name] for name in CONTENDERS[contender]],
                        known,
                        grows=GROWS,
                        verified_max=VERIFIED,
                    ),
                )
                for contender in _UNITED
                if proposers.keys() >= set(CONTENDERS[contender])
            ]
