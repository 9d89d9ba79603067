"""Settings of every test process, and the process-wide state of torch put back after each test."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels run on the CPU

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def torch_state() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
