import json
from pathlib import Path

import hypothesis
import pytest
import tokenizers
from golden import cases
from hypothesis import strategies as st
from sample_tokenizers import KINDS, byte_level, sample

from nanoflow_jax.tokenizer.tokenizer import Tokenizer

_BYTE_LEVEL = sample("byte_level")
_CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}


def _save(folder: Path, backend: tokenizers.Tokenizer, config: object = None) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    text = json.dumps(_CONFIG if config is None else config)
    (folder / "tokenizer_config.json").write_text(text)
    return folder


def test_a_folder_gives_ids_names_and_sizes(tmp_path):
    tokenizer = Tokenizer.load(_save(tmp_path, byte_level()))
    # Of six added tokens one is spelled as a byte is, and shares its id.
    assert tokenizer.vocab_size == 256 + 8 + 5
    assert tokenizer.bos_id == 264
    assert tokenizer.eos_id == 265
    assert tokenizer.special_ids == {264, 265, 266}
    assert tokenizer.id_to_token(264) == "<s>"
    assert tokenizer.token_to_id("</s>") == 265
    assert tokenizer.id_to_token(269) is None
    assert tokenizer.encode("hello hello") == [264, 259, 260]
    assert tokenizer.encode("hello hello", add_special_tokens=False) == [259, 260]
    assert tokenizer.decode([264, 259, 260]) == "hello hello"
    assert tokenizer.decode([264, 259], skip_special_tokens=False) == "<s>hello"


def test_without_config_there_is_no_bos_and_no_eos(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)


def test_special_tokens_map_names_tokens_that_the_config_leaves_out(tmp_path):
    _save(tmp_path, byte_level(), {"eos_token": "</s>"})
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "x y"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (264, 265)


def test_a_null_in_the_config_takes_a_name_away(tmp_path):
    _save(tmp_path, byte_level(), {"bos_token": None, "eos_token": "</s>"})
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    assert Tokenizer.load(tmp_path).bos_id is None


def test_tokens_that_only_the_config_knows_are_added(tmp_path):
    listed = {"269": {"content": "<tool>", "special": False}, "265": {"content": "</s>"}}
    config = {"added_tokens_decoder": listed, "eos_token": "<end>"}
    tokenizer = Tokenizer.load(_save(tmp_path, byte_level(), config))
    assert tokenizer.encode("<tool><end>", add_special_tokens=False) == [269, 270]
    assert tokenizer.eos_id == 270
    assert tokenizer.decode([269, 270]) == "<tool>"


def test_a_named_token_that_was_an_ordinary_piece_becomes_special(tmp_path):
    tokenizer = Tokenizer.load(_save(tmp_path, byte_level(), {"eos_token": "hello"}))
    assert tokenizer.eos_id == 259
    assert tokenizer.decode([259, 0]) == "!"


def test_truncation_and_padding_left_from_training_are_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=12)
    tokenizer = Tokenizer.load(_save(tmp_path, backend))
    assert len(tokenizer.encode("!!!!!!")) == 7


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma", "metaspace"])
def test_bos_is_never_doubled(kind):
    tokenizer = sample(kind)
    assert tokenizer.encode("hello").count(tokenizer.bos_id) == 1
    assert tokenizer.encode("<s>hello")[0] == tokenizer.bos_id
    assert tokenizer.encode("<s>hello").count(tokenizer.bos_id) == 1
    assert tokenizer.encode("<s>hello", add_special_tokens=False).count(tokenizer.bos_id) == 1
    # A second one that the text itself holds is the caller's wish.
    assert tokenizer.encode("<s><s>hello").count(tokenizer.bos_id) == 2
    assert tokenizer.encode("").count(tokenizer.bos_id) == 1


def test_a_tokenizer_that_adds_no_bos_keeps_what_the_text_says():
    tokenizer = sample("words")
    assert tokenizer.encode("<s> <s> w1") == [tokenizer.bos_id, tokenizer.bos_id, 2]


@hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis.settings(max_examples=100)
def test_byte_level_text_comes_back_whole(text):
    hypothesis.assume("\u00e9" not in text)  # decoding that added token alone is lossy
    tokenizer = _BYTE_LEVEL
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_beyond_the_vocabulary_decode_to_nothing(kind):
    tokenizer = sample(kind)
    assert tokenizer.decode([tokenizer.vocab_size + 5, 3]) == tokenizer.decode([3])


@pytest.mark.parametrize("case", cases.CASES)
def test_texts_encode_and_decode_as_in_transformers(case):
    golden = cases.load(case)
    tokenizer = Tokenizer.load(golden.path)
    assert golden.texts
    for row in golden.texts:
        assert tokenizer.encode(row["text"]) == row["token_ids"]
        assert tokenizer.decode(row["token_ids"]) == row["decoded"]
        kept = tokenizer.decode(row["token_ids"], skip_special_tokens=False)
        assert kept == row["decoded_with_special"]


def test_a_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        sample("byte_level").encode("ab\ud800")


def test_a_folder_without_tokenizer_says_how_to_get_one(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; download it with the model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"model": {"type": "What"}}', '{"version": 3}', "null"]
)
def test_a_garbage_tokenizer_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"is not a tokenizer that tokenizers .* can read"):
        Tokenizer.load(tmp_path)


def test_a_binary_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        Tokenizer.load(tmp_path)


def test_an_empty_vocabulary_is_refused(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="has an empty vocabulary"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list, not an object"),
        ('{"added_tokens_decoder": 3}', "added_tokens_decoder in .* is not an object.* 3;"),
        ('{"added_tokens_decoder": {"x": {"content": "a"}}}', "added_tokens_decoder in .*'x'"),
        ('{"added_tokens_decoder": {"1": {}}}', "added_tokens_decoder in .*'1'"),
    ],
)
def test_a_garbage_config_is_refused(tmp_path, text, message):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_the_tokenizer_of_another_model_does_not_fit():
    tokenizer = sample("byte_level")
    tokenizer.check_fits(269)
    tokenizer.check_fits(300)
    with pytest.raises(ValueError, match=r"ids up to 268 \('x y'\).* has 268 entries.*put the mod"):
        tokenizer.check_fits(268)
