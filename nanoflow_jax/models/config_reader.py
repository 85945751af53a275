"""Reads a Hugging Face config.json key by key and refuses what nobody read.

A key that changes the result and is not supported must never be ignored in silence, so every
key is either read by the family's file, known to be neutral, or refused by name.
"""

from collections.abc import Mapping
from typing import Any

from nanoflow_jax.models import architecture

# Keys that change nothing of a text model's inference result.
_NEUTRAL = frozenset(
    """
    _name_or_path architectures attention_dropout attn_implementation auto_map bos_token_id
    chunk_size_feed_forward classifier_dropout cross_attention_hidden_size dtype
    embd_pdrop eos_token_id finetuning_task hidden_dropout id2label initializer_range
    is_decoder is_encoder_decoder label2id max_position_embeddings model_type
    num_local_experts_per_device output_attentions output_hidden_states output_router_logits
    pad_token_id pretraining_tp problem_type resid_pdrop return_dict router_aux_loss_coef
    router_jitter_noise sep_token_id task_specific_params tokenizer_class torch_dtype
    torchscript transformers_version unk_token_id use_cache cache_implementation
    attention_probs_dropout_prob residual_dropout embedding_dropout unsloth_version
    unsloth_fixed prefix begin_suppress_tokens suppress_tokens
    """.split()
)
# Known keys that do change the result and have no support: refused with a reason.
_UNSUPPORTED = {
    "quantization_config": "quantised weights are not supported; use the unquantised model",
    "quantization": "quantised weights are not supported; use the unquantised model",
    "num_nextn_predict_layers": "multi-token prediction layers are not supported",
    "partial_rotary_factor": "rotary embedding of a part of the head is not supported",
}


class ConfigReader:
    """Hands out config.json's values and remembers which keys were asked for."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._read: set[str] = set()

    def _take(self, key: str) -> Any:
        self._read.add(key)
        return self._config.get(key)

    def _wrong(self, key: str, wanted: str) -> ValueError:
        came = self._config.get(key)
        return ValueError(f"config.json: {key}={came!r} is not {wanted}; is the file damaged?")

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        value = self._take(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self._wrong(key, f"an integer of at least {low}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._take(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self._wrong(key, "a number above 0")
        return float(value)

    def optional_number(self, key: str, default: float | None = None) -> float | None:
        """A number, None where the file says null, the default where it is silent."""
        if key not in self._config:
            return default
        return None if self._take(key) is None else self.number(key)

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        """An integer, None where the file says null, the default where it is silent."""
        if key not in self._config:
            return default
        return None if self._take(key) is None else self.integer(key, low=0)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._take(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def names(self, key: str) -> tuple[str, ...] | None:
        value = self._take(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self._wrong(key, "a list of names")
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...]:
        value = self._take(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(v) is int for v in value):
            raise self._wrong(key, "a list of integers")
        return tuple(value)

    def ignore(self, *keys: str) -> None:
        """Marks keys that have no effect given the other keys."""
        self._read.update(keys)

    def activation(
        self, *keys: str, default: architecture.Activation = architecture.Activation.SILU
    ) -> architecture.Activation:
        """The gate's non-linearity; the last key that is present wins."""
        names = {
            "silu": architecture.Activation.SILU,
            "swish": architecture.Activation.SILU,
            "gelu_pytorch_tanh": architecture.Activation.GELU_TANH,
            "gelu_new": architecture.Activation.GELU_TANH,
        }
        chosen = default
        for key in keys:
            value = self._take(key)
            if value is None:
                continue
            if value not in names:
                raise ValueError(
                    f"config.json: {key}={value!r} is not supported; "
                    f"supported are {', '.join(sorted(names))}"
                )
            chosen = names[value]
        return chosen

    def rope(
        self, default_theta: float = architecture.DEFAULT_ROPE_THETA
    ) -> architecture.RopeConfig:
        """Rotary settings from `rope_parameters` (transformers 5) or the older pair of keys."""
        theta = self.number("rope_theta", default_theta)
        values = self._take("rope_parameters")
        older = self._take("rope_scaling")
        values = values if values is not None else older
        if values is None:
            return architecture.RopeConfig(theta=theta)
        if not isinstance(values, dict):
            raise self._wrong("rope_scaling", "an object")
        kind = values.get("rope_type", values.get("type", "default"))
        inner = ConfigReader(values)
        theta = inner.number("rope_theta", theta)
        if kind == "default":
            _refuse_extra(values, {"rope_theta"})
            return architecture.RopeConfig(theta=theta)
        if kind != "llama3":
            raise ValueError(
                f"config.json: rope scaling {kind!r} is not supported; supported are "
                "'default' and 'llama3'"
            )
        wanted = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        _refuse_extra(values, {"rope_theta", *wanted})
        missing = [name for name in wanted if values.get(name) is None]
        if missing:
            raise ValueError(f"config.json: rope scaling 'llama3' lacks {', '.join(missing)}")
        return architecture.RopeConfig(
            theta=theta,
            factor=inner.number("factor"),
            low_freq_factor=inner.number("low_freq_factor"),
            high_freq_factor=inner.number("high_freq_factor"),
            original_max_len=inner.integer("original_max_position_embeddings"),
        )

    def refuse_unread(self) -> None:
        """Raises for a key that changes the result and that nothing has read."""
        for key, value in self._config.items():
            if key in self._read or key in _NEUTRAL or value is None or value is False:
                continue
            if key in _UNSUPPORTED:
                raise ValueError(f"config.json: {key}={value!r}: {_UNSUPPORTED[key]}")
            raise ValueError(
                f"config.json: {key}={value!r} is not known to this program and may change the "
                "result, so the model is refused; if it is harmless, remove the key"
            )


def _refuse_extra(values: Mapping[str, Any], known: set[str]) -> None:
    for key in values:
        if key not in known | {"rope_type", "type"}:
            raise ValueError(f"config.json: rope setting {key}={values[key]!r} is not supported")


def windows_of(kinds: tuple[str, ...], window: int | None) -> tuple[int | None, ...]:
    """One window per layer from transformers' `layer_types`."""
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"config.json: layer type {kind!r} is not supported; supported are "
                "'full_attention' and 'sliding_attention'"
            )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def qwen_windows(r: ConfigReader) -> tuple[int | None, ...]:
    """Qwen's rule: layers from `max_window_layers` on have the window, if it is in use."""
    num_layers = r.integer("num_hidden_layers")
    in_use = r.flag("use_sliding_window")
    window = r.optional_integer("sliding_window")
    first = r.integer("max_window_layers", 28, low=0)
    kinds = r.names("layer_types")
    if not in_use:
        return (None,) * num_layers
    if kinds is not None:
        return windows_of(kinds, window)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def standard_config(
    r: ConfigReader,
    *,
    family: str,
    window: int | None = None,
    default_theta: float = architecture.DEFAULT_ROPE_THETA,
    default_head_dim: int | None = None,
    default_tied: bool = False,
    default_norm_eps: float = 1e-6,
    **differences: Any,
) -> architecture.ModelConfig:
    """The keys that every family shares, with what a family sets itself.

    Args:
        r: The file's reader; whatever it has not handed out afterwards is refused.
        family: Name of the family's file.
        window: Sliding window of every layer, unless `differences` has `windows`.
        default_theta: Rotary base where the file has none.
        default_head_dim: Head width where the file has none; by default D / N.
        default_tied: Whether embeddings are tied where the file is silent.
        default_norm_eps: What norms add to the mean square where the file is silent.
        differences: Fields of ModelConfig that the family decides.
    """
    num_layers = r.integer("num_hidden_layers")
    hidden_size = r.integer("hidden_size")
    num_heads = r.integer("num_attention_heads")
    head_dim = r.integer("head_dim", default_head_dim or hidden_size // num_heads)
    values: dict[str, Any] = {
        "family": family,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": r.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "intermediate_size": r.integer("intermediate_size"),
        "vocab_size": r.integer("vocab_size"),
        "max_context_len": r.integer("max_position_embeddings"),
        "norm_eps": r.number("rms_norm_eps", default_norm_eps),
        "rope": r.rope(default_theta),
        "query_scale": head_dim**-0.5,
        "tied_embeddings": r.flag("tie_word_embeddings", default_tied),
        "windows": (window or None,) * num_layers,
    }
    if "activation" not in differences:
        values["activation"] = r.activation("hidden_act")
    r.refuse_unread()
    return architecture.ModelConfig(**(values | differences))
