"""What every kernel asks of what it is given, before the compiler would say it in its own words."""

import math
from typing import Any

import jax
import jax.numpy as jnp

# What results may be rounded to.
OUT_DTYPES = ("bfloat16", "float16", "float32")


def check_count(name: str, value: Any, hint: str = "") -> None:
    """Raises ValueError unless it is an int from 1 on.

    Args:
        name: That the caller knows it by.
        value: What came.
        hint: What else may be given; ends the message.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value} is a {type(value).__name__}, not an int{hint}")
    if value < 1:
        raise ValueError(f"{name}={value} is not at least 1{hint}")


def check_arrays(**arrays: Any) -> None:
    """Raises ValueError unless all are arrays of numbers; optional ones go through `given` first.

    Args:
        arrays: By the name that the caller knows.
    """
    for name, array in arrays.items():
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            raise ValueError(f"{name} is a {type(array).__name__}, not an array")
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
            raise ValueError(
                f"{name} is {array.dtype}{array.shape}, not an array of numbers; "
                "jax.random.key_data makes one of keys"
            )


def given(**arrays: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: array for name, array in arrays.items() if array is not None}


def check_out_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of a result.

    Raises:
        ValueError: It is none of `OUT_DTYPES`.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in OUT_DTYPES:
        said = dtype if found is None else found.name
        raise ValueError(f"the dtype of a result is {said}, not {' or '.join(OUT_DTYPES)}")
    return found


def check_scores(*, scale: Any, window: Any, softcap: Any) -> None:
    """Raises ValueError unless these say what becomes of attention's products of queries and keys.

    Args:
        scale: Factor on them.
        window: Newest tokens a query sees, itself included, or None.
        softcap: Most that a score may be, or None.
    """
    _check_finite("scale", scale)
    if window is not None:
        check_count("window", window, "; None sees all tokens")
    if softcap is not None:
        _check_finite("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap={softcap} is not above 0; None leaves scores alone")


def _check_finite(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value} is a {type(value).__name__}, not a finite number")
