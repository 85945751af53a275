import json
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from checkpoints import safetensors_file, tensor_types
from checkpoints.errors import CheckpointError
from checkpoints.safetensors_file import SafetensorsFile


def _file(header: object, buffer: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + buffer


def _entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


_FOUR = b"abcd"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is 0 bytes, less than the 8"),
        (b"1234567", "is 7 bytes, less than the 8"),
        (b"\xff" * 20, "says its header is 18446744073709551615 bytes, but the file has 12"),
        ((200_000_000).to_bytes(8, "little"), "says its header is 200000000 bytes"),
        (_file({})[:-1], "says its header is 2 bytes, but the file has 1"),
        (_file(b""), "must be 0 bytes that begin with '{', got 0"),
        (_file(b" {}"), "begin with '{', got 3 that begin with b' {}'"),
        (_file(b"{]"), "the header is not JSON"),
        (_file(b'{"\xff": 1}'), "the header is not UTF-8"),
        (_file(b'{"a":' * 100_000), "nests JSON too deeply"),
        (_file(b'{"a": 1, "a": 2}'), "has the key 'a' twice"),
        (
            _file(b'{"a":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}', b"a"),
            "has the key 'dtype' twice",
        ),
        (_file({"__metadata__": []}), "__metadata__ must map names to strings, got"),
        (_file({"__metadata__": {"a": 1}}), "__metadata__ must map names to strings, got"),
        (_file({"": _entry()}, _FOUR), "tensor '': a name must be printable and not empty"),
        (_file({"a\n": _entry()}, _FOUR), r"tensor 'a\\n': a name must be printable"),
        (_file(b'{"\\ud800": {}}', _FOUR), r"tensor '\\ud800': a name must be printable"),
        (_file({"a": 5}), "tensor 'a': wanted an object with dtype, shape and data_offsets, got 5"),
        (_file({"a": {"dtype": "U8"}}), "wanted an object with dtype, shape and data_offsets"),
        (_file({"a": _entry() | {"x": 1}}, _FOUR), "wanted an object with dtype, shape and"),
        (_file({"a": _entry("F4")}, _FOUR), "tensor 'a': dtype 'F4' is not read here"),
        (_file({"a": _entry(shape=[-4])}, _FOUR), "shape must be a list of whole numbers"),
        (_file({"a": _entry(shape=[2**62, 4])}, _FOUR), "is larger than an array can be"),
        (_file({"a": _entry(offsets=[0])}, _FOUR), r"data_offsets must be \[begin, end\]"),
        (_file({"a": _entry(offsets=[4, 0])}, _FOUR), r"data_offsets must be \[begin, end\]"),
        (_file({"a": _entry(offsets=[-4, 0])}, _FOUR), r"data_offsets must be \[begin, end\]"),
        (_file({"a": _entry(offsets=[0, 4.0])}, _FOUR), r"data_offsets must be \[begin, end\]"),
        (_file({"a": _entry(offsets=[False, 4])}, _FOUR), r"data_offsets must be \[begin, end\]"),
        (_file({"a": _entry(offsets="04")}, _FOUR), r"data_offsets must be \[begin, end\]"),
        (_file({"a": _entry("F32")}, _FOUR), r"F32 of shape \[4\] takes 16 bytes.* span 4"),
        (
            _file({"a": _entry(offsets=[1, 5])}, b"x" + _FOUR),
            "'a' begins at byte 1 of the buffer and leaves a gap after",
        ),
        (
            _file({"a": _entry(), "b": _entry(offsets=[2, 6])}, _FOUR * 2),
            "'b' begins at byte 2 of the buffer and overlaps the one before it, which ends at 4",
        ),
        (_file({"a": _entry()}, _FOUR[:3]), "describes a file of .* bytes, got"),
        (_file({"a": _entry()}, _FOUR + b"e"), "describes a file of .* bytes, got"),
        (_file({}, b"e"), "describes a file of 10 bytes, got 11"),
        (_file({"a": _entry(offsets=[2**70, 2**70 + 4])}, _FOUR), "leaves a gap after"),
    ],
)
def test_c10_a_malicious_file_is_refused_with_its_fault(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsFile(path)
    assert str(error.value).startswith(str(path))


def test_a_header_over_the_limit_is_not_read_even_if_the_file_has_it(tmp_path: Path) -> None:
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="no header is over 100000000"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_missing_file_says_what_to_download(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no such file; download the whole"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_an_unreadable_file_is_reported_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.safetensors").write_bytes(_file({}))

    def fail(descriptor: int, num_bytes: int, *, access: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(mmap, "mmap", fail)
    with pytest.raises(CheckpointError, match=r"cannot be read .*Input/output error.*the disk"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_file_made_by_hand_is_read_as_it_says(tmp_path: Path) -> None:
    header = {
        "b": _entry("I16", [1, 2], [1, 5]),
        "__metadata__": {"format": "pt"},
        "a": _entry("U8", [], [0, 1]),
        "none": _entry("F32", [0, 3], [5, 5]),
    }
    (tmp_path / "x.safetensors").write_bytes(_file(header, b"\x07\x01\x00\xff\xff"))
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert list(file.tensors) == ["a", "b", "none"]
    assert file.view("a").shape == ()
    assert file.view("a") == 7
    assert file.view("b").tolist() == [[1, -1]]  # Not aligned to its item size, too.
    assert file.view("none").shape == (0, 3)
    info = safetensors_file.read_header(tmp_path / "x.safetensors")["b"]
    assert (info.name, info.dtype, info.shape, info.nbytes) == ("b", np.int16, (1, 2), 4)
    assert (info.file, info.start) == (tmp_path / "x.safetensors", file.file_bytes - 4)


def test_what_is_written_is_read_bit_by_bit(
    tmp_path: Path, tensors: dict[str, np.ndarray], assert_same: Callable[..., None]
) -> None:
    safetensors_file.write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "np"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "np"}
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(file.view(name), tensor)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_view_is_read_only_and_shares_the_file(tmp_path: Path) -> None:
    safetensors_file.write_safetensors(tmp_path / "x", {"a": np.arange(1000)})
    view = SafetensorsFile(tmp_path / "x").view("a")
    assert not view.flags.writeable
    assert not view.flags.owndata


def test_giving_back_memory_leaves_views_valid(tmp_path: Path) -> None:
    safetensors_file.write_safetensors(tmp_path / "x", {"a": np.arange(100_000)})
    file = SafetensorsFile(tmp_path / "x")
    view = file.view("a")
    assert view.sum() == 4999950000
    file.give_back_memory()
    assert view.sum() == 4999950000


def test_a_file_that_shrinks_while_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    safetensors_file.write_safetensors(tmp_path / "x", {"a": np.arange(100_000)})
    file = SafetensorsFile(tmp_path / "x")
    os.truncate(tmp_path / "x", 5000)
    with pytest.raises(CheckpointError, match=r"was .* bytes and is now 5000; it changed while"):
        file.view("a")


def test_a_dtype_without_a_name_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="complex128 has no safetensors name"):
        safetensors_file.write_safetensors(tmp_path / "x", {"a": np.zeros(1, np.complex128)})
    assert not list(tmp_path.iterdir())


def test_a_broken_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors_file.write_safetensors(tmp_path / "x", {"a": np.arange(3)})

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        safetensors_file.write_safetensors(tmp_path / "x", {"a": np.arange(4)})
    assert SafetensorsFile(tmp_path / "x").view("a").tolist() == [0, 1, 2]


def _try_open(path: Path) -> SafetensorsFile | CheckpointError:
    try:
        return SafetensorsFile(path)
    except CheckpointError as error:
        return error


_SHARED_FOLDER = settings(
    max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@_SHARED_FOLDER
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=3),
    cut=st.one_of(st.none(), st.integers(0, 10**6)),
    more=st.binary(max_size=3),
)
@example(flips=[], cut=None, more=b"")
def test_c10_a_damaged_file_is_refused_or_read_as_the_reference_reads_it(
    tmp_path: Path,
    tensors: dict[str, np.ndarray],
    flips: list[tuple[int, int]],
    cut: int | None,
    more: bytes,
) -> None:
    reference = pytest.importorskip("safetensors")
    whole, path = tmp_path / "whole.safetensors", tmp_path / "x.safetensors"
    if not whole.exists():
        safetensors_file.write_safetensors(whole, {n: tensors[n] for n in list(tensors)[:5]})
    data = bytearray(whole.read_bytes())
    num_header = 8 + int.from_bytes(data[:8], "little")
    for at, value in flips:  # Mostly the header: any bytes are fine in the buffer.
        data[at % (num_header + 4)] = value
    if cut is not None:
        del data[cut % len(data) :]
    data += more
    path.write_bytes(data)
    file = _try_open(path)
    if isinstance(file, CheckpointError):
        assert str(file).startswith(str(path))
        assert flips or cut is not None or more
        return
    wanted = dict(reference.deserialize(bytes(data)))
    assert set(wanted) == set(file.tensors)
    for name, tensor in wanted.items():
        info = file.tensors[name]
        assert (tensor_types.dtype_code(info.dtype), list(info.shape)) == (
            tensor["dtype"],
            tensor["shape"],
        )
        assert file.view(name).tobytes() == bytes(tensor["data"])


_NUMBERS = st.lists(
    st.one_of(st.integers(-1, 9), st.sampled_from([2**63, True, None, 1.0])), max_size=3
)
_ENTRIES = st.builds(
    _entry,
    st.sampled_from(["U8", "F16", "F32", "F4", 1]),
    st.one_of(st.sampled_from([[], [1], [2], [2, 1], [0]]), _NUMBERS),
    st.one_of(st.sampled_from([[0, 1], [1, 2], [0, 2], [2, 4], [0, 4], [0, 0]]), _NUMBERS),
)


@_SHARED_FOLDER
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), _ENTRIES), st.binary(max_size=8)
)
@example({"a": _entry(offsets=[4, 8]), "b": _entry(offsets=[0, 4])}, b"12345678")
def test_c10_any_header_is_refused_or_names_only_bytes_of_the_file(
    tmp_path: Path, header: dict[str, object], buffer: bytes
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(_file(header, buffer))
    file = _try_open(path)
    if isinstance(file, CheckpointError):
        return
    seen = sorted((info.start, info.start + info.nbytes) for info in file.tensors.values())
    assert [begin for begin, _ in seen] + [path.stat().st_size] == [
        path.stat().st_size - len(buffer),
        *(end for _, end in seen),
    ]
    for name, info in file.tensors.items():
        assert file.view(name).nbytes == info.nbytes


def test_the_reference_reads_what_is_written(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    reference = pytest.importorskip("safetensors")
    safetensors_file.write_safetensors(tmp_path / "x", tensors, {"format": "np"})
    read = dict(reference.deserialize((tmp_path / "x").read_bytes()))
    assert {name: bytes(entry["data"]) for name, entry in read.items()} == {
        name: tensor.tobytes() for name, tensor in tensors.items()
    }


def test_what_the_reference_writes_is_read(
    tmp_path: Path, tensors: dict[str, np.ndarray], assert_same: Callable[..., None]
) -> None:
    reference = pytest.importorskip("safetensors.numpy")
    plain = {n: t for n, t in tensors.items() if t.dtype.kind in "fib"}
    reference.save_file(plain, tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    assert set(file.tensors) == set(plain)
    for name, tensor in plain.items():
        assert_same(file.view(name), tensor)
