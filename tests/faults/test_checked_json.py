"""JSON of the wrong shape is one sentence with its source and its field."""

from dataclasses import dataclass, field

import pytest

from opd.checked_json import TensorShape, read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    step: int
    files: dict[str, int]
    shape: TensorShape = ()
    tags: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "the content is not JSON"),
        (b"\xff", "the content is not JSON"),
        ("[" * 100_000, "the content is not JSON"),
        ("9" * 9999, "the content is not JSON"),
        ("[]", "the content should be an object, found []"),
        ("null", "the content should be an object, found None"),
        ('{"step": 1}', "field 'files' is missing"),
        ('{"step": true, "files": {}}', "field 'step' should be a valid integer, found True"),
        ('{"step": "1", "files": {}}', "field 'step' should be a valid integer, found '1'"),
        ('{"step": 1, "files": {"a": null}}', "field 'files.a' should be a valid integer"),
        ('{"step": 1, "files": [1]}', "field 'files' should be an object, found [1]"),
        ('{"step": 1, "files": {}, "shape": [-1]}', "field 'shape.0' should be greater than"),
        ('{"step": 1, "files": {}, "shape": [4294967296, 4294967296]}', "field 'shape' should be"),
        ('{"step": 1, "files": {}, "tags": ["a", 2]}', "field 'tags.1' should be a valid string"),
    ],
)
def test_source_and_field_are_named(content: str | bytes, words: str) -> None:
    with pytest.raises(ValueError) as error:
        read_json(content, Manifest, "runs/x/manifest.json", "delete it")
    message = str(error.value)
    assert message.startswith(f"runs/x/manifest.json: {words}")
    assert message.endswith("; delete it")
    assert "\n" not in message
    assert len(message) < 250


def test_what_has_the_shape_is_read() -> None:
    content = '{"step": 1, "files": {"a": 2}, "shape": [3, 4], "unknown": {}}'
    assert read_json(content, Manifest, "f", "r") == Manifest(step=1, files={"a": 2}, shape=(3, 4))
