import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import plan_accuracy
from opd.cli import main, plan
from opd.run.forecast.gpus import GIB
from opd.run.forecast.rank import Phase
from opd.run.placement import Cards
from opd.run.plan import chosen_cards, make_plan
from opd.run.plan_page import print_plan
from tests.support.plans import CASES, FOLDER

WIDTHS = (80, 160)


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_the_one_in_its_file(name: str) -> None:
    """Rewrite the files with python -m tests.support.plans, and read what changed."""
    assert json.loads(CASES[name].text()) == json.loads((FOLDER / f"{name}.json").read_text())


def test_every_file_has_a_case_and_every_recipe_a_file() -> None:
    from opd.run.recipe import bundled_recipes

    assert {path.stem for path in FOLDER.glob("*.json")} == set(CASES)
    assert set(bundled_recipes()) <= {case.recipe for case in CASES.values()}


@pytest.mark.parametrize("name", ["paper_opd_k1", "paper_opd_subnetwork", "14b_from_32b"])
def test_every_phase_of_a_rank_has_a_figure(name: str) -> None:
    found = json.loads((FOLDER / f"{name}.json").read_text())
    for forecast in found["forecasts"]:
        phases = forecast["devices"][0]["phases"]
        assert list(phases) == [phase.value for phase in Phase]
        assert all(sum(terms.values()) > GIB for terms in phases.values())
    assert set(found["seconds"]) == {"rollout", "score", "learn", "sync"}


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_into_the_terminal(width: int) -> None:
    out = io.StringIO()
    print_plan(CASES["14b_from_32b"].plan(), Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.startswith("does not fit") for line in lines)
    assert any("bound:" in line for line in lines)


def test_changes_are_what_forecasting_again_says() -> None:
    case = CASES["14b_from_32b"]
    found = case.plan()
    assert not any(each.spare > found.cards.memory_bytes for each in found.changes)
    offload = next(each for each in found.changes if "offload" in each.setting)
    again = CASES["14b_from_32b_offload"].plan()
    assert offload.spare == min(device.spare for device in again.forecasts[0].devices)
    assert again.too_small == ()


@pytest.fixture
def arguments() -> list[str]:
    return ["paper_opd_k1", "gpus=8", "gpu=A100-80", "rollout.max_tokens=1024"]


def test_the_command_prints_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plan.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["cards"]["name"] == "A100-80"
    assert found["recipe"] == "paper_opd_k1"


def test_a_plan_needs_no_engine() -> None:
    """In an interpreter of its own: other tests load engines."""
    code = "import opd.cli.plan, opd.run.plan, opd.run.plan_page, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & {"vllm", "deepspeed", "opd.assembly"} == set()


def test_the_command_lists_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    assert "prompt_tokens=256" in capsys.readouterr().out


def test_a_wrong_card_costs_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["plan", "quickstart", "gpu=K80"]) == 2
    assert "allowed are A100-40" in capsys.readouterr().err


def test_more_ranks_than_cards_cost_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["plan", "paper_opd_k1", "gpu=H100", "gpus=2", "launch.processes=8"]) == 2
    assert "launch.processes=8 needs as many GPUs and 2 can be seen" in capsys.readouterr().err


def test_a_number_of_cards_without_a_name_needs_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="add gpu=H100"):
        chosen_cards(None, 4, 1, 4)
    assert chosen_cards(None, None, 1, 4).count == 0
    assert chosen_cards("H100", None, 1, 4).count == 4


MEASURED_MIB = {
    "dense AdamW, fp32": 3704,
    "mask of density 0.05, AdamW, fp32": 2772,
    "dense AdamW, bf16, ZeRO-2 on 2 ranks": 3827,
    "LoRA r=16, AdamW, fp32": 2436,
}
"""Peak resident memory of a rank, by benchmarks/plan_accuracy.py (docs/benchmarks.md)."""


@pytest.mark.parametrize("case", MEASURED_MIB)
def test_a_forecast_is_within_its_bound_of_the_measured_peak(case: str, tmp_path: Path) -> None:
    from transformers import Qwen2Config

    for name in ("student", "teacher"):
        shape = Qwen2Config(**plan_accuracy.SHAPE, dtype="float32")
        shape.save_pretrained(tmp_path / name)
    settings = [
        *plan_accuracy.COMMON,
        f"student.model={tmp_path}/student",
        f"teacher.model={tmp_path}/teacher",
        *plan_accuracy.CASES[case],
    ]
    found = make_plan(
        "quickstart",
        settings,
        cards=Cards(count=0),
        prompt_tokens=plan_accuracy.PROMPT_TOKENS,
    )
    planned = max(each.devices[0].peak for each in found.forecasts) / plan_accuracy.MIB
    assert planned == pytest.approx(MEASURED_MIB[case], rel=plan_accuracy.BOUND)
