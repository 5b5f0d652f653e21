"""Tests on a device begin without the garbage of others: a graph that is freed while another is captured ends that."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def _without_garbage() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
