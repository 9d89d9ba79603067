"""The budgeted loss, ours: it links the output loss to stripe selection and adapts its pressure.

    R        = sum_l c_l sum M_l / sum_l c_l K_l R_l S_l                      expected share of MACs
    L        = CE + lambda_t R + decay/2 sum over live stripes of |W|^2
    lambda_t = lambda * clamp(1 + error / BAND, 0, 2) * exp(-kappa EMA(CE))   what presses now
    lambda  *= exp(eta / T * clamp(error / BAND, -1, 1))                      the dual step, in the logarithm
    error    = (1 - s) R + s R_wanted - R_target,  s = t / T                  R_wanted counts M > 1/2
    R_target = B + (1 - B)(1 + cos(pi s)) / 2                                 over T steps, warm-up to `meet`

While the output loss is high stripes are left alone; as it falls the pressure grows. The dual step is held
while EMA(CE) is more than `tolerance` above what the dense warm-up reached, or it would integrate that link
away; after `meet` the budget wins.

`exact` gates meet the target by their threshold: R_wanted alone is the error then and lambda stays small.
Others cross 1/2 late and many at a time: at first only R tells where they are going, in the end only what
lives counts. Against wind-up: the dual step and lambda are bounded; the proportional factor takes the
pressure to zero as soon as the share is BAND below its target; and stripes below M = 1/2 live on where the
target holds on to them (`theta` of the gates, renewed `remasks` times), so that R_hard does not fall below
R_target. The logarithm keeps lambda positive and lets it cross the orders of magnitude between tasks.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iessp.attach import gate_parameters, gated, gates, network_of, rank, scores_of, settle
from iessp.budget import out_of_reach, threshold
from iessp.gate import Phase, StripeGate

BAND = 0.05  # share of MACs
LAMBDA_RANGE = (1e-3, 1e4)
SMOOTHING = 0.05  # of EMA(CE)


def penalty(model: nn.Module) -> Tensor:
    """R, the expected share of the convolutions' MACs: a differentiable scalar in 0..1."""
    return _share(model, [gate.soft().sum() for gate in gates(model).values()])


def wanted_share(model: nn.Module) -> Tensor:
    """R_wanted, the share of MACs that the gates would keep if the target did not hold on to more."""
    return _share(model, [gate.wanted().sum() for gate in gates(model).values()])


def _share(model: nn.Module, kept: list[Tensor]) -> Tensor:
    network, found = network_of(model), gates(model)
    fixed = sum(site.cost for site in network.sites if site.name not in found) / network.cost
    parts = [
        n.float() * (gate.site.stripe_cost / network.cost)
        for n, gate in zip(kept, found.values(), strict=True)
    ]
    return torch.stack(parts).sum() + fixed


def _mark(model: nn.Module) -> str:
    """Tells whether any parameter of the gates has changed since."""
    digest = hashlib.sha256()
    for p in gate_parameters(model):
        digest.update(p.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def check_schedule(warmup: float, meet: float, settle: float) -> None:
    """Raises ValueError unless these shares of a schedule follow each other."""
    if not 0 <= warmup < meet <= settle <= 1:
        raise ValueError(f"need 0 <= warmup < meet <= settle <= 1, got {warmup}, {meet}, {settle}")


def _is_number(value: Any) -> bool:
    """Of Python, numpy or torch; a bool is none."""
    return not isinstance(value, (bool, str)) and hasattr(value, "__float__")


class LiveEnergy(torch.autograd.Function):
    """sum over live stripes of |W|^2: weight [K, C/g, R, S], live bool [K, R, S]; one pass over W each
    way.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, live: Tensor) -> Tensor:
        ctx.save_for_backward(weight, live)
        return (torch.linalg.vector_norm(weight, dim=1).square() * live).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, live = ctx.saved_tensors
        return weight * (2 * grad * live).to(weight.dtype).unsqueeze(1), None


class StripeLoss(nn.Module):
    """Call it on the task's loss in every training step; it runs the schedule of the gates it finds in
    `model`.

    budget: share of MACs to keep, 0..1. steps: how many times it will be called in training; it warns of a call more.
    warmup, meet, settle: shares of `steps`: gates switch on; the target has reached the budget; skeletons
    are fixed exactly.
    kappa: strength of the link to the output loss. adaptive=False: lambda stays at `pressure` (no dual step).
    weight_decay: of the gated weights' live stripes. tau_end: temperature of the gates when they settle,
    from 1. Raises ValueError for a budget that no cut of the gated convolutions can meet, and in a call on more than
    one number or where an earlier schedule has settled the skeletons.

    Its state_dict holds the whole controller; to go on from one, load the model's state and the optimiser's too, in any
    order. With torch.distributed every rank computes the same lambda.
    """

    model: nn.Module
    step: Tensor
    pressure: Tensor
    output_loss: Tensor  # EMA(CE)
    reference: Tensor  # its value at the end of the warm-up
    lambda_now: Tensor
    aimed: Tensor  # the target that the gates' threshold was last set for
    share_soft: Tensor
    share_hard: Tensor
    density: Tensor  # live stripes of the gated convolutions / all of them

    def __init__(
        self,
        model: nn.Module,
        *,
        budget: float,
        steps: int,
        warmup: float = 0.1,
        meet: float = 0.5,
        settle: float = 0.75,
        kappa: float = 1.0,
        adaptive: bool = True,
        pressure: float = 1.0,
        eta: float = 10.0,
        tolerance: float = 0.5,
        weight_decay: float = 0.0,
        tau_end: float = 0.3,
        remasks: int = 50,
    ):
        super().__init__()
        check_schedule(warmup, meet, settle)
        if isinstance(budget, str):
            raise ValueError(
                f"need a share as the budget, got {budget!r}: a time is for recipes and the command line; in a loop of "
                f"one's own attach(..., prices=...) lets the share be one of milliseconds (iessp.latency)"
            )
        if not _is_number(budget) or not _is_number(steps) or not 0 < budget <= 1 or steps < 1 or steps % 1:
            raise ValueError(
                f"need 0 < budget <= 1 and a whole number of steps >= 1, got {budget!r} and {steps!r}"
            )
        found = gates(model)
        # Whole filters are given their budget after compaction, of which the cut alone can tell.
        by_stripes = not any(gate.whole_filters for gate in found.values())
        if by_stripes and (reason := out_of_reach(network_of(model), found, budget)):
            raise ValueError(reason)
        self.__dict__["model"] = model  # not a submodule: the model's state is its own
        self.budget, self.steps, self.kappa, self.adaptive, self.eta = budget, steps, kappa, adaptive, eta
        self.warmup, self.meet, self.settle = (round(share * steps) for share in (warmup, meet, settle))
        self.tolerance, self.weight_decay, self.tau_end = tolerance, weight_decay, tau_end
        self.remask_every = max(1, (self.meet - self.warmup) // remasks)
        # float32 whatever torch's default is: bfloat16 rounds the dual step's factors to 1.
        kind: Any = {"dtype": torch.float32, "device": next(model.parameters()).device}
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("pressure", torch.tensor(float(pressure), **kind))
        for name in ("output_loss", "reference", "lambda_now", "aimed", "share_soft", "share_hard"):
            self.register_buffer(name, torch.zeros((), **kind))
        self.register_buffer("density", torch.ones((), **kind))
        self.share_hard.fill_(1.0)
        self.aimed.fill_(1.0)
        self._untrained = _mark(model)
        if all(gate.phase == "warm" for gate in found.values()):  # else a state was loaded, which stays
            self._enter()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(prefix + "density", self.density)  # of before it was counted
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def phase(self) -> Phase:
        step = int(self.step)
        return "warm" if step < self.warmup else "learn" if step < self.settle else "settled"

    def target(self) -> float:
        """R_target of the present step."""
        return self.budget + (1 - self.budget) * (1 + math.cos(math.pi * self._progress())) / 2

    def _progress(self) -> float:
        """s, 0..1 between warm-up and `meet`."""
        return min(max((int(self.step) - self.warmup) / max(1, self.meet - self.warmup), 0.0), 1.0)

    def forward(self, task_loss: Tensor) -> Tensor:
        if not self.training:
            return task_loss
        if not isinstance(task_loss, Tensor) or task_loss.dim():
            got = list(task_loss.shape) if isinstance(task_loss, Tensor) else type(task_loss).__name__
            raise ValueError(f"StripeLoss takes the task's loss as one number, a tensor [], got {got}")
        if int(self.step) == self.steps:
            warnings.warn(
                f"StripeLoss was to be called {self.steps} times in training, and its schedule ended with them: count "
                f"every step of every epoch, and put it into eval() for losses that are not trained on",
                stacklevel=4,
            )
        found = gates(self.model).values()
        if self.phase() != "settled" and any(gate.phase == "settled" for gate in found):
            raise ValueError(
                "the skeletons are settled by an earlier schedule: iessp.detach(model) merges them, and a new attach() "
                "begins another"
            )
        self._follow(task_loss.detach().float())
        # Times zero: DDP waits for a gradient of every parameter, in every phase.
        total = task_loss + sum(p.sum() for gate in found for p in gate.parameters()) * 0.0
        if self.phase() == "learn":
            total = total + self._selection(list(found))
        if self.weight_decay:
            total = total + self._decay()
        self.step += 1
        self._enter()
        return total

    def _selection(self, found: list[StripeGate]) -> Tensor:
        """lambda_t R, or the method's own regulariser; nothing for methods that rank and have nothing to
        learn."""
        self._count()
        own = [term for gate in found if (term := gate.regularizer()) is not None]
        if own:
            return torch.stack(own).sum()
        soft = penalty(self.model)
        self.share_soft.copy_(soft.detach())
        return self._press() * soft if soft.requires_grad else soft.detach() * 0.0

    @torch.no_grad()
    def _follow(self, task_loss: Tensor) -> None:
        """EMA(CE), the same on all ranks; its value at the end of the warm-up is what later losses are held
        against."""
        if dist.is_available() and dist.is_initialized():
            task_loss = task_loss.clone()
            dist.all_reduce(task_loss)
            task_loss /= dist.get_world_size()
        # A step that overflows is passed over, by gradient scalers for one: its mean would stay for good.
        task_loss = torch.where(task_loss.isfinite(), task_loss, self.output_loss)
        weight = max(SMOOTHING, 1 / (int(self.step) + 1))
        self.output_loss.lerp_(task_loss, weight)
        if int(self.step) <= self.warmup:
            self.reference.copy_(self.output_loss)

    @torch.no_grad()
    def _press(self) -> Tensor:
        """The dual step, then lambda_t."""
        # Where the cut meets the target by itself M says which stripes, not how many: its share is no error.
        exact = all(gate.exact for gate in gates(self.model).values())
        seen = self.share_soft.lerp(wanted_share(self.model), 1.0 if exact else self._progress())
        error = (seen - (self.aimed if exact else self.target())) / BAND
        link = torch.exp(-self.kappa * self.output_loss)
        if not self.adaptive:
            self.lambda_now.copy_(self.pressure * link)
            return self.lambda_now.clone()
        held = (self.output_loss > self.reference + self.tolerance) & (int(self.step) < self.meet)
        factor = torch.exp(self.eta / max(1, self.meet - self.warmup) * error.clamp(-1, 1))
        self.pressure.copy_(torch.where(held, self.pressure, (self.pressure * factor).clamp(*LAMBDA_RANGE)))
        self.lambda_now.copy_(self.pressure * (1 + error).clamp(0, 2) * link)
        return self.lambda_now.clone()

    def _count(self) -> None:
        found = gates(self.model).values()
        live = [gate.live().sum() for gate in found]
        self.share_hard.copy_(_share(self.model, live))
        self.density.copy_(torch.stack(live).sum() / sum(gate.site.stripes for gate in found))

    def _decay(self) -> Tensor:
        """decay/2 * |W|^2 over live stripes: what weight decay does, without fading the dead ones."""
        found = gates(self.model)
        terms = [
            LiveEnergy.apply(StripeGate.original(conv), found[name].live())
            for name, conv in gated(self.model).items()
        ]
        return 0.5 * self.weight_decay * torch.stack(terms).sum()

    def _enter(self) -> None:
        """Put the gates into the phase, temperature and mask of the coming step."""
        phase, found = self.phase(), gates(self.model)
        current = next(iter(found.values())).phase
        if phase == "settled" and current != "settled":
            self._warn_of_still_gates()
            settle(self.model, self.budget)
            self._count()
            return
        for gate in found.values():
            if current != "settled":
                gate.phase = phase
        if phase == "learn":
            self._anneal(found)

    def _warn_of_still_gates(self) -> None:
        """The commonest mistake in a loop of one's own costs a whole training: an optimiser without the gates."""
        if gate_parameters(self.model) and _mark(self.model) == self._untrained:
            warnings.warn(
                "no gate has moved in training, so which stripes are kept was not learned: build the optimiser after "
                "attach(), from iessp.param_groups(model, lr=...)",
                stacklevel=4,
            )

    def _anneal(self, found: dict[str, StripeGate]) -> None:
        since = int(self.step) - self.warmup
        tau = math.exp(math.log(self.tau_end) * since / max(1, self.settle - self.warmup))
        for gate in found.values():
            gate.tau = torch.full_like(gate.tau, tau)
        if since % self.remask_every:
            return
        if any(p.requires_grad for gate in found.values() for p in gate.parameters()):
            lowest = threshold(network_of(self.model), scores_of(self.model), self.target())
            self.aimed.fill_(self.target())
            for gate in found.values():
                gate.keep_above(lowest)
        else:
            for name, skeleton in rank(self.model, self.target()).items():
                found[name].remask(skeleton)
            self._count()
