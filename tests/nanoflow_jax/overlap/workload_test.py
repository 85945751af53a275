import pytest

from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.cost.timeline import Contexts
from nanoflow_jax.deviceless.devices import find_device
from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.overlap.workload import Workload
from nanoflow_jax.scheduler.buckets import Bucket

_8B = huggingface.read_config(presets.load("llama-3-8b"))
_H200 = find_device("H200")


def _work(prompt=512, output=512, **more):
    return Workload(mix=Mix(prompt_len=prompt, output_len=output), num_tokens=2048, **more)


def test_a_batch_has_as_many_decode_rows_as_its_requests_make():
    assert _work().bucket == Bucket(tokens=2048, decode_rows=1024, prefill_rows=3)
    assert _work().contexts == Contexts(decode_len=768.0, prefix_len=256.0)
    assert _work(512, 0).bucket == Bucket(tokens=2048, decode_rows=0, prefill_rows=5)


def test_decode_rows_can_be_said():
    assert _work(decode_rows=256).bucket == Bucket(tokens=2048, decode_rows=256, prefill_rows=5)
    assert _work(decode_rows=2048).bucket == Bucket(tokens=2048, decode_rows=2048, prefill_rows=0)
    with pytest.raises(ValueError, match="--decode_rows=2049 are more than --tokens=2048"):
        _ = _work(decode_rows=2049).bucket


def test_what_fits_is_told_from_what_does_not():
    # 131072 bytes a token: 1024 x 768 tokens of decode rows and 1024 of prompts.
    assert _work().describe(_8B, _H200, num_devices=1) == (
        "requests of 512/512: 1024 decode rows that see 768 tokens each, 1024 tokens of prompts; a "
        "cache of 103 GB and weights of 16 GB fit into 151 GB"
    )
    text = _work(512, 1024).describe(_8B, _H200, num_devices=1)
    assert text.endswith("a cache of 183 GB and weights of 16 GB do NOT fit into 151 GB")
    assert "fit into 303 GB" in _work(512, 1024).describe(_8B, _H200, num_devices=2)
