"""Exit codes and messages of programs."""

import jax
import pytest

from nanoflow_jax import console


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("no such flag"), 2, "error: no such flag"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'"),
        (MemoryError(), 2, "error: out of memory; use a smaller model or --dtype=bfloat16"),
        (console.RunError("disk full"), 1, "error: disk full"),
        (jax.errors.JaxRuntimeError("INTERNAL: x"), 1, "error: INTERNAL: x"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_a_message_and_an_exit_code(
    error: BaseException, code: int, message: str
) -> None:
    said: list[str] = []

    def program() -> int:
        raise error

    assert console.run(program, say=said.append, debug=False) == code
    assert said == [message]


def test_a_device_without_room_says_what_to_lower() -> None:
    said: list[str] = []

    def program() -> int:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")

    assert console.run(program, say=said.append, debug=False) == 1
    assert "--cache_memory_fraction" in said[0]


def test_debug_shows_where_an_error_came_from() -> None:
    said: list[str] = []

    def program() -> int:
        raise ValueError("x")

    console.run(program, say=said.append, debug=True)
    assert said[0].startswith("Traceback")
    assert "in program" in said[0]
    assert said[1] == "error: x"


def test_a_defect_is_not_hidden() -> None:
    def program() -> int:
        raise AssertionError("a broken invariant")

    with pytest.raises(AssertionError, match="a broken invariant"):
        console.run(program, say=lambda text: None, debug=False)


def test_the_programs_own_code_is_kept() -> None:
    assert console.run(lambda: 7, say=lambda text: None, debug=False) == 7
