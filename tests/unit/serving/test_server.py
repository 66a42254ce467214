"""What a server refuses before it loads a model, and how it words what it could not do."""

from pathlib import Path

import pytest
from fastapi import FastAPI

from opd.assembly.teacher_server import build_backend
from opd.config.serving import ServingConfig
from opd.config.teacher import TeacherBackend, TeacherServerConfig
from opd.serving.app import failure
from opd.serving.server import serve


def loading() -> FastAPI:
    raise AssertionError("refused before anything is loaded")


@pytest.mark.parametrize("token", ["a b", "line\n", "clé"])
def test_a_token_that_no_header_can_carry_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match=r"^OPD_TEACHER_TOKEN has a blank"):
        serve(loading, ServingConfig(), token=token, variable="OPD_TEACHER_TOKEN")


@pytest.mark.parametrize("folder", ["missing", "missing/deeper", "file"])
def test_a_port_file_in_no_folder_is_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = ServingConfig(port_file=str(tmp_path / folder / "port"))
    with pytest.raises(ValueError, match=r"port_file=.*there is no folder"):
        serve(loading, config, token=None, variable="OPD_TEACHER_TOKEN")


@pytest.mark.parametrize("backend", TeacherBackend)
@pytest.mark.parametrize("model", ["/no/such/model", "no-such-folder/with/parts", ""])
def test_a_model_that_cannot_be_read_is_one_sentence(backend: TeacherBackend, model: str) -> None:
    with pytest.raises(ValueError, match=f"^model={model} cannot be read") as raised:
        build_backend(TeacherServerConfig(model=model, backend=backend))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("lm_head"), "KeyError: 'lm_head'"),
        (AssertionError(), "AssertionError: "),
        (RuntimeError("CUDA error:\n  device-side assert\n"), "CUDA error: device-side assert"),
    ],
)
def test_a_failure_is_one_line_that_names_the_error(error: Exception, words: str) -> None:
    response = failure("scoring", error)
    text = bytes(response.body).decode()
    assert response.status_code == 500
    assert text.startswith("scoring failed: ")
    assert words in text
    assert "\n" not in text
