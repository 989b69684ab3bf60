"""The thread that looks at a rank's main thread must not harm it. What it tells is in test_ranks.py."""

import subprocess
import sys

COLLECT_WHILE_LOOKING = """
import gc, threading, time, torch
from workshop_utils.ranks import monitor

end = time.monotonic() + 1.5

def come_and_go():
    while time.monotonic() < end:
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()

threads = [threading.Thread(target=come_and_go) for _ in range(3)]
for thread in threads:
    thread.start()
while time.monotonic() < end:
    gc.disable()
    for _ in range(1000):
        cycle = [torch.ones(1)]
        cycle.append(cycle)
    gc.enable()
    monitor._current_frames()
"""


def test_the_monitor_does_not_collect_garbage_while_it_looks_at_threads():
    """With a plain sys._current_frames() Python 3.11.7 hangs here, as a rank did whose wrapper had gone."""
    subprocess.run([sys.executable, "-c", COLLECT_WHILE_LOOKING], check=True, timeout=60)


COLLECT_WHILE_CLIMBING = """
import gc, threading, time
from workshop_utils.ranks import monitor

end = time.monotonic() + 1.5

class Tensor:
    def __del__(self):
        time.sleep(0.001)  # as a real one does: other threads run meanwhile

def deep(n, label="a frame"):
    return deep(n - 1) if n else 0

def work():
    while time.monotonic() < end:
        deep(30)

worker = threading.Thread(target=work)
worker.start()
while time.monotonic() < end:
    gc.disable()
    for _ in range(1000):
        cycle = []
        cycle.append(cycle)
    cycle.append(Tensor())
    del cycle
    frame = monitor._current_frames().get(worker.ident)
    gc.enable()
    while frame is not None:
        frame = monitor._caller(frame)
"""


def test_the_monitor_does_not_collect_garbage_while_it_climbs_a_stack():
    """With a plain frame.f_back Python 3.11.7 crashes here, as a rank did while a notebook ran."""
    subprocess.run([sys.executable, "-c", COLLECT_WHILE_CLIMBING], check=True, timeout=60)
