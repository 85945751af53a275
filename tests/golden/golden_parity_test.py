import pathlib
import subprocess
import sys

import pytest
from golden.cases import CASES

_HERE = pathlib.Path(__file__).resolve().parent


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_the_committed_case_again(case):
    pytest.importorskip("transformers")
    made = subprocess.run(
        [sys.executable, str(_HERE / "make.py"), f"--check={_HERE}", f"--family={case}"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert made.returncode == 0, made.stdout + made.stderr
