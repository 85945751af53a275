import pathlib
import shutil

import batch_runs

from nanoflow_jax import config
from nanoflow_jax.batch import fingerprint
from nanoflow_jax.engine import model_source


def test_a_template_that_has_a_name_is_part_of_the_model(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(batch_runs.FOLDER, folder)
    section = config.ModelSection(model=str(folder))
    found = [fingerprint.of_model(section, model_source.open_model(section))]
    (folder / "additional_chat_templates").mkdir()
    for text in ("{{ tools }}", "other"):
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(text)
        found.append(fingerprint.of_model(section, model_source.open_model(section)))
    assert len({identity.tokenizer for identity in found}) == 3
    assert len({identity.model for identity in found}) == 1
