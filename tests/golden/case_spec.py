"""What one golden case is made from."""

import dataclasses
from typing import Any

from conversations import Conversation
from tiny_tokenizers import TokenizerSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One golden case.

    Attributes:
        architecture: Prefix of the transformers classes, e.g. "Llama".
        config: Arguments of the config class, token ids apart.
        seed: Seed of weights and prompts.
        tokenizer: The tokenizer; its vocabulary may be smaller than the model's.
        bos, eos, pad: Tokens named in tokenizer_config.json and, as ids, in config.json.
        template: Name of the chat template.
        template_in_config: Stored in tokenizer_config.json, not in chat_template.jinja.
        chat: Conversations to render.
        generation_eos: Tokens listed as eos in generation_config.json; empty: same as eos.
        tokenizer_config: Further entries of tokenizer_config.json.
        legacy_config: config.json as transformers 4 wrote it (rope_theta, rope_scaling).
        shard_size: Largest shard of the weights, or None for one file.
        gains: Factors on the usual spread of weights whose name contains the key.
        bites: Config changes that must change the logits, so that no feature sleeps.
    """

    architecture: str
    config: dict[str, Any]
    seed: int
    tokenizer: TokenizerSpec
    bos: str | None
    eos: str
    pad: str | None = None
    template: str
    template_in_config: bool = False
    chat: tuple[Conversation, ...]
    generation_eos: tuple[str, ...] = ()
    tokenizer_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    legacy_config: bool = False
    shard_size: str | None = None
    gains: dict[str, float] = dataclasses.field(default_factory=dict)
    bites: tuple[dict[str, Any], ...] = ()
