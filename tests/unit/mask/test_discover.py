"""Each rule finds exactly the weights it promises, whatever the seed, the budget or the files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opd.checkpoint.chunks import binades
from opd.checkpoint.names import place
from opd.config.mask import MaskBudget, MaskRule, MaskStructure, RuleConfig
from opd.mask.search import apportion
from tests.unit.mask.models import (
    NUMEL,
    SHAPES,
    dense,
    discovered,
    flat,
    joined,
    moved,
    stored,
    weights,
)

RANKED = [MaskRule.delta, MaskRule.near_zero, MaskRule.safe, MaskRule.random, MaskRule.scores]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("models") / "base", weights())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("models") / "trained", moved(weights()))


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    generator = torch.Generator().manual_seed(5)
    save_file({n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}, file)
    return file


@pytest.fixture
def settings(trained: Path, scores: Path) -> dict[MaskRule, dict[str, str]]:
    return {
        MaskRule.delta: {"trained": str(trained)},
        MaskRule.scores: {"scores": str(scores)},
        MaskRule.fisher: {"scores": str(scores)},
    }


@pytest.mark.parametrize("density", [0.001, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("budget", list(MaskBudget))
@pytest.mark.parametrize("rule", [*RANKED, MaskRule.fisher])
def test_the_density_is_exact(
    base: Path,
    tmp_path: Path,
    settings: dict[MaskRule, dict[str, str]],
    rule: MaskRule,
    budget: MaskBudget,
    density: float,
) -> None:
    config = RuleConfig(rule=rule, density=density, budget=budget, **settings.get(rule, {}))
    mask, summary = discovered(base, config, tmp_path / "m")
    assert summary.kept == sum(mask.counts().values()) == round(density * NUMEL)
    assert mask.origin.rule == rule.value


@pytest.mark.parametrize("budget", [MaskBudget.tensor, MaskBudget.module])
def test_a_budget_gives_each_group_the_same_density(
    base: Path, tmp_path: Path, budget: MaskBudget
) -> None:
    config = RuleConfig(rule=MaskRule.near_zero, density=0.3, budget=budget)
    mask, _ = discovered(base, config, tmp_path / "m")
    groups: dict[str, list[str]] = {}
    for name in SHAPES:
        key = name if budget == MaskBudget.tensor else place(name).module
        groups.setdefault(key, []).append(name)
    for names in groups.values():
        kept, size = (sum(f(name) for name in names) for f in (mask.counts().get, mask.numel))
        assert abs(kept - 0.3 * size) < 1


def test_shares_add_up_and_are_within_one_of_the_proportion() -> None:
    sizes = {"a": 7, "b": 11, "c": 1, "d": 100}
    for total in range(sum(sizes.values()) + 1):
        quotas = apportion(total, sizes)
        assert sum(quotas.values()) == total
        assert all(abs(quotas[k] - total * sizes[k] / 119) < 1 for k in sizes)
        assert all(quotas[k] <= sizes[k] for k in sizes)


@pytest.mark.parametrize("rule", RANKED)
def test_a_seed_fixes_the_file_and_sharding_does_not_matter(
    tmp_path: Path, settings: dict[MaskRule, dict[str, str]], rule: MaskRule
) -> None:
    whole, cut = stored(tmp_path / "one", weights()), stored(tmp_path / "cut", weights(), shards=3)
    given = settings.get(rule, {})
    kept = []
    for number, (model, seed) in enumerate(((whole, 3), (whole, 3), (cut, 3), (whole, 4))):
        config = RuleConfig(rule=rule, density=0.5, seed=seed, **given)
        kept.append(flat(discovered(model, config, tmp_path / f"m{number}")[0]))
    assert (kept[0] == kept[1]).all()
    assert (kept[0] == kept[2]).all()
    if rule == MaskRule.random:
        assert (kept[0] != kept[3]).any()


def test_near_zero_keeps_the_smallest_weights(base: Path, tmp_path: Path) -> None:
    mask, _ = discovered(base, RuleConfig(rule=MaskRule.near_zero, density=0.2), tmp_path / "m")
    size, kept = np.abs(joined(weights())), flat(mask)
    assert size[kept].max() <= size[~kept].min()


def test_a_threshold_of_delta_is_the_papers_mask(base: Path, trained: Path, tmp_path: Path) -> None:
    config = RuleConfig(rule=MaskRule.delta, trained=str(trained), threshold=1e-5)
    mask, _ = discovered(base, config, tmp_path / "m")
    before, after = weights(), moved(weights())
    for name in SHAPES:
        changed = (after[name].float() - before[name].float()).abs() > 1e-5
        assert (dense(mask, name) == changed.numpy().reshape(-1)).all()
    assert 0.02 < mask.density < 0.98


def test_delta_casts_a_float32_checkpoint_to_bf16_first(base: Path, tmp_path: Path) -> None:
    after = {name: w.float() * (1 + 1e-4) for name, w in weights().items()}
    config = RuleConfig(
        rule=MaskRule.delta, trained=str(stored(tmp_path / "t", after)), threshold=0.0
    )
    mask, _ = discovered(base, config, tmp_path / "m")
    assert mask.density == 0  # every step is far below half a bf16 ulp


def test_delta_takes_the_final_weights_of_a_run_folder(base: Path, tmp_path: Path) -> None:
    stored(tmp_path / "run" / "final", moved(weights()))
    config = RuleConfig(rule=MaskRule.delta, trained=str(tmp_path / "run"), density=0.1)
    assert discovered(base, config, tmp_path / "m")[1].kept == round(0.1 * NUMEL)


def test_a_run_without_final_weights_is_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    config = RuleConfig(rule=MaskRule.delta, trained=str(tmp_path / "run"), density=0.1)
    with pytest.raises(ValueError, match="without final"):
        discovered(base, config, tmp_path / "m")


def test_more_weights_than_changed_are_drawn_without_bias_and_told(
    base: Path, tmp_path: Path
) -> None:
    after = weights()
    after["model.norm.weight"] = after["model.norm.weight"] + 1
    config = RuleConfig(
        rule=MaskRule.delta, trained=str(stored(tmp_path / "t", after)), density=0.5
    )
    mask, summary = discovered(base, config, tmp_path / "m")
    assert dense(mask, "model.norm.weight").all()
    assert "have changed" in summary.warnings[0]
    assert (summary.tied, summary.tied_kept) == (NUMEL - 24, round(0.5 * NUMEL) - 24)
    assert f"{summary.tied_kept:,}" in summary.warnings[0]
    # early rows, late rows and every tensor get their share of the lot
    embedding = dense(mask, "model.embed_tokens.weight").reshape(90, 24)
    assert abs(embedding[:45].mean() - 0.5) < 0.06
    assert abs(embedding[45:].mean() - 0.5) < 0.06


def test_random_spreads_evenly_and_is_nested_over_densities(base: Path, tmp_path: Path) -> None:
    small, large = (
        flat(discovered(base, RuleConfig(rule=MaskRule.random, density=d), tmp_path / f"{d}")[0])
        for d in (0.2, 0.6)
    )
    assert large[small].all()
    for part in np.array_split(large, 6):
        assert abs(part.mean() - 0.6) < 0.05


def test_random_like_a_mask_has_its_count_in_each_tensor(base: Path, tmp_path: Path) -> None:
    like, _ = discovered(base, RuleConfig(rule=MaskRule.near_zero, density=0.2), tmp_path / "like")
    config = RuleConfig(rule=MaskRule.random, like=str(tmp_path / "like"))
    mask, _ = discovered(base, config, tmp_path / "m")
    assert mask.counts() == like.counts()
    assert (flat(mask) != flat(like)).any()


def test_magnitude_matched_has_the_counts_of_each_binade(base: Path, tmp_path: Path) -> None:
    like, _ = discovered(base, RuleConfig(rule=MaskRule.near_zero, density=0.3), tmp_path / "like")
    config = RuleConfig(rule=MaskRule.magnitude_matched, like=str(tmp_path / "like"))
    mask, _ = discovered(base, config, tmp_path / "m")
    for name, w in weights().items():
        bins = binades(w.reshape(-1))
        counts = [np.bincount(bins[dense(m, name)], minlength=256) for m in (mask, like)]
        assert (counts[0] == counts[1]).all()


def test_safe_keeps_what_is_small_or_not_principal(base: Path, tmp_path: Path) -> None:
    config = RuleConfig(rule=MaskRule.safe, density=0.5, budget=MaskBudget.tensor, rank_share=0.25)
    mask, _ = discovered(base, config, tmp_path / "m")
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        w = weights()[name].double()
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        rank = int(np.ceil(0.25 * min(w.shape)))
        leading = ((u[:, :rank] * s[:rank]) @ v[:rank]).abs().numpy().reshape(-1)
        small, spare = (
            np.searchsorted(np.sort(x), x, side="right") / x.size
            for x in (w.abs().numpy().reshape(-1), leading)
        )
        wanted, kept = np.minimum(small, spare), dense(mask, name)
        assert wanted[kept].max() - wanted[~kept].min() < 0.01


@pytest.mark.parametrize("structure", [MaskStructure.rows, MaskStructure.columns])
def test_whole_rows_or_columns_are_kept(
    base: Path, trained: Path, tmp_path: Path, structure: MaskStructure
) -> None:
    config = RuleConfig(
        rule=MaskRule.delta,
        trained=str(trained),
        density=0.25,
        structure=structure,
        budget=MaskBudget.tensor,
    )
    mask, summary = discovered(base, config, tmp_path / "m")
    assert 0.15 < summary.density <= 0.25
    for name, shape in SHAPES.items():
        if len(shape) < 2:
            continue
        kept, axis = dense(mask, name).reshape(shape), int(structure == MaskStructure.rows)
        assert (kept.all(axis) | ~kept.any(axis)).all()
        moves = (moved(weights())[name].double() - weights()[name].double()).square()
        energy, units = moves.sum(axis).numpy(), kept.any(axis)
        assert energy[units].min() >= energy[~units].max()
        assert 0 <= 0.25 * kept.size - kept.sum() < shape[axis] + 1


def test_excluded_parameters_keep_nothing_and_density_counts_all(
    base: Path, tmp_path: Path
) -> None:
    config = RuleConfig(rule=MaskRule.random, density=0.3, exclude=["*embed*", "*norm*", "typo*"])
    mask, summary = discovered(base, config, tmp_path / "m")
    assert summary.kept == round(0.3 * NUMEL)
    assert all(mask.counts()[n] == 0 for n in SHAPES if "embed" in n or "norm" in n)
    assert summary.warnings == ("exclude=typo* matches no parameter",)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (RuleConfig(rule=MaskRule.random, density=0.9, exclude=["*embed*"]), "not excluded"),
        (RuleConfig(rule=MaskRule.random, density=1e-9), "allowed is from 1"),
        (RuleConfig(rule=MaskRule.random), "density=... or like=..., found none"),
        (RuleConfig(rule=MaskRule.delta, density=0.1), "needs trained"),
        (RuleConfig(rule=MaskRule.near_zero, density=0.1, trained="x"), "no effect"),
        (RuleConfig(rule=MaskRule.random, like="m", density=0.1), "no effect beside like"),
        (RuleConfig(rule=MaskRule.scores, scores="s", density=0.1, threshold=0.1), "found both"),
        (RuleConfig(rule=MaskRule.fisher, density=0.1), "needs scores"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    base: Path, tmp_path: Path, config: RuleConfig, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        discovered(base, config, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_trained_model_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    other = weights()
    other["model.norm.weight"] = torch.ones(25)
    absent = {name: w for name, w in weights().items() if name != "model.norm.weight"}
    for number, (tensors, words) in enumerate(
        ((other, "\\[25\\] there"), (absent, "absent there"))
    ):
        model = stored(tmp_path / f"t{number}", tensors)
        config = RuleConfig(rule=MaskRule.delta, trained=str(model), density=0.1)
        with pytest.raises(ValueError, match=words):
            discovered(base, config, tmp_path / "m")


def test_a_score_that_is_no_number_is_refused(base: Path, tmp_path: Path) -> None:
    bad = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    bad["model.norm.weight"][3] = torch.nan
    save_file(bad, tmp_path / "s")
    config = RuleConfig(rule=MaskRule.scores, scores=str(tmp_path / "s"), density=0.1)
    with pytest.raises(ValueError, match=r"model\.norm\.weight .* NaN"):
        discovered(base, config, tmp_path / "m")


def test_ties_of_different_runs_do_not_coincide(base: Path, tmp_path: Path) -> None:
    kept = []
    for number in range(2):
        after = weights()
        after["model.norm.weight"][number] += 1
        model = stored(tmp_path / f"t{number}", after)
        config = RuleConfig(rule=MaskRule.delta, trained=str(model), density=0.5)
        kept.append(flat(discovered(base, config, tmp_path / f"m{number}")[0]))
    assert abs((kept[0] & kept[1]).mean() - 0.25) < 0.02
