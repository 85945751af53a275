"""The program's messages and exit codes, in processes of their own: its flags are global."""

import json
import pathlib

import batch_runs
import pytest

_WORKLOAD = {"small": {"prompt": [1, 2, 3], "out": 2}}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["serving"], 2, "error: --workload=FILE is missing: a JSON file of request mixes\n"),
        (
            ["speed"],
            2,
            "error: name one benchmark: throughput, invariance, serving, overhead, soak, "
            "gpu_check, kernels, ablation, split\n",
        ),
        (
            ["serving", "--workload=w.json", "--json=none/rows.json"],
            2,
            "error: --json=none/rows.json cannot be written: No such file or directory\n",
        ),
        (
            ["serving", "--workload=w.json", "--url=https://example.org"],
            2,
            "error: --url=https://example.org is not of the form http://HOST:PORT\n",
        ),
        (
            ["kernels", "--kernels=softmax"],
            2,
            "error: --kernels: softmax not among gemm, decode_attention, prefill_attention, "
            "grouped_gemm, fused\n",
        ),
        (
            ["invariance", "--workload=w.json", "--buckets=4:4:1"],
            2,
            "error: --buckets=4:4:1: the setting has one bucket and the engine without it several; "
            "leave the flag out\n",
        ),
        (["kernels", "--device_check"], 0, ""),
        *(
            (
                [name, "--workload=w.json", "--url=http://127.0.0.1:1"],
                1,
                "error: http://127.0.0.1:1 did not answer (<urlopen error [Errno 111] Connection "
                "refused>); start the server, or give its --url\n",
            )
            for name in ("serving", "overhead", "soak")
        ),
    ],
)
def test_what_cannot_be_measured_is_one_message(
    arguments: list[str], code: int, message: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "w.json").write_text(json.dumps(_WORKLOAD))
    done = batch_runs.bench(tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (code, message)
