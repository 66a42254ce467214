"""The density of a mask by block, module type, layer and tensor."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from opd.checkpoint.names import BLOCKS, place
from opd.mask.mask import Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Kept weights of a group of weights."""

    name: str
    kept: int
    numel: int

    @property
    def density(self) -> float:
        """Kept / all."""
        return self.kept / self.numel if self.numel else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Shares of a mask: whole, by block, by module type, by layer and by tensor.

    ``cells`` has a share for each module type of each layer, for the heat map.
    """

    whole: Share
    blocks: tuple[Share, ...]
    modules: tuple[Share, ...]
    layers: tuple[Share, ...]
    tensors: tuple[Share, ...]
    cells: dict[tuple[int, str], Share]


def describe(mask: Mask) -> Description:
    """Count the kept weights of a mask, a tensor at a time."""
    tensors = [
        Share(name=name, kept=kept, numel=mask.numel(name)) for name, kept in mask.counts().items()
    ]
    blocks = {s.name: s for s in _pool_by(tensors, lambda name: place(name).block)}
    cells: dict[tuple[int, str], list[Share]] = {}
    for tensor in tensors:
        location = place(tensor.name)
        if location.layer is not None:
            cells.setdefault((location.layer, location.module), []).append(tensor)
    return Description(
        whole=_pool("all", tensors),
        blocks=tuple(blocks[block] for block in BLOCKS if block in blocks),
        modules=_pool_by(tensors, lambda name: place(name).module),
        layers=tuple(sorted(_pool_by(tensors, _layer), key=lambda share: _layer_order(share.name))),
        tensors=tuple(tensors),
        cells={
            (layer, module): _pool(f"{layer} {module}", members)
            for (layer, module), members in sorted(cells.items())
        },
    )


def _layer(name: str) -> str:
    layer = place(name).layer
    return "outside layers" if layer is None else str(layer)


def _layer_order(layer: str) -> tuple[bool, int]:
    return (True, int(layer)) if layer.isdigit() else (False, 0)


def _pool_by(tensors: Iterable[Share], key: Callable[[str], str]) -> tuple[Share, ...]:
    pools: dict[str, list[Share]] = {}
    for tensor in tensors:
        pools.setdefault(key(tensor.name), []).append(tensor)
    return tuple(_pool(name, members) for name, members in pools.items())


def _pool(name: str, shares: Iterable[Share]) -> Share:
    shares = list(shares)
    return Share(name=name, kept=sum(s.kept for s in shares), numel=sum(s.numel for s in shares))
