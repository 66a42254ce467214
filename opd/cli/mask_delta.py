"""``opd mask export | apply | undo``: a trained subnetwork as a small file, and back."""

import shlex
import sys
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from omegaconf import MISSING

from opd.checkpoint.companions import require_free
from opd.checkpoint.tensors import Checkpoint, open_checkpoint, torch_dtype
from opd.cli.grammar import parse_command_line
from opd.config.arguments import parse_arguments
from opd.delta.export import cast, export_delta
from opd.delta.format import Delta, Side, read_delta
from opd.delta.rebuild import write_base, write_trained
from opd.delta.shira import Adapter, UnsupportedParameters, export_shira
from opd.mask.mask import Mask
from opd.run.model_names import find_base, resolved_model

EXPORT = """usage: opd mask export trained=MODEL out=FILE [base=MODEL] [key=value ...]

Write what training changed as one small file, or as a SHiRA adapter (format=shira).

example: opd mask export trained=runs/x out=x.safetensors
"""
APPLY = """usage: opd mask apply base=MODEL delta=FILE out=FOLDER

Make the trained model from its base and the file of `opd mask export`, bit for bit.

example: opd mask apply base=MODEL delta=x.safetensors out=trained
"""
UNDO = """usage: opd mask undo trained=MODEL delta=FILE out=FOLDER

Make the base from the trained model and the file of `opd mask export`, bit for bit.

example: opd mask undo trained=runs/x delta=x.safetensors out=base
"""


class Format(StrEnum):
    """The format of an exported subnetwork."""

    delta = "delta"
    shira = "shira"


class CastTo(StrEnum):
    """Number formats to which trained weights can be rounded before they are compared."""

    stored = "stored"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@dataclass(kw_only=True, slots=True)
class ExportArguments:
    """Keys of `opd mask export`."""

    base: str | None = None
    """What training started from: folder, Hub id, run or recipe; by default that of the run `trained`."""
    trained: str = MISSING
    """The trained model: a folder, a Hub id or a run folder (its final/)."""
    out: str = MISSING
    """File to write; with format=shira a folder."""
    mask: str | None = None
    """Mask file: the export fails when a weight outside it changed."""
    dtype: CastTo = CastTo.stored
    """Number format to which the trained weights are rounded first."""
    format: Format = Format.delta
    """delta: one file, exact in both directions; shira: an adapter that PEFT loads."""
    others: UnsupportedParameters = UnsupportedParameters.refuse
    """format=shira: parameters that the adapter cannot hold are an error, or dropped with a warning."""


@dataclass(kw_only=True, slots=True)
class ApplyArguments:
    """Keys of `opd mask apply`."""

    base: str = MISSING
    """Folder or Hub id of the base."""
    delta: str = MISSING
    """File written by `opd mask export`."""
    out: str = MISSING
    """Folder for the trained model."""


@dataclass(kw_only=True, slots=True)
class UndoArguments:
    """Keys of `opd mask undo`."""

    trained: str = MISSING
    """The trained model: a folder, a Hub id or a run folder (its final/)."""
    delta: str = MISSING
    """File written by `opd mask export`."""
    out: str = MISSING
    """Folder for the base."""


def export(argv: list[str]) -> None:
    """``opd mask export base=A trained=B out=FILE [mask=] [dtype=] [format=] [others=]``."""
    line = parse_command_line(argv, EXPORT, shown=ExportArguments)
    arguments = parse_arguments(ExportArguments, line.settings)
    out = Path(arguments.out)
    if arguments.format == Format.shira:
        require_free(out)
        with tempfile.TemporaryDirectory() as folder:
            base, delta = _export(arguments, Path(folder) / "delta.safetensors", argv)
            adapter = export_shira(base, delta, out, arguments.others)
        _print_adapter(adapter, out)
        return
    if arguments.others != UnsupportedParameters.refuse:
        raise ValueError("others= has no effect without format=shira: leave it out")
    if out.suffix != ".safetensors":
        raise ValueError(
            f"out={out} is not a .safetensors file: give a name that ends in .safetensors"
        )
    if out.exists():
        raise ValueError(f"out={out} already exists: name a new file, or remove it")
    base, delta = _export(arguments, out, argv)
    dense = sum(stored.numel * stored.dtype.itemsize for stored in base.values())
    size = out.stat().st_size
    print(
        f"{delta.count:,} of {base.numel:,} weights changed ({delta.density:.4%}), in "
        f"{len(delta.changed)} of {len(base)} tensors\n"
        f"{out}: {size:,} bytes, {size / max(dense, 1):.2%} of the model's {dense:,}"
    )


def apply(argv: list[str]) -> None:
    """``opd mask apply base=A delta=FILE out=FOLDER``."""
    line = parse_command_line(argv, APPLY, shown=ApplyArguments)
    arguments = parse_arguments(ApplyArguments, line.settings)
    delta = read_delta(Path(arguments.delta))
    write_trained(open_checkpoint(resolved_model(arguments.base)), delta, Path(arguments.out))
    _print_rebuilt(delta, Side.trained, arguments.out)


def undo(argv: list[str]) -> None:
    """``opd mask undo trained=B delta=FILE out=FOLDER``."""
    line = parse_command_line(argv, UNDO, shown=UndoArguments)
    arguments = parse_arguments(UndoArguments, line.settings)
    delta = read_delta(Path(arguments.delta))
    write_base(open_checkpoint(resolved_model(arguments.trained)), delta, Path(arguments.out))
    _print_rebuilt(delta, Side.base, arguments.out)


def _export(arguments: ExportArguments, out: Path, argv: list[str]) -> tuple[Checkpoint, Delta]:
    base, trained = (
        open_checkpoint(find_base(arguments.trained, arguments.base)),
        open_checkpoint(resolved_model(arguments.trained)),
    )
    if arguments.dtype != CastTo.stored:
        trained = cast(trained, torch_dtype(arguments.dtype.value))
    mask = None if arguments.mask is None else Mask.read(arguments.mask)
    command = shlex.join(["opd", "mask", "export", *argv])
    return base, export_delta(base, trained, out, mask=mask, command=command)


def _print_rebuilt(delta: Delta, side: Side, out: str) -> None:
    model = delta.models[side]
    print(f"{out} is {model.name} bit for bit (fingerprint {model.fingerprint[:12]})")


def _print_adapter(adapter: Adapter, out: Path) -> None:
    for name, reason in adapter.left_out.items():
        print(f"opd: warning: left out {name}: {reason}", file=sys.stderr)
    print(
        f"{out}: a SHiRA adapter of r={adapter.rank}, {adapter.stored:,} values in "
        f"{len(adapter.linears)} Linears, {len(adapter.norms)} norm tensors whole; "
        f"{adapter.rounded:,} weights a rounding away from the trained ones"
    )
