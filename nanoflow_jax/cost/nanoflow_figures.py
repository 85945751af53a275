"""What NanoFlow's paper prints of A100s: times of operations, its ablation, and its throughputs.

Source: NanoFlow (arXiv 2408.12757v2), Table 2 and Figures 7, 8, 9 and 11.
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
        offloaded: The same, and what is cached is copied to the host meanwhile.
    """

    sequential: float
    split: float
    overlapped: float
    offloaded: float


# By prompt and output tokens.
FIGURE_9: Mapping[Mix, Throughputs] = {
    Mix(prompt_len=prompt_len, output_len=output_len): Throughputs(
        sequential=sequential, split=split, overlapped=overlapped, offloaded=offloaded
    )
    for prompt_len, output_len, sequential, split, overlapped, offloaded in (
        (512, 0, 1273, 1171, 1446, 1402),
        (512, 512, 1106, 982, 1323, 1290),
        (1024, 512, 1092, 958, 1291, 1259),
        (512, 1024, 1048, 952, 1277, 1244),
    )
}
CALIBRATED_BY = Mix(prompt_len=512, output_len=512)

# Tokens/s a device of LLaMA-2-70B on 8 A100s, by lengths or trace.
FIGURE_7: Mapping[str, float] = {
    "512/512": 1286,
    "1024/512": 1263,
    "512/1024": 1212,
    "splitwise": 1259,
    "lmsys": 1247,
    "sharegpt": 1272,
}

# Mean normalised latency in seconds, by requests/s, read off the curve that the authors' repository
# draws: the best of three dense batches at each rate.
FIGURE_8: Mapping[str, Mapping[float, float]] = {
    "splitwise": {3: 0.10, 6: 0.12, 7: 0.14, 8: 0.18, 9: 0.235, 12: 0.69},
    "lmsys": {20: 0.10, 28: 0.15, 32: 0.20, 36: 0.38},
    "sharegpt": {11: 0.105, 14: 0.14, 16: 0.205, 19: 0.24, 22: 0.62},
}


class OtherModel(NamedTuple):
    """A bar of figure 11: 1024/512.

    Attributes:
        devices: A100s.
        dense_batch: Of its configuration.
        tokens_per_s: A device.
    """

    devices: int
    dense_batch: int
    tokens_per_s: float


FIGURE_11: Mapping[str, OtherModel] = {
    "llama-3-8b": OtherModel(1, 1024, 12_756),
    "llama-3-70b": OtherModel(8, 2048, 1306),
    "qwen2-72b": OtherModel(8, 2048, 1213),
}
