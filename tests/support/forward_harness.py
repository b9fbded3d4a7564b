"""Small models, and two ways to run one: `ForwardHarness` returns every position's logits, `finish` an engine's answers to requests."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from engine.batch import Batcher, StepLayout
from engine.block_pool import BlockPool
from engine.config import CacheConfig, DType, EngineConfig, MeshConfig, ModelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.model.params import Params
from engine.model.transformer import forward, logits_of
from engine.ops.tiles import map_rows
from engine.programs import shardings_of, state_shapes, step_layouts
from engine.runner import empty_state
from engine.scheduler import Schedule, ScheduledTokens
from engine.sequence import Sequence
from engine.sharding import make_meshes, on_mesh, replicated
from engine.types import FinishReason, GenerationRequest, Progress, SamplingParams, TokenDelta, TokenLogprob


def small_model(**changes: Any) -> ModelConfig:
    """A Grok-1-shaped model that compiles in seconds; every field can be given."""
    fields = {
        "vocab_size": 64,
        "sequence_len": 80,
        "emb_size": 32,
        "key_size": 8,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "num_layers": 2,
        "num_experts": 4,
        "num_selected_experts": 2,
        "ffn_size": 40,
        "embedding_multiplier_scale": 5.7,
        "output_multiplier_scale": 0.57,
        "attn_output_multiplier": 0.35,
        **changes,
    }
    return ModelConfig(**fields)


def engine_config(
    model: ModelConfig,
    *,
    model_dir: str = "",
    dtype: DType = "float32",
    num_blocks: int = 64,
    block_size: int = 16,
    mesh: MeshConfig = MeshConfig(),
    **scheduler: int,
) -> EngineConfig:
    """A configuration for tests; every limit can be given."""
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": model.sequence_len, **scheduler}
    return EngineConfig(
        model=model,
        model_dir=model_dir,
        dtype=dtype,
        mesh=mesh,
        cache=CacheConfig(num_blocks=num_blocks, block_size=block_size),
        scheduler=SchedulerConfig(**limits),
    )


@dataclass(slots=True, kw_only=True)
class Answer:
    """All deltas of one request, joined; equal answers are equal to the bit."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: TokenDelta) -> None:
        assert self.finish_reason is None, "a delta came after the last one"
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.finish_reason = delta.finish_reason


def finish(core: EngineCore, requests: Iterable[GenerationRequest], *, steps_between: int = 0) -> dict[str, Answer]:
    """Submit the requests, `steps_between` steps apart, and step until all have ended."""
    answers: dict[str, Answer] = {}

    def step() -> None:
        for delta in core.step():
            answers[delta.request_id].add(delta)

    for request in requests:
        core.submit(request)
        answers[request.request_id] = Answer()
        for _ in range(steps_between):
            step()
    while core.has_work:
        step()
    return answers


def no_report(_: Progress) -> None:
    """For starts that nobody watches."""


def _stale(array: jax.Array, stale: float) -> jax.Array:
    """An array of the empty cache with `stale` in it, or where it holds bits with all of them set, which is no number in any float."""
    if jnp.issubdtype(array.dtype, jnp.integer):
        return ~array if stale else array
    return array + jnp.asarray(stale, array.dtype)


class ForwardHarness:
    """Runs chosen chunks of several sequences through the real batch, cache and forward pass.

    `run` takes (prompt, chunk lengths) pairs; chunk i of every prompt is computed in step i, all in one batch in the order given. A
    bucket is compiled at its first use; `layouts` limits them.
    """

    def __init__(self, config: EngineConfig, params: Params, *, layouts: tuple[StepLayout, ...] | None = None):
        self.config = config
        self.params = params
        (self.mesh,) = make_meshes(config.mesh, config.model)
        self.batcher = Batcher(
            layouts or step_layouts(config),
            block_size=config.cache.block_size,
            num_blocks=config.cache.num_blocks,
            vocab_size=config.model.vocab_size,
            num_slots=config.scheduler.max_num_seqs,
        )
        self._steps = {layout: jax.jit(self._step_of(layout)) for layout in self.batcher.layouts}

    def run(self, work: Seq[tuple[Seq[int], Seq[int]]], *, stale: float = 0.0) -> list[NDArray[np.float32]]:
        """Logits [prompt length, V] for every prompt; `stale` is what the cache holds before, from whoever had the blocks last."""
        pool = BlockPool(self.config.cache.num_blocks)
        cache = jax.tree.map(lambda array: _stale(array, stale), empty_state(self.config, self.mesh).cache)
        sequences = [self._sequence(prompt, index, pool) for index, (prompt, _) in enumerate(work)]
        rows: list[list[NDArray[np.float32]]] = [[] for _ in work]
        for step in range(max(len(chunks) for _, chunks in work)):
            items = tuple(
                ScheduledTokens(sequence=sequence, start=sequence.num_computed_tokens, num_tokens=chunks[step], chooses_token=False)
                for sequence, (_, chunks) in zip(sequences, work, strict=True)
                if step < len(chunks)
            )
            batch = self.batcher.build(Schedule(items=items, admitted=() if step else tuple(sequences)))
            logits, cache = self._steps[batch.layout](self.params, cache, batch.packed)
            for item, start in zip(batch.items, batch.token_starts, strict=True):
                item.sequence.num_computed_tokens += item.num_tokens
                rows[item.sequence.arrival].append(np.asarray(logits[start : start + item.num_tokens]))
        return [np.concatenate(parts) for parts in rows]

    def _sequence(self, prompt: Seq[int], index: int, pool: BlockPool) -> Sequence:
        request = GenerationRequest(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=SamplingParams())
        blocks = pool.take(-(-len(prompt) // self.config.cache.block_size))
        return Sequence(request=request, arrival=index, token_ids=list(prompt), block_ids=blocks, slot=index)

    def _step_of(self, layout: StepLayout):
        def step(params, cache, packed):
            fields = layout.unpack(packed, lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32))
            hidden, cache = forward(params, cache, fields, self.config.model)
            return map_rows(lambda x: logits_of(params, x, self.config.model), fields.counts[0], hidden), cache

        cache, each = state_shapes(self.config, self.mesh).cache, replicated(self.mesh)
        packed = jax.ShapeDtypeStruct((layout.packed_len,), jnp.int32, sharding=each)
        return on_mesh(step, self.mesh, arguments=(self.params, cache, packed), results=(each, shardings_of(cache)))
