"""Every module has one name; the wheel holds every module and imports without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("whalejax", "kernels", "parallel")


def python(code, *, cwd, path=None):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The project copied without what git ignores, and built."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if not (ROOT / name).exists():
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        else:
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, source],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = set()
    for folder in SOURCES:
        prefix = "" if folder == "whalejax" else "whalejax/"
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT)
            linked = inside.parts[:2] in (("whalejax", "kernels"), ("whalejax", "parallel"))
            if (path.suffix == ".py" or path.name == "py.typed") and not linked:
                wanted.add(prefix + inside.as_posix())
    assert wanted <= held
    assert len(wanted) > 40
    assert not {name for name in held if name.startswith(("kernels/", "parallel/", "tests/"))}


def test_the_wheel_imports_elsewhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = (
        "import whalejax, whalejax.kernels.attention, whalejax.model.decoder, whalejax.cli\n"
        "print(whalejax.__file__, whalejax.kernels.attention.__file__)"
    )
    for path in python(code, cwd=tmp_path, path=tmp_path / "installed").split():
        assert Path(path).is_relative_to(tmp_path / "installed")


def test_importing_is_light(tmp_path):
    code = (
        "import sys, whalejax, whalejax.kernels, whalejax.parallel\n"
        "heavy = {'flax', 'orbax', 'duckdb', 'matplotlib', 'tyro', 'torch'} & set(sys.modules)\n"
        "bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "print(heavy, bool(bridge and bridge._backends))"
    )
    assert python(code, cwd=tmp_path).strip() == "set() False"


def test_kernels_need_no_application_dependencies(tmp_path):
    code = (
        "import sys\n"
        "for name in ('flax', 'tyro', 'duckdb', 'orbax'): sys.modules[name] = None\n"
        "import whalejax.kernels.attention, whalejax.kernels.mla, whalejax.kernels.grouped_gemm"
    )
    python(code, cwd=tmp_path)


def test_every_module_has_one_name():
    assert (ROOT / "whalejax/kernels").is_symlink()
    assert os.readlink(ROOT / "whalejax/kernels") == "../kernels"
    assert os.readlink(ROOT / "whalejax/parallel") == "../parallel"
    import whalejax.kernels.attention
    import whalejax.parallel.mesh  # noqa: F401

    files = [
        Path(m.__file__).resolve()
        for name, m in list(sys.modules.items())
        if getattr(m, "__file__", None) and name.split(".")[0] in SOURCES
    ]
    ours = [f for f in files if f.is_relative_to(ROOT)]
    assert len(ours) == len(set(ours)) > 3
