"""Whether Grok-1 fits, with the numbers that can be checked by hand."""

import json
import subprocess
import sys
from dataclasses import replace

import msgspec
import pytest

from engine.config import MeshConfig, ModelConfig, SchedulerConfig
from engine.errors import ConfigError
from engine.footprint import DEVICES, Setup, expected_experts, kv_bytes_per_token, payload_bytes, read_bytes, weights_by_kind
from engine.plan import Question, make_plan

GROK_1 = ModelConfig.preset("grok-1")


def a_setup(*, tensor: int = 8, weights: str = "int8", max_model_len: int = 8192, **mesh: int) -> Setup:
    return Setup(
        model=GROK_1,
        mesh=MeshConfig(tensor=tensor, **mesh),
        scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=256, max_model_len=max_model_len),
        weights=weights,
        kv="bfloat16",
        dtype="bfloat16",
    )


def plan_for(device: str, **setup: object):
    return make_plan(Question(setup=a_setup(**setup), device=DEVICES[device], memory_share=0.9))


def test_the_released_tensors_are_counted_to_the_byte():
    assert payload_bytes(GROK_1) == 318_239_694_848


def test_on_one_device_the_kinds_are_the_payload_but_for_the_cast_of_the_embedding():
    whole = sum(each.device_bytes for each in weights_by_kind(a_setup(tensor=1)))

    assert whole == payload_bytes(GROK_1) - GROK_1.vocab_size * GROK_1.emb_size * 2


def test_sharded_kinds_are_divided_and_replicated_ones_are_not():
    one = {each.kind: each for each in weights_by_kind(a_setup(tensor=1))}
    eight = {each.kind: each for each in weights_by_kind(a_setup(tensor=8))}

    for kind in ("experts", "attention", "embedding"):
        assert eight[kind].device_bytes * 8 == one[kind].device_bytes
        assert eight[kind].placed == "sharded over 8"
    assert eight["router, norms"].device_bytes == one["router, norms"].device_bytes


def test_whole_experts_per_device_take_as_much_as_slices_of_all():
    sliced = {each.kind: each.device_bytes for each in weights_by_kind(a_setup(tensor=8))}
    whole = {each.kind: each.device_bytes for each in weights_by_kind(a_setup(tensor=1, expert=8))}

    assert whole["experts"] == sliced["experts"]


def test_a_token_of_grok_1_keeps_a_quarter_of_a_mebibyte_over_all_devices():
    assert kv_bytes_per_token(a_setup(tensor=1)) == 256 * 1024
    assert kv_bytes_per_token(a_setup(tensor=8)) == 32 * 1024


def test_int4_takes_at_most_0_54_of_int8():
    int8 = {each.kind: each.device_bytes for each in weights_by_kind(a_setup())}
    int4 = {each.kind: each.device_bytes for each in weights_by_kind(a_setup(weights="int4"))}

    assert 0.5 < int4["experts"] / int8["experts"] < 0.54


@pytest.mark.parametrize(
    ("device", "tensor", "weights"),
    [("h100-80", 8, "int8"), ("h200", 8, "int8"), ("h200", 4, "int8"), ("h200", 4, "int4"), ("h200", 2, "int4")],
)
def test_grok_1_fits_where_people_have_run_it(device: str, tensor: int, weights: str):
    plan = plan_for(device, tensor=tensor, weights=weights)

    assert plan.problem is None
    assert plan.alternatives == []
    used = plan.weight_bytes + sum(plan.temporaries.values()) + plan.cache_tokens * plan.kv_bytes_per_token
    scratch_bytes = 16 * plan.kv_bytes_per_token
    assert used + scratch_bytes <= plan.usable_bytes < used + 2 * scratch_bytes
    assert plan.cache_tokens >= 8192


def test_what_does_not_fit_says_why_and_what_would_in_numbers():
    plan = plan_for("h200", tensor=1)

    assert plan.problem is not None
    assert "316.6 GB" in plan.problem
    assert [(each.num_devices, each.change) for each in plan.alternatives] == [
        (4, "4 devices (--tensor-parallel-size 4)"),
        (2, "2 devices (--tensor-parallel-size 2), int4 weights"),
    ]
    for each in plan.alternatives:
        weights = "int4" if "int4" in each.change else "int8"
        assert plan_for("h200", tensor=each.num_devices, weights=weights).cache_tokens == each.cache_tokens


def test_a_context_that_is_too_long_has_a_shorter_one_as_the_way_out():
    ample = plan_for("h100-80")
    needed = ample.weight_bytes + sum(ample.temporaries.values()) + (4096 // 16 + 1) * ample.block_bytes
    question = Question(setup=a_setup(), device=replace(DEVICES["h100-80"], memory_bytes=needed + 1000))

    plan = make_plan(question)

    assert plan.problem is not None
    assert plan.cache_tokens == 4096
    shorter = next(each for each in plan.alternatives if "--max-model-len" in each.change)
    assert "--max-model-len 4096" in shorter.change


@pytest.mark.parametrize(
    ("mesh", "named"),
    [({"tensor": 3}, "num_kv_heads 8"), ({"tensor": 32}, "num_q_heads 48"), ({"tensor": 1, "expert": 3}, "num_experts 8")],
)
def test_widths_that_do_not_divide_are_refused_by_name(mesh: dict[str, int], named: str):
    with pytest.raises(ConfigError, match=named):
        plan_for("h100-80", **mesh)


def test_a_batch_reads_more_experts_but_never_more_than_there_are():
    assert expected_experts(GROK_1, 1) == 2
    assert [round(expected_experts(GROK_1, batch), 1) for batch in (2, 4, 8)] == [3.5, 5.5, 7.2]
    assert expected_experts(GROK_1, 10_000) == pytest.approx(8)


def test_a_step_of_one_sequence_reads_two_experts_of_each_layer():
    bytes_of = {each.kind: each.device_bytes for each in weights_by_kind(a_setup())}

    found = read_bytes(a_setup(), batch=1, context=0)

    assert found == pytest.approx(bytes_of["experts"] / 4 + sum(bytes_of.values()) - bytes_of["experts"])


def test_estimates_stay_below_the_ideal_and_grow_with_the_batch():
    found = plan_for("h100-80").speeds

    assert [each.batch for each in found] == [1, 8, 32, 128]
    assert all(each.expected_tokens_per_s < each.ideal_tokens_per_s for each in found)
    assert sorted(each.expected_tokens_per_s for each in found) == [each.expected_tokens_per_s for each in found]


def test_the_program_answers_in_json_and_explains_what_it_does_not_take():
    def ask(**query: object) -> tuple[int, dict]:
        body = {"model": msgspec.to_builtins(GROK_1), "device": "h200", "scheduler": {"max_model_len": 8192}, **query}
        process = subprocess.run(
            [sys.executable, "-m", "engine.plan_query"], input=msgspec.json.encode(body), capture_output=True, check=False
        )
        return process.returncode, json.loads(process.stdout)

    status, plan = ask(num_devices=8)
    assert (status, plan["problem"], plan["payload_bytes"]) == (0, None, 318_239_694_848)

    status, answer = ask(device="abacus")
    assert status == 2
    assert "none of a100-80" in answer["error"]


def test_what_a_compiler_found_stands_for_the_bound_of_a_step():
    question = Question(setup=a_setup(), device=DEVICES["h100-80"])
    bound, compiled = make_plan(question), make_plan(replace(question, step_bytes=238_000_000))

    assert compiled.temporaries["compiled step"] == 238_000_000
    assert compiled.temporaries.keys() - {"compiled step"} == {"slots", "sampling", "runtime"}
    saved = sum(bound.temporaries.values()) - sum(compiled.temporaries.values())
    assert compiled.cache_bytes == bound.cache_bytes + saved
