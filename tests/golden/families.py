"""The golden cases: which tiny model, tokenizer and conversations each family gets.

Sizes are awkward on purpose: odd vocabularies, head widths that are not hidden size over heads,
three query heads per key head, feed-forward widths that are no power of two.
"""

from typing import Any

import conversations as chats
import tiny_tokenizers
from case_spec import Case
from tiny_tokenizers import TokenizerSpec

_ADD_BOS = {"add_bos_token": True, "add_eos_token": False}
_NO_BOS = {"add_bos_token": False, "add_prefix_space": False}

_QWEN2_CHAT = (
    chats.SYSTEM,
    chats.MULTI_TURN,
    chats.UNICODE,
    chats.TOOLS_OFFERED,
    chats.TWO_TOOLS_CALLED,
    chats.FINISHED,
    chats.UNKNOWN_ROLE,
)
_QWEN3_CHAT = (
    chats.SYSTEM_MULTI_TURN,
    chats.with_kwargs(chats.UNICODE, enable_thinking=False),
    chats.with_kwargs(chats.SINGLE, enable_thinking=True),
    chats.THOUGHT,
    chats.TOOLS_OFFERED,
    chats.TWO_TOOLS_CALLED,
    chats.TOOL_ANSWERED,
    chats.ONLY_TOOL_RESULT,
)
_QWEN2 = {
    "tokenizer": TokenizerSpec(
        kind="byte_level", special=tiny_tokenizers.QWEN_SPECIAL, vocab_size=303
    ),
    "bos": None,
    "eos": "<|im_end|>",
    "pad": "<|endoftext|>",
    "generation_eos": ("<|im_end|>", "<|endoftext|>"),
    "tokenizer_config": _NO_BOS,
    "template": "qwen2",
    "chat": _QWEN2_CHAT,
}
_QWEN3_TOKENIZER = TokenizerSpec(
    kind="byte_level",
    special=tiny_tokenizers.QWEN_SPECIAL,
    plain=tiny_tokenizers.QWEN3_PLAIN,
    vocab_size=321,
)
_QWEN3 = {
    "tokenizer": _QWEN3_TOKENIZER,
    "bos": None,
    "eos": "<|im_end|>",
    "pad": "<|endoftext|>",
    "generation_eos": ("<|im_end|>", "<|endoftext|>"),
    "tokenizer_config": _NO_BOS,
    "template": "qwen3",
    "chat": _QWEN3_CHAT,
}


# With tied embeddings the last token votes for itself: the layers must outweigh it.
_TIED = {
    "embed_tokens": 0.55,
    "o_proj": 2.5,
    "down_proj": 5.0,
    "q_proj": 1.2,
    "k_proj": 1.2,
    "q_norm": 1.3,
}


def _sizes(**sizes: Any) -> dict[str, Any]:
    return {"max_position_embeddings": 256, "rms_norm_eps": 1e-5, **sizes}


CASES: dict[str, Case] = {
    "llama": Case(
        architecture="Llama",
        config=_sizes(
            vocab_size=353,
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        ),
        seed=7,
        tokenizer=TokenizerSpec(
            kind="sentencepiece", special=tiny_tokenizers.SENTENCEPIECE, vocab_size=353, bos="<s>"
        ),
        bos="<s>",
        eos="</s>",
        tokenizer_config=_ADD_BOS,
        template="llama2",
        template_in_config=True,
        chat=(
            chats.SYSTEM_MULTI_TURN,
            chats.SINGLE,
            chats.FINISHED,
            chats.UNICODE,
            chats.TWO_USERS,
        ),
        legacy_config=True,
    ),
    "llama3": Case(
        architecture="Llama",
        config=_sizes(
            vocab_size=307,
            hidden_size=36,
            intermediate_size=44,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 48,
            },
        ),
        seed=5,
        gains=_TIED,
        tokenizer=TokenizerSpec(
            kind="byte_level",
            special=tiny_tokenizers.LLAMA3_SPECIAL,
            vocab_size=301,
            bos="<|begin_of_text|>",
        ),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        generation_eos=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        template="llama3",
        template_in_config=True,
        chat=(
            chats.with_kwargs(chats.SYSTEM, date_string="26 Jul 2024"),
            chats.at(chats.MULTI_TURN, "2025-03-09T14:05:06"),
            chats.with_kwargs(chats.UNICODE, date_string="1 Jan 2026"),
            chats.with_kwargs(chats.TOOLS_OFFERED, date_string="26 Jul 2024"),
            chats.with_kwargs(
                chats.TOOL_CALLED, date_string="26 Jul 2024", tools_in_user_message=False
            ),
            chats.with_kwargs(chats.TWO_TOOLS_CALLED, date_string="26 Jul 2024"),
        ),
        legacy_config=True,
        bites=({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},),
    ),
    "llama_bias": Case(
        architecture="Llama",
        config=_sizes(
            vocab_size=311,
            hidden_size=32,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
        seed=7,
        tokenizer=TokenizerSpec(kind="byte_level", special=("<s>", "</s>"), vocab_size=311),
        bos="<s>",
        eos="</s>",
        tokenizer_config={"add_bos_token": False, "add_eos_token": False},
        template="zephyr",
        chat=(
            chats.SYSTEM_MULTI_TURN,
            chats.SINGLE,
            chats.FINISHED,
            chats.UNICODE,
            chats.UNKNOWN_ROLE,
        ),
    ),
    "mistral": Case(
        architecture="Mistral",
        config=_sizes(
            vocab_size=367,
            hidden_size=32,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            sliding_window=16,
            tie_word_embeddings=False,
        ),
        seed=2,
        tokenizer=TokenizerSpec(
            kind="metaspace_first",
            special=tiny_tokenizers.MISTRAL_SPECIAL,
            vocab_size=367,
            bos="<s>",
        ),
        bos="<s>",
        eos="</s>",
        tokenizer_config=_ADD_BOS,
        template="mistral",
        chat=(
            chats.SYSTEM_MULTI_TURN,
            chats.FINISHED,
            chats.UNICODE,
            chats.TOOLS_OFFERED,
            chats.TWO_TOOLS_CALLED,
            chats.TOOL_ANSWERED,
            chats.SHORT_CALL_ID,
            chats.TWO_USERS,
        ),
        bites=({"sliding_window": None},),
    ),
    "qwen2": Case(
        architecture="Qwen2",
        config=_sizes(
            vocab_size=313,
            hidden_size=36,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        seed=1,
        gains=_TIED,
        shard_size="50KB",
        **_QWEN2,
    ),
    "qwen2_window": Case(
        architecture="Qwen2",
        config=_sizes(
            vocab_size=303,
            hidden_size=30,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            use_sliding_window=True,
            sliding_window=12,
            max_window_layers=1,
            tie_word_embeddings=False,
        ),
        seed=4,
        legacy_config=True,
        bites=(
            {"layer_types": ["full_attention"] * 3},
            {"layer_types": ["sliding_attention"] * 3},
        ),
        **_QWEN2,
    ),
    "qwen3": Case(
        architecture="Qwen3",
        config=_sizes(
            vocab_size=321,
            hidden_size=36,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        seed=5,
        gains=_TIED,
        **_QWEN3,
    ),
    "mixtral": Case(
        architecture="Mixtral",
        config=_sizes(
            vocab_size=353,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=False,
        ),
        seed=1,
        tokenizer=TokenizerSpec(
            kind="sentencepiece", special=tiny_tokenizers.SENTENCEPIECE, vocab_size=353, bos="<s>"
        ),
        bos="<s>",
        eos="</s>",
        tokenizer_config=_ADD_BOS,
        template="mixtral",
        template_in_config=True,
        chat=(chats.SINGLE, chats.MULTI_TURN, chats.FINISHED, chats.UNICODE, chats.SYSTEM),
        bites=({"num_experts_per_tok": 1}, {"num_experts_per_tok": 3}),
    ),
    "qwen3_moe": Case(
        architecture="Qwen3Moe",
        config=_sizes(
            vocab_size=321,
            hidden_size=30,
            intermediate_size=28,
            moe_intermediate_size=8,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=5,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            mlp_only_layers=[1],
            decoder_sparse_step=1,
            tie_word_embeddings=False,
        ),
        seed=3,
        bites=({"norm_topk_prob": False},),
        **_QWEN3,
    ),
    "qwen3_moe_unnormalised": Case(
        architecture="Qwen3Moe",
        config=_sizes(
            vocab_size=331,
            hidden_size=32,
            intermediate_size=28,
            moe_intermediate_size=10,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=12,
            num_experts=5,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            mlp_only_layers=[],
            decoder_sparse_step=2,
            tie_word_embeddings=True,
        ),
        seed=1,
        gains={**_TIED, "embed_tokens": 0.45},
        bites=({"norm_topk_prob": True},),
        **_QWEN3,
    ),
    "gemma2": Case(
        architecture="Gemma2",
        config=_sizes(
            vocab_size=359,
            hidden_size=30,
            intermediate_size=44,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=12,
            query_pre_attn_scalar=20,
            sliding_window=16,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=14.0,
            tie_word_embeddings=True,
        ),
        seed=5,
        legacy_config=True,
        gains={
            "embed_tokens": 0.6,
            "post_attention_layernorm": 4.0,
            "q_proj": 1.4,
            "k_proj": 1.4,
            "post_feedforward_layernorm": 14.0,
        },
        tokenizer=TokenizerSpec(
            kind="gemma", special=tiny_tokenizers.GEMMA_SPECIAL, vocab_size=359, bos="<bos>"
        ),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        generation_eos=("<eos>", "<end_of_turn>"),
        tokenizer_config=_ADD_BOS,
        template="gemma2",
        template_in_config=True,
        chat=(
            chats.SINGLE,
            chats.MULTI_TURN,
            chats.FINISHED,
            chats.UNICODE,
            chats.SYSTEM,
            chats.TWO_USERS,
        ),
        bites=(
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 12},
            {"layer_types": ["full_attention"] * 3},
            {"layer_types": ["sliding_attention"] * 3},
        ),
    ),
}
