"""Collectives are found in a compiled program's text however XLA writes them."""

import pytest

from engine.hlo import Collective, collectives

ALL_REDUCE = (
    "  %psum.56 = f32[16,32]{1,0} all-reduce(%fusion.96), channel_id=1, replica_groups={{0,1}}, to_apply=%region_9.10, "
    'metadata={op_name="jit(step)/shard_map/jit(decoder_layer)/attention/psum" stack_frame_id=390}'
)


def test_an_all_reduce_has_its_bytes_and_its_scopes():
    assert collectives(ALL_REDUCE) == [
        Collective(kind="all-reduce", num_bytes=16 * 32 * 4, scopes=("jit(step)", "shard_map", "jit(decoder_layer)", "attention", "psum"))
    ]


@pytest.mark.parametrize(
    ("line", "kind", "num_bytes"),
    [
        ("ROOT %ag = bf16[16,64]{0,1} all-gather(%x), dimensions={1}", "all-gather", 2048),
        ("%ar = (f32[8]{0}, bf16[4,4]{1,0}) all-reduce(%x, %y), to_apply=%add", "all-reduce", 64),
        ("ar.1 = f32[8,128]{1,0:T(8,128)} all-reduce-start(x), to_apply=add", "all-reduce", 4096),
        ("%ag = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}", "all-gather", 128),
        ("%cp = (s8[64]{0}, s8[64]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}", "collective-permute", 64),
        ("%rs = pred[] reduce-scatter(%x), dimensions={0}", "reduce-scatter", 1),
        ("%a2a = f8e4m3fn[2,8]{1,0} all-to-all(%x), dimensions={0}", "all-to-all", 16),
        ("%small = s4[9]{0} all-gather(%x), dimensions={0}", "all-gather", 5),
    ],
)
def test_results_of_any_type_and_form_are_counted_once(line: str, kind: str, num_bytes: int):
    assert collectives(f"  {line}\n") == [Collective(kind=kind, num_bytes=num_bytes, scopes=())]


@pytest.mark.parametrize(
    "line",
    [
        "%done = f32[8]{0} all-reduce-done(%ar.1)",
        "%fusion = f32[8]{0} fusion(%all-reduce.3), kind=kLoop, calls=%fused",
        "%gte = f32[8]{0} get-tuple-element(%all-reduce.5), index=0",
        '%add = f32[8]{0} add(%x, %y), metadata={op_name="jit(f)/all-reduce(x)"}',
        "%region_0.1 (a: f32[], b: f32[]) -> f32[] {",
    ],
)
def test_what_only_speaks_of_one_is_none(line: str):
    assert collectives(line) == []


def test_one_in_a_loop_says_so():
    (found,) = collectives('%ag = f32[8]{0} all-gather(%x), metadata={op_name="jit(step)/sample/while/body/all_gather"}')

    assert found.is_in_loop
    assert not collectives(ALL_REDUCE)[0].is_in_loop
