"""All tensors of a pair, one row each, in a file that the same command goes on with."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd.analysis.formatting import Spectrum
from opd.analysis.measure import measured
from opd.analysis.pair import Pair, as_parts, pair_checkpoints
from opd.analysis.rows import Row
from opd.checkpoint.chunks import THREADS, Progress, quiet
from opd.checkpoint.tensors import model_folder, weight_files

ROWS = "tensors.jsonl"
FORMAT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Folders or hub ids: what training started from, what it made, and a second model if any."""

    base: str
    trained: str
    other: str | None = None
    spectrum: Spectrum = Spectrum.exact

    def header(self) -> dict[str, Any]:
        """What a file of rows belongs to: the models, and their files' sizes and times."""
        models = {"base": self.base, "trained": self.trained, "other": self.other}
        return {"format": FORMAT, "spectrum": self.spectrum.value} | {
            side: None if model is None else {"model": model, "files": _stamps(model)}
            for side, model in models.items()
        }


def _stamps(model: str) -> list[list[Any]]:
    files = weight_files(model_folder(model))
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def walked(question: Question, out: Path, progress: Progress = quiet) -> list[Row]:
    """The rows of every tensor, in the order of names; finished ones are taken from ``out``.

    Raises ValueError when a checkpoint cannot be opened, when nothing compares, or when ``out``
    holds the rows of another pair.
    """
    pairs = pair_checkpoints(question.base, question.trained)
    others: dict[str, Pair] = {}
    if question.other is not None:
        others = {pair.name: pair for pair in pair_checkpoints(question.base, question.other)}
        pairs = as_parts(pairs, {p.name for p in pairs if p.is_fused and p.name not in others})
    out.mkdir(parents=True, exist_ok=True)
    file = out / ROWS
    header = question.header()
    done = {row["name"]: row for row in _finished(file, header)}
    total = max(1, sum(pair.numel for pair in pairs))
    with file.open("a") as rows:
        if not file.stat().st_size:
            rows.write(json.dumps(header) + "\n")
        missing = [pair for pair in pairs if pair.name not in done]
        seen = total - sum(pair.numel for pair in missing)
        for pair, row in measured_all(missing, others, question.spectrum):
            done[pair.name] = row
            rows.write(json.dumps(row) + "\n")
            rows.flush()
            seen += pair.numel
            progress("measuring tensors", seen / total)
    return [done[pair.name] for pair in pairs]


def measured_all(
    pairs: Sequence[Pair], others: Mapping[str, Pair], spectrum: Spectrum = Spectrum.exact
) -> Iterator[tuple[Pair, Row]]:
    """Rows of pairs as they are done; THREADS at a time, the largest first, so that none is left
    alone at the end. Each has its share of the cores: a tensor is looked at in chunks that are too
    small for many.
    """

    def work(pair: Pair) -> tuple[Pair, Row]:
        return pair, measured(pair, others.get(pair.name), spectrum)

    cores = torch.get_num_threads()
    share = (max(1, cores // THREADS),)
    pool = ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=share)
    try:
        ordered = sorted(pairs, key=lambda pair: -pair.numel)
        for done in as_completed([pool.submit(work, pair) for pair in ordered]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)


def _finished(file: Path, header: dict[str, Any]) -> Iterator[Row]:
    """Rows of an earlier, interrupted walk; a line that was cut short is taken off the file."""
    if not file.is_file():
        return
    whole = file.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if len(kept) < len(whole):
        file.write_bytes(kept)
    lines = kept.splitlines()
    if not lines:
        return
    if json.loads(lines[0]) != header:
        raise ValueError(
            f"{file.parent} holds the analysis of another pair, or its models or spectrum= have "
            "changed since: give another out=, or remove it"
        )
    yield from (json.loads(line) for line in lines[1:])
