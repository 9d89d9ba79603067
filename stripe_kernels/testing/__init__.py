"""What tests and benchmarks share: named lopsided problems, operands in every layout, the error budget.

case = CASES["lopsided"]
operands = case.operands(torch.bfloat16, layout="channels_last")
budget = budgets(case, operands)                   # float64 oracle, torch's own error in the same dtype
budget.y.check(y), budget.dx.check(dx), budget.dw.check(dw)
"""

from __future__ import annotations

from stripe_kernels.plan import GPU_MARGIN
from stripe_kernels.registry import Pass
from stripe_kernels.testing.budget import Budget, Budgets, Trial, budgets, failure, ulp
from stripe_kernels.testing.cases import CASES, DTYPES, LAYOUTS, PATTERNS, Case, Operands, case, live_stripes
from stripe_kernels.testing.kernels import (
    Prepared,
    list_and_calls,
    poisoned_memory,
    predicted_on_gpu,
    prepared,
    withdraw,
    without_memory,
)
from stripe_kernels.testing.oracle import Results, evaluate, evaluate_wider

__all__ = [
    "CASES",
    "DTYPES",
    "GPU_MARGIN",
    "LAYOUTS",
    "PATTERNS",
    "Budget",
    "Budgets",
    "Case",
    "Operands",
    "Pass",
    "Prepared",
    "Results",
    "Trial",
    "budgets",
    "case",
    "evaluate",
    "evaluate_wider",
    "failure",
    "list_and_calls",
    "live_stripes",
    "poisoned_memory",
    "predicted_on_gpu",
    "prepared",
    "ulp",
    "withdraw",
    "without_memory",
]
