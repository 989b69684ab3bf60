"""Fixtures shared by all tests."""

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
