import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from fake_core import TINY_MODEL

from engine.config import MeshConfig
from engine.errors import ConfigError
from server.api_keys import ApiKey
from server.engine_options import engine_options
from server.limits import Limits
from server.settings import Settings, default_model_dir, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GROK_SERVER_{name.upper()}", raising=False)


@pytest.fixture
def model_dir(tmp_path) -> Path:
    directory = tmp_path / "my-model"
    directory.mkdir()
    keys = {field.name: getattr(TINY_MODEL, field.name) for field in fields(TINY_MODEL)}
    (directory / "config.json").write_text(json.dumps(keys))
    return directory


def yaml_file(tmp_path, text: str) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    return path


def test_defaults_are_those_that_are_documented():
    settings = load_settings({})

    assert (settings.host, settings.port, settings.dtype) == ("127.0.0.1", 8000, "auto")
    assert (settings.max_num_seqs, settings.max_num_batched_tokens, settings.block_size) == (64, 256, 16)
    assert (settings.max_logprobs, settings.shutdown_timeout, settings.engine_stall_timeout) == (20, 30, 8)


def test_a_flag_wins_over_the_environment_which_wins_over_yaml_which_wins_over_the_default(tmp_path, monkeypatch):
    path = yaml_file(tmp_path, "port: 1\nmax_num_seqs: 2\nblock_size: 3\n")
    monkeypatch.setenv("GROK_SERVER_PORT", "4")
    monkeypatch.setenv("GROK_SERVER_MAX_NUM_SEQS", "5")

    settings = load_settings({"config": str(path), "port": "6"})

    assert (settings.port, settings.max_num_seqs, settings.block_size, settings.max_num_batched_tokens) == (6, 5, 3, 256)


def test_the_yaml_file_can_be_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("GROK_SERVER_CONFIG", str(yaml_file(tmp_path, "host: 0.0.0.0")))

    assert load_settings({}).host == "0.0.0.0"


def test_an_empty_environment_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("GROK_SERVER_MODEL", "")

    assert load_settings({}).model is None


@pytest.mark.parametrize(
    ("alias", "value", "field"),
    [
        ("model_path", "/m", "model"),
        ("context_length", "77", "max_model_len"),
        ("mem_fraction_static", "0.5", "gpu_memory_utilization"),
        ("tp_size", "2", "tensor_parallel_size"),
        ("dp_size", "2", "data_parallel_size"),
        ("max_running_requests", "9", "max_num_seqs"),
        ("max_queued_requests", "9", "max_num_queued_reqs"),
    ],
)
def test_the_other_servers_names_mean_ours(alias, value, field, tmp_path):
    by_flag = load_settings({alias: value})
    by_yaml = load_settings({"config": yaml_file(tmp_path, f"{alias.replace('_', '-')}: {value}")})

    assert getattr(by_flag, field) == getattr(by_yaml, field) == getattr(load_settings({field: value}), field)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("max_num_seq: 4", "unknown key 'max_num_seq'; did you mean max_num_seqs"),
        ("config: other.yaml", "unknown key 'config'"),
        ("max-num-seqs: 4\nmax_running_requests: 5", "sets max_num_seqs twice"),
        ("- 4", "must hold a mapping of settings, found list"),
        ("a: [", "cannot read"),
        ("port: many", "--port: input should be a valid integer"),
    ],
)
def test_a_wrong_yaml_file_is_refused_in_one_line(text, complaint, tmp_path):
    with pytest.raises(ConfigError, match=complaint.replace("(", r"\(")) as caught:
        load_settings({"config": str(yaml_file(tmp_path, text))})

    assert "\n" not in str(caught.value)


def test_a_missing_yaml_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_settings({"config": str(tmp_path / "nowhere.yaml")})


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("port", "65536"),
        ("port", "-1"),
        ("max_num_seqs", "0"),
        ("dtype", "float64"),
        ("kv_cache_dtype", "int4"),
        ("cpu_weights", "int8"),
        ("gpu_memory_utilization", "1.5"),
        ("shutdown_timeout", "nan"),
        ("kv_cache_memory_bytes", "lots"),
        ("max_body_bytes", "0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_flag_and_value(flag, value):
    with pytest.raises(ConfigError) as caught:
        load_settings({flag: value})

    assert str(caught.value).startswith(f"--{flag.replace('_', '-')}: ")
    assert value in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_limit_can_be_set_and_arrives_in_the_limits():
    names = {"max_queued_sequences": "max_num_queued_reqs", "max_queued_tokens": "max_num_queued_tokens"}
    flags = {names.get(field.name, field.name): 1 for field in fields(Limits)}

    limits = load_settings(flags).limits

    assert limits == Limits(**{field.name: 1 for field in fields(Limits)})
    assert load_settings({}).limits == Limits()


@pytest.mark.parametrize("value", ["first,second", " first , second", ["first", "second"], ["first,second"]])
def test_several_api_keys_come_with_commas_or_in_a_list(value, monkeypatch):
    by_flag = load_settings({"api_key": value}).api_key
    monkeypatch.setenv("GROK_SERVER_API_KEY", "first,second")

    assert by_flag == load_settings({}).api_key == (ApiKey.of("first"), ApiKey.of("second"))


def test_keys_of_a_file_are_added_to_the_others(tmp_path):
    (tmp_path / "keys").write_text("second ann\n")

    keys = load_settings({"api_key": "first", "api_key_file": tmp_path / "keys"}).read_keys()

    assert (len(keys), keys.tenant_of(b"second")) == (2, "name:ann")
    assert not load_settings({}).read_keys()


@pytest.mark.parametrize("value", ["", "secret,", ["secret", ""], "my secret", 5, [["secret"]], {"secret": 1}])
def test_a_wrong_key_is_refused_without_repeating_it(value):
    with pytest.raises(ConfigError, match="--api-key: ") as caught:
        load_settings({"api_key": value})

    assert "secret" not in str(caught.value)


def test_settings_never_hold_a_key_itself():
    settings = load_settings({"api_key": "sk-secret"})

    assert "sk-secret" not in repr(settings) + repr(settings.model_dump())


@pytest.mark.parametrize("value", ["", "https://app.example/", "app.example", "https://a.example, b"])
def test_what_is_no_origin_is_refused(value):
    with pytest.raises(ConfigError, match="--allowed-origins: must be"):
        load_settings({"allowed_origins": value})


def test_origins_come_like_keys():
    origins = ("http://localhost:3000", "https://app.example")

    assert load_settings({"allowed_origins": ",".join(origins)}).allowed_origins == origins
    assert load_settings({"allowed_origins": ["*"]}).allowed_origins == ("*",)


def test_the_model_is_called_as_its_directory_unless_named(model_dir):
    (model_dir / "ckpt-0").mkdir()

    assert load_settings({"model": model_dir}).model_name == "my-model"
    assert load_settings({"model": f"{model_dir}/"}).model_name == "my-model"
    assert load_settings({"model": model_dir / "ckpt-0"}).model_name == "my-model"
    assert load_settings({"model": model_dir, "served_model_name": "grok"}).model_name == "grok"


def test_a_model_that_is_no_directory_is_named(tmp_path):
    with pytest.raises(ConfigError, match="missing is not a directory"):
        engine_options(load_settings({"model": tmp_path / "missing"}))


def test_the_engine_gets_what_was_asked_for_and_the_models_context(model_dir):
    options = engine_options(load_settings({"model": model_dir, "kv_cache_memory_bytes": "2MiB", "tp": "2"}))

    assert options.model == TINY_MODEL
    assert options.scheduler.max_model_len == TINY_MODEL.sequence_len
    assert (options.dtype, options.cache_bytes, options.mesh.tensor) == ("auto", 2 << 20, 2)
    assert Path(str(options.compile_cache_dir)).is_dir()


@pytest.mark.parametrize(
    ("flags", "mesh"),
    [
        ({}, MeshConfig()),
        ({"tp": "4", "dp": "2"}, MeshConfig(data=2, tensor=4)),
        ({"tp": "4", "enable_expert_parallel": True}, MeshConfig(expert=4)),
        ({"tp": "6", "dp": "3", "enable_expert_parallel": True}, MeshConfig(data=3, expert=2, tensor=3)),  # of 4 experts
        ({"tp": "8", "enable_expert_parallel": True}, MeshConfig(expert=4, tensor=2)),
        ({"tp": "3", "enable_expert_parallel": True}, MeshConfig(tensor=3)),
    ],
)
def test_the_flags_of_parallelism_say_how_many_devices_do_what(model_dir, flags, mesh):
    assert engine_options(load_settings({"model": model_dir, **flags})).mesh == mesh


def test_a_context_beyond_the_models_is_refused_with_both_numbers(model_dir):
    with pytest.raises(ConfigError, match=r"--max-model-len: the model was made for 256 tokens, found 257"):
        engine_options(load_settings({"model": model_dir, "max_model_len": "257"}))


def test_an_explicit_compile_cache_that_cannot_be_made_is_refused(model_dir):
    with pytest.raises(ConfigError, match="--compile-cache-dir"):
        engine_options(load_settings({"model": model_dir, "compile_cache_dir": model_dir / "config.json" / "below"}))


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16")])
def test_dtype_auto_follows_the_device_and_an_explicit_one_stays(model_dir, backend, dtype):
    auto = engine_options(load_settings({"model": model_dir}))
    explicit = engine_options(load_settings({"model": model_dir, "dtype": "float32"}))

    assert auto.resolve(backend=backend, free_bytes=1 << 24).dtype == dtype
    assert explicit.resolve(backend=backend, free_bytes=1 << 24).dtype == "float32"


@pytest.mark.parametrize(("backend", "auto"), [("cpu", "float32"), ("gpu", "bfloat16")])
def test_the_cache_has_the_dtype_of_the_computation_unless_told_and_holds_more_then(model_dir, backend, auto):
    followed = engine_options(load_settings({"model": model_dir})).resolve(backend=backend, free_bytes=1 << 24)
    told = engine_options(load_settings({"model": model_dir, "kv_cache_dtype": "int8"})).resolve(backend=backend, free_bytes=1 << 24)

    assert (followed.kv_dtype, told.kv_dtype) == (auto, "int8")
    assert told.dtype == followed.dtype
    num_bytes = (followed.cache.num_blocks, told.cache.num_blocks)
    head = TINY_MODEL.key_size
    assert num_bytes[1] / num_bytes[0] == pytest.approx(head * {"float32": 4, "bfloat16": 2}[auto] / (head + 4), rel=0.01)


def test_packed_weights_on_a_cpu_are_told_to_the_engine(model_dir):
    assert engine_options(load_settings({"model": model_dir})).cpu_weights == "float"
    packed = engine_options(load_settings({"model": model_dir, "cpu_weights": "packed"}))
    assert packed.resolve(backend="cpu", free_bytes=1 << 24).cpu_weights == "packed"


def test_a_cache_that_holds_no_whole_sequence_is_refused(model_dir):
    options = engine_options(load_settings({"model": model_dir, "kv_cache_memory_bytes": "1kB"}))

    with pytest.raises(ConfigError, match="raise --kv-cache-memory-bytes"):
        options.resolve(backend="cpu", free_bytes=1 << 24)


def test_the_default_model_is_found_beside_the_code():
    assert default_model_dir().name == "grok-1-tiny"


def test_settings_and_supervision_import_neither_jax_nor_fastapi():
    code = "import sys, server.cli, server.lifecycle, engine.__main__; print({'jax', 'fastapi'} & set(sys.modules))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.parametrize(("short", "name"), [("tp", "--tensor-parallel-size"), ("dp", "--data-parallel-size")])
def test_every_name_of_parallelism_is_a_flag(short, name, tmp_path):
    for flag in (f"-{short}", f"--{short}", f"--{short}-size", name):
        command = [sys.executable, "-m", "server", "serve", str(tmp_path), flag, "many"]
        result = subprocess.run(command, capture_output=True, text=True)

        assert f"{name}: input should be a valid integer" in result.stderr
