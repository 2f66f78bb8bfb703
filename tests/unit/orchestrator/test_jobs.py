"""Requests become jobs, or errors that name the field."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.config import DriverConfig
from orchestrator.jobs import Request, job_of
from orchestrator.text import TextCodec
from outrider.domain import Grammar, GrammarKind, ModelInfo, SamplingParams, session_seed
from outrider.errors import InvalidRequest
from outrider.tokenizer import byte_tokenizer_files

CODEC = TextCodec.from_files(byte_tokenizer_files())
INFO = ModelInfo(
    model="tiny",
    model_fingerprint="f",
    tokenizer_fingerprint=CODEC.fingerprint,
    vocabulary_size=260,
    length_max=64,
    dtype="float32",
)
CONFIG = DriverConfig()
PLAIN = Request(seed=5, prompt="Hello")


def field_of(request: Request, config: DriverConfig = CONFIG) -> str:
    with pytest.raises(InvalidRequest) as caught:
        job_of(request, INFO, CODEC, config)
    assert str(caught.value).startswith(f"{caught.value.field}: ")
    return caught.value.field


def sampling(**values: object) -> Request:
    return replace(PLAIN, sampling=SamplingParams(**values))


@pytest.mark.parametrize(
    ("request_", "prompt"),
    [
        (PLAIN, tuple(b"Hello")),
        (Request(seed=5, token_ids=(1, 2, 259)), (1, 2, 259)),
        (
            Request(seed=5, chat=(("user", "Hi"),)),
            CODEC.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ),
    ],
)
def test_every_kind_of_input_becomes_ids(request_: Request, prompt: tuple[int, ...]) -> None:
    job = job_of(request_, INFO, CODEC, CONFIG)
    assert job.prompt == prompt
    (spec,) = job.choices
    assert (spec.prompt, spec.seed) == (prompt, session_seed(5, 0))
    assert (job.info, job.seed, job.stop, job.speculation) == (INFO, 5, (), True)
    assert spec.tokens_max == INFO.length_max - len(prompt)


def test_choices_differ_in_their_seeds_and_in_who_scores_the_prompt() -> None:
    grammar = Grammar(GrammarKind.REGEX, "a+")
    asked = Request(
        seed=5,
        prompt="Hello",
        sampling=SamplingParams(grammar=grammar, logit_bias=((259, 1.0),), tokens_min=3),
        n=3,
        tokens_max=9,
        stop=("x",),
        stop_ids=(7, 7, 8),
        speculation=False,
        logprobs=2,
        prompt_logprobs=20,
        cache_salt="s",
    )
    job = job_of(asked, INFO, CODEC, CONFIG)
    first = job.choices[0]
    assert (first.sampling, first.tokens_max) == (asked.sampling, 9)
    assert first.stop_ids == frozenset({7, 8})
    assert (first.logprobs, first.prompt_logprobs, first.cache_salt) == (2, 20, "s")
    assert (job.stop, job.speculation, job.prompt_logprobs) == (("x",), False, True)
    assert job.choices == (
        first,
        replace(first, seed=session_seed(5, 1), prompt_logprobs=None),
        replace(first, seed=session_seed(5, 2), prompt_logprobs=None),
    )
    assert not job_of(PLAIN, INFO, CODEC, CONFIG).prompt_logprobs


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (Request(seed=5), "prompt"),
        (replace(PLAIN, prompt=""), "prompt"),
        (Request(seed=5, token_ids=()), "token_ids"),
        (Request(seed=5, token_ids=(260,)), "token_ids"),
        (Request(seed=5, token_ids=(1,) * 64), "token_ids"),
        (Request(seed=5, chat=()), "chat.messages"),
        (replace(PLAIN, tokens_max=0), "tokens_max"),
        (replace(PLAIN, tokens_max=60), "tokens_max"),
        (replace(PLAIN, stop=("",)), "stop"),
        (replace(PLAIN, stop_ids=(260,)), "stop_ids"),
        (replace(PLAIN, stop_ids=(1,) * 257), "stop_ids"),
        (sampling(logit_bias=((1, 1.0), (260, 1.0))), "sampling.logit_bias"),
        (sampling(tokens_min=60), "sampling.tokens_min"),
        (replace(sampling(tokens_min=5), tokens_max=4), "sampling.tokens_min"),
        (
            replace(sampling(grammar=Grammar(GrammarKind.REGEX, "a")), ignore_eos=True),
            "ignore_eos",
        ),
        (replace(PLAIN, n=0), "n"),
        (replace(PLAIN, n=17), "n"),
        (replace(PLAIN, logprobs=21), "logprobs"),
        (replace(PLAIN, prompt_logprobs=21), "prompt_logprobs"),
        (replace(PLAIN, cache_salt="x" * 257), "cache_salt"),
    ],
)
def test_the_field_is_named(request_: Request, field: str) -> None:
    assert field_of(request_) == field


def test_the_limits_are_settings() -> None:
    assert len(job_of(replace(PLAIN, n=16), INFO, CODEC, CONFIG).choices) == 16
    assert field_of(replace(PLAIN, n=3), DriverConfig(choices_max=2)) == "n"
    # Never more than there is room for at all.
    assert field_of(replace(PLAIN, n=3), DriverConfig(sessions_max=2)) == "n"
    assert (
        len(job_of(replace(PLAIN, n=17), INFO, CODEC, DriverConfig(choices_max=17)).choices) == 17
    )


def test_tenants_never_share_a_cache_whatever_salts_they_choose() -> None:
    def salt(tenant: str, chosen: str) -> str:
        asked = replace(PLAIN, tenant=tenant, cache_salt=chosen)
        return job_of(asked, INFO, CODEC, CONFIG).choices[0].cache_salt

    salts = [salt(*given) for given in (("", "s"), ("a", "s"), ("b", "s"), ("a", ""), ("as", ""))]
    assert len(set(salts)) == len(salts)
    assert salt("a", "s") == salt("a", "s")
    assert salt("", "s") == "s"
