"""Fixtures shared by all tests."""

import itertools

import pytest

from workshop_utils.ranks import driver


@pytest.fixture(scope="session")
def _five_ranks():
    """Five ranks, started once: `sub_world(n)` makes any smaller world of them."""
    ranks = driver.start_ranks(5)
    yield ranks
    ranks.stop()


@pytest.fixture
def ranks5(_five_ranks, monkeypatch):
    """Five live ranks, brought back if a test lost one. Also what `current_ranks()` returns meanwhile."""
    if any(kernel.lost for kernel in _five_ranks.kernels):
        _five_ranks.restart()
    monkeypatch.setattr(driver, "_current", _five_ranks)
    return _five_ranks


def pytest_terminal_summary(terminalreporter):
    """The seconds of each part of the suite, above pytest's last line."""
    seconds_s = {}
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if hasattr(report, "duration"):
            part = next((mark for mark in ("notebooks", "browser") if mark in report.keywords), "package")
            seconds_s[part] = seconds_s.get(part, 0.0) + report.duration
    if seconds_s:
        parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in sorted(seconds_s.items()))
        terminalreporter.write_line(f"time per part: {parts}")
