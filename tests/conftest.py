"""Before anything imports triton: its kernels run in the interpreter here, so that they are tested without a GPU.

Tests that compile them start a process without this setting (tests/triton/test_compiled.py).
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
