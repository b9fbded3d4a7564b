"""The lock files and `pyproject.toml` say the same: `make lock` is due when one of these fails."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.11.0", "3.12.0", "3.13.0")
LINUX = ({"sys_platform": "linux", "platform_machine": "x86_64"}, {"sys_platform": "linux", "platform_machine": "aarch64"})
MACOS = ({"sys_platform": "darwin", "platform_machine": "arm64"},)

RUNTIME = PROJECT["project"]["dependencies"]
BUILD = PROJECT["build-system"]["requires"]
LOCKED = {
    "runtime": (RUNTIME, LINUX + MACOS),
    "dev": (RUNTIME + PROJECT["dependency-groups"]["dev"] + BUILD, LINUX + MACOS),
    "cuda": (RUNTIME + PROJECT["project"]["optional-dependencies"]["cuda"], LINUX),
    "build": (BUILD, LINUX + MACOS),
}


def lock_text(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.txt").read_text()


def pins(name: str) -> list[tuple[Requirement, list[str]]]:
    """Every requirement of a lock file with its hashes."""
    logical_lines = lock_text(name).replace("\\\n", " ").splitlines()
    entries = [line.split(" --hash=") for line in logical_lines if line and not line.startswith("#")]
    return [(Requirement(entry[0].strip()), [digest.strip() for digest in entry[1:]]) for entry in entries]


def environments(platforms: tuple[dict[str, str], ...]) -> list[dict[str, str]]:
    return [
        {**platform, "python_full_version": python, "python_version": python.rpartition(".")[0], "extra": ""}
        for platform in platforms
        for python in PYTHONS
    ]


def applies(marker: Marker | None, environment: dict[str, str]) -> bool:
    return marker is None or marker.evaluate(environment)


@pytest.mark.parametrize("name", LOCKED)
def test_every_direct_dependency_is_pinned_within_its_bound_for_every_supported_machine(name: str):
    wanted, platforms = LOCKED[name]
    locked = [pin for pin, _ in pins(name)]

    for environment in environments(platforms):
        versions = {
            canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in locked if applies(pin.marker, environment)
        }
        for dependency in map(Requirement, wanted):
            if applies(dependency.marker, environment):
                version = versions.get(canonicalize_name(dependency.name))
                assert version is not None, f"{dependency.name} is missing from requirements/{name}.txt for {environment}; run `make lock`"
                assert dependency.specifier.contains(version, prereleases=True), f"{dependency} is locked at {version}; run `make lock`"


@pytest.mark.parametrize("name", LOCKED)
def test_every_package_has_exactly_one_exact_version_on_every_supported_machine(name: str):
    _, platforms = LOCKED[name]

    for environment in environments(platforms):
        names = [canonicalize_name(pin.name) for pin, _ in pins(name) if applies(pin.marker, environment)]
        assert len(names) == len(set(names))
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin, _ in pins(name))


@pytest.mark.parametrize("name", LOCKED)
def test_every_pin_carries_sha256_hashes(name: str):
    assert pins(name)
    for pin, digests in pins(name):
        assert digests, f"{pin} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in digests)


@pytest.mark.parametrize("name", LOCKED)
def test_no_lock_file_names_a_registry(name: str):
    text = lock_text(name)

    assert "://" not in text
    assert not re.search(r"--(index-url|extra-index-url|find-links|trusted-host)", text)


def test_the_runtime_is_locked_alike_in_every_file():
    runtime = {str(pin) for pin, _ in pins("runtime")}

    assert runtime <= {str(pin) for pin, _ in pins("dev")}
    assert runtime <= {str(pin) for pin, _ in pins("cuda")}


def test_each_python_gets_the_newest_jax_it_can_run():
    jax = [pin for pin, _ in pins("runtime") if pin.name == "jax"]

    chosen = [[str(pin.specifier) for pin in jax if applies(pin.marker, environment)] for environment in environments(LINUX[:1])]

    assert chosen[0] == ["==0.10.2"]
    assert chosen[1] == chosen[2] != chosen[0]
