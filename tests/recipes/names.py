"""What both sides of the recipes' tests know: the one with torch and the one with pytest."""

from __future__ import annotations

BLOCKS, CHANNELS = 4, 256
RECIPES = (
    "w8a8", "w8a8-gptq", "w4a16", "fp8", "fp8-kv", "mixed", "depth", "depth+heal", "depth+w8a8", "width", "heads",
    "heads+width", "sparse", "sparse24", "moe4", "moe4-keep2", "moe4-top1", "moe4+w8a8",
)  # fmt: skip
