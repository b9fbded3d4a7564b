"""What a step holds beside its arguments where weights stay packed on a CPU."""

from pathlib import Path

import jax
import pytest
from forward_harness import engine_config, small_model
from small_checkpoints import write_released

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.load import param_shapes
from engine.config import MeshConfig
from engine.programs import Programs
from engine.sharding import make_meshes

MODEL = small_model(emb_size=64, num_q_heads=8, num_experts=8, ffn_size=2048, row_parallel_scale_groups=2)


@pytest.mark.parametrize("tensor", [1, 2])
def test_no_step_holds_all_experts_as_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: int) -> None:
    mesh_config = MeshConfig(tensor=tensor)
    config = engine_config(MODEL, mesh=mesh_config, max_num_seqs=1, max_num_batched_tokens=16, num_blocks=8)
    (mesh,) = make_meshes(mesh_config, MODEL)
    checkpoint = open_checkpoint(write_released(tmp_path, config=MODEL), MODEL)
    programs = Programs(config, param_shapes(checkpoint, MODEL, dtype="float32", mesh=mesh, keep_int8=True), mesh)
    temporaries: list[int] = []
    compile_ = jax.stages.Lowered.compile

    def noting_temporaries(lowered: jax.stages.Lowered, *arguments: object, **options: object) -> jax.stages.Compiled:
        compiled = compile_(lowered, *arguments, **options)  # type: ignore[arg-type]
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)  # type: ignore[union-attr]
        return compiled

    monkeypatch.setattr(jax.stages.Lowered, "compile", noting_temporaries)
    programs.compile_greedy(next(iter(programs.layouts)))

    one_expert_bytes = 3 * MODEL.emb_size * MODEL.ffn_size * 4 // tensor
    assert len(temporaries) == 1
    assert temporaries[0] < 2 * one_expert_bytes
