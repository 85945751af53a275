import json
import pathlib

import numpy as np
import pytest
import tokenizers
from golden.cases import CASES, load

_HERE = pathlib.Path(__file__).resolve().parent


def test_every_committed_case_is_listed():
    assert sorted(CASES) == sorted(path.parent.name for path in _HERE.glob("*/golden.npz"))


def test_an_unknown_case_is_refused_by_name():
    with pytest.raises(ValueError, match="no golden case 'llama9'; there are llama, llama3"):
        load("llama9")


@pytest.mark.parametrize("name", CASES)
def test_a_case_stays_small(name):
    assert sum(path.stat().st_size for path in (_HERE / name).iterdir()) < 300_000


@pytest.mark.parametrize("name", CASES)
def test_prompts_tokens_and_margins_belong_together(name):
    case = load(name)
    vocab_size = json.loads((case.path / "config.json").read_text())["vocab_size"]
    assert [len(prompt) for prompt in case.prompts] == [1, 2, 5, 9, 13, 17, 23, 31, 37, 47, 59, 70]
    assert case.tokens.shape == case.margins.shape == (12, 48)
    assert max(max(prompt) for prompt in case.prompts) < vocab_size
    assert 0 <= case.tokens.min() <= case.tokens.max() < vocab_size
    assert case.margins.min() >= 1e-3
    assert min(len(set(row)) for row in case.tokens.tolist()) >= 8


@pytest.mark.parametrize("name", CASES)
def test_the_last_logits_of_a_prompt_choose_its_first_token(name):
    case = load(name)
    assert sorted(case.logits) == [0, 4, 10]
    for row, logits in case.logits.items():
        assert logits.dtype == np.float32
        assert len(logits) == len(case.prompts[row])
        second, first = np.sort(logits[-1])[-2:]
        assert logits[-1].argmax() == case.tokens[row, 0]
        assert first - second == case.margins[row, 0]


@pytest.mark.parametrize("name", CASES)
def test_a_conversation_renders_or_raises_and_one_of_a_case_raises(name):
    chat = load(name).chat
    raised = [row["error"] for row in chat if "error" in row]
    assert raised
    assert all(raised)
    tokenizer = tokenizers.Tokenizer.from_file(str(load(name).path / "tokenizer.json"))
    for row in chat:
        if "error" not in row:
            assert (
                tokenizer.encode(row["rendered"], add_special_tokens=False).ids == row["token_ids"]
            )


@pytest.mark.parametrize("name", CASES)
def test_the_tokenizer_file_alone_gives_the_committed_text_rows(name):
    case = load(name)
    tokenizer = tokenizers.Tokenizer.from_file(str(case.path / "tokenizer.json"))
    for row in case.texts:
        assert tokenizer.encode(row["text"]).ids == row["token_ids"]
        assert tokenizer.decode(row["token_ids"]) == row["decoded"]
        assert (
            tokenizer.decode(row["token_ids"], skip_special_tokens=False)
            == row["decoded_with_special"]
        )
        # A metaspace tokenizer takes a space in front of the text for the one it would add.
        lost = " " if name == "mistral" else ""
        assert row["decoded"] == row["text"].removeprefix(lost)
