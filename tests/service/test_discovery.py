"""An orchestrator finds its workers through the Kubernetes API, as KUBECONFIG says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import yaml

from orchestrator.app import _cluster
from orchestrator.config import DriverConfig
from orchestrator.driver import Driver
from orchestrator.fleet import Fleet
from outrider.errors import ConfigError
from tests.support.api_clusters import FakeCluster, test_cluster

DEADLINE_S = 20.0


async def test_workers_are_found_and_new_ones_as_they_come(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with test_cluster("fake") as there:
        assert isinstance(there, FakeCluster)
        named = {
            "clusters": [{"name": "c", "cluster": {"server": there.server.url}}],
            "users": [{"name": "u", "user": {"token": "secret"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        file = tmp_path / "config"
        file.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **named}))
        monkeypatch.setenv("KUBECONFIG", str(file))
        fleet = Fleet("test")
        driver = Driver(fleet, DriverConfig())
        driver.start()
        try:
            await there.put_slice("v-1", "verifier", ["127.0.0.1"])
            async with _cluster("kubernetes:outrider", fleet):
                async with asyncio.timeout(DEADLINE_S):
                    while "127.0.0.1:7000" not in fleet.verifiers:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                    await there.put_slice("d-1", "drafter", ["127.0.0.2"])
                    while "127.0.0.2:7000" not in fleet.drafters:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
        finally:
            await driver.close()


async def test_what_cannot_be_followed_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="KUBECONFIG"):
        async with _cluster("kubernetes:outrider", Fleet("test")):
            pass
    with pytest.raises(ConfigError, match="--discover"):
        async with _cluster("consul:outrider", Fleet("test")):
            pass
