import pytest

from nanoflow_jax.cost import layer_work, node_work
from nanoflow_jax.cost.node_work import NodeKind
from nanoflow_jax.models import huggingface, presets


def _model(name):
    return huggingface.read_config(presets.load(name))


def _node(config, kind, layer=None):
    (found,) = [n for n in node_work.nodes(config) if n.kind is kind and n.layer == layer]
    return found


@pytest.mark.parametrize("name", presets.names())
def test_nodes_of_a_model_add_up_to_its_parameters(name):
    config = _model(name)
    nodes = node_work.nodes(config)
    assert len(nodes) == 2 * config.num_layers + 2
    twice = config.vocab_size * config.hidden_size if config.tied_embeddings else 0
    assert sum(node.parameters for node in nodes) == config.num_parameters + twice
    assert [node.name for node in nodes[:4]] == ["embedding", "attention 0", "mlp 0", "attention 1"]
    assert nodes[-1].name == "head"


def test_nodes_of_a_dense_layer_compute_what_its_operations_do():
    config = _model("llama-3-8b")
    load = layer_work.Load(tokens=16, decode_rows=16, context_len=512.0, prefix_len=0.0)
    attention, mlp = _node(config, NodeKind.ATTENTION, 3), _node(config, NodeKind.MLP, 3)
    for node, names in (
        (attention, ("norm_kqv", "decode_attention", "o")),
        (mlp, ("up_gate", "down")),
    ):
        found = node_work.decode_work(config, node, rows=16, context_len=512.0)
        assert found.flops == sum(layer_work.work(config, one, load).flops for one in names)
        assert found.weights == node.parameters
    cached = 16 * 512 * 2 * 8 * 128
    found = node_work.decode_work(config, attention, rows=16, context_len=512.0)
    assert found.kv_numbers == cached
    # Queries, results, keys and values of 16 rows; the product's input and both outputs.
    assert found.moved_bytes == 2 * 16 * (2 * 4096 + 2 * 1024 + 4096 + 6144 + 4096 + 4096)


def test_a_prompt_is_attended_to_causally_and_the_head_sees_its_last_token():
    config = _model("llama-3-8b")
    attention = _node(config, NodeKind.ATTENTION, 0)
    found = node_work.prefill_work(config, attention, prompt_len=1000)
    assert found.flops == 2 * 1000 * attention.parameters + 4 * 1000 * 500 * 4096
    assert found.kv_numbers == 0
    head = node_work.prefill_work(config, _node(config, NodeKind.HEAD), prompt_len=1000)
    assert head.flops == 2 * 4096 * 128256


def test_an_embedding_computes_nothing_and_reads_one_row_for_each_token():
    config = _model("llama-3-8b")
    found = node_work.prefill_work(config, _node(config, NodeKind.EMBEDDING), prompt_len=10)
    assert (found.flops, found.weights) == (0.0, 0.0)
    assert found.moved_bytes == 2 * 2 * 10 * 4096


def test_windows_bound_what_a_layer_keeps_and_reads():
    config = _model("gemma-2-9b")
    windowed, full = (_node(config, NodeKind.ATTENTION, layer) for layer in (0, 1))
    assert (windowed.kv_tokens(10000), full.kv_tokens(10000)) == (4096, 10000)
    assert _node(config, NodeKind.MLP, 0).kv_tokens(10000) == 0
    read = node_work.decode_work(config, windowed, rows=2, context_len=10000.0).kv_numbers
    assert read == 2 * 4096 * windowed.kv_width


def test_few_tokens_read_the_experts_they_are_sent_to():
    config = _model("mixtral-8x7b")
    mlp = _node(config, NodeKind.MLP, 0)
    one = node_work.decode_work(config, mlp, rows=1, context_len=1.0)
    assert one.weights == pytest.approx(2 * 3 * 4096 * 14336)
    many = node_work.decode_work(config, mlp, rows=1000, context_len=1.0)
    assert many.weights == pytest.approx(8 * 3 * 4096 * 14336)
    assert many.moved_bytes > 0
