"""The losses of other libraries beside ours: values and gradients by the student's logits, in digits.

Inputs are drawn as the libraries' own loss tests draw them: normal logits (seeds 0 to 4, spreads 1 and 4),
two completions of three and five tokens. Digits are -log10 of the largest difference, relative to
the largest value or gradient: ours from theirs in float32 and in float64, and ("rounding") each
side's gradient in float32 from its own in float64. Libraries that compute in float32 whatever they are
given have about 7 digits in float64 too. A surrogate whose value means nothing is compared by its
gradient. Where definitions differ, they are compared where they meet: see docs/losses.md.

TRL must be importable. The other libraries are skipped unless their folders are in PYTHONPATH: verl and
ms-swift (their wheels), torchtune, axolotl (src/), nemo_rl, miniverl (src/), distillm (clones).

    TRL_EXPERIMENTAL_SILENCE=1 PYTHONPATH=OPD:VERL:... python benchmarks/peer_losses.py [--out FILE.json]
"""

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import peer_cases
import peer_cases_gold
import peer_cases_trl
import torch
from peer_case import MISSING, Case, Loss, Tensor, data

SEEDS = range(5)
SPREADS = (1.0, 4.0)
MEASURES = (
    "value, float32",
    "gradient, float32",
    "value, float64",
    "gradient, float64",
    "rounding, theirs",
    "rounding, ours",
)


@dataclass(slots=True)
class Row:
    """The largest differences of one kind of case; a measure that does not apply is absent."""

    cases: int = 0
    differences: dict[str, float] = field(default_factory=dict)

    def add(self, single: Case, double: Case) -> None:
        """The same case in float32 and float64."""
        theirs, ours, theirs64, ours64 = (
            evaluated(loss, case.logits)
            for case in (single, double)
            for loss in (case.theirs, case.ours)
        )
        self.cases += 1
        if not single.gradient_only:
            self._take("value, float32", ours.value, theirs.value)
            self._take("value, float64", ours64.value, theirs64.value)
        if ours.slope is not None and theirs.slope is not None:
            self._take("gradient, float32", ours.slope, theirs.slope)
            self._take("gradient, float64", ours64.slope, theirs64.slope)
            self._take("rounding, theirs", theirs.slope, theirs64.slope)
            self._take("rounding, ours", ours.slope, ours64.slope)

    def _take(self, name: str, a: Tensor | None, b: Tensor | None) -> None:
        assert a is not None
        assert b is not None
        found = float((a - b).abs().max() / b.abs().max())
        self.differences[name] = max(self.differences.get(name, 0.0), found)


def all_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Every case of every library that can be imported."""
    for seed, spread in itertools.product(SEEDS, SPREADS):
        tokens = data(seed, dtype, spread=spread)
        gold = (peer_cases_gold.trl_gold_cases,)
        for cases in (*peer_cases_trl.CASES, *gold, *peer_cases.CASES):
            yield from cases(tokens)
    for seed in SEEDS:
        rewards = torch.rand(4, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for group in (rewards, (rewards > rewards.median()).to(dtype)):
            yield from peer_cases_trl.trl_advantage_cases(group)
            yield from peer_cases.verl_advantage_cases(group)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A loss's value, and its gradient if it is a scalar that has one."""

    value: Tensor
    slope: Tensor | None


def evaluated(loss: Loss, logits: Tensor) -> Evaluated:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    if value.ndim or not value.requires_grad:
        return Evaluated(value.detach(), None)
    return Evaluated(value.detach(), torch.autograd.grad(value, leaf)[0])


def digits(error: float | None) -> str:
    if error is None:
        return "-"
    return "all" if error == 0.0 else f"{-math.log10(error):.1f}"


def main() -> None:
    """Compare all, print a table with the worst of each kind, and what was skipped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    out = parser.parse_args().out
    warnings.simplefilter("ignore")
    rows: dict[tuple[str, str, str], Row] = {}
    for single, double in zip(all_cases(torch.float32), all_cases(torch.float64), strict=True):
        rows.setdefault((single.peer, single.tests, single.what), Row()).add(single, double)
    found = [
        [*key, str(row.cases), *(digits(row.differences.get(name)) for name in MEASURES)]
        for key, row in rows.items()
    ]
    print(f"| peer | tests | loss | cases | {' | '.join(MEASURES)} |")
    for row in found:
        print(f"| {' | '.join(row)} |")
    if MISSING:
        print(f"skipped, not importable: {', '.join(sorted(MISSING))}")
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
