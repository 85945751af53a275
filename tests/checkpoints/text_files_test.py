import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoints import orbax_store, safetensors_store, text_files
from checkpoints.errors import CheckpointError
from checkpoints.folder import ModelFolder

Make = Callable[..., Path]
_TOOLS = "additional_chat_templates/tool_use.jinja"


@pytest.fixture
def source(make_model: Make) -> Path:
    folder = make_model({"a": np.arange(6.0)})
    (folder / _TOOLS).parent.mkdir()
    (folder / _TOOLS).write_text("{{ tools }}")
    (folder / "additional_chat_templates" / "notes.txt").write_text("no template")
    return folder


def test_templates_with_names_are_copied_to_orbax_and_back(source: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "orbax", tmp_path / "back"
    orbax_store.convert(ModelFolder.open(source), there)
    safetensors_store.convert(ModelFolder.open(there), back)
    for made in (there, back):
        assert text_files.present(made) == text_files.present(source)
        assert (made / _TOOLS).read_text() == "{{ tools }}"
    assert text_files.present(source)[-1] == _TOOLS
    orbax_store.verify(there)
    safetensors_store.verify(ModelFolder.open(there), back)


def test_verify_finds_a_changed_template_that_has_a_name(source: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "orbax", tmp_path / "back"
    orbax_store.convert(ModelFolder.open(source), there)
    safetensors_store.convert(ModelFolder.open(there), back)
    (back / _TOOLS).write_text("other")
    with pytest.raises(CheckpointError, match=r"tool_use\.jinja: differs from"):
        safetensors_store.verify(ModelFolder.open(there), back)
    (there / _TOOLS).write_text("other")
    with pytest.raises(CheckpointError, match=r"tool_use\.jinja: sha256 was .* convert again"):
        orbax_store.verify(there)


@pytest.mark.parametrize("name", ["../x", f"{text_files.TEMPLATES}/../../x", "more/x", ""])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(
    name: str, source: Path, tmp_path: Path
) -> None:
    orbax_store.convert(ModelFolder.open(source), tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    fields = json.loads(path.read_bytes())
    fields["text_sha256"][name] = "0" * 64
    path.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="a copied file must be a plain file name"):
        ModelFolder.open(tmp_path / "out")
