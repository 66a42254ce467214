"""The plans that tests/unit/run/plan holds as files. Rewrite them: python -m tests.support.plans"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from opd.run.forecast.gpus import GIB, cards_named
from opd.run.placement import Cards
from opd.run.plan import Plan, as_json, make_plan

FOLDER = Path(__file__).parent.parent / "unit" / "run" / "plan"
LARGE = (
    "student.model=Qwen/Qwen3-14B",
    "teacher.model=Qwen/Qwen3-32B",
    "teacher.devices='6,7'",
    "teacher.tensor_parallel_size=2",
    "teacher.gpu_memory_utilization=0.8",
    "launch.processes=6",
    "rollout.max_tokens=8192",
    "rollout.n=4",
    "rollout.gpu_memory_utilization=0.5",
    "loss=reverse_kl",
    "zero=3",
)
OFFLOAD = "launch.deepspeed=launch/deepspeed/offload.json"
SMOLLM2 = (
    "student.model=HuggingFaceTB/SmolLM2-135M-Instruct",
    "teacher.model=HuggingFaceTB/SmolLM2-135M-Instruct",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCase:
    """A recipe on cards; without a name of a GPU a CPU with 16 GiB."""

    recipe: str
    overrides: tuple[str, ...] = ()
    gpus: int = 0
    gpu: str = "H100"
    prompt_tokens: int = 256
    cards: Cards = field(init=False)

    def __post_init__(self) -> None:
        found = Cards(count=0, memory_bytes=16 * GIB)
        if self.gpus:
            found = cards_named(self.gpu, self.gpus, 1)
        object.__setattr__(self, "cards", found)

    def plan(self) -> Plan:
        return make_plan(
            self.recipe, self.overrides, cards=self.cards, prompt_tokens=self.prompt_tokens
        )

    def text(self) -> str:
        """The plan as the file has it."""
        return json.dumps(as_json(self.plan()), indent=1) + "\n"


CASES = {
    "qwen2.5_1.5b_gsm8k": PlanCase(recipe="qwen2.5_1.5b_gsm8k", gpus=2),
    "qwen3_1.7b_dapo_math": PlanCase(recipe="qwen3_1.7b_dapo_math", gpus=8),
    "paper_opd_k1": PlanCase(recipe="paper_opd_k1", gpus=8),
    "paper_opd_subnetwork": PlanCase(recipe="paper_opd_subnetwork", gpus=8),
    "14b_from_32b": PlanCase(recipe="qwen3_1.7b_dapo_math", overrides=LARGE, gpus=8),
    "14b_from_32b_offload": PlanCase(
        recipe="qwen3_1.7b_dapo_math", overrides=(*LARGE, OFFLOAD), gpus=8
    ),
    "quickstart": PlanCase(recipe="quickstart", prompt_tokens=10),
    "quickstart_on_gpus": PlanCase(recipe="quickstart", gpus=2, gpu="L40S", prompt_tokens=10),
    "quickstart_subnetwork": PlanCase(recipe="quickstart_subnetwork", prompt_tokens=10),
    "consolidate_quickstart": PlanCase(recipe="consolidate_quickstart", prompt_tokens=10),
    "cross_tokenizer_quickstart": PlanCase(recipe="cross_tokenizer_quickstart", prompt_tokens=10),
    "contrast_quickstart": PlanCase(recipe="contrast_quickstart", prompt_tokens=10),
    "smollm2_135m_heal": PlanCase(recipe="smollm2_135m_heal", overrides=SMOLLM2, prompt_tokens=64),
}


def main() -> None:
    """Write every file."""
    for name, case in CASES.items():
        (FOLDER / f"{name}.json").write_text(case.text())


if __name__ == "__main__":
    main()
