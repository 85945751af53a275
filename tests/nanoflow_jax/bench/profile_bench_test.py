import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
import types

import jax
import pytest

from nanoflow_jax.bench import measured, profile_bench, profile_points, profile_tasks
from nanoflow_jax.bench.kernel_ways import Setting
from nanoflow_jax.bench.profile_record import Record
from nanoflow_jax.engine import model_source
from nanoflow_jax.models import huggingface, named, presets
from nanoflow_jax.results import manifest, profile

_, _EMBEDDED = named.read(str(model_source.embedded_folder()))
_SMALL = dataclasses.replace(_EMBEDDED, vocab_size=256, num_layers=1, windows=(None,))
_SMS = 8


def _seconds(task, variant):
    """As long as there are bytes, on a share of the SMs."""
    sms = variant.split or variant.num_ctas or _SMS
    return task.shape.num_bytes * 1e-9 * _SMS / sms


def _fake_measure(task, case, *, clock, effort, done):
    """In the place of `kernel_timing.measure`: nothing runs."""
    clock.calls.append(case)
    if case in clock.broken:
        raise RuntimeError("out of memory\nand much more")
    for variant in task.variants:
        for number in range(effort.rounds):
            mode = f"{variant.labels}"
            if (mode, number) not in done:
                clock.samples += 1
                if clock.samples == clock.stop_at:
                    raise KeyboardInterrupt
                sample = {"case": case, "mode": mode, **variant.labels, "round": number}
                yield sample | {"seconds": _seconds(task, variant)}


@functools.cache
def _here(on_gpu):
    here = profile_bench.here(_SMALL)
    tasks = here.tasks
    if on_gpu:
        setting = Setting(on_gpu=True, num_sms=_SMS, interpret=None)
        tasks = profile_tasks.Tasks(dataclasses.replace(tasks.ground, setting=setting))
    return dataclasses.replace(
        here,
        kind=manifest.Device(platform="gpu" if on_gpu else "cpu", name="Toy"),
        machine=dataclasses.replace(here.machine, num_sms=_SMS if on_gpu else None),
        tasks=tasks,
        measure=_fake_measure,
    )


def _bench(*, on_gpu, stop_at=None, broken=()):
    clock = types.SimpleNamespace(
        method="wall", calls=[], samples=0, stop_at=stop_at, broken=broken
    )
    return dataclasses.replace(_here(on_gpu), clock=clock)


def _options(tmp_path, **more):
    fields = {"tokens": (64,), "contexts": (32,), "budget_s": math.inf, **more}
    return profile_bench.Options(
        name="toy", config=_SMALL, quick=True, root=tmp_path, command=("search",), **fields
    )


def _run(options, bench, said=None, clock=lambda: 0.0):
    reports = measured.Reports(say=(said if said is not None else []).append, clock=clock)
    return profile.read(profile_bench.run(options, bench, reports))


@pytest.fixture
def small_gpu_scale(monkeypatch):
    scale = dataclasses.replace(
        profile_points.QUICK_GPU,
        decode_rows=(4, 8),
        pair_tokens=(64,),
        pair_rows=(4,),
        pair_context=32,
        share_step=2,
    )
    monkeypatch.setattr(profile_points, "QUICK_GPU", scale)


def test_on_a_gpu_every_operation_has_caps_tiles_and_pairs_as_announced(tmp_path, small_gpu_scale):
    said = []
    found = _run(_options(tmp_path), _bench(on_gpu=True), said)
    announced = re.search(r"([\d,]+) points of (\d+) programs, 3 samples each", said[0])
    assert int(announced[1]) == len(found.points) + len(found.pairs)
    by_operation = profile.by_operation(found)
    assert {point.tile for point in by_operation["o"]} == {"xla", "64 rows", "128 rows"}
    for name in ("kqv", "up_gate", "down", "decode_attention", "prefill_attention"):
        # The whole device is no cap.
        assert {one.num_ctas for one in by_operation[name]} == {2, 4, 6, None}, name
    assert {one.num_ctas for one in by_operation["norm"]} == {None}
    assert {one.product for one in found.pairs} == {"kqv", "o", "up_gate", "down"}
    assert {one.num_ctas for one in found.pairs} == {2, 4, 6}
    assert all(len(one.seconds) == 3 for one in (*found.points, *found.pairs))
    assert set(found.kernel_sources) > {"pallas_kernels/gemm.py"}
    assert found.num_sms == _SMS and found.notes == ()


def test_without_a_gpu_operations_are_xlas_without_caps_and_the_file_says_so(tmp_path):
    found = _run(_options(tmp_path), _bench(on_gpu=False))
    assert {(one.num_ctas, one.tile) for one in found.points} == {(None, "xla")}
    assert found.pairs == () and found.num_sms is None and found.kernel_sources == {}
    assert "the one cap 'all'" in found.notes[0] and found.notes[1].startswith("no pairs: ")
    names = {"norm_kqv", "rope", "append", "o", "norm", "up_gate", "down", "head"}
    attention = {"decode_attention", "prefill_attention"}
    assert set(profile.by_operation(found)) == names | attention | {profile.LAUNCH}


def test_what_was_measured_before_an_end_is_not_measured_again(tmp_path):
    cut = _bench(on_gpu=False, stop_at=8)
    with pytest.raises(KeyboardInterrupt):
        _run(_options(tmp_path), cut)
    assert not profile.path_of(tmp_path, cut.kind, "toy").exists()
    said, again = [], _bench(on_gpu=False)
    found = _run(_options(tmp_path), again, said)
    assert "7 samples were measured before; going on with the rest" in said
    assert again.clock.calls == cut.clock.calls[2:] + again.clock.calls[1:]
    assert again.clock.samples == 3 * len(found.points) - 7
    assert [*(tmp_path / "cpu-toy").iterdir()] == [tmp_path / "cpu-toy" / "toy.json"]


def test_without_time_left_the_rest_is_noted_and_measured_by_the_same_command(tmp_path):
    said, late = [], _bench(on_gpu=False)
    times = iter([0.0, *[1.0] * 3, *[11.0] * 99])
    found = _run(_options(tmp_path, budget_s=10.0), late, said, clock=lambda: next(times))
    assert late.clock.calls == [
        profile.LAUNCH + "/1, xla",
        "norm_kqv/64, xla",
        "rope/64, xla",
        "append/64, xla",
    ]
    assert found.notes[-1].startswith("not measured, for want of time: o/64, xla, norm/64, xla")
    assert said[-1].endswith("for want of time; the same command goes on with them")
    whole = _run(_options(tmp_path), _bench(on_gpu=False))
    assert len(whole.points) > len(found.points) == 4
    assert not any("want of time" in note for note in whole.notes)


def test_what_the_device_cannot_do_is_noted_and_the_rest_measured(tmp_path):
    found = _run(_options(tmp_path), _bench(on_gpu=False, broken=("o/64, xla",)))
    assert found.notes[-1] == "o/64, xla, all: failed: out of memory"
    assert "o" not in profile.by_operation(found) and "down" in profile.by_operation(found)


def test_what_was_begun_otherwise_is_not_gone_on_with(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _run(_options(tmp_path), _bench(on_gpu=False, stop_at=3))
    with pytest.raises(ValueError, match="was begun with other items; go on with those, or delete"):
        _run(_options(tmp_path, tokens=(32,)), _bench(on_gpu=False))


def test_an_output_that_cannot_be_written_is_known_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    bench = _bench(on_gpu=False)
    with pytest.raises(
        ValueError, match=r"--output: .*toy.json.part cannot be written: (Not|File)"
    ):
        _run(_options(tmp_path / "file"), bench)
    assert bench.clock.calls == []


@pytest.mark.parametrize(("flag", "more"), [("tokens", (0, 1)), ("contexts", (-1,))])
def test_sizes_below_one_are_refused(tmp_path, flag, more):
    numbers = ",".join(map(str, more))
    with pytest.raises(ValueError, match=f"--{flag}={numbers}: give some from 1 on"):
        _run(_options(tmp_path, **{flag: more}), _bench(on_gpu=False))


_WRITER = """
import pathlib, sys
from nanoflow_jax.bench.profile_record import Record
with Record(pathlib.Path(sys.argv[1]), {"model": "toy"}) as record:
    for number in range(10**9):
        record.add({"case": "o", "mode": "m", "num_ctas": None, "split": None, "round": number,
                    "seconds": 1.0})
        if number == 100:
            print("ready", flush=True)
"""


def test_samples_survive_a_kill(tmp_path):
    path = tmp_path / "toy.json"
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, path], stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout.readline() == b"ready\n"
        writer.kill()
    part = tmp_path / ".toy.json.part"
    with part.open("ab") as file:  # as a kill within a write leaves it
        file.write(b'{"case": "o", "mo')
    with Record(path, {"model": "toy"}) as record:
        assert record.found > 100
        assert record.done("o") == {("m", number) for number in range(record.found)}
        record.end_of("o")
    assert all(json.loads(line) for line in part.read_text().splitlines())
    with Record(path, {"model": "toy"}) as record:
        assert record.ended == {"o"}


def test_a_model_on_a_gpu_is_profiled_in_less_than_ten_minutes():
    config = huggingface.read_config(presets.load("llama-3-8b"))
    machine = profile_points.Machine(num_sms=132, memory_bytes=141 * 10**9, item_bytes=2)
    for scale, most_s in ((profile_points.GPU, 600), (profile_points.QUICK_GPU, 300)):
        planned = profile_points.plan(config, machine, scale)
        points, seconds = profile_points.seconds_of(planned.items, machine, scale, compile_s=4.0)
        assert points > len(planned.items) and seconds < most_s
        names = [item.name for item in planned.items]
        assert len(set(names)) == len(names)


def test_contexts_that_a_model_or_its_memory_does_not_hold_are_left_out_and_noted():
    machine = profile_points.Machine(num_sms=None, memory_bytes=2 * 10**6, item_bytes=4)
    scale = dataclasses.replace(profile_points.CPU, contexts=(64, 2048), decode_rows=(1, 64))
    planned = profile_points.plan(_SMALL, machine, scale)
    left = planned.notes[-1]
    assert "decode_attention/64+64" in left  # 4 MB of cache
    assert "decode_attention/1+2048" in left  # the model has 1024
    assert "decode_attention/1+64" not in left


@pytest.mark.parametrize("tokens", [16, 48, 512])
@pytest.mark.parametrize("context", [1, 32, 100, 4096])
def test_chunks_have_all_tokens_and_see_as_many_as_asked_on_average(tokens, context):
    count, length, prefix = profile_points.chunks(tokens, context)
    assert count * length == tokens and prefix >= 0
    assert prefix + (length + 1) / 2 == pytest.approx(context, abs=1)


def test_tasks_of_a_mixture_of_experts_run():
    config = huggingface.read_config(presets.load("mixtral-8x7b"))
    moe = dataclasses.replace(
        config.moe, num_experts=4, intermediate_size=32, sparse_layers=(True,)
    )
    small = dataclasses.replace(
        _SMALL, moe=moe, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16
    )
    tasks = profile_bench.here(small).tasks
    for name in ("route", "up_gate", "down"):
        task = tasks.build(profile_points.Item(operation=name, tokens=8), ())
        results = task.reference(task.draw(0))
        assert all(jax.numpy.isfinite(one).all() for one in results), name
