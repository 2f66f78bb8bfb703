"""Training a student: to choose as the target would, from what the target's head saw.

The loss is the cross-entropy with the target's distribution over the kept part of the vocabulary
(Hinton et al., arXiv 1503.02531), that with its first choice, which is what acceptance counts,
and the distance of the last hidden states (as in EAGLE, arXiv 2401.15077), which gives a signal
in every dimension and helps most when there is little text.

The target's head stays as it is. Before it stands a matrix that turns the student's last hidden
state into the target's; it starts as the least-squares solution (as in the tuned lens, arXiv
2303.08112) and becomes part of the head when all is done. What is kept is a running average of
the weights.

A run lies in a folder and can be stopped at any time. It goes on where it was, to the same
weights, unless more text has come meanwhile: that is used from the next epoch on.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outrider.errors import ConfigError
from outrider.model.distillation.batches import Batch, batch_of, batches, split
from outrider.model.distillation.corpus import Corpus
from outrider.model.distillation.student import own_parameters, turn_of

_TURN = "turn"
_FIT_TOKENS = 16_384
_FIT_DAMPING = 0.03


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How a student is trained. Tokens are those of answers, each time they are seen."""

    tokens_max: int = 1_000_000
    batch_tokens: int = 1_536
    rate: float = 1.4e-3
    """Learning rate, after `warm_up_tokens` and before the last `decay_share` of all tokens."""
    warm_up_tokens: int = 15_000
    decay_share: float = 0.4
    weight_decay: float = 0.01
    first_choice_weight: float = 0.5
    hidden_weight: float = 1.0
    average: float = 0.98
    """Of the running average, per step."""
    seed: int = 0

    def rate_at(self, tokens: int) -> float:
        """Return the learning rate once so many tokens have been seen: trapezoid."""
        decay = max(1.0, self.decay_share * self.tokens_max)
        rise = (tokens + self.batch_tokens) / max(1, self.warm_up_tokens)
        fall = (self.tokens_max - tokens) / decay
        return self.rate * max(0.0, min(1.0, rise, fall))


@dataclass(frozen=True, slots=True)
class Report:
    """How far training is."""

    tokens: int
    step: int
    loss: float
    """Mean since the last report."""
    agreement: float | None
    """On held-out text, if it was measured just now."""
    tokens_per_s: float


def final_hidden(student: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return what a student's head is to see, [conversations, longest, hidden]."""
    # Padding stands at the end, where causal attention never looks at it.
    output = student.get_decoder()(input_ids=tokens, use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


class Trainer:
    """Trains a student for one target."""

    def __init__(
        self,
        student: Any,
        target_head: torch.Tensor,
        kept: Sequence[int],
        corpus: Corpus,
        config: TrainingConfig,
        device: torch.device | None = None,
    ) -> None:
        """`target_head` [vocabulary, hidden]: the rows of the target's head, `kept` those used."""
        self.student = student.train()
        self.config = config
        self.tokens = 0
        self.step = 0
        self._device = device or torch.device("cpu")
        self._corpus = corpus
        self._kept = torch.tensor(kept)
        self._full_head = target_head
        self._head = target_head[self._kept].to(self._device)
        self._softcap: float | None = getattr(student.config, "final_logit_softcapping", None)
        width = target_head.shape[1]
        self._turn = nn.Parameter(torch.eye(width, device=self._device))
        """[hidden, hidden]: of the student to of the target."""
        head = student.get_output_embeddings().weight.requires_grad_(False)
        self._parameters = {_TURN: self._turn} | {
            name: p for name, p in own_parameters(student).items() if p is not head
        }
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}
        matrices = [p for p in self._parameters.values() if p.ndim > 1]
        others = [p for p in self._parameters.values() if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.rate,
            betas=(0.9, 0.95),
            foreach=True,
        )
        self._epoch = 0
        self._epoch_step = 0
        self._files: list[Path] = []
        self._labels: list[tuple[Batch, torch.Tensor]] | None = None

    def run(
        self,
        report: Callable[[Report], None],
        *,
        report_s: float = 30.0,
        score_s: float = 180.0,
        steps_max: int | None = None,
    ) -> None:
        """Train until `tokens_max` have been seen, or for `steps_max` more steps."""
        started = reported = scored = time.monotonic()
        tokens_before, losses = self.tokens, []
        for done, batch in enumerate(self._stream(), start=1):
            losses.append(self._update(batch))
            now = time.monotonic()
            over = self.tokens >= self.config.tokens_max or done == steps_max
            if over or now - reported >= report_s:
                agreement = None
                if over or now - scored >= score_s:
                    agreement, scored = self.agreement(), time.monotonic()
                rate = (self.tokens - tokens_before) / max(1e-9, now - started)
                loss = math.fsum(losses) / len(losses)
                report(Report(self.tokens, self.step, loss, agreement, rate))
                reported, losses = time.monotonic(), []
            if over:
                return

    def _stream(self) -> Iterator[Batch]:
        """Return batches for good; the state says which comes next."""
        if self.tokens >= self.config.tokens_max:
            return
        while True:
            if not self._files:
                self._files = self._training_files()
            order = random.Random(f"{self.config.seed} {self._epoch}")
            epoch = batches(self._corpus, self._files, self.config.batch_tokens, order)
            for index, batch in enumerate(epoch):
                if index >= self._epoch_step:
                    self._epoch_step += 1
                    yield batch
            self._epoch, self._epoch_step, self._files = self._epoch + 1, 0, []

    def _training_files(self) -> list[Path]:
        files, _ = split(self._corpus.files())
        if not files:
            raise ConfigError(f"{self._corpus.folder} has no conversations to train on yet")
        return files

    def _update(self, batch: Batch) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.rate_at(self.tokens)
        loss = self._loss(batch)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters.values(), 1.0, foreach=True)
        self._optimizer.step()
        self.step += 1
        self.tokens += len(batch.places)
        # At first over few steps, so that the beginning does not linger.
        weight = 1.0 - min(self.config.average, (1.0 + self.step) / (10.0 + self.step))
        torch._foreach_lerp_(
            list(self._average.values()), [p.detach() for p in self._parameters.values()], weight
        )
        return loss.item()

    def _loss(self, batch: Batch) -> torch.Tensor:
        theirs = batch.hidden.to(self._device)
        ours = self._hidden(batch) @ self._turn
        scores = self._capped(ours @ self._head.T).log_softmax(-1)
        with torch.no_grad():
            targets = self._capped(theirs @ self._head.T)
            # Both cross-entropies at once: the targets are a mixture of soft and hard.
            best = targets.argmax(-1, keepdim=True)
            hard = self.config.first_choice_weight
            targets = targets.softmax(-1).mul_(1.0 - hard)
            targets.scatter_add_(1, best, torch.full_like(best, hard, dtype=targets.dtype))
        loss = -(targets * scores).sum(-1).mean()
        if self.config.hidden_weight:
            distance = (ours - theirs).square().sum(-1) / theirs.square().sum(-1)
            loss = loss + self.config.hidden_weight * distance.mean()
        return loss

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """Return the student's last hidden states where answers are decided, [tokens, hidden]."""
        flat = final_hidden(self.student, batch.tokens.to(self._device)).flatten(0, 1)
        return flat[batch.places.to(self._device)]

    def fit(self) -> None:
        """Set the matrix before the head to the least-squares solution; once, at the beginning."""
        files = self._training_files()
        width = len(self._turn)
        squares = torch.zeros((width, width), device=self._device)
        products = torch.zeros_like(squares)
        seen = 0
        order = random.Random(self.config.seed)
        with torch.no_grad():
            for batch in batches(self._corpus, files, self.config.batch_tokens, order):
                ours = self._hidden(batch)
                squares += ours.T @ ours
                products += ours.T @ batch.hidden.to(self._device)
                seen += len(ours)
                if seen >= _FIT_TOKENS:
                    break
            damping = _FIT_DAMPING * squares.diagonal().mean()
            squares += damping * torch.eye(width, device=self._device)
            self._turn.copy_(torch.linalg.solve(squares, products))
            self._average[_TURN].copy_(self._turn)

    def begin_with(self, weights: Mapping[str, torch.Tensor], kept: Sequence[int]) -> None:
        """Begin with what `weights` returned for a head of the ids `kept`, instead of `fit`.

        Raises `ConfigError` if they are those of another shape.
        """
        head: Any = self.student.get_output_embeddings()
        (head_name,) = (n for n, p in own_parameters(self.student).items() if p is head.weight)
        own = self._parameters.keys() - {_TURN}
        shapes = {name: tensor.shape for name, tensor in weights.items() if name != head_name}
        if shapes != {name: self._parameters[name].shape for name in own}:
            raise ConfigError("the drafter to begin with has other layers than the one to train")
        with torch.no_grad():
            for name in own:
                self._parameters[name].copy_(weights[name])
            rows = self._full_head[torch.tensor(kept)]
            self._parameters[_TURN].copy_(turn_of(rows, weights[head_name]))
            for name, parameter in self._parameters.items():
                self._average[name].copy_(parameter)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the averaged student's own weights, ready to be stored."""
        with self.averaged(), torch.no_grad():
            head: Any = self.student.get_output_embeddings()
            head.weight.copy_(self._head @ self._turn.T)
            return {
                name: parameter.detach().clone()
                for name, parameter in own_parameters(self.student).items()
            }

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        if self._softcap is None:
            return logits
        return (logits / self._softcap).tanh() * self._softcap

    # --- scoring ---

    def agreement(self) -> float:
        """Return how often the averaged student's first choice is the target's, held-out text."""
        if self._labels is None:
            self._labels = self._labelled()
        right = count = 0
        with self.averaged(), torch.no_grad():
            for batch, labels in self._labels:
                scores = self._hidden(batch) @ self._turn @ self._head.T
                chosen = self._kept[scores.argmax(-1).cpu()]
                right += int((chosen == labels).sum())
                count += len(labels)
        return right / count if count else math.nan

    def _labelled(self, conversations_max: int = 64) -> list[tuple[Batch, torch.Tensor]]:
        """Return held-out batches with the target's first choices, of the whole vocabulary."""
        _, files = split(self._corpus.files())
        entries = [entry for path in files for entry in self._corpus.read(path)]
        entries = entries[:conversations_max]
        found = []
        for begin in range(0, len(entries), 8):
            batch = batch_of(entries[begin : begin + 8])
            logits = batch.hidden @ self._full_head.T
            found.append((batch, logits.argmax(-1)))
        return found

    def averaged(self) -> _Averaged:
        """Context manager: inside, the student has its averaged weights."""
        return _Averaged(self.student, self._parameters, self._average)

    # --- keeping ---

    def save(self, path: Path, **more: Any) -> None:
        """Write everything that is needed to go on, and `more`."""
        state = {
            "config": asdict(self.config),
            "tokens": self.tokens,
            "step": self.step,
            "epoch": self._epoch,
            "epoch_step": self._epoch_step,
            "files": [file.name for file in self._files],
            "own": {name: p.detach() for name, p in self._parameters.items()},
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
            **more,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, state: Mapping[str, Any], path: Path) -> None:
        """Go on from what `save` wrote to `path`. Raises `ConfigError` if it does not fit."""
        try:
            self._optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(state["own"][name])
                    self._average[name].copy_(state["average"][name])
            self.tokens, self.step = state["tokens"], state["step"]
            self._epoch, self._epoch_step = state["epoch"], state["epoch_step"]
            self._files = [self._corpus.folder / name for name in state["files"]]
        except (RuntimeError, KeyError, ValueError) as error:
            raise ConfigError(f"training cannot go on from {path}: {error}") from error


class _Averaged:
    def __init__(
        self,
        student: Any,
        parameters: dict[str, nn.Parameter],
        average: dict[str, torch.Tensor],
    ) -> None:
        self._student = student
        self._parameters = parameters
        self._average = average
        self._own: dict[str, torch.Tensor] = {}

    def __enter__(self) -> None:
        self._student.eval()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._own[name] = parameter.detach().clone()
                parameter.copy_(self._average[name])

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._own[name])
        self._student.train()
