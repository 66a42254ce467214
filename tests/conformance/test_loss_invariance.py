"""A step does not know how its batch was cut: micro-batches, padding, chunks of the head, ranks.

The updated weights agree to 1e-6, and the metrics, float32 sums, to 5e-6 of themselves.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from loss_ranks import CASES, MODEL
from safetensors.torch import load_file

pytestmark = pytest.mark.timeout(1800)  # the fixture trains every case
SCRIPT = str(Path(__file__).parent / "loss_ranks.py")
WHOLE = "torch_1_10000_1000"
CUTS = [
    "torch_1_10000_3",
    "torch_1_17_1000",
    "torch_1_40_7",
    "deepspeed_2_10000_1000",
    "deepspeed_2_17_3",
]


@pytest.fixture(scope="module")
def stepped(
    tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[[int, list[str]], None]
) -> Path:
    out = tmp_path_factory.mktemp("stepped")
    for ranks in (1, 2):
        cuts = [cut for cut in (WHOLE, *CUTS) if cut.split("_")[1] == str(ranks)]
        run_ranks(ranks, [SCRIPT, str(out), *cuts])
    return out


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("case", CASES)
def test_updated_weights_do_not_depend_on_how_a_batch_is_cut(
    stepped: Path, case: str, cut: str
) -> None:
    start = load_file(MODEL / "model.safetensors")
    whole, found = (load_file(stepped / name / f"{case}.safetensors") for name in (WHOLE, cut))
    assert whole.keys() == found.keys()
    assert max(float((whole[n] - found[n]).abs().max()) for n in whole) < 1e-6
    moved = max(float((whole[n] - start[n].float()).abs().max()) for n in whole if n in start)
    assert moved > 1e-4


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("case", CASES)
def test_metrics_do_not_depend_on_how_a_batch_is_cut(stepped: Path, case: str, cut: str) -> None:
    whole, found = (
        json.loads((stepped / name / f"{case}.json").read_text()) for name in (WHOLE, cut)
    )
    assert found == pytest.approx(whole, rel=5e-6, abs=1e-6)
