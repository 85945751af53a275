import dataclasses
import logging

from nanoflow_jax.engine import collective_caps, compiler
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.operations import LayerShape, Resource

_SHAPE = LayerShape(num_devices=4)
_PLAN = builders.tensor_parallel(
    _SHAPE, num_tokens=64, device=builders.Device(granule=8, network_ctas=12)
)


def test_nccl_gets_as_many_channels_as_a_plans_collectives_have_sms():
    assert collective_caps.compiler_options(_PLAN) == {"xla_gpu_nccl_collective_max_nchannels": 12}


def test_the_largest_cap_counts_and_one_without_a_cap_lifts_it():
    network = [i for i, nano in enumerate(_PLAN.order) if nano.lane is Resource.NETWORK]

    def with_cap(cap):
        order = list(_PLAN.order)
        order[network[0]] = dataclasses.replace(order[network[0]], num_ctas=cap)
        return dataclasses.replace(_PLAN, order=tuple(order))

    assert collective_caps.most_channels(with_cap(20)) == 20
    assert collective_caps.most_channels(with_cap(3)) == 12
    assert collective_caps.compiler_options(with_cap(None)) == {}


def test_a_plan_without_collectives_of_its_own_caps_nothing():
    assert collective_caps.compiler_options(builders.one(LayerShape(), num_tokens=8)) == {}


def test_the_installed_jax_takes_the_option():
    assert compiler.refused_options(collective_caps.compiler_options(_PLAN)) == {}
    assert collective_caps.can_cap([_PLAN], on_gpu=True)


def test_nothing_is_asked_where_nothing_can_be_capped():
    def never(options):
        raise AssertionError(options)

    plain = builders.one(LayerShape(), num_tokens=8)
    assert not collective_caps.can_cap([_PLAN], on_gpu=False, refused_options=never)
    assert not collective_caps.can_cap([plain], on_gpu=True, refused_options=never)


def test_a_jax_without_the_option_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        assert not collective_caps.can_cap(
            [_PLAN], on_gpu=True, refused_options=lambda options: dict.fromkeys(options, "unknown")
        )
    assert "cannot hold collectives to the SMs that a plan gives them (unknown)" in caplog.text
