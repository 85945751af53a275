import hypothesis
import pytest
from golden import cases
from hypothesis import strategies as st
from sample_tokenizers import KINDS, byte_level, sample
from tokenizers import Regex, decoders

from nanoflow_jax.tokenizer.detokenizer import Detokenizer
from nanoflow_jax.tokenizer.tokenizer import Tokenizer

_SAMPLES = {kind: sample(kind) for kind in KINDS}


def _stream(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(data=st.data(), skip=st.booleans())
@hypothesis.settings(max_examples=80)
def test_pieces_put_together_are_the_decoded_whole(kind, data, skip):
    tokenizer = _SAMPLES[kind]
    # A few ids beyond the vocabulary too: a model's is padded.
    some = st.integers(0, tokenizer.vocab_size + 2)
    # Random ids are rarely characters, so text and its bytes are mixed in.
    text = st.text("hel o\u00e9\u65e5\U0001f600\u2581\ufffd\n").map(
        lambda t: tokenizer.encode(t, add_special_tokens=False)
    )
    special = st.sampled_from(sorted(tokenizer.special_ids))
    parts = data.draw(
        st.lists(st.one_of(st.lists(some, max_size=6), text, special.map(lambda i: [i])))
    )
    ids = [token_id for part in parts for token_id in part]
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(_stream(tokenizer, ids, skip_special_tokens=skip)) == whole


@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace"])
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=80)
def test_bytes_of_any_kind_stream_as_they_decode(kind, data):
    tokenizer = _SAMPLES[kind]
    # Leading, continuing and impossible bytes, which random ids seldom bring together.
    interesting = [
        0x41,
        0x80,
        0x9F,
        0xA0,
        0xBF,
        0xC2,
        0xC3,
        0xE0,
        0xE2,
        0xED,
        0xEF,
        0xF0,
        0xF4,
        0xFF,
    ]
    drawn = data.draw(st.lists(st.sampled_from(interesting), max_size=12))
    ids = [_byte_id(tokenizer, byte) for byte in drawn]
    assert "".join(_stream(tokenizer, ids)) == tokenizer.decode(ids)


def _byte_id(tokenizer: Tokenizer, byte: int) -> int:
    token_id = tokenizer.token_to_id(f"<0x{byte:02X}>")
    if token_id is not None:
        return token_id
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    token_id = tokenizer.token_to_id(chr(byte if byte in printable else 256 + others.index(byte)))
    assert token_id is not None
    return token_id


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma", "metaspace"])
@hypothesis.given(text=st.text("ab \u00e9\u65e5\U0001f600\u0301", max_size=20))
def test_valid_text_never_shows_a_replacement_character(kind, text):
    tokenizer = _SAMPLES[kind]
    ids = [_byte_id(tokenizer, byte) for byte in text.encode()]
    assert not any("\ufffd" in piece for piece in _stream(tokenizer, ids))


def test_a_character_in_four_tokens_comes_with_the_last():
    tokenizer = _SAMPLES["byte_level"]
    ids = [_byte_id(tokenizer, byte) for byte in "a\U0001f600b".encode()]
    assert _stream(tokenizer, ids) == ["a", "", "", "", "\U0001f600", "b", ""]


def test_byte_fallback_text_comes_with_the_next_ordinary_token():
    tokenizer = _SAMPLES["gemma"]
    ids = [_byte_id(tokenizer, byte) for byte in "\u00fc".encode()] + [tokenizer.token_to_id("h")]
    assert _stream(tokenizer, ids) == ["", "", "\u00fch", ""]


def test_one_bad_byte_makes_its_whole_run_replacement_characters():
    tokenizer = _SAMPLES["gemma"]
    ids = [_byte_id(tokenizer, byte) for byte in (*"\u00fc".encode(), 0xFF, 0x41)]
    assert _stream(tokenizer, ids) == ["", "", "\ufffd" * 3, "\ufffd", ""]


def test_half_a_character_at_the_end_is_a_replacement_character():
    for kind, expected in (("byte_level", "\ufffd"), ("llama", "\ufffd\ufffd")):
        tokenizer = _SAMPLES[kind]
        ids = [_byte_id(tokenizer, byte) for byte in (0xE2, 0x82)]
        assert _stream(tokenizer, ids) == ["", "", expected]


def test_only_the_leading_space_of_the_whole_text_is_stripped():
    tokenizer = _SAMPLES["llama"]
    space, hello = tokenizer.token_to_id("\u2581"), tokenizer.token_to_id("\u2581hello")
    assert _stream(tokenizer, [hello, hello]) == ["hello", " hello", ""]
    assert _stream(tokenizer, [space, hello]) == ["", " hello", ""]
    assert _stream(tokenizer, [tokenizer.bos_id, hello]) == ["", "hello", ""]
    assert _stream(tokenizer, [tokenizer.bos_id, hello], skip_special_tokens=False) == [
        "<s>",
        " hello",
        "",
    ]


def test_a_long_run_of_invalid_bytes_is_not_held_back():
    detokenizer = Detokenizer(_SAMPLES["byte_level"])
    token_id = _byte_id(_SAMPLES["byte_level"], 0xFF)
    assert [detokenizer.push(token_id) for _ in range(3)] == ["\ufffd"] * 3


@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace"])
def test_text_lags_by_one_character_at_most_however_long_it_is(kind):
    tokenizer = _SAMPLES[kind]
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("hello \u65e5\u00fc o" * 50, add_special_tokens=False)
    shown = ""
    for count, token_id in enumerate(ids, start=1):
        shown += detokenizer.push(token_id)
        certain = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        assert certain.startswith(shown)
        assert len(certain) - len(shown) <= 1


@pytest.mark.parametrize("case", cases.CASES)
def test_golden_texts_stream_as_transformers_decodes_them(case):
    golden = cases.load(case)
    tokenizer = Tokenizer.load(golden.path)
    for row in golden.texts:
        ids = row["token_ids"]
        assert "".join(_stream(tokenizer, ids)) == row["decoded"]
        kept = _stream(tokenizer, ids, skip_special_tokens=False)
        assert "".join(kept) == row["decoded_with_special"]


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Strip(" ", 0, 1),
        decoders.Replace(Regex("a+"), "b"),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]),
        decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]),
        decoders.Sequence([decoders.Fuse(), decoders.Metaspace()]),
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_refused(decoder):
    backend = byte_level()
    backend.decoder = decoder
    with pytest.raises(ValueError, match="whose text cannot be streamed; supported are ByteLevel"):
        Detokenizer(Tokenizer(backend, named={}))
