"""The paper's metrics written out plainly in float64, a whole matrix at a time."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

EXACT, DECOMPOSED = 1e-6, 1e-4
"""Relative tolerances of sums, and of what needs a decomposition."""
SHARES = {"1%": 0.01, "5%": 0.05, "10%": 0.1, "20%": 0.2}


def difference(base: torch.Tensor, trained: torch.Tensor, stored: bool = False) -> np.ndarray:
    """Both cast to bfloat16 and subtracted in it, or in float32 as stored."""
    if stored:
        return (trained.float() - base.float()).double().numpy()
    return (trained.bfloat16() - base.bfloat16()).double().numpy()


def coordinates(base: torch.Tensor, trained: torch.Tensor, stored: bool = False) -> dict[str, Any]:
    """Norms, sparsity, energy of the largest moves."""
    d = difference(base, trained, stored)
    w = (base.float() if stored else base.bfloat16()).double().numpy()
    a = np.abs(d).ravel()
    rms = math.sqrt(np.mean(w**2))
    largest = np.sort(a)[::-1]
    return {
        "relative_norm": np.linalg.norm(d) / np.linalg.norm(w),
        "zero": np.mean(a == 0),
        "below": {k: np.mean(a < float(k)) for k in ("1e-8", "1e-7", "1e-6", "1e-5", "1e-4")},
        "relative_below": {k: np.mean(a < float(k) * rms) for k in ("1e-4", "1e-3", "1e-2")},
        "top": {
            k: (largest[: math.ceil(f * a.size)] ** 2).sum()
            for k, f in {"0.1%": 0.001, "1%": 0.01, "5%": 0.05}.items()
        },
    }


def spectral(base: torch.Tensor, trained: torch.Tensor, stored: bool = False) -> dict[str, Any]:
    """Full decompositions of W0, W1 and D."""
    d = difference(base, trained, stored)
    w0, w1 = ((t.float() if stored else t.bfloat16()).double().numpy() for t in (base, trained))
    u0, s0, v0 = np.linalg.svd(w0, full_matrices=False)
    u1, s1, _ = np.linalg.svd(w1, full_matrices=False)
    s = np.linalg.svd(d, compute_uv=False)
    p, total = s[s > 0] / s.sum(), (d**2).sum()
    found: dict[str, Any] = {f"energy_{k}": (s[:k] ** 2).sum() / total for k in (1, 8, 16)}
    found["stable_rank"] = total / s[0] ** 2
    found["effective_rank"] = math.exp(-(p * np.log(p)).sum())
    found |= {f"numerical_rank_{t}": (s > float(t) * s[0]).sum() for t in ("1e-6", "1e-5", "1e-4")}
    found["drift"] = np.linalg.norm(s1 - s0) / np.linalg.norm(s0)
    found["drift_of_update"] = np.linalg.norm(s1 - s0) / math.sqrt(total)
    for kind in ("projection", "left", "right", "rotation"):
        found[kind] = {}
    for key, share in SHARES.items():
        k = max(1, math.floor(share * min(w0.shape)))
        u, v = u0[:, :k], v0[:k].T
        found["projection"][key] = ((u.T @ d @ v) ** 2).sum() / total
        found["left"][key] = ((u.T @ d) ** 2).sum() / total
        found["right"][key] = ((d @ v) ** 2).sum() / total
        cosines = np.linalg.svd(u.T @ u1[:, :k], compute_uv=False)
        found["rotation"][key] = np.sqrt(np.clip(1 - cosines**2, 0, 1)).mean()
    return found


def coverage(base: torch.Tensor, trained: torch.Tensor, stored: bool = False) -> dict[str, Any]:
    """Share of changed coordinates in each mask, by mask, share and threshold."""
    d = np.abs(difference(base, trained, stored)).ravel()
    w0 = (base.float() if stored else base.bfloat16()).double().numpy()
    u, s, v = np.linalg.svd(w0, full_matrices=False)
    found: dict[str, Any] = {}
    for key, share in SHARES.items():
        k, n = max(1, math.floor(share * min(w0.shape))), math.ceil(share * w0.size)
        rebuilt = np.abs((u[:, :k] * s[:k]) @ v[:k]).ravel()
        principal, low = np.zeros(w0.size, bool), np.zeros(w0.size, bool)
        principal[np.argsort(-rebuilt, kind="stable")[:n]] = True
        low[np.argsort(np.abs(w0).ravel(), kind="stable")[:n]] = True
        masks = {
            "principal": principal,
            "low_magnitude": low,
            "principal_not_low": principal & ~low,
            "nonprincipal_or_low": ~principal | low,
        }
        found[key] = {
            name: {
                c: (mask & (d > float(c))).sum() / max(1, (d > float(c)).sum())
                for c in ("0", "1e-5")
            }
            for name, mask in masks.items()
        }
    return found


def paper(
    base: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], blocks: dict[str, str]
) -> dict[str, Any]:
    """The paper's figures of a model: every tensor as it is stored, matrices those of two dimensions."""
    d = {name: difference(w, trained[name]) for name, w in base.items()}
    rows = {name: coordinates(w, trained[name]) for name, w in base.items()}
    n = sum(x.size for x in d.values())
    energy = {name: (x**2).sum() for name, x in d.items()}
    total = sum(energy.values())
    norm = math.sqrt(sum((w.double() ** 2).sum().item() for w in base.values()))

    def share(value: Callable[[dict[str, Any]], Any]) -> float:
        return sum(value(row) * d[name].size for name, row in rows.items()) / n

    matrices = [name for name in base if d[name].ndim == 2 and energy[name]]
    spectra = [spectral(base[name], trained[name]) for name in matrices]
    smaller = [min(d[name].shape) for name in matrices]
    masks = [coverage(base[name], trained[name]) for name in matrices]

    def over(values: list[float]) -> dict[str, float]:
        return {"mean": float(np.mean(values)), "median": float(np.median(values))}

    def covered(mask: str, rank: str, changed: str) -> dict[str, float]:
        counts = np.array([(np.abs(d[name]) > float(changed)).sum() for name in matrices])
        cells = np.array([cell[rank][mask][changed] for cell in masks])
        weighted = float(np.average(cells, weights=counts))
        return over(cells[counts > 0].tolist()) | {"update_weighted_mean": weighted}

    return {
        "relative_norm": math.sqrt(total) / norm,
        "exact_zero": share(lambda row: row["zero"]),
        "sparsity": {
            k: share(lambda row, k=k: row["below"][k]) for k in rows[matrices[0]]["below"]
        },
        "relative_sparsity": {
            k: share(lambda row, k=k: row["relative_below"][k]) for k in ("1e-4", "1e-3", "1e-2")
        },
        "coordinate_energy": {
            k: sum(row["top"][k] for row in rows.values()) / total for k in ("0.1%", "1%", "5%")
        },
        "top_energy": {str(k): over([s[f"energy_{k}"] for s in spectra]) for k in (1, 8, 16)},
        "stable_rank": over([s["stable_rank"] for s in spectra]),
        "effective_rank": over([s["effective_rank"] for s in spectra]),
        "numerical_rank_share": {
            t: over([s[f"numerical_rank_{t}"] / p for s, p in zip(spectra, smaller, strict=True)])
            for t in ("1e-6", "1e-5", "1e-4")
        },
        "principal_projection": {r: over([s["projection"][r] for s in spectra]) for r in SHARES},
        "subspace_rotation": {r: over([s["rotation"][r] for s in spectra]) for r in SHARES},
        "spectral_drift": over([s["drift"] for s in spectra]),
        "coverage": {
            mask: {r: {c: covered(mask, r, c) for c in ("0", "1e-5")} for r in SHARES}
            for mask in masks[0]["1%"]
        },
        "energy_share": {
            block: sum(energy[name] for name in base if blocks[name] == block) / total
            for block in ("ffn", "attention", "embedding", "lm_head", "norm", "other")
        },
    }


def agrees(found: Any, expected: Any, rel: float) -> None:
    """Assert that every number of ``expected`` is found at its path."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            agrees(found[key], value, rel)
    else:
        assert found == pytest.approx(expected, rel=rel)
