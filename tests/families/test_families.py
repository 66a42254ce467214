"""Every family is trained under vLLM with its weights whole and masked, or refused in one sentence."""

from typing import Any

import pytest

from tests.families.check import RESULT
from tests.families.models import DEFAULT, FAMILIES
from tests.support.launch import run_cases
from tests.support.results import Results

pytestmark = pytest.mark.timeout(600, func_only=True)  # the process is watched while it checks
EXACT, HALF = 1e-4, 0.15
"""Mean nats between engine and learner: in float32, and with an engine in bfloat16."""
SUPPORTED = [name for name, family in FAMILIES.items() if not family.refused]
REFUSED = [name for name, family in FAMILIES.items() if family.refused]


def cases(names: list[str]) -> list[Any]:
    """Those of ``DEFAULT`` run always, the others with ``-m slow``."""
    return [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of all families that are selected, checked in one process; a crash costs one family."""
    found = Results(out=tmp_path_factory.mktemp("families"))
    selected = {item.callspec.params["name"] for item in request.session.items if asks(item)}
    run_cases(found, 1, ["-m", "tests.families.check"], [n for n in FAMILIES if n in selected])
    return found


def asks(item: Any) -> bool:
    return "results" in item.fixturenames


def bound(name: str) -> float:
    return HALF if FAMILIES[name].overrides else EXACT


@pytest.mark.parametrize("name", cases(SUPPORTED))
def test_a_family_trains_under_vllm_with_every_weight_and_with_a_mask(
    results: Results, name: str
) -> None:
    found = results.json(name, RESULT)
    assert found["status"] == "green", found
    for run in ("dense", "masked"):
        gaps = found[run]
        assert gaps["self"] <= 1e-6
        assert max(gaps["push_gap"], gaps["sync_gap"], gaps["step_gap"]) <= bound(name), run
    assert found["moved"]["frozen_moved"] == 0
    assert found["moved"]["kept_moved"] > 1000


@pytest.mark.parametrize("name", cases(SUPPORTED))
def test_what_a_family_exports_is_the_trained_model_in_every_program(
    results: Results, name: str
) -> None:
    found = results.json(name, RESULT)
    assert found["status"] == "green", found
    assert found["reload"]["engine"] == 0.0
    assert found["reload"]["transformers"] <= bound(name)
    assert found["analyze"]["left_out"] == 0
    assert 0.0 < found["analyze"]["unchanged"] < 0.9


@pytest.mark.parametrize("name", cases(REFUSED))
def test_a_family_that_cannot_be_trained_is_refused_in_one_sentence(
    results: Results, name: str
) -> None:
    found = results.json(name, RESULT)
    assert found["status"] == "refused", found
    assert FAMILIES[name].error in found["error"]
    assert "\n" not in found["error"]
