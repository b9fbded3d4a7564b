"""What the journal keeps, gives away and ends; and over random lives of engines, that every reader gets exactly one end."""

import math
from dataclasses import replace

import pytest
from fake_core import request
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import EngineDiedError, NoEngineError, RequestError
from engine.journal import CLEARING_TOKENS, ENGINE_LATENESS_S, Entry, Journal
from engine.messages import Submit
from engine.types import FinishReason, TokenDelta, TokenLogprob


class Notes:
    """A reader that writes down what it gets, and refuses anything after its end."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.end: FinishReason | type[Exception] | None = None

    def put(self, delta: TokenDelta) -> None:
        assert self.end is None, f"{delta} after the end {self.end}"
        self.tokens += delta.token_ids
        self.end = delta.finish_reason

    def fail(self, error: Exception) -> None:
        assert self.end is None, f"{error} after the end {self.end}"
        self.end = type(error)


def open_in(journal: Journal, request_id: str, *, deadline_s: float | None = None, max_tokens: int = 100) -> tuple[Entry, Notes]:
    notes = Notes()
    return journal.open(replace(request(request_id, max_tokens=max_tokens), deadline_s=deadline_s), notes), notes


def delta(request_id: str, *token_ids: int, finish: FinishReason | None = None) -> TokenDelta:
    return TokenDelta(request_id=request_id, token_ids=token_ids, finish_reason=finish)


def ids(submits: list[Submit]) -> list[str]:
    return [submit.request.request_id for submit in submits]


def test_what_is_due_is_given_away_once():
    journal = Journal()
    open_in(journal, "a")
    open_in(journal, "b")

    assert ids(journal.due()) == ["a", "b"]
    assert journal.due() == []
    assert (len(journal), journal.num_held) == (2, 0)


def test_after_a_death_everything_is_due_again_with_what_it_has_given():
    journal = Journal()
    for name in "abc":
        open_in(journal, name)
    journal.due()
    score = TokenLogprob(token_id=1, logprob=-1.0)
    journal.record([delta("b", 4, 5), TokenDelta(request_id="c", prompt_logprobs=(score, score))])
    journal.record([delta("b", 6)])

    journal.engine_died()

    due = journal.due()
    assert ids(due) == ["b", "c", "a"], "those that have given something first"
    assert (due[0].output_token_ids, due[0].num_scored_tokens) == ((4, 5, 6), 0)
    assert (due[1].output_token_ids, due[1].num_scored_tokens) == ((), 2)


@pytest.mark.parametrize("is_held", [True, False])
def test_only_the_engine_that_has_a_generation_is_told_of_its_abort(is_held: bool):
    journal = Journal()
    entry, notes = open_in(journal, "a")
    if not is_held:
        journal.due()

    assert journal.close(entry) is not is_held
    assert journal.close(entry) is False, "it is told once"
    assert notes.end is None
    assert journal.due() == []
    assert len(journal) == 0


def test_closing_one_that_has_ended_does_not_touch_its_successor_of_the_same_name():
    journal = Journal()
    old, _ = open_in(journal, "a")
    journal.due()
    journal.record([delta("a", 1, finish=FinishReason.LENGTH)])
    open_in(journal, "a")

    assert journal.close(old) is False
    assert len(journal) == 1


def test_deltas_and_refusals_of_aborted_generations_are_dropped():
    journal = Journal()
    entry, notes = open_in(journal, "a")
    journal.due()
    journal.close(entry)

    journal.record([delta("a", 1)])
    journal.refuse("a", "too long")

    assert (notes.tokens, notes.end) == ([], None)


def test_a_refusal_ends_a_generation_be_it_the_first_or_after_a_death():
    journal = Journal()
    _, notes = open_in(journal, "a")
    journal.due()
    journal.record([delta("a", 1)])
    journal.engine_died()
    journal.due()

    journal.refuse("a", "the cache is smaller now")

    assert notes.end is RequestError
    assert len(journal) == 0


def test_a_held_generation_ends_at_its_deadline_and_a_submitted_one_when_the_engine_is_late():
    journal = Journal()
    _, held = open_in(journal, "held", deadline_s=10.0)
    assert journal.next_expiry_s == 10.0
    assert journal.expire(9.9) == []
    assert held.end is None
    assert journal.expire(10.0) == []
    assert held.end is FinishReason.DEADLINE

    _, running = open_in(journal, "running", deadline_s=20.0)
    journal.due()
    assert journal.expire(20.0) == []
    assert running.end is None
    assert journal.next_expiry_s == 20.0 + ENGINE_LATENESS_S
    assert journal.expire(20.0 + ENGINE_LATENESS_S) == ["running"]
    assert running.end is FinishReason.DEADLINE
    assert journal.next_expiry_s == math.inf


def test_after_a_death_deadlines_are_kept_to_the_second():
    journal = Journal()
    _, notes = open_in(journal, "a", deadline_s=10.0)
    journal.due()
    journal.expire(10.0)
    journal.engine_died()

    assert journal.next_expiry_s == 10.0
    journal.expire(10.0)
    assert notes.end is FinishReason.DEADLINE


def test_the_end_of_the_server_ends_everything_and_names_what_the_engine_has():
    journal = Journal()
    _, running = open_in(journal, "running")
    journal.due()
    _, held = open_in(journal, "held")

    assert journal.fail_all("shutting down") == ["running"]
    assert running.end is held.end is NoEngineError
    assert len(journal) == journal.num_held == 0


def test_progress_clears_so_that_deaths_under_running_streams_convict_nobody():
    journal = Journal()
    _, notes = open_in(journal, "a")
    for _ in range(20):
        assert len(journal.due()) == 1
        journal.record([delta("a", *range(CLEARING_TOKENS))])
        journal.engine_died()

    assert notes.end is None
    assert len(notes.tokens) == 20 * CLEARING_TOKENS
    assert not journal.is_searching


def test_others_wait_while_suspects_are_tried_and_follow_when_there_are_none():
    journal = Journal()
    _, bad = open_in(journal, "bad")
    open_in(journal, "good")
    journal.due()
    journal.engine_died()
    journal.due()
    journal.engine_died()
    open_in(journal, "new")
    assert journal.is_searching

    assert ids(journal.due()) == ["bad"]
    journal.engine_died()
    assert bad.end is EngineDiedError
    assert ids(journal.due()) == ["good"]
    journal.record([delta("good", *range(CLEARING_TOKENS - 1))])
    assert journal.due() == []
    journal.record([delta("good", 1)])
    assert ids(journal.due()) == ["new"]
    assert not journal.is_searching


def test_a_trial_ends_when_its_last_suspect_is_aborted():
    journal = Journal()
    entry, _ = open_in(journal, "a")
    open_in(journal, "b")
    for _ in range(2):
        journal.due()
        journal.engine_died()
    assert ids(journal.due()) == ["a"]

    assert journal.close(entry) is True

    assert ids(journal.due()) == ["b"]


def test_who_only_waits_in_an_engine_has_no_part_in_its_death():
    journal = Journal()
    _, bad = open_in(journal, "bad")
    for name in ("waiting", "unheard of"):
        open_in(journal, name)
    for _ in range(2):
        journal.due()
        journal.queued(["bad", "waiting", "gone"])
        journal.begun(["bad"])
        journal.engine_died()

    assert ids(journal.due()) == ["bad"]
    journal.engine_died()
    assert bad.end is EngineDiedError
    assert ids(journal.due()) == ["unheard of"], "its submission may have ended them"
    journal.record([delta("unheard of", 1, finish=FinishReason.STOP)])
    assert ids(journal.due()) == ["waiting"]
    assert not journal.is_searching


def test_suspects_that_only_wait_are_tried_after_those_that_have_begun():
    journal = Journal()
    notes = {name: open_in(journal, name)[1] for name in "abcd"}
    for _ in range(2):
        journal.due()
        journal.engine_died()
    assert ids(journal.due()) == ["a", "b"]
    journal.queued(["a", "b"])
    journal.begun(["b"])

    journal.engine_died()

    assert ids(journal.due()) == ["b"]
    journal.engine_died()
    assert notes["b"].end is EngineDiedError
    assert ids(journal.due()) == ["a"]


class JournalUnderFaults(RuleBasedStateMachine):
    """Engines come and go, requests of four kinds come and leave; the model is a list of what each reader must have got."""

    @initialize()
    def begin(self) -> None:
        self.journal = Journal()
        self.engine: dict[str, Submit] | None = None  # what the running engine has
        self.open: dict[str, tuple[Entry, Notes]] = {}
        self.num_begun = 0
        self.now_s = 0.0

    def submit_due(self) -> None:
        if self.engine is None:
            return
        for submit in self.journal.due():
            assert submit.request.request_id not in self.engine
            _, notes = self.open[submit.request.request_id]
            assert list(submit.output_token_ids) == notes.tokens == list(range(len(notes.tokens)))
            self.engine[submit.request.request_id] = submit

    def settle(self) -> None:
        """Let the timer go off, note who has ended, and give away what is due."""
        if self.journal.next_expiry_s <= self.now_s:
            to_abort = self.journal.expire(self.now_s)
            assert all(self.engine is not None and request_id in self.engine for request_id in to_abort)
        for request_id, (_, notes) in list(self.open.items()):
            if notes.end is not None:
                del self.open[request_id]
                if self.engine is not None:
                    self.engine.pop(request_id, None)
        self.submit_due()

    @rule(length=st.integers(1, 30), patience_s=st.none() | st.floats(0, 5))
    def arrive(self, length: int, patience_s: float | None) -> None:
        if len(self.open) == 12:
            return
        self.num_begun += 1
        request_id = f"r{self.num_begun}"
        deadline_s = None if patience_s is None else self.now_s + patience_s
        self.open[request_id] = open_in(self.journal, request_id, deadline_s=deadline_s, max_tokens=length)
        self.submit_due()
        self.settle()

    @precondition(lambda self: self.engine is None)
    @rule()
    def become_ready(self) -> None:
        self.engine = {}
        self.submit_due()

    @precondition(lambda self: self.engine is not None)
    @rule()
    def die(self) -> None:
        self.engine = None
        self.journal.engine_died()
        self.settle()

    @precondition(lambda self: self.engine)
    @rule(count=st.integers(1, 12), data=st.data())
    def step(self, count: int, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.engine)), unique=True, min_size=1))
        self.journal.record([self.next_delta(name, count) for name in names])
        self.settle()

    def next_delta(self, request_id: str, count: int) -> TokenDelta:
        entry, notes = self.open[request_id]
        max_tokens = entry.request.sampling.max_tokens
        new = range(len(notes.tokens), min(len(notes.tokens) + count, max_tokens))
        return delta(request_id, *new, finish=FinishReason.LENGTH if new.stop == max_tokens else None)

    @precondition(lambda self: self.engine)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        self.journal.refuse(data.draw(st.sampled_from(sorted(self.engine))), "no")
        self.settle()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.open)))
        entry, _ = self.open.pop(request_id)
        is_told = self.journal.close(entry)
        assert is_told == (self.engine is not None and request_id in self.engine)
        if is_told:
            del self.engine[request_id]
        self.submit_due()

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.settle()

    @invariant()
    def the_journal_holds_what_is_open_and_nothing_else(self) -> None:
        if not hasattr(self, "journal"):
            return
        assert len(self.journal) == len(self.open)
        assert self.journal.num_held == len(self.open) - len(self.engine or ())
        for request_id, (entry, notes) in self.open.items():
            assert entry.output_token_ids == notes.tokens
            assert notes.end is None
            deadline_s = entry.request.deadline_s
            assert deadline_s is None or self.now_s < deadline_s or (self.engine and request_id in self.engine)
        assert self.engine is None or self.journal.is_searching or not self.journal.num_held

    def teardown(self) -> None:
        self.engine = {} if self.engine is None else self.engine
        self.submit_due()
        while self.open:
            assert self.engine, "the rest waits for nothing"
            self.journal.record([self.next_delta(name, 100) for name in list(self.engine)])
            self.settle()
        assert len(self.journal) == self.journal.num_held == 0
        assert not self.journal.is_searching


JournalUnderFaults.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestJournalUnderFaults = JournalUnderFaults.TestCase
