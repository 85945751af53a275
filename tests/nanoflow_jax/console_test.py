"""Exit codes and messages of programs."""

import subprocess
import sys

import jax
import pytest
from absl import app, flags

from nanoflow_jax import console


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> flags.FlagValues:
    made = flags.FlagValues()
    flags.DEFINE_integer("port", 8000, "Port.", flag_values=made)
    flags.DEFINE_flag(app.HelpFlag(), made)
    monkeypatch.setattr(console.flags, "FLAGS", made)
    return made


def test_flags_are_taken_and_other_arguments_are_left(values: flags.FlagValues) -> None:
    assert console.parse_flags(["program", "--port=80", "word"]) == ["program", "word"]
    assert values["port"].value == 80


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--prot=80", "error: Unknown command line flag 'prot'. Did you mean: port ?\n"),
        ("--port=x", "error: flag --port=x: invalid literal for int() with base 10: 'x'\n"),
        (
            "--flagfile=/none/x",
            "error: Unable to open flagfile: [Errno 2] No such file or directory: '/none/x'\n",
        ),
    ],
)
def test_a_wrong_flag_is_a_message_and_exit_code_two(
    values: flags.FlagValues, argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        console.parse_flags(["program", argument])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{message}--help lists all flags\n"


def test_help_is_no_error(values: flags.FlagValues, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        console.parse_flags(["program", "--help"])
    assert ended.value.code == 0
    assert "--help" in capsys.readouterr().out


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


def test_a_program_that_does_without_jax_does_not_import_it() -> None:
    code = "import sys; from nanoflow_jax import console; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


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
