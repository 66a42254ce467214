"""Interface alarm: what opd uses of vLLM, DeepSpeed and accelerate is there, read from their sources.

The pinned GPU wheels are other builds than the ones that the tests run on a CPU. Their Python sources
can be read anywhere.
"""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.library_sources import Sources
from tests.support.library_uses import Known, UnseenKeywords, library_uses, string_constants

REPOSITORY = Path(__file__).parent.parent.parent
PACKAGE = REPOSITORY / "opd"
NEEDED_BYTES = 2 << 30
LIBRARIES = ("vllm", "deepspeed", "accelerate")
WORKER = "vllm.v1.worker.gpu_worker:Worker"
CPU_WORKER = "vllm.v1.worker.cpu_worker:CPUWorker"
EXPERTS = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
FRAGMENTS = "deepspeed.utils.tensor_fragment"
EXECUTOR = "external_launcher"
RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"

KNOWN = (
    Known("rollout/vllm.py", "self.llm.llm_engine", ("vllm.v1.engine.llm_engine:LLMEngine",)),
    Known(
        "rollout/vllm.py",
        "engine.output_processor",
        ("vllm.v1.engine.output_processor:OutputProcessor",),
    ),
    Known("rollout/vllm.py", "output", ("vllm.outputs:RequestOutput",)),
    Known("rollout/vllm.py", "o", ("vllm.outputs:RequestOutput",)),
    Known("teacher/backend_vllm.py", "backend.engine.model_config", ("vllm.config:ModelConfig",)),
    Known("teacher/backend_vllm.py", "self.engine.model_config", ("vllm.config:ModelConfig",)),
    Known("teacher/backend_vllm.py", "output", ("vllm.outputs:PoolingRequestOutput",)),
    Known("teacher/backend_vllm.py", "output.outputs", ("vllm.outputs:PoolingOutput",)),
    Known("sync/*,rollout/*,teacher/*", "worker", (WORKER, CPU_WORKER)),
    Known("sync/*,rollout/*,teacher/*", "worker.device"),
    Known("sync/*,rollout/*,teacher/*", "worker.model_runner", (RUNNER_V1, RUNNER_V2)),
    Known(
        "sync/*,rollout/*,teacher/*",
        "worker.model_runner.model_config",
        ("vllm.config:ModelConfig",),
    ),
    Known(
        "sync/colocated.py",
        "head.quant_method",
        ("vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod",),
    ),
    Known("sync/reload.py", "method", (f"{EXPERTS}:UnquantizedFusedMoEMethod",)),
    Known(
        "train/deepspeed_engine.py", "self._engine", ("deepspeed.runtime.engine:DeepSpeedEngine",)
    ),
    Known("train/deepspeed_engine.py", "self._engine.module"),
    Known("train/deepspeed_engine.py", "self._engine.basic_optimizer"),
    Known(
        "train/deepspeed_engine.py",
        "self._engine.optimizer",
        (
            "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer",
            "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
            "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer",
        ),
        one_of=True,
    ),
    Known("train/deepspeed_engine.py", "wrapped", ("accelerate.optimizer:AcceleratedOptimizer",)),
    Known("train/deepspeed_engine.py", "self._optimizer"),
    Known("train/deepspeed_engine.py", "mapping", (f"{FRAGMENTS}:tensor_fragment",)),
    Known("train/deepspeed_engine.py", "part"),
    Known("train/deepspeed_engine.py", "own", (f"{FRAGMENTS}:fragment_address",)),
)
"""The class of what is used, where a value has no annotation that says it."""

FORWARDS = {
    "vllm.entrypoints.llm:LLM": ("vllm.engine.arg_utils:EngineArgs",),
    "vllm.v1.worker.gpu_worker:Worker.reload_weights": (
        f"{RUNNER_V1}.reload_weights",
        f"{RUNNER_V2}.reload_weights",
    ),
}
"""Where a function that takes **kwargs passes them on."""


def installed() -> Path:
    """The folder of the installed packages."""
    spec = find_spec("vllm")
    assert spec is not None, "vLLM is not installed"
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


@cache
def read_sources(root: Path) -> Sources:
    """The libraries below ``root``; a module is parsed once for all tests."""
    return Sources(root, LIBRARIES, FORWARDS)


def problems(root: Path, package: Path = PACKAGE, known: Sequence[Known] = KNOWN) -> list[str]:
    """What ``package`` uses and the sources below ``root`` do not have."""
    sources = read_sources(root)
    uses, _ = library_uses(package, LIBRARIES, known)
    by_use: defaultdict[tuple[str, ...], list[str | None]] = defaultdict(list)
    for use in uses:
        target = use.target
        here = (*target.steps, target.one_of) if target.one_of else (str(target),)
        by_use[use.where, str(use.arguments), *here].append(sources.problem(use))
    found = [each[0] for each in by_use.values() if all(each) and each[0] is not None]
    variables = sources.strings("vllm.envs")
    used = string_constants(package, "VLLM_")
    return found + [f"opd/{used[n]}: vLLM reads no {n}" for n in used if n not in variables]


def v2_problems(root: Path) -> list[str]:
    """What opd needs of Model Runner V2, which CUDA takes, and does not find there."""
    sources = read_sources(root)
    unsupported = _strings(
        sources.function("vllm.config:VllmConfig._get_v2_model_runner_unsupported_features")
    )
    tasks = sources.strings("vllm.v1.worker.gpu.pool.pooling_runner")
    modes = ast.unparse(sources.function("vllm.v1.worker.gpu.sample.sampler:Sampler.__call__"))
    seeds = ast.unparse(
        sources.function("vllm.v1.worker.gpu.sample.states:SamplingStates.add_request")
    )
    wanted = {
        "token_embed is a pooling task": "token_embed" in tasks,
        "log-probs may be processed": "PROCESSED_LOGPROBS_MODES" in modes,
        "a request has its own seed": "sampling_params.seed" in seeds,
        "nothing that opd uses is left out": not any(
            word in text
            for text in unsupported - {EXECUTOR, f"pipeline parallelism with {EXECUTOR}"}
            for word in ("pool", "sleep", "logprob", EXECUTOR, "seed", "reload")
        ),
    }
    return [what for what, holds in wanted.items() if not holds]


def _strings(node: ast.AST) -> set[str]:
    return {
        n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }


def test_what_opd_uses_is_in_the_installed_libraries() -> None:
    assert problems(installed()) == []


def test_the_alarm_sees_the_uses_that_matter() -> None:
    uses, absent = library_uses(PACKAGE, LIBRARIES, KNOWN)
    assert absent == [], "these are listed in KNOWN and occur nowhere: remove them"
    seen = {str(use.target) for use in uses}
    assert {
        "vllm.LLM",
        "vllm.SamplingParams",
        "vllm.LLM().sleep",
        "vllm.LLM().wake_up",
        "vllm.LLM().enqueue",
        "vllm.LLM().encode",
        "vllm.LLM().collective_rpc",
        "vllm.LLM().reset_prefix_cache",
        "vllm.v1.worker.gpu_worker.Worker().reload_weights",
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner().model_config",
        "accelerate.utils.DeepSpeedPlugin",
        "deepspeed.utils.safe_get_full_fp32_param",
        "deepspeed.runtime.engine.DeepSpeedEngine().set_gradient_accumulation_boundary",
    } <= seen
    starts = [use.arguments for use in uses if str(use.target) == "vllm.LLM" and use.arguments]
    assert len(starts) >= 2
    assert all("gpu_memory_utilization" in arguments.keywords for arguments in starts)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("LLM(model, gpu_memory_utilisation=0.5)", "no parameter gpu_memory_utilisation"),
        ("LLM(model, logprobs_mode='cooked')", "logprobs_mode may be"),
        ("LLM(model, runner='pooling' if model else 'pool')", "runner may be"),
        ("LLM()", "it needs model"),
        ("PoolerConfig(task='tokens')", "task may be"),
        ("SamplingParams(n=1, flat=True)", "no parameter flat"),
        ("llm.sleep(depth=2)", "no parameter depth"),
        ("llm.wake_up(['weights'], ['kv_cache'])", "takes 1 arguments by position"),
        ("llm.nap()", "has no nap"),
        ("llm.llm_engine.core.step()", "class of what has core cannot be seen"),
        ("worker.reload_weights(iterator=())", "has no parameter iterator"),
        ("worker.model_runner.weights()", "GPUModelRunner has no weights"),
        ("DeepSpeedPlugin(hf_config={})", "no parameter hf_config"),
        ("zero.GatheredParameters([], rank=0)", "no parameter rank"),
        ("os.environ['VLLM_SLEEPS'] = '1'", "vLLM reads no VLLM_SLEEPS"),
        ("memory = {'dtype': 1}; memory['sd'] = 2; LLM(model, **memory)", "no parameter sd"),
    ],
)
def test_a_use_that_the_library_does_not_have_is_named(
    tmp_path: Path, line: str, reason: str
) -> None:
    found = problems(installed(), _package(tmp_path, line))
    assert len(found) >= 1
    assert any(reason in each for each in found), found


def test_a_use_that_the_library_has_is_accepted(tmp_path: Path) -> None:
    lines = "memory = {'dtype': 'float32'} | {'seed': 0}; LLM(model, **memory); llm.sleep(level=2)"
    assert problems(installed(), _package(tmp_path, lines)) == []


def test_keywords_that_cannot_be_seen_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnseenKeywords, match="write its keys as a literal"):
        problems(installed(), _package(tmp_path, "LLM(model, **worker)"))


def _package(folder: Path, line: str) -> Path:
    """A package with one module that runs ``line``."""
    module = folder / "sync" / "new.py"
    module.parent.mkdir()
    module.write_text(
        "import os\nfrom vllm import LLM, SamplingParams\nfrom vllm.config import PoolerConfig\n"
        "from accelerate.utils import DeepSpeedPlugin\n"
        f"def new(model, llm: 'LLM', worker):\n    from deepspeed import zero\n    {line}\n"
    )
    return folder


def test_model_runner_v2_has_what_opd_needs() -> None:
    assert v2_problems(installed()) == []


def test_triton_reads_the_variable_that_makes_float32_products_exact() -> None:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    triton = Sources(installed(), ("triton",), {})
    assert "TRITON_F32_DEFAULT" in triton.strings("triton.knobs")
    product = ast.unparse(triton.function("triton.language.core:dot"))
    assert "input_precision = knobs.language.fp32_default" in product


@pytest.fixture(scope="session")
def gpu_wheels() -> Path:
    """The Python files of the releases that the ``gpu`` extra installs, in a cache outside the clone."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = home / "opd-tests" / "gpu-wheels" / "-".join(f"{n}-{v}" for n, v in pinned().items())
    if not (folder / "complete").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < NEEDED_BYTES:
            pytest.fail(f"{folder} has {free >> 20} MiB free and needs {NEEDED_BYTES >> 20}")
        for name, version in pinned().items():
            _download(name, version, folder)
        (folder / "complete").touch()
    return folder


@cache
def pinned() -> dict[str, str]:
    """The versions of the GPU installation; DeepSpeed and accelerate as the tests run with them."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [
        *project["optional-dependencies"]["gpu"],
        *(REPOSITORY / "constraints.txt").read_text().splitlines(),
    ]
    versions = dict(line.split("==") for line in reversed(lines) if "==" in line)
    return {name: versions[name] for name in LIBRARIES}


def _download(name: str, version: str, folder: Path) -> None:
    """Unpack the Python files of a release; a wheel for x86-64 Linux, else the source archive."""
    archives = folder / "archives"
    wheel = ["--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64"]
    kind = ["--no-binary", ":all:"] if name == "deepspeed" else [*wheel, "--python-version", "3.11"]
    command = [sys.executable, "-m", "pip", "download", f"{name}=={version}", "--no-deps"]
    done = subprocess.run(
        [*command, "--quiet", "--dest", str(archives), *kind],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{name} {version} cannot be downloaded: {done.stderr}"
    [archive] = archives.glob(f"{name}-*")
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder, [n for n in packed.namelist() if n.endswith(".py")])
    else:
        with tarfile.open(archive) as packed:
            for member in packed:
                inside = Path(*Path(member.name).parts[1:])
                if member.isfile() and member.name.endswith(".py") and inside.parts[0] == name:
                    member.name = str(inside)
                    packed.extract(member, folder, filter="data")
    shutil.rmtree(archives)


@pytest.mark.slow
@pytest.mark.network
def test_what_opd_uses_is_in_the_pinned_gpu_releases(gpu_wheels: Path) -> None:
    assert {path.name for path in gpu_wheels.iterdir()} >= set(LIBRARIES)
    assert problems(gpu_wheels) == []


@pytest.mark.slow
@pytest.mark.network
def test_model_runner_v2_of_the_pinned_release_has_what_opd_needs(gpu_wheels: Path) -> None:
    assert v2_problems(gpu_wheels) == []
