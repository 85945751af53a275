"""The model folder that ships with the project is whole, small and ours."""

import json
import pathlib

import numpy as np
import tokenizers

import checkpoints
from checkpoints import safetensors_file
from nanoflow_jax.models import huggingface, weight_map
from nanoflow_jax.train_embedded import settings, tokenizer_training

_FOLDER = pathlib.Path(checkpoints.__file__).parent / "embedded"
_NAMES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def _json(name: str) -> dict[str, object]:
    return json.loads((_FOLDER / name).read_text())


def test_the_folder_is_whole_and_small() -> None:
    assert {p.name for p in _FOLDER.iterdir()} == _NAMES
    assert sum(p.stat().st_size for p in _FOLDER.iterdir()) < 25e6


def test_its_config_is_accepted_and_has_the_default_sizes() -> None:
    config = huggingface.read_config(_json("config.json"))
    assert 3e6 < config.num_parameters < 10e6
    assert config == settings.Settings().model_config()


def test_its_weights_are_complete_bfloat16_and_finite() -> None:
    config = huggingface.read_config(_json("config.json"))
    file = safetensors_file.SafetensorsFile(_FOLDER / "model.safetensors")
    shapes = {name: info.shape for name, info in file.tensors.items()}
    weight_map.check_complete(
        shapes, huggingface.weights_of(config), tied_embeddings=config.tied_embeddings
    )
    assert {str(info.dtype) for info in file.tensors.values()} == {"bfloat16"}
    assert all(np.isfinite(file.view(n).astype(np.float32)).all() for n in file.tensors)


def test_its_tokenizer_has_the_special_tokens_and_the_models_vocabulary() -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(_FOLDER / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == _json("config.json")["vocab_size"]
    ids = [tokenizer.token_to_id(t) for t in tokenizer_training.SPECIAL_TOKENS]
    assert ids == list(range(len(ids)))
    ends = [tokenizer.token_to_id(t) for t in ("<|eos|>", "<|end|>")]
    assert _json("generation_config.json")["eos_token_id"] == ends
    assert _json("tokenizer_config.json")["chat_template"] == tokenizer_training.CHAT_TEMPLATE


def test_its_card_names_data_licence_and_loss_but_no_machine() -> None:
    card = (_FOLDER / "README.md").read_text()
    for wanted in ("PSF License Agreement", "## Validation loss", "bits per byte", "## Limits"):
        assert wanted in card
    assert "/home/" not in card
    assert "/tmp/" not in card
