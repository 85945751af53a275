"""The product kernel against its reference, and lowered at the sizes that are served."""

import itertools
import re

import deviceless
import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest

from pallas_kernels.gemm import gemm, gemm_reference
from pallas_kernels.gemm_role import GemmTile, default_tile

# Rounding of the output: half a unit of the last place of bfloat16, and little else.
_RELATIVE = {"bfloat16": 2e-3, "float32": 1e-5}
_WIDE = GemmTile(columns=256)
_FEW = GemmTile(rows=64, columns=256)


def _operands(num_rows, depth, num_columns, *, parts="", dtype=jnp.bfloat16, out_dtype=None):
    operands = {
        "x": kernel_runs.normal(0, num_rows, depth, dtype=dtype),
        "w": kernel_runs.normal(1, num_columns, depth, dtype=dtype),
        "out_dtype": out_dtype,
    }
    if "gate" in parts:
        operands["w_up"] = kernel_runs.normal(2, num_columns, depth, dtype=dtype)
    if "bias" in parts:
        operands["bias"] = kernel_runs.normal(3, num_columns, dtype=dtype)
    if "residual" in parts:
        operands["residual"] = kernel_runs.normal(
            4, num_rows, num_columns, dtype=out_dtype or dtype
        )
    return operands


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("sizes", "how", "more"),
    [
        ((200, 192, 300), {"num_ctas": 3, "tile": _WIDE}, {"parts": "residual"}),
        ((1, 72, 100), {}, {"parts": "residual", "out_dtype": jnp.float32}),
        (
            (130, 96, 40),
            {"num_ctas": 2},
            {"parts": "gate bias residual", "dtype": jnp.float32},
        ),
        ((70, 130, 131), {"num_ctas": 1}, {"parts": "bias", "dtype": jnp.float16}),
    ],
)
def test_a_product_is_its_reference_on_any_number_of_ctas(sizes, how, more):
    operands = _operands(*sizes, **more)
    with kernel_runs.interpreting() as interpret:
        found = gemm(**operands, **how, token=jnp.full((3,), jnp.nan), interpret=interpret)
    wanted = gemm_reference(**operands)
    relative = _RELATIVE.get(str(wanted.dtype), 1e-3)
    kernel_runs.check_close(found, wanted, relative=relative)


def _scales(*sizes):
    """One positive number for each name, or as many as said."""
    names = ("x_scale", "w_scale", "w_up_scale")
    drawn = [kernel_runs.normal(5, *size, dtype=jnp.float32) for size in sizes]
    return {name: jnp.abs(scale) for name, scale in zip(names, drawn, strict=False)}


def _float8_operands(*sizes):
    """Of a product with bias and residual."""
    operands = _operands(*sizes, parts="bias residual", dtype=jnp.float8_e4m3fn)
    operands["bias"] = operands["bias"].astype(jnp.float32)
    return operands | {"residual": operands["residual"].astype(jnp.bfloat16)}


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
def test_a_float8_product_is_scaled_by_row_and_by_tensor():
    operands = _float8_operands(130, 136, 200) | _scales((130,), ())
    tile = GemmTile(columns=256, depth=128)
    with kernel_runs.interpreting() as interpret:
        found = gemm(**operands, num_ctas=1, tile=tile, interpret=interpret)
    kernel_runs.check_close(found, gemm_reference(**operands), relative=2e-3)


def _stacked(operands, *names):
    """The operands with both factors, or their scales, in one array."""
    made = dict(operands)
    for name in names:
        made[name] = jnp.concatenate([made[name], made.pop(name.replace("w", "w_up", 1))])
    return made


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
def test_two_factors_of_one_array_are_two_arrays():
    operands = _float8_operands(130, 136, 200) | _scales((), (200,), (200,))
    operands["w_up"] = kernel_runs.normal(2, 200, 136, dtype=jnp.float8_e4m3fn)
    stacked = _stacked(operands, "w", "w_scale")
    with kernel_runs.interpreting() as interpret:
        found = gemm(**stacked, gated=True, num_ctas=2, interpret=interpret)
        apart = gemm(**operands, num_ctas=2, interpret=interpret)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(apart))
    kernel_runs.check_close(found, gemm_reference(**operands), relative=2e-3)


@pytest.mark.parametrize("shape", [(), (40,)])
def test_the_reference_of_two_factors_of_one_array_is_that_of_two_arrays(shape):
    operands = _operands(20, 128, 40, parts="gate", dtype=jnp.float8_e4m3fn)
    scales = _scales((), shape, shape)
    stacked = _stacked(operands, "w") | scales
    if shape:
        stacked |= _stacked(scales, "w_scale")
    else:
        scales["w_up_scale"] = scales["w_scale"]
        del stacked["w_up_scale"]
    found = gemm_reference(**stacked, gated=True)
    wanted = gemm_reference(**operands, **scales)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize(
    ("depth", "num_columns", "parts", "tile"),
    [
        (4096, 6144, "bias", _WIDE),
        (4096, 4096, "residual", _WIDE),
        (14336, 4096, "residual", _WIDE),
        (4096, 14336, "gate", GemmTile()),
    ],
)
@pytest.mark.parametrize("num_rows", [8, 203, 2048])
def test_products_of_llama_8b_lower_for_hopper(num_rows, depth, num_columns, parts, tile):
    names = [name for name in ("gate", "bias", "residual") if name in parts]
    fields = {"gate": "w_up", "bias": "bias", "residual": "residual"}
    shapes = {
        "x": (num_rows, depth),
        "w": (num_columns, depth),
        "w_up": (num_columns, depth),
        "bias": (num_columns,),
        "residual": (num_rows, num_columns),
    }
    wanted = ["x", "w", *(fields[name] for name in names)]

    def run(*arrays):
        return gemm(**dict(zip(wanted, arrays, strict=True)), num_ctas=100, tile=tile)

    text = kernel_runs.lowered(
        run, *(jax.ShapeDtypeStruct(shapes[name], jnp.bfloat16) for name in wanted)
    )
    assert "mosaic_gpu_v2" in text


@pytest.mark.parametrize("num_columns", [8, 40, 131])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_columns_that_fill_no_slice_lower_for_hopper(dtype, num_columns):
    shapes = [(70, 64), (num_columns, 64), (70, num_columns)]
    text = kernel_runs.lowered(
        lambda x, w, residual: gemm(x, w, residual=residual),
        *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes),
    )
    assert "mosaic_gpu_v2" in text


_F8 = jnp.float8_e4m3fn


def _shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def _scaled(x, w, x_scale, w_scale, w_up=None, w_up_scale=None, *, tile):
    scales = {"x_scale": x_scale, "w_scale": w_scale, "w_up_scale": w_up_scale}
    return gemm(x, w, w_up=w_up, **scales, num_ctas=100, tile=tile)


_WHOLE = {
    "wide": (lambda x, w: gemm(x, w, num_ctas=100, tile=_WIDE), [(2048, 4096), (6144, 4096)], None),
    "gated": (
        lambda x, w, w_up: gemm(x, w, w_up=w_up, num_ctas=100),
        [(2048, 4096), (14336, 4096), (14336, 4096)],
        None,
    ),
    "gated_of_one_array": (
        lambda x, w: gemm(x, w, gated=True, num_ctas=100),
        [(2048, 4096), (28672, 4096)],
        None,
    ),
    "bias_residual": (
        lambda x, w, b, r: gemm(x, w, bias=b, residual=r, num_ctas=100, tile=_WIDE),
        [(2003, 4096), (4096, 4096), (4096,), (2003, 4096)],
        None,
    ),
    "few_rows": (
        lambda x, w, b, r: gemm(x, w, bias=b, residual=r, num_ctas=100, tile=_FEW),
        [(61, 4096), (32768, 4096), (32768,), (61, 32768)],
        None,
    ),
    "few_rows_gated": (
        lambda x, w, w_up: gemm(x, w, w_up=w_up, num_ctas=100),
        [(64, 4096), (14336, 4096), (14336, 4096)],
        None,
    ),
    "float8": (
        lambda *arrays: _scaled(*arrays, tile=GemmTile(columns=256, depth=128)),
        [(2048, 4096), (6144, 4096)],
        [(2048,), (6144,)],
    ),
    "float8_gated": (
        lambda x, w, w_up, x_scale, *scales: _scaled(
            x, w, x_scale, scales[0], w_up, scales[1], tile=GemmTile(depth=128)
        ),
        [(2048, 4096), (14336, 4096), (14336, 4096)],
        [(), (14336,), (14336,)],
    ),
}


@pytest.mark.parametrize("name", deviceless.cases([(name,) for name in _WHOLE]))
def test_products_compile_without_spills_into_warpgroup_products(name):
    run, sizes, scales = _WHOLE[name]
    dtype = jnp.bfloat16 if scales is None else _F8
    shapes = [_shape(*size, dtype=dtype) for size in sizes]
    shapes += [_shape(*size, dtype=jnp.float32) for size in scales or ()]
    (kernel,) = deviceless.compiled(run, *shapes)
    assert kernel.grid == (100, 1, 1)
    assert kernel.spill_bytes == 0
    assert kernel.registers == 168
    assert kernel.shared_bytes <= 232448
    kind = "bf16.bf16" if scales is None else "e4m3.e4m3"
    assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k\d+\.f32\.{kind}", kernel.ptx)


@pytest.mark.parametrize("depth", [64, 128])
def test_float8_products_lower_for_hopper(depth):
    tile = GemmTile(depth=depth)
    shapes = [_shape(2048, 4096, dtype=_F8), _shape(6144, 4096, dtype=_F8)]
    shapes += [_shape(2048, dtype=jnp.float32), _shape(dtype=jnp.float32)]
    text = kernel_runs.lowered(lambda *arrays: _scaled(*arrays, tile=tile), *shapes)
    assert "mosaic_gpu_v2" in text


def test_the_reference_worked_by_hand():
    x, w = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[3.0, 4.0], [0.0, -1.0]])
    assert gemm_reference(x, w).tolist() == [[11.0, -2.0]]
    y = gemm_reference(
        x, w, bias=jnp.asarray([1.0, 2.0]), w_up=w, residual=jnp.asarray([[0.5, 7.0]])
    )
    np.testing.assert_allclose(y, [[12 / (1 + np.exp(-12)) * 11 + 0.5, 7.0]], rtol=1e-6)
    x, w = (a.astype(jnp.float8_e4m3fn) for a in (x, w))
    y = gemm_reference(x, w, x_scale=jnp.asarray([2.0]), w_scale=jnp.asarray([1.0, 0.5]))
    assert y.dtype == jnp.bfloat16
    assert y.tolist() == [[22.0, -2.0]]


_GOOD = {"x": jnp.zeros((4, 8)), "w": jnp.zeros((6, 8))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": jnp.zeros((6, 7))}, r"x\(4, 8\) and w\(6, 7\) are not \[T, D\] and \[F, D\]"),
        ({"x": jnp.zeros((0, 8))}, "must not be empty"),
        ({"x": jnp.zeros((4, 8), jnp.bfloat16)}, "x is bfloat16 and w float32; both must be"),
        ({"w_up": jnp.zeros((5, 8))}, r"w_up is float32\(5, 8\) and w float32\(6, 8\)"),
        ({"bias": jnp.zeros((5,))}, r"bias\(5,\) is not \[F\] = \(6,\)"),
        ({"residual": jnp.zeros((4, 5))}, r"residual is float32\(4, 5\), not float32\(4, 6\)"),
        (
            {"x_scale": jnp.zeros((1,))},
            r"x_scale is float32\(1,\), not float32 of shape \(\) or \(4,",
        ),
        (
            {"w_scale": jnp.zeros((), jnp.bfloat16)},
            r"w_scale is bfloat16\(\), not float32 of shape",
        ),
        ({"w_up_scale": jnp.zeros(())}, "there is a w_up_scale and no w_up"),
        (
            {"gated": True, "w_up": jnp.zeros((6, 8))},
            "gated says that w holds both factors, and there is a w_up",
        ),
        ({"gated": True}, "6 rows of both factors are no multiple of 16"),
        ({"num_ctas": 0}, "num_ctas=0 is not at least 1"),
        ({"x": jnp.zeros(())}, r"x\(\) and w\(6, 8\) are not \[T, D\] and \[F, D\]"),
        ({"x": None}, "x is a NoneType, not an array"),
        ({"bias": [1.0]}, "bias is a list, not an array"),
        ({"bias": jnp.zeros(6, jnp.int32)}, "bias is int32, not of a float dtype"),
        ({"out_dtype": jnp.int32}, "the dtype of a result is int32, not bfloat16 or float16 or"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gemm(**{**_GOOD, **change})


@pytest.mark.parametrize("fields", [{"rows": 32}, {"rows": 192}])
def test_tiles_whose_rows_are_no_products_of_warpgroups_are_refused(fields):
    with pytest.raises(ValueError, match="is no tile: rows must be 64, or a multiple of 128"):
        GemmTile(**fields)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("rows", -128),
        ("columns", 0),
        ("depth", 0),
        ("stages", 1),
        ("band", 0),
        ("slice_columns", 0),
    ],
)
def test_tiles_of_nothing_are_refused(name, number):
    with pytest.raises(ValueError, match=f"is no tile: {name} is not at least {1 + (number == 1)}"):
        GemmTile(**{name: number})


@pytest.mark.parametrize("fields", [{"columns": 320}, {"columns": 96}, {"rows": 64, "columns": 64}])
def test_tiles_whose_columns_are_no_slices_of_warpgroups_are_refused(fields):
    with pytest.raises(ValueError, match="columns of a warpgroup must be a multiple of slice_col"):
        GemmTile(**fields)


def test_default_tiles_have_as_many_stages_as_fit_into_shared_memory():
    wide = {"num_factors": 2, "out_dtype": jnp.float32}
    assert default_tile(jnp.bfloat16, 64) == GemmTile(rows=64)
    assert default_tile(jnp.bfloat16, 65, num_factors=2) == GemmTile()
    # 4 x 48 KiB of steps and 64 KiB of slices would be more than 227 KiB.
    assert default_tile(jnp.bfloat16, 65, **wide) == GemmTile(stages=3)
    assert default_tile(jnp.float32, 65, **wide) == GemmTile(depth=32, stages=3)
    assert default_tile(jnp.float8_e4m3fn, 65) == GemmTile(depth=128)


@pytest.mark.gpu
def test_products_on_a_gpu_are_their_references():
    for num_rows, parts in itertools.product([1, 203, 2048], ["", "gate", "bias residual"]):
        operands = _operands(num_rows, 4096, 1024, parts=parts)
        for num_ctas in (1, 40, 132):
            found = gemm(**operands, num_ctas=num_ctas)
            kernel_runs.check_close(found, gemm_reference(**operands), relative=5e-3)
