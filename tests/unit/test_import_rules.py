"""What the import-linter contracts cannot say: that every engine file is on one side, and what the device side needs at run time."""

import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
DEVICE_SIDE = {
    "group.distributed",
    "footprint",
    "plan",
    "hlo",
    "target",
    "memory_check",
    "build",
    "compile_cache",
    "programs",
    "device_step",
    "runner",
    "sampling",
    "sharding",
    "stored_form",
    "shapes",
    "model",
    "ops",
    "checkpoint",
}
NEITHER_SIDE = {
    "__main__",
    "group.start",
    "plan_query",
    "compile_plan",
    "checkpoint.__main__",
}  # programs of their own: they speak messages and JSON to the server
ON_A_BARE_GPU_MACHINE = {"jax", "jaxlib", "numpy", "ml_dtypes"}
ALLOWED_IN = {"engine.shapes": {"jaxtyping"}}  # only for the type checker and the tests


def host_side() -> set[str]:
    """The host-side files as the import-linter contract lists them."""
    contract = next(contract for contract in TOOLS["importlinter"]["contracts"] if contract["name"].startswith("host-side"))
    return {module.removeprefix("engine.") for module in contract["source_modules"]}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("engine", include_external_packages=True, cache_dir=None)


def test_every_engine_file_is_host_side_or_device_side():
    sorted_in = DEVICE_SIDE | NEITHER_SIDE | host_side()
    files = [path.relative_to(ROOT / "engine").with_suffix("") for path in (ROOT / "engine").rglob("*.py") if path.stem != "__init__"]

    unsorted = sorted(".".join(file.parts) for file in files if not {file.parts[0], ".".join(file.parts)} & sorted_in)

    assert not unsorted, f"list {unsorted} as host side in pyproject.toml, or as device side here"


def test_host_side_files_are_type_checked_strictly():
    assert {f"engine/{name.replace('.', '/')}.py" for name in host_side()} <= set(TOOLS["pyright"]["strict"])


def test_the_device_side_needs_only_jax_numpy_and_ml_dtypes(graph: grimp.ImportGraph):
    device_side = {module for name in DEVICE_SIDE for module in graph.modules if f"{module}.".startswith(f"engine.{name}.")}
    device_side -= {f"engine.{name}" for name in NEITHER_SIDE}
    reached = device_side.union(*(graph.find_upstream_modules(module) for module in device_side))

    foreign = [
        f"{importer} imports {imported}"
        for importer in sorted(module for module in reached if module.startswith("engine"))
        for imported in graph.find_modules_directly_imported_by(importer)
        if imported.partition(".")[0] not in {"engine", *sys.stdlib_module_names, *ON_A_BARE_GPU_MACHINE, *ALLOWED_IN.get(importer, set())}
    ]

    assert not foreign, f"a bare GPU machine has only {sorted(ON_A_BARE_GPU_MACHINE)}: {foreign}"


@pytest.mark.parametrize("package", ["server", "engine", "configs"])
def test_no_other_distribution_claims_our_package_names(package: str):
    assert set(packages_distributions().get(package, [])) <= {"grok-server"}
