"""A state that changes as training changes it: few coordinates, most of them by one ulp."""

import torch

INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
FULL, FROZEN = "model.norm.weight", "model.layers.0.k_proj.weight"


def state(*, tied: bool, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Matrices, vectors, an empty tensor and one number; NaN, infinities and both zeros among them."""
    shapes = {
        "model.embed_tokens.weight": (97, 64),
        "model.layers.0.q_proj.weight": (64, 64),
        FROZEN: (32, 64),
        "model.layers.0.up_proj.weight": (300, 64),
        "model.layers.0.empty": (0, 64),
        "model.layers.0.scale": (),
        "model.layers.0.bias": (301,),
        FULL: (64,),
    }
    if not tied:
        shapes["lm_head.weight"] = (97, 64)
    generator = torch.Generator().manual_seed(3)
    found = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    special = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), float("-inf")]).to(dtype)
    found["model.layers.0.up_proj.weight"].view(-1)[100:105] = special
    return found


def mask(weights: dict[str, torch.Tensor], density: float) -> dict[str, torch.Tensor]:
    """Kept coordinates: one tensor frozen, one kept whole, int32 and int64 indices in turn."""
    generator = torch.Generator().manual_seed(4)
    kept = {}
    for i, (name, tensor) in enumerate(weights.items()):
        draw = torch.rand(tensor.numel(), generator=generator) < (2 if name == FULL else density)
        if name != FROZEN:
            kept[name] = draw.nonzero().view(-1).to(torch.int32 if i % 2 else torch.int64)
    return kept


def train(
    weights: dict[str, torch.Tensor],
    share: float,
    seed: int,
    kept: dict[str, torch.Tensor] | None = None,
) -> int:
    """Change ``share`` of the coordinates that may change, in place; returns how many."""
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    for name, tensor in weights.items():
        bits = tensor.view(-1).view(INTEGERS[tensor.dtype])
        may = torch.arange(len(bits)) if kept is None else kept.get(name, torch.zeros(0)).long()
        at = may[torch.rand(len(may), generator=generator) < share]
        step = torch.randint(0, 2, (len(at),), generator=generator) * 2 - 1
        far = torch.randint(-(2**15), 2**15, (len(at),), generator=generator)
        is_far = torch.rand(len(at), generator=generator) < 0.13
        before = bits[at].clone()
        bits[at] += torch.where(is_far, far, step).to(bits.dtype)
        changed += int((bits[at] != before).sum())
    return changed


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, names included."""
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape
        and torch.equal(
            a[n].reshape(-1).view(INTEGERS[a[n].dtype]), b[n].reshape(-1).view(INTEGERS[b[n].dtype])
        )
        for n in a
    )
