"""Checks a recipe before it costs anything: a dry run, then the student scored by itself."""

from collections.abc import Sequence

from opd.data.prompt_sets import read_prompt_sets
from opd.data.tokenizer import read_student_tokenizer
from opd.run.preflight import hub_answers, hub_names
from opd.run.recipe import load_recipe
from opd.run.self_check import self_loss_alone
from opd.run.train import train


def doctor(recipe: str, overrides: Sequence[str]) -> None:
    """Print the plan and the findings. Raises ValueError with one sentence for the first error."""
    train(recipe, *overrides, "dry_run=true")
    config = load_recipe(recipe, *overrides).config
    if hub_names(config) and not hub_answers():
        return
    tokenizer = read_student_tokenizer(config.student)
    loss = self_loss_alone(config, tokenizer, read_prompt_sets(config, tokenizer))
    if loss is None:
        print("the student scored by itself: not computed here, the run does it at its start")
    else:
        print(f"the student scored by itself: loss {loss:.2g} nats a token, as it should be")
