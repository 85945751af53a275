"""The cost model against the figures that NanoFlow's paper prints (arXiv 2408.12757v2)."""

import dataclasses

import pytest

from nanoflow_jax.cost import datasheets, iteration, serving
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import huggingface, presets

_CONFIGS = {
    name: huggingface.read_config(presets.load(name))
    for name in ("llama-3-8b", "llama-2-70b", "qwen2-72b", "mixtral-8x7b", "llama-3.1-405b")
}
# Parameters as the paper rounds them.
_NOMINAL = {
    "llama-3-8b": 8.0e9,
    "llama-2-70b": 70e9,
    "qwen2-72b": 72e9,
    "mixtral-8x7b": 12.6e9,
    "llama-3.1-405b": 405e9,
}
_A100 = datasheets.accelerator("paper:a100-80g")
_WORKLOADS = (
    *(serving.TRACES[name] for name in ("lmsys", "splitwise", "sharegpt")),
    Mix(prompt_len=512, output_len=512),
    Mix(prompt_len=1024, output_len=512),
    Mix(prompt_len=512, output_len=1024),
)


def _sizes(name):
    return serving.sizes(_CONFIGS[name], parameters=_NOMINAL[name])


@pytest.mark.parametrize(
    ("name", "devices", "printed"),
    [
        ("llama-3-8b", 1, (0.23, 0.31, 0.37, 0.61, 0.68, 1.09)),
        ("llama-2-70b", 8, (0.07, 0.09, 0.11, 0.18, 0.20, 0.32)),
        ("qwen2-72b", 8, (0.07, 0.09, 0.11, 0.18, 0.20, 0.31)),
        # The paper counts the active experts' weights in memory alone: 25 of 93 GB. It prints .17
        # and .20 where this gives .164 and .195; no count of parameters gives all six.
        ("mixtral-8x7b", 8, (0.12, 0.16, 0.19, 0.32, 0.36, 0.58)),
    ],
)
def test_figure_3_memory_time_over_compute_time(name, devices, printed):
    cluster = serving.Cluster(accelerator=_A100, num_devices=devices)
    found = [serving.serving_cost(_sizes(name), cluster, one).memory_ratio for one in _WORKLOADS]
    assert tuple(round(ratio, 2) for ratio in found) == printed


@pytest.mark.parametrize(
    ("name", "stages", "printed"),
    [
        (
            "llama-3-8b",
            1,
            ".382 .477 .477 1.008 1.008 .918 1.147 .415 1.171 1.171 1.529 1.376 2.609",
        ),
        (
            "llama-2-70b",
            1,
            ".218 .273 .273 .576 .576 .524 .655 .237 .669 .669 .874 .786 1.491",
        ),
        (
            "qwen2-72b",
            1,
            ".212 .265 .265 .560 .560 .510 .637 .231 .651 .651 .850 .765 1.450",
        ),
        (
            "mixtral-8x7b",
            1,
            ".243 .303 .303 .640 .640 .583 .728 .264 .744 .744 .971 .874 1.657",
        ),
        (
            "llama-3.1-405b",
            2,
            ".119 .148 .148 .314 .314 .285 .357 .129 .364 .364 .476 .428 .812",
        ),
    ],
)
def test_figure_2_network_time_over_compute_time(name, stages, printed):
    devices = [one for one in datasheets.accelerator_names() if one.startswith("paper:")]
    assert len(devices) == len(printed.split())
    for device, expected in zip(devices, printed.split(), strict=True):
        cluster = serving.Cluster(
            accelerator=datasheets.accelerator(device), num_devices=8 * stages, num_stages=stages
        )
        cost = serving.serving_cost(_sizes(name), cluster, _WORKLOADS[3], dense_batch=2048)
        assert f"{cost.network_ratio:.3f}".removeprefix("0") == expected, device


def _table_2():
    """The step of Table 2: 2,048 tokens, a third of them of prompts of 512 seen whole."""
    cluster = serving.Cluster(accelerator=_A100, num_devices=8)
    step = iteration.Step(
        tokens=2048, decode_rows=2048 * 2 / 3, decode_context=1024, prompt_context=512
    )
    costs = iteration.operation_costs(_CONFIGS["llama-2-70b"], cluster, step)
    return cluster, {one.name: one for one in costs}


# GFLOP, GB of memory, ms computing and ms moving memory. Of two values the paper prints others:
# 3,665.9 GFLOP and 1.47 ms of decode attention, whose count gives 3,665.0 at its own context, and
# 2.1 GB and .13 ms of prefill attention, whose queries, results, keys and values are 2.0 GB.
_PRINTED = {
    "kqv": (27487.8, 19.5, 11.01, 1.22),
    "o": (21990.2, 16.1, 8.81, 1.01),
    "up_gate": (153931.6, 96.6, 61.67, 6.04),
    "down": (76965.8, 49.7, 30.84, 3.11),
    "decode_attention": (3665.0, 462.2, 1.47, 28.89),
    "prefill_attention": (916.3, 2.0, 0.37, 0.13),
    "collectives": (18.8, 75.2, 0.01, 4.70),
}


@pytest.mark.parametrize("name", _PRINTED)
def test_table_2_operations(name):
    cluster, costs = _table_2()
    cost, (gigaflop, gigabytes, compute_ms, memory_ms) = costs[name], _PRINTED[name]
    assert round(cost.flops / 1e9, 1) == gigaflop
    assert round(cost.memory_bytes / 1e9, 1) == gigabytes
    assert round(cost.compute_s(cluster) * 1e3, 2) == compute_ms
    # The paper divides gigabytes as it prints them.
    as_printed = gigabytes * 1e9 / cluster.memory_bytes_per_s * 1e3
    assert as_printed == pytest.approx(memory_ms, abs=0.006)
    assert cost.memory_s(cluster) * 1e3 == pytest.approx(memory_ms, abs=0.0101)


def test_table_2_network_and_totals():
    cluster, costs = _table_2()
    network = costs["collectives"]
    assert round(network.link_bytes / 1e9, 1) == 75.2
    assert network.network_s(cluster) * 1e3 == pytest.approx(31.33, abs=0.02)
    rows = [costs[name] for name in _PRINTED]
    assert sum(one.compute_s(cluster) for one in rows) * 1e3 == pytest.approx(114.17, abs=0.02)
    assert sum(one.memory_s(cluster) for one in rows) * 1e3 == pytest.approx(45.09, abs=0.02)


@pytest.mark.parametrize(
    ("name", "printed"), [("llama-2-70b", 1857), ("llama-3-8b", 16250), ("mixtral-8x7b", 10317)]
)
def test_optimal_throughput_at_260_tflops(name, printed):
    """Printed for Mixtral is 10,300."""
    accelerator = dataclasses.replace(_A100, bf16_flops=260e12)
    cluster = serving.Cluster(accelerator=accelerator, num_devices=8)
    cost = serving.serving_cost(_sizes(name), cluster, _WORKLOADS[3], dense_batch=2048)
    assert round(cost.optimal_tokens_per_s / 8) == printed
