"""Hypothesis strategies that damage files: bytes of any, and values of JSON documents."""

import copy
import json
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 1e308, 2**70, "", "x", "../../x", "\x1b[31m", "null", [], {}, [1],
    [None], {"a": 1}, {"": {}}, [[[]]], float("nan"), float("inf"), "9" * 5000,
)  # fmt: skip


def damaged(content: bytes) -> SearchStrategy[bytes]:
    """``content`` with a byte flipped, a part cut out, doubled or overwritten, or cut short."""
    place = st.integers(0, max(0, len(content) - 1))

    def flip(at: int, bit: int) -> bytes:
        return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]

    def cut(at: int, size: int) -> bytes:
        return content[:at] + content[at + size :]

    def double(at: int, size: int) -> bytes:
        return content[: at + size] + content[at:]

    def overwrite(at: int, noise: bytes) -> bytes:
        return content[:at] + noise + content[at + len(noise) :]

    # damage in the first bytes, which are the header of most formats, is tried as often as elsewhere
    somewhere = place | st.integers(0, min(len(content) - 1, 300))
    return st.one_of(
        st.builds(flip, somewhere, st.integers(0, 7)),
        st.builds(cut, somewhere, st.integers(1, 64)),
        st.builds(double, somewhere, st.integers(1, 64)),
        st.builds(overwrite, somewhere, st.binary(min_size=1, max_size=16)),
        place.map(lambda at: content[:at]),
        st.binary(max_size=64),
    )


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    match value:
        case dict():
            children = list(value.items())
        case list():
            children = list(enumerate(value))
        case _:
            return found
    return found + [place for key, child in children for place in _places(child, (*path, key))]


def reshaped(document: Any) -> SearchStrategy[Any]:
    """``document`` with one of its values replaced or removed, or something else altogether."""

    def change(path: tuple[Any, ...], value: Any, remove: bool) -> Any:
        made = copy.deepcopy(document)
        parent = made
        for key in path[:-1]:
            parent = parent[key]
        if remove:
            del parent[path[-1]]
        else:
            parent[path[-1]] = value
        return made

    hostile = st.sampled_from(HOSTILE)
    return st.builds(change, st.sampled_from(_places(document)), hostile, st.booleans()) | hostile


def reshaped_metadata(content: bytes) -> SearchStrategy[bytes]:
    """A safetensors file whose metadata, JSON in texts included, has one other value."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    about = header["__metadata__"]
    inner = {key: json.loads(v) for key, v in about.items() if v.startswith(("{", "["))}

    def rebuild(changed: Any) -> bytes:
        texts = changed
        if isinstance(changed, dict):
            texts = {
                key: json.dumps(v) if key in inner and not isinstance(v, str) else v
                for key, v in changed.items()
            }
        raw = json.dumps(header | {"__metadata__": texts}).encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw + content[8 + size :]

    return reshaped(about | inner).map(rebuild)
