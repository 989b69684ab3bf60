"""A thread of one's own for communication, so that it goes on while the main thread computes. Used by data_parallel.py.

gloo releases Python's lock while it waits, and so does torch while it adds, hence both threads get on.
"""

import queue
import threading
from collections.abc import Callable


class Background:
    """One thread that does what it is given, in order; `wait()` gives the outcome of the next thing."""

    def __init__(self):
        self._work, self._outcomes = queue.SimpleQueue(), queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_serve, args=(self._work, self._outcomes), name="data-parallel", daemon=True
        )
        self._thread.start()

    def start(self, job: Callable[[], None]) -> None:
        self._work.put(job)

    def wait(self) -> None:
        """Raise what the next thing given raised, with its own traceback; for that and all that came after it."""
        error = wait_for_thread(self._thread, self._outcomes)
        if error is not None:
            raise error

    def end(self) -> None:
        """The thread ends when it has done what it was given so far."""
        self._work.put(None)


def _serve(work: queue.SimpleQueue, outcomes: queue.SimpleQueue) -> None:
    """After a failure the rest is not tried: its peers may be gone."""
    error = None
    while (job := work.get()) is not None:
        try:
            if error is None:
                job()
        except BaseException as failure:  # noqa: BLE001  it is raised where somebody waits for it
            error = failure
        outcomes.put(error)


def wait_for_thread(thread: threading.Thread, outcomes: queue.SimpleQueue) -> BaseException | None:
    """The ranks' monitor knows this name: a rank that stands here is where `thread` is."""
    return outcomes.get()
