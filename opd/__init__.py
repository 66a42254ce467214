"""On-policy distillation of language models.

    run = opd.train("quickstart", "loss=jsd")     a student learns from a teacher; returns a Run
    run = opd.Run("runs/quickstart")              its config, metrics, samples, checkpoints, final model
    opd.evaluate("quickstart", model=run.final)   accuracy on the recipe's held-out prompts
    opd.analyze(base, trained)                    what training changed in the weights
    opd.Mask.discover(base, rule="near_zero", density=0.1)
    opd.load_recipe("quickstart", "optim=sgd")    a recipe with its overrides, typed

Names are loaded when they are used: importing opd needs no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.mask.mask import Mask
    from opd.run.analyze import analyze
    from opd.run.evaluate import evaluate
    from opd.run.recipe import load_recipe
    from opd.run.results import Run
    from opd.run.train import train, train_all

__version__ = "0.1.0"
__all__ = ["Mask", "Run", "analyze", "evaluate", "load_recipe", "train", "train_all"]

_HOMES = {
    "Mask": "opd.mask.mask",
    "Run": "opd.run.results",
    "analyze": "opd.run.analyze",
    "evaluate": "opd.run.evaluate",
    "load_recipe": "opd.run.recipe",
    "train": "opd.run.train",
    "train_all": "opd.run.train",
}
_VERBS = ("train", "evaluate")
"""Functions that share their name with a package: ``opd.train(...)`` and ``opd.train.learner``."""


class _CallablePackage(ModuleType):
    """A package that is called as the function of its name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        verb = self.__name__.rpartition(".")[2]
        return getattr(import_module(_HOMES[verb]), verb)(*arguments, **options)


class _Package(ModuleType):
    """This package; it makes the packages of ``_VERBS`` callable as they are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and type(value) is ModuleType:
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _VERBS:
            return import_module(f"opd.{name}")
        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        raise AttributeError(f"module 'opd' has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
