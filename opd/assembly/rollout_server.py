"""The engine of a rollout server, and how weights reach it."""

import torch

from opd.checkpoint.tensors import torch_dtype
from opd.config.rollout import RolloutBackend, RolloutServerConfig
from opd.config.student import StudentConfig
from opd.data.tokenizer import StudentTokenizer, read_tokenizer
from opd.interfaces import RolloutEngine
from opd.model_head import read_model_config, skeleton
from opd.rollout.app import EngineHost, ServedModel
from opd.rollout.transformers import TransformersRollouts
from opd.rollout.vllm import VllmRollouts, start_llm
from opd.sync.colocated import ModuleWeights, VllmWeights
from opd.sync.in_place import load_all, load_in_place
from opd.sync.receiver import Load, WeightReceiver
from opd.tracking.console import SilentProgress
from opd.train.weights import checkpoint_views, load_student


def build_engine_host(config: RolloutServerConfig) -> EngineHost:
    """Start the engine."""
    tokenizer = read_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    max_length = config.max_model_len or tokenizer.max_length
    match config.backend:
        case RolloutBackend.vllm:
            engine, load = _vllm(config, tokenizer, max_length)
        case RolloutBackend.transformers:
            engine, load = _transformers(config, tokenizer)
    receiver = WeightReceiver(load, _weight_shapes(config))
    served = ServedModel(
        model=config.model,
        dtype=config.dtype.value,
        max_length=max_length,
        vocab_size=tokenizer.vocab_size,
        stop_ids=tokenizer.stop_ids,
    )
    return EngineHost(engine=engine, model=served, take=receiver.take, state=receiver.state)


def _weight_shapes(config: RolloutServerConfig) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the weights that a run sends, by name; None where transformers cannot tell beforehand."""
    trusted = config.trust_remote_code
    try:
        settings = read_model_config(config.model, trust_remote_code=trusted)
        views = checkpoint_views(skeleton(settings, trust_remote_code=trusted))
    except (ValueError, RuntimeError):  # a layout of its own, or a computation without storage
        return None
    return {name: tuple(view.shape) for name, view in views.items()}


def _vllm(
    config: RolloutServerConfig, tokenizer: StudentTokenizer, max_length: int
) -> tuple[RolloutEngine, Load]:
    on_gpu = torch.cuda.is_available()
    llm = start_llm(
        config.model,
        config,
        dtype=config.dtype,
        max_model_len=max_length,
        seed=config.seed,
        sleeps=False,
        device=torch.device("cuda" if on_gpu else "cpu"),
        trust_remote_code=config.trust_remote_code,
    )
    engine = VllmRollouts(llm, stop_ids=tokenizer.stop_ids, progress=SilentProgress(), sleeps=False)
    dense = VllmWeights(llm, wake=engine.wake, mark=engine.mark)
    if on_gpu:
        return engine, load_in_place(llm, dense, mark=engine.mark)
    return engine, load_all(dense)


def _transformers(
    config: RolloutServerConfig, tokenizer: StudentTokenizer
) -> tuple[RolloutEngine, Load]:
    student = StudentConfig(model=config.model, trust_remote_code=config.trust_remote_code)
    module = load_student(config.model, student, dtype=torch_dtype(config.dtype.value))
    module = module.to("cuda" if torch.cuda.is_available() else "cpu")
    engine = TransformersRollouts(
        module,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        batch_size=config.batch_size,
        progress=SilentProgress(),
    )
    return engine, load_all(ModuleWeights(checkpoint_views(module), mark=engine.mark))
