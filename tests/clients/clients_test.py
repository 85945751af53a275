"""Clients of other makers against the server, each with a script over all that it offers.

They lie in the folder that the environment variable NANOFLOW_CLIENTS names: `openai` (the newest),
`openai2` and `schemathesis` are Python environments, `node` has a node_modules with openai.
`.ci/run` makes it.
"""

import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import pytest
import served

_HERE = pathlib.Path(__file__).parent
_CLIENTS = pathlib.Path(os.environ.get("NANOFLOW_CLIENTS", "/nonexistent"))
_PYTHONS = {"openai": "[3-9]", "openai2": "2"}
_NODE = shutil.which("node")
_KEY = "sk-of-a-test"
_MOST_S = 1500
# Some requests ask for a hundred long choices: a short context and a short queue end them soon.
_SHORT = (
    *("--max_requests=16", "--dense_batch=64", "--max_context_len=64", "--max_queue=32"),
    "--tool_format=hermes",
)
_NUM_EXAMPLES = int(os.environ.get("NANOFLOW_SCHEMATHESIS_EXAMPLES", "200"))


def _needs(path: pathlib.Path) -> pytest.MarkDecorator:
    reason = f"NANOFLOW_CLIENTS names no folder with {path.relative_to(_CLIENTS)}"
    return pytest.mark.skipif(not path.exists(), reason=reason)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[served.Served]:
    flags = (*served.SMALL, "--max_queue=8", "--tool_format=hermes")
    folder = tmp_path_factory.mktemp("server")
    with served.start(folder, *flags, NANOFLOW_API_KEY=_KEY) as made:
        yield made


def _run(folder: pathlib.Path, command: Sequence[str | pathlib.Path], **environment: str) -> str:
    """Runs a client in a folder that it may fill; what it printed."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_MOST_S,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=_needs(_CLIENTS / n / "bin" / "python")) for n in _PYTHONS]
)
def test_every_feature_serves_the_openai_sdk(
    server: served.Served, tmp_path: pathlib.Path, name: str
) -> None:
    script = _HERE / "openai_features.py"
    said = _run(tmp_path, [_CLIENTS / name / "bin" / "python", script, server.url, _KEY])
    assert re.match(rf"openai {_PYTHONS[name]}\.", said)
    features = re.findall(r"^def \w+\(client: OpenAI\) -> None:$", script.read_text(), re.M)
    assert said.count("\nok ") == len(features)


@pytest.mark.timeout(600)
@pytest.mark.skipif(_NODE is None, reason="there is no node")
@_needs(_CLIENTS / "node" / "node_modules" / "openai")
def test_every_feature_serves_the_openai_sdk_of_node(
    server: served.Served, tmp_path: pathlib.Path
) -> None:
    assert _NODE is not None
    script = _HERE / "openai_features.cjs"
    modules = {"NODE_PATH": str(_CLIENTS / "node" / "node_modules")}
    said = _run(tmp_path, [_NODE, script, server.url, _KEY], **modules)
    assert said.count("\nok ") == len(re.findall(r"^  \w+,$", script.read_text(), re.M))


@pytest.mark.timeout(1800)
@_needs(_CLIENTS / "schemathesis" / "bin" / "schemathesis")
def test_no_request_gets_an_answer_that_the_description_does_not_know(
    tmp_path: pathlib.Path,
) -> None:
    with served.start(tmp_path, *_SHORT, NANOFLOW_API_KEY=_KEY) as made:
        said = _run(
            tmp_path,
            [
                _CLIENTS / "schemathesis" / "bin" / "schemathesis",
                "--no-color",
                f"--config-file={_HERE / 'schemathesis.toml'}",
                "run",
                f"{made.url}/openapi.json",
                f"--header=Authorization: Bearer {_KEY}",
                f"--max-examples={_NUM_EXAMPLES}",
                "--phases=examples,coverage,fuzzing",
                # No schema can say all that a body must fulfil; see the hooks.
                "--exclude-checks=positive_data_acceptance",
                "--continue-on-failure",
                "--request-timeout=120",
                "--seed=1",
            ],
            SCHEMATHESIS_HOOKS="schemathesis_hooks",
            PYTHONPATH=str(_HERE),
        )
    assert "Operations:       18 selected / 18 total" in said, said
