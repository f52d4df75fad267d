"""Runs killed by ``kill -9`` at random points: the folder is always whole, and what comes of it is the same bits.

The kills are real ones, of processes of their own: at random times, at random file events (before the event, or some
microseconds into it), and again in the resumed run.
"""

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import safetensors
from PIL import Image

from rlrr_kernels.finetune.saved_run import Finished, read_state
from tests.finetune.runs import results

#: What writes most: a moving average, TensorBoard's files, everything trained, an epoch that is best now and then.
OPTIONS = [
    *("--device", "cpu", "--epochs", "3", "--warmup-epochs", "1", "--lr", "5e-3", "--batch-size", "6"),
    *("--ema", "0.5", "--drop-path", "0.2", "--mixup", "0.8", "--cutmix", "1.0"),
]
#: Campaign -> its kills: 50 in all, of which `make test` has the first 2.
KILLS = {0: 2, 1: 12, 2: 12, 3: 12, 4: 12}
#: After which a run, or the server, hangs.
SECONDS = 600.0


@dataclass
class Server:
    """The fork server, started by the first test that needs it."""

    process: subprocess.Popen[bytes]
    lines: list[bytes] = field(default_factory=list)
    seconds: float = 0.0  # that the last run took
    rest: bytes = b""

    @classmethod
    def start(cls) -> "Server":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "tests.reliability.fork_server"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], env=environment
        )
        return cls(process)

    def line(self, timeout: float = SECONDS) -> bytes | None:
        """The next line it writes; None if none comes in time."""
        end = time.monotonic() + timeout
        while not self.lines:
            if not select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            read = os.read(self.process.stdout.fileno(), 65536)
            assert read, "the fork server ended"
            *self.lines, self.rest = (self.rest + read).split(b"\n")
        return self.lines.pop(0)

    def run(
        self,
        argv: list[str],
        root: Path,
        *,
        die_at: int = 0,
        after: float = -1.0,
        at: int = 0,
        sent: int = signal.SIGKILL,
        largest: int = 0,
        dies: bool = False,
    ) -> tuple[int, int, str]:
        """Run a command.

        Args:
            argv: of ``rlrr-finetune``.
            root: whose file events count.
            die_at: the event before which it kills itself.
            after: seconds after which it is sent a signal; from the start, or with ``at`` from that event on.
            sent: which signal.
            largest: bytes that no file may exceed, where not 0.
            dies: whether it is killed by a write beyond them, which leaves what fitted.

        Returns:
            Exit status (the negative of the signal that ended it), events seen, output.
        """
        log = root / "log.txt"
        request = {"argv": list(map(str, argv)), "root": str(root), "log": str(log), "die_at": die_at}
        request |= {"largest": largest, "dies": dies}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        pid, seen, deadline = int(self.line()), 0, None
        start = time.monotonic()
        if after >= 0 and not at:
            deadline = start + after
        while True:
            line = self.line(SECONDS if deadline is None else max(0.0, deadline - time.monotonic()))
            if line is None:
                assert deadline is not None, f"neither an event nor an end in {SECONDS:.0f} s"
                with contextlib.suppress(ProcessLookupError):  # it came to its end meanwhile
                    os.kill(pid, sent)
                deadline = None
            elif line == b"e":
                seen += 1
                if at and seen == at:
                    deadline = time.monotonic() + after
            else:
                self.seconds = time.monotonic() - start
                return int(line), seen, log.read_text()


@pytest.fixture(scope="module")
def server():
    started = Server.start()
    yield started
    started.process.stdin.close()
    started.process.wait(SECONDS)


@dataclass(frozen=True)
class Expected:
    """The uninterrupted run: its results, its files, how long it took and how many file events it had."""

    results: dict
    adapter: dict
    seconds: float
    events: int


@pytest.fixture(scope="module")
def expected(server, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    status, events, output = server.run([*OPTIONS, "--out", root / "run"], root)
    assert status == 0, output
    return Expected(*final(root / "run"), server.seconds, events)


def final(folder):
    """What must be equal: figures, and what was trained. (Not the file's bytes: its strings have no order.)"""
    with safetensors.safe_open(weights(folder), framework="np") as file:
        adapter = {name: file.get_tensor(name).tobytes() for name in file.keys()} | file.metadata()  # noqa: SIM118
    return results(json.loads((folder / "metrics.json").read_text())), adapter


def weights(folder):
    return folder / "adapter" / "adapter_model.safetensors"


def check_whole(root, folder):
    """Each file under its own name is whole; whatever else there is has a temporary's name."""
    if not folder.exists():
        # killed before it was there: the folder that was being filled is in nobody's way
        assert all(p.name == "log.txt" or _is_temporary(p.name) for p in root.iterdir()), list(root.iterdir())
        return
    for path in (p for p in folder.rglob("*") if p.is_file()):
        if any(_is_temporary(part) for part in path.relative_to(folder).parts):
            continue
        if path.suffix == ".json":
            assert json.loads(path.read_text()), path
        elif path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                assert len(file.keys()) > 0, path
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        else:
            assert path.name == "README.md" or path.parent.name == "tensorboard", path
    with contextlib.suppress(Finished):
        assert read_state(folder) is not None


def _is_temporary(name):
    return name.startswith(".") and name.endswith(".partial")


def kill(rng, expected):
    """How a run is to be killed: at a time, at a file event, or some microseconds after one."""
    how = rng.randrange(3)
    if how == 0:
        return {"after": rng.uniform(0, expected.seconds)}
    event = rng.randrange(1, expected.events + 1)
    return {"die_at": event} if how == 1 else {"at": event, "after": rng.uniform(0, 2e-3)}


@pytest.mark.parametrize("campaign", [c if c == 0 else pytest.param(c, marks=pytest.mark.slow) for c in KILLS])
def test_a_run_killed_at_any_point_resumes_to_the_same_bits(server, expected, tmp_path, campaign):
    rng, killed, runs = random.Random(campaign), 0, 0
    while killed < KILLS[campaign]:
        root, folder = tmp_path / str(runs), tmp_path / str(runs) / "run"
        root.mkdir()
        runs += 1
        finished = False
        while not finished:
            argv = ["--resume", folder] if folder.exists() else [*OPTIONS, "--out", folder]
            status, _, output = server.run(argv, root, **(kill(rng, expected) if killed < KILLS[campaign] else {}))
            assert status in (0, -signal.SIGKILL), output
            killed += status != 0
            check_whole(root, folder)
            finished = folder.exists() and json.loads((folder / "metrics.json").read_text())["finished"]
        assert final(folder) == (expected.results, expected.adapter), f"campaign {campaign}, run {runs}"
        left = {p.name for p in folder.iterdir()}
        # the state goes last: of a run killed just before, it is still there; TensorBoard may not be installed
        assert left - {"state", "tensorboard"} == {"adapter", "curves.png", "metrics.json"}
        assert not [p for p in folder.rglob("*") if _is_temporary(p.name) and "state" not in p.parts]


@pytest.mark.slow
def test_tensorboard_reads_each_epoch_once_after_kills(server, expected, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, rng = tmp_path / "run", random.Random(7)
    for number in range(4):
        argv = ["--resume", folder] if folder.exists() else [*OPTIONS, "--out", folder]
        how = {"at": rng.randrange(20, expected.events), "after": rng.uniform(0, 2e-3)} if number < 3 else {}
        status, _, output = server.run(argv, tmp_path, **how)
        assert status in (0, -signal.SIGKILL), output
        if status == 0:
            break
    found = events.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.step for e in found.Scalars("train/loss")] == [e["epoch"] for e in expected.results["epochs"]]


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_ctrl_c_keeps_what_was_reached_and_sigterm_is_as_kill(server, expected, tmp_path, name):
    sent, folder = getattr(signal, name), tmp_path / "my run"
    # in the second epoch, and between writes
    status, _, output = server.run([*OPTIONS, "--out", folder], tmp_path, at=expected.events // 2, after=0.0, sent=sent)
    metrics = json.loads((folder / "metrics.json").read_text())
    if name == "SIGINT":
        assert status == 130, output
        assert metrics["interrupted"] is True
        assert f"rlrr-finetune --resume '{folder}' goes on" in output
        assert "Traceback" not in output
        assert weights(folder).exists()
    else:
        assert status == -signal.SIGTERM
        assert metrics["interrupted"] is False
    check_whole(tmp_path, folder)
    status, _, output = server.run(["--resume", folder], tmp_path)
    assert status == 0, output
    got, adapter = final(folder)
    assert (got | {"interrupted": False}, adapter) == (expected.results, expected.adapter)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_choice(server, tmp_path):
    argv = [
        *(
            "sweep",
            "--device",
            "cpu",
            "--epochs",
            "2",
            "--warmup-epochs",
            "1",
            "--batch-size",
            "9",
            "--method",
            "linear",
        ),
        *("--lrs", "1e-3", "1e-2", "--weight-decays", "1e-4", "--seeds", "0", "1", "--no-tensorboard"),
    ]
    rng, kills, outcome = random.Random(0), 0, {}
    for name in ("whole", "killed"):
        root = tmp_path / name
        root.mkdir()
        status = -1
        while status:
            how = {"die_at": rng.randrange(2, 30)} if name == "killed" and kills < 8 else {}
            status, _, output = server.run([*argv, "--out", root / "sweep"], root, **how)
            assert status in (0, -signal.SIGKILL), output
            kills += status != 0
            if (root / "sweep" / "sweep.json").exists():
                json.loads((root / "sweep" / "sweep.json").read_text())
        outcome[name] = json.loads((root / "sweep" / "sweep.json").read_text())
    assert kills == 8
    assert outcome["killed"] == outcome["whole"]
    assert len(outcome["whole"]["final"]) == 2


@pytest.mark.parametrize(
    "largest", [pytest.param(1_000, id="metrics", marks=pytest.mark.slow), pytest.param(200_000, id="state")]
)
def test_a_run_killed_in_the_midst_of_a_write_leaves_no_part_under_a_files_name(server, expected, tmp_path, largest):
    folder = tmp_path / "run"
    status, _, output = server.run([*OPTIONS, "--out", folder], tmp_path, largest=largest, dies=True)
    assert status == -signal.SIGXFSZ, output
    # before its first epoch a run has no folder
    assert folder.exists() == (largest > 100_000)
    check_whole(tmp_path, folder)
    status, _, output = server.run(["--resume", folder] if folder.exists() else [*OPTIONS, "--out", folder], tmp_path)
    assert status == 0, output
    assert final(folder) == (expected.results, expected.adapter)


@pytest.mark.slow
def test_a_run_over_its_quota_says_what_it_kept_and_goes_on_from_there(server, expected, tmp_path):
    """By the system's own limit on the size of files: the first state fits, the next has AdamW's moments as well."""
    folder, kept = tmp_path / "run", 0
    status, _, output = server.run([*OPTIONS, "--out", folder], tmp_path, largest=200_000)
    assert status == 1, output
    assert f"error: [Errno 27] {folder / 'state' / 'last.safetensors'} cannot be written: File too large; " in output
    assert f"the folder keeps the run as it was after epoch {kept}: when it can be written again, " in output
    assert f"rlrr-finetune --resume {folder} goes on from there" in output
    assert read_state(folder).record["epoch"] == kept
    check_whole(tmp_path, folder)
    assert not [p for p in folder.rglob("*") if _is_temporary(p.name)]
    status, _, output = server.run(["--resume", folder], tmp_path)
    assert status == 0, output
    assert final(folder) == (expected.results, expected.adapter)
