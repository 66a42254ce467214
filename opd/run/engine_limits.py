"""What the installed rollout and teacher engines cannot run, before one of them is started."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoConfig

from opd.config.rollout import ServerRolloutConfig, VllmEngineConfig
from opd.config.schema import Config
from opd.config.teacher import ServedTeacherConfig, TeacherBackend
from opd.run.placement import Cards
from opd.teacher.connect import started_models

CPU_ATTENTION = Path("v1", "attention", "backends", "cpu_attn.py")
HEAD_SIZES = "get_supported_head_sizes"


def require_head_sizes(config: Config, cards: Cards) -> None:
    """ValueError when vLLM would run on the CPU a model whose attention heads have a size that it lacks."""
    sizes = None if cards.count else cpu_head_sizes()
    for setting, model, remedy in _models(config) if sizes is not None else ():
        trusted = config.student.trust_remote_code and setting == "student.model"
        size = _head_size(model, trusted)
        if size is not None and size not in sizes:
            raise ValueError(
                f"{setting}={model} has attention heads of size {size}, and the installed vLLM can do "
                f"{', '.join(map(str, sizes))} on a CPU: use {remedy}"
            )


def cpu_head_sizes() -> tuple[int, ...] | None:
    """Sizes that the installed vLLM's CPU attention has; None when they cannot be found.

    They are read from its source, because importing vLLM takes long.
    """
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / CPU_ATTENTION
        if path.is_file():
            return returned_list(path.read_text(encoding="utf-8"))
    return None


def returned_list(source: str) -> tuple[int, ...] | None:
    """The numbers that ``HEAD_SIZES`` returns in a module's source; None for any other form of it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == HEAD_SIZES:
            last = node.body[-1]
            try:
                assert isinstance(last, ast.Return)
                assert last.value is not None
                return tuple(map(int, ast.literal_eval(last.value)))
            except (AssertionError, ValueError, TypeError):
                return None
    return None


def _models(config: Config) -> Iterator[tuple[str, str, str]]:
    """(setting, model, what to use instead) of the models that vLLM engines of the run load."""
    rollout, teacher = config.rollout, config.teacher
    elsewhere = isinstance(rollout, ServerRolloutConfig) and rollout.urls
    if isinstance(rollout, VllmEngineConfig) and not elsewhere:
        yield "student.model", config.student.model, "rollout=transformers"
    if isinstance(teacher, ServedTeacherConfig) and teacher.backend == TeacherBackend.vllm:
        for model in started_models(teacher):
            yield "teacher.model", model, "teacher.backend=torch"


def _head_size(model: str, trust_remote_code: bool) -> int | None:
    text = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()
    plain = text.to_dict()
    heads, hidden = plain.get("num_attention_heads"), plain.get("hidden_size")
    if plain.get("head_dim"):
        return int(plain["head_dim"])
    return int(hidden) // int(heads) if heads and hidden else None
