"""Every example and command of docs/extending.md runs, on the quickstart, and does what it says."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opd.assembly.loss import build_loss
from opd.cli.main import run
from opd.config.data import DataConfig
from opd.config.eval import EvalConfig
from opd.config.functions import load_function
from opd.config.loss import DivergenceLossConfig, FunctionLossConfig, TeacherInput
from opd.config.reward import FunctionRewardConfig
from opd.data.source_rows import source_rows
from opd.evaluate.reward import RewardInput, reward_function
from opd.head import HeadSpec
from opd.losses.divergence import Divergence
from opd.losses.with_reward import WithReward
from opd.mask.mask import Mask
from opd.run.recipe import load_recipe
from opd.train.chunked import chunked_loss
from opd.types import DivergenceKind, Prompt
from tests.conformance.loss_cases import CHOICES, N, V, case, logits, randn, token_settings
from tests.support.command import SMALL, opd

REPOSITORY = Path(__file__).parent.parent
PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [shlex.split(line) for line in re.findall(r"^    (opd .*)$", PAGE, re.MULTILINE)]
LIGHT = [
    *SMALL, "rollout=transformers", "teacher=local", "launch.engine=torch", "launch.processes=1",
    "train.steps=2",
]  # fmt: skip
"""Overrides under which a command of the page takes seconds."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page, and the recipes of the repository."""
    folder = tmp_path_factory.mktemp("extending")
    for name, source in FILES.items():
        (folder / name).write_text(source)
    (folder / "recipes").symlink_to(REPOSITORY / "recipes")
    return folder


@pytest.fixture
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def trained(home: Path, setting: str, *overrides: str) -> tuple[Path, list[dict[str, Any]]]:
    """Run the page's ``opd train`` command that has ``setting``; its folder and its metrics."""
    (command,) = [c for c in COMMANDS if c[1] == "train" and any(w.startswith(setting) for w in c)]
    return ran(home, setting.strip("=").replace("=", "_"), *command[1:], *overrides)


def ran(home: Path, name: str, *arguments: str) -> tuple[Path, list[dict[str, Any]]]:
    done = opd(*arguments, *LIGHT, f"run.dir={name}", cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = home / name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return folder, rows


def test_every_file_of_the_page_is_used_by_a_command_of_it() -> None:
    assert FILES.keys() == {
        "my_loss.py",
        "my_reward.py",
        "my_judge.py",
        "my_scores.py",
        "my_rows.py",
    }
    assert len(COMMANDS) == 6
    for name in FILES:
        assert any(f"={name}:" in word for command in COMMANDS for word in command), name


@pytest.mark.usefixtures("_at_home")
def test_the_loss_of_the_page_is_forward_kl_in_value_and_gradient() -> None:
    batch, _ = case("full")
    path = "my_loss.py:ForwardKL"
    for choice in CHOICES:
        if choice.clip is not None:
            continue
        settings = token_settings(choice)
        own = build_loss(FunctionLossConfig(path=path, **settings))
        builtin = Divergence(DivergenceLossConfig(kind=DivergenceKind.forward_kl, **settings))
        totals, gradients = [], []
        for loss in (own, builtin):
            leaf = logits().requires_grad_()
            out = loss(leaf.log_softmax(-1), batch)
            totals.append(out.total.detach())
            gradients.append(torch.autograd.grad(out.total, leaf)[0])
        torch.testing.assert_close(*totals, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            *gradients, rtol=0.0, atol=1e-5 * float(gradients[1].abs().max())
        )
        assert totals[0] > 0.1


@pytest.mark.usefixtures("_at_home")
def test_a_loss_in_a_file_gets_whole_distributions_in_chunks() -> None:
    hidden, head = randn(N, 6, seed=10).requires_grad_(), randn(V, 6, seed=11).requires_grad_()
    teacher = randn(N, 6, seed=12)
    batch = replace(case("full")[0], teacher_logp_NV=None, teacher_hidden_ND=teacher)
    found = []
    for loss, chunk in (
        (build_loss(FunctionLossConfig(path="my_loss.py:ForwardKL")), 3),
        (Divergence(DivergenceLossConfig(kind=DivergenceKind.forward_kl)), N),
    ):
        spec = HeadSpec(vocab_size=V)
        out = chunked_loss(
            hidden, head, batch, loss, spec, teacher_head_VD=head.detach(), chunk=chunk
        )
        found.append([out.total.detach(), *torch.autograd.grad(out.total, (hidden, head))])
    for own, builtin in zip(*found, strict=True):
        torch.testing.assert_close(own, builtin, rtol=1e-5, atol=1e-5)
    assert found[0][0] > 0.1


@pytest.mark.usefixtures("_at_home")
def test_a_loss_in_a_file_gets_its_options_and_a_reward_beside_it() -> None:
    recipe = load_recipe(
        "quickstart", "loss=function", "loss.path=my_loss.py:ForwardKL", "rollout.n=4",
        "+loss.options.floor=0.1", "loss.teacher=top_k", "loss.reward_weight=0.5",
    )  # fmt: skip
    loss = build_loss(recipe.config.loss)
    assert isinstance(loss, WithReward)
    config: Any = getattr(loss.loss, "config")  # noqa: B009
    assert config.options == {"floor": 0.1}
    assert config.teacher == TeacherInput.top_k
    assert loss.policy.config.reward_weight == 0.5


def test_training_with_the_loss_of_the_page_is_training_with_forward_kl(home: Path) -> None:
    folder, rows = trained(home, "loss.path=")
    builtin_folder, builtin = ran(
        home, "builtin", "train", "quickstart", "loss=forward_kl", "optim.lr=1e-4"
    )
    for own_row, row in zip(rows[1:], builtin[1:], strict=True):
        assert own_row["loss/my_forward_kl"] == pytest.approx(row["loss/forward_kl"], rel=1e-4)
        assert own_row["loss/total"] == pytest.approx(row["loss/total"], rel=1e-4)
    own, other = (load_file(f / "final" / "model.safetensors") for f in (folder, builtin_folder))
    start = load_file(REPOSITORY / "recipes" / "quickstart" / "student" / "model.safetensors")
    apart = sum(float((own[name] - other[name]).square().sum()) for name in own)
    moved = sum(float((own[name] - start[name]).square().sum()) for name in own)
    assert apart < 1e-4 * moved


@pytest.mark.usefixtures("_at_home")
def test_the_reward_of_the_page_is_the_function_s_value() -> None:
    config = FunctionRewardConfig(function="my_reward.py:right_and_short")
    reward = reward_function(config, EvalConfig())
    ids = np.array([1], np.int32)
    judged = [("3+8=11;1+4+7=12#121", "121"), ("3+8=11;1+4+7=12#121", "122"), ("no", None)]
    found = reward(
        [
            RewardInput(text=text, prompt=Prompt(uid="0", token_ids=ids, answer=answer))
            for text, answer in judged
        ]
    )
    assert found == pytest.approx([1 - 0.19, -0.19, -0.02])


def test_training_with_the_reward_of_the_page_reports_it(home: Path) -> None:
    _, rows = trained(home, "reward.function=my_reward", "rollout.n=4", "train.prompts_per_step=8")
    for row in rows[1:]:
        assert -0.48 <= row["reward/mean"] < 0.96, "at most 48 characters"
        assert row["reward/mean"] * 1e4 % 100 != 0, "lengths differ"


def test_an_async_reward_of_the_page_reads_the_row_of_each_prompt(home: Path) -> None:
    _, rows = trained(home, "reward.function=my_judge", "rollout.n=2", "train.prompts_per_step=8")
    assert all(row["reward/mean"] * 16 % 1 == 0 for row in rows[1:]), "a share of 16 completions"
    assert any(row["reward/mean"] > 0 for row in rows[1:])


@pytest.mark.parametrize("command", ["train", "mask"])
def test_the_mask_of_the_page_keeps_the_largest_weights_of_attention(
    home: Path, command: str
) -> None:
    start = load_file(REPOSITORY / "recipes" / "quickstart" / "student" / "model.safetensors")
    if command == "train":
        folder, _ = trained(home, "mask.function=")
        mask = Mask.read(folder / "mask.safetensors")
        final = load_file(folder / "final" / "model.safetensors")
        moved = {name for name in start if not torch.equal(final[name], start[name])}
        assert moved
        assert all("self_attn" in name for name in moved)
    else:
        (words,) = [c for c in COMMANDS if c[1] == "mask"]
        done = opd(*words[1:], cwd=home)
        assert done.returncode == 0, done.stdout + done.stderr
        mask = Mask.read(home / "mask.safetensors")
    total = sum(weight.numel() for weight in start.values())
    assert sum(mask.counts().values()) == round(0.05 * total)
    scores = {n: w.float().abs().flatten() for n, w in start.items() if "self_attn" in n}
    smallest = torch.cat(list(scores.values())).topk(round(0.05 * total)).values[-1]
    for name in start:
        kept = mask.indices[name]
        assert "self_attn" in name or len(kept) == 0
        assert len(kept) == 0 or float(scores[name][kept].min()) >= float(smallest)


@pytest.mark.usefixtures("_at_home")
def test_the_row_function_of_the_page_drops_and_rewrites_rows() -> None:
    source = str(REPOSITORY / "recipes" / "quickstart" / "train.jsonl")
    plain = [row for _, row in source_rows(source, DataConfig())]
    config = DataConfig(function="my_rows.py:larger_first")
    rows = [row for _, row in source_rows(source, config)]
    assert 0.5 * len(plain) < len(rows) < len(plain)
    assert [row["uid"] for row in rows] == [r["uid"] for r in plain if len(r["answer"]) < 5]
    for row in rows:
        first, second = map(int, row["prompt"].rstrip("=").split("+"))
        assert first >= second
        assert first + second == int(row["answer"])
    assert len(list(source_rows(source, replace(config, limit=10)))) == 10


def test_training_with_the_row_function_of_the_page_reads_its_rows(home: Path) -> None:
    folder, _ = trained(home, "data.function=")
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples
    for sample in samples:
        first, second = map(int, sample["prompt"].rstrip("=").split("+"))
        assert first >= second
        assert len(sample["answer"]) < 5


SETTINGS = {
    "loss.path": ["loss=function"],
    "reward.function": ["method=grpo", "reward=function"],
    "mask.function": ["mask=discover", "mask.rule=function", "mask.density=0.1"],
    "data.function": [],
}


@pytest.mark.usefixtures("_at_home")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.py:f", ["nowhere.py", "there is no file"]),
        ("my_rows.py:nothing", ["my_rows.py:nothing", "nothing"]),
        ("my_rows.py", ["path.py:name"]),
        ("no_module_of_this_name:f", ["no_module_of_this_name"]),
        ("my_constant.py:LIMIT", ["LIMIT is not a function or class"]),
        ("my_typo.py:f", ["my_typo.py"]),
    ],
)
def test_what_cannot_be_called_is_one_sentence(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    name: str,
    words: list[str],
) -> None:
    (home / "my_constant.py").write_text("LIMIT = 3\n")
    (home / "my_typo.py").write_text("def f(:\n")
    status = run(
        [
            "train",
            "quickstart",
            *LIGHT,
            *SETTINGS[setting],
            f"{setting}={name}",
            f"run.dir={tmp_path}",
        ]
    )
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.startswith("opd: ")
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1, error
    assert not list(tmp_path.iterdir()), "refused before the run begins"
    for word in [setting, *words]:
        assert word in error


@pytest.mark.usefixtures("_at_home")
def test_a_function_of_an_installed_module_is_named_by_its_module() -> None:
    assert load_function("reward.function", "math:isclose")(1.0, 1.0)
