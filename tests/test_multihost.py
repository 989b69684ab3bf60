"""cluster/multihost_lab.sh for real: hosts are network namespaces, their links are throttled, torchrun spans them."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAB = ROOT / "cluster/multihost_lab.sh"
LIMIT_S = 280


def missing() -> str | None:
    """Why the lab cannot run here."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "ip and tc are not installed (package iproute2)"
    made = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return "this system does not allow network namespaces" if made.returncode else None


needs_hosts = pytest.mark.skipif(missing() is not None, reason=f"no multi-host lab: {missing()}")


def lab(*arguments, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess:
    return subprocess.run(
        [LAB, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
        env=os.environ | {"PYTHON": sys.executable},
        check=False,
    )


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith("lab")}


@needs_hosts
@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 20)
def test_two_throttled_hosts_train_as_one_and_the_table_is_complete(tmp_path):
    before = namespaces()
    done = lab("--rates", "50", "--strategies", "fsdp", "--steps", "12", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    free, slow = (json.loads((tmp_path / f"fsdp-{rate}.json").read_text()) for rate in (0, 50))
    assert free["hosts"] == slow["hosts"] == 2 and free["losses"] == slow["losses"]
    whole = 4 * 199_210 / 2 * 4  # 4 S (n-1)/n, as gloo's reduce-scatter is an all-reduce
    sent = slow["bytes_sent"][0] / 12
    assert whole < sent < 1.1 * whole
    # the link was there: no step is faster than its bytes at 50 Mb/s, give or take the burst that passes at once
    assert min(slow["step_s"][1:]) > 0.8 * whole * 8 / 50e6
    assert done.stdout.count("| fsdp |") == 2 and (tmp_path / "plot.png").stat().st_size > 10_000
    assert namespaces() == before


@needs_hosts
@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 20)
def test_a_host_that_disappears_costs_the_steps_since_the_checkpoint(tmp_path):
    before = namespaces()
    done = lab("--lose-host", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    assert "another rank is gone" in done.stdout and "start the same command again" in done.stdout
    assert "ended with the weights of the undisturbed run, bit for bit" in done.stdout
    assert namespaces() == before


@needs_hosts
@pytest.mark.timeout(60)
def test_ctrl_c_leaves_no_host_behind(tmp_path):
    before = namespaces()
    process = subprocess.Popen(
        [LAB, "--out", tmp_path],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHON": sys.executable},
        start_new_session=True,
    )
    try:
        give_up_s = time.monotonic() + 20
        while len(namespaces() - before) < 3 and time.monotonic() < give_up_s:
            time.sleep(0.05)
        assert len(namespaces() - before) == 3  # two hosts and the switch
        time.sleep(1)
        os.killpg(process.pid, 2)
        assert process.wait(20) == 130
    finally:
        process.kill()
    assert namespaces() == before


@pytest.mark.parametrize(
    "arguments, complaint",
    [(("--host", "2"), "unknown option --host"), (("--hosts", "1"), "--hosts is 2 to 9, got 1")],
)
@pytest.mark.skipif(missing() is not None, reason="says first what is missing")
def test_bad_arguments_are_named(arguments, complaint):
    done = lab(*arguments, limit_s=20)
    assert done.returncode == 2 and complaint in done.stderr


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="changes its user")
def test_without_root_it_says_so():
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", "bash", LAB],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2 and "needs root" in done.stderr
