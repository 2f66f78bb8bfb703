"""One model over several processes of a pod, each with a share of every layer's heads.

    torchrun --standalone --nproc-per-node 2 -m verifier_service --model ...

Rank 0 has the engine and its edge, and leads; the other ranks follow. What a pass needs is plain
data (`StepInputs`), and so is what moves keys and values within a pool, so followers know nothing
of sessions: they receive an order, do what the leader does with their own share of weights and KV,
and wait for the next. Weights are split as transformers' own plan for the model says (Megatron's
scheme, arXiv 1909.08053), which also makes the logits whole again.

Orders go over gloo; tensors over NCCL between GPUs. All ranks load alike, without orders. From
then on a rank that fails ends all of them: the others could only wait for it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import weakref
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from outrider.errors import ModelLoadError
from outrider.model.kv_cache import KvPool
from outrider.model.language_model import ModelIdentity, TransformersModel
from outrider.model.step_inputs import StepInputs

_log = logging.getLogger(__name__)

_LOAD_TIMEOUT = timedelta(hours=2)
"""For one rank to wait for another that is still reading weights."""

_ORDER_TIMEOUT = timedelta(days=3650)
"""A verifier may be idle for long; a leader that has died is noticed by its closed connection."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that share a model, as one of them sees it."""

    rank: int
    size: int
    mesh: DeviceMesh
    """For tensors."""
    orders: dist.ProcessGroup
    """For what the leader tells."""


def ranks_started() -> tuple[int, int]:
    """Return (rank, number of processes) as torchrun has set them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks(device: torch.device) -> Ranks | None:
    """Meet the other processes, if torchrun has started several. Waits for all of them.

    Where `device` is a GPU, each takes the one of its own number, which is the current one then.
    """
    rank, size = ranks_started()
    if size == 1:
        return None
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=_LOAD_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    orders = dist.new_group(backend="gloo", timeout=_ORDER_TIMEOUT)
    assert isinstance(orders, dist.ProcessGroup)
    return Ranks(rank, size, init_device_mesh(device.type, (size,)), orders)


def accelerator_type() -> str:
    """Kind of device for which transformers splits weights while it reads them."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def check_divisible(config: Any, ranks: Ranks) -> None:
    """Refuse a model whose heads cannot be dealt out evenly. Raises ModelLoadError."""
    text = config.get_text_config(decoder=True)
    heads: int = text.num_attention_heads
    counts = {
        "attention heads": heads,
        "key-value heads": getattr(text, "num_key_value_heads", None) or heads,
    }
    for name, count in counts.items():
        if count % ranks.size:
            raise ModelLoadError(
                f"its {count} {name} cannot be split evenly over {ranks.size} ranks"
            )


def distributed_config(ranks: Ranks) -> DistributedConfig:
    """What transformers takes to read a rank's share of the weights only."""
    return DistributedConfig(tp_size=ranks.size, tp_plan="auto")


def shard_module(module: PreTrainedModel, ranks: Ranks) -> None:
    """Keep this rank's share of a module that every rank has whole, by the model's own plan."""
    try:
        plan, _, _ = module._resolve_parallel_plans(distributed_config(ranks))
    except ValueError as error:
        raise ModelLoadError(f"it cannot be split over processes: {error}") from error
    apply_tensor_parallelism(module, ranks.mesh, plan)


def own_shares(module: PreTrainedModel) -> None:
    """Let go of what other ranks keep: a share may be a view into all of a weight."""
    owned: dict[int, torch.nn.Parameter] = {}  # by weight, as several layers may share one
    for child in module.modules():
        for name, weight in list(child._parameters.items()):
            if not isinstance(weight, DTensor):
                continue
            if id(weight) not in owned:
                share = weight.to_local()
                whole = DTensor.from_local(
                    share.clone() if share.untyped_storage().nbytes() > share.nbytes else share,
                    weight.device_mesh,
                    weight.placements,
                    run_check=False,
                    shape=weight.shape,
                    stride=weight.stride(),
                )
                owned[id(weight)] = torch.nn.Parameter(whole, requires_grad=False)
            child._parameters[name] = owned[id(weight)]


# --- orders -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewPool:
    """Allocate a pool, and forget those that the leader has let go."""

    number: int
    tokens_max: int
    alive: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Compute a pass."""

    pool: int
    inputs: StepInputs


@dataclass(frozen=True, slots=True)
class Move:
    """Copy slots of a pool."""

    pool: int
    sources: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stop:
    """The leader has ended in order."""


Order: TypeAlias = NewPool | Run | Move | Stop


class ShardedModel(TransformersModel):
    """A rank's share of a model. Until `lead` or `follow`, all ranks must call alike."""

    def __init__(self, module: PreTrainedModel, identity: ModelIdentity, ranks: Ranks) -> None:
        super().__init__(module, identity)
        self.ranks = ranks
        self.layout = dataclasses.replace(self.layout, kv_heads=self.layout.kv_heads // ranks.size)
        self._leads = False
        self._pools: weakref.WeakValueDictionary[int, KvPool] = weakref.WeakValueDictionary()
        self._pools_made = 0

    def lead(self) -> None:
        """From now on, tell the other ranks what this one does. For rank 0."""
        self._leads = True

    def new_pool(self, tokens_max: int | None = None) -> KvPool:
        """Allocate a pool; the leader has its followers do so too."""
        if not self._leads:
            return super().new_pool(tokens_max)
        pool = _LedPool(self, super().new_pool(tokens_max), self._pools_made)
        self._pools_made += 1
        self.tell(NewPool(pool.number, pool.tokens_max, tuple(self._pools)))
        self._pools[pool.number] = pool
        return pool

    def run(self, inputs: StepInputs, pool: KvPool) -> torch.Tensor:
        """Compute this rank's share of a pass; the logits are whole on every rank."""
        if not self._leads:
            return super().run(inputs, pool)
        assert isinstance(pool, _LedPool)
        self.tell(Run(pool.number, inputs))
        try:
            return super().run(inputs, pool)
        except Exception as error:  # whatever it was: the followers are out of step
            self.lost(error)
            raise

    def tell(self, order: Order) -> None:
        """Give an order to all followers."""
        try:
            dist.broadcast_object_list([order], src=0, group=self.ranks.orders)
        except RuntimeError as error:
            self.lost(error)
            raise

    def lost(self, error: Exception) -> None:
        """End the process: without all ranks in step there is no model. Does not return.

        Sessions are placed anew by their orchestrators, as when a verifier dies otherwise.
        """
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        _log.critical("a rank of the model is lost, so this verifier ends: %s", reason)
        os._exit(1)

    def dismiss(self) -> None:
        """End the followers in order."""
        self.tell(Stop())
        dist.destroy_process_group()

    def follow(self) -> None:
        """Obey the leader until it ends. Raises RuntimeError if it ends without saying so."""
        pools: dict[int, KvPool] = {}
        while True:
            match self._next_order():
                case NewPool(number, tokens_max, alive):
                    pools = {key: pools[key] for key in alive}
                    pools[number] = super().new_pool(tokens_max)
                case Run(number, inputs):
                    super().run(inputs, pools[number])
                case Move(number, sources, targets):
                    pools[number].move(sources, targets)
                case Stop():
                    break
        dist.destroy_process_group()

    def _next_order(self) -> Order:
        received: list[Any] = [None]
        dist.broadcast_object_list(received, src=0, group=self.ranks.orders)
        order: Order = received[0]
        return order


class _LedPool(KvPool):
    """The leader's pool: what happens to it happens to its followers' too."""

    shared_out = True

    def __init__(self, model: ShardedModel, pool: KvPool, number: int) -> None:
        # Takes over the memory of a plain pool.
        self.__dict__.update(pool.__dict__)
        self.number = number
        self._model = model

    def move(self, sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> None:
        """Copy slots on all ranks."""
        self._model.tell(Move(self.number, sources, targets))
        super().move(sources, targets)


def ignore_signals() -> None:
    """Outlive what a group of processes is sent to stop it: the leader says when to end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
