"""Timing: turns, rounds, copies that leave the cache cold, graphs, and failures of single rivals."""

from __future__ import annotations

import collections
import contextlib
import itertools

import pytest
import torch

from benchmarks import timing
from benchmarks.suite import ReplayTimer
from benchmarks.timing import Call, GraphClock, Unavailable, Variant


def test_copies_outgrow_the_cache_twice_and_are_one_without_it():
    assert timing.copies(1 << 20, 50 << 20) == timing.MOST_COPIES
    assert timing.copies(10 << 20, 50 << 20) == 10
    assert timing.copies((10 << 20) + 1, 50 << 20) == 10
    assert timing.copies((10 << 20) - 1, 50 << 20) == 11
    assert timing.copies(200 << 20, 50 << 20) == 1
    assert timing.copies(0, 50 << 20) == timing.MOST_COPIES
    assert timing.copies(1 << 20, 0) == 1


@pytest.mark.parametrize(("budget", "rounds"), [(2.0, 4), (0.1, 2), (60.0, 6)])
def test_rounds_fill_the_budget_between_least_and_most(monkeypatch, budget, rounds):
    """The first turn takes no time, each of the others half a second."""
    log: list[str] = []
    rival = Rival("a", log)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: max(0, len(log) - 1) / 2)
    found = timing.interleaved({"a": lambda: Variant([Call(rival.turn)])}, Counted(), budget, (2, 6))
    assert len(found["a"].seconds) == rounds


class Rival:
    """Returns made-up seconds, and writes its turns into a common log."""

    def __init__(self, name: str, log: list[str], fails_at: int | None = None) -> None:
        self.name, self.log, self.fails_at, self.turns = name, log, fails_at, 0

    def turn(self) -> float:
        self.log.append(self.name)
        self.turns += 1
        if self.turns == self.fails_at:
            raise MemoryError(f"\n out of memory in {self.name}\nand more")
        return 10.0 * self.turns


class Counted:
    clock = "counted"

    def __call__(self, variant: Variant) -> timing.Turn:
        return variant.calls[0].run


def interleave(rivals: list[Rival], rounds: int, **broken: Exception) -> dict[str, timing.Rounds]:
    by_name = {rival.name: rival for rival in rivals}

    def make(name: str) -> Variant:
        if name in broken:
            raise broken[name]
        return Variant([Call(by_name[name].turn)])

    return timing.interleaved(
        {name: (lambda name=name: make(name)) for name in [*by_name, *broken]},
        Counted(),
        budget=1.0,
        rounds=(rounds, rounds),
    )


def test_rivals_take_turns_and_nobody_follows_the_same_more_often():
    def turns(rounds: int) -> tuple[list[str], dict[str, timing.Rounds]]:
        log: list[str] = []
        return log, interleave([Rival(name, log) for name in "abcd"], rounds)

    log, found = turns(600)
    orders = ["".join(log[at : at + 4]) for at in range(4, len(log), 4)]  # the first turns warm up
    assert {"".join(sorted(order)) for order in orders} == {"abcd"}
    followed = collections.Counter(pair for order in orders for pair in itertools.pairwise(order))
    # 12 ordered pairs, 3 of them in each round: 150 times each, give or take four standard deviations
    assert len(followed) == 12
    assert all(abs(count - 150) < 43 for count in followed.values())
    assert turns(600)[0] == log
    found = turns(3)[1]
    assert all(rounds.seconds == [20.0, 30.0, 40.0] for rounds in found.values())
    assert {rounds.clock for rounds in found.values()} == {"counted"}


def test_a_failure_leaves_the_others_their_rounds():
    log: list[str] = []
    rivals = [Rival("a", log), Rival("late", log, fails_at=3), Rival("first", log, fails_at=1)]
    found = interleave(rivals, 4, absent=Unavailable("not here"), broken=ValueError("cannot compile"))
    assert found["a"].seconds == [20.0, 30.0, 40.0, 50.0]
    for name in ("late", "first"):
        assert found[name].seconds == []
        assert found[name].error == f"MemoryError: out of memory in {name}"
        assert not found[name].unavailable
    assert found["broken"].error == "ValueError: cannot compile"
    assert found["absent"].unavailable
    assert log.count("late") == 3  # not asked again


def test_a_fault_of_the_gpu_ends_the_group_and_keeps_what_it_has(monkeypatch):
    """As after an illegal access: every later call of the runtime raises too, also those that free memory."""
    log: list[str] = []
    rivals = [Rival("a", log), Rival("b", log), Rival("bad", log, fails_at=3)]

    def synchronize() -> None:
        if rivals[2].turns >= 3:
            raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(timing, "synchronize", synchronize)
    found = interleave(rivals, 5, rejected=timing.Rejected("off by 7%"))
    assert found["bad"].error == "MemoryError: out of memory in bad"
    assert found["rejected"].error == "off by 7%"
    assert not found["rejected"].unavailable
    for rival in rivals[:2]:
        # the faulty one failed in the second round: one round of the others at least, and nobody ran afterwards
        assert found[rival.name].seconds == [10.0 * (turn + 2) for turn in range(rival.turns - 1)]
        assert 1 <= len(found[rival.name].seconds) <= 2
        assert found[rival.name].error is None
    assert log[-1] == "bad"
    # in the first turns: who has no round says why
    log.clear()
    rivals = [Rival("a", log), Rival("b", log), Rival("bad", log, fails_at=1)]
    monkeypatch.setattr(timing, "synchronize", lambda: _broken() if rivals[2].turns else None)
    found = interleave(rivals, 5)
    assert found["a"].error == "not measured: the GPU failed under bad: RuntimeError: sticky"
    assert found["a"].clock is None


def _broken() -> None:
    raise RuntimeError("sticky")


def test_no_rival_is_made_when_the_time_is_up_and_those_that_are_have_a_round(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(now))  # asked before each rival but the first
    rivals = {name: Rival(name, []) for name in "abcd"}
    seen = []
    found = timing.interleaved(
        {name: lambda rival=rival: Variant([Call(rival.turn)]) for name, rival in rivals.items()},
        Counted(),
        1e9,
        (3, 3),
        until=0.5,
        after_each=lambda found: seen.append({name: len(rival.seconds) for name, rival in found.items()}),
    )
    # b is made at 0; c would be at 1
    assert {name: len(rival.seconds) for name, rival in found.items()} == {"a": 1, "b": 1, "c": 0, "d": 0}
    assert seen == [{"a": 1, "b": 1, "c": 0, "d": 0}]
    assert not any(rival.error for rival in found.values())


@pytest.fixture
def clock(monkeypatch):
    """A wall clock that only moves when told to."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    return spend


def test_the_wall_clock_leaves_out_what_comes_before_and_the_context(clock):
    @contextlib.contextmanager
    def context():
        clock(7.0)
        yield
        clock(7.0)

    calls = [Call(lambda: clock(1.0), lambda: clock(50.0)), Call(lambda: clock(3.0))]
    turn = timing.WallClock()(Variant(calls, context))
    assert [turn(), turn(), turn()] == [1.0, 3.0, 1.0]


def test_batches_give_the_time_of_one_call(clock, monkeypatch):
    monkeypatch.setattr(timing, "synchronize", lambda: clock(1000.0))
    calls = [Call(lambda: clock(1.0)), Call(lambda: clock(2.0))]
    turn = timing.Batches(5, wait=False)(Variant(calls))
    assert turn() == pytest.approx(1.5)
    turn = timing.Batches(5, wait=True)(Variant(calls))
    assert turn() == pytest.approx(1.5 + 1000 / 10)


def test_a_turn_that_settles_frees_the_cache_and_calls_once_untimed(clock, monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("empty"))
    monkeypatch.setattr(timing, "synchronize", lambda: None)
    spent = itertools.chain([50.0], itertools.repeat(1.0))
    turn = timing.Batches(2, wait=True, settle=True)(Variant([Call(lambda: (log.append("call"), clock(next(spent))))]))
    assert turn() == 1.0
    assert log == ["empty", "call", "call", "call"]


class FakeCuda:
    """The part of ``torch.cuda`` that the stopwatch uses; the GPU's clock moves by a call's own seconds."""

    def __init__(self, monkeypatch, refuse: Exception | None = None) -> None:
        self.now, self.capturing, self.refuse = 0.0, None, refuse
        self.pools = self.replays = 0
        self.current = "default"
        self.log: list[str] = []
        fake = self

        class Graph:
            def __init__(self) -> None:
                self.work: list[tuple[str, float]] = []

            def replay(self) -> None:
                fake.replays += 1
                for name, spent in self.work:
                    fake.execute(name, spent)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now
                fake.log.append("record")

            def synchronize(self) -> None:
                fake.log.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        @contextlib.contextmanager
        def graph(graph, pool, stream):
            assert (pool, stream) == (f"pool{self.pools}", "stream")
            self.capturing, self.current = graph, stream
            try:
                yield
                if self.refuse is not None:
                    raise self.refuse  # as of capture_end: the stream stays current
                self.current = "default"
            finally:
                self.capturing = None

        def new_pool() -> str:
            self.pools += 1
            return f"pool{self.pools}"

        replaced = {
            "Stream": lambda: "stream",
            "graph_pool_handle": new_pool,
            "current_stream": lambda: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "stream": contextlib.nullcontext,
            "synchronize": lambda: None,
            "CUDAGraph": Graph,
            "graph": graph,
            "Event": Event,
            "_sleep": lambda cycles: self.log.append("sleep"),
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def execute(self, name: str, spent: float) -> None:
        if self.capturing is not None:
            self.capturing.work.append((name, spent))
            return
        self.log.append(name)
        self.now += spent

    def variant(self, copies: int) -> Variant:
        numbers = itertools.count()

        def one() -> Call:
            i = next(numbers)
            return Call(lambda: self.execute(f"run{i}", 2.0), lambda: self.execute(f"before{i}", 30.0))

        return Variant([one() for _ in range(copies)])


def test_a_graph_holds_every_copy_and_what_comes_before_is_not_timed(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    stopwatch = GraphClock()
    turn = stopwatch(cuda.variant(3))
    assert stopwatch.clock == "graph"
    assert cuda.log == 3 * ["before0", "before1", "before2", "run0", "run1", "run2"]  # warmed up before the capture
    cuda.log.clear()
    assert turn() == pytest.approx(2.0)
    replayed = ["before0", "before1", "before2", "sleep", "record", "run0", "run1", "run2", "record", "wait"]
    assert cuda.log == replayed


def test_one_that_cannot_be_captured_gives_its_whole_group_events(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    stopwatch = GraphClock()
    first = stopwatch(cuda.variant(2))
    cuda.refuse = RuntimeError("operation not permitted\nwhen stream is capturing")
    with pytest.warns(UserWarning, match="whole group is timed by events: RuntimeError: operation not permitted$"):
        second = stopwatch(cuda.variant(2))
    third = stopwatch(cuda.variant(2))  # no capture is tried any more
    assert (stopwatch.clock, cuda.current) == ("events", "default")
    for turn in (first, second, third):
        cuda.log.clear()
        assert turn() == pytest.approx(2.0)
        assert cuda.log == ["before0", "before1", "sleep", "record", "run0", "run1", "record", "wait"]
    assert cuda.replays == 0


def test_out_of_memory_in_a_capture_is_the_rivals_error_and_the_next_has_a_fresh_pool(monkeypatch):
    cuda = FakeCuda(monkeypatch, refuse=torch.OutOfMemoryError("out of memory"))
    stopwatch = GraphClock()
    with pytest.raises(torch.OutOfMemoryError):
        stopwatch(cuda.variant(2))
    assert (cuda.pools, cuda.current) == (2, "default")
    cuda.refuse = None
    stopwatch(cuda.variant(2))
    assert (stopwatch.clock, cuda.pools) == ("graph", 2)


def test_what_breaks_the_gpu_in_a_capture_is_the_rivals_error(monkeypatch):
    cuda = FakeCuda(monkeypatch, refuse=RuntimeError("an illegal access"))
    stopwatch = GraphClock()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: _broken() if cuda.pools > 1 else None)
    with pytest.raises(RuntimeError, match="sticky"):
        stopwatch(cuda.variant(2))
    assert stopwatch.clock == "graph"


def test_the_replay_timer_tells_each_duration_between_two_calls():
    replay = ReplayTimer()
    for durations in ([0.5, 0.25, 3.0], [1.0]):
        replay.load(durations)
        told = []
        for _ in durations:
            start = replay()
            told.append(replay() - start)
        assert told == durations
    with pytest.raises(RuntimeError, match="more durations than were measured"):
        replay()
