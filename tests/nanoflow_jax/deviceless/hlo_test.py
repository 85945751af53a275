from nanoflow_jax.deviceless import hlo

_TEXT = """HloModule jit_f, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %copy.9 = f32[4]{0} copy(%p)
}

ENTRY %main.1 (x.1: bf16[2,3], y: s32[]) -> (bf16[2,3], f32[4]) {
  %x.1 = bf16[2,3]{1,0} parameter(0), metadata={op_name="x"}
  %y = s32[] parameter(1)
  %copy = bf16[2,3]{1,0} copy(%x.1), metadata={scheduling_name="copy"}
  %both = (bf16[2,3]{1,0}, f32[4]{0}) fusion(%copy, %y), kind=kLoop, calls=%fused, \
metadata={op_name="jit(f)/append/scatter" stack_frame_id=2}
  ROOT %call.2 = f8e4m3fn[5]{0} custom-call(%both), custom_call_target="t", \
backend_config={module = "ML(%z)"}
}
"""


def test_instructions_of_the_entry_alone_are_read():
    entry = hlo.read_entry(_TEXT)
    assert [one.name for one in entry] == ["x.1", "y", "copy", "both", "call.2"]
    assert [one.opcode for one in entry[2:]] == ["copy", "fusion", "custom-call"]
    assert [one.num_bytes for one in entry] == [12, 4, 12, 12 + 16, 5]
    assert entry[3].shape == "bf16[2,3], f32[4]"
    assert entry[3].operands == ("copy", "y")
    assert entry[3].scope == "jit(f)/append/scatter"
    assert entry[4].operands == ("both",)
    assert entry[2].scope == ""


def test_a_call_that_is_fused_with_its_slices_keeps_its_scope():
    (fused,) = hlo.read_entry("""HloModule jit_f

%sliced (p: s32[9]) -> (f32[4]) {
  %p = s32[9]{0} parameter(0)
  %part = s32[3]{0} slice(%p), slice={[0:3]}, metadata={op_name="jit(f)/slice"}
  %call = f32[4]{0} custom-call(%part), metadata={op_name="jit(f)/decode_attention/entry"}
  ROOT %all = (f32[4]{0}) tuple(%call)
}

%other (p: s32[9]) -> s32[9] {
  ROOT %q = s32[9]{0} custom-call(), metadata={op_name="jit(f)/another"}
}

ENTRY %main () -> (f32[4]) {
  ROOT %both = (f32[4]{0}) fusion(), kind=kCustom, calls=%sliced
}
""")
    assert fused.scope == "jit(f)/decode_attention/entry"


def test_mosaic_kernels_are_told_apart_by_their_names_or_else_by_their_digests():
    call = "f32[4]{0} custom-call(), custom_call_target="
    named, unnamed, other = hlo.read_entry(f"""HloModule jit_f

ENTRY %main () -> (f32[4]) {{
  %a = {call}"mosaic_gpu_v2", backend_config={{kernel_hash = "\\E5)", module = "ML\\EFR\\00\
main\\00entry_0123456789abcdef\\00"}}
  %b = {call}"mosaic_gpu_v2", backend_config={{kernel_hash = "\\B2\\"", module = "ML\\EFR\\00"}}
  ROOT %c = {call}"another", backend_config={{module = "\\00entry_0123456789abcdef\\00"}}
}}
""")
    assert named.kernel == "entry_0123456789abcdef"
    assert unnamed.kernel == r"\B2\""
    assert other.kernel is None


def test_bytes_of_arrays_follow_from_their_types():
    assert hlo.array_bytes("pred", "8") == 8
    assert hlo.array_bytes("u4", "2,3") == 3
    assert hlo.array_bytes("f32", "") == 4
    assert hlo.array_bytes("token", "") == 0
