"""Training: that it helps, that it goes on where it was, and what a student starts from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.errors import ConfigError
from outrider.model.distillation import stages
from outrider.model.distillation.batches import split
from outrider.model.distillation.folder import read_folder
from outrider.model.distillation.stages import Run
from outrider.model.distillation.student import (
    default_layers,
    fill_student,
    frequent_ids,
    new_student,
    own_parameters,
)
from outrider.model.distillation.training import Report, Trainer, TrainingConfig

from .conftest import TARGET

CONFIG = TrainingConfig(tokens_max=20_000, batch_tokens=1_024, warm_up_tokens=1_000)


def copied(run: Run, folder: Path) -> Run:
    shutil.copytree(run.folder, folder)
    return stages.open_run(folder, None, run.cache_dir)


def trained(run: Run, **options: Any) -> list[Report]:
    reports: list[Report] = []
    stages.train(
        run,
        options.pop("config", CONFIG),
        reports.append,
        layer_count=2,
        head_size=200,
        device="cpu",
        threads=1,
        **options,
    )
    return reports


def test_agreement_rises(written: Run) -> None:
    target: Any = stages.whole_target(TARGET, None)
    kept = range(260)
    head = target.get_output_embeddings().weight.detach()
    trainer = Trainer(new_student(target, (0, 1), kept), head, kept, written.corpus, CONFIG)
    untrained = trainer.agreement()
    trainer.fit()
    fitted = trainer.agreement()
    losses: list[float] = []
    trainer.run(lambda entry: losses.append(entry.loss), report_s=0, steps_max=20)
    assert untrained + 0.05 < fitted < trainer.agreement() + 0.02
    assert trainer.agreement() > untrained + 0.1
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_weights_that_are_kept_score_as_reported(written: Run, tmp_path: Path) -> None:
    run = copied(written, tmp_path / "run")
    reported = trained(run, steps_max=6)[-1].agreement
    drafter = read_folder(run.drafter)
    student = new_student(stages.whole_target(TARGET, None), drafter.layers, drafter.kept)
    fill_student(student, drafter.weights)
    right = count = 0
    for entry in (e for p in split(run.corpus.files())[1] for e in run.corpus.read(p)):
        with torch.no_grad():
            logits = student(entry.tokens[None].long()).logits[0]
        chosen = torch.tensor(drafter.kept)[logits.argmax(-1)][entry.answer_start - 1 : -1]
        head = stages.whole_target(TARGET, None).get_output_embeddings().weight.detach()
        right += int((chosen == (entry.hidden.float() @ head.T).argmax(-1)).sum())
        count += len(chosen)
    # But for the rounding of stored weights.
    assert right / count == pytest.approx(reported, abs=0.03)


def test_a_run_that_was_stopped_ends_with_the_same_weights(written: Run, tmp_path: Path) -> None:
    whole, pieces = copied(written, tmp_path / "whole"), copied(written, tmp_path / "pieces")
    # More than an epoch, so that the order of the second one counts.
    steps = 14
    trained(whole, steps_max=steps)
    assert torch.load(whole.state)["epoch"] >= 1
    for count in (3, 1, steps - 4):
        trained(pieces, steps_max=count)
    ours, theirs = read_folder(whole.drafter), read_folder(pieces.drafter)
    assert ours.kept == theirs.kept
    for name, weight in ours.weights.items():
        assert torch.equal(weight, theirs.weights[name]), name


def test_a_run_begins_with_a_drafter_that_there_is(written: Run, tmp_path: Path) -> None:
    older, newer = copied(written, tmp_path / "older"), copied(written, tmp_path / "newer")
    reported = trained(older, steps_max=6)[-1].agreement
    standing = replace(CONFIG, rate=1e-9)
    first = trained(newer, config=standing, steps_max=1, begin_with=older.drafter)[-1].agreement
    fitted = copied(written, tmp_path / "fitted")
    trained(fitted, config=standing, steps_max=1)
    # But for the rounding of stored weights.
    assert first == pytest.approx(reported, abs=0.03)
    begun_with = read_folder(older.drafter).weights
    for name, weight in begun_with.items():
        near = (read_folder(newer.drafter).weights[name] - weight).norm()
        assert near < 0.3 * (read_folder(fitted.drafter).weights[name] - weight).norm(), name


def test_a_drafter_to_begin_with_must_fit(written: Run, tmp_path: Path) -> None:
    run = copied(written, tmp_path / "run")
    trained(run, steps_max=1)
    with pytest.raises(ConfigError, match="begin another run"):
        trained(run, begin_with=run.drafter)
    other = copied(written, tmp_path / "other")
    config = json.loads((run.drafter / "config.json").read_text())
    config["target"]["digest"] = "0" * 64
    (run.drafter / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="another target"):
        trained(other, begin_with=run.drafter)


def test_nothing_is_done_when_all_tokens_have_been_seen(written: Run, tmp_path: Path) -> None:
    run = copied(written, tmp_path / "run")
    config = replace(CONFIG, tokens_max=1_000)
    assert trained(run, config=config)[-1].tokens >= 1_000
    assert trained(run, config=config) == []


def test_damaged_state_is_refused(written: Run, tmp_path: Path) -> None:
    run = copied(written, tmp_path / "run")
    run.state.write_bytes(b"PK rubbish")
    with pytest.raises(ConfigError, match="training cannot go on"):
        trained(run)


def test_training_needs_text(tmp_path: Path) -> None:
    run = stages.open_run(tmp_path / "run", TARGET, Path("/nonexistent"))
    with pytest.raises(ConfigError, match="no conversations"):
        trained(run)


def test_a_run_keeps_its_target(written: Run, tmp_path: Path) -> None:
    run = copied(written, tmp_path / "run")
    with pytest.raises(ConfigError, match="not for"):
        stages.open_run(run.folder, "random:other", run.cache_dir)
    with pytest.raises(ConfigError, match="begin with"):
        stages.open_run(tmp_path / "none", None, run.cache_dir)


@pytest.mark.parametrize(("layers"), [(0, 1, 2, 3), (0, 3)])
def test_a_student_starts_from_the_layers_it_names(layers: tuple[int, ...]) -> None:
    target = stages.whole_target(TARGET, None)
    kept = (3, 5, 250)
    student = new_student(target, layers, kept)
    theirs = target.state_dict()
    own = own_parameters(student)
    assert not any("embed" in name for name in own)
    for place, layer in enumerate(layers):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(own[name.format(place)], theirs[name.format(layer)])
    assert torch.equal(own["lm_head.weight"], theirs["lm_head.weight"][list(kept)])


def test_a_student_of_all_layers_is_the_target() -> None:
    target: Any = stages.whole_target(TARGET, None)
    student = new_student(target, default_layers(4, 4), range(260))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(student(tokens).logits, target(tokens).logits, atol=1e-5)


def test_frequent_ids_are_the_frequent_ones_and_those_asked_for() -> None:
    counts = torch.tensor([0, 500_000, 0, 900_000, 0, 100_000])
    assert frequent_ids(counts, 3, [4]) == (1, 3, 4)
    assert frequent_ids(counts, 5, [4]) == (0, 1, 3, 4, 5)
    with pytest.raises(ConfigError, match="size"):
        frequent_ids(counts, 7, [4])
    with pytest.raises(ConfigError, match="layers"):
        default_layers(5, 4)


def test_what_a_little_text_lacks_by_chance_is_not_given_up() -> None:
    counts = torch.zeros(40_000, dtype=torch.int64)
    counts[30_000] = 200
    counts[39_000] = 1
    kept = frequent_ids(counts, 1_000, [])
    # The head of a byte-pair encoding's list, what was frequent, but not what occurred once.
    assert kept == (*range(999), 30_000)


def test_the_head_follows_the_text(written: Run, tmp_path: Path) -> None:
    run = copied(written, tmp_path / "run")
    trained(run, steps_max=2)
    before = read_folder(run.drafter)
    # A text in which one id that was not kept is all there is.
    new = max(set(range(260)) - set(before.kept))
    path = next(iter(run.corpus.files()))
    entries = [
        replace(
            entry,
            tokens=torch.cat(
                [entry.tokens[: entry.answer_start], torch.full((len(entry.hidden),), new).int()]
            ),
        )
        for entry in run.corpus.read(path)
    ]
    for number in range(400):
        run.corpus.write(1_000 + 24 * number, entries)
    trained(run, steps_max=1)
    after = read_folder(run.drafter)
    assert new in after.kept
    assert len(after.kept) == len(before.kept)
    # The rows are the target's whatever stands beside them: those of ids that stay differ little.
    stays = sorted(set(before.kept) & set(after.kept))
    ours, theirs = (
        drafter.weights["lm_head.weight"][[drafter.kept.index(token) for token in stays]]
        for drafter in (before, after)
    )
    alike = torch.nn.functional.cosine_similarity(ours, theirs) > 0.98
    # But for padding, whose row is zero.
    assert int(alike.sum()) >= len(stays) - 1


def test_the_rate_is_a_trapezoid() -> None:
    config = TrainingConfig(
        tokens_max=1_000, batch_tokens=10, rate=1.0, warm_up_tokens=100, decay_share=0.5
    )
    assert config.rate_at(0) == pytest.approx(0.1)
    assert config.rate_at(300) == 1.0
    assert config.rate_at(750) == pytest.approx(0.5)
    assert config.rate_at(1_000) == 0.0
