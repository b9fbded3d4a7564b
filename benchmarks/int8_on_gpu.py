"""What XLA's compiler for NVIDIA GPUs makes of int8 and int4 weights: whether a compiled step holds a matrix as floats.

    python -m benchmarks.int8_on_gpu

Needs no GPU, but jax's CUDA plugin (`pip install "jax[cuda12]"` has it). A few full-width layers of Grok-1 are compiled for each mesh and
form, and every buffer of the compiled program is looked at that holds floats and does not occur inside a kernel. The table is printed and
kept in `benchmarks/results/int8_on_gpu.json`.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving import machine
from engine.compile_plan import compiled_steps, pretend
from engine.config import MeshConfig, ModelConfig, SchedulerConfig
from engine.footprint import DEVICES, Setup, WeightFormat
from engine.target import devices_to_compile_for, forbid_timing

RESULTS = Path(__file__).parent / "results" / "int8_on_gpu.json"
CASES: tuple[tuple[str, MeshConfig, WeightFormat], ...] = (
    ("h100-80", MeshConfig(tensor=8), "int8"),
    ("h100-80", MeshConfig(expert=8), "int8"),
    ("h200", MeshConfig(tensor=4), "int8"),
    ("h200", MeshConfig(), "int8"),
    ("h200", MeshConfig(tensor=4), "int4"),
)

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>\S+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?\S+ = (?P<shape>.+?) (?P<operation>[a-z][\w-]*)\(")
_FLOATS = re.compile(r"\b(?:f32|bf16|f16)\[(?P<sizes>[\d,]+)\]")
_OF_OTHERS = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call")  # results that are not their own buffer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="full-width layers (default: 2)")
    num_layers = parser.parse_args().layers
    model = replace(ModelConfig.preset("grok-1"), num_layers=num_layers)
    pretend(1)
    forbid_timing()
    rows = [row for device, mesh, weights in CASES for row in _rows(model, device=device, mesh=mesh, weights=weights)]
    RESULTS.write_text(json.dumps({"machine": machine(), "layers": num_layers, "rows": rows}, indent=1) + "\n")
    _draw(rows)


def _rows(model: ModelConfig, *, device: str, mesh: MeshConfig, weights: WeightFormat) -> Iterator[dict[str, Any]]:
    setup = Setup(
        model=model,
        mesh=mesh,
        scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=256, max_model_len=8192),
        weights=weights,
        kv="bfloat16",
        dtype="bfloat16",
    )
    target = devices_to_compile_for(DEVICES[device], setup.shard_size)
    if target is None:
        sys.exit('the compiler for these devices is not installed: pip install "jax[cuda12]"')
    matrix = model.emb_size * model.ffn_size // mesh.tensor
    for layout, program, seconds in compiled_steps(setup, cache_blocks=1024, target=target, num_steps=2):
        # At 256 tokens activations of all experts are as large as a matrix; they have 256 among their sizes, which no matrix has.
        held = [shape for shape in float_buffers(program.as_text()) if prod(shape) >= matrix and layout.num_tokens not in shape]
        yield {
            "device": device,
            "mesh": {"expert": mesh.expert, "tensor": mesh.tensor},
            "weights": weights,
            "tokens": layout.num_tokens,
            "seconds": round(seconds, 1),
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "matrix_elements": matrix,
            "matrices_held_as_floats": ["x".join(map(str, shape)) for shape in held],
        }


def float_buffers(text: str) -> Iterator[tuple[int, ...]]:
    """Shapes of all floats that some instruction outside of a kernel leaves in memory, in XLA's text form."""
    is_kernel = False
    for line in text.splitlines():
        if (computation := _COMPUTATION.match(line)) is not None:
            is_kernel = re.search("fused|fusion|triton|region", computation["name"]) is not None
        elif not is_kernel and (instruction := _INSTRUCTION.match(line)) is not None and instruction["operation"] not in _OF_OTHERS:
            for floats in _FLOATS.finditer(instruction["shape"]):
                yield tuple(int(size) for size in floats["sizes"].split(","))


def _draw(rows: list[dict[str, Any]]) -> None:
    table = Table("device", "expert x tensor", "weights", "tokens", "temporaries", "matrices held as floats")
    for row in rows:
        held = row["matrices_held_as_floats"]
        mesh = f"{row['mesh']['expert']} x {row['mesh']['tensor']}"
        size = f"{row['temporary_bytes'] / 1e6:,.0f} MB"
        table.add_row(row["device"], mesh, row["weights"], str(row["tokens"]), size, ", ".join(sorted(set(held))) or "none")
    Console().print(table)


if __name__ == "__main__":
    main()
