"""Writing entries: concurrent processes lose nothing, and a killed one leaves the file whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from rlrr_kernels.backends.tuned import FORMAT, add, parse, read
from rlrr_kernels.backends.verdicts import Where
from rlrr_kernels.io import cache
from tests.tune.entries import CPU, entry

#: Children only read and write files: none uses what a fork may not carry over.
FORK = multiprocessing.get_context("fork")


def entries(path: Path) -> dict[int, object]:
    return {found.tokens[0]: found.backend for found in map(parse, read(path))}


def write_many(path: Path, start, first: int, count: int) -> None:
    start.wait()
    for m in range(first, first + count):
        add(path, [entry(m)])


def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "new" / "tuned.json"
    start = FORK.Barrier(4)
    writers = [FORK.Process(target=write_many, args=(path, start, 1 + 20 * i, 20)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(entries(path)) == list(range(1, 81))
    assert sorted(p.name for p in path.parent.iterdir()) == [".tuned.json.lock", "tuned.json"]


def write_and_tell(path: Path, written) -> None:
    m = 0
    while True:
        m += 1
        # large, so that a kill often falls into the writing
        add(path, [entry(m, measured={"note": "x" * 200_000})])
        written.value = m


def test_a_killed_writer_leaves_the_file_whole_and_the_lock_free(tmp_path):
    path = tmp_path / "tuned.json"
    add(path, [entry(10**6)])
    written = FORK.RawValue("q", 0)  # without a lock, which the kill would leave taken
    for delay in (0.0, 0.003, 0.01, 0.03):
        written.value = 0
        writer = FORK.Process(target=write_and_tell, args=(path, written))
        writer.start()
        while written.value < 2:
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found = entries(path)
        assert found.keys() >= {10**6, *range(1, written.value + 1)}
        path.unlink()  # start small again
        add(path, [entry(10**6)])
    # what the dead left beside it is gone
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tuned.json.lock", "tuned.json"]


def test_a_new_entry_replaces_the_same_key_only(tmp_path):
    path = tmp_path / "tuned.json"
    add(path, [entry(1), entry(2)])
    others = [
        entry(1, layer=(5, 6, 1)),
        entry(1, 2),
        entry(1, kernel="grad_input"),
        entry(1, where=Where.of("cpu", CPU)),
        entry(1, device="Other"),
    ]
    add(path, others)
    add(path, [entry(1, backend="cpu")])
    found = [parse(raw) for raw in read(path)]
    assert len(found) == 7
    assert found[-1] == entry(1, backend="cpu")
    assert entry(1) not in found
    assert all(one in found for one in [*others, entry(2)])


def test_entries_of_another_version_stay(tmp_path):
    path = tmp_path / "tuned.json"
    strange = {**entry(1).to_json(), "pass": "future", "more": [1, 2]}
    path.write_text(json.dumps({"format": FORMAT, "entries": [strange, 5]}))
    assert add(path, [entry(1)]) is None
    assert read(path)[:2] == [json.loads(json.dumps(strange)), 5]
    assert parse(read(path)[2]) == entry(1)


def test_damaged_files_are_set_aside_one_beside_the_other(tmp_path):
    path = tmp_path / "tuned.json"
    rows = ("NaN", "-Infinity", "1e999", "-1e999")  # the last two are JSON, but nothing that could be written again
    contents = ("{", *(f'{{"format": 2, "entries": [{{"device": {row}}}]}}' for row in rows))
    for number, content in enumerate(contents, 1):
        path.write_text(content)
        aside = add(path, [entry(3)])
        assert aside == tmp_path / f"tuned.json.damaged-{number}"
        assert aside.read_text() == content


def test_a_table_of_another_version_is_refused_before_anything_is_measured(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text('{"format": 99, "entries": []}')
    for attempt in (lambda: cache.check_writable(path, FORMAT), lambda: add(path, [entry(3)])):
        with pytest.raises(OSError, match=r"another version of rlrr_kernels wrote it \(format: expected 2, got 99\)"):
            attempt()
    assert path.read_text() == '{"format": 99, "entries": []}'
