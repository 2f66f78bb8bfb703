"""Answers as OpenAI's clients expect them: whole, or as chunks of a stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.generation import Delivery, Ending
from orchestrator.http.logprob_text import chat_logprobs, completion_logprobs
from orchestrator.http.positions import KnownPosition, Position
from orchestrator.http.reading import Form
from orchestrator.jobs import Job
from orchestrator.messages import DeliverPrompt
from orchestrator.text import TextCodec
from outrider.domain import FinishReason, TokenLogprobs

# Escapes all but ASCII: some clients split lines at U+2028, too.
encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode

_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORTED: "abort"}


@dataclass(slots=True)
class Choice:
    """One choice of an answer, as far as it has come."""

    index: int
    job: Job
    offset: int = 0
    """Characters of text before what comes next."""
    position: Position = field(default_factory=Position)
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs | int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    ending: Ending | None = None
    begun: bool = False
    resumed_at_end: bool = False
    """The client had all of it before it resumed."""


class Answer:
    """What one request gets, whatever the number of its prompts and choices."""

    def __init__(
        self,
        number: str,
        created: int,
        form: Form,
        jobs: Sequence[Job],
        prompts: Sequence[str],
        codec: TextCodec,
    ) -> None:
        """`number` is the generation's, `prompts` are texts to echo, one for each job."""
        self.form = form
        self._codec = codec
        self._number = number
        self._prompts = prompts
        self._jobs = jobs
        self._created = created
        self._choices: list[Choice] = []
        self._first: list[int] = []
        """By job, its first choice."""
        self._prompt_scores: list[tuple[TokenLogprobs, ...]] = [() for _ in jobs]
        for job in jobs:
            self._first.append(len(self._choices))
            for _ in job.choices:
                self._choices.append(Choice(len(self._choices), job))
        kind = "chat.completion" if form.chat else "text_completion"
        info = jobs[0].info
        self.head = {
            "id": f"{'chatcmpl' if form.chat else 'cmpl'}-{number}",
            "object": kind + (".chunk" if form.chat and form.stream else ""),
            "created": created,
            "model": info.model,
            "system_fingerprint": f"fp_{info.model_fingerprint[:12]}",
        }
        self._prefix = encode(self.head)[:-1] + ',"choices":['

    # --- taking in ---

    def resume(self, choice: int, known: KnownPosition, ids: Sequence[int]) -> None:
        """Go on where the client stands, who has these output ids of a choice."""
        one = self._choices[choice]
        one.begun = bool(ids)
        one.resumed_at_end = known.ended
        one.position.advance(ids, "")
        one.position.characters = known.characters
        one.position.ended = known.ended

    def take(self, job: int, output: DeliverPrompt | Delivery | Ending) -> Choice | None:
        """Take in output of a job; returns the choice about which there is something to say."""
        if isinstance(output, DeliverPrompt):
            self._prompt_scores[job] = output.tokens
            return None
        choice = self._choices[self._first[job] + output.choice]
        if isinstance(output, Ending):
            choice.ending = output
            choice.position.ended = True
            self._begin(job, choice)
            return choice
        self._begin(job, choice)
        deliver = output.deliver
        choice.text.append(deliver.text)
        choice.position.advance(deliver.token_ids, deliver.text)
        choice.logprobs += deliver.logprobs
        choice.ids += deliver.token_ids
        choice.sources += deliver.sources
        return choice

    def _begin(self, job: int, choice: Choice) -> None:
        if choice.begun or not self.form.echo:
            return
        choice.begun = True
        choice.text.append(self._prompts[job])
        if self.form.logprobs is not None:
            choice.logprobs += (self._jobs[job].prompt[0], *self._prompt_scores[job])

    @property
    def complete(self) -> bool:
        """True once all choices have ended."""
        return all(choice.ending or choice.resumed_at_end for choice in self._choices)

    # --- saying ---

    def event(self, choice: Choice) -> bytes:
        """What a choice has to say since it was last asked, as an event."""
        ending = choice.ending
        part: dict[str, Any] = {"index": choice.index}
        text = "".join(choice.text)
        choice.text.clear()
        if self.form.chat:
            delta = {"content": text} if text or not ending else {}
            part["delta"] = delta if choice.begun else {"role": "assistant", "content": text}
            choice.begun = True
        else:
            part["text"] = text
        self._decorate(part, choice)
        choice.logprobs.clear()
        choice.ids.clear()
        choice.sources.clear()
        part["finish_reason"] = _REASONS[ending.finish.reason] if ending else None
        usage = f',"usage":{encode(self.usage)}' if self.form.usage_always else self._no_usage
        data = f"data: {self._prefix}{encode(part)}]{usage}}}\n\n"
        if len(self._jobs) > 1:  # Several generations, which cannot be resumed as one.
            return data.encode()
        position = ",".join([str(one.position) for one in self._choices])
        return f"id: {self._number}:{position}\n{data}".encode()

    @property
    def _no_usage(self) -> str:
        # As OpenAI's: the field is there if a last chunk will hold it.
        return ',"usage":null' if self.form.usage_last else ""

    def last_event(self) -> bytes:
        """The chunk without choices that holds the usage."""
        tail = {"usage": self.usage, "metrics": self.metrics}
        return f"data: {self._prefix}],{encode(tail)[1:]}\n\n".encode()

    def whole(self) -> bytes:
        """All of it, once all choices have ended."""
        parts = []
        for choice in self._choices:
            assert choice.ending is not None, "the last output of a choice is its ending"
            part: dict[str, Any] = {"index": choice.index}
            text = "".join(choice.text)
            if self.form.chat:
                part["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                part["text"] = text
            self._decorate(part, choice)
            part["finish_reason"] = _REASONS[choice.ending.finish.reason]
            parts.append(part)
        body = {**self.head, "choices": parts, "usage": self.usage, "metrics": self.metrics}
        return encode(body).encode()

    def _decorate(self, part: dict[str, Any], choice: Choice) -> None:
        part["logprobs"] = None
        if self.form.logprobs is not None and choice.logprobs:
            if self.form.chat:
                scored = [entry for entry in choice.logprobs if not isinstance(entry, int)]
                part["logprobs"] = chat_logprobs(scored, self._codec)
            else:
                part["logprobs"], choice.offset = completion_logprobs(
                    choice.logprobs, self._codec, choice.offset, self.form.logprobs
                )
        if self.form.token_ids:
            part["token_ids"] = list(choice.ids)
            part["token_sources"] = list(choice.sources)

    # --- counting ---

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        prompt = sum(len(job.prompt) for job in self._jobs)
        completion = sum(choice.position.offset for choice in self._choices)
        endings = [choice.ending for choice in self._choices if choice.ending is not None]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(one.predicted.accepted for one in endings),
                "rejected_prediction_tokens": sum(one.predicted.rejected for one in endings),
            },
        }

    @property
    def metrics(self) -> dict[str, Any] | None:
        """What speculation did, in vLLM's shape; only said of a single choice, as there."""
        if len(self._choices) != 1 or self._choices[0].ending is None:
            return None
        ending = self._choices[0].ending
        # Of the steps that were heard, so that the figures agree: a reader may check them.
        histogram = ending.steps_by_accepted
        steps = sum(histogram)
        accepted = sum(right * count for right, count in enumerate(histogram))
        drafted = max(accepted, ending.finish.counters.verified_draft_tokens)
        timeline = {"timeline": json.loads(ending.trace)} if ending.trace else {}
        return {
            **timeline,
            "speculative_decoding": {
                "mean_acceptance_length": 1.0 + accepted / steps if steps else 1.0,
                "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
                "acceptance_histogram": list(histogram),
                "num_spec_steps": steps,
                "num_accepted_draft_tokens": accepted,
                "num_draft_tokens": drafted,
                "num_spec_tokens": max(0, len(histogram) - 1),
            },
            "time_to_first_token_s": ending.first_token_s,
            "total_s": ending.total_s,
        }
