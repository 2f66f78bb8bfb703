"""Peers in processes of their own: the protocol, and models handed to them as GGUF."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.peers.catalogue import Target, start
from bench.peers.gguf_file import write_gguf
from bench.peers.process import Peer, PeerError
from bench.spec.contenders import Theirs
from tests.unit.model.test_loading import save_folder

_COUNTING = """
import time
from bench.peers.worker import serve

def generate(prompts, tokens, eos_ids):
    if tokens == 13:
        raise RuntimeError("no thirteen")
    if tokens == 99:
        raise SystemExit(3)
    now = time.perf_counter()
    rows = [[prompt[-1] + 1 + n for n in range(tokens)] for prompt in prompts]
    return [[now + n // 2 for n in range(tokens)] for _ in prompts], rows

def start():
    print("libraries may print")
    return generate, {"version": "1"}

serve(start)
"""


class _Layout:
    """One id a character."""

    def encode_chat(self, messages: object) -> tuple[int, ...]:
        return tuple(ord(c) for _, text in messages for c in text)  # type: ignore[attr-defined]

    def decode(self, ids: object) -> str:
        return "".join(map(chr, ids))  # type: ignore[call-overload]


@pytest.fixture(name="peer")
def _peer() -> Iterator[Peer]:
    peer = Peer("counting", [sys.executable, "-c", _COUNTING], {})
    try:
        yield peer
    finally:
        peer.close()


def test_outputs_end_with_the_first_end_of_sequence_id(peer: Peer) -> None:
    peer.wait_ready()
    assert peer.settings == {"version": "1"}
    run = peer.generate([[1, 10], [5]], 6, [13])
    assert run.ids == ((11, 12, 13), (6, 7, 8, 9, 10, 11))
    assert [len(row) for row in run.times_s] == [3, 6]
    assert peer.generate([[10]], 4).ids == ((11, 12, 13, 14),)


def test_a_failed_request_is_told_and_the_next_one_answered(peer: Peer) -> None:
    peer.wait_ready()
    with pytest.raises(PeerError, match="counting: RuntimeError: no thirteen"):
        peer.generate([[1]], 13)
    assert peer.generate([[1]], 2).ids == ((2, 3),)
    with pytest.raises(PeerError, match="counting has ended"):
        peer.generate([[1]], 99)


def test_a_peer_answers_conversations(peer: Peer) -> None:
    peer.wait_ready()
    settled: list[int] = []
    theirs = Theirs(peer, _Layout(), [ord("e")], lambda: settled.append(1))
    turn = theirs.answer([("user", "a")], 9, 0.0, 1, "salt")
    assert turn.text == "bcd"
    assert turn.token_ids == tuple(map(ord, "bcde"))
    assert turn.accept_lengths == (2, 2)
    assert turn.prompt_tokens == 1
    assert settled == [1]


def test_what_is_not_installed_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.peers.catalogue.PEERS", tmp_path)
    target = Target(tmp_path, "bfloat16", 1, 100)
    with pytest.raises(PeerError, match="not installed \\(make peer-vllm\\)"):
        start("vllm-ngram", target)
    with pytest.raises(PeerError, match="needs a draft model"):
        start("hf-assisted", target)


def test_a_model_is_the_same_as_gguf(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "tiny", "random:tiny?seed=3&heads=4&kv_heads=2")
    path = write_gguf(folder, tmp_path / "cache", "float32")
    assert write_gguf(folder, tmp_path / "cache", "float32") == path
    ids = torch.tensor([[1, 5, 9, 30, 31, 32]])
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        read = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        torch.testing.assert_close(read(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["hf", "hf-lookup", "hf-assisted"])
@pytest.mark.slow
def test_generate_gives_the_same_ids_however_it_guesses(name: str, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "tiny", "random:tiny?seed=3")
    peer = start(name, Target(folder, "float32", 1, 100, assistant=folder))
    try:
        run = peer.generate([[7, 8, 9, 7, 8, 9, 7, 8]], 12)
    finally:
        peer.close()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    model.generation_config.eos_token_id = None
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert list(run.ids[0]) == expected[0, 8:].tolist()
    assert len(run.times_s[0]) == 12
    steps = len(set(run.times_s[0]))
    assert steps == 12 if name == "hf" else steps < 12
