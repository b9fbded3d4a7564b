"""Runs the checks of one client inside that client's own environment: `run_checks.py PACKAGE FILE...`, called by `tests/clients/run.py`.

A check is a function, async or not, whose name begins with `check_`; it fails by raising. What became of each goes as one line of JSON to
the file named by $CHECK_RESULTS, since clients write what they like to stdout; the last line says that all checks were reached. Runs where
nothing but the client is installed, so it imports the standard library alone.
"""

import argparse
import asyncio
import importlib.metadata
import importlib.util
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    """Run every check whose name contains --only, file by file in the order they are written."""
    parser = argparse.ArgumentParser()
    parser.add_argument("package", help="the client's distribution, whose version is told")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    with Path(os.environ["CHECK_RESULTS"]).open("w", buffering=1) as results:

        def tell(**line: Any) -> None:
            results.write(json.dumps(line) + "\n")

        tell(version=importlib.metadata.version(arguments.package))
        for path in arguments.files:
            for name, check in _checks_of(path):
                if arguments.only in name:
                    tell(check=name, **_outcome(check))
        tell(is_done=True)


def _checks_of(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The checks in one file; a file that cannot be imported is one check that fails."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        failure = error

        def fail() -> None:
            raise failure

        yield path.stem, fail
        return
    for name, value in vars(module).items():
        if name.startswith("check_") and inspect.isfunction(value) and value.__module__ == path.stem:
            yield name.removeprefix("check_"), value


def _outcome(check: Callable[[], Any]) -> dict[str, Any]:
    """Run one check: how long it took, and None or why it failed."""
    started_s = time.monotonic()
    error = None
    try:
        if inspect.iscoroutinefunction(check):
            asyncio.run(check())
        else:
            check()
    except Exception as failure:
        traceback.print_exc()
        last = traceback.extract_tb(failure.__traceback__)[-1]
        error = f"{type(failure).__name__}: {failure} ({Path(last.filename).name}:{last.lineno}: {last.line})"
    return {"error": error, "seconds": round(time.monotonic() - started_s, 3)}


if __name__ == "__main__":
    main()
