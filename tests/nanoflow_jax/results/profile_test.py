import json
import re

import msgspec
import profile_files
import pytest
from profile_files import point

from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.results import profile

_POINTS = (point("o", 128, 1e-3, 1.2e-3), point("o", 256, 2e-3, 2e-3, num_ctas=4, tile="big"))
_PAIRS = (profile_files.pair(128, 64, 6, 3e-3),)


def test_a_profile_is_read_as_it_was_written(tmp_path):
    whole = profile_files.made(*_POINTS, num_sms=8, pairs=_PAIRS)
    path = profile.path_of(tmp_path, whole.device, "toy")
    assert path == tmp_path / "toy-1" / "toy.json"
    profile.write(whole, path)
    assert profile.read(path) == whole
    # A line for each point, so that versions of a file can be compared.
    assert sum('"operation"' in line for line in path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ((), "it has no points"),
        ((point("o", 128, 1.0), point("o", 128, 2.0)), "o of 128 tokens is there twice"),
        ((point("o", 128),), "o of 128 tokens took [] seconds; wanted some above 0"),
        ((point("o", 128, 0.0),), "o of 128 tokens took [0.0] seconds; wanted some above 0"),
        ((point("o", 0, 1.0),), "o of 0 tokens has rows below 1, or a context below 0"),
        ((point("o", 1, 1.0, num_ctas=9),), "o of 1 tokens: 9 SMs of 8 cannot be used"),
    ],
)
def test_what_nobody_can_have_measured_is_neither_written_nor_read(tmp_path, points, message):
    whole = profile_files.made(*points, num_sms=8)
    path = tmp_path / "toy.json"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        profile.write(whole, path)
    path.write_text(profile.to_json(whole))
    with pytest.raises(
        ValueError, match=re.escape(f"toy.json is no profile of this version: {message}")
    ):
        profile.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-40], "Input data was truncated"),
        (lambda text: "no JSON", "JSON is malformed"),
        (lambda text: text.replace('"tokens": 128', '"tokens": "x"'), r"Expected `int`, got `str`"),
        (lambda text: text.replace('"schema": 1', '"schema": 9'), "its schema is 9, and this vers"),
        (lambda text: text.replace('"dtype"', '"type"'), "missing required field `dtype`|unknown"),
    ],
)
def test_a_broken_file_is_a_message_that_names_it(tmp_path, change, message):
    path = tmp_path / "toy.json"
    profile.write(profile_files.made(*_POINTS, num_sms=8), path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"toy.json is no profile of this version.*{message}"):
        profile.read(path)


def test_a_file_that_is_not_there_or_cannot_be_written_is_a_message(tmp_path):
    with pytest.raises(ValueError, match=r"profile .*none.json cannot be read: No such file"):
        profile.read(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"toy.json cannot be written: (Not a dir|File exists)"):
        profile.write(profile_files.made(*_POINTS, num_sms=8), tmp_path / "file" / "toy.json")


def test_a_folder_is_searched_for_the_one_profile_of_a_model(tmp_path):
    with pytest.raises(ValueError, match="has no profile of toy; measure one with search profile"):
        profile.find(tmp_path, "toy")
    for device in ("one", "two"):
        (tmp_path / device).mkdir()
        (tmp_path / device / "toy.json").write_text("")
        assert profile.find(tmp_path / device, "toy") == tmp_path / device / "toy.json"
        if device == "one":
            assert profile.find(tmp_path, "toy") == tmp_path / "one" / "toy.json"
    with pytest.raises(ValueError, match=r"profiles of toy on several devices: .*; name one"):
        profile.find(tmp_path, "toy")


def test_a_profile_of_another_model_devices_or_kernels_is_refused(tmp_path):
    sizes = profile.sizes_of(huggingface.read_config(presets.load("mixtral-8x7b")))
    assert sizes["num_experts"] == 8
    whole = profile_files.made(*_POINTS, num_sms=8, sizes=sizes)
    path = tmp_path / "toy.json"

    def check(found, **asked):
        asked = {"sizes": sizes, "num_devices": 1, **asked}
        profile.check_fits(found, path, project=tmp_path, **asked)

    check(whole)
    with pytest.raises(ValueError, match="another model, toy: hidden_size 4096 instead of 64;"):
        check(whole, sizes={**sizes, "hidden_size": 64})
    with pytest.raises(ValueError, match="of layers that 1 devices share, not 8; measure with"):
        check(whole, num_devices=8)
    stale = msgspec.structs.replace(whole, kernel_sources={"pallas_kernels/gemm.py": "0" * 64})
    with pytest.raises(ValueError, match=r"is stale: pallas_kernels/gemm.py changed since 2026-"):
        check(stale)


def test_the_text_of_a_profile_is_json_of_all_its_fields():
    whole = profile_files.made(*_POINTS, num_sms=8, pairs=_PAIRS)
    assert json.loads(profile.to_json(whole)).keys() == set(whole.__struct_fields__)
