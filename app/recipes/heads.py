"""Fewer attention heads, the same number in every block, so that the result is an ordinary checkpoint.

With grouped queries each head of keys and values serves a group of query heads. Engines take any number of groups and
any number of query heads as long as all groups have as many, and read the size of a head from the config's `head_dim`.
"""

from __future__ import annotations

from typing import Any

import torch

from app.errors import LaunchError
from app.recipes.choice import heads_to_keep, uniform_heads
from app.recipes.refit import grams, with_inputs, with_outputs
from app.recipes.work import Work

QUERIES, GROUPS = "queries", "groups"


def prune(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """Keeps in each block the heads with the highest importance: how much of the output comes from each on its own.

    That is the mean square of W_h x_h, for a head's activations x_h and its columns W_h of the output projection, and
    follows from the products of the activations: tr(W_h E[x_h x_h^T] W_h^T). Wanda's measure
    (https://arxiv.org/abs/2306.11695) would be its diagonal alone.
    """
    config = work.model.config
    before, groups, size = config.num_attention_heads, config.num_key_value_heads, work.blocks[0].self_attn.head_dim
    stay = uniform_heads(before, groups, parameters["share"], whole=_goes_whole(parameters["unit"]))
    _require_allowed(config, stay[0])
    outputs = [block.self_attn.o_proj for block in work.blocks]
    products = grams(work, outputs, parameters["samples"], parameters["tokens"], "measuring the importance of heads")
    kept, lost = [], []
    for number, (block, gram) in enumerate(zip(work.blocks, products, strict=True)):
        work.report("pruning heads", number, len(products))
        importance = head_importance(block.self_attn.o_proj.weight.data, gram, size)
        kept.append(heads_to_keep(importance, groups, stay))
        lost.append(round(1 - sum(importance[head] for head in kept[-1]) / sum(importance), 4))
        _keep(block.self_attn, kept[-1], size, gram if parameters["refit"] else None)
    config.head_dim, (config.num_attention_heads, config.num_key_value_heads) = size, stay
    return {"heads": stay[0], "of": before, "kept": kept, "importance_lost": lost}


def _goes_whole(unit: str) -> bool:
    """Raises LaunchError for what is no unit."""
    if unit not in (QUERIES, GROUPS):
        raise LaunchError(f"unit is {QUERIES} or {GROUPS}, not {unit!r}")
    return unit == GROUPS


def _require_allowed(config: Any, heads: int) -> None:
    """transformers, and so vLLM, reads no Llama whose heads do not divide its width, wherever `head_dim` stands."""
    if config.model_type == "llama" and config.hidden_size % heads:
        raise LaunchError(
            f"a llama of width {config.hidden_size} cannot have {heads} heads, only a number that divides it: "
            "choose another share"
        )


def head_importance(weight: torch.Tensor, gram: torch.Tensor, size: int) -> list[float]:
    """For each head of `size` inputs the mean square of its share of the output. See `prune`."""
    spans = [slice(start, start + size) for start in range(0, len(gram), size)]
    return [float((weight[:, span] @ gram[span, span] * weight[:, span]).sum()) for span in spans]


def _keep(attention: Any, heads: list[int], size: int, gram: torch.Tensor | None) -> None:
    """`heads` are query heads; of the keys and values stay those that one of them looks at."""
    group = attention.num_key_value_groups
    shared = sorted({head // group for head in heads})
    queries, keys = _places(heads, size), _places(shared, size)
    attention.q_proj = with_outputs(attention.q_proj, queries)
    attention.k_proj = with_outputs(attention.k_proj, keys)
    attention.v_proj = with_outputs(attention.v_proj, keys)
    attention.o_proj = with_inputs(attention.o_proj, queries, gram)
    attention.num_key_value_groups = len(heads) // len(shared)


def _places(heads: list[int], size: int) -> torch.Tensor:
    return torch.cat([torch.arange(head * size, (head + 1) * size) for head in heads])
