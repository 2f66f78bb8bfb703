"""Starts the peers that a run asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import usable_cores
from bench.peers.catalogue import NAMES, Target, start
from bench.peers.process import Peer, PeerError
from bench.spec.contenders import Layout
from outrider.errors import ConfigError

_PROMPT_TOKENS_MAX = 3_072


@dataclass(frozen=True, slots=True)
class Served:
    """What our own fleet serves, and so what the peers shall run."""

    model: str
    dtype: str
    draft_model: str | None
    cache_dir: Path

    @staticmethod
    def layout(model: str, cache_dir: Path) -> Layout:
        """How the orchestrator turns conversations into ids."""
        # Late: both take seconds, and most runs do without.
        from orchestrator.text import TextCodec
        from outrider.model.loading import resolve_model

        return TextCodec.from_files(resolve_model(model, cache_dir).tokenizer_files())

    def target(self, tokens_max: int) -> Target:
        """The same for peers; a distilled drafter as a folder that they can load."""
        from outrider.model.loading import resolve_model

        folder = resolve_model(self.model, self.cache_dir).folder
        return Target(
            folder,
            self.dtype,
            len(usable_cores()),
            _PROMPT_TOKENS_MAX + tokens_max,
            self._assistant(folder),
        )

    def _assistant(self, target_folder: Path) -> Path | None:
        from outrider.model.distillation.export import export_drafter
        from outrider.model.distillation.folder import is_distilled, read_folder
        from outrider.model.loading import resolve_model

        draft = self.draft_model
        if draft is None:
            return None
        if not is_distilled(draft):
            return resolve_model(draft, self.cache_dir).folder
        exported = self.cache_dir / "exported" / read_folder(Path(draft)).digest[:12]
        if not exported.exists():
            exported.parent.mkdir(parents=True, exist_ok=True)
            export_drafter(Path(draft), target_folder, exported, self.cache_dir)
        return exported


def names_of(text: str) -> tuple[str, ...]:
    """Read "all", or names with commas between. Raises `ConfigError`."""
    if text == "all":
        return NAMES
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise ConfigError(f"peers: unknown peer {unknown[0]!r}; there are {', '.join(NAMES)}")
    return names


def start_peers(
    names: Sequence[str],
    served: Served,
    tokens_max: int,
    stack: contextlib.ExitStack,
    advance: Callable[[str], None],
    failed: Callable[[str, str], None],
) -> list[Peer]:
    """Start peers one after the other; `failed` hears who did not start and why."""
    if not names:
        return []
    target = served.target(tokens_max)
    found = []
    for name in names:
        advance(f"starting {name} (may compile for minutes)")
        try:
            peer = start(name, target)
        except PeerError as error:
            failed(name, str(error))
        else:
            stack.callback(peer.close)
            found.append(peer)
    return found
