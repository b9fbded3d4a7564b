"""`python -m engine.checkpoint inspect DIR [--verify]`: what a checkpoint holds, as one JSON object per line.

Lines are `{"tensor": ...}` as each file is checked, `{"progress": ...}` while verifying, then `{"totals": ...}`; on a problem the last
line is `{"error": message}` and the exit status 2. `grok-server inspect` runs this and draws the table.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.tensors import HostTensor
from engine.checkpoint.verify import verify
from engine.config import read_model_config
from engine.errors import EngineError
from engine.types import Progress


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.checkpoint", description="Look into a checkpoint.")
    inspect_parser = parser.add_subparsers(dest="command", required=True).add_parser("inspect", help="list and check the tensors")
    inspect_parser.add_argument("directory", type=Path, metavar="DIR")
    inspect_parser.add_argument("--verify", action="store_true", help="read every byte")
    arguments = parser.parse_args()
    try:
        inspect(arguments.directory, is_verified=arguments.verify)
    except EngineError as error:
        _print(error=str(error))
        return 2
    except BrokenPipeError:  # the reader of these lines has gone
        sys.stdout = None
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def inspect(model_dir: Path, *, is_verified: bool) -> None:
    """Print the tensors and totals of a checkpoint. Raises `EngineError`."""
    checkpoint = open_checkpoint(model_dir, read_model_config(model_dir), report=_print_tensor)
    verified = verify(checkpoint, report=_print_progress) if is_verified else None
    _print(
        totals={
            "directory": str(checkpoint.directory),
            "format": checkpoint.format,
            "tensors": len(checkpoint.tensors),
            "files": len(checkpoint.file_sizes),
            "params": checkpoint.num_params,
            "bytes": checkpoint.file_bytes,
            "row_parallel_scale_groups": checkpoint.row_parallel_scale_groups,
            "verified": asdict(verified) if verified else None,
        }
    )


def _print_tensor(tensor: HostTensor) -> None:
    _print(
        tensor={
            "file": tensor.path.name,
            "name": tensor.spec.name,
            "dtype": tensor.form,
            "shape": tensor.spec.shape,
            "scales": tensor.scales_source.shape if tensor.scales_source else None,
            "bytes": tensor.num_bytes,
        }
    )


def _print_progress(progress: Progress) -> None:
    _print(progress={"done": progress.done, "total": progress.total, "unit": progress.unit, "detail": progress.detail})


def _print(**line: Any) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
