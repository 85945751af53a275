"""The model's own byte-level BPE tokenizer, its special tokens and its chat template."""

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from nanoflow_jax.train_embedded import chat_rows

BOS = "<|bos|>"
EOS = "<|eos|>"
END_OF_TURN = "<|end|>"
SPECIAL_TOKENS = (BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>", END_OF_TURN)

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('roles are system, user and assistant, not ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

# Words take the space before them; a line break takes the indentation after it, so that a
# prompt may end with an indented empty line and still be cut as training text was.
_WORDS = r" ?\p{L}+|\p{N}{1,3}|\n+ *| +(?= )| ?[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(texts: Sequence[str], *, vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer learnt from `texts`; the same texts give the same one.

    Raises:
        ValueError: The texts are too few for that many tokens.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"--corpus_vocab_size={vocab_size}, but the text only gives "
            f"{tokenizer.get_vocab_size()} tokens; ask for fewer or read more text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def encode_documents(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Each text between a BOS and an EOS."""
    whole = [f"{BOS}{text}{EOS}" for text in texts]
    return [e.ids for e in tokenizer.encode_batch(whole, add_special_tokens=False)]


def encode_conversations(
    tokenizer: tokenizers.Tokenizer, conversations: Sequence[chat_rows.Conversation]
) -> list[list[int]]:
    """Each conversation exactly as the chat template lays it out."""
    texts = [BOS + "".join(map(_render, turns)) for turns in conversations]
    return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _render(turn: chat_rows.Turn) -> str:
    return f"<|{turn.role}|>{turn.content}{END_OF_TURN}"
