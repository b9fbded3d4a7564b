"""A model's logits for whole prompts, by the forward pass that serves: for comparing the forms of weights and of the KV cache.

`compare_logits` and `benchmarks/quantization.py` use it. Every prompt is computed alone, in one step; nothing of the scheduler takes part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from engine.batch import Batcher
from engine.block_pool import BlockPool
from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.load import load_params
from engine.config import CacheConfig, DType, EngineConfig, KVDType, MeshConfig, SchedulerConfig, read_model_config
from engine.model.cache import KVCache
from engine.model.params import Params
from engine.model.transformer import forward, logits_of
from engine.programs import state_shapes, step_layouts
from engine.runner import empty_state
from engine.scheduler import Schedule, ScheduledTokens
from engine.sequence import Sequence as RunningSequence
from engine.sharding import make_meshes, on_mesh, replicated
from engine.types import GenerationRequest, SamplingParams

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """How a model is computed."""

    dtype: DType = "float32"
    kv_dtype: KVDType = "float32"
    keeps_packed: bool = True  # int8 and int4 matrices stay what they are


def prompt_logits(model_dir: Path, prompts: Sequence[Sequence[int]], arithmetic: Arithmetic) -> Iterator[NDArray[np.float32]]:
    """[tokens, V] of each prompt in turn. Raises `CheckpointError` for a model that cannot be loaded."""
    model = read_model_config(model_dir)
    longest = max(map(len, prompts))
    config = EngineConfig(
        model=model,
        model_dir=str(model_dir),
        dtype=arithmetic.dtype,
        mesh=MeshConfig(),
        cache=CacheConfig(block_size=BLOCK_SIZE, num_blocks=-(-longest // BLOCK_SIZE), dtype=arithmetic.kv_dtype),
        scheduler=SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=longest, max_model_len=longest),
    )
    (mesh,) = make_meshes(config.mesh, model)
    checkpoint = open_checkpoint(model_dir, model)
    params = load_params(checkpoint, model, dtype=config.dtype, mesh=mesh, keep_int8=arithmetic.keeps_packed, report=lambda _: None)
    layout = step_layouts(config)[-1]
    batcher = Batcher((layout,), block_size=BLOCK_SIZE, num_blocks=config.cache.num_blocks, vocab_size=model.vocab_size, num_slots=1)

    def step(params: Params, cache: KVCache, packed: jax.Array) -> jax.Array:
        fields = layout.unpack(packed, lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32))
        hidden, _ = forward(params, cache, fields, model)
        return logits_of(params, hidden, model)

    cache, each = state_shapes(config, mesh).cache, replicated(mesh)
    packed = jax.ShapeDtypeStruct((layout.packed_len,), jnp.int32, sharding=each)
    compute = jax.jit(on_mesh(step, mesh, arguments=(params, cache, packed), results=each))
    empty = empty_state(config, mesh).cache
    for prompt in prompts:
        request = GenerationRequest(request_id="", prompt_token_ids=tuple(prompt), sampling=SamplingParams())
        blocks = BlockPool(config.cache.num_blocks).take(-(-len(prompt) // BLOCK_SIZE))
        sequence = RunningSequence(request=request, arrival=0, token_ids=list(prompt), block_ids=blocks, slot=0)
        item = ScheduledTokens(sequence=sequence, start=0, num_tokens=len(prompt), chooses_token=False)
        batch = batcher.build(Schedule(items=(item,), admitted=(sequence,)))
        yield np.asarray(compute(params, empty, batch.packed))[: len(prompt)]
