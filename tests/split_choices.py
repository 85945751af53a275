"""The toy model as a planner sees it, and ends between which it is shared."""

import dataclasses

import split_model
import split_profiles

from nanoflow_jax.split.planning.asked import Policy
from nanoflow_jax.split.planning.choosing import Chooser, Ends
from nanoflow_jax.split.planning.costs import Accounting, Model
from nanoflow_jax.split.planning.profiles import DeviceProfile, LinkProfile, NodeTimes

BORDERS = (0, 2, 4, 6)
OUTER = ((0, 2), (4, 6))
WHOLE = ((0, 6),)


def model(num_layers=split_model.NUM_LAYERS, hidden_size=split_model.WIDTH):
    """A model of so many alike layers."""
    config = split_profiles.model().config
    changed = dataclasses.replace(
        config, num_layers=num_layers, hidden_size=hidden_size, windows=config.windows[:num_layers]
    )
    return Model("toy", changed)


def device(name, *, layer_us):
    """A machine on which each layer takes so long, for each token of a prompt or step."""
    half_s = layer_us * 1e-6 / 2
    layer = NodeTimes(prefill_s=(0.0, half_s, 0.0), decode_s=(half_s, 0.0))
    end = NodeTimes(prefill_s=(half_s, 0.0, 0.0), decode_s=(half_s, 0.0))
    return DeviceProfile(
        name=name,
        source="made up",
        memory_bytes=1e15,
        weight_bits=16,
        kv_bits=16,
        batch=1,
        model="toy",
        times={"embedding": end, "attention": layer, "mlp": layer, "head": end},
    )


def link(*, rtt_ms, mbyte_per_s=1000.0):
    """A link that is always the same."""
    rate = mbyte_per_s * 1e6
    return LinkProfile(
        name="line",
        source="made up",
        rtt_p50_s=rtt_ms * 1e-3,
        rtt_p95_s=rtt_ms * 1e-3,
        up_bytes_per_s=rate,
        up_p10_bytes_per_s=rate,
        down_bytes_per_s=rate,
        down_p10_bytes_per_s=rate,
        serialisation_s=0.0,
    )


def ends(*, rtt_ms=1.0, client_us=10.0, server_us=10.0, mbyte_per_s=1000.0, **of_model):
    """A client and a server with a line between them."""
    return Ends(
        model=model(**of_model),
        client=device("client", layer_us=client_us),
        server=device("server", layer_us=server_us),
        link=link(rtt_ms=rtt_ms, mbyte_per_s=mbyte_per_s),
    )


def policy(held=OUTER, **changes):
    """Cuts at `BORDERS`."""
    return Policy(
        **(
            {
                "accounting": Accounting.AVERAGE,
                "borders": BORDERS,
                "held_layers": held,
                "least_saving": 0.1,
            }
            | changes
        )
    )


def chooser(held=OUTER, *, changes=None, weight=0.5, **of_ends):
    """One for `ends`, with changes of the policy."""
    return Chooser(ends(**of_ends), policy(held, **(changes or {})), weight=weight)
