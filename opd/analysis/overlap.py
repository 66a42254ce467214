"""Whether two updates of one base changed the same weights, counted by binade."""

from typing import Any

import numpy as np
import torch

from opd.analysis.counts import VISIBLE
from opd.analysis.pair import Pair
from opd.analysis.sides import CHUNK, NumberFormat, Sides
from opd.checkpoint.chunks import BINS, binades
from opd.mask.compare import Expected, Overlap

CHANGED = {"0": 0.0, "1e-5": VISIBLE}


def overlap_row(a: Sides, other: Pair | None) -> dict[str, Any]:
    """Counts of weights changed by A, by B and by both, in each binade; bf16, as the paper's.

    Nothing without a second model; a reason where its tensor does not compare.
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
        moved = [cut.update.abs().double().numpy() for cut in (ours, theirs)]
        for key, threshold in CHANGED.items():
            in_a, in_b = (m > threshold for m in moved)
            for i, chosen in enumerate((slice(None), in_a, in_b, in_a & in_b)):
                tables[key][i] += np.bincount(bins[chosen], minlength=BINS)
    told: dict[str, Any] = {"status": "ok"}
    for key, table in tables.items():
        here = np.flatnonzero(table[0])
        told[key] = {"bin": here.tolist(), "counts": table[:, here].tolist()}
    return {"overlap": told}


def overlaps(rows: list[dict[str, Any]], changed: str, name: str = "all") -> Overlap | None:
    """The overlap over some tensors' rows and what chance expects at three levels; None: no rows."""
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
