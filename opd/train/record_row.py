"""Measurements of one weight, and how those of all weights become one row of a run's record.

Measured are sums over coordinates, which add up over weights, and spectral figures of matrices. A row
holds ratios of the sums and means over matrices, for the whole model, each block and each module type.
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
    subspace_similarity,
    ulp_counts,
    ulp_distance,
)

TOP = 8
"""Directions of a matrix whose subspace is compared between recordings."""
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
"""Values of a weight by column (see ``columns``)."""
assert len(ULP_BINS) == len(ULPS) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """AdamW after ``step`` steps; the last at ``lr``, on a gradient times the factor ``clipped``."""

    config: AdamWConfig
    step: int
    lr: float
    clipped: float

    def update(self, first: torch.Tensor, second: torch.Tensor, *, step: int) -> torch.Tensor:
        """What step number ``step`` with these moments subtracts from the weights, decay aside.

        Formula: Kingma and Ba, "Adam" (2015), algorithm 1.
        """
        beta1, beta2 = self.config.betas
        root = (second / (1 - beta2**step)).sqrt() + self.config.eps
        return self.lr / (1 - beta1**step) * first / root


def columns(earlier: Sequence[int]) -> list[str]:
    """Names of all measurements of a weight; ``earlier`` lists the steps of recordings to compare with."""
    similar = [
        f"similar {step}{suffix}" for step in earlier for suffix in ("", " chance", " known")
    ]
    return [*_SUMS, *_SPECTRUM, *similar]


def changes(start: torch.Tensor, now: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Sums over a weight's coordinates [n], float32; and booleans [n], which of them differ in bf16."""
    distance = ulp_distance(start, now)
    changed = distance > 0
    sums = {
        "weights": float(len(start)),
        "start_energy": energy(start),
        "changed": float(changed.sum()),
    }
    # the visible difference is itself rounded to bf16, as in the paper
    differences = (now - start, now.bfloat16() - start.bfloat16())
    for precision, difference in zip(PRECISIONS, differences, strict=True):
        counts = counts_within(difference, (0.0, *THRESHOLDS))
        sums |= {f"{precision} {w}": float(c) for w, c in zip(WITHIN, counts, strict=True)}
        sums[f"{precision} energy"] = energy(difference)
    counts = ulp_counts(distance)
    sums |= {f"ulps {name}": float(c) for name, c in zip(ULP_BINS, counts, strict=True)}
    return sums, changed


def spectrum_values(true: Top | None, visible: Top | None) -> dict[str, float]:
    """Stable ranks of the true and the bf16 difference, each where it is not zero."""
    values: dict[str, float] = {}
    for precision, top in zip(PRECISIONS, (true, visible), strict=True):
        if top is not None:
            values |= {
                f"{precision} rank": top.stable_rank,
                f"{precision} least": top.stable_rank_least,
                f"{precision} known": 1.0,
            }
    return values


def similarity_values(step: int, earlier: torch.Tensor, top: Top) -> dict[str, float]:
    """The columns that compare ``top`` with the directions [m, k] of the recording of ``step``."""
    return {
        f"similar {step}": subspace_similarity(earlier, top.left),
        f"similar {step} chance": top.left.shape[1] / top.left.shape[0],
        f"similar {step} known": 1.0,
    }


def gradient_sums(gradient: torch.Tensor, first: torch.Tensor | None) -> dict[str, float]:
    """Inner products of the gradient g before clipping and the first moment m before the step.

    ``first`` is None before the first step, where m is 0.
    """
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
    """Sums over trained coordinates, from master and moments after the step.

    ``step`` counts coordinates that the step just taken changed in bf16; the step is undone to
    compare. ``idle`` counts those that the next step, at the same learning rate, would change in bf16
    if its gradient were zero, decay included. ``gradient`` holds ``gradient_sums``; ``matrix`` tells
    whether weight decay applies.
    """
    beta1, beta2 = moments.config.betas
    master, first, second = (t.float().reshape(-1) for t in (master, first, second))
    shrink = 1 - moments.lr * moments.config.weight_decay if matrix else 1.0
    before = (master + moments.update(first, second, step=moments.step)) / shrink
    idle = moments.update(beta1 * first, beta2 * second, step=moments.step + 1)
    visible = master.bfloat16()
    factor = moments.clipped
    return {
        "moments": float(len(master)),
        "root": float(second.sqrt().sum(dtype=torch.float64)),
        "square": float(second.sum(dtype=torch.float64)),
        "step": float((before.bfloat16() != visible).sum()),
        "idle": float(((shrink * master - idle).bfloat16() != visible).sum()),
        "mm": gradient["mm"],
        "mg": gradient["mg"] * factor,
        "gg": gradient["gg"] * factor**2,
    }


def build_row(
    places: Sequence[Place],
    measured: Sequence[Measured],
    moments: Moments | None,
    to_end: Sequence[int],
) -> dict[str, Any]:
    """The row of a recording; ``places`` and ``measured`` are those of each weight, in one order.

    ``to_end`` lists the steps of earlier recordings that the last one is compared with.
    """
    blocks: dict[str, list[Measured]] = {}
    modules: dict[str, list[Measured]] = {}
    for place, values in zip(places, measured, strict=True):
        blocks.setdefault(place.block, []).append(values)
        modules.setdefault(place.module, []).append(values)
    row: dict[str, Any] = {
        "all": _describe(measured, moments),
        "blocks": {name: _describe(blocks[name], moments) for name in sorted(blocks)},
        "modules": {name: _describe(modules[name], moments) for name in sorted(modules)},
    }
    if to_end:
        row["similarity_to_end"] = {str(step): _similarity(measured, step) for step in to_end}
    return row


def _describe(measured: Sequence[Measured], moments: Moments | None) -> dict[str, Any]:
    """The ratios of a group of weights."""
    total = {name: sum(values[name] for values in measured) for name in _SUMS}
    weights, start = total["weights"], total["start_energy"] ** 0.5
    ratios: dict[str, Any] = {"weights": int(weights)}
    for precision in PRECISIONS:
        size = total[f"{precision} energy"] ** 0.5
        ratios[precision] = {
            **{name: total[f"{precision} {name}"] / weights for name in WITHIN},
            "relative_norm": size / start if start else None,
            "stable_rank": _over_matrices(measured, precision, "rank"),
            "stable_rank_least": _over_matrices(measured, precision, "least"),
        }
    ratios["ulps"] = {name: total[f"ulps {name}"] / weights for name in ULP_BINS}
    ratios["never"] = 1 - total["ever"] / weights
    ratios["cancelled"] = (total["ever"] - total["changed"]) / weights
    ratios["final"] = total["changed"] / weights
    steps = [int(name.split()[1]) for name in measured[0] if name.endswith(" chance")]
    ratios["similarity"] = _similarity(measured, max(steps)) if steps else None
    ratios["adam"] = None if moments is None else _adam(total, moments)
    return ratios


def _over_matrices(measured: Sequence[Measured], precision: str, name: str) -> Any:
    """Mean and median over matrices that changed; None if there are none."""
    known = [m[f"{precision} {name}"] for m in measured if m[f"{precision} known"]]
    return {"mean": fmean(known), "median": median(known)} if known else None


def _similarity(measured: Sequence[Measured], step: int) -> dict[str, float] | None:
    """Subspace similarity to the recording of ``step``, over matrices that changed in both."""
    known = [m for m in measured if m[f"similar {step} known"]]
    if not known:
        return None
    return {
        "step": step,
        "mean": fmean(m[f"similar {step}"] for m in known),
        "chance": fmean(m[f"similar {step} chance"] for m in known),
    }


def _adam(total: Mapping[str, float], moments: Moments) -> dict[str, float | None] | None:
    """Figures of AdamW's moments over trained coordinates; None if there are none."""
    count = total["moments"]
    if not count:
        return None
    beta = moments.config.betas[0]
    mean = total["root"] / count
    variance = max(0.0, total["square"] / count - mean**2)
    m_g = beta * total["mg"] + (1 - beta) * total["gg"]
    m_m = beta * (beta * total["mm"] + (1 - beta) * total["mg"]) + (1 - beta) * m_g
    lengths = max(0.0, m_m) ** 0.5 * total["gg"] ** 0.5
    return {
        "root_v_variation": variance**0.5 / mean if mean else None,
        "cosine_m_g": m_g / lengths if lengths else None,
        "step_visible": total["step"] / total["weights"],
        "zero_gradient_visible": total["idle"] / total["weights"],
    }


def headline(row: Mapping[str, Any]) -> dict[str, float]:
    """The few figures of a row that are logged as metrics."""
    ratios = row["all"]
    figures = {
        "weights/unchanged": ratios["bf16"]["exact_zero"],
        "weights/unchanged_fp32": ratios["fp32"]["exact_zero"],
        "weights/sparsity": ratios["bf16"]["1e-05"],
        "weights/relative_norm": ratios["fp32"]["relative_norm"],
        "weights/never": ratios["never"],
        "weights/cancelled": ratios["cancelled"],
    }
    if ratios["fp32"]["stable_rank"]:
        figures["weights/stable_rank"] = ratios["fp32"]["stable_rank"]["mean"]
    if ratios["adam"]:
        figures["weights/zero_gradient"] = ratios["adam"]["zero_gradient_visible"]
        figures["weights/step_visible"] = ratios["adam"]["step_visible"]
    return {name: value for name, value in figures.items() if value is not None}
