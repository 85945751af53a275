import mmap
import os
import subprocess
import sys

import pytest

from nanoflow_jax.serve import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")


def test_memory_that_a_process_takes_is_seen():
    before = memory.resident_bytes(os.getpid())
    # Pages of its own: an allocator may have some left that are resident already.
    with mmap.mmap(-1, 64 << 20) as taken:
        taken.write(bytes([1]) * len(taken))
        after = memory.resident_bytes(os.getpid())
        assert after - before > len(taken) // 2


def test_a_process_that_is_gone_has_no_figure():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert memory.resident_bytes(gone.pid) is None
    assert list(memory.of_server(gone.pid)) == ["front"]
    assert list(memory.of_server(None)) == ["front"]
