import pytest

from nanoflow_jax.cost import datasheets
from nanoflow_jax.cost.layer_work import Load, Work, work
from nanoflow_jax.models import huggingface, presets

_8B = huggingface.read_config(presets.load("llama-3-8b"))
_LOAD = Load(tokens=2048, decode_rows=512, context_len=1024.0, prefix_len=512.0)
_H200 = datasheets.datasheet("NVIDIA H200")


def test_products_of_an_8b_layer_add_up_to_its_weights():
    names = ("norm_kqv", "o", "up_gate", "down")
    flops = sum(work(_8B, name, _LOAD).flops for name in names)
    weights = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    assert flops == 2 * 2048 * weights


def test_decode_attention_reads_each_cached_key_and_value_once():
    found = work(_8B, "decode_attention", _LOAD)
    cached = 512 * 1024 * 2 * 8 * 128 * 2
    assert cached < found.num_bytes < 1.01 * cached
    assert found.flops == 4 * 512 * 1024 * 32 * 128


def test_an_operation_takes_the_longer_of_computing_and_moving():
    computing = Work(flops=_H200.bf16_flops, num_bytes=1.0)
    moving = Work(flops=1.0, num_bytes=_H200.memory_bytes_per_s)
    assert computing.seconds(_H200) == pytest.approx(1.0)
    assert moving.seconds(_H200) == pytest.approx(1.0)
    assert computing.seconds(_H200, share=0.25) == pytest.approx(4.0)
    assert moving.seconds(_H200, share=0.5) == pytest.approx(1.0)  # a third fills the memory
    assert moving.seconds(_H200, share=1 / 6) == pytest.approx(2.0)


def test_an_operation_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="nothing is known of what route costs"):
        work(_8B, "route", _LOAD)
