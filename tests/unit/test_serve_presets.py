"""The presets in `configs/serve` are settings that load and fit the model they are written for."""

import json
from pathlib import Path

import pytest

from engine.config import ModelConfig
from server.engine_options import engine_options
from server.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"cpu-dev": ROOT / "models" / "grok-1-tiny" / "config.json", "h100-x8": ROOT / "configs" / "models" / "grok-1.json"}
PRESETS = sorted((ROOT / "configs" / "serve").glob("*.yaml"), key=lambda path: path.stem)


def test_every_preset_is_tested():
    assert {preset.stem for preset in PRESETS} == set(MODELS)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_the_model_it_is_written_for(preset: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = load_settings({"config": preset, "model": tmp_path})

    options = engine_options(settings, ModelConfig.from_json(json.loads(MODELS[preset.stem].read_text())))

    assert options.resolve(backend="cpu", free_bytes=2**33).cache.num_blocks > 0
