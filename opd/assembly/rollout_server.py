"""What a rollout server holds."""

from typing import TYPE_CHECKING

from opd.assembly.numbers import torch_dtype
from opd.assembly.text import Text, build_text
from opd.interfaces import (
    Progress,
    RolloutEngine,
)

if TYPE_CHECKING:
    from opd.rollout.app import Hosted
    from opd.rollout.options import RolloutServerOptions
    from opd.sync.sparse import Load


def build_host(options: "RolloutServerOptions") -> "Hosted":
    """The engine of a rollout server and the doors through which weights reach it."""
    from opd.rollout.app import Hosted, ServedModel
    from opd.rollout.options import EngineName
    from opd.sync.sparse import WeightReceiver
    from opd.tracking.console import SilentProgress

    text = build_text(options.model, trust_remote_code=options.trust_remote_code)
    max_length = options.max_length or text.max_length
    match options.engine:
        case EngineName.vllm:
            engine, load = _hosted_vllm(options, text, max_length, SilentProgress())
        case EngineName.transformers:
            engine, load = _hosted_transformers(options, text, SilentProgress())
    receiver = WeightReceiver(load)
    told = ServedModel(
        model=options.model,
        dtype=options.dtype.value,
        max_length=max_length,
        stop_ids=text.stop_ids,
    )
    return Hosted(engine=engine, model=told, take=receiver.take, held=receiver.held)


def _hosted_vllm(
    options: "RolloutServerOptions", text: Text, max_length: int, progress: Progress
) -> tuple[RolloutEngine, "Load"]:
    import torch

    from opd.rollout.vllm import VllmRollouts, VllmSettings, start_llm
    from opd.sync.colocated import VllmWeights
    from opd.sync.in_place import loaded_whole, patched_in_place

    on_gpu = torch.cuda.is_available()
    settings = VllmSettings(
        model=options.model,
        dtype=options.dtype.value,
        max_length=max_length,
        seed=options.seed,
        gpu_memory_fraction=options.gpu_memory_fraction,
        kv_cache_mib=options.kv_cache_mib,
        eager=(not on_gpu) if options.eager is None else options.eager,
        sleep=False,
        trust_remote_code=options.trust_remote_code,
    )
    llm = start_llm(settings, torch.device("cuda" if on_gpu else "cpu"))
    engine = VllmRollouts(llm, stop_ids=text.stop_ids, progress=progress, sleeps=False)
    whole = VllmWeights(llm, wake=engine.wake, mark=engine.mark)
    if on_gpu:
        return engine, patched_in_place(llm, whole, mark=engine.mark)
    return engine, loaded_whole(whole)


def _hosted_transformers(
    options: "RolloutServerOptions", text: Text, progress: Progress
) -> tuple[RolloutEngine, "Load"]:
    import torch

    from opd.rollout.transformers import TransformersRollouts
    from opd.sync.colocated import ModuleWeights
    from opd.sync.in_place import loaded_whole
    from opd.train.weights import load_student

    module = load_student(
        options.model,
        dtype=torch_dtype(options.dtype),
        attention="sdpa",
        trust_remote_code=options.trust_remote_code,
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    engine = TransformersRollouts(
        module,
        stop_ids=text.stop_ids,
        pad_id=text.pad_id,
        batch_size=options.batch_size,
        progress=progress,
    )
    return engine, loaded_whole(ModuleWeights(module, mark=engine.mark))
