"""``opd plan``."""

import json
from dataclasses import dataclass

from rich.console import Console

from opd.cli.grammar import parse_command_line
from opd.config.arguments import parse_arguments, split_arguments
from opd.config.fields import bounded

HELP = """usage: opd plan RECIPE [gpus=N] [gpu=NAME] [key=value ...] [--json]

Forecast a run before anything is loaded: memory of each card in each phase, bytes, seconds of a
step, what limits it, and what to change when it does not fit. Only configs of models are read.

  RECIPE     path of a YAML file, or a bundled recipe (opd train --help lists them)
  key=value  settings as in opd train
  --json     print the plan as JSON, sizes in bytes

example: opd plan qwen3_1.7b_dapo_math gpus=8 gpu=H100 zero=3"""


@dataclass(kw_only=True, slots=True)
class PlanArguments:
    """Keys of `opd plan`; settings of the recipe may follow."""

    gpus: int | None = bounded(None, least=0)
    """GPUs of a machine; by default those that are here, or with gpu=... one for each process."""
    gpu: str | None = None
    """A100-40, A100-80, H100, H200, L40S, RTX4090 or B200; by default the one that is here."""
    nodes: int = bounded(1, least=1)
    """Machines with so many GPUs each."""
    prompt_tokens: int = bounded(256, least=1)
    """Tokens of a prompt; completions are taken to be rollout.max_tokens long."""


def main(argv: list[str]) -> None:
    """Parse, forecast and print."""
    line = parse_command_line(
        argv, HELP, positionals=("RECIPE",), flags=("--json",), shown=PlanArguments
    )
    own, overrides = split_arguments(PlanArguments, line.settings)
    arguments = parse_arguments(PlanArguments, own)
    from opd.run import plan, plan_page  # loads transformers, which --help does not need

    found = plan.plan_recipe(
        line.positionals[0],
        overrides,
        gpu=arguments.gpu,
        gpus=arguments.gpus,
        nodes=arguments.nodes,
        prompt_tokens=arguments.prompt_tokens,
    )
    if "--json" in line.flags:
        print(json.dumps(plan.as_json(found), indent=2))
    else:
        plan_page.print_plan(found, Console(markup=False))
