import base64

import pytest

from nanoflow_jax.serve import keys


def test_without_keys_everybody_may_come_in():
    made = keys.ApiKeys.load("", {})
    assert not made.are_needed
    assert made.open_to(None)
    assert made.open_to(b"Bearer ")


def test_a_key_of_the_file_or_of_the_environment_opens(tmp_path):
    path = tmp_path / "keys"
    path.write_text("first\n\n second \n")
    made = keys.ApiKeys.load(str(path), {"NANOFLOW_API_KEY": "third"})
    for key in (b"first", b"second", b"third"):
        assert made.open_to(b"Bearer " + key)
        assert made.open_to(b"Basic " + base64.b64encode(b"user:" + key))
    for wrong in (None, b"", b"Bearer", b"Bearer ", b"Bearer firs", b"Token first", b"Basic !"):
        assert not made.open_to(wrong)


def test_a_file_without_keys_is_refused(tmp_path):
    path = tmp_path / "keys"
    with pytest.raises(ValueError, match=r"--api_key_file=.* cannot be read"):
        keys.ApiKeys.load(str(path), {})
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no key"):
        keys.ApiKeys.load(str(path), {})
