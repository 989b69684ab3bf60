"""check and mine where the answer runs on ranks: what the learner reads when it fails, hangs or passes."""

import pytest
from IPython.core.interactiveshell import InteractiveShell

from workshop_utils import answers, learning, progress_file
from workshop_utils.own_lines import own_lines_on_rank

IPYTHON_7 = """\
rank 1 failed after 0.1 s

---------------------------------------------------------------------------

IndexError                                Traceback (most recent call last)

<ipython-input-3-abc> in neighbours(n)
      7     x = [1]
----> 8     return x[3]
      9

IndexError: list index out of range
"""


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_PROGRESS", str(tmp_path))
    monkeypatch.setattr(progress_file, "_memory", {})


@pytest.fixture
def cell(ranks5, monkeypatch):
    """Run a cell of a notebook whose ranks are those of the tests; gives the last `result`."""
    monkeypatch.setattr(ranks5, "timeout_s", 2.0)
    shell = InteractiveShell.instance()
    shell.run_cell("from workshop_utils import check, mine\nimport torch\nimport torch.distributed as dist")

    def run(source):
        shell.run_cell(source)
        return shell.user_ns.get("result")

    yield run
    InteractiveShell.clear_instance()


def test_the_unsolved_stub_on_ranks(ranks5):
    assert learning.check("0.2", answers.stub("0.2")).outcome == "not solved"


def test_an_exception_on_one_rank_shows_that_ranks_own_lines(cell):
    result = cell(
        "def ring_neighbours():\n    dist.barrier()\n    if dist.get_rank() == 2:\n"
        "        return torch.ones(3) @ torch.ones(4)\n    dist.barrier()\nresult = check('0.2', ring_neighbours)"
    )
    assert result.outcome == "raised"
    assert result.text.startswith("Exercise 0.2: your function raised RuntimeError on rank 2.")
    assert "cell, line 4, in ring_neighbours\n    return torch.ones(3) @ torch.ones(4)\n" in result.text
    assert "nb00.py" not in result.text
    assert cell("result = check('0.2', mine('0.2'))")


def test_a_hanging_answer_says_who_waits_where_and_the_next_check_works(cell):
    result = cell(
        "def ring_neighbours():\n    if dist.get_rank() != 3:\n        dist.barrier()\n    return 0, 0\n"
        "result = check('0.2', ring_neighbours)"
    )
    assert result.outcome == "stopped"
    for rank in (0, 1, 2, 4):
        assert f"rank {rank}: waiting for" in result.text
    assert "barrier, line 3: dist.barrier()" in result.text and "rank 3:" not in result.text
    assert cell("result = check('0.2', mine('0.2'))")


def test_the_names_of_ranks_cells_inside_a_function(cell):
    result = cell(
        "def ring_neighbours():\n    return rank - 1, rank + 1\nresult = check('0.2', ring_neighbours)"
    )
    assert "Inside a function, ask dist.get_rank() and dist.get_world_size()." in result.text


def test_the_readers_own_function_runs_on_the_ranks_later(cell, ranks5, capsys):
    cell(
        "STEP = 1\ndef ring_neighbours():\n    n = dist.get_world_size()\n    me = dist.get_rank()\n"
        "    return (me - STEP) % n, (me + STEP) % n\nresult = check('0.2', ring_neighbours)"
    )
    capsys.readouterr()
    own = learning.mine("ring_neighbours")
    assert "your own answer" in capsys.readouterr().out
    assert "STEP" in own.__code__.co_names
    assert ranks5.run(own) == [(4, 1), (0, 2), (1, 3), (2, 4), (3, 0)]


def test_one_rank_alone_is_not_enough(ranks5, monkeypatch):
    monkeypatch.setattr(type(ranks5), "__len__", lambda self: 1)
    assert "Run ranks = start_ranks(4)" in learning.check("0.2", answers.reference("0.2")).text


def test_tracebacks_of_colabs_ipython_are_read_too():
    assert own_lines_on_rank(IPYTHON_7) == "cell, line 8, in neighbours\n"
