"""Operations of a layer by kernels beside those of the plain path; engine.kernel_choice_test has
what the kernels refuse.
"""

import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest

from nanoflow_jax.models import kernel_operations
from nanoflow_jax.models.architecture import Activation
from nanoflow_jax.models.operations import ANYWHERE, PLAIN, Operations, Place, after

# The plain path rounds to bfloat16 after the product and after bias, gate and residual.
_RELATIVE = 1e-2


def _operations(interpret):
    options = {"num_ctas": 2, "interpret": interpret}
    return Operations(
        products=kernel_operations.KernelProducts(**options),
        experts=kernel_operations.KernelExperts(**options),
    )


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
def test_a_product_is_the_plain_one():
    x, w = kernel_runs.normal(0, 20, 64), kernel_runs.normal(1, 48, 64)
    given = {"bias": kernel_runs.normal(2, 48), "residual": kernel_runs.normal(3, 20, 48)}
    with kernel_runs.interpreting() as interpret:
        found = _operations(interpret).product(x, w, **given)
    kernel_runs.check_close(found, PLAIN.product(x, w, **given), relative=_RELATIVE)


@pytest.mark.parametrize(
    ("activation", "has_bias", "is_fused"),
    [
        (Activation.SILU, False, True),
        (Activation.SILU, True, False),
        (Activation.GELU_TANH, False, False),
    ],
)
def test_a_gated_product_without_bias_is_one_kernel_with_its_silu(activation, has_bias, is_fused):
    assert kernel_operations.is_fused(activation, has_bias=has_bias) is is_fused


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
def test_a_gated_product_whose_activation_is_xlas_is_the_plain_one():
    x, gate_up = kernel_runs.normal(0, 20, 64), kernel_runs.normal(1, 2, 48, 64)
    given = {"bias": kernel_runs.normal(2, 2, 48), "activation": Activation.GELU_TANH}
    with kernel_runs.interpreting() as interpret:
        found = _operations(interpret).gated_product(x, gate_up, **given)
    wanted = PLAIN.gated_product(x, gate_up, **given)
    kernel_runs.check_close(found, wanted, relative=_RELATIVE)


def _through_experts(operations):
    """Ten tokens, each through two of three experts; none goes to the last one."""
    x = kernel_runs.normal(0, 10, 64)
    gate_up, down = kernel_runs.normal(1, 3, 128, 64), kernel_runs.normal(2, 3, 64, 64)
    random = np.random.default_rng(3)
    experts = jnp.asarray(np.stack([random.permutation(2) for _ in range(10)]), jnp.int32)
    shares = jnp.asarray(random.random((10, 2)), jnp.float32)
    groups = operations.experts.group(experts, num_experts=3)
    rows = operations.experts.spread(x, groups)
    hidden = operations.gated_expert_product(rows, gate_up, groups, activation=Activation.GELU_TANH)
    out = operations.expert_product(hidden, down, groups)
    return operations.experts.combine(out, groups, shares)


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_tokens_leave_experts_whose_activation_is_xlas_as_on_the_plain_path():
    with kernel_runs.interpreting() as interpret:
        found = _through_experts(_operations(interpret))
    kernel_runs.check_close(found, _through_experts(PLAIN), relative=_RELATIVE)


def _traced(operations):
    """A product's trace, as text."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((256, 64), (512, 64))]
    return str(jax.make_jaxpr(operations.product)(*shapes))


def test_a_place_says_how_many_sms_a_product_takes_and_after_what():
    made = Operations(
        products=kernel_operations.KernelProducts(num_ctas=7, interpret=None), experts=PLAIN.experts
    )
    token = jnp.zeros((3,))
    for place, num_ctas in ((ANYWHERE, 7), (Place(num_ctas=5), 5), (Place(token=token), 7)):
        text = _traced(made.at(place))
        assert f"Mesh(grid=({num_ctas},)" in text
        assert ("f32[3]" in text) is (place.token is not None)


def test_what_xla_makes_comes_after_a_token():
    x, token = jnp.ones((2, 64)), jnp.zeros((3,))
    assert after(x, None) is x

    def run(x, token):
        return PLAIN.at(Place(token=token, num_ctas=4)).product(x, x)

    text = jax.jit(run).lower(x, token).as_text()
    assert "optimization_barrier %arg0, %arg1" in text
    np.testing.assert_array_equal(run(x, token), PLAIN.product(x, x))
