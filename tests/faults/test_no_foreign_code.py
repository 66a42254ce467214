"""Nothing that is read from outside is executed: in the sources, and in every process of a small run."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import opd
from tests.support.command import SMALL, environment

PACKAGE = Path(opd.__file__).parent
REPOSITORY = PACKAGE.parent

HOOK = """
import os, sys

LOG = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def caller():
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.endswith(("pickle.py", "sitecustomize.py")):
        frame = frame.f_back
    return "?" if frame is None else frame.f_code.co_filename

def hook(event, arguments):
    if event == "pickle.find_class":
        os.write(LOG, f"{arguments[0]}.{arguments[1]} {caller()}\\n".encode())

sys.addaudithook(hook)
os.write(LOG, f"process {os.getpid()}\\n".encode())
"""
"""Installed in every process by the name that Python imports at its start."""


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """(file, call, what is called) of every call in the package."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.relative_to(PACKAGE).as_posix(), node, ast.unparse(node.func)


def test_no_call_of_the_package_executes_what_it_reads() -> None:
    forbidden = (
        *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "marshal.loads"),
        *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "dill.load"),
        *("np.load", "numpy.load", "joblib.load", "shelve.open", "hydra.utils.instantiate"),
    )
    found = [(file, name) for file, _, name in calls() if name in forbidden]
    assert found == []
    shells = [
        file
        for file, call, _ in calls()
        if any(k.arg == "shell" and not _is(k.value, False) for k in call.keywords)
    ]
    assert shells == []


def _is(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_torch_reads_weights_only() -> None:
    loads = [(file, call) for file, call, name in calls() if name == "torch.load"]
    assert loads
    for file, call in loads:
        given = [k.value for k in call.keywords if k.arg == "weights_only"]
        assert len(given) == 1, file
        assert _is(given[0], True), file


def test_pickles_are_read_only_where_this_process_wrote_them() -> None:
    users = {file for file, _, name in calls() if name.startswith("pickle.")}
    assert users == {"data/spool.py"}, "an unnamed temporary file of prompts"


def test_code_of_a_model_runs_only_where_a_setting_says_so() -> None:
    values = {
        ast.unparse(k.value)
        for _, call, _ in calls()
        for k in call.keywords
        if k.arg == "trust_remote_code"
    }
    assert "True" not in values
    assert {value for value in values if "trust" not in value} == {"False"}
    options = [
        line.strip()
        for path in PACKAGE.glob("config/*.py")
        for line in path.read_text().splitlines()
        if line.strip().startswith("trust_remote_code")
    ]
    assert options == ["trust_remote_code: bool = False"] * len(options)


COMMAND = (
    *("train", "quickstart", *SMALL, "train.prompts_per_step=4", "rollout.max_tokens=16"),
    *("rollout=transformers", "teacher=local", "launch.engine=torch", "launch.processes=1"),
    *("optim.schedule=constant", "optim.warmup_steps=0", "run.dir=run", "data.eval_limit=4"),
    *("eval.kl_prompts=2", "save.every=1"),
)
IN_A_LIBRARY = (
    "torch/",
    "multiprocessing/",
    "datasets/",
    "dill/",
    "pyarrow/",
    "numpy/",
    "deepspeed/",
)
"""Libraries that pickle between processes of their own, or copy objects so."""


@pytest.mark.slow
def test_a_run_unpickles_nothing_but_what_libraries_send_themselves(tmp_path: Path) -> None:
    site, log = tmp_path / "site", tmp_path / "audit.log"
    site.mkdir()
    (site / "sitecustomize.py").write_text(HOOK)
    variables = environment() | {"AUDIT_LOG": str(log)}
    variables["PYTHONPATH"] = os.pathsep.join([str(site), str(REPOSITORY)])

    def opd_command(*words: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "opd.cli.main", *words],
            cwd=tmp_path, env=variables, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    opd_command(*COMMAND, "train.steps=1")
    opd_command(*COMMAND, "train.steps=2")  # resumes
    opd_command("report", "run", "out=.")
    base = str(REPOSITORY / "recipes" / "quickstart" / "student")
    opd_command(
        "mask", "discover", f"base={base}", "trained=run", "density=0.1", "out=mask.safetensors"
    )
    trained = ("base=" + base, "trained=run")
    opd_command("mask", "export", *trained, "dtype=bfloat16", "out=delta.safetensors")
    opd_command("mask", "apply", "base=" + base, "delta=delta.safetensors", "out=made")
    lines = log.read_text().splitlines()
    assert len({line for line in lines if line.startswith("process")}) > 4
    own = [line for line in lines if "/opd/" in line and "site-packages" not in line]
    assert own == []
    foreign = {
        line
        for line in lines
        if not line.startswith("process") and not any(name in line for name in IN_A_LIBRARY)
    }
    assert foreign == set()


@pytest.mark.parametrize("payload", ["torch", "final"])
def test_a_checkpoint_with_code_is_refused(tmp_path: Path, payload: str) -> None:
    """A pickle that would call a function is not read as weights."""
    import pickle

    from opd.checkpoint.tensors import open_checkpoint

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    name = "pytorch_model.bin" if payload == "torch" else "model.safetensors"
    (tmp_path / name).write_bytes(pickle.dumps({"w": Evil()}))
    (tmp_path / "config.json").write_text('{"model_type": "made"}')
    with pytest.raises(ValueError, match="cannot be read"):
        open_checkpoint(str(tmp_path))
    assert not (tmp_path / "pwned").exists()
