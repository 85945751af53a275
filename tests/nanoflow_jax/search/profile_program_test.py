import msgspec
import profile_files
import pytest
from profile_files import point

from nanoflow_jax.bench import profile_bench, profile_command, profile_points
from nanoflow_jax.bench.steady_state import Lengths, Load
from nanoflow_jax.cost import serving
from nanoflow_jax.engine import model_source
from nanoflow_jax.models import named
from nanoflow_jax.results import manifest, profile, provenance
from nanoflow_jax.search import given_profile, profile_steps
from nanoflow_jax.simulator.step_time import StepWork

_FOLDER = str(model_source.embedded_folder())
_MODEL = f"--model={_FOLDER}"
_, _CONFIG = named.read(_FOLDER)
_SOURCE = "measured on Toy 1, 2026-11-26, float32, jax 0.10.2"
_H200 = manifest.Device(platform="gpu", name="NVIDIA H200")
_LOAD = Load(lengths=Lengths(prompt=6, output=10), dense_batch=16)
# Microseconds a token, and a cached token of a row.
_PRODUCTS = {"norm_kqv": 2.0, "o": 1.0, "up_gate": 6.0, "down": 3.0, "norm": 0.1, "rope": 0.1}
_MORE = {"append": 0.1, "head": 5.0}


def _points():
    """All operations take time in proportion to what there is to do."""
    for tokens in (64, 512, 1024):
        for name, micro in (_PRODUCTS | _MORE).items():
            yield point(name, tokens, micro * tokens * 1e-6)
        for context in (64, 1024):
            for name in profile_points.ATTENTION:
                seconds = (1.0 + 0.01 * context) * tokens * 1e-6
                yield point(name, tokens, seconds, context=context)


def _write(tmp_path, *more, **fields):
    fields = {"model": "embedded", "sizes": profile.sizes_of(_CONFIG), **fields}
    path = tmp_path / "device" / "embedded.json"
    profile.write(profile_files.made(*_points(), *more, **fields), path)
    return path


@pytest.fixture
def cpu_profile(tmp_path):
    return _write(tmp_path, memory_bytes=10**11)


def test_on_a_cpu_the_plan_of_one_nano_batch_wins_by_the_profile_named(ask, cpu_profile):
    code, text, _ = ask("plan", _MODEL, f"--profile={cpu_profile.parent.parent}")
    assert code == 0
    assert f"times of operations: {_SOURCE} ({cpu_profile})" in text
    assert "speeds on shares of a device: a device without shares: what one operation gets " in text
    assert "1,024 tokens a step" in text  # as far as was measured
    assert "best plan: one, " in text


def test_the_gate_goes_by_a_profile_too(ask, cpu_profile):
    code, text, _ = ask("gate", _MODEL, f"--profile={cpu_profile}", "--dense_batch=512")
    assert code == 0
    assert "predicted by measured on Toy 1" in text
    assert "256 tokens a step: 1.000 x by one" in text
    assert text.endswith("splitting does not win\n")


def test_pairs_of_a_gpu_decide_what_overlap_gains(ask, tmp_path):
    pairs = tuple(
        profile_files.pair(512, rows, sms, 6.0 * 512e-6 / kept, product="up_gate", context=1024)
        for rows, sms, kept in ((256, 100, 0.8), (128, 120, 0.9))
    )
    path = _write(tmp_path, device=_H200, num_sms=132, pairs=pairs)
    arguments = (_MODEL, f"--profile={path}", "--dense_batch=512", "--time_limit_s=4")
    code, text, _ = ask("plan", *arguments)
    assert code == 0
    assert "embedded on 1 x H200 SXM" in text
    assert "of decode attention 1 shapes of pairs measured on NVIDIA H200" in text


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("plan", ["--device=h200"], "was measured on Toy 1, not on --device=h200; leave --device"),
        ("plan", ["--devices=2"], "is of layers that 1 devices share, not 2; measure with search"),
        ("plan", ["--dense_batch=2048"], "norm_kqv of 2,048 tokens with 0 cached: 2,048 is beyond"),
        ("plan", ["--output_len=4096"], "decode_attention of 910 tokens with 2,560 cached: 2,56"),
        ("cost", [], "cost does not go by --profile="),
        ("simulate", ["--mode=split"], "--mode and --profile="),
        ("simulate", ["--reached=nanoflow-a100"], "--reached and --profile="),
    ],
)
def test_what_a_profile_does_not_know_is_a_message(ask, cpu_profile, command, arguments, message):
    code, text, complaint = ask(command, _MODEL, f"--profile={cpu_profile}", *arguments)
    assert (code, text) == (2, "")
    assert message in complaint


def test_other_profiles_than_files_are_refused_where_they_mean_nothing(ask, tmp_path):
    for command, flag in (("simulate", "paper"), ("trace", "paper")):
        _, _, complaint = ask(command, _MODEL, f"--profile={flag}")
        assert complaint.startswith(f"error: {command} does not go by --profile={flag}: files are")
    _, _, complaint = ask("plan", "--model=llama-3-8b", f"--profile={tmp_path / 'none.json'}")
    assert "none.json cannot be read: No such file" in complaint
    path = _write(tmp_path)
    _, _, complaint = ask("plan", "--model=llama-3-8b", f"--profile={path}")
    assert f"{path} is a profile of another model, embedded: " in complaint


def test_a_step_takes_all_layers_and_the_head(cpu_profile):
    given = given_profile.read(str(cpu_profile), name=_FOLDER, config=_CONFIG, num_devices=1)
    cluster = serving.Cluster(accelerator=given.sheet, num_devices=1)
    steps = profile_steps.ProfileSteps(given, cluster)
    work = StepWork(tokens=512, decode_rows=128, decode_context=128 * 200, chunk_pairs=384 * 100)
    # 4 layers: products, attention of 128 rows that see 200 and of 384 that see 100; the head.
    wanted = 4 * (12.3 * 512 + 3.0 * 128 + 2.0 * 384) + 5.0 * 128
    assert steps.predict(work).device_s == pytest.approx(wanted * 1e-6)
    alone = steps.operations_s(StepWork(tokens=64, decode_rows=0, decode_context=0, chunk_pairs=64))
    assert alone["decode_attention"] == 0.0
    assert alone["head"] == pytest.approx(64 * 5e-6)  # no less than the fewest measured
    with pytest.raises(ValueError, match=r"norm_kqv of 2,048 tokens .* beyond 1,024"):
        steps.predict(StepWork(tokens=2048, decode_rows=1, decode_context=64, chunk_pairs=0))


def test_serving_is_simulated_with_the_steps_of_a_profile(ask, cpu_profile):
    arguments = ("--requests=20", "--input_len=100", "--output_len=20", "--dense_batch=256")
    code, text, _ = ask("simulate", _MODEL, f"--profile={cpu_profile}", *arguments)
    assert code == 0
    assert f"simulated: steps by {_SOURCE} ({cpu_profile})" in text
    assert "nothing was measured" not in text


def test_a_device_is_known_by_what_was_measured_of_it(cpu_profile):
    given = given_profile.read(str(cpu_profile), name=_FOLDER, config=_CONFIG, num_devices=1)
    # O is the product with most operations a second: 2 D N H in a microsecond.
    assert given.sheet.bf16_flops == pytest.approx(2 * 256 * 256 / 1e-6)
    assert given.sheet.memory_bytes == 10**11
    assert given.most_tokens == 1024
    empty = msgspec.structs.replace(given.file, points=(point("head", 1, 1.0),))
    with pytest.raises(ValueError, match="has no operation of a layer; measure it again"):
        given_profile.Given(file=empty, path=cpu_profile, config=_CONFIG).sheet  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device=h200"], "--device=h200: profile measures the device of this machine; leave"),
        (["--devices=2"], "profile measures layers on one device, not what several say"),
        (["--tokens=64,x"], "--tokens=64,x are not all whole numbers"),
        (["--tokens=0"], "--tokens=0: give some from 1 on"),
        (["--output=/proc/nowhere"], "--output: /proc/nowhere/"),
        (["--profile=paper"], "profile does not go by --profile=paper: files are for plan, gate"),
    ],
)
def test_what_cannot_be_measured_is_a_message(ask, arguments, message):
    code, _, complaint = ask("profile", _MODEL, *arguments)
    assert code == 2
    assert complaint.startswith(f"error: {message}")


def test_a_model_is_measured_read_and_planned_with(ask, tmp_path):
    output = f"--output={tmp_path}"
    code, text, progress = ask(
        "profile", _MODEL, "--quick", "--device=auto", "--tokens=256", "--contexts=96", output
    )
    assert code == 0
    assert "points of 12 programs, 3 samples each, about " in text
    (path,) = tmp_path.glob("cpu-*/embedded.json")
    assert len(profile.read(path).points) == 12
    assert f"{path}: embedded, measured on " in text
    assert "12 of 12 programs" in progress
    lengths = ("--input_len=64", "--output_len=64")
    code, text, _ = ask("plan", _MODEL, f"--profile={tmp_path}", "--time_limit_s=1", *lengths)
    assert code == 0
    assert str(path) in text and "256 tokens a step" in text


def test_a_profile_is_checked_on_its_own_device_alone(ask, cpu_profile):
    code, _, complaint = ask("check", _MODEL, f"--profile={cpu_profile}")
    assert code == 2
    assert complaint.startswith("error: the profile was measured on Toy 1 x1 and this is ")
    code, _, complaint = ask("check", _MODEL)
    assert code == 2
    assert complaint.startswith("error: --profile names the profile to check against measured")


@pytest.mark.slow
def test_predicted_steps_stand_beside_measured_ones(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_command.profile_check, "USUAL", (_LOAD,))
    path = _write(tmp_path, device=profile_bench.kind_of_device(), memory_bytes=10**11)
    code, text, progress = ask("check", _MODEL, f"--profile={path}")
    assert code == 0
    assert "1 of 1 loads" in progress
    source, head, row = text.splitlines()
    assert source.startswith("predicted by operations measured on ") and str(path) in source
    requests, tokens, decoded, cached, predicted, median, *_ = row.split()
    assert (requests, tokens) == ("6/10", "16")
    assert 0 < int(decoded) <= 16 and 6 <= int(cached) <= 16
    # In proportion to what was measured at 64 tokens, the fewest.
    assert float(predicted) > 4 * 12.3 * 64e-3
    assert float(median) > 0
    assert head.split()[0] == "requests"


def test_by_the_committed_profile_of_a_cpu_the_plan_of_one_nano_batch_wins(ask):
    (path,) = (provenance.PROJECT / profile.FOLDER).glob("cpu-*/embedded.json")
    lengths = ("--input_len=64", "--output_len=64")
    code, text, _ = ask("plan", _MODEL, f"--profile={path}", *lengths)
    assert code == 0
    assert "best plan: one, " in text and f"({path})" in text
    assert " %, the spread of what was measured" in text  # on a busy machine it is large
