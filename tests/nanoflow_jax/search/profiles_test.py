import pytest

from nanoflow_jax.cost import datasheets, layer_work
from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.nanobatch import operations
from nanoflow_jax.search.profiles import Measured, Roofline


def _roofline(model, num_devices):
    return Roofline(
        config=huggingface.read_config(presets.load(model)),
        num_devices=num_devices,
        sheet=datasheets.accelerator("h200"),
        load=layer_work.Load(tokens=2048, decode_rows=1024, context_len=768, prefix_len=256),
    )


@pytest.mark.parametrize(
    ("model", "num_devices"),
    [("llama-3-8b", 1), ("llama-2-70b", 8), ("mixtral-8x7b", 1), ("qwen3-30b-a3b", 4)],
)
def test_more_tokens_never_take_less_time_in_any_operation(model, num_devices):
    profile = _roofline(model, num_devices)
    shape = operations.LayerShape(is_sparse=profile.config.moe is not None, num_devices=num_devices)
    for op in operations.layer_graph(shape).operations:
        times = [profile.seconds(op.name, tokens) for tokens in range(128, 2049, 128)]
        assert times == sorted(times), op.name
        assert times[0] > 0, op.name


def test_an_all_reduce_sends_each_number_twice_but_for_its_own_part():
    seconds = _roofline("llama-2-70b", 8).seconds("down_reduce", 2048)
    assert seconds == pytest.approx(2048 * 8192 * 2 * 2 * 7 / 8 / 450e9)


def test_large_batches_of_experts_take_the_products_of_the_active_ones():
    profile = _roofline("mixtral-8x7b", 1)
    flops = 2 * 65536 * 2 * 4096 * 2 * 14336
    assert profile.seconds("up_gate", 65536) == pytest.approx(flops / 989.5e12)


def test_few_tokens_of_experts_read_the_weights_of_those_they_touch():
    seconds = _roofline("mixtral-8x7b", 1).seconds("down", 1)
    weights = 2 * 14336 * 4096  # of the two experts of its one token
    moved = 2 * (weights + 2 * (14336 + 4096))
    assert seconds == pytest.approx(moved / 4800e9)


def test_parts_of_what_was_measured_cost_their_tokens_and_a_fixed_part():
    profile = Measured(whole_s={"o": 1.0}, tokens=2048, fixed=0.1, source="made up")
    assert profile.seconds("o", 2048) == pytest.approx(1.0)
    assert profile.seconds("o_columns", 1024) == pytest.approx(0.55)
    assert profile.seconds("rope", 1024) == 0.0


def test_what_nothing_is_known_of_is_refused():
    with pytest.raises(ValueError, match="nothing is known of what sampling costs"):
        _roofline("llama-3-8b", 1).seconds("sampling", 128)
