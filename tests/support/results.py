"""What the cases of a rank script leave behind: a folder for each, which appears whole or not at all."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors import safe_open

if TYPE_CHECKING:
    import torch

WEIGHTS, REPORTS, ROWS = "weights.safetensors", "reports.json", "rows.json"


def case_folder(out: Path, case: str) -> Path:
    """Where the results of a case are, once they are complete."""
    return out / case.replace("/", "_")


def partial_folder(out: Path, case: str) -> Path:
    """Where a case writes until it is complete."""
    folder = case_folder(out, case)
    return folder.with_name(f"{folder.name}.partial")


def finish_case(out: Path, case: str) -> None:
    """Let the results of a case appear."""
    partial_folder(out, case).rename(case_folder(out, case))


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The results of cases in the folder ``out``; ``missing`` says of a case why it has none.

    Reading what is missing fails the test that reads it, and no other test.
    """

    out: Path
    missing: dict[str, str] = field(default_factory=dict)

    def has(self, case: str) -> bool:
        return case_folder(self.out, case).is_dir()

    def folder(self, case: str) -> Path:
        """The complete results of a case."""
        if not self.has(case):
            pytest.fail(self.missing.get(case, f"no case {case} was run"), pytrace=False)
        return case_folder(self.out, case)

    def json(self, case: str, name: str) -> Any:
        return json.loads((self.folder(case) / name).read_text())

    def reports(self, case: str) -> list[dict[str, float]]:
        """The metrics of each step."""
        return self.json(case, REPORTS)

    def weights(self, case: str) -> dict[str, "torch.Tensor"]:
        """The tensors that a case left, in their own dtypes."""
        with safe_open(self.folder(case) / WEIGHTS, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
