"""Benchmarks that ask a server, against one that is started as its users start it."""

import json
import os
import subprocess
import sys

import pytest
import served

from nanoflow_jax.bench import http_client, soak
from nanoflow_jax.workload.file import WorkRequest


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served.start(tmp_path_factory.mktemp("server"), *served.SMALL) as made:
        yield made


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    path = tmp_path_factory.mktemp("workload") / "mix.json"
    mix = [{"prompt": [50 * i + 7, 300 + i, 9], "out": 8 + i} for i in range(16)]
    path.write_text(json.dumps({"mix": mix, "one": mix[3]}))
    return path


def _bench(name, server, workload, *flags, timeout=200):
    cache = os.environ.get("NANOFLOW_TEST_CACHE", "/tmp/nanoflow-test-cache")
    command = [sys.executable, "-m", "nanoflow_jax.bench", name, f"--workload={workload}"]
    done = subprocess.run(
        [*command, f"--url={server.url}", f"--compile_cache_dir={cache}", *served.SMALL, *flags],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _soak(server, workload, path, *, seconds, timeout):
    flags = (f"--seconds={seconds}", "--concurrency=200", f"--json={path}")
    _bench("soak", server, workload, *flags, timeout=timeout)
    found = json.loads(path.read_text())
    assert found["mismatches"] == found["failures"] == found["health_failures"] == []
    assert found["pages_before"] == found["pages_after"] == 0
    assert min(found["compared"], found["slow"], found["left"], len(found["health_s"])) > 0
    return found


def test_of_200_clients_those_that_stay_get_what_is_generated_offline(server, workload, tmp_path):
    found = _soak(server, workload, tmp_path / "soak.json", seconds=4, timeout=250)
    assert found["compared"] + found["left"] >= 200
    assert set(found["memory"]) == {"engine", "front"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_is_flat_over_ten_minutes_of_200_clients(server, workload, tmp_path):
    found = _soak(server, workload, tmp_path / "soak.json", seconds=600, timeout=1100)
    for name, samples in found["memory"].items():
        warm = samples[len(samples) // 4 :]
        growth = 10 * soak.slope_per_minute(warm)
        assert growth < 0.02 * warm[0][1], name


def test_a_soak_says_what_is_wrong_with_an_answer(server):
    work = WorkRequest(prompt_ids=(7, 300, 9), output_len=3)
    expected = soak.Expected(work=work, token_ids=(0, 0, 0), text="")
    found = soak.run(http_client.Server(url=server.url), [expected], concurrency=12, seconds=0.2)
    assert found.compared > 0
    assert len(found.complaints) == len(found.mismatches) == found.compared
    assert "token 0: " in found.mismatches[0]


def test_overhead_names_each_way_and_what_it_took(server, workload):
    shown = _bench("overhead", server, workload, "--repeats=1", "--pairs=2")
    for name in ("offline: median", "server: median", "server, streaming: median"):
        assert name in shown
    assert shown.count("time to first token, one client, 2 pairs") == 2
    assert "processor time: engine" in shown


@pytest.mark.parametrize("flag", ["--stream", "--nostream"])
def test_serving_counts_the_tokens_that_were_asked_for(server, workload, flag):
    shown = _bench("serving", server, workload, "--mix=mix", "--repeats=1", flag)
    assert f"requests 16, input 48, output {sum(range(8, 24))} tokens" in shown
    assert "processor time: engine" in shown
