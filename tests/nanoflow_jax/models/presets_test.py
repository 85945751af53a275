import re

import pytest

from nanoflow_jax.models import huggingface, presets


def test_every_preset_is_a_model_that_we_support():
    assert "llama-3-8b" in presets.names()
    for name in presets.names():
        config = huggingface.read_config(presets.load(name))
        assert config.num_layers > 0


def test_an_unknown_preset_is_refused_with_the_known_names():
    message = f"preset:gpt-2 is unknown; presets are {', '.join(presets.names())}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        presets.load("gpt-2")


@pytest.mark.parametrize("name", ["../presets", "llama-3-8b.json", ""])
def test_a_preset_name_is_no_path(name):
    with pytest.raises(ValueError, match="is unknown"):
        presets.load(name)


def test_a_preset_is_meant_with_its_prefix_or_without():
    assert presets.try_find("llama-3-8b") == presets.try_find("preset:llama-3-8b") == "llama-3-8b"
    assert presets.try_find("meta-llama/Meta-Llama-3-8B") is None
