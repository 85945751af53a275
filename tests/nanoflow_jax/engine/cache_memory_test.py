"""Pages that fit into the memory that is left, and no more than all requests need."""

import re

import jax
import numpy as np
import pytest
from engine_runs import build_small
from golden import cases

from nanoflow_jax import config
from nanoflow_jax.engine import cache_memory, kernel_choice, model_source
from nanoflow_jax.kv_cache import layout
from nanoflow_jax.models import loading

_CASE = cases.load("llama")


def _raises(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_f5_memory_for_less_than_a_page_is_refused(monkeypatch):
    monkeypatch.setattr(cache_memory, "_free_bytes", lambda device: 100)
    with _raises(
        "no memory for a single page of the KV cache; use a smaller model, --dtype=bfloat16, or "
        "raise --cache_memory_fraction"
    ):
        build_small(_CASE.path, cache_page_size=5)


def _layout(free, monkeypatch, *, page_major=False, num_devices=1, num_replicas=1, **knobs):
    monkeypatch.setattr(cache_memory, "_free_bytes", lambda device: free)
    opened = model_source.open_model(config.ModelSection(model=str(_CASE.path)))
    placement = loading.place_model(opened.config, jax.devices()[:num_devices])
    share = loading.share_of_one_device(opened.config, placement)
    return cache_memory.make_layout(
        placement,
        config.CacheSection(**knobs),
        kernel_choice.Served(config=share, dtype=np.dtype(np.float32), page_size=16),
        most_pages=50,
        page_major=page_major,
        num_replicas=num_replicas,
    )


def test_the_cache_takes_its_share_of_memory_and_no_more_than_all_requests_need(monkeypatch):
    # A page of 16 tokens: keys and values of 4 heads, 8 wide, 4 bytes, in 2 layers.
    page = 2 * 16 * 4 * 8 * 4 * 2
    found = _layout(80 * page, monkeypatch, memory_fraction=0.5)  # a CPU: a quarter of it
    assert isinstance(found, layout.TokenMinorLayout)
    assert found.shape.num_pages == 10
    found = _layout(80 * page, monkeypatch, memory_fraction=0.5, page_major=True)
    assert isinstance(found, layout.PageMajorLayout)
    assert _layout(1000 * page, monkeypatch).shape.num_pages == 50
    assert _layout(80 * page, monkeypatch, num_pages=70).shape.num_pages == 70


def test_two_devices_each_keep_half_of_the_heads_in_as_many_pages_as_one_host_has_room_for(
    monkeypatch,
):
    page = 2 * 16 * 4 * 8 * 4 * 2
    found = _layout(80 * page, monkeypatch, memory_fraction=0.5, num_devices=2)
    assert (found.shape.num_kv_heads, found.shape.num_pages) == (2, 10)
    found = _layout(80 * page, monkeypatch, memory_fraction=0.5, num_replicas=2)
    assert (found.shape.num_kv_heads, found.shape.num_pages) == (4, 5)


def test_f5_more_pages_than_there_is_memory_are_refused_with_the_most_that_fit(monkeypatch):
    page = 2 * 16 * 4 * 8 * 4 * 2
    with _raises(
        f"--cache_num_pages=81 needs {81 * page} bytes and {80 * page + 1} are free; ask for at "
        "most 80, or leave it out for as many as fit"
    ):
        _layout(80 * page + 1, monkeypatch, num_pages=81)


def test_the_tokens_that_a_gpu_will_hold_are_what_the_weights_leave(monkeypatch):
    page = 2 * 16 * 4 * 8 * 4 * 2
    monkeypatch.setattr(cache_memory, "_free_bytes", lambda device: 110 * page)
    opened = model_source.open_model(config.ModelSection(model=str(_CASE.path)))
    served = kernel_choice.Served(config=opened.config, dtype=np.dtype(np.float32), page_size=16)

    def tokens(weight_bytes, **knobs):
        return cache_memory.tokens_beside_weights(
            jax.devices()[0], config.CacheSection(**knobs), served, weight_bytes=weight_bytes
        )

    assert tokens(10 * page, memory_fraction=0.5) == 50 * 16
    assert tokens(200 * page) == 0
    assert tokens(200 * page, num_pages=3) == 3 * 16
