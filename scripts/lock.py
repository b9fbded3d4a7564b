"""Write the lock files `requirements/*.txt` from the bounds in `pyproject.toml`. Run by hand: `make lock`.

A lock file is plain requirements format with hashes, so that the `pip` every Python has can install it, and names no registry, so that
it installs from any mirror. One file serves Linux x86-64 and arm64 and macOS arm64 on Python 3.11 to 3.13: where versions differ, lines
carry markers. Versions already locked are kept while they satisfy the bounds; `--upgrade` takes the newest.

    runtime.txt   what the server needs
    dev.txt       runtime, the `dev` group, the build backend and pip
    cuda.txt      runtime and the `cuda` extra (Linux only)
    build.txt     the build backend and pip alone
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
LINUX = ("sys_platform == 'linux' and platform_machine == 'x86_64'", "sys_platform == 'linux' and platform_machine == 'aarch64'")
MACOS = ("sys_platform == 'darwin' and platform_machine == 'arm64'",)
OLDEST, TOO_NEW = "3.11", "3.14"
HEADER = """\
# {purpose}
# Written by scripts/lock.py (`make lock`) from pyproject.toml; do not edit.
"""


def main() -> None:
    """Lock the runtime first; every other file repeats its versions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that satisfy the bounds")
    upgrade = parser.parse_args().upgrade
    build_tools = ["pip>=25.1", *tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]]
    same_as_runtime = ["--constraint", str(LOCKS / "runtime.txt")]

    lock("runtime", purpose="What the server needs.", upgrade=upgrade)
    lock(
        "dev",
        purpose="Everything to run, test, check and build the project.",
        extra_requirements=build_tools,
        arguments=[*same_as_runtime, "--group", f"{ROOT / 'pyproject.toml'}:dev"],
        upgrade=upgrade,
    )
    lock(
        "cuda",
        purpose="What the server needs on NVIDIA GPUs (Linux).",
        arguments=[*same_as_runtime, "--extra", "cuda"],
        platforms=LINUX,
        upgrade=upgrade,
    )
    lock(
        "build",
        purpose="What builds and installs the project itself.",
        project=False,
        extra_requirements=build_tools,
        arguments=["--constraint", str(LOCKS / "dev.txt")],
        upgrade=upgrade,
    )


def lock(
    name: str,
    *,
    purpose: str,
    project: bool = True,
    extra_requirements: list[str] | None = None,
    arguments: list[str] | None = None,
    platforms: tuple[str, ...] = LINUX + MACOS,
    upgrade: bool,
) -> None:
    """Resolve one file with uv and write it without the conditions that hold everywhere it is used."""
    target = LOCKS / f"{name}.txt"
    print(f"locking {target.relative_to(ROOT)}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        environments = [f"{platform} and python_full_version < '{TOO_NEW}'" for platform in platforms]
        Path(work, "pyproject.toml").write_text(f"[tool.uv]\nenvironments = {environments}\n")
        resolved = Path(work, "resolved.txt")
        if target.exists() and not upgrade:
            resolved.write_text(target.read_text())
        sources = [str(ROOT / "pyproject.toml")] if project else []
        if extra_requirements:
            requirements = Path(work, "requirements.in")
            requirements.write_text("\n".join(extra_requirements) + "\n")
            sources.append(str(requirements))
        options = ["--universal", "--generate-hashes", "--python-version", OLDEST, "--no-annotate", "--no-header", "--quiet"]
        command = [sys.executable, "-m", "uv", "pip", "compile", *options, *(arguments or []), *sources, "--output-file", str(resolved)]
        subprocess.run(command, cwd=work, check=True)
        target.write_text(HEADER.format(purpose=purpose) + simplify_markers(resolved.read_text()))


def simplify_markers(text: str) -> str:
    """Drop the supported platforms and the newest Python from each line's marker; what is left says where versions differ.

    `jax==0.10.2 ; python_full_version < '3.12' and ((...linux...) or (...darwin...))` becomes `jax==0.10.2 ; python_full_version < '3.12'`.
    """
    platform = r"\(platform_machine == '\w+' and sys_platform == '\w+'\)"
    everywhere = rf"\({platform}(?: or {platform})+\)"
    text = re.sub(rf" and {everywhere}", "", text)
    text = re.sub(rf" ; python_full_version < '{TOO_NEW}'(?= \\)", "", text)
    return text.replace(f" and python_full_version < '{TOO_NEW}'", "")


if __name__ == "__main__":
    main()
