"""What a target writes: its own greedy answers, the same again after an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outrider.errors import ConfigError
from outrider.model.distillation import stages
from outrider.model.distillation.chat_frame import ChatFrame
from outrider.model.distillation.corpus import Conversation, Corpus
from outrider.model.distillation.generation import Writer
from outrider.model.distillation.openings import KINDS_FILE, read_openings
from outrider.model.distillation.stages import Run
from outrider.model.language_model import Row, TransformersModel

from .conftest import GENERATION, TARGET


def conversations(run: Run) -> list[Conversation]:
    return [entry for path in run.corpus.files() for entry in run.corpus.read(path)]


def test_what_the_head_saw_gives_the_greedy_answers(
    written: Run, target: TransformersModel
) -> None:
    head = stages.whole_target(TARGET, None).get_output_embeddings().weight.detach()
    greedy = 0
    entries = conversations(written)
    for entry in entries:
        answer = entry.tokens[entry.answer_start :].tolist()
        assert len(answer) == len(entry.hidden) <= GENERATION.answer_tokens_max
        logits = entry.hidden.float() @ head.T
        greedy += logits.argmax(-1).tolist() == answer
        # Kept in half precision, and still what the model computes.
        cache = target.new_cache()
        wanted = range(entry.answer_start - 1, len(entry.tokens) - 1)
        whole = target.forward([Row(cache, entry.tokens.tolist(), None, wanted)])
        cache.release()
        assert torch.allclose(whole, logits, atol=0.05)
    assert 0.7 < greedy / len(entries) < 1.0  # and the others are sampled


def test_answers_end_at_the_end_of_a_turn_or_at_the_limit(
    written: Run, target: TransformersModel
) -> None:
    for entry in conversations(written):
        answer = entry.tokens[entry.answer_start :].tolist()
        ended = answer[-1] in target.eos_ids
        assert ended or len(answer) == GENERATION.answer_tokens_max
        assert not set(answer[:-1]) & set(target.eos_ids)


def test_conversations_stand_in_the_chat_template(written: Run, target: TransformersModel) -> None:
    frame = ChatFrame(target.tokenizer_files)
    assert frame.before
    assert frame.after
    for entry in conversations(written):
        question = entry.tokens[: entry.answer_start].tolist()
        assert question[: len(frame.before)] == list(frame.before)
        assert question[-len(frame.after) :] == list(frame.after)


def test_an_interrupted_run_writes_the_same(
    written: Run, target: TransformersModel, tmp_path: Path
) -> None:
    corpus = Corpus(tmp_path, written.target.digest)
    openings = read_openings(KINDS_FILE)
    half = replace(GENERATION, tokens_max=GENERATION.tokens_max // 2)
    Writer(target, openings, corpus, half).run()
    begun = len(corpus.files())
    assert begun < len(written.corpus.files())
    Writer(target, openings, corpus, GENERATION).run()
    for ours, theirs in zip(corpus.files(), written.corpus.files(), strict=False):
        for one, other in zip(corpus.read(ours), written.corpus.read(theirs), strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()


def test_processes_take_files_in_turn(target: TransformersModel, tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, "digest")
    openings = read_openings(KINDS_FILE)
    config = replace(GENERATION, tokens_max=600, processes=2)
    Writer(target, openings, corpus, replace(config, process=1)).run()
    numbers = [int(path.stem[-5:]) for path in corpus.files()]
    assert numbers
    assert all(number % 2 == 1 for number in numbers)


def test_a_corpus_of_another_target_is_refused(written: Run) -> None:
    other = Corpus(written.corpus.folder, "another")
    with pytest.raises(ConfigError, match="another target"):
        other.answer_tokens()


def test_a_damaged_file_is_refused_by_name(written: Run, tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, written.target.digest)
    source = written.corpus.files()[0].read_bytes()
    corpus.path(0).write_bytes(source[: len(source) // 2])
    with pytest.raises(ConfigError, match="conversations-00000"):
        list(corpus.read(corpus.path(0)))
