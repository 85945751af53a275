"""Tiny tokenizers for the golden cases, trained on a few lines of text held here.

Two kinds exist, as in the families themselves: byte-level BPE (Llama 3, Qwen) and BPE over
characters with a metaspace and single-byte fallback tokens, as converted SentencePiece models
have it (Llama 2, Mistral, Gemma). Everything here is deterministic.
"""

import collections
import dataclasses
import itertools

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

# The families' special tokens, in the order of their ids.
SENTENCEPIECE = ("<unk>", "<s>", "</s>")
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
MISTRAL_SPECIAL = (
    *SENTENCEPIECE,
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN3_PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
QWEN3_PLAIN += ("<think>", "</think>")
GEMMA_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

_CORPUS = """\
The scheduler fills every step with the tokens of the requests that wait in the queue.
A page holds the keys and the values of sixteen tokens, and the table says where the pages are.
When the pages run out, the last request gives its pages back and is computed again later.
It isn't hard: we'll read the file, they've written it, you're done, I'm there, he'd say so.
def take(self, count: int) -> list[int]:
    if count > len(self.free): return []
    return [self.free.pop() for _ in range(count)]
{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}
Caf\u00e9, na\u00efve, \u00fcber, \u00e5ngstr\u00f6m; 1234567890 + 42 = what?
Yes! No... "quoted" & <tagged> #1 50% $3 ~x^2|y\\z`@*/
THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG;
the five boxing wizards jump quickly; Vex, Zip, Jack, Kim, Quinn.
"""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "\u2581"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """What a family's tokenizer looks like.

    Attributes:
        kind: "byte_level", "sentencepiece" (a space is put in front, Llama 2), "metaspace_first"
            (only in front of the first word, Mistral 0.3) or "gemma" (no space in front).
        special: Special tokens. Byte-level kinds have them after all others, the rest before.
        plain: Added tokens that are not special, after all others.
        vocab_size: Tokens in all, the added ones included.
        bos: The token that encoding puts in front, or None.
    """

    kind: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    vocab_size: int
    bos: str | None = None


def build(spec: TokenizerSpec) -> tokenizers.Tokenizer:
    """Train the tokenizer that the spec describes."""
    if spec.kind == "byte_level":
        tokenizer = _byte_level(spec)
    else:
        tokenizer = _byte_fallback(spec)
    if spec.plain:
        tokenizer.add_tokens([_added(token, special=False) for token in spec.plain])
    if spec.bos is not None:
        template = processors.TemplateProcessing(
            single=f"{spec.bos}:0 $A:0",
            pair=f"{spec.bos}:0 $A:0 {spec.bos}:1 $B:1",
            special_tokens=[(spec.bos, tokenizer.token_to_id(spec.bos))],
        )
        if spec.kind == "byte_level":
            template = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        tokenizer.post_processor = template
    if tokenizer.get_vocab_size() != spec.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, wanted {spec.vocab_size}"
        )
    return tokenizer


def _added(token: str, *, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, special=special, normalized=False)


def _byte_level(spec: TokenizerSpec) -> tokenizers.Tokenizer:
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = [word for word, _ in splitter.pre_tokenize_str(_CORPUS)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    wanted = spec.vocab_size - len(spec.special) - len(spec.plain) - len(alphabet)
    merges = _train(words, wanted)
    pieces = alphabet + [a + b for a, b in merges]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_added(token, special=True) for token in spec.special])
    return tokenizer


def _byte_fallback(spec: TokenizerSpec) -> tokenizers.Tokenizer:
    words = [_SPACE + word for word in _CORPUS.replace("\n", " \n ").split(" ")]
    # Rarer characters have no token of their own and go through their bytes.
    counts = collections.Counter("".join(words))
    alphabet = [_SPACE, *sorted(c for c, n in counts.items() if n > 2 and c.isalpha())]
    alphabet += [c for c in ".,:'\"" if c not in alphabet]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    fixed = [*spec.special, *byte_tokens]
    wanted = spec.vocab_size - len(fixed) - len(alphabet) - len(spec.plain)
    known = set(alphabet)
    merges = _train([word for word in words if known.issuperset(word)], wanted)
    pieces = fixed + [a + b for a, b in merges] + alphabet
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    decoder = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.kind == "sentencepiece":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
        decoder.append(decoders.Strip(" ", 1, 0))
    elif spec.kind == "metaspace_first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE, prepend_scheme="first", split=False
        )
        decoder.append(decoders.Strip(" ", 1, 0))
    elif spec.kind == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        raise ValueError(f"no tokenizer of kind {spec.kind!r}")
    tokenizer.decoder = decoders.Sequence(decoder)
    tokenizer.add_special_tokens([_added(token, special=True) for token in spec.special])
    return tokenizer


def _train(words: list[str], num_merges: int) -> list[tuple[str, str]]:
    """The first merges of plain BPE: the most frequent pair, the smallest pair among equals."""
    counts = [(list(word), count) for word, count in sorted(collections.Counter(words).items())]
    merges: list[tuple[str, str]] = []
    while len(merges) < num_merges:
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for pieces, count in counts:
            for pair in itertools.pairwise(pieces):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for pieces, _ in counts:
            _merge(pieces, best)
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> None:
    index = 0
    while index + 1 < len(pieces):
        if (pieces[index], pieces[index + 1]) == pair:
            pieces[index : index + 2] = [pair[0] + pair[1]]
        index += 1
