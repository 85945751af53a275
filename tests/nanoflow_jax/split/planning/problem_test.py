import dataclasses

import pytest
import split_profiles

from nanoflow_jax.cost.node_work import NodeKind
from nanoflow_jax.split.planning import problem
from nanoflow_jax.split.planning.asked import Policy, Prices, Request, Side
from nanoflow_jax.split.planning.costs import Accounting, NodeCosts
from nanoflow_jax.split.planning.profiles import NodeTimes

_MODEL = split_profiles.model()
_REQUEST = Request(prompt_len=512, output_len=129, ttft_s=1.0, tpot_s=0.1)


def _build(policy=None, request=_REQUEST, **changes):
    ends = {
        "client": split_profiles.device("laptop"),
        "server": split_profiles.device("h100"),
        "link": split_profiles.link("wifi"),
    }
    policy = policy or Policy(guard=1.0)
    return problem.build(_MODEL, **(ends | changes), request=request, policy=policy)


def _node(kind, layer=None):
    return next(n for n in _MODEL.nodes if n.kind is kind and n.layer == layer)


def test_times_of_unmeasured_nodes_are_the_rooflines():
    built = _build()
    mlp = built.units[2]
    weights = 3 * 4096 * 14336
    # A step of one row reads 4.5-bit weights and a few activations at 90 GB/s, and its overhead.
    read = weights * 4.5 / 8 + 2 * (4096 + 2 * 14336 + 14336 + 4096)
    assert mlp.decode[Side.CLIENT] / 1e12 == pytest.approx(read / 90e9 + 15e-6, 1e-9)
    # A prompt of 512 tokens computes, at 4 TFLOP/s.
    assert mlp.prefill[Side.CLIENT] / 1e12 == pytest.approx(2 * 512 * weights / 4e12 + 15e-6, 1e-9)
    # Each of 16 rows of the server is charged its products, 128 times.
    assert mlp.decode_charge / 1e12 == pytest.approx(128 * 2 * weights / (0.6 * 989.5e12), 1e-6)
    attention = built.units[1]
    cached = (512 + 64) * 2 * 8 * 128 * 2
    assert attention.decode_charge / 1e12 == pytest.approx(128 * cached / (0.8 * 3350e9), 0.05)


def test_messages_carry_token_ids_hidden_states_or_one_position():
    built = _build()
    latency = 0.045 / 2 + 200e-6  # of the slow round trips
    up, down = 20e6 / 8, 50e6 / 8
    for unit, prompt_bytes, step_bytes in (
        (built.units[0], 4 * 512, 4),
        (built.units[1], 8192 * 512, 8192),
        (built.units[65], 8192, 8192),
    ):
        for enter, num_bytes in (
            (unit.enter_prefill, prompt_bytes),
            (unit.enter_decode, step_bytes),
        ):
            assert enter[Side.SERVER] / 1e12 == pytest.approx(latency + num_bytes / up)
            assert enter[Side.CLIENT] / 1e12 == pytest.approx(latency + num_bytes / down)
    assert built.deliver / 1e12 == pytest.approx(latency + 4 / down)
    kv = 512 * 2 * 8 * 128 * 2
    assert built.units[1].migrate[Side.CLIENT] / 1e12 == pytest.approx(kv / down)
    assert built.units[2].migrate == (0, 0)
    assert built.units[65].migrate == (0, pytest.approx(4 / up * 1e12, abs=1))


def test_a_link_on_average_is_quicker_than_deadlines_count():
    careful, usual = (
        problem.Network(split_profiles.link("wifi"), is_careful).message_s(1e6, Side.SERVER)
        for is_careful in (True, False)
    )
    assert usual == pytest.approx(0.025 / 2 + 200e-6 + 1e6 / (40e6 / 8))
    assert careful == pytest.approx(0.045 / 2 + 200e-6 + 1e6 / (20e6 / 8))


def test_units_of_a_grid_are_as_engines_of_pieces_cut():
    built = _build(Policy(grid=12))
    assert [(u.start, u.stop) for u in built.units] == [(0, 25), (25, 49), (49, 66)]
    whole = _build(Policy(grid=32))
    fine = _build()
    (unit,) = whole.units
    assert unit.decode == tuple(sum(u.decode[side] for u in fine.units) for side in Side)
    assert unit.memory == pytest.approx(sum(u.memory for u in fine.units), abs=66)


def test_memory_of_a_client_is_its_weights_and_cached_tokens():
    built = _build()
    assert built.units[2].memory == 3 * 4096 * 14336 * 4.5 / 8
    kv = (512 + 129) * 2 * 8 * 128 * 2
    attention = (2 * 32 + 2 * 8) * 128 * 4096 * 4.5 / 8
    assert built.units[1].memory == attention + kv


def test_deadlines_are_for_long_outputs_and_charges_for_usual_ones():
    high = dataclasses.replace(_REQUEST, output_len_high=300)
    usual, longer = _build(), _build(request=high)
    assert (usual.num_steps, longer.num_steps) == (128, 299)
    assert longer.units[1].decode > usual.units[1].decode
    assert longer.units[1].decode_charge == usual.units[1].decode_charge


def test_a_single_token_has_no_time_between_tokens():
    built = _build(request=dataclasses.replace(_REQUEST, output_len=1))
    assert (built.num_steps, built.limits.tpot) == (0, None)
    assert built.units[1].decode_charge == 0


_TIMES = NodeTimes(prefill_s=(1e-3, 2e-6, 1e-9), decode_s=(4e-4, 1e-7), row_s=1e-5)


def test_measured_times_go_before_the_hardware_a_nodes_own_before_its_kinds():
    own = dataclasses.replace(_TIMES, decode_s=(8e-4, 0.0))
    device = dataclasses.replace(
        split_profiles.device("h100"), model="llama-3-8b", times={"mlp": _TIMES, "mlp 3": own}
    )
    costs = NodeCosts(_MODEL, device)
    mlp, third = _node(NodeKind.MLP, 0), _node(NodeKind.MLP, 3)
    assert costs.prefill_s(mlp, 100) == pytest.approx(1e-3 + 2e-4 + 1e-5)
    assert costs.decode_s(mlp, 1000) == pytest.approx(5e-4)
    assert costs.decode_s(third, 1000) == pytest.approx(8e-4)
    average, marginal = Accounting.AVERAGE, Accounting.MARGINAL
    assert costs.prefill_charge_s(mlp, 100, average) == pytest.approx(1.21e-3)
    assert costs.prefill_charge_s(mlp, 100, marginal) == pytest.approx(2.1e-4)
    assert costs.decode_charge_s(mlp, 1000, average) == pytest.approx(5e-4 / 16)
    assert costs.decode_charge_s(mlp, 1000, marginal) == pytest.approx(1e-5 + 1e-4 / 16)
    head = _node(NodeKind.HEAD)
    assert costs.decode_s(head, 1) == NodeCosts(_MODEL, split_profiles.device("h100")).decode_s(
        head, 1
    )


def test_a_share_of_the_average_is_never_under_what_is_added():
    for name in split_profiles.SERVERS:
        costs = NodeCosts(_MODEL, split_profiles.device(name))
        for node in _MODEL.nodes[:3] + _MODEL.nodes[-1:]:
            for tokens in (1, 100, 4000):
                for charge in (costs.prefill_charge_s, costs.decode_charge_s):
                    added, share = (
                        charge(node, tokens, one)
                        for one in (Accounting.MARGINAL, Accounting.AVERAGE)
                    )
                    assert 0 <= added <= share


def _unrowed():
    times = {kind: dataclasses.replace(_TIMES, row_s=None) for kind in NodeKind}
    return dataclasses.replace(split_profiles.device("h100"), model="llama-3-8b", times=times)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: _build(Policy(pinned_first=20, pinned_last=13)),
            "20 first and 13 last layers are",
        ),
        (lambda: _build(Policy(held_layers=((0, 33),))), "the client cannot hold layers 0:33 of"),
        (lambda: _build(Policy(held_layers=((3, 3),))), "the client cannot hold layers 3:3 of"),
        (
            lambda: _build(Policy(held_layers=((8, 32),), pinned_first=1)),
            "embedding may run nowhere: it is pinned to both sides, or to a client that does not",
        ),
        (
            lambda: _build(Policy(pinned_first=1, embedding=Side.SERVER)),
            "embedding may run nowhere",
        ),
        (
            lambda: _build(Policy(held_layers=((0, 6), (31, 32)), pinned_first=5, grid=8)),
            "embedding to mlp 7 are placed together by grid=8, but some must run on the client",
        ),
        (
            lambda: _build(request=dataclasses.replace(_REQUEST, prompt_len=8100)),
            "8100 tokens in and 129 out are more than the 8192 that llama-3-8b sees; ask for fewer",
        ),
        (
            lambda: _build(
                Policy(accounting=Accounting.PRICED),
                request=dataclasses.replace(_REQUEST, tpot_s=None),
            ),
            "priced accounting charges memory for as long as a request may last; give an end-to-",
        ),
        (
            lambda: _build(
                server=dataclasses.replace(split_profiles.device("h100"), memory_bytes=1e10)
            ),
            "the server's 10 GB do not hold 16.1 GB of weights of llama-3-8b; describe",
        ),
        (lambda: _build(server=_unrowed()), "profile h100-class has no row_us of embedding, which"),
        (
            lambda: _build(client=dataclasses.replace(_unrowed(), model="x")),
            "profile h100-class has times of x, not of llama-3-8b; measure this model",
        ),
        (
            lambda: _build(
                client=dataclasses.replace(_unrowed(), hardware=None, times={"mlp": _TIMES})
            ),
            "profile h100-class has neither times of embedding nor hardware; add one",
        ),
        (
            lambda: Request(prompt_len=0, output_len=1),
            "prompt_len=0 is under 1; a prompt has a tok",
        ),
        (lambda: Request(prompt_len=1, output_len=0.5), "output_len=0.5 is under 1; ask for a tok"),
        (
            lambda: Request(prompt_len=1, output_len=9, output_len_high=8),
            "output_len_high=8 is under output_len=9, the average",
        ),
        (lambda: Request(prompt_len=1, output_len=9, ttft_s=0), "ttft_s=0 is no deadline; give a"),
        (lambda: Policy(guard=1.1), r"guard=1.1 is outside \(0, 1\]; 0.9 keeps a tenth in hand"),
        (lambda: Policy(grid=-1), "grid=-1 is negative; give 0 or more"),
        (lambda: Policy(activation_bytes=0), r"activation_bytes=0 is outside \(0, 4\]"),
        (lambda: Policy(least_saving=1), r"least_saving=1 is outside \[0, 1\); 0.1 is a tenth"),
        (lambda: Policy(max_labels=3), "max_labels=3 is under 16; too few to plan with"),
        (lambda: Prices(second=-1), "the price second=-1 is not zero or a positive number"),
    ],
)
def test_what_contradicts_itself_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
