"""The stages of a distillation in a folder of its own: generate, train, evaluate.

RUN/run.json       the target and its digest
RUN/corpus/        what the target wrote
RUN/training.pt    how far training is
RUN/drafter/       the drafter, written whenever it is scored
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outrider.config import Device
from outrider.errors import ConfigError
from outrider.model import random_model
from outrider.model.distillation.corpus import Corpus
from outrider.model.distillation.evaluation import (
    Score,
    StepTimes,
    TreeShape,
    greedy_answers,
    score_answer,
    step_times,
)
from outrider.model.distillation.folder import TargetName, read_folder, write_folder
from outrider.model.distillation.generation import GenerationConfig, Writer
from outrider.model.distillation.openings import Openings, Prompt
from outrider.model.distillation.student import (
    default_layers,
    frequent_ids,
    new_student,
    student_config,
)
from outrider.model.distillation.target import target_digest, whole_target
from outrider.model.distillation.training import Report, Trainer, TrainingConfig
from outrider.model.language_model import LanguageModel, TransformersModel
from outrider.model.loading import load_language_model, resolve_model, torch_device
from outrider.model.threads import set_threads


@dataclass(frozen=True, slots=True)
class Run:
    """A distillation's folder and its target."""

    folder: Path
    target: TargetName
    cache_dir: Path

    @property
    def corpus(self) -> Corpus:
        """What the target has written."""
        return Corpus(self.folder / "corpus", self.target.digest)

    @property
    def state(self) -> Path:
        """How far training is."""
        return self.folder / "training.pt"

    @property
    def drafter(self) -> Path:
        """The result."""
        return self.folder / "drafter"

    @property
    def target_folder(self) -> Path | None:
        """Where the target's files are; None for a random one."""
        return _folder(self.target.model, self.cache_dir)


def open_run(folder: Path, target: str | None, cache_dir: Path) -> Run:
    """Open a run's folder, or begin one for `target`. Raises `ConfigError`, ModelLoadError."""
    path = folder / "run.json"
    if path.exists():
        try:
            entry = json.loads(path.read_text())
            known = TargetName(entry["target"], entry["digest"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        if target is not None and target != known.model:
            raise ConfigError(f"{folder} is for the target '{known.model}', not for '{target}'")
        return Run(folder, known, cache_dir)
    if target is None:
        raise ConfigError(f"there is no {path}; begin with `outrider distill generate`")
    if target.startswith("synthetic:"):
        raise ConfigError("a synthetic model computes nothing that a drafter could learn")
    digest = target_digest(target, _folder(target, cache_dir), cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"target": target, "digest": digest}) + "\n")
    return Run(folder, TargetName(target, digest), cache_dir)


def generate(
    run: Run,
    openings: Openings,
    config: GenerationConfig,
    *,
    device: Device = "auto",
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Let the target write; returns the answer tokens that there are then."""
    model = load_target(run.target.model, run.cache_dir, device=device, threads=threads)
    return Writer(model, openings, run.corpus, config).run(progress)


def load_target(
    spec: str, cache_dir: Path, *, device: Device = "auto", threads: int = 0
) -> TransformersModel:
    """Load a target to run it. Raises ModelLoadError."""
    set_threads(threads)
    model = load_language_model(spec, device=device, cache_dir=cache_dir)
    if not isinstance(model, TransformersModel):
        raise ConfigError("a synthetic model computes nothing that a drafter could learn")
    return model


def train(
    run: Run,
    config: TrainingConfig,
    report: Callable[[Report], None],
    *,
    layers: Sequence[int] | None = None,
    layer_count: int = 3,
    head_size: int = 8_192,
    begin_with: Path | None = None,
    device: Device = "auto",
    threads: int = 0,
    score_s: float = 180.0,
    steps_max: int | None = None,
) -> Report | None:
    """Train, or go on training, and write the drafter; returns the last report.

    `layers`: those of the target that the student starts from, by default the first
    `layer_count`. Where a run goes on, they stay as they are; the head follows the text that
    there is. `begin_with`: a drafter of the same target whose weights a new run starts from.
    """
    set_threads(threads)
    state = _state(run.state)
    older = None if begin_with is None else read_folder(begin_with)
    if older is not None and state is not None:
        raise ConfigError(f"{run.state} is there already, and goes on; begin another run")
    if older is not None and older.target.digest != run.target.digest:
        raise ConfigError(f"{begin_with} is for another target than {run.folder}")
    target = whole_target(run.target.model, run.target_folder)
    if state is not None:
        layers = state["layers"]
    elif older is not None:
        layers = older.layers
    else:
        layers = layers or default_layers(layer_count, target.config.num_hidden_layers)
    # The head's rows are the target's own, so others may take their place at any time.
    kept = _kept(run, target, head_size)
    student = new_student(target, layers, kept)
    described = student_config(target.config, layers)
    head: Any = target.get_output_embeddings()
    place = torch_device(device)
    student.to(place)
    trainer = Trainer(student, head.weight.detach(), kept, run.corpus, config, place)
    del target
    if state is not None:
        trainer.resume(state, run.state)
    elif older is not None:
        trainer.begin_with(older.weights, older.kept)
    else:
        trainer.fit()
    last: list[Report] = []

    def keep(entry: Report) -> None:
        last[:] = [entry]
        if entry.agreement is not None:
            trainer.save(run.state, layers=list(layers))
            write_folder(
                run.drafter,
                target=run.target,
                layers=layers,
                model_config=described,
                kept=kept,
                weights=trainer.weights(),
            )
        report(entry)

    trainer.run(keep, score_s=score_s, steps_max=steps_max)
    return last[0] if last else None


def _state(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling meets in a damaged file
        raise ConfigError(f"training cannot go on from {path}: {error}") from error
    return state


def _kept(run: Run, target: Any, head_size: int) -> tuple[int, ...]:
    """Return the ids of the head: the most frequent ones in the answers, and those that end."""
    size: int = target.get_output_embeddings().weight.shape[0]
    counts = torch.zeros(size, dtype=torch.int64)
    for path in run.corpus.files():
        for entry in run.corpus.read(path):
            answer = entry.tokens[entry.answer_start :].long()
            counts += torch.bincount(answer, minlength=size)
    ends = target.generation_config.eos_token_id
    if ends is None:
        ends = target.config.eos_token_id
    always = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return frequent_ids(counts, min(head_size, size), always)


def evaluate(
    drafter_folder: Path,
    prompts: Sequence[Prompt],
    cache_dir: Path,
    *,
    target: str | None = None,
    answer_tokens_max: int = 128,
    shape: TreeShape | None = None,
    device: Device = "auto",
    threads: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> tuple[dict[str, Score], StepTimes]:
    """Score a drafter on the target's greedy answers; by category, in alphabetical order.

    Returns as well how long steps of both take, each as it was loaded.

    Without a `shape` tau is not measured. `progress` hears of the answers that the target has
    given, and of those that have been scored.
    """
    said = progress or (lambda stage, count: None)
    place = target or read_folder(drafter_folder).target.model
    drafter: LanguageModel = load_language_model(
        str(drafter_folder), device=device, cache_dir=cache_dir, target=target
    )
    model = load_target(place, cache_dir, device=device, threads=threads)
    answers = greedy_answers(
        model, prompts, answer_tokens_max, progress=lambda count: said("answered", count)
    )
    scores: defaultdict[str, Score] = defaultdict(Score)
    for count, answer in enumerate(answers, start=1):
        scores[answer.category] = scores[answer.category].plus(score_answer(drafter, answer, shape))
        said("scored", count)
    return dict(sorted(scores.items())), step_times(model, drafter, answers[0])


def _folder(spec: str, cache_dir: Path) -> Path | None:
    if spec.startswith(random_model.PREFIX):
        return None
    return resolve_model(spec, cache_dir).folder
