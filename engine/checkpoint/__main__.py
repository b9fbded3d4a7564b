"""`python -m engine.checkpoint inspect|convert ...`: what a checkpoint holds, or another one made of it, as one JSON object per line.

    inspect DIR [--verify]
    convert SRC DST --weights int8|bfloat16|int4 [--group 64|128]
    convert --verify SRC DST
    logits SRC [DST | --weights ...] [--prompt TEXT]... [--token-ids "ID ID ..."]...

Lines are `{"tensor": ...}` or `{"comparison": ...}` as each tensor is checked, `{"logits": ...}` as each prompt is computed, and
`{"progress": ...}` meanwhile, then `{"totals": ...}`; on a problem the last line is `{"error": message}` and the exit status 2. Without a
DST, `logits` only looks whether it could be done. `grok-server inspect` and `grok-server convert` run this and draw it.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.compare import Comparison, compare
from engine.checkpoint.compare_logits import LogitError, Prompts, check, compare_logits
from engine.checkpoint.convert import ConvertProgress, Settings, convert
from engine.checkpoint.store import INT4_GROUPS
from engine.checkpoint.tensors import HostTensor
from engine.checkpoint.verify import verify
from engine.config import model_directories, read_model_config
from engine.errors import CheckpointError, EngineError
from engine.host_memory import host_memory_bytes
from engine.tokenizer import FILE_NAME, Tokenizer, find_tokenizer
from engine.types import Progress


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.checkpoint", description="Look into a checkpoint, or convert it.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect_parser = commands.add_parser("inspect", help="list and check the tensors")
    inspect_parser.add_argument("directory", type=Path, metavar="DIR")
    inspect_parser.add_argument("--verify", action="store_true", help="read every byte")
    convert_parser = commands.add_parser("convert", help="write another checkpoint of the same weights")
    convert_parser.add_argument("source", type=Path, metavar="SRC")
    convert_parser.add_argument("target", type=Path, metavar="DST")
    wanted = convert_parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--weights", choices=("int8", "bfloat16", "int4"))
    wanted.add_argument("--verify", action="store_true", help="compare what was converted")
    convert_parser.add_argument(
        "--group", type=int, choices=INT4_GROUPS, default=Settings(weights="int4").group, help="rows per scale, of int4"
    )
    logits_parser = commands.add_parser("logits", help="compare the logits of two checkpoints of a model")
    logits_parser.add_argument("source", type=Path, metavar="SRC")
    logits_parser.add_argument("target", type=Path, metavar="DST", nargs="?")
    logits_parser.add_argument("--weights", choices=("int8", "bfloat16", "int4"))
    logits_parser.add_argument("--group", type=int, choices=INT4_GROUPS, default=Settings(weights="int4").group)
    logits_parser.add_argument("--prompt", action="append", default=[], help="a text")
    logits_parser.add_argument("--token-ids", action="append", default=[], help="token ids with spaces between them")
    arguments = parser.parse_args()
    try:
        if arguments.command == "inspect":
            inspect(arguments.directory, is_verified=arguments.verify)
        elif arguments.command == "logits":
            _print_logit_errors(arguments)
        elif arguments.verify:
            _print_comparison(arguments.source, arguments.target)
        else:
            settings = Settings(weights=arguments.weights, group=arguments.group)
            _print(totals=asdict(convert(arguments.source, arguments.target, settings, report=_print_convert_progress)))
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


def prompts_of(source: Path, *, texts: list[str], token_ids: list[str]) -> Prompts:
    """By their texts, which begin a document, and by their token ids, which are taken as they are. Raises `EngineError`."""
    prompts = {given: list(map(int, given.split())) for given in token_ids}
    bos_token = read_model_config(source).bos_token
    if texts:
        if not any((directory / FILE_NAME).is_file() for directory in model_directories(source)):
            raise CheckpointError(f"{source}: there is no {FILE_NAME} for --compare-prompt; give --compare-token-ids instead")
        tokenizer = Tokenizer.load(find_tokenizer(source, None))
        prompts |= {text: [bos_token, *tokenizer.encode(text)] for text in texts}
    return prompts


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


def _print_comparison(source: Path, target: Path) -> None:
    found = compare(source, target, report=_print_compared, report_progress=_print_progress)
    _print(
        totals={
            "tensors": len(found),
            "exact": sum(comparison.is_exact for comparison in found),
            "max_rms_error": max(comparison.rms_error for comparison in found),
        }
    )


def _print_logit_errors(arguments: argparse.Namespace) -> None:
    prompts = prompts_of(arguments.source, texts=arguments.prompt, token_ids=arguments.token_ids)
    settings = Settings(weights=arguments.weights, group=arguments.group) if arguments.weights else None
    check(arguments.source, prompts, memory_bytes=host_memory_bytes(), target=arguments.target, settings=settings)
    found: list[LogitError] = []
    if arguments.target is not None:
        jax.config.update("jax_platforms", "cpu")
        found = compare_logits(arguments.source, arguments.target, prompts, report=lambda error: _print(logits=asdict(error)))
    _print(totals={"prompts": len(found)})


def _print_compared(comparison: Comparison) -> None:
    _print(comparison=asdict(comparison))


def _print_convert_progress(progress: ConvertProgress) -> None:
    _print(progress=asdict(progress))


def _print_progress(progress: Progress) -> None:
    _print(progress={"done": progress.done, "total": progress.total, "unit": progress.unit, "detail": progress.detail})


def _print(**line: Any) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
