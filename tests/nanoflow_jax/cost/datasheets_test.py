"""Devices that somebody describes in a file."""

import json

import pytest

from nanoflow_jax.cost import datasheets

_DEVICE = {
    "name": "Accelerator X",
    "num_sms": 96,
    "teraflops": 450,
    "memory_gb": 64,
    "memory_gb_per_s": 2600,
}


def _write(tmp_path, **changes):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**_DEVICE, **changes}))
    return str(path)


def test_a_device_is_what_its_file_says(tmp_path):
    path = _write(tmp_path, link_gb_per_s=100)
    found = datasheets.accelerator(path)
    assert found == datasheets.Datasheet(
        name="Accelerator X",
        num_sms=96,
        bf16_flops=450e12,
        memory_bytes=64e9,
        memory_bytes_per_s=2600e9,
        link_bytes_per_s=100e9,
        source=path,
    )
    assert datasheets.accelerator(_write(tmp_path)).link_bytes_per_s == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teraflops": 0}, "device.teraflops is 0; wanted a number above 0"),
        ({"memory_gb": -1}, "device.memory_gb is -1; wanted a number above 0"),
        ({"num_sms": 1.5}, "device.num_sms is 1.5; wanted a whole number"),
        ({"num_sms": "many"}, "device.num_sms is 'many'; wanted a number"),
        ({"speed": 1}, "speed"),
    ],
)
def test_a_file_that_describes_no_device_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        datasheets.accelerator(_write(tmp_path, **changes))


def test_a_file_that_is_not_there_is_a_message(tmp_path):
    with pytest.raises(ValueError, match=r"x\.json: No such file or directory"):
        datasheets.accelerator(str(tmp_path / "x.json"))


def test_a_device_that_is_not_known_may_be_described():
    with pytest.raises(ValueError, match=r"'x9' is not known; take one of .* or describe it in"):
        datasheets.accelerator("x9")
