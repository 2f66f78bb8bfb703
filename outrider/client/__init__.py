"""Client library: generate text through an orchestrator, asyncio and sync.

    with Client("localhost:50050") as client:
        for event in client.generate(Request(chat=[("user", "Hello!")], temperature=0)):
            if isinstance(event, Delta):
                print(event.text, end="")

Errors are those of `outrider.errors`: a wrong field raises `InvalidRequest`, a full service
`Exhausted`, an unreachable one `Unavailable`.
"""

from outrider.client.asynchronous import AsyncClient
from outrider.client.blocking import Client
from outrider.client.collecting import Collector
from outrider.client.types import (
    Completion,
    Delta,
    Event,
    Finished,
    PromptTokens,
    Request,
    Started,
    Worker,
)

__all__ = [
    "AsyncClient",
    "Client",
    "Collector",
    "Completion",
    "Delta",
    "Event",
    "Finished",
    "PromptTokens",
    "Request",
    "Started",
    "Worker",
]
