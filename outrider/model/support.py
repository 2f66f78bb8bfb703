"""What a model must be like to be run here: checked before it serves, never assumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from outrider.errors import ModelLoadError
from outrider.model import attention
from outrider.model.language_model import Row, TransformersModel

# Their frequencies depend on the longest position of the batch, so a row would depend on its
# company, and keys computed earlier would be wrong later.
_ROPE_TYPES_REFUSED = frozenset({"dynamic", "longrope"})

# Largest difference (root mean square) between our logits and those of transformers' own
# attention, in units of the logits' spread. Wrong attention is off by about 1; what rounding
# amounts to was measured as 4e-6 in float32 and 0.03 in bfloat16 (SmolLM2-135M).
_DEVIATION_MAX = {torch.float32: 0.001, torch.float16: 0.05, torch.bfloat16: 0.2}


def check_config(config: Any) -> None:
    """Refuse, before any weights are read, what a configuration rules out.

    `config` is the model's PreTrainedConfig. Raises ModelLoadError with the reason.
    """
    text = config.get_text_config(decoder=True)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelLoadError("its weights are quantized, which is not supported")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelLoadError("it is an encoder-decoder model; only causal ones are supported")
    for name in ("num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        if not isinstance(getattr(text, name, None), int):
            raise ModelLoadError(f"its configuration does not state {name}")
    rope = getattr(text, "rope_parameters", None) or {}
    # Some models have one set of parameters per kind of layer.
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in _ROPE_TYPES_REFUSED:
            raise ModelLoadError(
                f"its rotary embedding is of type '{parameters['rope_type']}', which depends on"
                " the whole batch and is not supported"
            )


def check_windows(config: Any, windows: Sequence[int | None], length_max: int) -> None:
    """Refuse a model whose configuration narrows a layer's view, while its attention does not say.

    Sliding windows are supported where each layer hands its own to the attention interface, as
    `windows` shows. Some architectures narrow the mask alone, which is not used here: they would
    be right up to the window's width and wrong for longer texts. Raises ModelLoadError.
    """
    text = config.get_text_config(decoder=True)
    stated = getattr(text, "sliding_window", None)
    narrow = isinstance(stated, int) and 0 < stated < length_max
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        if narrow and getattr(text, "use_sliding_window", True) and not any(windows):
            raise ModelLoadError(
                f"it attends within a sliding window of {stated} tokens, less than its maximum"
                f" length of {length_max}, but its layers do not hand it to their attention"
            )
        return
    for layer, (kind, window) in enumerate(zip(kinds, windows, strict=False)):
        if kind == "sliding_attention" and narrow and window is None:
            raise ModelLoadError(
                f"its layer {layer} has a sliding window of {stated} tokens, less than its"
                f" maximum length of {length_max}, but does not hand it to its attention"
            )
        if kind == "chunked_attention":
            raise ModelLoadError(
                f"its layer {layer} attends within chunks of the text, which is not supported"
            )


def check_model(model: TransformersModel) -> None:
    """Run a small pass and see that every layer uses our attention, and rightly so.

    Raises ModelLoadError with the reason if the architecture needs something that ours does not
    do, or if the logits differ from those that transformers computes by itself.
    """
    check_config(model.module.config)
    try:
        model.probe()
        check_windows(model.module.config, model.windows, model.length_max)
        ours, theirs = _our_logits(model), _their_logits(model)
    except ModelLoadError:
        raise
    except Exception as error:  # whatever a module does when it is called as it does not expect
        raise ModelLoadError(f"its forward pass fails: {type(error).__name__}: {error}") from error
    deviation = float((ours - theirs).square().mean().sqrt() / theirs.std())
    # Written so that NaN is refused.
    if not deviation <= _DEVIATION_MAX[model.layout.dtype]:
        raise ModelLoadError(
            "its logits differ from those of transformers' own attention by"
            f" {deviation:.2g} standard deviations"
        )


_PREFIX_SIZE = 3
_TREE_PARENTS = (-1, -1, 1)


def _tokens(model: TransformersModel) -> tuple[list[int], list[int]]:
    """A prefix, and a tree after it whose second and first token compete, the third follows.

    From the middle of the vocabulary: special tokens, at either end, meet extreme activations.
    """
    first = model.vocabulary_size // 2
    tokens = [first + index for index in range(_PREFIX_SIZE + len(_TREE_PARENTS))]
    return tokens[:_PREFIX_SIZE], tokens[_PREFIX_SIZE:]


def _our_logits(model: TransformersModel) -> torch.Tensor:
    """[6, vocabulary]: the prefix's, then the tree's."""
    prefix, tree = _tokens(model)
    cache = model.new_pool(_PREFIX_SIZE + len(_TREE_PARENTS)).new_cache()
    try:
        return torch.cat(
            [
                model.forward([Row(cache, prefix, None, range(len(prefix)))]),
                model.forward([Row(cache, tree, _TREE_PARENTS, range(len(tree)))]),
            ]
        )
    finally:
        cache.release()


def _their_logits(model: TransformersModel) -> torch.Tensor:
    """The same, from plain passes over each path of the tree with transformers' attention."""
    module: Any = model.module
    prefix, tree = _tokens(model)
    module.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            paths = [[*prefix, tree[0]], [*prefix, *tree[1:]]]
            short, long = (
                module(torch.tensor([path], device=model.device), use_cache=False).logits[0].float()
                for path in paths
            )
    finally:
        module.set_attn_implementation(attention.ATTENTION)
    return torch.cat([short, long[len(prefix) :]])
