"""Seconds until four ranks are live: `start_ranks` beside torch's mp.spawn and ipyparallel. About three minutes."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import psutil
from cells import missing, number, ratio, section, spread, table
from live_contenders import CONTENDERS

TITLE = "Live ranks: start_ranks beside mp.spawn and ipyparallel"
WORLD_SIZE, ROUNDS = 4, 5
DEADLINE_S = 300  # of one contender
ORPHANS_AFTER_S = 5
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = (
    "ipyparallel==9.2.0"  # no part of the workshop: into a folder of its own, over the workshop's packages
)
PACKAGES = ROOT / "build" / "bench-packages"
MARK = "BENCH_LIVE_RANKS"  # in the environment of all processes of a contender, however they were started


def run(world_size: int = WORLD_SIZE, rounds: int = ROUNDS) -> dict:
    """A row for each contender; one that cannot be had keeps its row, which says so."""
    contenders = [name for name in CONTENDERS if name != "ipyparallel" or has_ipyparallel()]
    trials = {name: [] for name in contenders}
    for i in range(rounds):
        for k in range(len(contenders)):
            name = contenders[(i + k) % len(contenders)]  # who begins changes
            trials[name].append(trial(name, world_size, count_orphans=i == rounds - 1))
    first_s = {name: [one["first_s"] for one in of_name] for name, of_name in trials.items()}
    return section(
        TITLE,
        f"From the start of an empty Python process to the sum of an all-reduce over {world_size} ranks on gloo, imports "
        "included. They take turns, each in a process of its own. Empty call: a function that does nothing, on all "
        "ranks; mp.spawn has no live ranks to call, so it starts new processes. Processes: all of them, the one that "
        f"starts the others included. Left over: those that still run {ORPHANS_AFTER_S} s after that one was killed with "
        f"SIGKILL while the ranks wait, counted once. {rounds} rounds; the middle half in parentheses; {PACKAGE}.",
        table(
            ["", "first answer", "ours / theirs", "empty call", "processes", "left over"],
            [row(name, trials.get(name), first_s) for name in CONTENDERS],
        ),
    )


def row(name: str, trials: list[dict] | None, first_s: dict[str, list[float]]) -> list:
    """trials: of this contender; None where it could not be had."""
    what = "start_ranks, until the first all-reduced answer"
    if trials is None:
        why = "could not be installed"
        return [name, missing(why), missing(why, what, name), missing(why), missing(why), missing(why)]
    empty_ms = [1e3 * statistics.median(one["empty_s"]) for one in trials]
    return [
        name,
        spread(first_s[name], 1, " s"),
        "" if name == "start_ranks" else ratio(first_s["start_ranks"], first_s[name], what, name),
        spread(empty_ms, 0 if empty_ms[0] > 100 else 1, " ms"),
        number(trials[-1]["processes"]),
        number(trials[-1]["left_over"]),
    ]


def has_ipyparallel() -> bool:
    """Bring it where it is not there yet; False where it cannot be had."""
    wanted = PACKAGE.replace("==", "-") + ".dist-info"
    if not (PACKAGES / wanted).exists():
        command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
        command += ["--target", str(PACKAGES), "--constraint", str(ROOT / "requirements.lock"), PACKAGE]
        subprocess.run(command, check=False)
    return (PACKAGES / wanted).exists()


def trial(name: str, world_size: int, *, count_orphans: bool) -> dict:
    """Start one contender, read what it says, kill it, and end all that it left.

    Returns first_s, empty_s (one for each call), processes, left_over (None unless counted).
    Raises RuntimeError where the ranks' sum is wrong or does not come.
    """
    token = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="live-") as scratch:
        began_s = time.perf_counter()
        with start(name, world_size, token, scratch) as process:
            deadline = threading.Timer(DEADLINE_S, process.kill)
            deadline.start()
            try:
                answers = process.stdout.readline()
                first_s = time.perf_counter() - began_s
                empty_s = process.stdout.readline()
                if not empty_s or json.loads(answers) != [world_size * (world_size + 1) / 2] * world_size:
                    raise RuntimeError(f"{name} gave {answers!r} and ended: see above for its own error")
                processes, left_over = len(carrying(token)), None
                process.send_signal(signal.SIGKILL)
                process.wait()
                if count_orphans:
                    time.sleep(ORPHANS_AFTER_S)
                    left_over = len(carrying(token))
            finally:
                deadline.cancel()
                process.kill()
                end(token)
    return {
        "first_s": first_s,
        "empty_s": json.loads(empty_s),
        "processes": processes,
        "left_over": left_over,
    }


def start(name: str, world_size: int, token: str, scratch: str) -> subprocess.Popen:
    """The process of a contender; what it and its processes write goes to `scratch`."""
    path = [ROOT / "benchmarks", ROOT] + [PACKAGES] * (name == "ipyparallel")
    environment = os.environ | {
        MARK: token,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "TMPDIR": scratch,
        "IPYTHONDIR": scratch,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    # -c, not the file: as __main__ its functions could not be found by name in the ranks
    code = f"import live_contenders; live_contenders.main({name!r}, {world_size})"
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def carrying(token: str) -> list[psutil.Process]:
    """The processes that run with this token in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it ended, or is not ours
            continue
    return found


def end(token: str) -> None:
    """Kill what is left, until nothing is."""
    while left := carrying(token):
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=5)
