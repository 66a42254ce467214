"""Who writes, and how new weights reach it."""

import os
from dataclasses import fields
from typing import TYPE_CHECKING

from opd.assembly.numbers import compute_dtype, torch_dtype
from opd.assembly.text import Text
from opd.config.schema import Config
from opd.config.writing import DatasetRolloutConfig, RolloutConfig, ServerRolloutConfig, TransformersRolloutConfig, VllmRolloutConfig
from opd.config.models import DType
from opd.config.rules import last_step
from opd.interfaces import (
    Progress,
    RolloutEngine,
    WeightSync,
)

if TYPE_CHECKING:
    from opd.mask.mask import Mask
    from opd.rollout.options import RolloutServerOptions
    from opd.serving.client import ServiceClient
    from opd.sync.ema import EMAWeights
    from opd.world import World


ROLLOUT_URLS = "OPD_ROLLOUT_URLS"
"""The same of the rollout servers that it started, comma separated."""


def engine_dtype(config: Config) -> DType:
    """The number format of the rollout engine's weights."""
    if config.rollout.dtype == DType.auto:
        return DType(str(compute_dtype(config)).removeprefix("torch."))
    return config.rollout.dtype


def build_engine(
    config: Config,
    model: str,
    text: Text,
    max_length: int,
    world: "World",
    progress: Progress,
    mask: "Mask | None" = None,
) -> tuple[RolloutEngine, WeightSync]:
    """The engine that writes, holding ``model``, and the way new weights reach it.

    Of a ``mask`` only the kept values travel.
    """
    from opd.rollout.dataset import DatasetRollouts
    from opd.sync.periodic import NoSync

    rollout, dtype = config.rollout, engine_dtype(config)
    match rollout:
        case DatasetRolloutConfig():
            return DatasetRollouts(), NoSync()
        case ServerRolloutConfig():
            return _server(config, rollout, dtype, mask, text, max_length, world, progress)
        case VllmRolloutConfig():
            return _vllm(config, rollout, dtype, model, text, max_length, world, progress)
        case TransformersRolloutConfig():
            return _transformers(rollout, dtype, config, model, text, world, progress)
    raise AssertionError(f"no rollout engine for {type(rollout).__name__}")


def _vllm(
    config: Config,
    rollout: VllmRolloutConfig,
    dtype: DType,
    model: str,
    text: Text,
    max_length: int,
    world: "World",
    progress: Progress,
) -> tuple[RolloutEngine, WeightSync]:
    from opd.rollout.vllm import VllmRollouts, VllmSettings, start_llm
    from opd.sync.colocated import VllmWeights

    on_gpu = world.device.type == "cuda"
    settings = VllmSettings(
        model=model,
        dtype=dtype.value,
        max_length=max_length,
        seed=config.seed,
        gpu_memory_fraction=rollout.gpu_memory_fraction,
        kv_cache_mib=rollout.kv_cache_mib,
        eager=(not on_gpu) if rollout.eager is None else rollout.eager,
        sleep=rollout.sleep,
        trust_remote_code=config.student.trust_remote_code,
    )
    llm = start_llm(settings, world.device)
    engine = VllmRollouts(
        llm, stop_ids=text.stop_ids, progress=progress, sleeps=rollout.sleep and on_gpu
    )
    return engine, VllmWeights(llm, wake=engine.wake, mark=engine.mark)


def _server(
    config: Config,
    rollout: ServerRolloutConfig,
    dtype: DType,
    mask: "Mask | None",
    text: Text,
    max_length: int,
    world: "World",
    progress: Progress,
) -> tuple[RolloutEngine, WeightSync]:
    import secrets

    from opd.rollout.client import ServerRollouts
    from opd.sync.remote import ServerWeights
    from opd.sync.sparse import WeightSender

    urls = rollout.urls or [u for u in os.environ.get(ROLLOUT_URLS, "").split(",") if u]
    if not urls:
        raise ValueError(
            "rollout=server has no rollout.urls, and another launcher than opd train starts no "
            "servers: start them with `opd rollout` and name them"
        )
    servers = [_service(rollout, url) for url in urls]
    own = servers[world.rank % len(servers)]
    _require_served(own, dtype, text, max_length, retries=rollout.retries)
    drawn = world.sum({"run": float(secrets.randbits(48)) if world.is_main else 0.0})
    run = f"{int(drawn['run']):012x}"
    engine = ServerRollouts(own, run=run, progress=progress)
    sender = WeightSender(
        dtype=torch_dtype(dtype),
        anchor_every=config.sync.anchor_every,
        kept=None if mask is None else mask.indices,
        fingerprint=None if mask is None else mask.fingerprint(),
        run=run,
    )
    return engine, ServerWeights(servers, sender, mark=engine.mark, world=world)


def _service(rollout: ServerRolloutConfig, url: str) -> "ServiceClient":
    from opd.rollout.client import REMEDY, WHAT
    from opd.rollout.options import TOKEN_VARIABLE
    from opd.serving.client import ServiceClient

    return ServiceClient(
        url,
        what=WHAT,
        remedy=REMEDY,
        token=os.environ.get(TOKEN_VARIABLE),
        timeout=rollout.timeout,
        retries=rollout.retries,
    )


def require_rollout_servers(config: Config, text: Text, max_length: int) -> None:
    """Ask every server that the run is told to use; ValueError when one is away or does not fit."""
    if isinstance(config.rollout, ServerRolloutConfig):
        for url in config.rollout.urls:
            server = _service(config.rollout, url)
            _require_served(server, engine_dtype(config), text, max_length, retries=1)


def _require_served(
    server: "ServiceClient", dtype: DType, text: Text, max_length: int, *, retries: int
) -> None:
    try:
        told = server.send("GET", "/info", retries=retries).json()
    except ConnectionError as error:
        raise ValueError(str(error)) from None
    wanted = {"dtype": dtype.value, "stop_ids": text.stop_ids}
    for name, value in wanted.items():
        if told[name] != value:
            raise ValueError(
                f"the rollout server at {server.url} has {name} {told[name]}, this run needs "
                f"{value}: start it with the run's student.model and rollout.dtype"
            )
    if told["max_length"] < max_length:
        raise ValueError(
            f"prompt plus completion can reach {max_length} tokens, the rollout server at "
            f"{server.url} takes {told['max_length']}: start it with a larger --max-length"
        )


def rollout_options(config: Config, max_length: int) -> "RolloutServerOptions":
    """How to start a server that a run brings along."""
    from opd.rollout.options import RolloutServerOptions

    rollout = config.rollout
    assert isinstance(rollout, ServerRolloutConfig)
    return RolloutServerOptions(
        model=config.student.model,
        dtype=engine_dtype(config),
        max_length=max_length,
        seed=config.seed,
        gpu_memory_fraction=rollout.gpu_memory_fraction,
        kv_cache_mib=rollout.kv_cache_mib,
        eager=rollout.eager,
        trust_remote_code=config.student.trust_remote_code,
    )


def in_process(rollout: RolloutConfig) -> RolloutConfig:
    """The same engine in this process, for work to which nobody sends weights."""
    if isinstance(rollout, ServerRolloutConfig):
        names = [f.name for f in fields(VllmRolloutConfig)]
        return VllmRolloutConfig(**{name: getattr(rollout, name) for name in names})
    return rollout


def _transformers(
    rollout: RolloutConfig,
    dtype: DType,
    config: Config,
    model: str,
    text: Text,
    world: "World",
    progress: Progress,
) -> tuple[RolloutEngine, WeightSync]:
    assert isinstance(rollout, TransformersRolloutConfig)
    from opd.rollout.transformers import TransformersRollouts
    from opd.sync.colocated import ModuleWeights
    from opd.train.weights import load_student

    module = load_student(
        model,
        dtype=torch_dtype(dtype),
        attention=config.student.attention,
        trust_remote_code=config.student.trust_remote_code,
    ).to(world.device)
    engine = TransformersRollouts(
        module,
        stop_ids=text.stop_ids,
        pad_id=text.pad_id,
        batch_size=rollout.batch_size,
        progress=progress,
    )
    return engine, ModuleWeights(module, mark=engine.mark)


def build_writer(config: Config, engine: RolloutEngine) -> RolloutEngine:
    """Who answers the prompts of a step: the engine, the data set, or each a share."""
    from opd.rollout.dataset import DatasetRollouts, MixedRollouts

    share = config.rollout.on_policy
    if share == 0:
        return DatasetRollouts()
    return engine if share == 1 else MixedRollouts(engine, on_policy=share)


def build_hand_over(
    config: Config, sync: WeightSync, average: "EMAWeights | None"
) -> WeightSync:
    """The way of the weights: seldom where nobody writes with them, past an average if there is one."""
    from opd.sync.ema import EMASync
    from opd.sync.periodic import PeriodicSync

    examined = config.data.eval is not None or config.eval.kl_data is not None
    every = [config.sync.verify_every, config.eval.every if examined else 0]

    def read(version: int) -> bool:
        is_last = examined and version == last_step(config)
        return is_last or any(n and version % n == 0 for n in every)

    if config.rollout.on_policy == 0:
        sync = PeriodicSync(sync, read)
    return sync if average is None else EMASync(sync, average)
