"""The cheat sheet: its formulas agree with the functions, with counted bytes and operations; it is one page."""

import html
import math
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import workshop_utils
from chromium import TESTED_IN_BROWSER
from workshop_utils import collectives, sub_world
from workshop_utils.lora import LoRALinear
from workshop_utils.network import Link
from workshop_utils.point_to_point import count_traffic
from workshop_utils.teaching import cheatsheet


def value(formula, n, S, alpha=0.0, beta=0.0):
    """A formula of the sheet as a number: two things side by side are multiplied."""
    text = formula.replace("⌈lg n⌉", "L").replace("α", "alpha").replace("β", "beta")
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", text)
    return eval(text, {"n": n, "S": S, "alpha": alpha, "beta": beta, "L": math.ceil(math.log2(n))})


@pytest.mark.parametrize("n", [2, 4, 64])
def test_the_formulas_of_seconds_are_those_of_the_functions(n):
    link = Link(3e-5, 1e9)
    for name, _, _, _, seconds, cost_s in cheatsheet.COLLECTIVES:
        for S in (1e3, 1e8):
            assert value(seconds, n, S, 3e-5, 1e-9) == pytest.approx(cost_s(S, n, link)), name


def test_the_formulas_of_bytes_are_what_is_sent(ranks5):
    """Counted on the ranks, in worlds of 2 and 4."""
    counted = {
        "broadcast, tree": "broadcast_",
        "reduce, tree": "reduce_",
        "all-gather, ring": "ring_all_gather",
        "reduce-scatter, ring": "ring_reduce_scatter",
        "all-reduce, naive": "naive_all_reduce_",
        "all-reduce, tree": "tree_all_reduce_",
        "all-reduce, ring": "ring_all_reduce_",
        "all-reduce, halving-doubling": "halving_doubling_all_reduce_",
    }
    sent = {row[0]: row[3] for row in cheatsheet.COLLECTIVES}

    def busiest(name, n):
        with sub_world(n) as inside:
            if not inside:
                return 0
            whole, part = torch.ones(800), torch.ones(800 // n)
            operation, two = getattr(collectives, name), {"ring_all_gather": (whole, part)}
            two["ring_reduce_scatter"] = (part, whole)
            with count_traffic() as traffic:
                operation(*two.get(name, (whole,)))
            dist.barrier()
            return traffic.bytes_sent

    for label, name in counted.items():
        for n in (2, 4):
            assert max(ranks5.run(busiest, name, n)) == value(sent[label], n, 3200), label


def test_known_numbers_are_on_it():
    page = html.unescape(re.sub(r"<[^>]+>", " ", cheatsheet.cheat_sheet_html()))
    for words in (
        "4.127 bits",  # Dettmers et al. 2023, section 3: 4 + 0.127
        "4.500 bits",
        "1,594, 0.8%",  # 784 + 200 + 200 + 200 + 200 + 10
        "120.0 GB",  # Rajbhandari et al. 2020, figure 1, with the three below
        "31.4 GB",
        "16.6 GB",
        "1.9 GB",
        "0.70 of full",
        "280, 140, 36.1 GB",
        "-1.000, -0.696, -0.525",  # the QLoRA paper, appendix E
        "send 2 (n-1) S in all",
    ):
        assert words in page, words
    assert not re.search("https?:", page)


def test_the_share_of_operations_is_what_a_counter_sees():
    def operations(layer):
        x = torch.randn(4, 1024, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        return counter.get_total_flops()

    linear = nn.Linear(1024, 1024)
    share = operations(LoRALinear(nn.Linear(1024, 1024), 16, 16)) / operations(linear)
    assert f"{share:.2f} of full" in cheatsheet.lora_lines()[3]


def test_a_notebook_shows_it_and_random_numbers_go_on_as_before():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    shown = workshop_utils.cheat_sheet()
    assert torch.equal(torch.rand(3), expected)
    assert "<table>" in shown._repr_html_()


@pytest.mark.browser
@pytest.mark.skipif(not TESTED_IN_BROWSER, reason="no Chromium here (CI must have one)")
def test_it_is_one_page_of_a4(tmp_path):
    cheatsheet.write_pdf(tmp_path / "sheet.pdf")
    printed = (tmp_path / "sheet.pdf").read_bytes()
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) == 1
    width, height = map(float, re.search(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", printed).groups())
    assert (width, height) == pytest.approx((595, 842), abs=2)
