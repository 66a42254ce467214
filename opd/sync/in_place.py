"""How a receiver loads weights into its engine: all tensors anew, or changed coordinates in place."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from opd.interfaces import WeightSync
from opd.sync.receiver import Load
from opd.sync.replica import Change

if TYPE_CHECKING:
    from vllm import LLM


def load_all(engine: WeightSync) -> Load:
    """Load every tensor, whatever changed: fused modules stay whole and packed ones are packed anew."""

    def load(tensors: Mapping[str, torch.Tensor], changes: Sequence[Change], version: int) -> None:
        engine.push(tensors.items(), version)

    return load


def load_in_place(llm: "LLM", dense: WeightSync, *, mark: Callable[[int], None]) -> Load:
    """Write only the coordinates that changed, into the tensors of a vLLM model on a GPU.

    vLLM's own loader maps names, shards and fused modules. It marks unchanged coordinates with NaN, so
    a patch that holds NaN, like a snapshot, is pushed through ``dense``. Not for engines that repack
    weights after loading: vLLM on a CPU, quantised models.
    """

    def load(tensors: Mapping[str, torch.Tensor], changes: Sequence[Change], version: int) -> None:
        pairs = [(change, tensors[change.name]) for change in changes]
        values = [change.values(tensor.dtype) for change, tensor in pairs]
        if any(change.indices_n is None for change in changes) or any(
            bool(v.isnan().any()) for v in values
        ):
            dense.push(tensors.items(), version)
            return
        patches = [
            (change.name, tuple(tensor.shape), torch.from_numpy(change.indices_n), new)
            for (change, tensor), new in zip(pairs, values, strict=True)
        ]
        llm.collective_rpc(patch_worker, args=(patches,))
        llm.reset_prefix_cache()
        mark(version)

    return load


def patch_worker(
    worker: Any, patches: Sequence[tuple[str, tuple[int, ...], torch.Tensor, torch.Tensor]]
) -> None:
    """Overwrite (name, full shape, flat indices [n], values [n]) in a worker's model."""
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    model = worker.get_model()
    device = next(model.parameters()).device
    load_checkpoint_weight_patches(
        model,
        [
            CheckpointWeightPatch(
                name=name,
                shape=shape,
                dtype=values.dtype,
                values=values.to(device),
                indices=indices.to(device),
            )
            for name, shape, indices, values in patches
        ],
        validate_unique_indices=False,
    )
