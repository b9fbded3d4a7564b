"""Which tokens are left, which rule wins, and that a slow grammar is waited for by its own sequence alone."""

import threading
import time

import numpy as np
import pytest

from engine.constraints import NUM_COMPILE_THREADS, NUM_SLOW, PATIENCE_S, QUICK_S, Constraint, Grammars, Words, words_of
from engine.errors import GrammarError, RequestError
from engine.types import FinishReason, GenerationRequest, SamplingParams

VOCAB_SIZE = 70
EOS = 2


class Counting:
    """A grammar of `length` tokens, each of them 5 or 6; a token 6 takes long."""

    def __init__(self, length: int, *, may_end_after: int) -> None:
        self._left, self._may_end = length, may_end_after
        self.num_tokens = 0

    error = None

    @property
    def is_accepting(self) -> bool:
        return self.num_tokens >= self._may_end

    @property
    def is_stopped(self) -> bool:
        return not self._left

    def fill_mask(self, row: Words) -> None:
        row[:] = words_of([5, 6] if self._left else [], vocab_size=VOCAB_SIZE)

    def advance(self, token: int) -> None:
        self._left -= 1
        self.num_tokens += 1
        end_s = time.thread_time() + 3 * QUICK_S * (token == 6)
        while time.thread_time() < end_s:
            pass


def compile_counting(grammar: str) -> Counting:
    try:
        length, _, may_end_after = grammar.partition(" ")
        return Counting(int(length), may_end_after=int(may_end_after or length))
    except ValueError:
        raise GrammarError(f"{grammar} is no number") from None


def new_constraint(*, grammar: str | None = None, tenant: str = "", **sampling: object) -> Constraint:
    request = GenerationRequest(request_id="r", prompt_token_ids=(7,), sampling=SamplingParams(**sampling), grammar=grammar, tenant=tenant)
    return Constraint(request, vocab_size=VOCAB_SIZE, eos_token=EOS)


def constraint_of(*, grammar: str | None = None, **sampling: object) -> Constraint:
    constraint = new_constraint(grammar=grammar, **sampling)
    constraint.start(compile_counting, ())
    return constraint


def allowed(constraint: Constraint) -> list[int]:
    return np.flatnonzero(np.unpackbits(constraint.words.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 70])
def test_a_mask_of_everything_has_a_bit_for_each_token_and_no_more(vocab_size: int) -> None:
    words = words_of(slice(vocab_size), vocab_size=vocab_size)

    assert np.unpackbits(words.view(np.uint8), bitorder="little").tolist() == [1] * vocab_size + [0] * (-vocab_size % 32)


def test_a_grammar_leaves_its_tokens_and_the_ends_where_it_is_whole() -> None:
    constraint = constraint_of(grammar="3 1", stop_token_ids=(9,), allowed_token_ids=(5, 9, EOS))

    first = allowed(constraint)
    constraint.advance(5)

    assert first == [5]
    assert allowed(constraint) == [EOS, 5, 9]


def test_a_run_is_banned_at_its_last_token_in_every_place() -> None:
    constraint = constraint_of(bad_words=((4, 5), (3, 4, 5), (3, 4, 69), (8,)))
    masks = [allowed(constraint)]

    for token in (3, 4, 5):
        constraint.advance(token)
        masks.append(allowed(constraint))

    everything = [token for token in range(VOCAB_SIZE) if token != 8]
    without = [token for token in everything if token not in (5, 69)]
    assert masks == [everything, everything, without, everything]


@pytest.mark.parametrize("sampling", [{"ignore_eos": True}, {"min_tokens": 9}, {"allowed_token_ids": (5, 6)}])
def test_a_whole_text_that_nothing_may_follow_ends_whatever_else_was_asked(sampling: dict[str, object]) -> None:
    constraint = constraint_of(grammar="1", **sampling)

    constraint.advance(5)

    assert constraint.finish is FinishReason.STOP


def test_a_whole_text_ends_where_only_what_is_banned_could_follow() -> None:
    constraint = constraint_of(grammar="3 1", bad_words=((5, 5), (5, 6)))

    constraint.advance(5)

    assert constraint.finish is FinishReason.STOP


def test_a_text_that_is_not_whole_and_cannot_go_on_ends_by_its_grammar() -> None:
    constraint = constraint_of(grammar="3", bad_words=((5, 5), (5, 6)))

    constraint.advance(5)

    assert constraint.finish is FinishReason.GRAMMAR


def test_before_min_tokens_an_end_is_not_allowed_even_where_the_text_is_whole() -> None:
    constraint = constraint_of(grammar="5 1", min_tokens=2)

    constraint.advance(5)
    early = allowed(constraint)
    constraint.advance(5)

    assert early == [5, 6]
    assert allowed(constraint) == [EOS, 5, 6]


def test_what_does_not_compile_ends_by_its_grammar() -> None:
    assert constraint_of(grammar="none").finish is FinishReason.GRAMMAR


def test_a_list_that_bans_all_it_allows_is_refused() -> None:
    with pytest.raises(RequestError, match="no token may be chosen"):
        constraint_of(allowed_token_ids=(5, 6), bad_words=((5,), (6,)))


def test_quick_masks_are_waited_for_and_slow_ones_are_not() -> None:
    grammars = Grammars(compile_counting)
    quick, slow = constraint_of(grammar="99"), constraint_of(grammar="99")
    slow.advance(6)
    grammars.advance(quick, 5)
    grammars.advance(slow, 6)

    start_s = time.monotonic()
    done = grammars.take_quick()
    waited_s = time.monotonic() - start_s

    assert quick in done
    assert waited_s < PATIENCE_S + 1
    assert slow in done or grammars.take(wait_s=10) == [slow]


def test_a_sequence_is_trusted_again_some_masks_after_a_slow_one() -> None:
    constraint = constraint_of(grammar="99")

    states = [constraint.is_slow]
    for token in (6, *[5] * NUM_SLOW):
        constraint.advance(token)
        states.append(constraint.is_slow)

    assert states == [False, *[True] * NUM_SLOW, False]


def test_a_sequence_whose_masks_are_slow_again_and_again_is_trusted_later_each_time() -> None:
    constraint = constraint_of(grammar="999")

    num_slow: list[int] = []
    for _ in range(3):
        constraint.advance(6)
        num_slow.append(0)
        while constraint.is_slow:
            constraint.advance(5)
            num_slow[-1] += 1

    assert num_slow == [NUM_SLOW, 2 * NUM_SLOW, 4 * NUM_SLOW]


class Held:
    """Compiles nothing before it may, and remembers what."""

    def __init__(self) -> None:
        self.is_free = threading.Event()
        self.compiled: list[str] = []

    def __call__(self, grammar: str) -> Counting:
        self.is_free.wait(10)
        self.compiled.append(grammar)
        return compile_counting(grammar)


def wait_for(grammars: Grammars, count: int) -> None:
    while count:
        done = grammars.take(wait_s=10)
        assert done
        count -= len(done)


def test_a_tenant_with_many_grammars_does_not_come_before_others() -> None:
    held = Held()
    grammars = Grammars(held)
    for number in range(20):
        grammars.start(new_constraint(grammar=f"{number + 1}", tenant="ann"), ())
    grammars.start(new_constraint(grammar="99", tenant="bob"), ())

    held.is_free.set()
    wait_for(grammars, 21)

    assert held.compiled.index("99") <= NUM_COMPILE_THREADS + 1


def test_what_was_not_begun_for_a_sequence_is_left_undone_once_that_is_over() -> None:
    held = Held()
    grammars = Grammars(held)
    constraints = [new_constraint(grammar=f"{number + 1}") for number in range(8)]
    for constraint in constraints:
        grammars.start(constraint, ())
    for constraint in constraints:
        constraint.is_over = True

    held.is_free.set()
    wait_for(grammars, 8)

    assert len(held.compiled) <= NUM_COMPILE_THREADS
