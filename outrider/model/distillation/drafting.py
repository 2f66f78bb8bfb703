"""Running a distilled drafter: a `LanguageModel` over the target's whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from outrider.model.kv_cache import KvPool
from outrider.model.language_model import ModelIdentity, TransformersModel
from outrider.model.step_inputs import StepInputs


class DistilledModel(TransformersModel):
    """A student whose logits stand at the target's ids; the others' are minus infinity.

    Noise and ranking go by the target's ids, so the mapping comes before them.
    """

    def __init__(
        self, model: TransformersModel, identity: ModelIdentity, kept: Sequence[int], size: int
    ) -> None:
        """`model`: the student as it is, checked; `kept`: ids, below `size`, of its outputs."""
        super().__init__(model.module, identity)
        self.windows = model.windows
        self.vocabulary_size = size
        self.kept = torch.tensor(kept, device=self.device)
        """Ids of the outputs, ascending."""

    def run(self, inputs: StepInputs, pool: KvPool) -> torch.Tensor:
        """Compute a pass; returns the wanted logits, float32 [M, vocabulary]."""
        logits = super().run(inputs, pool)
        whole = logits.new_full((len(logits), self.vocabulary_size), -math.inf)
        return whole.index_copy_(1, self.kept, logits)
