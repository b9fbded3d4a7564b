"""Checkpoints of half a megabyte whose matrices have whole int4 groups, and what is done to their files."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.convert import MAX_FILE_BYTES, ConvertTotals, Settings, TargetForm, convert
from engine.checkpoint.save import random_tensors, save_checkpoint
from engine.checkpoint.tensors import Checkpoint
from engine.config import ModelConfig, read_model_config

CONFIG = ModelConfig(
    vocab_size=32,
    sequence_len=64,
    emb_size=128,
    key_size=16,
    num_q_heads=8,
    num_kv_heads=4,
    num_layers=2,
    num_experts=2,
    num_selected_experts=1,
    ffn_size=256,
    embedding_multiplier_scale=8.0,
    output_multiplier_scale=0.5,
    attn_output_multiplier=0.25,
    row_parallel_scale_groups=2,
)


def write_released(model_dir: Path, *, seed: int = 1, config: ModelConfig = CONFIG) -> Path:
    """Random weights in the released format."""
    save_checkpoint(model_dir, config, make_tensor=random_tensors(config, seed=seed))
    (model_dir / "config.json").write_text(json.dumps(asdict(config)))
    return model_dir


def converted(
    source: Path, target: Path, weights: TargetForm = "int8", *, group: int = 64, max_file_bytes: int = MAX_FILE_BYTES
) -> ConvertTotals:
    """Convert with nobody watching."""
    return convert(source, target, Settings(weights=weights, group=group), report=lambda _: None, max_file_bytes=max_file_bytes)


def opened(model_dir: Path) -> Checkpoint:
    """Open with the configuration that lies there."""
    return open_checkpoint(model_dir, read_model_config(model_dir))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Replace a JSON file's content by what `change` returns of it, or by what it has become where that is None."""
    raw = json.loads(path.read_bytes())
    result = change(raw)
    path.write_text(json.dumps(raw if result is None else result))
