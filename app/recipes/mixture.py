"""Mixtures of experts: made from a dense model, pruned, told how many experts a token gets.

Mixtral is the target because a Llama fits into it exactly: no norm of queries and keys, no bias, and weights of the
chosen experts that sum to one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cosine_similarity, linear, normalize
from transformers import MixtralConfig, MixtralForCausalLM

from app.errors import LaunchError
from app.recipes.choice import most
from app.recipes.clustering import balanced, directions
from app.recipes.work import Work, observed

COPIED, PARTITIONED = "copied", "partitioned"
# The router's rows have this length over the inputs' mean length, so that its scores are cosines times this: of two
# experts 0.1 apart in cosine the nearer one gets twice the weight of the other.
ROUTER_GAIN = 7.0


def upcycle(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """Sparse upcycling (https://arxiv.org/abs/2212.05055).

    Copied experts give exactly the dense model's output wherever the router sends a token. Partitioned ones hold a part
    of the channels each (https://arxiv.org/abs/2306.00640), clustered by the tokens that they are active on.
    """
    experts, active, mlps = parameters["experts"], parameters["active"], parameters["mlps"]
    _check(work.model.config, experts, active, mlps)
    dense = work.model
    mixture = _empty_like(dense, experts, active, dense.config.intermediate_size // (experts if mlps != COPIED else 1))
    inputs = _inputs(work, parameters["samples"], parameters["tokens"])
    shares = []
    for number, (source, target) in enumerate(zip(dense.model.layers, mixture.model.layers, strict=True)):
        work.report("clustering tokens", number, len(inputs))
        seed = parameters["seed"] + number
        rows = (_copy if mlps == COPIED else _partition)(source.mlp, target.mlp, inputs[number], experts, seed)
        target.mlp.gate.weight.data = rows * ROUTER_GAIN / float(inputs[number].norm(dim=-1).mean())
        shares.append(_shares(rows, inputs[number]))
        if mlps == PARTITIONED:
            _rescale(source.mlp, target.mlp, inputs[number])
    work.model = mixture
    return {"first_choices": shares}


def keep_experts(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """Keeps the experts of highest importance in each block, and cuts the router to them.

    EASY-EP (https://arxiv.org/abs/2504.06792): over the tokens of domain text, the sum of the expert's weight times
    the norm of its output, times how much the block turns the token, 1 - cos(residual, residual + output).
    """
    config, keep = work.model.config, parameters["keep"]
    if not config.num_experts_per_tok <= keep < config.num_local_experts:
        raise LaunchError(
            f"of {config.num_local_experts} experts, {config.num_experts_per_tok} of them active, {keep} cannot be kept"
        )
    importance = _importance(work, parameters["samples"], parameters["tokens"])
    kept = [most(block.tolist(), keep) for block in importance]
    for block, chosen in zip(work.blocks, kept, strict=True):
        _cut(block.mlp, chosen)
    config.num_local_experts = keep
    shares = [round(float(one[chosen].sum() / one.sum()), 4) for one, chosen in zip(importance, kept, strict=True)]
    return {"kept": kept, "importance_kept": shares}


def set_active(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """How many experts a token gets. Only config.json says it."""
    config, active = work.model.config, parameters["active"]
    if not 1 <= active <= config.num_local_experts:
        raise LaunchError(f"a token cannot be sent to {active} of {config.num_local_experts} experts")
    config.num_experts_per_tok = active
    return {}


def _check(config: Any, experts: int, active: int, mlps: str) -> None:
    """Raises LaunchError for what Mixtral cannot be."""
    if mlps not in (COPIED, PARTITIONED):
        raise LaunchError(f"mlps is {COPIED} or {PARTITIONED}, not {mlps!r}")
    if not 1 <= active <= experts or experts < 2:
        raise LaunchError(f"a token cannot be sent to {active} of {experts} experts")
    if mlps == PARTITIONED and config.intermediate_size % (experts * 32):
        raise LaunchError(
            f"{config.intermediate_size} channels cannot be parted among {experts} experts in full blocks"
        )
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise LaunchError("a model with biases does not fit into Mixtral, which has none")


def _empty_like(dense: Any, experts: int, active: int, width: int) -> Any:
    """A Mixtral with the dense model's embeddings, attention and norms."""
    known = dense.config.to_dict()
    for name in ("architectures", "model_type", "transformers_version", "intermediate_size", "dtype"):
        known.pop(name, None)
    config = MixtralConfig(
        **{**known, "sliding_window": known.get("sliding_window")},
        intermediate_size=width,
        num_local_experts=experts,
        num_experts_per_tok=active,
    )
    config.name_or_path = dense.config.name_or_path
    mixture = MixtralForCausalLM(config).to(torch.float32).eval()
    shared = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    mixture.load_state_dict(shared, strict=False)
    mixture.generation_config = dense.generation_config
    return mixture


def _inputs(work: Work, samples: int, tokens: int) -> list[torch.Tensor]:
    """What each block's MLP takes, shape (tokens, width)."""
    seen: list[list[torch.Tensor]] = [[] for _ in work.blocks]

    def add(block: int, source: torch.Tensor, _target: torch.Tensor) -> None:
        seen[block].append(source)

    with observed((block.mlp for block in work.blocks), add):
        work.run(work.samples(samples, tokens), "reading the MLPs' inputs")
    return [torch.cat(parts).clone() for parts in seen]


def _copy(source: Any, target: Any, inputs: torch.Tensor, experts: int, seed: int) -> torch.Tensor:
    """Each expert is the whole MLP; the router's rows are the directions of the token clusters."""
    _fill(source, target, [torch.arange(source.gate_proj.out_features)] * experts)
    return directions(inputs, experts, seed)


def _partition(source: Any, target: Any, inputs: torch.Tensor, experts: int, seed: int) -> torch.Tensor:
    """Channels by the tokens that they are active on; a row is the mean direction of the tokens that a part is for."""
    with torch.no_grad():
        activity = (source.act_fn(source.gate_proj(inputs)) * source.up_proj(inputs)).abs()
    parts = balanced(activity.T * source.down_proj.weight.data.norm(dim=0)[:, None], experts, seed)
    _fill(source, target, list(parts))
    weight = torch.stack([activity[:, part].sum(dim=1) for part in parts], dim=1)
    preferred = (weight / weight.mean(dim=0)).argmax(dim=1)
    unit = normalize(inputs, dim=-1)
    means = torch.zeros(experts, unit.shape[1]).index_add_(0, preferred, unit)
    return normalize(means - unit.sum(dim=0) / experts, dim=-1)


def _fill(source: Any, target: Any, parts: list[torch.Tensor]) -> None:
    gate, up, down = (getattr(source, name).weight.data for name in ("gate_proj", "up_proj", "down_proj"))
    target.experts.gate_up_proj.data = torch.stack([torch.cat([gate[part], up[part]]) for part in parts])
    target.experts.down_proj.data = torch.stack([down[:, part] for part in parts]).contiguous()


def _rescale(source: Any, target: Any, inputs: torch.Tensor) -> None:
    """Parts that are left out make the sum too small: the factor that is best in the mean square goes into the rest."""
    with torch.no_grad():
        wanted, got = source(inputs), target(inputs[None])[0]
    target.experts.down_proj.data *= (wanted * got).sum() / (got * got).sum()


def _shares(rows: torch.Tensor, inputs: torch.Tensor) -> list[float]:
    """The share of tokens whose first choice each expert is."""
    chosen = linear(inputs, rows).argmax(dim=1).bincount(minlength=len(rows))
    return [round(share, 3) for share in (chosen / len(inputs)).tolist()]


def _importance(work: Work, samples: int, tokens: int) -> list[torch.Tensor]:
    """Of each block's experts, shape (experts,)."""
    found = [torch.zeros(work.model.config.num_local_experts) for _ in work.blocks]
    residual: dict[int, torch.Tensor] = {}

    def remember(block: int, source: torch.Tensor, _target: torch.Tensor) -> None:
        residual[block] = source

    def add(block: int, source: torch.Tensor, target: torch.Tensor) -> None:
        turned = 1 - cosine_similarity(residual[block], residual[block] + target, dim=-1)
        found[block] += _routed(work.blocks[block].mlp, source, turned)

    norms = [block.post_attention_layernorm for block in work.blocks]
    with observed(norms, remember), observed([block.mlp for block in work.blocks], add):
        work.run(work.samples(samples, tokens), "measuring the importance of experts")
    return found


def _routed(mlp: Any, inputs: torch.Tensor, token_weight: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of token weight x router weight x norm of the expert's output; shape (experts,)."""
    _, scores, indices = mlp.gate(inputs)
    sums = torch.zeros(mlp.gate.weight.shape[0])
    for expert in range(len(sums)):
        token, place = (indices == expert).nonzero(as_tuple=True)
        gate, up = linear(inputs[token], mlp.experts.gate_up_proj[expert]).chunk(2, dim=-1)
        output = linear(mlp.experts.act_fn(gate) * up, mlp.experts.down_proj[expert])
        sums[expert] = (token_weight[token] * scores[token, place] * output.norm(dim=-1)).sum()
    return sums


def _cut(mlp: Any, kept: list[int]) -> None:
    mlp.gate.weight = torch.nn.Parameter(mlp.gate.weight.data[kept].clone())
    mlp.experts.gate_up_proj = torch.nn.Parameter(mlp.experts.gate_up_proj.data[kept].clone())
    mlp.experts.down_proj = torch.nn.Parameter(mlp.experts.down_proj.data[kept].clone())
    mlp.gate.num_experts = mlp.experts.num_experts = len(kept)
