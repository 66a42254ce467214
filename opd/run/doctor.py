"""Checks a recipe before it costs anything: a dry run, then what a run compares at its start."""

from collections.abc import Sequence

from opd.run.hub import hub_answers
from opd.run.preflight import hub_names
from opd.run.recipe import load_recipe
from opd.run.self_check import compare_alone
from opd.run.train import train


def doctor(recipe: str, overrides: Sequence[str]) -> None:
    """Print the plan and the findings. Raises ValueError with one sentence for the first error."""
    train(recipe, *overrides, "dry_run=true")
    config = load_recipe(recipe, *overrides).config
    if hub_names(config) and not hub_answers():
        return
    lines = compare_alone(config)
    if lines is None:
        lines = ["student, teacher and engine are not compared here; the run does it at its start"]
    print("\n".join(lines))
