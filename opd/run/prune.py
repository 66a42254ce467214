"""``opd prune``: take back part of what training moved, and examine what is left."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.console import Console
from rich.table import Table

from opd import build
from opd.analysis.report import PRUNE_PICTURE
from opd.run.recipe import Composed, composed, find_recipe
from opd.run.evaluate import examined_apart
from opd.config.arguments import typed
from opd.config.fields import bounded
from opd.config.rules import problems
from opd.analysis.prune import Moves, Order, wilson
from opd.mask.rules import trained_weights
from opd.checkpoint.tensors import open_checkpoint

CURVE = "prune.json"


@dataclass(kw_only=True, slots=True)
class PruneCommand:
    """What `opd prune` is told; keys that the recipe knows may follow."""

    base: str = MISSING
    """Folder or hub id of the model that training started from."""
    trained: str = MISSING
    """The finished run (a run folder or a checkpoint)."""
    recipe: str = MISSING
    """The recipe whose examination is asked."""
    out: str = MISSING
    """Folder for prune.json, prune.png and the examinations' logs."""
    shares: list[float] = bounded([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
    """Shares of the moved weights that go back to the base's values."""
    orders: list[Order] = bounded([*Order])
    """Which moves go back first, one curve each: the smallest, the largest, or any."""
    seed: int = bounded(0, least=0)
    """Fixes the random order and the parting of equal moves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Sound words of a call, and the recipe that they lead to."""

    told: PruneCommand
    recipe: Composed
    rest: list[str]


def asked(words: Sequence[str]) -> Asked:
    """What the words ask for. Raises ValueError for the user's mistakes, before any model is read."""
    own = {field.name for field in fields(PruneCommand)}
    told = typed(PruneCommand, [w for w in words if w.partition("=")[0] in own])
    rest = [w for w in words if w.partition("=")[0] not in own]
    recipe = composed(find_recipe(told.recipe), rest)
    _require_sound(told, recipe)
    return Asked(told=told, recipe=recipe, rest=rest)


def prune(call: Asked) -> dict[str, Any]:
    """Examine each variant and leave curve and picture; returns what prune.json holds.

    Moves are weights that differ in the rollout engine's number format. What was examined before
    with the same words is not asked again. Raises ValueError for the user's mistakes.
    """
    told, recipe = call.told, call.recipe
    dtype = build.torch_dtype(build.engine_dtype(recipe.config))
    moves = Moves(
        base=open_checkpoint(told.base), trained=trained_weights(told.trained), dtype=dtype
    )
    moved = moves.count()
    if not moved:
        raise ValueError(f"trained={told.trained} does not differ from base={told.base} in {dtype}")
    out = Path(told.out)
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "base": told.base,
        "trained": told.trained,
        "recipe": told.recipe,
        "overrides": call.rest,
        "seed": told.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "moved": moved,
        "questions": _questions(recipe),
        "curves": {},
    }
    known = _known(out / CURVE, result)
    for order in told.orders:
        points: list[dict[str, float]] = []
        for share in sorted(told.shares):
            count = round(share * moved)
            # no order decides about none or all of them
            key = (str(order.value) if 0 < count < moved else "any", count)
            if key not in known:
                known[key] = _accuracy(moves, count, order, told.seed, recipe, out)
            points.append(_point(share, count, known[key], result["questions"]))
        result["curves"][order.value] = points
        (out / CURVE).write_text(json.dumps(result, indent=1) + "\n")
    from opd.mask.figures import prune_curve

    prune_curve(result["curves"], moved, out / PRUNE_PICTURE)
    return result


def print_curves(result: Mapping[str, Any]) -> None:
    """The accuracies as a table, a column an order."""
    console, orders = Console(), list(result["curves"])
    table = Table("moves taken back", *(f"{order} first" for order in orders))
    for row in zip(*result["curves"].values(), strict=True):
        cells = [f"{p['accuracy']:.3f}  ({p['low']:.3f} to {p['high']:.3f})" for p in row]
        table.add_row(f"{row[0]['share']:.0%}", *cells)
    console.print(table)


def _require_sound(told: PruneCommand, recipe: Composed) -> None:
    found = problems(recipe.config)
    if recipe.config.data.eval is None:
        found.append("data.eval is not set: there is nothing to ask")
    if not told.shares or not all(0 <= share <= 1 for share in told.shares):
        found.append(f"shares={told.shares}: allowed are numbers from 0 to 1")
    if not told.orders:
        found.append(f"orders is empty: allowed are {', '.join(Order)}")
    if found:
        raise ValueError("\n".join(found))


def _questions(recipe: Composed) -> int:
    config = recipe.config
    text = build.build_text(
        config.student.model, trust_remote_code=config.student.trust_remote_code
    )
    return len(build.build_prompts(config, text).eval)


def _known(file: Path, wanted: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    """Accuracies of an earlier call with the same settings."""
    if not file.is_file():
        return {}
    before = json.loads(file.read_text())
    if any(before[key] != wanted[key] for key in wanted if key != "curves"):
        return {}
    found = {}
    for order, points in before["curves"].items():
        for point in points:
            some = 0 < point["reverted"] < before["moved"]
            found[(order if some else "any", point["reverted"])] = point["accuracy"]
    return found


def _accuracy(
    moves: Moves, count: int, order: Order, seed: int, recipe: Composed, out: Path
) -> float:
    log = out / "logs" / f"{order.value}_{count}.log"
    with tempfile.TemporaryDirectory(dir=out) as folder:
        model = Path(folder) / "model"
        moves.write(count, order, seed, model)
        metrics = examined_apart(recipe, str(model), ["eval.k=0"], log)
    if metrics is None:
        raise ValueError(f"a pruned model could not be examined: {log} says why")
    return metrics[f"eval/{recipe.config.eval.task}/accuracy"]


def _point(share: float, count: int, accuracy: float, asked: int) -> dict[str, float]:
    low, high = wilson(round(accuracy * asked), asked)
    return {"share": share, "reverted": count, "accuracy": accuracy, "low": low, "high": high}
