"""Programs compiled for GPUs that are not there; where no compiler is installed, its errors."""

import importlib.metadata

import deviceless
import jax
import jax.numpy as jnp
import pytest

from nanoflow_jax import compat
from nanoflow_jax.deviceless import compiler, dumps
from pallas_kernels.gemm import gemm

_CONCURRENT = {
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    "xla_gpu_graph_min_graph_size": 1,
}
_SQUARE = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)


def _independent(x, y, w):
    return gemm(x, w, num_ctas=2), gemm(y, w, num_ctas=1)


def _ordered_by_token(x, y, w):
    first = gemm(x, w, num_ctas=2)
    return first, gemm(y, w, num_ctas=1, token=first)


def test_kernels_that_share_nothing_may_run_at_once_in_a_concurrent_graph():
    program = deviceless.program(_independent, _SQUARE, _SQUARE, _SQUARE, options=_CONCURRENT)
    (graph,) = program.graphs
    assert [node.kind for node in graph.nodes] == ["kCustomCall"] * 2
    assert not graph.are_ordered(0, 1)
    assert graph.critical_path == 1
    assert [kernel.grid for kernel in program.mosaic_kernels] == [(2, 1, 1), (1, 1, 1)]
    assert [program.kernel(node.kernel).grid[0] for node in graph.nodes] == [2, 1]


def test_a_token_orders_kernels_that_share_nothing_else():
    program = deviceless.program(_ordered_by_token, _SQUARE, _SQUARE, _SQUARE, options=_CONCURRENT)
    (graph,) = program.graphs
    assert graph.parents == ((), (0,))


def _products(x, y, w):
    with jax.named_scope("first"):
        first = jnp.sin(x @ w)
    with jax.named_scope("second"):
        return first, jnp.cos(y @ w)


def _dots(program):
    return program.hlo.count(" dot(")


def test_without_options_a_graph_is_a_chain_and_products_of_one_weight_are_merged():
    shapes = _SQUARE, _SQUARE, _SQUARE
    few = {"xla_gpu_graph_min_graph_size": 1}
    merged = deviceless.program(_products, *shapes, options=few)
    assert _dots(merged) == 1
    apart = deviceless.program(
        _products, *shapes, options=few | {"xla_gpu_dot_merger_threshold_mb": 0}
    )
    assert _dots(apart) == 2
    (graph,) = apart.graphs
    assert graph.critical_path == len(graph.nodes) == graph.num_edges + 1 > 2


def test_concurrent_graphs_leave_products_of_one_weight_unordered_if_they_are_not_merged():
    program = deviceless.program(
        _products,
        *[_SQUARE] * 3,
        options=_CONCURRENT | {"xla_gpu_dot_merger_threshold_mb": 0},
    )
    (graph,) = program.graphs
    for one in graph.find("/first/"):
        assert not any(graph.are_ordered(one, other) for other in graph.find("/second/"))
    assert graph.find("/first/") and graph.find("/second/")


def test_kernels_of_xla_come_with_registers_grids_and_programs():
    program = deviceless.program(_products, *[_SQUARE] * 3)
    started = [launch.kernel for launch in program.launches]
    assert all(started)
    for kernel in map(program.kernel, started):
        assert 0 < kernel.registers <= 255
        assert kernel.grid[0] >= 1
        assert kernel.num_threads % 32 == 0
        assert f".visible .entry {kernel.name}(" in kernel.ptx
        assert ".target sm_90a" in kernel.ptx


def test_programs_are_compiled_for_the_device_that_is_named():
    program = deviceless.program(_products, *[_SQUARE] * 3, device="L4")
    assert all(".target sm_89" in kernel.ptx for kernel in program.kernels)


def test_donated_arguments_are_written_in_place_and_others_are_not():
    def write(cache, x):
        return cache.at[3].set(x)

    cache, row = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 64), (64,)))
    donated = deviceless.program(jax.jit(write, donate_argnums=0), cache, row)
    assert donated.memory.alias_bytes == 512 * 64 * 4
    assert not donated.copies
    kept = deviceless.program(write, cache, row)
    assert kept.memory.alias_bytes == 0
    assert [copy.num_bytes for copy in kept.copies] == [512 * 64 * 4]


def _sums(x, y, w):
    with jax.named_scope("first"):
        first = jax.lax.psum(x @ w, "model")
    with jax.named_scope("second"):
        second = y @ w
    return jax.lax.psum(jnp.sin(first), "model"), jax.lax.psum(second, "model")


def _summed(**options):
    """Products of two devices and sums over them, compiled."""
    mesh = jax.sharding.AbstractMesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    shapes = (
        jax.ShapeDtypeStruct(
            _SQUARE.shape, _SQUARE.dtype, sharding=jax.sharding.NamedSharding(mesh, spec(*axes))
        )
        for axes in ((None, "model"), (None, "model"), ("model", None))
    )
    run = jax.shard_map(
        _sums,
        mesh=mesh,
        in_specs=(spec(None, "model"), spec(None, "model"), spec("model", None)),
        out_specs=spec(),
        check_vma=False,
    )
    apart = {
        "xla_gpu_all_reduce_combine_threshold_bytes": 0,
        "xla_gpu_dot_merger_threshold_mb": 0,
    }
    return deviceless.program(run, *shapes, num_devices=2, options=_CONCURRENT | apart | options)


def test_programs_of_several_devices_keep_collectives_and_graphs_around_them():
    program = _summed(
        xla_gpu_enable_command_buffer="FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,COLLECTIVES"
    )
    (graph,) = program.graphs
    assert [node.kind for node in graph.nodes].count("kAllReduce") == 3
    assert program.launches == graph.nodes
    assert program.order == graph
    assert program.memory.argument_bytes == 3 * 256 * 128 * 2


def test_a_sum_over_devices_outside_graphs_is_on_its_way_while_another_product_runs():
    order = _summed().order
    assert [node.kind for node in order.nodes].count("kAllReduce") == 3
    (sum_of_first,) = (i for i in order.find("/first/") if order.nodes[i].kind == "kAllReduce")
    products = [i for i in order.find("/second/") if order.nodes[i].kind != "kAllReduce"]
    assert products
    assert not any(order.are_ordered(sum_of_first, product) for product in products)


def test_flags_of_this_process_do_not_reach_the_compiler(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--no_such_flag=1")
    assert deviceless.program(lambda x: x + 3, _SQUARE).kernels


def test_what_was_compiled_is_kept_and_not_compiled_again(tmp_path):
    def run(**more):
        double = jax.jit(lambda x: x + x)
        return compiler.compile_program(double, _SQUARE, cache=tmp_path, **more)

    deviceless.skip_without_compiler()
    first = run()
    assert run(timeout_s=0.0) == first
    with pytest.raises(compiler.CompilerFailedError, match=r"the compiler did not end in 0\.0 s"):
        run(timeout_s=0.0, device="H100")


def test_what_the_compiler_refuses_is_said_in_its_words():
    with pytest.raises(compiler.CompilerFailedError, match=r"ended with 1: (.|\n)*no_such_option"):
        deviceless.program(lambda x: x, _SQUARE, options={"no_such_option": 1})


def _without(monkeypatch, *missing):
    found = importlib.metadata.version

    def version(name):
        if any(part in name for part in missing):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1" if name == "jax-cuda13-plugin" else found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_missing_wheels_are_named_with_the_command_that_installs_them(monkeypatch):
    _without(monkeypatch, "cuda13-plugin", "cuda12-plugin")
    with pytest.raises(
        compiler.CompilerMissingError,
        match=r"has no CUDA plugin here: pip install 'nanoflow_jax\[deviceless\]'",
    ):
        compiler.compile_program(jax.jit(lambda x: x), _SQUARE)


def test_a_missing_ptxas_is_named(monkeypatch):
    _without(monkeypatch, "no such package")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(compiler.CompilerMissingError, match="there is no ptxas"):
        compiler.compile_program(jax.jit(lambda x: x), _SQUARE)


def test_unknown_devices_are_refused_before_anything_is_compiled():
    with pytest.raises(ValueError, match="device 'V1' is none of"):
        compiler.compile_program(jax.jit(lambda x: x), _SQUARE, device="V1")


def _same_twice(x, y, w):
    return gemm(x, w, num_ctas=2), gemm(y, w, num_ctas=1), gemm(y, w, num_ctas=2)


def test_a_kernel_that_is_called_twice_is_compiled_once():
    program = deviceless.program(_same_twice, *[_SQUARE] * 3, options=_CONCURRENT)
    (graph,) = program.graphs
    grids = [program.kernel(node.kernel).grid[0] for node in graph.nodes]
    assert sorted(grids) == [1, 2, 2]
    assert [kernel.grid[0] for kernel in program.mosaic_kernels] == list(dict.fromkeys(grids))


def test_kernels_that_were_not_dumped_are_missed(tmp_path):
    (tmp_path / "dump").mkdir()
    (tmp_path / "hlo.txt").write_text("""HloModule f

ENTRY %main () -> f32[4] {
  ROOT %call = f32[4] custom-call(), backend_config={kernel_hash = "E5"}
}
""")
    (tmp_path / "dump" / "module_1.f.thunk_sequence.txt").write_text(
        "001: kCustomCall [source | sink] kCustomCall\n"
    )
    (tmp_path / "dump" / "module_1.f.thunk_metadata.txt").write_text(
        'profile_annotation: "call" thunk_id: 1\n'
    )
    with pytest.raises(dumps.DumpError, match="1 kernels are called and 0 were dumped"):
        dumps.read_program(tmp_path, "")


def test_logs_that_do_not_fit_the_launches_are_refused(tmp_path):
    (tmp_path / "dump").mkdir()
    (tmp_path / "hlo.txt").write_text("HloModule f\n\nENTRY %main (x: f32[4]) -> f32[4] {\n}\n")
    (tmp_path / "dump" / "module_1.f.thunk_sequence.txt").write_text(
        "000: kCommandBuffer [source | sink] \n    001: kCopy [source | sink] kCopy\n"
    )
    with pytest.raises(
        dumps.DumpError, match=r"graphs of \[\] nodes, its list of launches of \[1\]"
    ):
        dumps.read_program(tmp_path, "")


@pytest.mark.timeout(300)
def test_what_is_started_on_a_stream_of_its_own_goes_on_beside_what_follows():
    def run(x, w):
        with jax.named_scope("aside"):
            y, read = compat.start_on_stream(lambda x: (jax.nn.silu(x @ w),), [x], stream=1)
        z, _ = jax.lax.optimization_barrier((w, read))
        with jax.named_scope("main"):
            z = jnp.sin(z @ z)
        y, z = jax.lax.optimization_barrier((y[0], z))
        with jax.named_scope("joined"):
            return jnp.cos(y) + z

    options = {"xla_gpu_enable_command_buffer": ""}
    program = deviceless.program(run, _SQUARE, _SQUARE, options=options)
    assert not program.graphs
    order = program.order
    aside, main = order.find("/aside"), order.find("/main")
    assert aside and main
    assert not any(order.are_ordered(one, other) for one in aside for other in main)
    (last,) = order.find("/joined")
    assert all(order.are_ordered(one, last) for one in (*aside, *main))
