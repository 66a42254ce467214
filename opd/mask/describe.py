"""Where a mask is dense: by block, module type, layer and tensor."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from opd.checkpoint.names import BLOCKS, place
from opd.mask.mask import Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Kept weights among some weights."""

    name: str
    kept: int
    numel: int

    @property
    def density(self) -> float:
        """Kept / all."""
        return self.kept / self.numel if self.numel else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Shares of a mask: whole, by block, by module type, by layer, by tensor, and of each cell.

    ``cells`` are the module types of each layer, which the heat map shows.
    """

    whole: Share
    blocks: tuple[Share, ...]
    modules: tuple[Share, ...]
    layers: tuple[Share, ...]
    tensors: tuple[Share, ...]
    cells: dict[tuple[int, str], Share]


def describe(mask: Mask) -> Description:
    """Count a mask, a tensor at a time."""
    tensors = [
        Share(name=name, kept=kept, numel=mask.numel(name)) for name, kept in mask.counts().items()
    ]
    blocks = {s.name: s for s in _pooled(tensors, lambda name: place(name).block)}
    cells: dict[tuple[int, str], list[Share]] = {}
    for tensor in tensors:
        where = place(tensor.name)
        if where.layer is not None:
            cells.setdefault((where.layer, where.module), []).append(tensor)
    return Description(
        whole=_pool("all", tensors),
        blocks=tuple(blocks[block] for block in BLOCKS if block in blocks),
        modules=_pooled(tensors, lambda name: place(name).module),
        layers=tuple(sorted(_pooled(tensors, _layer), key=lambda share: _order(share.name))),
        tensors=tuple(tensors),
        cells={
            (layer, module): _pool(f"{layer} {module}", mine)
            for (layer, module), mine in sorted(cells.items())
        },
    )


def _layer(name: str) -> str:
    layer = place(name).layer
    return "outside layers" if layer is None else str(layer)


def _order(layer: str) -> tuple[bool, int]:
    return (True, int(layer)) if layer.isdigit() else (False, 0)


def _pooled(tensors: Iterable[Share], key: Callable[[str], str]) -> tuple[Share, ...]:
    pools: dict[str, list[Share]] = {}
    for tensor in tensors:
        pools.setdefault(key(tensor.name), []).append(tensor)
    return tuple(_pool(name, mine) for name, mine in pools.items())


def _pool(name: str, shares: Iterable[Share]) -> Share:
    shares = list(shares)
    return Share(name=name, kept=sum(s.kept for s in shares), numel=sum(s.numel for s in shares))
