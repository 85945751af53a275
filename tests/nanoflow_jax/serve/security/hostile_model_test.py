"""C3, C4: a model folder is data; its template has limits, and a request brings none."""

import json
import pathlib
import pickle
import shutil

import pytest
import served

import checkpoints.embedded

_CHAT = "/v1/chat/completions"
_TEMPLATE = """
{%- if messages[0].content == 'loop' -%}
    {%- for i in range(99999) -%}{%- for j in range(99999) -%}{%- endfor -%}{%- endfor -%}
{%- elif messages[0].content == 'grow' -%}
    {%- set ns = namespace(s='0123456789') -%}
    {%- for i in range(60) -%}{%- set ns.s = ns.s ~ ns.s -%}{%- endfor -%}{{ ns.s }}
{%- elif messages[0].content == 'sort' -%}
    {%- set x = range(99999) | list -%}
    {%- for i in range(99999) -%}{%- set y = x | sort -%}{%- endfor -%}
{%- elif messages[0].content == 'recurse' -%}
    {%- macro f() -%}{{ f() }}{%- endmacro -%}{{ f() }}
{%- elif messages[0].content == 'class' -%}
    {{ ''.__class__.__mro__[1].__subclasses__() }}
{%- elif messages[0].content == 'globals' -%}
    {{ raise_exception.__globals__['__builtins__']['open']('RAN', 'w') }}
{%- elif messages[0].content == 'import' -%}
    {% import 'os' as os %}{{ os.system('touch RAN') }}
{%- elif messages[0].content == 'cycler' -%}
    {{ cycler.__init__.__globals__.os.popen('touch RAN').read() }}
{%- else -%}
    {{ messages[0].content }}{{ style }}
{%- endif -%}
"""


class _Payload:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self._path,))


def _copy(folder):
    """The embedded model in a folder that may be changed."""
    source = pathlib.Path(next(iter(checkpoints.embedded.__path__)))
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder


def _add_code(folder, ran):
    """Everything that other programs run or unpickle when they find it."""
    text = f"open({str(ran)!r}, 'w')"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py"):
        (folder / name).write_text(text)
    for name in ("sitecustomize.py", "conftest.py", "json.py", "numpy.py", "setup.py"):
        (folder / name).write_text(text)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pkl"):
        (folder / name).write_bytes(pickle.dumps(_Payload(ran)))
    classes = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    tokenizer = {"AutoTokenizer": ["tokenization_x.Tokenizer", None]}
    for name, more in (("config.json", classes), ("tokenizer_config.json", tokenizer)):
        path = folder / name
        config = {**json.loads(path.read_text()), "auto_map": more}
        config.pop("chat_template", None)
        path.write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(_TEMPLATE.replace("RAN", str(ran)))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere") / "ran"


@pytest.fixture(scope="module")
def server(tmp_path_factory, ran):
    place = tmp_path_factory.mktemp("server")
    model = _copy(place / "model")
    _add_code(model, ran)
    with served.start(place, *served.SMALL, f"--model={model}") as made:
        yield made


def _chat(server, content, **more):
    messages = [{"role": "user", "content": content}]
    return server.ask(_CHAT, {"messages": messages, "max_tokens": 2, "temperature": 0, **more})


def test_c3_a_model_with_code_beside_it_is_served_and_nothing_of_it_runs(server, ran):
    status, answer = _chat(server, "hi")
    assert status == 200, answer
    body = {"prompt": "x", "max_tokens": 1, "structured_outputs": {"choice": ["a"]}}
    assert server.ask("/v1/completions", body)[0] == 200
    assert not ran.exists()


@pytest.mark.parametrize("content", ["class", "globals", "import", "cycler"])
def test_c3_a_template_reaches_nothing_but_its_variables(server, ran, content):
    status, answer = _chat(server, content)
    assert status == 400 or "<class" not in json.dumps(answer)
    assert not ran.exists()
    assert server.ask("/health")[0] == 200


@pytest.mark.parametrize("content", ["loop", "grow", "sort", "recurse"])
def test_c4_a_template_without_end_is_stopped_and_others_are_served(server, content):
    known = _chat(server, "hi")[1]["choices"]
    status, answer = _chat(server, content)
    assert status == 400
    assert "the chat template" in answer["error"]["message"]
    assert server.ask("/health") == (200, {"status": "ready"})
    assert _chat(server, "hi")[1]["choices"] == known


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"chat_template": "{{ 1 }}"}, "'chat_template' is no field"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "are not for the template"),
        ({"chat_template_kwargs": {"messages": []}}, "are not for the template"),
        ({"chat_template_kwargs": {"tokenize": False}}, "are not for the template"),
        ({"chat_template_kwargs": {f"k{i}": 1 for i in range(33)}}, "are more than 32"),
        ({"chat_template_kwargs": "style"}, "is not an object"),
    ],
)
def test_c4_a_request_brings_no_template(server, more, message):
    for path in (_CHAT, "/tokenize"):
        body = {"messages": [{"role": "user", "content": "hi"}], **more}
        status, answer = server.ask(path, body)
        assert status == 400
        assert message in answer["error"]["message"]


def test_c4_of_template_arguments_those_that_the_template_names_count(server):
    def tokens(**kwargs):
        body = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": kwargs}
        status, answer = server.ask("/tokenize", body)
        assert status == 200, answer
        return answer["tokens"]

    assert tokens(style="x") != tokens()
    own = {"raise_exception": "x", "range": "x", "eos_token": "x", "not_named": "x"}
    assert tokens(**own) == tokens()


def _lying(config):
    config["hidden_size"] *= 2


def _strange(config):
    config["num_hidden_layers"] = -1


def _immense(config):
    config["vocab_size"] = 10**12


@pytest.mark.parametrize("change", [_lying, _strange, _immense])
def test_c3_a_config_that_lies_is_a_message(tmp_path, change):
    model = _copy(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    change(config)
    (model / "config.json").write_text(json.dumps(config))
    made = served.launch(tmp_path, *served.SMALL, f"--model={model}")
    assert made.process.wait(timeout=120) in (1, 2)
    assert "Traceback" not in made.log
    assert len(made.log.splitlines()[-1]) > 20


def test_c3_weights_that_are_pickles_are_not_read(tmp_path):
    model = _copy(tmp_path / "model")
    (model / "model.safetensors").unlink()
    _add_code(model, tmp_path / "ran")
    made = served.launch(tmp_path, *served.SMALL, f"--model={model}")
    assert made.process.wait(timeout=120) in (1, 2)
    assert not (tmp_path / "ran").exists()
    assert "a pickle, which" in made.log
    assert "Traceback" not in made.log
