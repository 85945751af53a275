import jax

from nanoflow_jax.parallel import mesh as mesh_lib


def test_a_mesh_has_one_axis_over_its_devices():
    devices = jax.devices()[:4]
    built = mesh_lib.build_mesh(devices)
    assert built.axis_names == (mesh_lib.AXIS,)
    assert list(built.devices) == devices


def test_a_mesh_of_absent_devices_has_the_same_axis():
    built = mesh_lib.absent_mesh(16)
    assert built.axis_names == (mesh_lib.AXIS,)
    assert built.size == 16
