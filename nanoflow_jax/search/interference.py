"""How fast operations run on a share of a GPU, beside others.

A share is what products keep of their speed: a product that is slowed to 60 % leaves 0.4 to others.
What those make of it is measured, and is more than 0.4: they are not bound by what products use.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from nanoflow_jax.cost import layer_work
from nanoflow_jax.nanobatch.operations import Resource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speeds:
    """Speed on a share of a GPU, as a share of that on all of it.

    Attributes:
        points: Shares and speeds, both rising from (0, 0) to (1, 1); linear between them.
        source: Where they come from.
    """

    points: Mapping[Resource, tuple[tuple[float, float], ...]]
    source: str

    def __post_init__(self) -> None:
        for resource, points in self.points.items():
            shares, speeds = zip(*points, strict=True)
            is_rising = all(np.diff(shares) > 0) and all(np.diff(speeds) >= 0)
            if points[0] != (0.0, 0.0) or points[-1] != (1.0, 1.0) or not is_rising:
                raise ValueError(
                    f"speeds of {resource.value} operations do not rise from (0, 0) to (1, 1): "
                    f"{points}; leave out points that another beats"
                )

    def speed(self, resource: Resource, share: float) -> float:
        """Speed on a share."""
        shares, speeds = zip(*self.points[resource], strict=True)
        return float(np.interp(share, shares, speeds))

    @property
    def gains_nothing(self) -> bool:
        """Whether what one operation gets others lose: side by side is no faster than in turn."""
        return all(speed <= share for points in self.points.values() for share, speed in points)

    def rounded(self, shares: Sequence[float], num_sms: int) -> "Speeds":
        """Speeds on some shares of a device of so many SMs, of which each task gets whole ones.

        Args:
            shares: Rising, the last is 1.
            num_sms: Of the device.
        """
        whole = {share: num_ctas(share, num_sms) / num_sms for share in shares}
        return Speeds(
            points={
                resource: (
                    (0.0, 0.0),
                    *((share, self.speed(resource, whole[share])) for share in shares),
                )
                for resource in self.points
            },
            source=self.source,
        )


def num_ctas(share: float, num_sms: int) -> int:
    """SMs of a share: whole ones, at least one."""
    return max(1, int(share * num_sms + 1e-6))


# The table elides .3 to .7; decode attention at .4 is from the text on its figure 6, the rest of
# the elided points are taken to lie on straight lines.
TABLE_3 = Speeds(
    points={
        Resource.COMPUTE: ((0.0, 0.0), (1.0, 1.0)),
        Resource.MEMORY: (
            *((0.0, 0.0), (0.1, 0.2), (0.2, 0.3), (0.4, 0.8)),
            *((0.8, 0.85), (0.9, 0.95), (1.0, 1.0)),
        ),
        Resource.NETWORK: (
            *((0.0, 0.0), (0.1, 0.3), (0.2, 0.5)),
            *((0.8, 0.9), (0.9, 1.0), (1.0, 1.0)),
        ),
    },
    source="NanoFlow (arXiv 2408.12757v2), Table 3 and the text on Figure 6, for an A100",
)


# Of datasheets: products use all SMs evenly, a third of the SMs can take all that memory gives (see
# `cost.layer_work`), and collectives are as in the table.
ROOFLINE = Speeds(
    points={
        Resource.COMPUTE: ((0.0, 0.0), (1.0, 1.0)),
        Resource.MEMORY: ((0.0, 0.0), (layer_work.SHARE_THAT_FILLS_MEMORY, 1.0), (1.0, 1.0)),
        Resource.NETWORK: TABLE_3.points[Resource.NETWORK],
    },
    source="how many SMs fill memory, by its bandwidth; of the network, " + TABLE_3.source,
)


def of_device(name: str) -> Speeds:
    """What is known of sharing a device of that name; of an A100 the paper measured it."""
    return TABLE_3 if name.startswith("A100") else ROOFLINE
