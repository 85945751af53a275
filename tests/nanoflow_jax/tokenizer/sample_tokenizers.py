"""Small tokenizers of every kind we serve, built by hand."""

from collections.abc import Callable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from nanoflow_jax.tokenizer.tokenizer import Tokenizer

_SPACE = "\u2581"


def byte_level() -> tokenizers.Tokenizer:
    """As Llama 3 and Qwen: tokens are bytes; some added tokens are not spelled in bytes."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    # The last two merges are parts of characters: the first half of é, two bytes of an emoji.
    pairs = ["h e", "l l", "he ll", "hell o", "\u0120 hello", "\u0120 \u0120", "\u00c3 \u00a9"]
    merges = [tuple(pair.split(" ")) for pair in [*pairs, "\u00f0 \u0141"]]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|a b \u00e9|>"])
    backend.add_tokens(["\u00e9", "\u65e5\u672c", "x y"])
    _add_bos(backend)
    return backend


def llama() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral: one leading space is not text."""
    backend = _sentencepiece()
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    backend.decoder = decoders.Sequence([*_byte_fallback(), decoders.Strip(" ", 1, 0)])
    return backend


def gemma() -> tokenizers.Tokenizer:
    """As Gemma: a leading space is text."""
    backend = _sentencepiece()
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence(_byte_fallback())
    return backend


def metaspace() -> tokenizers.Tokenizer:
    """Byte fallback before the metaspace, which drops the marks of the first token."""
    backend = _sentencepiece()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return backend


def metaspace_never() -> tokenizers.Tokenizer:
    """Nothing was put in front, so nothing is dropped."""
    backend = _sentencepiece()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return backend


def strip_each() -> tokenizers.Tokenizer:
    """Strips every token, two spaces at most."""
    backend = _sentencepiece()
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.Strip(" ", 2, 0)])
    return backend


def words() -> tokenizers.Tokenizer:
    """No decoder: words with spaces between."""
    names = ["<unk>", *(f"w{i}" for i in range(20))]
    backend = tokenizers.Tokenizer(
        models.WordLevel(vocab={name: i for i, name in enumerate(names)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    make.__name__: make
    for make in (byte_level, llama, gemma, metaspace, metaspace_never, strip_each, words)
}


def sample(kind: str) -> Tokenizer:
    """The tokenizer of a kind, with its BOS and EOS named."""
    return Tokenizer(KINDS[kind](), named={"bos_token": "<s>", "eos_token": "</s>"})


def _byte_fallback() -> list[object]:
    return [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]


def _sentencepiece() -> tokenizers.Tokenizer:
    vocab = {"<unk>": 0}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for character in _SPACE + "helo wd\u00e9\u65e5":
        vocab.setdefault(character, len(vocab))
    pairs = ["h e", "l l", "he ll", "hell o", f"{_SPACE} hello", f"{_SPACE} {_SPACE}"]
    merges = [tuple(pair.split(" ")) for pair in pairs]
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([f"{_SPACE}foo bar"])
    _add_bos(backend)
    return backend


def _add_bos(backend: tokenizers.Tokenizer) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0",
        pair="<s>:0 $A:0 $B:0",
        special_tokens=[("<s>", backend.token_to_id("<s>"))],
    )
