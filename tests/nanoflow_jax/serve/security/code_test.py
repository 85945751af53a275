"""C1, C2: no code and no object comes in over the network or out of a file."""

import ast
import asyncio
import importlib
import pathlib
import socket

import pytest
import whole_app

from nanoflow_jax.engine_process import client
from nanoflow_jax.serve import page_routes

_PACKAGES = ("nanoflow_jax", "checkpoints", "pallas_kernels")
_FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "_pickle", "joblib"}
_FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
    "importlib.import_module",
    "runpy.run_path",
}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _is_true(call: ast.Call, name: str) -> bool:
    return any(
        keyword.arg == name
        and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
        for keyword in call.keywords
    )


def _faults(text: str) -> list[str]:
    """What of a module could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            called = _dotted(node.func)
            if called in _FORBIDDEN_CALLS or _is_true(node, "shell"):
                found.append(called)
            if _is_true(node, "allow_pickle") or _is_true(node, "trust_remote_code"):
                found.append(called)
        found += [name for name in names if name.partition(".")[0] in _FORBIDDEN_MODULES]
    return found


def test_c1_nothing_in_the_packages_unpickles_or_evaluates():
    paths = [
        path
        for name in _PACKAGES
        for path in pathlib.Path(importlib.import_module(name).__path__[0]).rglob("*.py")
    ]
    assert len(paths) > 100
    assert {str(path): found for path in paths if (found := _faults(path.read_text()))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from marshal import loads",
        "def f():\n    import shelve",
        "eval('1')",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_c1_the_gate_finds_what_it_looks_for(text):
    assert _faults(text)
    assert not _faults("np.load(path, allow_pickle=False)\nre.compile('a')\nmodel.eval()")


def test_c1_the_engine_is_reached_by_a_socket_pair_that_has_no_name(monkeypatch):
    pairs = []

    def noting_pair(*args, **kwargs):
        pairs.append(made(*args, **kwargs))
        return pairs[-1]

    async def no_process(*args, pass_fds, **kwargs):
        (fd,) = pass_fds
        assert fd == pairs[0][1].fileno()
        raise ValueError("no process in this test")

    made = socket.socketpair
    engine = client.EngineClient(client.config_lib.EngineConfig(), say=lambda text: None)

    async def run():
        # Not before the loop is there, which has a pair of its own.
        monkeypatch.setattr(socket, "socketpair", noting_pair)
        monkeypatch.setattr(asyncio, "create_subprocess_exec", no_process)
        names = []
        monkeypatch.setattr(
            client.socket.socket, "setsockopt", lambda end, *args: names.append(end.getsockname())
        )
        with pytest.raises(ValueError, match="no process in this test"):
            await engine._run_once()
        return names

    assert asyncio.run(run()) == ["", ""]
    assert len(pairs) == 1
    assert all(end.family is socket.AF_UNIX for end in pairs[0])


# What may be asked of a server: texts, token ids, numbers, and rows of batches, which are JSON.
# Nothing here takes code, weights, templates, paths or handles; whoever adds a route adds it here.
_ROUTES = {
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/page/stats"),
    ("GET", "/v1/batches"),
    ("GET", "/v1/batches/{batch_id}"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model:path}"),
    ("GET", "/version"),
    ("HEAD", "/openapi.json"),
    ("DELETE", "/v1/files/{file_id}"),
    ("POST", "/detokenize"),
    ("POST", "/start_profile"),
    ("POST", "/stop_profile"),
    ("POST", "/tokenize"),
    ("POST", "/v1/batches"),
    ("POST", "/v1/batches/{batch_id}/cancel"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/files"),
}


def test_c2_every_route_is_known_to_take_no_code_objects_or_weights(tmp_path):
    with whole_app.make(tmp_path) as made:
        found = set(whole_app.routes(made))
    files = {(method, path) for method in ("GET", "HEAD") for path in page_routes.PAGE_PATHS}
    assert found == _ROUTES | files
