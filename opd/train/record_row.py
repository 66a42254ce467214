"""What is measured of one weight, and how the weights of a model become one row of its record.

Of each weight sums are taken, which add up over coordinates and ranks; a row holds their ratios for
the whole model, for each block and for each module type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch

from opd.checkpoint.names import Place
from opd.config.optim import AdamWConfig
from opd.train.weight_change import (
    THRESHOLDS,
    ULPS,
    Top,
    counts_within,
    energy,
    ulp_counts,
    ulp_distance,
)

TOP = 8
"""Directions of a matrix whose subspace is followed."""
PRECISIONS = ("fp32", "bf16")
WITHIN = ("exact_zero", *(f"{bound:.0e}" for bound in THRESHOLDS))
ULP_BINS = ("0", "1", "2", "3-4", "5-8", "9-16", "more")
_SUMS = (
    "weights",
    "start_energy",
    "ever",
    "changed",
    *(f"{p} {name}" for p in PRECISIONS for name in (*WITHIN, "energy")),
    *(f"ulps {name}" for name in ULP_BINS),
    "moments",
    *("root", "square", "step", "idle", "mm", "mg", "gg"),
)
_SPECTRUM = tuple(f"{p} {name}" for p in PRECISIONS for name in ("rank", "least", "known"))

Measured = Mapping[str, float]
assert len(ULP_BINS) == len(ULPS) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """AdamW after ``step`` steps, the last at ``lr`` on a gradient that was clipped by a factor."""

    config: AdamWConfig
    step: int
    lr: float
    clipped: float

    def move(self, first: torch.Tensor, second: torch.Tensor, *, step: int) -> torch.Tensor:
        """What step number ``step`` subtracts from the weights, its moments given; no decay."""
        beta1, beta2 = self.config.betas
        root = (second / (1 - beta2**step)).sqrt() + self.config.eps
        return self.lr / (1 - beta1**step) * first / root


def columns(earlier: Sequence[int]) -> list[str]:
    """Names of all that is measured of a weight; ``earlier`` lists recordings to compare with."""
    similar = [f"similar {step}{what}" for step in earlier for what in ("", " chance", " known")]
    return [*_SUMS, *_SPECTRUM, *similar]


def changes(start: torch.Tensor, now: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Sums over a weight's coordinates [n], float32; and which of them differ in bf16."""
    distance = ulp_distance(start, now)
    changed = distance > 0
    found = {
        "weights": float(len(start)),
        "start_energy": energy(start),
        "changed": float(changed.sum()),
    }
    # the visible difference is itself a bf16 number, as the paper's is
    differences = (now - start, now.bfloat16() - start.bfloat16())
    for precision, difference in zip(PRECISIONS, differences, strict=True):
        counts = counts_within(difference, (0.0, *THRESHOLDS))
        found |= {f"{precision} {w}": float(c) for w, c in zip(WITHIN, counts, strict=True)}
        found[f"{precision} energy"] = energy(difference)
    counts = ulp_counts(distance)
    found |= {f"ulps {name}": float(c) for name, c in zip(ULP_BINS, counts, strict=True)}
    return found, changed


def spectrum_values(true: Top | None, visible: Top | None) -> dict[str, float]:
    """Stable ranks of the difference in both precisions, where it is not zero."""
    found: dict[str, float] = {}
    for precision, top in zip(PRECISIONS, (true, visible), strict=True):
        if top is not None:
            found |= {
                f"{precision} rank": top.stable_rank,
                f"{precision} least": top.stable_rank_least,
                f"{precision} known": 1.0,
            }
    return found


def gradient_sums(gradient: torch.Tensor, first: torch.Tensor | None) -> dict[str, float]:
    """Products of the gradient, not yet clipped, and the first moment before it is added."""
    if first is None:
        return {"mm": 0.0, "mg": 0.0, "gg": energy(gradient)}
    product = (first.float() * gradient.float()).sum(dtype=torch.float64)
    return {"mm": energy(first), "mg": float(product), "gg": energy(gradient)}


def moment_sums(
    master: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    gradient: Mapping[str, float],
    moments: Moments,
    *,
    matrix: bool,
) -> dict[str, float]:
    """Sums over trained coordinates, from what the optimizer holds after its step.

    ``step``: those that the step just taken changed in bf16; it is undone to see. ``idle``: those
    that the same step from here would change if its gradient were zero, decay included.
    """
    beta1, beta2 = moments.config.betas
    master, first, second = (t.float().reshape(-1) for t in (master, first, second))
    shrink = 1 - moments.lr * moments.config.weight_decay if matrix else 1.0
    before = (master + moments.move(first, second, step=moments.step)) / shrink
    idle = moments.move(beta1 * first, beta2 * second, step=moments.step + 1)
    seen = master.bfloat16()
    factor = moments.clipped
    return {
        "moments": float(len(master)),
        "root": float(second.sqrt().sum(dtype=torch.float64)),
        "square": float(second.sum(dtype=torch.float64)),
        "step": float((before.bfloat16() != seen).sum()),
        "idle": float(((shrink * master - idle).bfloat16() != seen).sum()),
        "mm": gradient["mm"],
        "mg": gradient["mg"] * factor,
        "gg": gradient["gg"] * factor**2,
    }


def row_of(
    places: Sequence[Place],
    measured: Sequence[Measured],
    moments: Moments | None,
    to_end: Sequence[int],
) -> dict[str, Any]:
    """A recording; ``to_end`` lists earlier recordings that this last one is compared with."""
    blocks: dict[str, list[Measured]] = {}
    modules: dict[str, list[Measured]] = {}
    for at, found in zip(places, measured, strict=True):
        blocks.setdefault(at.block, []).append(found)
        modules.setdefault(at.module, []).append(found)
    row: dict[str, Any] = {
        "all": _described(measured, moments),
        "blocks": {name: _described(blocks[name], moments) for name in sorted(blocks)},
        "modules": {name: _described(modules[name], moments) for name in sorted(modules)},
    }
    if to_end:
        row["similarity_to_end"] = {str(step): _similarity(measured, step) for step in to_end}
    return row


def _described(measured: Sequence[Measured], moments: Moments | None) -> dict[str, Any]:
    total = {name: sum(found[name] for found in measured) for name in _SUMS}
    weights, start = total["weights"], total["start_energy"] ** 0.5
    told: dict[str, Any] = {"weights": int(weights)}
    for precision in PRECISIONS:
        size = total[f"{precision} energy"] ** 0.5
        told[precision] = {
            **{name: total[f"{precision} {name}"] / weights for name in WITHIN},
            "relative_norm": size / start if start else None,
            "stable_rank": _over_matrices(measured, precision, "rank"),
            "stable_rank_least": _over_matrices(measured, precision, "least"),
        }
    told["ulps"] = {name: total[f"ulps {name}"] / weights for name in ULP_BINS}
    told["never"] = 1 - total["ever"] / weights
    told["cancelled"] = (total["ever"] - total["changed"]) / weights
    told["final"] = total["changed"] / weights
    steps = [int(name.split()[1]) for name in measured[0] if name.endswith(" chance")]
    told["similarity"] = _similarity(measured, max(steps)) if steps else None
    told["adam"] = None if moments is None else _adam(total, moments)
    return told


def _over_matrices(measured: Sequence[Measured], precision: str, what: str) -> Any:
    known = [m[f"{precision} {what}"] for m in measured if m[f"{precision} known"]]
    return {"mean": fmean(known), "median": median(known)} if known else None


def _similarity(measured: Sequence[Measured], step: int) -> dict[str, float] | None:
    known = [m for m in measured if m[f"similar {step} known"]]
    if not known:
        return None
    return {
        "step": step,
        "mean": fmean(m[f"similar {step}"] for m in known),
        "chance": fmean(m[f"similar {step} chance"] for m in known),
    }


def _adam(total: Mapping[str, float], moments: Moments) -> dict[str, float | None] | None:
    count = total["moments"]
    if not count:
        return None
    beta = moments.config.betas[0]
    mean = total["root"] / count
    variance = max(0.0, total["square"] / count - mean**2)
    along = beta * total["mg"] + (1 - beta) * total["gg"]
    first = beta * (beta * total["mm"] + (1 - beta) * total["mg"]) + (1 - beta) * along
    lengths = max(0.0, first) ** 0.5 * total["gg"] ** 0.5
    return {
        "root_v_variation": variance**0.5 / mean if mean else None,
        "cosine_m_g": along / lengths if lengths else None,
        "step_visible": total["step"] / total["weights"],
        "zero_gradient_visible": total["idle"] / total["weights"],
    }


def headline(row: Mapping[str, Any]) -> dict[str, float]:
    """The few figures that go among the metrics."""
    told = row["all"]
    found = {
        "weights/unchanged": told["bf16"]["exact_zero"],
        "weights/unchanged_fp32": told["fp32"]["exact_zero"],
        "weights/sparsity": told["bf16"]["1e-05"],
        "weights/relative_norm": told["fp32"]["relative_norm"],
        "weights/never": told["never"],
        "weights/cancelled": told["cancelled"],
    }
    if told["fp32"]["stable_rank"]:
        found["weights/stable_rank"] = told["fp32"]["stable_rank"]["mean"]
    if told["adam"]:
        found["weights/zero_gradient"] = told["adam"]["zero_gradient_visible"]
        found["weights/step_visible"] = told["adam"]["step_visible"]
    return {name: value for name, value in found.items() if value is not None}
