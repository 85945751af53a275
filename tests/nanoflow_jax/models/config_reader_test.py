import re

import hypothesis
import pytest
from hypothesis import strategies as st

from nanoflow_jax.models import architecture, config_reader

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _reader(**config):
    return config_reader.ConfigReader(config)


def _raises(message):
    return pytest.raises(ValueError, match=re.escape(message))


def test_values_are_handed_out_as_the_file_has_them():
    r = _reader(a=3, b=0.5, c=True, d=["x", "y"], e=[1, 2], f=2)
    assert r.integer("a") == 3
    assert r.number("b") == 0.5
    assert r.number("f") == 2.0
    assert isinstance(r.number("f"), float)
    assert r.flag("c") is True
    assert r.names("d") == ("x", "y")
    assert r.integers("e") == (1, 2)


def test_a_null_or_missing_key_takes_the_default():
    r = _reader(a=None)
    for key in ("a", "b"):
        assert r.integer(key, 7) == 7
        assert r.number(key, 2.5) == 2.5
        assert r.flag(key) is False
        assert r.flag(key, True) is True
        assert r.names(key) is None
        assert r.integers(key) == ()


def test_only_a_missing_optional_value_takes_its_default_and_null_means_none():
    r = _reader(a=None, b=4)
    assert r.optional_integer("a", 9) is None
    assert r.optional_number("a", 9.0) is None
    assert r.optional_integer("b", 9) == 4
    assert r.optional_number("b", 9.0) == 4.0
    assert r.optional_integer("c", 9) == 9
    assert r.optional_number("c", 9.0) == 9.0
    assert r.optional_integer("c") is None


@pytest.mark.parametrize(
    ("method", "value", "wanted"),
    [
        ("integer", "3", "an integer of at least 1"),
        ("integer", 3.0, "an integer of at least 1"),
        ("integer", True, "an integer of at least 1"),
        ("integer", 0, "an integer of at least 1"),
        ("integer", None, "an integer of at least 1"),
        ("optional_integer", -1, "an integer of at least 0"),
        ("number", "x", "a number above 0"),
        ("number", 0, "a number above 0"),
        ("number", -1.5, "a number above 0"),
        ("number", True, "a number above 0"),
        ("number", None, "a number above 0"),
        ("optional_number", 0, "a number above 0"),
        ("flag", 1, "true or false"),
        ("flag", "true", "true or false"),
        ("names", "abc", "a list of names"),
        ("names", ["a", 1], "a list of names"),
        ("integers", 5, "a list of integers"),
        ("integers", [1, True], "a list of integers"),
        ("integers", [1.0], "a list of integers"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(method, value, wanted):
    message = f"config.json: key={value!r} is not {wanted}; is the file damaged?"
    with _raises(message):
        getattr(_reader(key=value), method)("key")


def test_the_last_activation_key_that_is_present_wins():
    r = _reader(hidden_act="silu", hidden_activation="gelu_pytorch_tanh")
    kinds = architecture.Activation
    assert r.activation("hidden_act", "hidden_activation") == kinds.GELU_TANH
    assert r.activation("hidden_activation", "hidden_act") == kinds.SILU
    assert r.activation("hidden_act", "absent") == kinds.SILU
    assert r.activation("absent") == kinds.SILU
    assert r.activation("absent", default=kinds.GELU_TANH) == kinds.GELU_TANH


def test_an_unknown_activation_is_refused_by_name():
    with _raises(
        "config.json: hidden_act='relu' is not supported; supported are "
        "gelu_new, gelu_pytorch_tanh, silu, swish"
    ):
        _reader(hidden_act="relu").activation("hidden_act")


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 500.0, "rope_scaling": _LLAMA3},
        {"rope_parameters": {**_LLAMA3, "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": {**_LLAMA3, "type": "llama3"}},
    ],
)
def test_old_and_new_rope_settings_say_the_same(config):
    assert _reader(**config).rope() == architecture.RopeConfig(
        theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192
    )


def test_rope_without_scaling_has_its_base_only():
    plain = architecture.RopeConfig(theta=7.0)
    assert _reader(rope_theta=7.0).rope() == plain
    assert _reader(rope_theta=7.0, rope_scaling={"rope_type": "default"}).rope() == plain
    assert _reader(rope_parameters={"rope_theta": 7}).rope() == plain
    assert _reader().rope() == architecture.RopeConfig(theta=10000.0)
    assert _reader().rope(default_theta=1e6) == architecture.RopeConfig(theta=1e6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": 4}, "config.json: rope_scaling=4 is not an object; is the file damaged?"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "config.json: rope scaling 'linear' is not supported; supported are "
            "'default' and 'llama3'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "config.json: rope setting partial_rotary_factor=0.5 is not supported",
        ),
        (
            {"rope_parameters": {**_LLAMA3, "beta_fast": 32}},
            "config.json: rope setting beta_fast=32 is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "config.json: rope scaling 'llama3' lacks low_freq_factor, high_freq_factor, "
            "original_max_position_embeddings",
        ),
        (
            {"rope_parameters": {"rope_theta": "big"}},
            "config.json: rope_theta='big' is not a number above 0; is the file damaged?",
        ),
        (
            {"rope_scaling": {**_LLAMA3, "factor": -8}},
            "config.json: factor=-8 is not a number above 0; is the file damaged?",
        ),
    ],
)
def test_rope_settings_that_nobody_reads_are_refused(config, message):
    with _raises(message):
        _reader(**config).rope()


def test_a_key_that_nobody_read_is_refused_by_name():
    r = _reader(hidden_size=8, architectures=["x"], torch_dtype="float32", odd_key=2)
    r.integer("hidden_size")
    with _raises("config.json: odd_key=2 is not known to this program and may change the result"):
        r.refuse_unread()
    r.ignore("odd_key")
    r.refuse_unread()


def test_unset_keys_are_not_refused():
    _reader(odd_key=None, another=False).refuse_unread()


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("quantization_config", "quantised weights are not supported; use the unquantised model"),
        ("quantization", "quantised weights are not supported; use the unquantised model"),
        ("num_nextn_predict_layers", "multi-token prediction layers are not supported"),
        ("partial_rotary_factor", "rotary embedding of a part of the head is not supported"),
    ],
)
def test_known_keys_without_support_are_refused_with_a_reason(key, reason):
    with _raises(f"config.json: {key}=1: {reason}"):
        _reader(**{key: 1}).refuse_unread()


def test_layer_types_become_windows():
    kinds = ("full_attention", "sliding_attention", "full_attention")
    assert config_reader.windows_of(kinds, 16) == (None, 16, None)
    with _raises(
        "config.json: layer type 'chunked_attention' is not supported; supported are "
        "'full_attention' and 'sliding_attention'"
    ):
        config_reader.windows_of(("chunked_attention",), 16)


@hypothesis.given(
    num_layers=st.integers(1, 6),
    first=st.integers(0, 7),
    in_use=st.booleans(),
    window=st.none() | st.integers(1, 9),
    spelled_out=st.booleans(),
)
def test_qwen_windows_begin_at_max_window_layers(num_layers, first, in_use, window, spelled_out):
    config = {
        "num_hidden_layers": num_layers,
        "max_window_layers": first,
        "use_sliding_window": in_use,
        "sliding_window": window,
    }
    wanted = [window if in_use and layer >= first else None for layer in range(num_layers)]
    if spelled_out:
        config["layer_types"] = [
            "sliding_attention" if in_use and layer >= first else "full_attention"
            for layer in range(num_layers)
        ]
    assert list(config_reader.qwen_windows(_reader(**config))) == wanted
