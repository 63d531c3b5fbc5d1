"""The catalogue of recipes: what each does, what it needs, who serves the result. Data; imports nothing heavy.

Reasons in quotation marks are an engine's own words (vLLM 0.32 on a CPU). Memory and size are in multiples of the
base's weights in bfloat16: work is done in float32, which is two of them.
"""

from __future__ import annotations

from app.errors import ConfigurationError
from app.recipes.recipe import Chain, Kind, Parameter, Recipe, Serving

LLAMAS = ("llama", "mistral")
STACKS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "granite", "olmo2")
# Architectures whose size of a head stands in the config, for the engines too, and that norm no heads together.
FREE_HEADS = ("llama", "mistral", "mixtral", "qwen3", "granite")
GATED_MLPS = ("llama", "mistral", "qwen2", "qwen3", "granite", "olmo2")

INT8_MIXTURE = Serving(
    ("cuda",),
    '"NotImplementedError: No Int8 MoE backend supports the deployment configuration '
    "(weight_key=QuantKey(i8,scale(f32,static,per_channel),symmetric), "
    'activation_key=QuantKey(i8,scale(f32,dynamic,per_token),symmetric))."',
)
NEEDS_AVX512 = Serving(reason="CPUs without AVX-512 lack the kernel: \"'_OpNamespace' '_C' object has no attribute "
                       "'cpu_gemm_wna16'\" on the first request")  # fmt: skip
SLOW_FP8 = Serving(reason="CPUs without FP8 widen every weight: a tenth of the dense speed or less")
UNTRIED_CACHE = Serving(reason=f"{SLOW_FP8.reason}; the cache in FP8 was not tried on a CPU")
UNTRIED_BITS = Serving(reason=f"{NEEDS_AVX512.reason}; INT4 beside INT8 was not tried with an engine")
SERVED_AS_DENSE = Serving(reason="for quality study only: no engine has a sparse format, the zeros are served as dense")

IGNORE = Parameter("ignore", ["lm_head"], "layers that stay as they are, names or re:EXPRESSION")
TOKENS = Parameter("tokens", 512, "length of a calibration sample, in tokens")
SEED = Parameter("seed", 0, "of everything that is drawn")


def _samples(count: int) -> Parameter:
    return Parameter("samples", count, "calibration samples, as many as the text has at most")


DEPTH = Recipe(
    name="depth",
    summary="Drops the blocks of least influence, 1 - cos(input, output) on calibration text; not the first and last.",
    function="app.recipes.depth:prune",
    kind=Kind.PRUNE,
    memory=3.0,
    fits=STACKS,
    calibrates=True,
    parameters=(
        Parameter("keep", 0, "blocks to keep; 0 for all but `drop`"),
        Parameter("drop", 4, "blocks to drop where `keep` is 0"),
        _samples(16),
        TOKENS,
    ),
)
MOE = Recipe(
    name="moe",
    summary="Dense to Mixtral: the router's rows are clusters of the MLP's inputs, the experts copies or parts of it.",
    function="app.recipes.mixture:upcycle",
    kind=Kind.MIXTURE,
    memory=8.0,
    size=2.8,
    fits=LLAMAS,
    makes="mixtral",
    calibrates=True,
    parameters=(
        Parameter("experts", 4, "experts in each block"),
        Parameter("active", 2, "experts that each token is sent to"),
        Parameter(
            "mlps", "copied", "copied: each expert is the dense MLP, exact at the start; partitioned: its channels"
        ),
        _samples(8),
        TOKENS,
        SEED,
    ),
)
KEEP_EXPERTS = Recipe(
    name="experts",
    summary="Keeps the experts that matter for the calibration text, by routed importance.",
    function="app.recipes.mixture:keep_experts",
    kind=Kind.PRUNE,
    memory=3.0,
    size=0.6,
    fits=("mixtral",),
    calibrates=True,
    parameters=(Parameter("keep", 2, "experts to keep in each block"), _samples(8), TOKENS),
)
TOP = Recipe(
    name="top",
    summary="Sends each token to fewer experts. The weights stay the same, and are kept once beside the other tiers.",
    function="app.recipes.mixture:set_active",
    kind=Kind.PRUNE,
    memory=2.2,
    fits=("mixtral",),
    parameters=(Parameter("active", 1, "experts that each token is sent to"),),
)
HEAL = Recipe(
    name="heal",
    summary="Short distillation from the base: KL divergence of the next-token distributions on calibration text.",
    function="app.recipes.heal:distil",
    kind=Kind.HEAL,
    memory=14.0,
    calibrates=True,
    parameters=(
        Parameter("steps", 40, "steps of AdamW"),
        Parameter("batch", 4, "samples in a step"),
        Parameter("tokens", 256, "length of a sample, in tokens"),
        Parameter("learning_rate", 1e-4, "at its peak; warm-up over a tenth of the steps, then down along a cosine"),
        SEED,
    ),
)
SPARSE = Recipe(
    name="sparse",
    summary="Zeroes half of the weights (SparseGPT or Wanda), unstructured or 2:4.",
    function="app.recipes.sparse:prune",
    kind=Kind.PRUNE,
    memory=5.0,
    fits=GATED_MLPS,
    calibrates=True,
    serving=SERVED_AS_DENSE,
    parameters=(
        Parameter("method", "sparsegpt", "sparsegpt, or wanda"),
        Parameter("sparsity", 0.5, "share of zeros"),
        Parameter("structure", "0:0", "0:0 for any place, 2:4 for two of four neighbours"),
        _samples(24),
        TOKENS,
        IGNORE,
    ),
)

RECIPES = (
    Recipe(
        name="dense",
        summary="The base itself as bfloat16 safetensors: a GGUF file is dequantized, a hub repository downloaded.",
        function="",
        kind=Kind.COPY,
        memory=2.2,
    ),
    Recipe(
        name="w8a8",
        summary="INT8 weights, one scale per channel, round to nearest; activations INT8 per token. Needs no data.",
        function="app.recipes.quantize:w8a8",
        kind=Kind.QUANTIZE,
        memory=5.0,
        size=0.7,
        quantization="w8a8",
        serving_mixture=INT8_MIXTURE,
        parameters=(IGNORE,),
    ),
    Recipe(
        name="w8a8-gptq",
        summary="The same format by SmoothQuant (outliers move from activations into weights) and GPTQ.",
        function="app.recipes.quantize:w8a8_gptq",
        kind=Kind.QUANTIZE,
        memory=6.0,
        size=0.7,
        quantization="w8a8",
        fits=GATED_MLPS,
        calibrates=True,
        parameters=(Parameter("smoothing", 0.5, "strength of SmoothQuant, 0 to 1"), _samples(32), TOKENS, IGNORE),
    ),
    Recipe(
        name="w4a16",
        summary="INT4 weights by GPTQ, one scale per group of weights; activations stay.",
        function="app.recipes.quantize:w4a16",
        kind=Kind.QUANTIZE,
        memory=6.0,
        size=0.5,
        quantization="w4a16",
        fits=GATED_MLPS,
        calibrates=True,
        serving=NEEDS_AVX512,
        parameters=(
            Parameter("group", 0, "weights that share a scale; 0 for 128, or less where that does not divide"),
            _samples(32),
            TOKENS,
            IGNORE,
        ),
    ),
    Recipe(
        name="w4a16-awq",
        summary="INT4 weights by AWQ: channels are scaled by their activations before they are rounded.",
        function="app.recipes.quantize:w4a16_awq",
        kind=Kind.QUANTIZE,
        memory=6.0,
        size=0.5,
        quantization="w4a16",
        fits=GATED_MLPS,
        calibrates=True,
        needs_accelerator=True,
        serving=NEEDS_AVX512,
        parameters=(
            Parameter("group", 0, "weights that share a scale; 0 for 128, or less where that does not divide"),
            _samples(32),
            TOKENS,
            IGNORE,
        ),
    ),
    Recipe(
        name="fp8",
        summary="FP8 weights, one scale per channel; activations FP8 per token. Needs no data.",
        function="app.recipes.quantize:fp8",
        kind=Kind.QUANTIZE,
        memory=5.0,
        size=0.7,
        quantization="fp8",
        serving=SLOW_FP8,
        parameters=(IGNORE,),
    ),
    Recipe(
        name="fp8-kv",
        summary="fp8, and scales for a KV cache in FP8, measured on calibration text.",
        function="app.recipes.quantize:fp8_kv",
        kind=Kind.QUANTIZE,
        memory=6.0,
        size=0.7,
        quantization="fp8-kv",
        fits=GATED_MLPS,
        calibrates=True,
        serving=UNTRIED_CACHE,
        parameters=(_samples(32), TOKENS, IGNORE),
    ),
    Recipe(
        name="mixed",
        summary="INT4 by GPTQ but INT8 in the blocks that suffer most: KL divergence with one block rounded at a time.",
        function="app.recipes.mixed:quantize",
        kind=Kind.QUANTIZE,
        memory=7.0,
        size=0.6,
        quantization="mixed-w4a16-w8a8",
        fits=GATED_MLPS,
        calibrates=True,
        serving=UNTRIED_BITS,
        parameters=(
            Parameter("sensitive", 0.25, "share of the blocks that get 8 bits"),
            Parameter("group", 0, "weights that share a 4-bit scale; 0 for 128, or less where that does not divide"),
            Parameter("probes", 8, "samples that the sensitivity is measured on"),
            _samples(32),
            TOKENS,
            IGNORE,
        ),
    ),
    DEPTH,
    DEPTH.named("depth26", "depth, down to 26 blocks.", keep=26),
    Recipe(
        name="width",
        summary="Keeps the MLP channels that carry most, the same number in each block, and fits the rest to them.",
        function="app.recipes.width:prune",
        kind=Kind.PRUNE,
        memory=5.0,
        fits=GATED_MLPS,
        calibrates=True,
        parameters=(
            Parameter("share", 0.75, "of the channels that stay"),
            Parameter("multiple", 64, "what the number of channels is a multiple of, for the engines' kernels"),
            Parameter("refit", True, "least squares of the output projection on the channels that stay"),
            _samples(16),
            TOKENS,
        ),
    ),
    Recipe(
        name="heads",
        summary="Keeps the attention heads that add most to the output, as many in each block, and fits the rest.",
        function="app.recipes.heads:prune",
        kind=Kind.PRUNE,
        memory=4.0,
        fits=FREE_HEADS,
        calibrates=True,
        parameters=(
            Parameter("share", 0.75, "of the heads that stay, rounded to whole ones"),
            Parameter(
                "unit",
                "queries",
                "queries: as many query heads of each group, all keys and values stay; groups: with keys and values",
            ),
            Parameter("refit", True, "least squares of the output projection on the heads that stay"),
            _samples(16),
            TOKENS,
        ),
    ),
    SPARSE,
    SPARSE.named("sparse24", "sparse, two of each four neighbours.", structure="2:4"),
    MOE,
    MOE.named("moe4", "moe with four experts, two of them active.", experts=4),
    KEEP_EXPERTS,
    KEEP_EXPERTS.named("keep2", "experts, two of them.", keep=2),
    TOP,
    TOP.named("top1", "top, one expert.", active=1),
    HEAL,
)
# Names for chains that are worth one.
ALIASES = {
    "depth26-healed": "depth26+heal",
    "moe4-keep2": "moe4+keep2",
    "moe4-top1": "moe4+top1",
}
# Chains worth showing beside the recipes that they are made of.
SHOWN_CHAINS = (*ALIASES, "depth26+w8a8", "moe4+w8a8")


def find_recipe(name: str) -> Chain:
    """The recipe called `name`, an alias, or several joined by `+`.

    Raises ConfigurationError that lists the known ones, or says why these cannot be joined.
    """
    known = {recipe.name: recipe for recipe in RECIPES}
    parts = [part for text in name.split("+") for part in ALIASES.get(text, text).split("+")]
    for part in parts:
        if part not in known:
            raise ConfigurationError(
                f"no recipe {part!r}; there are: {', '.join([*known, *ALIASES])}, and several joined by +"
            )
    return Chain.of(name, tuple(known[part] for part in parts))
