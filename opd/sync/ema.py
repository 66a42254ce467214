"""An exponential moving average of the student, fed by the weights on their way to the engine."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from opd.interfaces import Weights, WeightSync

FILE = "averaged_teacher.safetensors"


class EMAWeights:
    """Sets a module's ``tensors`` to decay * themselves + (1 - decay) * those pushed, once per version.

    ``moved`` is called when the weights have changed; ``version`` is the last one averaged in. With
    decay 0 the module equals the student. The first push holds weights that the module already has,
    and a version pushed twice counts once, so that a resumed run continues as an uninterrupted one.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], *, decay: float, moved: Callable[[], None]
    ) -> None:
        self._tensors = tensors
        self._decay = decay
        self._moved = moved
        self.version = 0

    def averaging(self, weights: Weights, version: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The same weights; each is averaged in as it is read."""
        is_new = version != self.version
        for name, tensor in weights:
            if is_new:
                with torch.no_grad():
                    own = self._tensors[name]
                    own.lerp_(tensor.to(own), 1.0 - self._decay)
            yield name, tensor
        self.version = version
        if is_new:
            self._moved()

    def save(self, folder: str) -> None:
        """Write the average, for ``load`` of a resumed run."""
        tensors = {name: p.detach().clone() for name, p in self._tensors.items()}
        save_file(tensors, Path(folder) / FILE, {"version": str(self.version)})

    def load(self, folder: str, version: int) -> None:
        """Inverse of ``save``."""
        with torch.no_grad():
            for name, tensor in load_file(Path(folder) / FILE).items():
                self._tensors[name].copy_(tensor)
        self.version = version
        self._moved()


class EMASync:
    """A ``WeightSync`` that averages the weights before it pushes them to ``inner``."""

    def __init__(self, inner: WeightSync, average: EMAWeights) -> None:
        self._inner = inner
        self._average = average

    def push(self, weights: Weights, version: int) -> Mapping[str, float]:
        """See ``WeightSync``."""
        stream = self._average.averaging(weights, version)
        metrics = self._inner.push(stream, version)
        for _ in stream:  # the rest, where the engine reads none
            pass
        return metrics
