import dataclasses
import json

import pytest
import split_profiles

from nanoflow_jax.split.planning import profile_file
from nanoflow_jax.split.planning.profiles import NodeTimes

_TIMES = NodeTimes(prefill_s=(1e-3, 2e-6, 0.0), decode_s=(4e-4, 1e-8), row_s=1e-5)


@pytest.mark.parametrize("name", [*split_profiles.CLIENTS, *split_profiles.SERVERS])
def test_a_machine_that_is_written_is_read_again(name, tmp_path):
    profile = split_profiles.device(name)
    profile = dataclasses.replace(profile, model="llama-3-8b", times={"mlp": _TIMES})
    path = tmp_path / "device.json"
    path.write_text(profile_file.device_json(profile))
    again = profile_file.read_device(path)
    assert again.hardware.flops_per_s == pytest.approx(profile.hardware.flops_per_s)
    assert again.times["mlp"].prefill_s == pytest.approx(_TIMES.prefill_s)
    assert again.times["mlp"].row_s == pytest.approx(1e-5)
    assert (again.name, again.batch, again.model) == (profile.name, profile.batch, "llama-3-8b")
    assert again.memory_bytes == pytest.approx(profile.memory_bytes)


@pytest.mark.parametrize("name", split_profiles.LINKS)
def test_a_link_that_is_written_is_read_again(name, tmp_path):
    profile = split_profiles.link(name)
    path = tmp_path / "link.json"
    path.write_text(profile_file.link_json(profile))
    again = profile_file.read_link(path)
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        wanted = value if isinstance(value, str) else pytest.approx(value)
        assert getattr(again, field.name) == wanted


def test_an_accelerators_datasheet_gives_what_is_reached_of_it():
    hardware = split_profiles.device("h100").hardware
    assert hardware.flops_per_s == pytest.approx(0.6 * 989.5e12)
    assert hardware.memory_bytes_per_s == pytest.approx(0.8 * 3350e9)


def _written(path, change, name="phone"):
    content = json.loads((split_profiles.FOLDER / f"{name}.json").read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def _set(place, value):
    def change(content):
        *outer, last = place.split(".")
        for one in outer:
            content = content[one]
        content[last] = value

    return change


def _measured(**nodes):
    return _set("measured", {"model": "llama-3-8b", "nodes": nodes})


_MLP = {"prefill_us": [1, 2, 3], "decode_us": [1, 2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("schema", 2), "schema 2 is not 1, the one that this version reads; write the prof"),
        (lambda c: c.pop("memory_gb"), "the file.memory_gb is missing; wanted a number"),
        (_set("batch", 1.5), "the file.batch is 1.5; wanted an integer"),
        (_set("batch", 0), "batch=0 is not a positive number; check the profile"),
        (_set("weight_bits", float("inf")), "weight_bits=inf is not a positive number"),
        (_set("speed", 1), "the file has unknown fields 'speed'; remove them"),
        (_set("hardware", 3), "the file.hardware is 3; wanted an object"),
        (_set("hardware.teraflops", -1), "flops_per_s=-1000000000000.0 is not a positive number"),
        (_set("hardware.overhead_us", -1), "overhead_s=-1e-06 is not zero or a positive number"),
        (_set("hardware.more", 1), "the file.hardware has unknown fields 'more'; remove them"),
        (lambda c: c.pop("hardware"), "profile phone has neither hardware nor measured times; gi"),
        (
            _set("hardware", {"accelerator": "x", "overhead_us": 1}),
            "accelerator 'x' is not known; take one of",
        ),
        (_measured(mlp=_MLP | {"prefill_us": [1]}), "nodes['mlp'].prefill_us has 1 numbers; want"),
        (_measured(mlp=_MLP | {"decode_us": [1, "b"]}), "nodes['mlp'].decode_us[1] is 'b'; wanted"),
        (_measured(mlp=_MLP | {"x": 1}), "nodes['mlp'] has unknown fields 'x'; remove them"),
        (_measured(mlp=_MLP | {"row_us": -1}), "a coefficient of a node's time=-1e-06 is not zero"),
        (_measured(moe=_MLP), "profile phone has times of 'moe'; nodes are embedding, attention,"),
        (_measured(**{"mlp x": _MLP}), "profile phone has times of 'mlp x'; nodes are embedding,"),
        (
            _set("measured", {"model": "", "nodes": {"mlp": _MLP}}),
            "profile phone does not say whose model its times are; name it",
        ),
    ],
)
def test_a_broken_machine_is_refused_with_its_file_and_what_is_wrong(change, message, tmp_path):
    path = _written(tmp_path / "phone.json", change)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        profile_file.read_device(path)
    assert str(raised.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["rtt_ms"].pop("p95"), "the file.rtt_ms.p95 is missing; wanted a number"),
        (_set("rtt_ms.p95", 1), "link wifi: rtt_p50_s=0.025 must be at most rtt_p95_s=0.001, and"),
        (_set("rtt_ms.p50", -1), "rtt_p50_s=-0.001 is not zero or a positive number"),
        (_set("up_mbit_per_s.p10", 0), "up_p10_bytes_per_s=0.0 is not a positive number"),
        (_set("down_mbit_per_s.p10", 900), "link wifi: down_p10_bytes_per_s=1.125e+08 must be at"),
        (_set("serialisation_us", "x"), "the file.serialisation_us is 'x'; wanted a number"),
        (_set("up_mbit_per_s.p50", 3), "the file.up_mbit_per_s has unknown fields 'p50'; remove"),
    ],
)
def test_a_broken_link_is_refused_with_its_file_and_what_is_wrong(change, message, tmp_path):
    path = _written(tmp_path / "wifi.json", change, name="wifi")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        profile_file.read_link(path)
    assert str(raised.value).startswith(f"{path}: {message}")


def test_what_is_no_json_is_refused(tmp_path):
    path = tmp_path / "phone.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"phone\.json: not JSON: Expecting property name"):
        profile_file.read_device(path)


def test_a_machine_as_fast_again_takes_half_as_long():
    profile = dataclasses.replace(
        split_profiles.device("phone"), model="llama-3-8b", times={"mlp": _TIMES}
    ).scaled(2)
    assert profile.name == "phone x 2"
    assert profile.hardware.memory_bytes_per_s == 100e9
    assert profile.hardware.overhead_s == pytest.approx(1e-5)
    assert profile.times["mlp"] == NodeTimes(
        prefill_s=(5e-4, 1e-6, 0.0), decode_s=(2e-4, 5e-9), row_s=5e-6
    )
    unrowed = dataclasses.replace(_TIMES, row_s=None)
    assert dataclasses.replace(profile, times={"mlp": unrowed}).scaled(2).times["mlp"].row_s is None
    with pytest.raises(ValueError, match="speed=0 is not a positive number"):
        profile.scaled(0)
