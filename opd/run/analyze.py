"""What training changed in the weights, and is it more than rounding?"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from opd.analysis.formatting import HEADLINES, Spectrum, at, meaning
from opd.analysis.report import write_report
from opd.analysis.summary import summary
from opd.analysis.tables import flattened, write_tables
from opd.analysis.walk import Question, walked
from opd.checkpoint.chunks import Progress, quiet
from opd.run.model_names import resolved_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What changed between two checkpoints.

    ``summary`` holds the figures for the whole model, each beside its null; ``tensors`` one row a
    tensor; ``report`` is the page, where it was written.
    """

    summary: dict[str, Any]
    tensors: pd.DataFrame
    report: Path | None

    @property
    def headlines(self) -> pd.DataFrame:
        """The headline figures: observed in bf16, null, excess and z."""
        columns = {"observed": "paper", "null": "null", "excess": "excess", "z": "z"}
        rows = {
            headline.name: {
                column: at(self.summary[part], headline.path) for column, part in columns.items()
            }
            for headline in HEADLINES
        }
        return pd.DataFrame.from_dict(rows, orient="index").dropna(subset="observed")

    @property
    def sentences(self) -> list[str]:
        """What the headline figures say together."""
        return meaning(self.summary)


def analyze(
    base: str,
    trained: str,
    *,
    other: str | None = None,
    spectrum: str = "exact",
    out: str | Path | None = None,
    prune: Mapping[str, Any] | None = None,
    progress: Progress = quiet,
) -> Analysis:
    """Compare two checkpoints: sparsity, spectra, placement, each beside its null model.

    base, trained, other: folders, hub ids or run folders; ``other`` is a second model trained from
    the same base. spectrum: exact, or fast (the 64 leading singular values with bounds). out: folder
    for tables, pictures and the report; the same call resumes from what is there. prune: a curve of
    ``opd prune`` to put into the report. Raises ValueError for checkpoints that do not compare.
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
    question = Question(
        base=resolved_model(base),
        trained=resolved_model(trained),
        other=None if other is None else resolved_model(other),
        spectrum=Spectrum(spectrum),
    )
    rows = walked(question, folder, progress)
    found = summary(rows) | {"prune": prune}
    (folder / "summary.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_tables(rows, folder)
    page = write_report(question, rows, found, folder)
    return Analysis(summary=found, tensors=pd.DataFrame(flattened(rows)), report=page)
