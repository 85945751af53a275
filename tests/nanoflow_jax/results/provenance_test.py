import pathlib

import pytest

from nanoflow_jax.results import provenance


def test_a_kernels_sources_are_its_own_and_what_it_imports_from_its_room(
    checkout: pathlib.Path,
) -> None:
    (checkout / "pallas_kernels" / "deep.py").write_text(
        "import numpy\nimport pallas_kernels.toy\nfrom pallas_kernels.other import x\n"
    )
    found = provenance.kernel_sources(["deep"], project=checkout)
    assert list(found) == [f"pallas_kernels/{n}.py" for n in ("deep", "other", "pieces", "toy")]
    assert provenance.kernel_sources([], project=checkout) == {}


def test_the_sources_of_the_fused_kernel_are_found_in_this_project() -> None:
    found = provenance.kernel_sources(["decode_attention"])
    assert {"pallas_kernels/mosaic.py", "pallas_kernels/decode_role.py"} <= found.keys()
    with pytest.raises(ValueError, match=r"none\.py is no kernel: No such file"):
        provenance.kernel_sources(["none"])


def test_the_processor_has_a_name_and_cores() -> None:
    found = provenance.processor()
    assert found.platform == "cpu"
    assert found.name
    assert found.count >= 1
    assert found.folder.startswith("cpu-")
