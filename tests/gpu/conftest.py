"""The GPU's tests need torch with CUDA, transformers and pytest, and nothing else of the workshop's environment."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # on_gpu.py


def pytest_report_header():
    import torch

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"torch {torch.__version__}, GPUs: {', '.join(cards) or 'none'}"


@pytest.fixture
def lone_group():
    """nccl, this process alone."""
    import on_gpu

    with on_gpu.group_of_one():
        yield
