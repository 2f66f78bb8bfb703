"""Language model: any causal model with the target's tokenizer grows a tree, best leaf first.

Each step gathers the most probable unexpanded leaves over all sessions into one ragged forward
pass and attaches the best children of each (the dynamic tree of EAGLE-2, arXiv 2406.16858, and
Sequoia, arXiv 2402.12374, without a fixed shape). Nothing waits for verification: growth goes on
below what is being verified (PEARL, arXiv 2408.11850). Sampled sessions rank children by
log-probability plus the session's own Gumbel noise, which the target uses too (coupling:
Daliri et al., arXiv 2408.07978).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from drafter_service.calibration import ClaimCalibration
from drafter_service.mirror import Mirror
from drafter_service.proposers.frontier import Entry, Frontier
from drafter_service.proposers.leaf_queue import Leaf, LeafQueue, Offer, turns
from outrider.config import Quantize
from outrider.domain import DraftBudget, ModelInfo, SamplingParams
from outrider.draft_tree import Advance, Node
from outrider.kv_blocks import BlockPool
from outrider.model.distillation.drafting import DistilledModel
from outrider.model.info import model_info
from outrider.model.kv_cache import SessionCache
from outrider.model.language_model import LanguageModel, Row
from outrider.model.loading import Device, Dtype, load_language_model
from outrider.model.ranking import Guesses, ranked_guesses
from outrider.model.threads import set_threads

_PROBABILITY_MIN = 1e-30
"""Of a path, whatever a budget says."""
_SHORT_TOKENS = 32
"""Missing tokens up to which a session comes before whoever misses more: a commit, not a prompt."""
_PROMPTS_PART = 4
"""One such part of a step's committed tokens is for prompts, if there are any."""


@dataclass(slots=True)
class _State:
    cache: SessionCache
    slot_of: dict[Node, int] = field(default_factory=dict)
    """KV slot of each expanded node below the root."""
    frontier: Frontier | None = None
    """The others, unless something has happened to the tree since."""
    said: dict[Node, Guesses] = field(default_factory=dict)
    """What the model said of the children of each node that it has expanded, the root included."""
    root: Node | None = None
    """Of the tree, as of the last commit that was followed."""
    used_step: int = 0
    """Step that computed something for it last."""
    rest: tuple[Node, DraftBudget, int] | None = None
    """Root, budget and room of the tree for which there was nothing left to do."""

    def rests(self, mirror: Mirror) -> bool:
        """True while nothing has happened since there was nothing left to do."""
        rest = self.rest
        return (
            rest is not None
            and rest[0] is mirror.tree.root
            and rest[1] is mirror.budget
            and rest[2] == mirror.room
        )


@dataclass(frozen=True, slots=True)
class _Growth:
    """What a row of a pass is for."""

    mirror: Mirror
    nodes: Sequence[tuple[float, Node]]
    """(path log-probability, node) whose children the wanted logits give."""


class LanguageModelProposer:
    """Guesses with a draft model."""

    def __init__(
        self,
        model: LanguageModel,
        info: ModelInfo,
        *,
        leaves_max: int = 8,
        width: int = 3,
        prefill_tokens_max: int = 256,
        kv_tokens_max: int | None = None,
        queue: LeafQueue | None = None,
        learning: bool = True,
    ) -> None:
        """`queue` orders the work; without `learning`, claims are what the model says."""
        self._model = model
        self._kept = model.kept if isinstance(model, DistilledModel) else None
        self._pool = model.new_pool(kv_tokens_max)
        self._step = 0
        self._info = info
        self._leaves_max = leaves_max
        self._width = width
        self._prefill_tokens_max = prefill_tokens_max
        self._queue = queue or LeafQueue()
        self._calibration = ClaimCalibration()
        self._learning = learning
        self._states: dict[tuple[int, int], _State] = {}
        self._meanwhile: Callable[[], None] | None = None

    @property
    def info(self) -> ModelInfo:
        """The draft model's identity."""
        return self._info

    @property
    def leaves_max(self) -> int:
        """Leaves, over all sessions, that a step expands."""
        return self._leaves_max

    @property
    def blocks(self) -> BlockPool:
        """The books of its KV."""
        return self._pool.blocks

    def open(self, mirror: Mirror) -> None:
        """Begin with the KV that earlier sessions left of the text's beginning, if any."""
        cache = self._pool.new_cache(mirror.spec.cache_salt)
        self._states[mirror.key] = _State(cache, root=mirror.tree.root)

    def overlap(self, work: Callable[[], None]) -> bool:
        """Do `work` in each step while the model computes; see `Overlapping`."""
        self._meanwhile = work
        return True

    def advanced(self, mirror: Mirror, tokens: Sequence[int], advance: Advance) -> None:
        """Keep the KV of the surviving path; a miss costs only the committed tokens."""
        state = self._states[mirror.key]
        self._learn(state, mirror, tokens, advance)
        path: list[int] = []
        for node in advance.matched:
            slot = state.slot_of.get(node)
            if slot is None:
                break
            path.append(slot)
        # Nodes live below the new root only if the whole path had been expanded or guessed;
        # expanded ones imply that their ancestors, the new root included, were expanded too.
        # In the order of their slots, so that few are moved.
        survivors = [node for node in state.slot_of if node.parent is not None]
        keep = [state.slot_of[node] for node in survivors]
        moved = state.cache.advance(path, keep)
        state.slot_of = {node: moved[state.slot_of[node]] for node in survivors}
        state.root = root = mirror.tree.root
        state.said = {
            node: said
            for node, said in state.said.items()
            if node.parent is not None or node is root
        }

    def _learn(
        self, state: _State, mirror: Mirror, tokens: Sequence[int], advance: Advance
    ) -> None:
        """Take note of which guesses were right, of those whose parents were committed."""
        if not self._learning:
            return
        sampled = not mirror.spec.sampling.greedy
        for parent, token in zip((state.root, *advance.matched), tokens, strict=False):
            guesses = state.said.get(parent, ()) if parent is not None else ()
            for rank, (guess, logprob) in enumerate(guesses):
                self._calibration.observe(sampled, rank, logprob, guess == token)

    def close(self, mirror: Mirror) -> None:
        """Free the KV."""
        state = self._states.pop(mirror.key, None)
        if state is not None:
            state.cache.release()

    def grow(self, mirrors: Sequence[Mirror]) -> bool:
        """One forward pass: committed tokens that are missing, and the best leaves."""
        rows, growths = self._plan(mirrors)
        if not rows:
            return False
        logits = self._model.forward(rows, self._meanwhile)
        for growth in growths:
            self._states[growth.mirror.key].cache.publish(growth.mirror.log.tokens)
        samplings: list[SamplingParams] = []
        seeds: list[int] = []
        positions: list[int] = []
        for growth in growths:
            spec, count = growth.mirror.spec, len(growth.nodes)
            samplings += [spec.sampling] * count
            seeds += [spec.seed] * count
            # A node at index i of the sequence is followed by the token at index i + 1.
            positions += [node.position + 1 for _, node in growth.nodes]
        if positions:
            guesses = iter(
                ranked_guesses(logits, samplings, seeds, positions, self._width, self._kept)
            )
            for growth in growths:
                self._attach(growth, guesses)
        return True

    def _attach(self, growth: _Growth, guesses: Iterator[Guesses]) -> None:
        """Give the nodes their children; consumes one guess for each."""
        mirror = growth.mirror
        state = self._states[mirror.key]
        width, sampled = mirror.budget.width_max, not mirror.spec.sampling.greedy
        # What the model says of siblings is not what it has turned out to mean.
        claims: Callable[[Guesses], Guesses] = list
        if self._learning:
            claims = partial(self._calibration.claims, sampled)
        for path_logprob, node in growth.nodes:
            state.said[node] = said = next(guesses)[:width]
            wanted = claims(said)
            if node.children:
                for token, logprob in wanted:
                    mirror.attach(node, token, logprob)
                state.frontier = None  # claims may have risen
                continue
            children = mirror.expand(node, wanted)
            if state.frontier is not None:
                state.frontier.add_children(children, path_logprob - node.path_logprob)

    def _plan(self, mirrors: Sequence[Mirror]) -> tuple[list[Row], list[_Growth]]:
        rows: list[Row] = []
        growths: list[_Growth] = []
        ready: list[Mirror] = []
        behind: list[Mirror] = []
        self._step += 1
        for mirror in mirrors:
            state = self._states[mirror.key]
            # First: who rests without KV is not to have it computed again for nothing.
            if state.rests(mirror) or len(mirror.log) + 1 >= self._model.length_max:
                continue
            if len(mirror.log) > state.cache.prefix_length:
                behind.append(mirror)
            else:
                ready.append(mirror)
        if behind:
            self._catch_up(behind, rows, growths)
        for mirror, entries in _by_mirror(self._queue.take(self._offers(ready), self._leaves_max)):
            state = self._states[mirror.key]
            # Room for a better one may have cost this one its KV.
            lost = len(mirror.log) > state.cache.prefix_length
            if lost or not self._make_room(state, len(entries)):
                self._give_back(mirror, entries)
                continue
            nodes = [node for _, _, node in entries]
            rows.append(self._tree_row(mirror, nodes))
            growths.append(_Growth(mirror, [(-negated, node) for negated, _, node in entries]))
        return rows, growths

    def _catch_up(self, behind: Sequence[Mirror], rows: list[Row], growths: list[_Growth]) -> None:
        """Compute committed tokens that are missing: a tip is surer than any guess.

        Commits come first, longest waiting first; then prompts, tenants taking turns.
        """
        commits, prompts = turns(
            (
                (mirror, len(mirror.log) - state.cache.prefix_length, state.used_step)
                for mirror, state in ((m, self._states[m.key]) for m in behind)
            ),
            min(_SHORT_TOKENS, self._prefill_tokens_max),
        )
        # Prompts have a part that commits cannot take from them.
        kept = self._prefill_tokens_max // _PROMPTS_PART if prompts else 0
        left = self._prefill_tokens_max - kept
        for mirrors, more in ((commits, 0), (prompts, kept)):
            left += more
            for mirror in mirrors:
                if left <= 0:
                    break
                state = self._states[mirror.key]
                if not state.cache.prefix_length:
                    state.cache.adopt(mirror.log.tokens)
                pending = mirror.log.since(state.cache.prefix_length)
                chunk = pending[:left]
                if not self._make_room(state, len(chunk)):
                    continue
                left -= len(chunk)
                done = len(chunk) == len(pending)
                rows.append(Row(state.cache, chunk, None, [len(chunk) - 1] if done else []))
                growths.append(_Growth(mirror, [(0.0, mirror.tree.root)] if done else []))

    def _give_back(self, mirror: Mirror, entries: Sequence[Entry]) -> None:
        frontier = self._states[mirror.key].frontier
        if frontier is not None:
            for entry in entries:
                frontier.give_back(entry)

    def _make_room(self, state: _State, tokens: int) -> bool:
        """Reserve room for more tokens, dropping the KV of mirrors that were idle longest.

        What is dropped is rebuilt when its mirror's turn comes.
        """
        cache, blocks = state.cache, self._pool.blocks
        needed = cache.blocks_needed(tokens)
        while needed > blocks.available:
            idle = [s for s in self._states.values() if s.used_step < self._step and s.cache.blocks]
            idle = [other for other in idle if other is not state]
            if not idle:
                return False
            victim = min(idle, key=lambda other: other.used_step)
            victim.cache.clear()
            victim.slot_of.clear()
            victim.frontier = None
        cache.reserve(cache.prefix_length + cache.tree_size + tokens)
        state.used_step = self._step
        return True

    def _offers(self, ready: Sequence[Mirror]) -> Iterator[Offer]:
        """Say who has room for more, and let the others rest."""
        width = max(1, self._width)
        for mirror in ready:
            # Room for a chunk may have cost it its KV.
            if len(mirror.log) > self._states[mirror.key].cache.prefix_length:
                continue
            state = self._states[mirror.key]
            # Each must get a child at least: one that is expanded without stays barren for good.
            leaves_max = math.ceil(mirror.room / max(1, min(width, mirror.budget.width_max)))
            frontier = self._frontier(state, mirror)
            if leaves_max <= 0 or frontier.best is None:
                state.rest = (mirror.tree.root, mirror.budget, mirror.room)
            else:
                yield Offer(mirror, frontier, leaves_max)

    def _frontier(self, state: _State, mirror: Mirror) -> Frontier:
        deepest = mirror.tree.root.position + mirror.budget.depth_max
        deepest = min(deepest, self._model.length_max - 1)
        least = math.log(max(_PROBABILITY_MIN, mirror.budget.probability_min))
        frontier = state.frontier
        if frontier is None or not frontier.serves(mirror.tree.root, least, deepest):
            frontier = state.frontier = Frontier(
                mirror.tree, state.slot_of, logprob_min=least, deepest=deepest
            )
        return frontier

    def _tree_row(self, mirror: Mirror, nodes: list[Node]) -> Row:
        state = self._states[mirror.key]
        parents: list[int] = []
        slot = state.cache.tree_size
        for node in nodes:
            parent = node.parent
            assert parent is not None, "the root is expanded by its committed tokens"
            parents.append(-1 if parent is mirror.tree.root else state.slot_of[parent])
            state.slot_of[node] = slot
            slot += 1
        return Row(state.cache, [n.token for n in nodes], parents, range(len(nodes)))


def load_language_model_proposer(
    spec: str,
    *,
    dtype: Dtype,
    quantize: Quantize,
    device: Device,
    compiled: bool,
    cache_dir: Path,
    target: str | None = None,
    threads: int,
    leaves_max: int,
    kv_tokens_max: int | None,
) -> LanguageModelProposer:
    """Load a draft model; `target` is where a distilled one borrows. Raises `ModelLoadError`."""
    set_threads(threads)
    model = load_language_model(
        spec,
        dtype=dtype,
        quantize=quantize,
        device=device,
        compiled=compiled,
        cache_dir=cache_dir,
        target=target,
    )
    info = model_info(model, proposer="language-model")
    return LanguageModelProposer(model, info, leaves_max=leaves_max, kv_tokens_max=kv_tokens_max)


def _by_mirror(leaves: Sequence[Leaf]) -> list[tuple[Mirror, list[Entry]]]:
    grouped: dict[int, tuple[Mirror, list[Entry]]] = {}
    for mirror, entry in leaves:
        group = grouped.get(id(mirror))
        if group is None:
            group = grouped[id(mirror)] = mirror, []
        group[1].append(entry)
    return list(grouped.values())
