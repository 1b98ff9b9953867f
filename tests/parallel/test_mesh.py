import jax
import pytest

from whalejax.parallel.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=2,expert=4", (1, 2, 1, 4)),
        ("expert=2", (1, 1, 4, 2)),
        ("", (1, 1, 8, 1)),
        ("data=2,fsdp=-1,expert=1", (1, 2, 4, 1)),
        ("stage=4,expert=2", (4, 1, 1, 2)),
    ],
)
def test_a_mesh_is_made_as_written(text, sizes):
    mesh = make_mesh(MeshConfig.parse(text), jax.devices()[:8])
    assert tuple(mesh.shape.values()) == sizes
    assert mesh.axis_names == ("stage", "data", "fsdp", "expert")


def test_stages_lie_farthest_apart():
    mesh = make_mesh(MeshConfig(stage=2, data=2, expert=2, fsdp=1), jax.devices()[:8])
    first, second = ([device.id for device in part.flat] for part in mesh.devices)
    assert max(first) < min(second)


def test_it_is_written_as_it_is_read():
    config = MeshConfig(stage=3, data=2, expert=4)
    assert MeshConfig.parse(str(config)) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("expert", "'expert' must be one of"),
        ("experts=4", "'experts=4' must be one of"),
        ("expert=four", "'expert=four' must be one of"),
        ("expert=0", "expert=0 must be positive"),
        ("stage=0", "stage=0, data=1"),
        ("fsdp=-2", "fsdp=-2"),
    ],
)
def test_what_is_no_mesh_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        MeshConfig.parse(text)


def test_a_mesh_of_other_devices_is_refused():
    with pytest.raises(
        ValueError, match="stage=1 x data=1 x fsdp=1 x expert=3 is 3 devices, but there are 8"
    ):
        make_mesh(MeshConfig(expert=3, fsdp=1), jax.devices()[:8])
