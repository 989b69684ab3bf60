"""Is there a browser? Debian's chromium, or Chrome. Where none is, its tests are left out, with a line that says so.

On CI there must be one: there the tests fail rather than be left out.
"""

import os
import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TESTED_IN_BROWSER = CHROMIUM is not None or "CI" in os.environ

# What every test in tests/browser/ carries. They run among the notebooks, because they run the learner's notebooks.
MARKS = [
    pytest.mark.browser,
    pytest.mark.notebooks,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not TESTED_IN_BROWSER, reason="no Chromium here (CI must have one)"),
]
