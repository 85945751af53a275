"""What the flags of generate mean, and the words for those that cannot be meant."""

import pytest
from absl import flags

from nanoflow_jax.generate import command_line


def _values(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    command_line.define(values)
    values(["generate", *arguments])
    return values


def test_only_given_sampling_flags_become_defaults() -> None:
    assert command_line.sampling(_values()) == {}
    found = command_line.sampling(
        _values(
            "--max_tokens=5",
            "--temperature=0",
            "--ignore_eos",
            "--stop=a",
            "--stop=b",
            "--n=2",
            "--top_k=4",
        )
    )
    assert found == {
        "max_tokens": 5,
        "temperature": 0.0,
        "ignore_eos": True,
        "stop": ["a", "b"],
        "n": 2,
        "top_k": 4,
    }


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--temperature=-1", "temperature=-1.0 is not a number"),
        ("--max_tokens=0", "max_tokens=0 is not an integer from 1 to 2147483647"),
        ("--top_p=2", "top_p=2.0 is not a number"),
        ("--seed=99999999999999999999", "seed=99999999999999999999 is not an integer"),
    ],
)
def test_sampling_flags_are_checked_before_anything_runs(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command_line.sampling(_values(argument))


def test_a_prompt_is_text_or_token_ids_or_in_a_file() -> None:
    assert command_line.prompt(_values("--prompt=a b")) == "a b"
    assert command_line.prompt(_values("--prompt=")) == ""
    assert command_line.prompt(_values("--prompt_ids=1,2,3")) == [1, 2, 3]
    assert command_line.prompt(_values("--input=a", "--output=b")) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to do: give --prompt="),
        (("--output=b",), "nothing to do"),
        (("--prompt=a", "--input=b"), "--prompt and --input are both given; give one of them"),
        (("--prompt=a", "--prompt_ids=1"), "--prompt and --prompt_ids are both given"),
        (("--input=a",), "--input needs --output=OUT.jsonl beside it"),
        (("--prompt=a", "--output=b"), "--output goes with --input; the text of --prompt is print"),
        (("--prompt_ids=1,x",), "--prompt_ids=1,x are not whole numbers with commas"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command_line.prompt(_values(*arguments))


def test_the_quickstart_file_comes_with_the_package() -> None:
    assert command_line.input_path("package:quickstart.jsonl").is_file()
    assert str(command_line.input_path("some/file")) == "some/file"
    with pytest.raises(ValueError, match=r"the package has quickstart\.jsonl, and no 'x'"):
        command_line.input_path("package:x")
