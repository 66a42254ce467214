"""Weights and optimizer states of a checkpoint by parameter, whole, whatever engine and ranks wrote it.

The files are mapped into memory and read a parameter at a time.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from opd.world import World

States = Mapping[str, torch.Tensor]
"""Of one parameter: "master" and the optimizer's states, flat and whole; a counter has one element."""
ReadStates = Callable[[str], States]
"""Gives the states of a trained parameter by its name in the student."""
Layout = Mapping[str, Any]
"""How an engine divides its state: checkpoints of equal layouts have equal files."""
RANK_FILE = "rank_{}.pt"
FIRST_RANK = 0


def read_rank_state(folder: str, world: World) -> dict[str, Any]:
    """What this rank, or with another number of ranks all of them, saved beside the engine's states.

    With another number of ranks there is no ``random``: states of some ranks would be drawn from twice.
    """
    count = len(list(Path(folder).glob(RANK_FILE.format("*"))))
    if count == world.size:
        return _load(Path(folder) / RANK_FILE.format(world.rank))
    saved = [_load(Path(folder) / RANK_FILE.format(rank)) for rank in range(count)]
    joined = dict(saved[FIRST_RANK])
    del joined["random"]
    if joined.get("record") is not None:
        joined["record"] = _joined([rank["record"] for rank in saved])
    return joined


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators, from which dropout draws, on the host and on ``device``."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_states(
    states: Mapping[str, torch.Tensor] | None, device: torch.device, *, seed: int
) -> None:
    """Inverse of ``random_states``; generators without a state are seeded anew."""
    if states is None:
        torch.manual_seed(seed)
        return
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _joined(records: Sequence[Any]) -> Any:
    """Nested dicts of several ranks as one; each weight is in one rank's."""
    if not isinstance(records[0], dict):
        return records[0]
    keys = dict.fromkeys(key for record in records for key in record)
    return {key: _joined([r[key] for r in records if key in r]) for key in keys}


def open_states(folder: str, layout: Layout, groups: Sequence[Mapping[str, int]]) -> ReadStates:
    """The states in the checkpoint ``folder``, which an engine of ``layout`` wrote.

    ``groups``: number of elements of each trained parameter by name, for each of the optimizer's groups.
    Raises ValueError when the checkpoint holds those of other parameters.
    """
    if layout["engine"] == "torch":
        state = _load(Path(folder) / "torch.pt")
        return _by_number(groups, state["student"], state["optimizer"]["state"])
    files = Path(folder) / "deepspeed"
    match layout["zero"]:
        case 0:
            return _open_stage_0(files, groups)
        case 3:
            return _open_stage_3(files, groups)
    return _open_stages_1_and_2(files, groups)


def _by_number(
    groups: Sequence[Mapping[str, int]], masters: Mapping[str, torch.Tensor], states: Any
) -> ReadStates:
    """States that a torch optimizer numbers in the order of its parameters."""
    numbers = {name: n for n, name in enumerate(name for group in groups for name in group)}
    _require_names(groups, masters.keys() & numbers.keys())
    return lambda name: {
        "master": masters[name].reshape(-1),
        **{key: value.reshape(-1) for key, value in states.get(numbers[name], {}).items()},
    }


def _open_stage_0(files: Path, groups: Sequence[Mapping[str, int]]) -> ReadStates:
    saved = _load(files / "mp_rank_00_model_states.pt")
    optimizer = saved["optimizer"]
    if "fp32_groups" not in optimizer:  # fp32: the weights are their own masters
        return _by_number(groups, saved["module"], optimizer["state"])
    flat = [master for group in optimizer["fp32_groups"] for master in group]
    names = [name for group in groups for name in group]
    if len(flat) != len(names):
        raise ValueError(_others(groups))
    masters = dict(zip(names, flat, strict=True))
    return _by_number(groups, masters, optimizer["optimizer_state_dict"]["state"])


def _open_stages_1_and_2(files: Path, groups: Sequence[Mapping[str, int]]) -> ReadStates:
    """Each group is one flat tensor, cut into a part for each rank."""
    order = _load(files / "mp_rank_00_model_states.pt")["param_shapes"]
    shards = [shard["optimizer_state_dict"] for shard in _load_shards(files)]
    places: dict[str, tuple[int, int, int]] = {}
    for group, shapes in enumerate(order):
        start = 0
        for name, shape in shapes.items():
            places[name] = (group, start, math.prod(shape))
            start += math.prod(shape)
    _require_names(groups, places)

    def read(name: str) -> States:
        group, start, numel = places[name]
        parts = {"master": [shard["single_partition_of_fp32_groups"][group] for shard in shards]}
        for key in shards[0]["base_optimizer_state"]["state"].get(group, {}):
            parts[key] = [shard["base_optimizer_state"]["state"][group][key] for shard in shards]
        return {key: _narrowed(part, start, numel) for key, part in parts.items()}

    return read


def _open_stage_3(files: Path, groups: Sequence[Mapping[str, int]]) -> ReadStates:
    """Each parameter is cut into an equal part for each rank, whose parts are one flat tensor."""
    order = _load(files / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
    shards = [shard["optimizer_state_dict"] for shard in _load_shards(files)]
    places: dict[str, tuple[int, int, int]] = {}
    start = 0
    for shapes in order:
        for name, shape in shapes.items():
            part = math.ceil(math.prod(shape) / len(shards))
            places[name] = (start, part, math.prod(shape))
            start += part
    _require_names(groups, places)

    def read(name: str) -> States:
        start, part, numel = places[name]
        parts = {"master": [shard["fp32_flat_groups"] for shard in shards]}
        for key in shards[0]["optimizer_state_dict"]["state"].get(0, {}):
            states = [shard["optimizer_state_dict"]["state"] for shard in shards]
            parts[key] = [[state[n][key] for n in sorted(state)] for state in states]
        return {key: _gathered(of_ranks, start, part, numel) for key, of_ranks in parts.items()}

    return read


def _gathered(
    of_ranks: Sequence[Sequence[torch.Tensor]], start: int, part: int, numel: int
) -> torch.Tensor:
    """A whole parameter of ``numel`` elements, of which each rank has ``part``; a counter as it is."""
    if of_ranks[0][0].ndim == 0:
        return of_ranks[0][0].reshape(1)
    return torch.cat([_narrowed(flat, start, part) for flat in of_ranks])[:numel]


def _narrowed(parts: Sequence[torch.Tensor], start: int, numel: int) -> torch.Tensor:
    """``numel`` elements from ``start`` on of tensors that continue one another; a counter as it is."""
    if parts[0].ndim == 0:
        return parts[0].reshape(1)
    found, begins = [], 0
    for part in parts:
        low, high = max(start - begins, 0), min(start + numel - begins, len(part))
        if low < high:
            found.append(part[low:high])
        begins += len(part)
    return torch.cat(found) if found else parts[0][:0]


def _require_names(groups: Sequence[Mapping[str, int]], found: Any) -> None:
    if {name for group in groups for name in group} != set(found):
        raise ValueError(_others(groups))


def _others(groups: Sequence[Mapping[str, int]]) -> str:
    count = sum(map(len, groups))
    return (
        f"the checkpoint does not hold the states of the {count} parameters that this run trains: resume "
        "with the settings of the run, or use another run.dir"
    )


def _load_shards(files: Path) -> list[Any]:
    """The optimizer files of all ranks, in the order of the ranks."""
    found = {
        int(match[1]): path
        for path in files.glob("*_optim_states.pt")
        if (match := re.search(r"zero_pp_rank_(\d+)_", path.name))
    }
    with allowed_classes():
        return [_load(found[rank]) for rank in range(len(found))]


@contextmanager
def allowed_classes() -> Iterator[None]:
    """Inside, files may hold the plain classes that DeepSpeed's checkpoints have beside tensors."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        yield


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
