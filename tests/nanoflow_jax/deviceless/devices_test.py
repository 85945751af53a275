import re

import pytest

from nanoflow_jax.deviceless import devices
from pallas_kernels import mosaic


def test_devices_are_found_by_name_and_others_refused():
    assert devices.find_device("h200") is devices.find_device("H200")
    assert devices.find_device("H100").kind == "NVIDIA H100 80GB HBM3"
    with pytest.raises(ValueError, match="device 'H300' is none of H200, H100, A100, L4, L40S"):
        devices.find_device("H300")


def test_shared_memory_of_a_cta_is_that_of_an_sm_less_what_the_runtime_keeps():
    assert devices.find_device("H200").shared_bytes_per_cta == mosaic.SHARED_BYTES
    assert devices.find_device("A100").shared_bytes_per_cta == 166_912
    assert devices.find_device("L4").shared_bytes_per_cta == 101_376


@pytest.mark.parametrize(("name", "extension"), [("H200", "ACCELERATED_FEATURES"), ("L4", "NONE")])
def test_compilers_are_told_what_the_device_has(name, extension):
    device = devices.find_device(name)
    text = devices.target_config(device)
    assert text.count("{") == text.count("}")
    fields = dict(re.findall(r"(\w+): (\S+)", text))
    assert fields["core_count"] == str(device.num_sms)
    assert fields["memory_bandwidth"] == str(round(device.memory_bytes_per_s))
    assert fields["feature_extension"] == extension
