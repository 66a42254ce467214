"""docs/python.md runs from top to bottom, as in a notebook."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import environment

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "python.md"
CHECKS = """
import pandas as pd
assert run.status == "finished"
assert isinstance(run.metrics, pd.DataFrame)
assert list(run.metrics.index) == [0, 1, 2, 3]
assert run.metrics["loss/total"].notna().sum() == 3
assert {"prompt", "completion"} <= set(run.samples.columns)
assert [path.name for path in run.checkpoints] == ["step_000003"]
assert (run.final / "model.safetensors").is_file()
assert run.config["train"]["steps"] == 3
last = run.metrics["eval/addition/accuracy"].iloc[-1]
assert result.metrics["eval/addition/accuracy"] == last
assert found.report is None
assert len(found.tensors) > 10
assert 0 < found.headlines.loc["exactly unchanged", "observed"] < 1
assert abs(mask.density - 0.1) < 1e-4
assert 0 < mask.intersection(other).density < 0.1
assert opd.Mask.read("near_zero.safetensors").counts() == mask.counts()
masked = opd.Run("runs/masked")
assert abs(masked.metrics["mask/density"].iloc[-1] - mask.density) < 1e-9
assert recipe.choices["loss"] == "jsd"
"""


def test_the_calls_of_the_python_page_work_on_the_quickstart(tmp_path: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(snippets) >= 6
    script = tmp_path / "notebook.py"
    script.write_text("\n".join([*snippets, CHECKS]))
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("opd.train('quickstrat')", "there is no recipe named quickstrat"),
        ("opd.train('quickstart', 'los=jsd')", "there is no setting los"),
        ("opd.Run('.')", "found no config.yaml"),
        ("opd.Mask.read('m.safetensors')", "there is no mask file m.safetensors"),
        ("opd.load_recipe('quickstart', 'optim.clip=1')", "now called optim.max_grad_norm"),
    ],
)
def test_a_configuration_error_is_a_value_error_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, sentence: str
) -> None:
    import opd

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        eval(code, {"opd": opd})
