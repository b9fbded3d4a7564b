"""What is packed comes out again, whatever the schedule; what would leave its array is refused."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import PENDING, TILE, Batch, Batcher, StepInput, StepKind, StepLayout
from engine.prompt_scores import ScoreCollector
from engine.scheduler import Schedule, ScheduledTokens
from engine.sequence import Sequence
from engine.types import GenerationRequest, SamplingParams

BLOCK_SIZE, NUM_BLOCKS, VOCAB_SIZE, NUM_SLOTS, BLOCKS_PER_SEQ = 4, 40, 1000, 6, 16
LAYOUTS = tuple(StepLayout(num_tokens=size, num_seqs=min(size, NUM_SLOTS), blocks_per_seq=BLOCKS_PER_SEQ) for size in (8, 16, 64))
INT64 = st.integers(-(2**63), 2**63 - 1)


def batcher() -> Batcher:
    return Batcher(LAYOUTS, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, vocab_size=VOCAB_SIZE, num_slots=NUM_SLOTS)


def sequence_of(
    num_prompt: int = 3,
    *,
    num_output: int = 0,
    num_computed: int = 0,
    blocks: list[int] | None = None,
    slot: int | None = 0,
    sampling: SamplingParams | None = None,
    choice: int = 0,
    grammar: str | None = None,
) -> Sequence:
    """A running sequence whose tokens are 10, 11, 12 and so on."""
    tokens = list(range(10, 10 + num_prompt + num_output))
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=tuple(tokens[:num_prompt]),
        sampling=sampling or SamplingParams(temperature=0.0),
        choice=choice,
        grammar=grammar,
    )
    sequence = Sequence(
        request=request,
        arrival=0,
        token_ids=tokens,
        num_computed_tokens=num_computed,
        slot=slot,
        score_collector=ScoreCollector(BLOCK_SIZE) if request.sampling.prompt_logprobs is not None else None,
    )
    sequence.block_ids.extend(blocks if blocks is not None else range(1, 1 + -(-len(tokens) // BLOCK_SIZE)))
    return sequence


def build(*scheduled: tuple[Sequence, int]) -> tuple[Batch, StepInput]:
    """A built batch and what the device reads from it."""
    items = tuple(
        ScheduledTokens(
            sequence=sequence,
            start=sequence.num_computed_tokens,
            num_tokens=num_tokens,
            chooses_token=num_tokens == sequence.num_remaining_tokens and sequence.request.sampling.max_tokens > 0,
        )
        for sequence, num_tokens in scheduled
    )
    batch = batcher().build(Schedule(items=items, admitted=tuple(sequence for sequence, _ in scheduled)))
    return batch, batch.layout.unpack(batch.packed, lambda bits: bits.view(np.float32))


def test_the_smallest_bucket_that_holds_the_step_is_chosen() -> None:
    assert build((sequence_of(8), 8))[0].layout is LAYOUTS[0]
    assert build((sequence_of(9), 9))[0].layout is LAYOUTS[1]
    assert build((sequence_of(17), 17))[0].layout is LAYOUTS[2]


def test_every_bit_of_the_buffer_belongs_to_one_field() -> None:
    layout = LAYOUTS[1]
    packed = np.arange(layout.packed_len, dtype=np.int32)

    fields = layout.unpack(packed, lambda bits: bits)

    assert np.concatenate([field.ravel() for field in fields]).tolist() == packed.tolist()


def test_rows_that_choose_a_token_come_first() -> None:
    reading, ready = sequence_of(20, slot=1), sequence_of(2, num_output=1, num_computed=2, blocks=[9], slot=2)

    batch, step = build((reading, 8), (ready, 1))

    assert [item.sequence for item in batch.items] == [ready, reading]
    assert batch.num_sampled == 1
    assert step.counts.tolist() == [9, 1, 2]
    assert step.slots[:2].tolist() == [2, 1]
    assert step.sample_at[:2].tolist() == [0, 8]


def test_a_last_tile_that_is_not_full_ends_where_its_sequence_ends() -> None:
    decoding, reading = sequence_of(3, num_output=2, num_computed=4, slot=1), sequence_of(11, blocks=[7, 8, 9], slot=2)

    batch, step = build((decoding, 1), (reading, 11))

    assert batch.token_starts == (0, 1)
    assert step.counts.tolist() == [12, 2, 3]
    assert step.tile_rows[:3].tolist() == [0, 1, 1]
    assert step.tile_starts[:3].tolist() == [0, 1, 9]
    assert step.tile_ends[:3].tolist() == [5, 8, 11]
    assert step.tile_places[:12].tolist() == [0, *range(TILE, TILE + 11)]


def test_a_chunk_in_the_middle_starts_its_tiles_where_the_last_one_ended() -> None:
    _, step = build((sequence_of(30, num_computed=5), 10))

    assert step.positions[:10].tolist() == list(range(5, 15))
    assert step.tile_starts[:2].tolist() == [0, 8]
    assert step.tile_ends[:2].tolist() == [13, 15]


def test_tokens_go_to_the_places_of_their_blocks() -> None:
    _, step = build((sequence_of(6, blocks=[30, 7]), 6))

    assert step.cache_slots[:6].tolist() == [120, 121, 122, 123, 28, 29]
    assert step.block_tables[0, :3].tolist() == [30, 7, 0]


def test_padding_goes_to_the_scratch_block() -> None:
    _, step = build((sequence_of(3), 3))

    assert step.cache_slots[3:].tolist() == [0] * 5
    assert not step.block_tables[1:].any()


def test_each_prompt_token_is_scored_against_the_one_that_follows() -> None:
    scored = SamplingParams(temperature=0.0, prompt_logprobs=0)

    _, chunk = build((sequence_of(6, sampling=scored), 4))
    _, rest = build((sequence_of(6, num_computed=4, sampling=scored), 2))

    assert chunk.targets[:4].tolist() == [11, 12, 13, 14]
    assert rest.targets[:2].tolist() == [15, 0]


def test_only_generated_tokens_are_counted_as_output() -> None:
    _, step = build((sequence_of(3, num_output=2), 5))

    assert step.is_output[:5].tolist() == [0, 0, 0, 1, 1]


def test_end_tokens_are_masked_until_min_tokens_are_out() -> None:
    sampling = SamplingParams(min_tokens=2)

    masked = [build((sequence_of(3, num_output=n, num_computed=2 + n, sampling=sampling), 1))[1].mask_end[0] for n in range(4)]

    assert masked == [1, 1, 0, 0]


def test_a_token_that_is_still_on_the_device_is_marked_as_pending() -> None:
    decoding = sequence_of(3, num_output=1, num_computed=4, blocks=[1, 2])
    decoding.num_pending_tokens = 1

    batch, step = build((decoding, 1), (sequence_of(2, blocks=[5], slot=1), 2))

    assert step.token_ids[:3].tolist() == [PENDING, 10, 11]
    assert step.positions[:3].tolist() == [4, 0, 1]
    assert step.sample_positions[:2].tolist() == [5, 2]
    assert batch.num_sampled == 2


def test_a_token_in_a_shared_block_is_computed_but_not_written() -> None:
    sequence = sequence_of(8, num_computed=7, blocks=[30, 7])
    sequence.num_shared_tokens = 8

    _, step = build((sequence, 1))

    assert (step.positions[0], step.cache_slots[0]) == (7, 0)
    assert step.block_tables[0, :2].tolist() == [30, 7]


def test_a_slot_forgets_the_blocks_and_knobs_of_its_last_sequence() -> None:
    builder = batcher()
    first, second = sequence_of(8, blocks=[30, 7]), sequence_of(2, blocks=[9], sampling=SamplingParams(temperature=0.5))

    for sequence in (first, second):
        item = ScheduledTokens(sequence=sequence, start=0, num_tokens=2, chooses_token=False)
        batch = builder.build(Schedule(items=(item,), admitted=(sequence,)))

    step = batch.layout.unpack(batch.packed, lambda bits: bits.view(np.float32))
    assert step.block_tables[0].tolist() == [9] + [0] * (BLOCKS_PER_SEQ - 1)
    assert step.temperature[0] == 0.5


def test_a_prompt_that_wants_no_tokens_chooses_none() -> None:
    batch, step = build((sequence_of(3, sampling=SamplingParams(max_tokens=0)), 3))

    assert batch.num_sampled == step.counts[1] == 0


def test_a_top_k_beyond_the_vocabulary_is_the_whole_vocabulary() -> None:
    _, step = build((sequence_of(sampling=SamplingParams(top_k=2**40)), 3))

    assert step.top_k[0] == VOCAB_SIZE


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 2**32, -(2**32), 0x8000_0000])
def test_every_bit_of_a_seed_travels(seed: int) -> None:
    _, step = build((sequence_of(sampling=SamplingParams(seed=seed)), 3))

    high, low = (int(word) & 0xFFFF_FFFF for word in step.seeds[0])
    assert (high << 32 | low) == seed % 2**64


FLOAT_FIELDS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


@settings(max_examples=100, deadline=None)
@given(values=st.tuples(*[st.floats(width=32, allow_nan=False)] * len(FLOAT_FIELDS)), seed=INT64, choice=st.integers(0, 2**31 - 1))
def test_floats_travel_as_their_bits(values: tuple[float, ...], seed: int, choice: int) -> None:
    sampling = SamplingParams(seed=seed, **dict(zip(FLOAT_FIELDS, values, strict=True)))

    _, step = build((sequence_of(slot=1), 3), (sequence_of(blocks=[9], sampling=sampling, choice=choice, slot=2), 3))

    for name, value in zip(FLOAT_FIELDS, values, strict=True):
        assert getattr(step, name)[1].tobytes() == np.float32(value).tobytes()
    assert step.choices[1] == choice


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[Sequence, int]]:
    """Up to six sequences, each anywhere in its life, with blocks of their own in any order."""
    blocks = draw(st.permutations(range(1, NUM_BLOCKS + 1)))
    scheduled: list[tuple[Sequence, int]] = []
    for slot in draw(st.permutations(range(draw(st.integers(1, NUM_SLOTS))))):
        num_prompt, num_output = draw(st.integers(1, 14)), draw(st.integers(0, 8))
        num_computed = draw(st.integers(0, num_prompt + num_output - 1))
        num_tokens = draw(st.integers(1, min(10, num_prompt + num_output - num_computed)))
        own, blocks = blocks[:6], blocks[6:]
        sampling = SamplingParams(prompt_logprobs=draw(st.sampled_from([None, 0])))
        sequence = sequence_of(num_prompt, num_output=num_output, num_computed=num_computed, blocks=list(own), slot=slot, sampling=sampling)
        scheduled.append((sequence, num_tokens))
    return scheduled


@settings(max_examples=150, deadline=None)
@given(scheduled=schedules())
def test_any_schedule_is_laid_out_so_that_every_token_finds_its_sequence(scheduled: list[tuple[Sequence, int]]) -> None:
    batch, step = build(*scheduled)

    seen: list[int] = []
    for tile in range(step.counts[2]):
        row, start, end = step.tile_rows[tile], step.tile_starts[tile], step.tile_ends[tile]
        sequence = batch.items[row].sequence
        for place, position in enumerate(range(step.positions[start], end)):
            token = start + place
            seen.append(token)
            assert place < TILE
            assert step.tile_places[token] == tile * TILE + place
            assert step.token_rows[token] == row
            assert step.positions[token] == position
            assert step.token_ids[token] == sequence.token_ids[position]
            assert step.cache_slots[token] == sequence.block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            assert step.is_output[token] == (position >= sequence.num_prompt_tokens)
            assert step.targets[token] == ([*sequence.token_ids, 0][position + 1] if batch.kind is StepKind.SCORE else 0)
    assert sorted(seen) == list(range(sum(num_tokens for _, num_tokens in scheduled)))
    for row, item in enumerate(batch.items):
        assert step.slots[row] == item.sequence.slot
        assert step.sample_positions[row] == item.start + item.num_tokens
        assert step.sample_at[row] == batch.token_starts[row] + item.num_tokens - 1
        assert (row < batch.num_sampled) == item.chooses_token


def test_the_smallest_program_that_serves_every_row_is_chosen() -> None:
    greedy = (sequence_of(slot=1), 3)
    drawn = (sequence_of(sampling=SamplingParams(), blocks=[5], slot=2), 3)
    scored = (sequence_of(sampling=SamplingParams(prompt_logprobs=0), blocks=[6], slot=3), 3)

    assert build(greedy)[0].kind is StepKind.GREEDY
    assert build(greedy, drawn)[0].kind is StepKind.SAMPLE
    assert build(greedy, drawn, scored)[0].kind is StepKind.SCORE


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0, presence_penalty=0.1),
        SamplingParams(temperature=0.0, frequency_penalty=0.1),
        SamplingParams(temperature=0.0, repetition_penalty=1.1),
        SamplingParams(temperature=0.0, logit_bias={3: 1.0}),
        SamplingParams(temperature=0.0, min_tokens=1),
        SamplingParams(temperature=0.0, logprobs=0),
        SamplingParams(temperature=0.5),
    ],
)
def test_whatever_changes_or_reports_a_choice_needs_the_sampling_program(sampling: SamplingParams) -> None:
    assert build((sequence_of(sampling=sampling), 3))[0].kind is StepKind.SAMPLE


def test_a_row_is_masked_where_a_grammar_or_a_list_of_tokens_limits_its_choice() -> None:
    some, banned = SamplingParams(temperature=0.0, allowed_token_ids=(5,)), SamplingParams(temperature=0.0, bad_words=((5, 6),))
    limited = sequence_of(grammar="any"), sequence_of(slot=1), sequence_of(slot=2, sampling=some), sequence_of(slot=3, sampling=banned)

    batch, step = build(*((sequence, 3) for sequence in limited))

    assert batch.kind is StepKind.SAMPLE
    assert step.is_masked[:4].tolist() == [1, 0, 1, 1]


def test_a_prompt_that_is_read_again_is_not_scored_again() -> None:
    sequence = sequence_of(12, sampling=SamplingParams(temperature=0.0, prompt_logprobs=1))
    sequence.num_scored_tokens = 8

    assert build((sequence, 8))[0].kind is StepKind.GREEDY
    assert build((sequence, 9))[0].kind is StepKind.SCORE


def set_token(sequence: Sequence, token: int) -> None:
    sequence.token_ids[1] = token


def set_block(sequence: Sequence, block: int) -> None:
    sequence.block_ids[0] = block


def set_slot(sequence: Sequence, slot: int) -> None:
    sequence.slot = slot


@pytest.mark.parametrize("change_and_edge", [(set_token, VOCAB_SIZE), (set_block, NUM_BLOCKS + 1), (set_slot, NUM_SLOTS)])
@pytest.mark.parametrize("is_below", [False, True])
def test_an_index_just_outside_its_array_is_refused(change_and_edge: tuple[Callable[[Sequence, int], None], int], is_below: bool) -> None:
    change, edge = change_and_edge
    first, last, beyond = (1 if change is set_block else 0), edge - 1, -1 if is_below else edge

    for allowed in (first, last):
        sequence = sequence_of()
        change(sequence, allowed)
        build((sequence, 3))

    sequence = sequence_of()
    change(sequence, beyond)
    with pytest.raises(RuntimeError, match=r"step input \w+ holds|admitted to slot"):
        build((sequence, 3))


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_a_target_outside_the_vocabulary_is_refused(token: int) -> None:
    sequence = sequence_of(3, sampling=SamplingParams(prompt_logprobs=0))
    sequence.token_ids[2] = token

    with pytest.raises(RuntimeError, match="step input targets holds"):
        build((sequence, 2))


def test_a_token_whose_block_was_never_taken_is_refused() -> None:
    with pytest.raises(RuntimeError, match="step input cache_slots holds 0 to 7, must be 4 to 163"):
        build((sequence_of(6, blocks=[1]), 6))
