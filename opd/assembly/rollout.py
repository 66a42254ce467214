"""The rollout engine, and how new weights reach it."""

import os
import secrets
from dataclasses import dataclass, fields

from opd.checkpoint.tensors import torch_dtype
from opd.config.rollout import (
    DatasetRolloutConfig,
    RolloutConfig,
    ServerRolloutConfig,
    TransformersRolloutConfig,
    VllmRolloutConfig,
    engine_dtype,
)
from opd.config.schema import Config
from opd.config.train import last_step
from opd.data.tokenizer import StudentTokenizer
from opd.interfaces import Progress, RolloutEngine, WeightSync
from opd.mask.mask import Mask
from opd.rollout.client import (
    ROLLOUT_URLS,
    ServerRollouts,
    require_server_fits,
    server_connection,
)
from opd.rollout.dataset import DatasetRollouts, MixedRollouts
from opd.rollout.transformers import TransformersRollouts
from opd.rollout.vllm import VllmRollouts, start_llm
from opd.sync.colocated import ModuleWeights, VllmWeights
from opd.sync.ema import EMASync, EMAWeights
from opd.sync.periodic import NoSync, PeriodicSync
from opd.sync.remote import ServerWeights
from opd.sync.sender import WeightSender
from opd.train.weights import checkpoint_views, load_student
from opd.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInputs:
    """The inputs of every engine: ``model`` is a folder or Hub id, ``max_length`` is in tokens."""

    config: Config
    model: str
    tokenizer: StudentTokenizer
    max_length: int
    world: World
    progress: Progress


def build_engine(
    inputs: EngineInputs, mask: Mask | None = None
) -> tuple[RolloutEngine, WeightSync]:
    """The engine and its weight sync; with a ``mask`` only kept coordinates are sent to a server.

    An engine that sleeps has no weights before the first push: commands without a push set
    ``rollout.enable_sleep_mode=false``.
    """
    match inputs.config.rollout:
        case DatasetRolloutConfig():
            return DatasetRollouts(), NoSync()
        case ServerRolloutConfig() as rollout:
            return _server(inputs, rollout, mask)
        case VllmRolloutConfig() as rollout:
            return _vllm(inputs, rollout)
        case TransformersRolloutConfig() as rollout:
            return _transformers(inputs, rollout)
    raise AssertionError(f"no rollout engine for {type(inputs.config.rollout).__name__}")


def _vllm(inputs: EngineInputs, rollout: VllmRolloutConfig) -> tuple[RolloutEngine, WeightSync]:
    sleeps = engine_sleeps(rollout, inputs.world)
    llm = start_llm(
        inputs.model,
        rollout,
        dtype=engine_dtype(inputs.config),
        max_model_len=inputs.max_length,
        seed=inputs.config.seed,
        sleeps=sleeps,
        device=inputs.world.device,
        trust_remote_code=inputs.config.student.trust_remote_code,
    )
    engine = VllmRollouts(
        llm, stop_ids=inputs.tokenizer.stop_ids, progress=inputs.progress, sleeps=sleeps
    )
    engine.discard_weights()
    return engine, VllmWeights(llm, wake=engine.wake, mark=engine.mark)


def engine_sleeps(rollout: VllmRolloutConfig, world: World) -> bool:
    """Whether the engine sleeps while others work: on CUDA, where vLLM can free its memory."""
    return rollout.enable_sleep_mode and world.device.type == "cuda"


def _server(
    inputs: EngineInputs, rollout: ServerRolloutConfig, mask: Mask | None
) -> tuple[RolloutEngine, WeightSync]:
    config, world = inputs.config, inputs.world
    urls = rollout.urls or [u for u in os.environ.get(ROLLOUT_URLS, "").split(",") if u]
    if not urls:
        raise ValueError(
            "rollout=server has no rollout.urls, and only opd train starts servers: start them with "
            "`opd rollout` and give their addresses"
        )
    dtype = engine_dtype(config)
    servers = [server_connection(rollout, url) for url in urls]
    own = servers[world.rank % len(servers)]
    require_server_fits(
        own, dtype, inputs.tokenizer.stop_ids, inputs.max_length, retries=rollout.retries
    )
    summed = world.sum({"run": float(secrets.randbits(48)) if world.is_main else 0.0})
    run = f"{int(summed['run']):012x}"
    engine = ServerRollouts(own, run=run, progress=inputs.progress)
    sender = WeightSender(
        dtype=torch_dtype(dtype.value),
        snapshot_every=config.sync.snapshot_every,
        kept=None if mask is None else mask.indices,
        fingerprint=None if mask is None else mask.fingerprint(),
        run=run,
    )
    return engine, ServerWeights(servers, sender, mark=engine.mark, world=world)


def _transformers(
    inputs: EngineInputs, rollout: TransformersRolloutConfig
) -> tuple[RolloutEngine, WeightSync]:
    module = load_student(
        inputs.model, inputs.config.student, dtype=torch_dtype(engine_dtype(inputs.config).value)
    ).to(inputs.world.device)
    engine = TransformersRollouts(
        module,
        stop_ids=inputs.tokenizer.stop_ids,
        pad_id=inputs.tokenizer.pad_id,
        batch_size=rollout.batch_size,
        progress=inputs.progress,
    )
    return engine, ModuleWeights(checkpoint_views(module), mark=engine.mark)


def in_process(rollout: RolloutConfig) -> RolloutConfig:
    """The same engine in this process, for commands that push no weights."""
    if isinstance(rollout, ServerRolloutConfig):
        server_fields = {f.name for f in fields(ServerRolloutConfig)}
        shared = [f.name for f in fields(VllmRolloutConfig) if f.name in server_fields]
        return VllmRolloutConfig(**{name: getattr(rollout, name) for name in shared})
    return rollout


def build_writer(config: Config, engine: RolloutEngine) -> RolloutEngine:
    """What completes the prompts of a step: the engine, the data set, or each a share.

    A step pushes weights after its rollouts, so that an engine that sleeps discards them.
    """
    share = config.rollout.on_policy
    if share == 0:
        return DatasetRollouts()
    if isinstance(engine, VllmRollouts):
        engine = engine.before_push()
    return engine if share == 1 else MixedRollouts(engine, on_policy=share)


def build_first_sync(sync: WeightSync) -> WeightSync:
    """What pushes changed weights before a run: the sync, or to servers one that knows no mask."""
    return sync.whole() if isinstance(sync, ServerWeights) else sync


def build_sync(config: Config, sync: WeightSync, average: EMAWeights | None) -> WeightSync:
    """The weight sync of a run: pushes only what is read, and averages where there is an average."""
    evaluated = config.data.eval is not None or config.eval.kl_data is not None
    every = [config.sync.verify_every, config.eval.every if evaluated else 0]

    def is_read(version: int) -> bool:
        is_last = evaluated and version == last_step(config)
        return is_last or any(n and version % n == 0 for n in every)

    if config.rollout.on_policy == 0:
        sync = PeriodicSync(sync, is_read)
    return sync if average is None else EMASync(sync, average)
