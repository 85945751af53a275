"""What NanoFlow's paper prints of LLaMA-2-70B on 8 A100s: times of operations, and its ablation.

Source: NanoFlow (arXiv 2408.12757v2), Table 2 and Figure 9.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from nanoflow_jax.cost.steady_state import Mix

LAYERS, TOKENS, DEVICES = 80, 2048, 8


class Times(NamedTuple):
    """Of an operation, in milliseconds of all layers.

    Attributes:
        bound: The longest of what computing, memory and links need.
        measured: What it took.
    """

    bound: float
    measured: float


TABLE_2: Mapping[str, Times] = {
    "kqv": Times(11.01, 16.08),
    "o": Times(8.81, 16.01),
    "up_gate": Times(61.67, 69.92),
    "down": Times(30.84, 34.96),
    "decode_attention": Times(28.89, 35.60),
    "prefill_attention": Times(0.37, 4.56),
    "collectives": Times(31.33, 47.92),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughputs:
    """Input and output tokens a second and device, as in a column of Figure 9.

    Attributes:
        sequential: Nothing is split, one operation runs after another.
        split: Split, one after another.
        overlapped: Split, side by side.
    """

    sequential: float
    split: float
    overlapped: float


# By prompt and output tokens.
FIGURE_9: Mapping[Mix, Throughputs] = {
    Mix(prompt_len=512, output_len=0): Throughputs(sequential=1273, split=1171, overlapped=1446),
    Mix(prompt_len=512, output_len=512): Throughputs(sequential=1106, split=982, overlapped=1323),
    Mix(prompt_len=1024, output_len=512): Throughputs(sequential=1092, split=958, overlapped=1291),
    Mix(prompt_len=512, output_len=1024): Throughputs(sequential=1048, split=952, overlapped=1277),
}
CALIBRATED_BY = Mix(prompt_len=512, output_len=512)
