"""Whether prefix hits are found through Redis: one orchestrator computes, another one is asked."""

from __future__ import annotations

import asyncio
import random
import re
import time

from outrider.client import AsyncClient, Request
from outrider.errors import OutriderError

PROMPT_TOKENS = 160
_POLL_S = 0.05
_HOLDS = re.compile(r"holds (\d+) tokens")


class HitProbe:
    """Plants texts that only one orchestrator has seen, and asks another one who holds them.

    What the other one knows it has from Redis. With one orchestrator nothing is probed.
    """

    def __init__(self, endpoints: list[str], seed: int) -> None:
        self._clients = [AsyncClient(endpoint) for endpoint in endpoints[:2]]
        self._chance = random.Random(seed + 2)
        self._planted: Request | None = None

    async def aclose(self) -> None:
        """Close the connections."""
        for client in self._clients:
            await client.close()

    async def plant(self, timeout_s: float = 30.0) -> bool:
        """Have a new text computed, and wait until it is known where."""
        ids = tuple(self._chance.randrange(32, 127) for _ in range(PROMPT_TOKENS))
        self._planted = Request(token_ids=ids, temperature=0, tokens_max=1, speculation=False)
        if len(self._clients) < 2:
            return True
        await self._clients[0].complete(self._planted, timeout_s=timeout_s)
        return await self.recovered(timeout_s)

    async def recovered(self, timeout_s: float) -> bool:
        """Wait until the planted text is found; False if it is not."""
        deadline_s = time.monotonic() + timeout_s
        while not await self.found():
            if time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def found(self) -> bool:
        """Whether the other orchestrator knows a verifier that holds the planted text."""
        if len(self._clients) < 2:
            return True
        assert self._planted is not None, "plant() comes first"
        try:
            workers = await self._clients[1].workers(self._planted)
        except OutriderError:
            return False
        held = [match for worker in workers if (match := _HOLDS.search(worker.placement))]
        return any(int(match[1]) > 0 for match in held)
