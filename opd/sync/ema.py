"""A copy of the student that follows it slowly, fed by the weights on their way to the engine."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from opd.interfaces import Weights, WeightSync

FILE = "averaged_teacher.safetensors"


class EMAWeights:
    """``module``'s weights become decay * themselves + (1 - decay) * what is pushed, once a version.

    ``version`` is the last one taken in; ``moved`` is called when the weights have changed. decay 0 follows at once. The first push is of weights that
    the module already has, and the same version twice counts once, so a resumed run goes on as if
    nothing had happened.
    """

    def __init__(self, module: torch.nn.Module, *, decay: float, moved: Callable[[], None]) -> None:
        self._parameters = dict(module.named_parameters())
        self._decay = decay
        self._moved = moved
        self.version = 0

    def passing(self, weights: Weights, version: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The same weights; each is taken in on its way."""
        fresh = version != self.version
        for name, tensor in weights:
            if fresh:
                with torch.no_grad():
                    own = self._parameters[name]
                    own.lerp_(tensor.to(own), 1.0 - self._decay)
            yield name, tensor
        self.version = version
        if fresh:
            self._moved()

    def save(self, folder: str) -> None:
        """The average, for ``load`` of a resumed run."""
        tensors = {name: p.detach().contiguous() for name, p in self._parameters.items()}
        save_file(tensors, Path(folder) / FILE, {"version": str(self.version)})

    def load(self, folder: str, version: int) -> None:
        """Undo of ``save``."""
        with torch.no_grad():
            for name, tensor in load_file(Path(folder) / FILE).items():
                self._parameters[name].copy_(tensor)
        self.version = version
        self._moved()


class EMASync:
    """A ``WeightSync`` on whose way the weights pass an average."""

    def __init__(self, inner: WeightSync, average: EMAWeights) -> None:
        self._inner = inner
        self._average = average

    def push(self, weights: Weights, version: int) -> Mapping[str, float]:
        """See ``WeightSync``."""
        passing = self._average.passing(weights, version)
        metrics = self._inner.push(passing, version)
        for _ in passing:  # the rest, where the engine wants none
            pass
        return metrics
