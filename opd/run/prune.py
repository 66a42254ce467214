"""Revert part of what training changed, and evaluate the rest."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from opd.analysis.prune import ChangedWeights, Order, wilson_interval
from opd.analysis.report import PRUNE_FIGURE
from opd.checked_json import read_json
from opd.checkpoint.tensors import dtype_name, open_checkpoint, torch_dtype
from opd.config.arguments import parse_arguments, split_arguments
from opd.config.fields import bounded
from opd.config.rollout import engine_dtype
from opd.config.schema import problems
from opd.data.prompt_sets import read_prompt_sets
from opd.data.tokenizer import read_student_tokenizer
from opd.mask.figures import prune_curve
from opd.mask.rules import trained_weights
from opd.run.evaluate_apart import evaluate_apart
from opd.run.model_names import find_base
from opd.run.recipe import Recipe, load_recipe
from opd.run.stages import stage

CURVE = "prune.json"


@dataclass(kw_only=True, slots=True)
class PruneArguments:
    """Keys of `opd prune`; settings of the recipe may follow."""

    base: str | None = None
    """What training started from: folder, Hub id, run or recipe; by default that of the run `trained`."""
    trained: str = MISSING
    """The finished run (a run folder or a checkpoint)."""
    recipe: str = MISSING
    """The recipe whose held-out prompts are used for evaluation."""
    out: str = MISSING
    """Folder for prune.json, prune.png and the evaluations' logs."""
    shares: list[float] = bounded([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
    """Shares of the changed weights that are reverted to the base's values."""
    orders: list[Order] = bounded([*Order])
    """Which changes are reverted first, one curve each: the smallest, the largest, or random ones."""
    seed: int = bounded(0, least=0)
    """Fixes the random order and the tie-breaks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneCall:
    """The arguments of a call, the recipe, and the recipe's overrides."""

    arguments: PruneArguments
    recipe: Recipe
    overrides: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """A point of a curve, as prune.json holds it."""

    reverted: int
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Earlier:
    """What an earlier call found, as prune.json holds it."""

    moved: int
    curves: dict[str, list[_Point]]


def parse_prune(words: Sequence[str]) -> PruneCall:
    """Parse a call. Raises ValueError before any model is read."""
    own, overrides = split_arguments(PruneArguments, words)
    arguments = parse_arguments(PruneArguments, own)
    recipe = load_recipe(arguments.recipe, *overrides)
    _require_valid(arguments, recipe)
    return PruneCall(arguments=arguments, recipe=recipe, overrides=overrides)


def prune(call: PruneCall) -> dict[str, Any]:
    """Evaluate each variant and write curve and figure; returns the contents of prune.json.

    Changes are weights that differ in the rollout engine's number format. A variant that was evaluated
    before with the same arguments is not evaluated again. Raises ValueError for configuration errors.
    """
    arguments, recipe = call.arguments, call.recipe
    dtype = torch_dtype(engine_dtype(recipe.config).value)
    base = find_base(arguments.trained, arguments.base)
    changed = ChangedWeights(
        base=open_checkpoint(base),
        trained=trained_weights(arguments.trained),
        dtype=dtype,
    )
    with stage("compare the two models"):
        moved = changed.count()
    if not moved:
        raise ValueError(f"trained={arguments.trained} does not differ from base={base} in {dtype}")
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "base": base,
        "trained": arguments.trained,
        "recipe": arguments.recipe,
        "overrides": call.overrides,
        "seed": arguments.seed,
        "dtype": dtype_name(dtype),
        "moved": moved,
        "questions": _questions(recipe),
        "curves": {},
    }
    known = _known(out / CURVE, result)
    for order in arguments.orders:
        points: list[dict[str, float]] = []
        for share in sorted(arguments.shares):
            count = round(share * moved)
            # the order does not matter for none or all of them
            key = (str(order.value) if 0 < count < moved else "any", count)
            if key not in known:
                known[key] = _accuracy(changed, count, order, arguments.seed, recipe, out)
            points.append(_point(share, count, known[key], result["questions"]))
        result["curves"][order.value] = points
        (out / CURVE).write_text(json.dumps(result, indent=1) + "\n")
    prune_curve(result["curves"], moved, out / PRUNE_FIGURE)
    return result


def _require_valid(arguments: PruneArguments, recipe: Recipe) -> None:
    found = problems(recipe.config)
    if recipe.config.data.eval is None:
        found.append("data.eval is not set: it names the prompts to evaluate on")
    if not arguments.shares or not all(0 <= share <= 1 for share in arguments.shares):
        found.append(f"shares={arguments.shares}: allowed are numbers from 0 to 1")
    if not arguments.orders:
        found.append(f"orders is empty: allowed are {', '.join(Order)}")
    if found:
        raise ValueError("\n".join(found))


def _questions(recipe: Recipe) -> int:
    config = recipe.config
    return len(
        read_prompt_sets(
            config, read_student_tokenizer(config.student, config.data.chat_template)
        ).eval
    )


def _known(file: Path, settings: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    """Accuracies of an earlier call with the same settings."""
    if not file.is_file():
        return {}
    remedy = "remove it, or give another out="
    content = file.read_bytes()
    before = read_json(content, dict[str, Any], file, remedy)
    if any(before.get(key) != settings[key] for key in settings if key != "curves"):
        return {}
    earlier = read_json(content, _Earlier, file, remedy)
    found = {}
    for order, points in earlier.curves.items():
        for point in points:
            some = 0 < point.reverted < earlier.moved
            found[(order if some else "any", point.reverted)] = point.accuracy
    return found


def _accuracy(
    changed: ChangedWeights, count: int, order: Order, seed: int, recipe: Recipe, out: Path
) -> float:
    log = out / "logs" / f"{order.value}_{count}.log"
    with tempfile.TemporaryDirectory(dir=out) as folder:
        model = Path(folder) / "model"
        with stage(f"evaluate with {count} changes reverted, {order.value} first"):
            changed.write(count, order, seed, model)
            metrics = evaluate_apart(recipe, str(model), ["eval.k=0"], log)
    if metrics is None:
        raise ValueError(f"a pruned model could not be evaluated: {log} says why")
    return metrics[f"eval/{recipe.config.eval.task}/accuracy"]


def _point(share: float, count: int, accuracy: float, prompts: int) -> dict[str, float]:
    low, high = wilson_interval(round(accuracy * prompts), prompts)
    return {"share": share, "reverted": count, "accuracy": accuracy, "low": low, "high": high}
