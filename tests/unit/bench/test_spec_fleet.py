"""Which drafters a fleet of the benchmark has, and what contenders they make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.spec.fleet import DrafterSpec, FleetConfig, orchestrator_command
from bench.spec.peers import names_of
from outrider.errors import ConfigError

CONFIG = FleetConfig("m", "float32", "cpu", (), True, Path("cache"), Path("logs"))


def config(*drafters: str, each: bool = True) -> FleetConfig:
    return replace(CONFIG, drafters=tuple(map(DrafterSpec.parse, drafters)), each=each)


def test_a_drafter_is_a_proposer_and_maybe_a_model() -> None:
    assert DrafterSpec.parse("lookup").arguments == ["--proposer", "lookup"]
    # A model's name may have an equals sign itself.
    model = DrafterSpec.parse("language-model=random:tiny?seed=1")
    assert model.model == "random:tiny?seed=1"
    assert model.computes
    store = DrafterSpec.parse("datastore=a.store")
    assert store.arguments == ["--proposer", "datastore", "--datastore", "a.store"]
    assert not store.computes
    for text in ("", "=x", "lookup="):
        with pytest.raises(ConfigError, match="neither PROPOSER nor"):
            DrafterSpec.parse(text)


def test_each_drafter_is_a_contender_of_its_own_beside_all_together() -> None:
    assert config("lookup").methods == {"outrider": (0,)}
    assert config("lookup", "language-model=a", "language-model=b").methods == {
        "outrider": (0, 1, 2),
        "outrider-lookup": (0,),
        "outrider-language-model": (1,),
        "outrider-language-model-3": (2,),
    }
    assert config("lookup", "lookup", each=False).methods == {"outrider": (0, 1)}
    # Names become names of files.
    assert (
        "outrider-cascade-lookup-recycling" in config("cascade:lookup,recycling", "lookup").methods
    )


def test_only_all_together_have_the_verifiers_own_guesses_beside_them() -> None:
    together = orchestrator_command("outrider", ["a:1", "b:2"])
    assert together[-4:] == ["--drafter", "a:1", "--drafter", "b:2"]
    assert "--no-own-guesses" not in together
    alone = orchestrator_command("outrider-lookup", ["a:1"])
    assert set(alone) - set(together) == {"--no-own-guesses"}


def test_unknown_peers_are_refused_by_name() -> None:
    assert names_of("") == ()
    assert names_of("vllm, hf") == ("vllm", "hf")
    assert len(names_of("all")) == 10
    with pytest.raises(ConfigError, match="unknown peer 'vlm'"):
        names_of("hf,vlm")
