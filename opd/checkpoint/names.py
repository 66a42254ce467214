"""A parameter's place in the model: layer, module type and block, derived from its name."""

import re
from dataclasses import dataclass

BLOCKS = ("attention", "ffn", "embedding", "head", "norm", "vision", "other")
_LAYER = re.compile(r"\.(\d+)\.")
_VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector)\.")
_NORM = re.compile(r"norm|(^|\.)ln_\w+\.|layer_?norm", re.IGNORECASE)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.")
_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe)\.")
_ATTENTION = re.compile(r"attn|attention")
_FFN = re.compile(r"mlp|ffn|feed_forward|experts|(^|\.)fc\d?\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Layer (None outside the stack), module type (``q_proj``, the same in every layer) and block."""

    layer: int | None
    module: str
    block: str


def place(name: str) -> Place:
    """The layer, the module type and the block of a parameter.

    ``model.layers.3.self_attn.q_proj.weight`` is layer 3, module ``q_proj``, block ``attention``. A
    bias has a module type of its own (``q_proj.bias``), experts share one, and those of the vision
    tower begin with ``vision.``.
    """
    found = _LAYER.search(name)
    vision = bool(_VISION.search(name))
    parts = [part for part in name.split(".") if not part.isdigit()]
    module = parts[-2] if len(parts) > 1 and parts[-1] == "weight" else ".".join(parts[-2:])
    return Place(
        layer=int(found[1]) if found else None,
        module=f"vision.{module}" if vision else module,
        block="vision" if vision else _block(name),
    )


def _block(name: str) -> str:
    for block, pattern in (
        ("norm", _NORM),
        ("head", _HEAD),
        ("embedding", _EMBEDDING),
        ("attention", _ATTENTION),
        ("ffn", _FFN),
    ):
        if pattern.search(name):
            return block
    return "other"
