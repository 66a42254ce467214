"""How a reward function of the user's own is called: by names, for each completion or for all, awaited."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

NAMES = ("completion", "answer", "prompt", "row")
"""Parameters that a function may have, of one completion; of all completions of a step, the plural."""
PLURALS = {"completions": "completion", "answers": "answer", "prompts": "prompt", "rows": "row"}

Arguments = tuple[str, dict[str, Any]]
"""The uid of a completion's prompt, and the arguments by the names of ``NAMES``."""
Call = Callable[[Sequence[Arguments]], list[Any]]


def called(function: Callable[..., Any], setting: str) -> Call:
    """A function from the arguments of completions to what ``function`` returns for each of them.

    It is called by the names of its parameters: those of ``NAMES`` for each completion, those of ``PLURALS``
    once for all of them; with ``**others`` it gets all. Two parameters of other names are the completion and
    the answer. Where it is async, the calls of a step run at the same time. ValueError for parameters that
    cannot be filled, and, with the prompt, for what the function raises.
    """
    names = _names(function, setting)
    if names is not None and names[0] in PLURALS:
        return _of_all(function, names, setting)
    return _of_each(function, names, setting)


def _names(function: Callable[..., Any], setting: str) -> tuple[str, ...] | None:
    """The names by which it is called; None for a call with completion and answer in this order."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # functions in C do not show their parameters
        return None
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    for allowed in (tuple(PLURALS), NAMES):
        known = tuple(name for name in allowed if name in named)
        if known and all(p.name in allowed and p.kind != p.POSITIONAL_ONLY for p in required):
            takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
            return allowed if takes_all else known
    try:
        inspect.signature(function).bind("", "")
    except TypeError:
        raise ValueError(
            f"{setting} has the parameters ({', '.join(p.name for p in parameters)}): allowed are some of "
            f"{', '.join(NAMES)}, or for all completions at once some of {', '.join(PLURALS)}"
        ) from None
    return None


def _of_each(function: Callable[..., Any], names: tuple[str, ...] | None, setting: str) -> Call:
    def one(arguments: dict[str, Any]) -> Any:
        if names is None:
            return function(arguments["completion"], arguments["answer"])
        return function(**{name: arguments[name] for name in names})

    def call(completed: Sequence[Arguments]) -> list[Any]:
        returned: list[Any] = []
        for uid, arguments in completed:
            try:
                returned.append(one(arguments))
            except Exception as error:  # the user's code may raise anything
                raise _failed(setting, error, uid) from error
        if not any(inspect.isawaitable(value) for value in returned):
            return returned
        results = asyncio.run(_gathered(returned))
        for (uid, _), result in zip(completed, results, strict=True):
            if isinstance(result, Exception):
                raise _failed(setting, result, uid) from result
        return results

    return call


def _of_all(function: Callable[..., Any], names: tuple[str, ...], setting: str) -> Call:
    def call(completed: Sequence[Arguments]) -> list[Any]:
        columns = {name: [a[PLURALS[name]] for _, a in completed] for name in names}
        try:
            returned = function(**columns)
            if inspect.isawaitable(returned):
                returned = asyncio.run(_awaited(returned))
            values = list(returned)
        except Exception as error:  # the user's code may raise anything
            raise _failed(setting, error) from error
        if len(values) != len(completed):
            raise ValueError(
                f"{setting} returned {len(values)} values for {len(completed)} completions: return one "
                "for each, in their order"
            )
        return values

    return call


async def _gathered(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """The results in order, or the exceptions; every call has ended."""
    return await asyncio.gather(*awaitables, return_exceptions=True)


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _failed(setting: str, error: BaseException, uid: str | None = None) -> ValueError:
    of_prompt = "" if uid is None else f"a completion of prompt {uid}: "
    return ValueError(
        f"{of_prompt}{setting} failed ({type(error).__name__}: {error}); correct the function"
    )
