"""The blocks of parameters over which the paper sums energy, derived from names as its authors do."""

import re

BLOCKS = ("ffn", "attention", "embedding", "lm_head", "norm", "other")
_PATTERNS = (
    ("attention", re.compile(r"[qkvo]_proj")),
    ("ffn", re.compile(r"(gate|up|down)_proj")),
    ("embedding", re.compile(r"embed_tokens")),
    ("lm_head", re.compile(r"lm_head")),
    ("norm", re.compile(r"norm|ln_")),
    ("ffn", re.compile(r"(^|\.)(fc[12]|w[123])(\.|$)")),
    ("embedding", re.compile(r"wte")),
)
"""The first match counts; the vision tower is not a block of its own."""


def paper_block(name: str) -> str:
    """The block of a parameter; ``other`` for a fused ``qkv``, a patch embedding or a router."""
    return next((block for block, pattern in _PATTERNS if pattern.search(name.lower())), "other")
