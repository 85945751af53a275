"""Lengths of requests in public traces, as quantiles.

Source: worked out from the traces that NanoFlow's evaluation uses: Azure's LLM inference trace of
2023, conversations (CC-BY), and the first rounds of LMSYS-Chat-1M and of ShareGPT.
"""

import dataclasses

# Of each column below: steps of 2.5 % and, where lengths change fast, finer.
PROBABILITIES = (
    *(0.0, 0.005, 0.01),
    *(i / 40 for i in range(1, 39)),
    *(0.98, 0.985, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 1.0),
)


@dataclasses.dataclass(frozen=True)
class Quantiles:
    """One column of a trace.

    Attributes:
        values: Tokens at each of `PROBABILITIES`; linear between them.
        last_exponent: Shape of the last part instead: it rises with this power, which gives the
            column its mean and its deviation.
    """

    values: tuple[int, ...]
    last_exponent: float


@dataclasses.dataclass(frozen=True)
class Range:
    """Requests whose prompts have up to so many tokens, and more than the range before.

    Attributes:
        longest: Prompt tokens.
        mean: Of normal scores whose ranks are those of their outputs; fitted so that the mean
            output of the range comes out.
        deviation: Of these.
    """

    longest: float
    mean: float
    deviation: float


@dataclasses.dataclass(frozen=True)
class Trace:
    """A trace.

    Attributes:
        inputs: Prompt tokens.
        outputs: Generated tokens.
        correlation: Of their normal scores, where one number tells how they go together: what
            gives their logarithms the correlation that they have in the trace.
        ranges: How outputs go with prompts where it does not: two uses share this trace.
    """

    inputs: Quantiles
    outputs: Quantiles
    correlation: float = 0.0
    ranges: tuple[Range, ...] = ()


def _tokens(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


TRACES = {
    "splitwise": Trace(
        inputs=Quantiles(
            _tokens(
                "2 17 29 120 181 200 207 235 372 379 387 393 396 400 403 407 414 428 703 922 "
                "984 1005 1020 1034 1045 1058 1071 1083 1097 1112 1130 1153 1189 1277 1315 1434 "
                "1876 2309 2734 4075 4083 4098 4110 4142 4831 5652 6179 6570 7112 14050"
            ),
            last_exponent=0.5,
        ),
        outputs=Quantiles(
            _tokens(
                "7 14 16 28 41 48 54 60 67 72 77 82 85 88 91 93 96 99 103 108 113 120 129 139 "
                "151 162 177 195 217 373 384 391 395 396 400 406 411 416 424 430 451 540 571 "
                "601 643 917 954 1000 1000 1000"
            ),
            last_exponent=1.0,
        ),
        ranges=(
            Range(32, -0.128, 0.327),
            Range(128, -1.28, 1.345),
            Range(512, -0.576, 0.597),
            Range(1024, 0.742, 0.929),
            Range(1500, 1.005, 0.794),
            Range(3072, -0.775, 0.596),
            Range(float("inf"), -1.116, 0.689),
        ),
    ),
    "lmsys": Trace(
        inputs=Quantiles(
            _tokens(
                "2 2 2 2 3 4 6 7 8 9 10 11 12 13 14 15 16 18 19 21 23 25 28 30 33 36 40 44 50 "
                "57 66 72 82 89 109 136 179 234 302 360 432 639 682 750 876 1060 1320 1530 1832 "
                "3894"
            ),
            last_exponent=13.78,
        ),
        outputs=Quantiles(
            _tokens(
                "1 2 2 3 8 10 12 15 19 23 28 33 39 46 54 62 71 81 90 101 113 126 140 157 176 "
                "196 216 237 257 277 298 318 339 361 384 411 442 482 512 513 520 690 759 850 "
                "899 1004 1062 1509 1827 4819"
            ),
            last_exponent=20.06,
        ),
        correlation=0.232,
    ),
    "sharegpt": Trace(
        inputs=Quantiles(
            _tokens(
                "1 2 2 4 7 8 9 10 11 12 13 14 16 17 18 19 21 23 25 27 29 32 36 40 45 51 58 67 "
                "78 90 106 128 158 200 258 343 448 600 829 1158 1625 2736 3046 3473 4130 5853 "
                "7887 10803 16661 241402"
            ),
            last_exponent=3.73,
        ),
        outputs=Quantiles(
            _tokens(
                "1 3 5 10 20 29 39 53 71 88 102 116 130 145 161 178 193 209 224 239 253 267 280 "
                "294 308 323 338 353 369 386 404 423 445 471 501 534 573 621 683 760 846 955 "
                "975 999 1041 1090 1153 1336 2086 37622"
            ),
            last_exponent=5.22,
        ),
        correlation=0.12,
    ),
}
