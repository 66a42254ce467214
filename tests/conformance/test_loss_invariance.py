"""A step does not know how its batch was cut: micro-batches, padding, chunks of the head, ranks.

The updated weights agree to 1e-6, and the metrics, float32 sums, to 5e-6 of themselves.
"""

import pytest
from safetensors.torch import load_file

from tests.support.cases import LOSSES
from tests.support.launch import run_ranks
from tests.support.learners import QUICKSTART
from tests.support.results import Results

pytestmark = pytest.mark.timeout(600, func_only=True)  # ranks are watched while they train
WHOLE = "torch/1/10000/1000"
CUTS = [
    "torch/1/10000/3",
    "torch/1/17/1000",
    "torch/1/40/7",
    "1/2/10000/1000",
    "1/2/17/3",
]


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = Results(out=tmp_path_factory.mktemp("stepped"))
    for ranks in (1, 2):
        cuts = [cut for cut in (WHOLE, *CUTS) if cut.split("/")[1] == str(ranks)]
        run_ranks(results, ranks, "losses", [f"{loss}/{cut}" for cut in cuts for loss in LOSSES])
    return results


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_updated_weights_do_not_depend_on_how_a_batch_is_cut(
    stepped: Results, loss: str, cut: str
) -> None:
    start = load_file(QUICKSTART / "model.safetensors")
    whole, found = (stepped.weights(f"{loss}/{name}") for name in (WHOLE, cut))
    assert whole.keys() == found.keys()
    assert max(float((whole[n] - found[n]).abs().max()) for n in whole) < 1e-6
    moved = max(float((whole[n] - start[n].float()).abs().max()) for n in whole if n in start)
    assert moved > 1e-4


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_metrics_do_not_depend_on_how_a_batch_is_cut(stepped: Results, loss: str, cut: str) -> None:
    (whole,), (found,) = (stepped.reports(f"{loss}/{name}") for name in (WHOLE, cut))
    for metrics in (whole, found):
        del metrics["tokens/padding"]  # this is about the cut
    assert found == pytest.approx(whole, rel=5e-6, abs=1e-6)
