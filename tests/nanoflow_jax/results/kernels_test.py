"""Figures of kernels, worked by hand, the table of them and their curves."""

import xml.etree.ElementTree as ET

import msgspec
import pytest
import result_folders

from nanoflow_jax.results import figures, kernel_curves, kernel_table, kernels
from nanoflow_jax.results.kernels import Sample
from nanoflow_jax.results.kind import Evidence, Level
from nanoflow_jax.results.manifest import Device
from pallas_kernels import problem_shapes

_CASE = "llama-3-8b/kqv/256"  # 2 x 256 x 4096 x 6144 operations
_FLOPS = 2 * 256 * 4096 * 6144
_BYTES = 2 * (256 * 4096 + 6144 * 4096 + 256 * 6144)
_PAIR = "llama-3-8b/decode+gate_up/1024"
_NAMES = (kernels.FLOPS_CEILING, kernels.COPY_CEILING, kernels.READ_CEILING)


def _ceilings(flops, copy, read):
    speeds = dict(zip(_NAMES, (flops, copy, read), strict=True))
    return figures.Ceilings(before=speeds, after=speeds)


def _samples(way, seconds, *, num_ctas=None, split=None, case=_CASE):
    mode = kernels.mode(way, num_ctas, split)
    labels = {"case": case, "mode": mode, "way": way, "num_ctas": num_ctas, "split": split}
    return [
        Sample(**labels, round=i, calls=3, seconds=one, method="cupti", error=1e-3)
        for i, one in enumerate(seconds)
    ]


_CURVE = [
    *_samples("pallas", [4.0, 5.0, 6.0], num_ctas=8),
    *_samples("pallas", [2.0, 2.0, 2.0], num_ctas=16),
    *_samples("xla", [4.0, 4.0, 3.0]),
]
_SPLITS = [
    *_samples("pallas", [3.0], num_ctas=16, split=8, case=_PAIR),
    *_samples("pallas", [2.0], num_ctas=16, split=12, case=_PAIR),
    *_samples(kernels.IN_TURN, [4.0], num_ctas=16, case=_PAIR),
]
_SETTING = {"num_sms": 132, "problems": kernels.setting_of(problem_shapes.problems())}
_ON_GPU = result_folders.run(
    device=Device(platform="gpu", name="NVIDIA H200"), kind="kernels", setting=_SETTING
)
_WORK = kernels.works(_ON_GPU)[_CASE]


def _figures(samples, ceilings=None):
    evidence = Evidence(run=_ON_GPU, samples=samples, ceilings=ceilings)
    return {one.name: one for one in kernels.KIND.figures(evidence)}


def test_modes_name_a_way_and_its_share():
    assert kernels.mode("xla", None, None) == "xla"
    assert kernels.mode("pallas", 48, None) == "pallas 48"
    assert kernels.mode("pallas", 132, 84) == "pallas 84+48"


def test_quartiles_of_five_and_of_one():
    assert kernels.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    assert kernels.quartiles([7.0]) == (7.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("speeds", "limit"),
    [
        ((1.0, 1e9, 1e9), kernels.FLOPS_CEILING),
        ((1e12, 2.0, 1.0), kernels.COPY_CEILING),
        ((1e12, 1.0, 2.0), kernels.READ_CEILING),
    ],
)
def test_a_problem_is_bound_by_what_takes_longer(speeds, limit):
    assert kernels.bound(_WORK, _ceilings(*speeds)) == limit


def test_rates_are_shares_of_the_ceiling_that_binds():
    rate = _figures(_CURVE, _ceilings(_FLOPS, 1e30, 1e30))[f"{_CASE}: pallas 16"]
    assert (rate.unit, rate.median, rate.fraction) == ("operations/s", _FLOPS / 2, 0.5)
    rate = _figures(_CURVE, _ceilings(1e30, _BYTES, 1.0))[f"{_CASE}: pallas 16"]
    assert (rate.unit, rate.median, rate.fraction) == ("bytes/s", _BYTES / 2, 0.5)


def test_without_ceilings_rates_are_operations_and_no_shares():
    rate = _figures(_CURVE)[f"{_CASE}: xla"]
    assert (rate.unit, rate.median, rate.fraction) == ("operations/s", _FLOPS / 4, None)


def test_the_curve_is_speed_as_a_share_of_that_on_all_sms():
    found = _figures(_CURVE)
    half, whole = (found[f"{_CASE}: {share} of 16 SMs"] for share in (8, 16))
    assert (half.median, half.low, half.high) == pytest.approx((0.4, 2 / 6, 2 / 4))
    assert whole.median == 1.0


def test_the_best_of_ours_stands_beside_each_other_way():
    assert _figures(_CURVE)[f"{_CASE}: pallas 16 over xla"].median == 2.0
    found = _figures(_SPLITS)
    assert found[f"{_PAIR}: pallas 12+4 over {kernels.IN_TURN} 16"].median == 2.0
    assert not any("of 16 SMs" in name for name in found)


def test_a_way_without_ours_beside_it_is_a_figure_all_the_same():
    assert list(_figures(_samples("xla", [1.0]))) == [f"{_CASE}: xla"]


def test_the_readme_shows_ours_on_all_sms_and_on_decodes_share_and_beside_others():
    case = "llama-3-8b/decode/256x1024"
    samples = [
        *(one for n in (40, 48, 132) for one in _samples("pallas", [2.0], num_ctas=n, case=case)),
        *_samples("xla", [4.0], case=case),
        *_CURVE,
    ]
    made = _figures(samples).values()
    found = [one.name for one in made if kernels.KIND.is_headline(_ON_GPU, one)]
    assert found == [f"{case}: pallas 48", f"{case}: pallas 132", f"{case}: pallas 132 over xla"]


def test_the_readme_shows_problems_that_there_are_and_every_kernel():
    shapes = [kernels.shape_of(case) for case in kernels.HEADLINES]
    assert {shape.KERNEL for shape in shapes} == set(problem_shapes.KERNELS)


def test_faults_take_nothing_from_the_rest_but_a_result_of_faults_is_none():
    fault = Sample(case=_CASE, mode="pallas 8", way="pallas", num_ctas=8, fault="wrong: error 1")
    assert len(_figures([*_samples("xla", [1.0]), fault])) == 1
    evidence = Evidence(run=_ON_GPU, samples=[fault], ceilings=None)
    assert kernels.KIND.complaints(evidence) == ["nothing was timed"]


@pytest.mark.parametrize(
    ("changes", "is_ours"),
    [
        ({"way": "pallas", "fault": "wrong"}, True),
        ({"way": "pallas, static grid", "fault": "wrong"}, True),
        ({"way": "all", "fault": "no room"}, True),
        ({"way": "cudnn", "fault": "not supported"}, False),
        ({"way": "pallas, graph branches", "fault": "needs a GPU", "is_missing": True}, False),
        ({"way": "pallas"}, False),
    ],
)
def test_what_others_cannot_do_is_not_our_fault(changes, is_ours):
    assert kernels.is_our_fault(Sample(case=_CASE, mode="m", **changes)) is is_ours


def test_an_unknown_case_is_refused():
    with pytest.raises(ValueError, match="there is no problem 'x' in pallas_kernels/problem_"):
        kernels.shape_of("x")


def _with_problems(problems):
    setting = {**_SETTING, "problems": problems}
    return msgspec.structs.replace(_ON_GPU, setting=setting)


def test_figures_come_from_what_the_result_says_of_its_problems_not_from_today():
    work = kernels.Work(kernel="gemm", flops=8, num_bytes=2)
    run = _with_problems({_CASE: msgspec.to_builtins(work)})
    evidence = Evidence(run=run, samples=_samples("xla", [2.0]), ceilings=None)
    assert [one.median for one in kernels.KIND.figures(evidence)] == [4.0]
    assert kernels.KIND.complaints_today(run) == [
        f"{_CASE} is recorded as gemm, 8 operations, 2 bytes; pallas_kernels/problem_shapes.py, "
        f"which has not changed, makes it gemm, {_FLOPS} operations, {_BYTES} bytes"
    ]
    assert kernels.KIND.complaints_today(_ON_GPU) == []


def test_a_problem_that_there_is_not_is_told():
    run = _with_problems({"x": _SETTING["problems"][_CASE]})
    (found,) = kernels.KIND.complaints_today(run)
    assert found.startswith("there is no problem 'x' in pallas_kernels/problem_shapes.py")


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        (None, "the setting's `problems` do not say .*: Expected `object`, got `null`"),
        ({_CASE: {"kernel": "gemm", "flops": 1}}, "moves: Object missing required field `num_by"),
        ({}, f"the setting's `problems` have no '{_CASE}', which samples are of"),
    ],
)
def test_a_result_that_does_not_say_what_its_problems_come_to_is_refused(problems, message):
    evidence = Evidence(run=_with_problems(problems), samples=_CURVE, ceilings=None)
    with pytest.raises(ValueError, match=message):
        kernels.KIND.figures(evidence)


def test_what_an_interpreter_took_is_no_speed():
    assert kernels.KIND.level(_ON_GPU) == Level.ONE_RUN
    assert kernels.KIND.needs_ceilings(_ON_GPU)
    assert kernels.KIND.needs_fitness(_ON_GPU)
    on_cpu = msgspec.structs.replace(_ON_GPU, device=result_folders.DEVICE)
    assert kernels.KIND.level(on_cpu) == Level.CPU_NUMERICS
    assert not kernels.KIND.needs_ceilings(on_cpu)
    assert not kernels.KIND.needs_fitness(on_cpu)


def test_the_table_says_all_of_a_problem():
    fault = Sample(case=_CASE, mode="pallas 24", way="pallas", num_ctas=24, fault="wrong: error 1")
    missing = Sample(
        case=_CASE, mode="torch", way="torch", fault="is not installed", is_missing=True
    )
    samples = [*_CURVE, fault, missing]
    works = kernels.works(_ON_GPU)
    lines = list(kernel_table.table(samples, works, _ceilings(2 * _FLOPS, 1e30, 1e30)))
    assert lines == [
        f"{_CASE}: gemm, 12.88 GFLOP, 55.57 MB, bound by arithmetic",
        "  way                                      us  quartiles                TFLOP/s   GB/s  "
        "of ceiling",
        "  pallas 16                         2000000.0  2000000.0 to 2000000.0       0.0      0  "
        "25%",
        "  xla                               4000000.0  3500000.0 to 4000000.0       0.0      0  "
        "12%",
        "  share of SMs and of speed: 0.50 0.40, 1.00 1.00",
        "  pallas 16 over xla: 2 times as fast",
        f"FAILED: {_CASE}, pallas 24: wrong: error 1",
        "not there: torch is not installed (1 problems)",
    ]


_SVG = "{http://www.w3.org/2000/svg}"


def test_curves_have_a_panel_for_each_problem_and_a_line_for_each_way():
    picture = ET.fromstring(kernel_curves.draw(kernels.by_mode([*_CURVE, *_SPLITS])))
    one, pair = picture.findall(f"{_SVG}g")
    texts = [[text.text for text in panel.iter(f"{_SVG}text")] for panel in (one, pair)]
    assert {_CASE, "SMs", "pallas", "xla"} <= set(texts[0])
    assert {_PAIR, "SMs of the product", "pallas", kernels.IN_TURN} <= set(texts[1])
    (line,) = one.iter(f"{_SVG}polyline")
    corners = [tuple(map(float, corner.split(","))) for corner in line.get("points").split()]
    # 8 of 16 SMs with 0.4 of the speed: across, half way; up, as much of the way to the whole.
    (half, speed), (whole, full) = corners
    (axis,) = (path for path in one.iter(f"{_SVG}path") if path.get("class") == "axis")
    left, base = 44.0, float(axis.get("d").split("V")[1].split("H")[0])
    assert half - left == pytest.approx((whole - left) / 2, abs=0.1)
    assert base - speed == pytest.approx(0.4 * (base - full), abs=0.2)


def test_curves_of_nothing_are_a_picture_too():
    assert ET.fromstring(kernel_curves.draw({})).tag == f"{_SVG}svg"
    only = kernel_curves.draw(kernels.by_mode(_samples("xla", [1.0])))
    assert "ours was not timed" in only
