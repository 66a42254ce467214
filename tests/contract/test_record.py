"""What a run records of its weights is what its checkpoints say, at every stage and after a resume."""

from typing import Any

import pytest
import torch

from tests.support.cases import record_case
from tests.support.launch import run_ranks
from tests.support.learners import initial_weights, tiny_mask, tiny_model
from tests.support.results import ROWS, Results

pytestmark = pytest.mark.timeout(600, func_only=True)  # ranks are watched while they train
ALONE = "dense/torch/fp32/adamw/1.0/6"
MASKED_ALONE = "compact/torch/fp32/adamw/1.0/6"
SHARDED = [f"dense/{zero}/fp32/adamw/1.0/6" for zero in (1, 3)]
# after stage 3 a process rounds bf16 differently, with or without a record
RESUMED = [SHARDED[0], "dense/2/bf16/adamw/1.0/6", SHARDED[1]]
MASKED = "compact/3/fp32/adamw/1.0/6"
BETA1, BETA2, LR, DECAY = 0.9, 0.999, 3e-3, 0.1
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = Results(out=tmp_path_factory.mktemp("recorded"))
    run_ranks(results, 1, "record", [ALONE, MASKED_ALONE])
    both = [c for case in RESUMED for c in (case, f"{case}/resumed")]
    run_ranks(results, 2, "record", [*both, MASKED])
    return results


def rows(recorded: Results, case: str) -> dict[int, dict[str, Any]]:
    return {row["step"]: row["row"] for row in recorded.json(case, ROWS)}


def checkpoint(recorded: Results, step: int) -> tuple[Tensors, Tensors, Tensors]:
    """Weights, first and second moments by name, float32, of the plain run after a step."""
    if step == 0:
        start = {
            name: stored.read().float()
            for name, stored in initial_weights(record_case(ALONE).setup).items()
        }
        return start, {n: torch.zeros_like(w) for n, w in start.items()}, {}
    state = torch.load(recorded.folder(ALONE) / f"step_{step}" / "torch.pt", weights_only=True)
    weights = {n.removeprefix("model."): w for n, w in state["student"].items()}
    # the optimizer numbers matrices first, then vectors, each in the model's order
    order = [n for n, p in tiny_model().named_parameters() if p.ndim > 1]
    order += [n for n, p in tiny_model().named_parameters() if p.ndim <= 1]
    states = state["optimizer"]["state"]
    first = {name: states[i]["exp_avg"] for i, name in enumerate(order)}
    return weights, first, {name: states[i]["exp_avg_sq"] for i, name in enumerate(order)}


def flat(tensors: Tensors, names: list[str]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


def share(flags: torch.Tensor) -> float:
    return float(flags.double().mean())


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("part", ["all", "ffn", "q_proj"])
def test_a_row_is_what_the_checkpoint_says_in_float64(
    recorded: Results, step: int, part: str
) -> None:
    row = rows(recorded, ALONE)[step]
    start, now = (checkpoint(recorded, s)[0] for s in (0, step))
    names = [
        n for n in start if part == "all" or {"ffn": "mlp", "q_proj": "q_proj.weight"}[part] in n
    ]
    found = row["all"] if part == "all" else (row["blocks"] | row["modules"])[part]
    before, after = flat(start, names), flat(now, names)
    true = after.double() - before.double()
    seen = (after.bfloat16() - before.bfloat16()).double()
    assert found["weights"] == len(true)
    for precision, difference in (("fp32", (after - before).double()), ("bf16", seen)):
        assert found[precision]["exact_zero"] == pytest.approx(share(difference == 0))
        for bound in ("1e-08", "1e-07", "1e-06", "1e-05", "1e-04"):
            expected = share(difference.abs() <= float(bound))
            assert found[precision][bound] == pytest.approx(expected), (precision, bound)
    assert found["fp32"]["relative_norm"] == pytest.approx(
        float(true.norm() / before.double().norm()), rel=1e-6
    )
    changed = after.bfloat16() != before.bfloat16()
    ever = torch.zeros_like(changed)
    for earlier in range(2, step + 1, 2):
        ever |= flat(checkpoint(recorded, earlier)[0], names).bfloat16() != before.bfloat16()
    assert found["never"] == pytest.approx(share(~ever))
    assert found["cancelled"] == pytest.approx(share(ever & ~changed))
    assert found["final"] == pytest.approx(share(changed))
    assert sum(found["ulps"].values()) == pytest.approx(1)
    assert found["ulps"]["0"] == pytest.approx(share(~changed))


@pytest.mark.parametrize("step", [2, 4, 6])
def test_stable_ranks_are_those_of_whole_decompositions(recorded: Results, step: int) -> None:
    found = rows(recorded, ALONE)[step]["all"]["fp32"]
    start, now = (checkpoint(recorded, s)[0] for s in (0, step))
    ranks = []
    for name in (n for n in start if start[n].ndim == 2):
        values = torch.linalg.svdvals(now[name].double() - start[name].double())
        ranks.append(float((values**2).sum() / values[0] ** 2))
    mean = sum(ranks) / len(ranks)
    assert found["stable_rank"]["mean"] == pytest.approx(mean, rel=1e-3)
    assert found["stable_rank_least"]["mean"] <= mean * (1 + 1e-5)
    assert found["stable_rank"]["mean"] >= mean * (1 - 1e-5)


@pytest.mark.parametrize("step", [4, 6])
def test_moments_are_those_of_the_checkpoint(recorded: Results, step: int) -> None:
    found = rows(recorded, ALONE)[step]["all"]["adam"]
    weights, first, second = checkpoint(recorded, step)
    earlier, earlier_first, _ = checkpoint(recorded, step - 1)
    names = list(weights)
    root = flat(second, names).double().sqrt()
    assert found["root_v_variation"] == pytest.approx(
        float(root.std(correction=0) / root.mean()), rel=1e-5
    )
    m, before = flat(first, names).double(), flat(earlier_first, names).double()
    gradient = (m - BETA1 * before) / (1 - BETA1)
    cosine = float(torch.cosine_similarity(m, gradient, dim=0))
    assert found["cosine_m_g"] == pytest.approx(cosine, rel=1e-4)
    moved = flat(weights, names).bfloat16() != flat(earlier, names).bfloat16()
    assert found["step_visible"] == pytest.approx(share(moved), abs=2e-4)
    idle = []
    for name in names:
        m, v, w = first[name].double(), second[name].double(), weights[name].double()
        mean = BETA1 * m / (1 - BETA1 ** (step + 1))
        spread = (BETA2 * v / (1 - BETA2 ** (step + 1))).sqrt() + 1e-8
        kept = 1 - LR * DECAY if w.ndim > 1 else 1.0
        after = kept * w - LR * mean / spread
        idle.append((after.float().bfloat16() != weights[name].bfloat16()).flatten())
    assert found["zero_gradient_visible"] == pytest.approx(share(torch.cat(idle)), abs=2e-4)


def test_the_last_row_compares_every_recording_with_the_end(recorded: Results) -> None:
    row = rows(recorded, ALONE)[6]
    start, end = (checkpoint(recorded, s)[0] for s in (0, 6))
    for step in (2, 4):
        now = checkpoint(recorded, step)[0]
        similarities = []
        for name in (n for n in start if start[n].ndim == 2):
            one, other = (torch.linalg.svd((w[name] - start[name]).double()).U for w in (now, end))
            similarities.append(float((one[:, :8].T @ other[:, :8]).square().sum() / 8))
        found = row["similarity_to_end"][str(step)]
        assert found["mean"] == pytest.approx(sum(similarities) / len(similarities), abs=0.05)
        assert 0 < found["chance"] < found["mean"] < 1
    assert row["all"]["similarity"] == row["similarity_to_end"]["4"]


def test_the_start_is_recorded_as_unchanged(recorded: Results) -> None:
    found = rows(recorded, ALONE)[0]["all"]
    assert found["fp32"]["exact_zero"] == found["bf16"]["exact_zero"] == found["never"] == 1
    assert found["adam"] is None
    assert found["fp32"]["stable_rank"] is None


@pytest.mark.parametrize("case", SHARDED)
def test_the_record_does_not_depend_on_stage_or_ranks(recorded: Results, case: str) -> None:
    assert_alike(rows(recorded, case), rows(recorded, ALONE))


def test_the_record_of_a_masked_run_does_not_depend_on_stage_or_ranks(recorded: Results) -> None:
    masked = rows(recorded, MASKED)
    assert_alike(masked, rows(recorded, MASKED_ALONE))
    density = tiny_mask(tiny_model()).density
    for step in (2, 4, 6):
        found = masked[step]["all"]
        assert found["never"] >= 1 - density
        assert found["fp32"]["exact_zero"] == pytest.approx(1 - density, abs=0.01)


def assert_alike(found: Any, expected: Any) -> None:
    """Rows that agree but for rounding noise, which Adam turns into parts of a step."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_alike(found[name], expected[name])
    elif expected is None:
        assert found is None
    else:
        assert found == pytest.approx(expected, rel=0.01, abs=0.01)


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_record_is_the_uninterrupted_one(recorded: Results, case: str) -> None:
    whole, resumed = rows(recorded, case), rows(recorded, f"{case}/resumed")
    assert list(whole) == list(resumed) == [0, 2, 4, 6]
    assert whole == resumed
