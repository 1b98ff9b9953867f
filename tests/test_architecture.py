"""The house's rules: arrows between packages and ops, absolute imports, docstrings, sizes."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"whalejax": "whalejax", "kernels": "whalejax.kernels", "parallel": "whalejax.parallel"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80
SHARED = {
    "accumulation",
    "backend",
    "groups",
    "mosaic",
    "testing",
}  # modules one level up, free to all ops
# which ops an op may import; a new arrow is a decision, written down here
ARROWS = {
    "fp8_gemm": {"quantization"},
    "grouped_gemm": {"fp8_gemm", "quantization"},
    "mla": {"quantization"},
    "peers": {"permutation"},
}


def modules():
    """Every module's dotted name and file."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "whalejax" and relative.parts[0] in ("kernels", "parallel"):
                continue  # the same files through the symbolic links
            parts = [*package.split("."), *relative.with_suffix("").parts]
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


MODULES = modules()


def imports(tree):
    """Dotted names that a module imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name):
    """0 for kernels, 1 for parallel, 2 for the application; None for others' packages."""
    for depth, prefix in enumerate(("whalejax.kernels", "whalejax.parallel", "whalejax")):
        if name == prefix or name.startswith(prefix + "."):
            return depth
    return None


@pytest.fixture(scope="module", params=MODULES, ids=str)
def module(request):
    return request.param, ast.parse(MODULES[request.param].read_text())


def test_there_are_modules_of_all_three_layers():
    assert {layer(name) for name in MODULES} == {0, 1, 2}
    assert len(MODULES) > 40


def test_arrows_point_down_and_names_are_the_packages_own(module):
    name, tree = module
    for imported in imports(tree):
        assert imported.split(".")[0] not in ("kernels", "parallel"), imported
        depth = layer(imported)
        assert depth is None or depth <= layer(name) or imported == "whalejax", (
            f"{name} imports {imported}, which stands above it"
        )


def test_public_names_have_docstrings(module):
    name, tree = module
    assert ast.get_docstring(tree), name
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    functions = [
        n
        for body in (tree, *classes)
        for n in body.body
        if isinstance(n, ast.FunctionDef) and n.name[0] != "_"
    ]
    for node in (*classes, *functions):
        assert ast.get_docstring(node), f"{name}.{node.name}"


def test_files_and_functions_are_short(module):
    name, tree = module
    assert len(MODULES[name].read_text().splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{name}.{node.name}"


def arrows_between_ops():
    """From each op to the ops that its modules import."""
    arrows = {}
    for name, path in MODULES.items():
        if match := re.match(r"whalejax\.kernels\.(\w+)\.", name + "."):
            for imported in imports(ast.parse(path.read_text())):
                if other := re.match(r"whalejax\.kernels\.(\w+)\.", imported + "."):
                    arrows.setdefault(match[1], set()).add(other[1])
    return {op: others - {op, *SHARED} for op, others in arrows.items()}


def test_ops_import_only_the_ops_they_may():
    arrows = arrows_between_ops()
    for op, others in arrows.items():
        assert others <= ARROWS.get(op, set()), f"{op} imports {others - ARROWS.get(op, set())}"
    assert "fp8_gemm" in arrows["grouped_gemm"]


def test_ops_may_not_depend_on_each_other_in_a_cycle():
    done, under_way = set(), []

    def visit(op):
        assert op not in under_way, f"cycle: {' -> '.join([*under_way, op])}"
        if op not in done:
            under_way.append(op)
            for other in ARROWS.get(op, set()):
                visit(other)
            done.add(under_way.pop())

    for op in ARROWS:
        visit(op)


def test_input_is_never_checked_by_assert(module):
    name, tree = module
    if name != "whalejax.kernels.testing":
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), name
