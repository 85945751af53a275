import resource

import pytest

from nanoflow_jax.serve import open_files

_NO_END = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "room"),
    [
        (1024, 8192, 4352, 4096),
        (1024, _NO_END, 4352, 4096),
        (1024, 2048, 2048, 2048 - 256),
        (5000, 5000, None, 4096),
        (_NO_END, _NO_END, None, 4096),
        (100, 100, 100, 1),
    ],
)
def test_f9_the_limit_of_open_files_is_raised_as_far_as_it_goes(
    monkeypatch, soft, hard, raised, room
):
    seen = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: seen.append(limits))
    assert open_files.connection_room(4096) == room
    assert seen == ([] if raised is None else [(raised, hard)])
