"""Carries to the workers what sessions command: openings, commits, attachments, ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from orchestrator.budgets import budget_of, changed
from orchestrator.fleet import Fleet
from orchestrator.generation import Running
from orchestrator.messages import (
    AbortOnVerifier,
    AskRepeat,
    BindDrafter,
    OpenOnVerifier,
    RelayCommit,
    UnbindDrafter,
)
from orchestrator.workers import DrafterLink
from outrider import wire
from outrider.domain import BindSpec, DraftBudget, Resync

_PAIRS_MAX = 65_536


class Dispatch:
    """Finds the worker's link for a command and queues it there; a lost worker is skipped."""

    def __init__(
        self,
        fleet: Fleet,
        limits: DraftBudget,
        tenant_weights: Mapping[str, float] | None = None,
        *,
        own_guesses: bool = True,
    ) -> None:
        """`limits` bounds every budget; a tenant without a weight has 1.

        Without `own_guesses` no verifier is asked to guess from sessions' own text.
        """
        self._fleet = fleet
        self._tenant_weights = tenant_weights or {}
        self._limits = limits
        self._own_guesses = own_guesses
        self._budgets: dict[tuple[str, str], DraftBudget] = {}
        """What was said last, by verifier and drafter: their sessions share one object."""
        self._fresh: set[tuple[str, str]] = set()
        """Pairs whose budget follows the latest measurements."""

    def measure_anew(self) -> None:
        """Have budgets follow what has been measured since."""
        self._fresh.clear()
        if len(self._budgets) > _PAIRS_MAX:
            self._budgets.clear()

    def to_verifier(
        self, running: Running, command: OpenOnVerifier | AbortOnVerifier | AskRepeat
    ) -> None:
        """Open, abort or ask for a repeat."""
        number, session = running.number, running.session
        address = command.address if isinstance(command, AbortOnVerifier) else session.verifier
        verifier = self._fleet.verifiers.get(address or "")
        if verifier is None:
            return
        match command:
            case OpenOnVerifier(spec):
                verifier.sessions.add(number)
                wanted = session.drafters_wanted and self._fleet.candidates_wanted(
                    running.generation.info
                )
                peer, running.kv_peer = running.kv_peer, None
                spec = replace(
                    spec,
                    candidates=wanted or spec.candidates,
                    kv_peer=peer or spec.kv_peer,
                    own_guesses=self._own_guesses and session.drafters_wanted > 0,
                )
                verifier.open(spec)
                if running.follower is not None:
                    running.follower.reopened()
                    self.predict(running)
            case AbortOnVerifier(_, epoch):
                verifier.sessions.discard(number)
                verifier.abort(number, epoch)
            case AskRepeat(epoch, have_length):
                verifier.ask_repeat(Resync(number, epoch, have_length))

    def relay(self, running: Running, command: RelayCommit) -> None:
        """Pass a commit on to drafters, unread where possible."""
        data = running.commit_bytes if command.verbatim else wire.commit_to_bytes(command.commit)
        for binding in command.bindings:
            drafter = self._fleet.drafters.get(running.session.bindings.get(binding, ""))
            if drafter is not None:
                drafter.commit(running.number, data, running.candidates)

    def predict(self, running: Running) -> None:
        """Offer guesses from the client's predicted output, if there are new ones."""
        session, follower = running.session, running.follower
        verifier = self._fleet.verifiers.get(session.verifier or "")
        if follower is None or verifier is None:
            return
        draft = follower.draft(session.epoch, session.output)
        if draft is not None:
            source = self._fleet.prediction_source
            verifier.offer(running.number, source, wire.draft_to_bytes(draft))

    def bind(self, running: Running, command: BindDrafter) -> None:
        """Send prompt and committed tokens to a drafter."""
        spec, info = running.session.spec, running.generation.info
        tenant = running.generation.tenant
        drafter = self._fleet.drafters.get(running.session.bindings[command.binding])
        if drafter is None:
            return
        drafter.sessions.add(spec.session)
        budget = running.budgets[command.binding] = self._budget_of(running, drafter)
        drafter.bind(
            BindSpec(
                session=spec.session,
                epoch=command.epoch,
                binding=command.binding,
                prompt=spec.prompt,
                committed=command.committed,
                sampling=spec.sampling,
                seed=spec.seed,
                tokenizer_fingerprint=info.tokenizer_fingerprint or "",
                vocabulary_size=info.vocabulary_size,
                budget=budget,
                cache_salt=spec.cache_salt,
                origin=spec.origin,
                tenant=tenant,
                tenant_weight=self._tenant_weights.get(tenant, 1.0),
            )
        )

    def renew_budget(self, running: Running, binding: int, drafter: DrafterLink) -> None:
        """Send a drafter a session's budget if it has changed by much."""
        budget, known = self._budget_of(running, drafter), running.budgets[binding]
        # The same object, mostly: there are far more sessions than pairs of workers.
        if budget is not known and changed(known, budget):
            running.budgets[binding] = budget
            drafter.set_budget(running.number, binding, budget)

    def _budget_of(self, running: Running, drafter: DrafterLink) -> DraftBudget:
        verifier = self._fleet.verifiers.get(running.session.verifier or "")
        if verifier is None:
            return self._limits
        pair = (verifier.address, drafter.address)
        known = self._budgets.get(pair)
        if known is None or pair not in self._fresh:
            self._fresh.add(pair)
            rtt_s = verifier.rtt_s + drafter.rtt_s
            budget = budget_of(verifier.pace, drafter.grow, rtt_s, self._limits)
            if known is None or changed(known, budget):
                known = self._budgets[pair] = budget
        return known

    def unbind(self, running: Running, command: UnbindDrafter) -> None:
        """Detach a drafter."""
        running.budgets.pop(command.binding, None)
        drafter = self._fleet.drafters.get(command.address)
        if drafter is not None:
            drafter.sessions.discard(running.number)
            drafter.spares.discard(running.number)
            drafter.unbind(running.number, command.binding)
