"""Compare two checkpoints: what training changed in the weights, beside what rounding would show."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from opd.analysis.formatting import HEADLINES, Spectrum, interpret, lookup
from opd.analysis.report import write_report
from opd.analysis.summary import summarize
from opd.analysis.tables import flatten, write_tables
from opd.analysis.walk import AnalysisInputs, measure_checkpoints
from opd.checkpoint.chunks import Progress, quiet
from opd.run.model_names import find_base, resolved_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """The result of an analysis of two checkpoints.

    ``summary`` holds the figures of the whole model, each beside its null; ``tensors`` one row a
    tensor; ``report`` is the path of the page, None if none was written.
    """

    summary: dict[str, Any]
    tensors: pd.DataFrame
    report: Path | None

    @property
    def headlines(self) -> pd.DataFrame:
        """The headline figures in bf16: observed, null, excess and z."""
        columns = {"observed": "paper", "null": "null", "excess": "excess", "z": "z"}
        rows = {
            headline.name: {
                column: lookup(self.summary[part], headline.path)
                for column, part in columns.items()
            }
            for headline in HEADLINES
        }
        return pd.DataFrame.from_dict(rows, orient="index").dropna(subset="observed")

    @property
    def sentences(self) -> list[str]:
        """The headline figures in sentences."""
        return interpret(self.summary)


def analyze(
    base: str | None,
    trained: str,
    *,
    other: str | None = None,
    spectrum: str = "exact",
    out: str | Path | None = None,
    prune: Mapping[str, Any] | None = None,
    progress: Progress = quiet,
) -> Analysis:
    """Compare two checkpoints: sparsity, spectra, placement, each beside its null model.

    base, trained, other: folders, Hub ids, run folders or recipes; ``base`` is by default what the run
    ``trained`` started from; ``other`` is a second model trained from
    the same base. spectrum: exact, or fast (the 64 leading singular values with bounds). out: folder
    for tables, figures and the report; the same call resumes an interrupted one. prune: a curve of
    ``opd prune`` to put into the report. Raises ValueError for checkpoints that cannot be compared.
    """
    if out is None:
        with TemporaryDirectory(prefix="opd-analyze-") as folder:
            found = analyze(
                base, trained, other=other, spectrum=spectrum, out=folder, progress=progress
            )
        return Analysis(summary=found.summary, tensors=found.tensors, report=None)
    folder = Path(out)
    if folder.is_file():
        raise ValueError(f"out={out} is a file: name a folder")
    inputs = AnalysisInputs(
        base=find_base(trained, base),
        trained=resolved_model(trained),
        other=None if other is None else resolved_model(other),
        spectrum=Spectrum(spectrum),
    )
    rows = measure_checkpoints(inputs, folder, progress)
    found = summarize(rows) | {"prune": prune}
    (folder / "summary.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_tables(rows, folder)
    page = write_report(inputs, rows, found, folder)
    return Analysis(summary=found, tensors=pd.DataFrame(flatten(rows)), report=page)
