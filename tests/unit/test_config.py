"""The model's configuration: what a `config.json` may say, where it is looked for, and what the engine's memory follows from."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_core import TINY_MODEL

from engine.config import EngineOptions, ModelConfig, SchedulerConfig, find_model_config, kv_bytes_per_token, read_model_config
from engine.errors import ConfigError
from engine.messages import Configure, decode_from_server, encode

PLAIN: dict[str, Any] = {name: getattr(TINY_MODEL, name) for name in TINY_MODEL.__slots__}


def write_config(directory: Path, text: str = "") -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(text or json.dumps(PLAIN))


def configured(model: ModelConfig) -> EngineOptions:
    return EngineOptions(model=model, model_dir="m", scheduler=SchedulerConfig(max_model_len=model.sequence_len))


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("widening_factor", "1e400"),
        ("widening_factor", "NaN"),
        ("widening_factor", "-4"),
        ("widening_factor", "0"),
        ("widening_factor", "1e308"),
        ("widening_factor", "1" + "0" * 400),
        ("widening_factor", "true"),
        ("embedding_multiplier_scale", "1e400"),
        ("embedding_multiplier_scale", "1e300"),
        ("output_multiplier_scale", "-Infinity"),
        ("attn_output_multiplier", "NaN"),
        ("rope_base", "1" + "0" * 400),
        ("sequence_len", str(2**70)),
        ("sequence_len", "64.5"),
        ("num_layers", str(2**31)),
        ("row_parallel_scale_groups", str(2**70)),
        ("row_parallel_scale_groups", '"8"'),
        ("bos_token", "null"),
    ],
)
def test_a_number_that_no_model_can_have_is_refused_by_key_in_one_line(tmp_path: Path, key: str, number: str) -> None:
    keys = {name: value for name, value in PLAIN.items() if not (key == "widening_factor" and name == "ffn_size")}
    write_config(tmp_path, json.dumps(keys | {key: "HERE"}).replace('"HERE"', number))

    with pytest.raises(ConfigError, match=rf"config\.json: model config: {key} must be ") as caught:
        read_model_config(tmp_path)

    assert "\n" not in str(caught.value)


def test_a_huge_width_beside_a_widening_factor_is_refused_before_it_is_multiplied() -> None:
    keys = {name: value for name, value in PLAIN.items() if name != "ffn_size"}

    with pytest.raises(ConfigError, match="emb_size must be a finite number"):
        ModelConfig.from_json(keys | {"widening_factor": 8.0, "emb_size": 10**400})


def test_the_largest_numbers_that_are_accepted_travel_to_the_engine() -> None:
    model = replace(TINY_MODEL, sequence_len=2**31 - 1, embedding_multiplier_scale=3.4e38, output_multiplier_scale=2**31 - 1)

    assert decode_from_server(encode(Configure(configured(model)))) == Configure(configured(model))


def test_the_originals_keys_that_do_not_change_inference_are_ignored() -> None:
    original = {
        "name": "transformer",
        "fprop_dtype": "bfloat16",
        "model_type": None,
        "init_scale_override": None,
        "embedding_init_scale": 1.0,
        "shard_embeddings": True,
        "model": {
            "capacity_factor": 1.0,
            "init_scale": 1.0,
            "shard_activations": True,
            "data_axis": ["replica", "data"],
            "model_axis": "model",
        },
    }

    assert ModelConfig.from_json(PLAIN | original) == TINY_MODEL


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="unknown key 'sliding_window'"):
        ModelConfig.from_json(PLAIN | {"sliding_window": 4096})


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"missing emb_size, num_layers$"):
        ModelConfig.from_json({name: value for name, value in PLAIN.items() if name not in ("emb_size", "num_layers")})


@pytest.mark.parametrize("name", ["ckpt-0", "ckpt", "weights"])
def test_the_configuration_is_found_above_a_directory_of_tensors_whatever_its_name(tmp_path: Path, monkeypatch, name: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "tensor00000_000").touch()

    assert find_model_config(tmp_path / name) == tmp_path / "config.json"
    monkeypatch.chdir(tmp_path / name)
    assert read_model_config(Path()) == TINY_MODEL


def test_the_configuration_above_a_directory_without_tensors_is_not_taken(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "ckpt-0").mkdir()
    (tmp_path / "ckpt-0" / "tensor_index.txt").touch()

    assert find_model_config(tmp_path / "ckpt-0") is None
    assert find_model_config(tmp_path / "absent") is None


def test_a_configuration_that_is_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config.json"

    path.mkdir()
    with pytest.raises(ConfigError, match=r"config\.json is a directory; a JSON file is expected there"):
        read_model_config(tmp_path)
    path.rmdir()
    path.symlink_to("moved-away.json")
    with pytest.raises(ConfigError, match=r"config\.json is a link to nothing"):
        read_model_config(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"config\.json is not a regular file"):
        read_model_config(tmp_path)
    path.unlink()
    assert read_model_config(tmp_path) == ModelConfig.preset("grok-1")


def test_a_cpu_holds_one_full_sequence_of_a_plausible_model_unless_that_takes_half_its_memory() -> None:
    model = replace(TINY_MODEL, num_layers=12, num_q_heads=8, num_kv_heads=8, key_size=128, sequence_len=8192)
    options = configured(model)

    cache_bytes = options.default_cpu_cache_bytes(memory_bytes=8 << 30)

    assert cache_bytes == 2 * 12 * 8 * 128 * 8192 * 4
    assert options.resolve(backend="cpu", free_bytes=cache_bytes).cache.num_blocks == 8192 // 16
    too_little = options.default_cpu_cache_bytes(memory_bytes=1 << 30)
    with pytest.raises(ConfigError, match=r"holds 5,456 tokens, but max_model_len is 8,192; lower --max-model-len or raise --kv-cache"):
        options.resolve(backend="cpu", free_bytes=too_little)


def test_a_small_model_gets_twice_what_all_its_sequences_can_hold_and_512_mib_at_most() -> None:
    options = configured(TINY_MODEL)
    all_sequences_bytes = options.scheduler.max_num_seqs * TINY_MODEL.sequence_len * kv_bytes_per_token(TINY_MODEL, "float32")

    assert options.default_cpu_cache_bytes(memory_bytes=1 << 40) == 2 * all_sequences_bytes
    wider = configured(replace(TINY_MODEL, sequence_len=1 << 16))
    assert wider.default_cpu_cache_bytes(memory_bytes=1 << 40) == 512 << 20


def test_an_explicit_cache_size_is_used_to_its_last_block() -> None:
    options = replace(configured(TINY_MODEL), cache_bytes=(64 << 20) + 1)

    num_blocks = options.resolve(backend="cpu", free_bytes=0).cache.num_blocks

    assert num_blocks == (64 << 20) // (16 * kv_bytes_per_token(TINY_MODEL, "float32"))
