"""Which silences are hangs."""

from engine.types import Progress
from server.watchdog import START_SILENCE_S, Watchdog

STALL_S, START_S = 10.0, 1000.0


class Engine:
    """What a watchdog sees of an engine, a look per second."""

    def __init__(self) -> None:
        self.watchdog = Watchdog(stall_timeout_s=STALL_S, start_timeout_s=START_S, look_s=1.0)
        self.num_frames = 0
        self.progress: Progress | None = None
        self.step_s: float | None = None

    def ready(self, *, step_s: float) -> "Engine":
        self.step_s, self.num_frames, self.progress = step_s, self.num_frames + 1, None
        self.look()
        return self

    def look(self, *, says: bool = False) -> float | None:
        self.num_frames += says
        return self.watchdog.look(num_frames=self.num_frames, progress=self.progress, step_s=self.step_s)

    def seconds_until_killed(self, *, says: bool = False) -> int | None:
        return next((second for second in range(1, 5000) if self.look(says=says) is not None), None)


def test_a_ready_engine_may_be_silent_for_the_stall_timeout():
    assert Engine().ready(step_s=0.1).seconds_until_killed() == 10


def test_an_engine_with_long_steps_may_be_silent_for_twenty_of_them():
    assert Engine().ready(step_s=3.0).seconds_until_killed() == 60


def test_a_word_starts_the_silence_anew():
    engine = Engine().ready(step_s=0.1)
    for _ in range(9):
        assert engine.look() is None

    engine.look(says=True)

    assert engine.seconds_until_killed() == 10


def test_a_ready_engine_that_says_something_is_never_killed():
    assert Engine().ready(step_s=0.1).seconds_until_killed(says=True) is None


def test_a_start_may_be_silent_for_longer_because_imports_stall_every_thread():
    engine = Engine()
    engine.look()

    assert engine.seconds_until_killed() == START_SILENCE_S


def test_a_start_may_work_on_one_tensor_for_minutes_but_not_for_ever():
    engine = Engine()
    engine.progress = Progress(phase="load", done=1, total=2, unit="bytes")
    engine.look()

    assert engine.seconds_until_killed(says=True) == START_S


def test_progress_gives_a_start_its_time_again():
    engine = Engine()
    for done in range(20):
        engine.progress = Progress(phase="compile", done=done, total=20, unit="programs")
        for _ in range(900):
            assert engine.look(says=True) is None


def test_what_a_long_start_has_used_up_does_not_count_once_the_engine_is_ready():
    engine = Engine()
    for _ in range(100):
        engine.look()

    assert engine.ready(step_s=0.1).seconds_until_killed() == 10
