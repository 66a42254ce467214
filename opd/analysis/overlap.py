"""The overlap of the weights that two updates of one base changed, counted by binade."""

from typing import Any

import numpy as np
import torch

from opd.analysis.counts import VISIBLE
from opd.analysis.pair import Pair
from opd.analysis.sides import CHUNK, NumberFormat, Sides
from opd.checkpoint.chunks import BINS, binades
from opd.mask.compare import Expected, Overlap

CHANGED = {"0": 0.0, "1e-5": VISIBLE}


def count_overlap(a: Sides, other: Pair | None) -> dict[str, Any]:
    """Counts of weights changed by A, by B and by both, in each binade, in bf16 as in the paper.

    Empty without a second model; a reason where its tensor cannot be compared.
    """
    if other is None:
        return {}
    if other.reason or other.trained is None:
        return {"overlap": {"status": other.reason}}
    trained = other.trained.read()
    if not all(bool(torch.isfinite(part).all()) for part in trained.reshape(-1).split(CHUNK)):
        return {"overlap": {"status": "NaN or infinite values in the other model"}}
    b = Sides(base=a.base, trained=trained, precision=NumberFormat.bf16)
    tables = {key: np.zeros((4, BINS), np.int64) for key in CHANGED}
    for (_, ours), (_, theirs) in zip(a.flat(), b.flat(), strict=True):
        bins = binades(ours.base)
        sizes = [chunk.update.abs().double().numpy() for chunk in (ours, theirs)]
        for key, threshold in CHANGED.items():
            in_a, in_b = (size > threshold for size in sizes)
            for i, chosen in enumerate((slice(None), in_a, in_b, in_a & in_b)):
                tables[key][i] += np.bincount(bins[chosen], minlength=BINS)
    found: dict[str, Any] = {"status": "ok"}
    for key, table in tables.items():
        used = np.flatnonzero(table[0])
        found[key] = {"bin": used.tolist(), "counts": table[:, used].tolist()}
    return {"overlap": found}


def pool_overlap(rows: list[dict[str, Any]], changed: str, name: str = "all") -> Overlap | None:
    """The overlap over the rows of tensors and what chance expects at three levels; None without rows."""
    tables = [
        np.array(row["overlap"][changed]["counts"])
        for row in rows
        if row.get("overlap", {}).get("status") == "ok"
    ]
    if not tables:
        return None
    sums = np.array([table.sum(axis=1) for table in tables])
    n, a, b, both = sums.sum(axis=0)
    cells = np.concatenate(tables, axis=1)
    return Overlap(
        name=name,
        numel=int(n),
        a=int(a),
        b=int(b),
        both=int(both),
        expected={
            "global": Expected.from_counts(np.array([n]), np.array([a]), np.array([b])),
            "tensor": Expected.from_counts(sums[:, 0], sums[:, 1], sums[:, 2]),
            "binade": Expected.from_counts(cells[0], cells[1], cells[2]),
        },
    )
