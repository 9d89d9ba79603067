"""A callback for PyTorch Lightning: learn the skeletons while a LightningModule trains as it always did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from iessp.attach import attach, freeze, gate_parameters, gates
from iessp.loss import StripeLoss

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise ImportError(
            f"iessp.lightning needs the package lightning or pytorch-lightning: {error}"
        ) from error


class StripePruning(Callback):
    """Gates before the optimisers are made, the budget's loss in every training step, `frozen` in the end.

    budget: share of MACs to keep, 0..1. module: name of the submodule to prune, "" for the LightningModule itself;
    attaching runs it once on `example_input` [N, C, H, W], see `iessp.attach`. gate_lr: of an Adam of the callback's
    own that steps the gates; the module's optimisers pass them over. weight_decay: of live stripes; leave gated
    weights out of the module's own (`iessp.param_groups`), which would fade dead ones. loss_options and
    method_options go to `iessp.StripeLoss` and `iessp.attach`.

    Logs stripes/share, the share of MACs kept, and stripes/pressure. A fit resumed from a checkpoint goes on where
    it stopped. After fit `frozen` is the pruned (sub)module on the stripe kernels. Raises ValueError for manual
    optimisation and for a fit without an end.
    """

    def __init__(
        self,
        budget: float,
        *,
        method: str = "iem",
        module: str = "",
        example_input: Tensor | None = None,
        gate_lr: float = 0.005,
        weight_decay: float = 0.0,
        exclude: Iterable[str] = (),
        loss_options: dict[str, Any] | None = None,
        method_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.module, self.gate_lr = module, gate_lr
        attached = {"method": method, "example_input": example_input, "exclude": tuple(exclude)}
        self.attached: dict[str, Any] = attached | (method_options or {})
        self.loss_options = {"budget": budget, "weight_decay": weight_decay} | (loss_options or {})
        self.frozen: nn.Module | None = None
        self.loss: StripeLoss | None = None
        self.optimiser: torch.optim.Optimizer | None = None
        self._saved: dict[str, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            kind = type(pl_module).__name__
            raise ValueError(f"{kind} optimises by hand: call iessp.attach and iessp.StripeLoss there")
        model = pl_module.get_submodule(self.module)
        if not gates(model):
            attach(model, **self.attached)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        steps = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        if not 0 < steps < math.inf:
            raise ValueError(
                f"the schedule of the budget needs max_epochs or max_steps, the fit has {steps} steps"
            )
        model = pl_module.get_submodule(self.module)
        loss = self.loss = StripeLoss(model, steps=int(steps), **self.loss_options).to(pl_module.device)
        if learned := gate_parameters(model):
            # A gate's gradient is near 1e-5: the usual epsilon would be a third of its rms.
            self.optimiser = torch.optim.Adam(learned, self.gate_lr, betas=(0.9, 0.99), eps=1e-12)
        if self._saved:
            loss.load_state_dict(self._saved["loss"])
            if self.optimiser:
                self.optimiser.load_state_dict(self._saved["optimiser"])
        pl_module.training_step = _budgeted(pl_module, pl_module.training_step, loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.optimiser:
            # Under float16 gradients are scaled, and steps that overflowed are to be passed over.
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is None:
                self.optimiser.step()
            elif any(p.grad is not None for group in self.optimiser.param_groups for p in group["params"]):
                scaler.step(self.optimiser)
            self.optimiser.zero_grad(set_to_none=True)  # torch's optimisers pass over what has no gradient

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.frozen = freeze(pl_module.get_submodule(self.module))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        vars(pl_module).pop("training_step", None)

    def state_dict(self) -> dict[str, Any]:
        if self.loss is None:
            return self._saved
        return {
            "loss": self.loss.state_dict(),
            "optimiser": self.optimiser.state_dict() if self.optimiser else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict


def _budgeted(pl_module: Any, step: Callable[..., Any], loss: StripeLoss) -> Callable[..., Any]:
    """training_step with the budget's loss added to the task's: a tensor, a dict with "loss", or None to skip."""

    def training_step(*args: Any, **kwargs: Any) -> Any:
        given = step(*args, **kwargs)
        if given is None:
            return None
        total = loss(given["loss"] if isinstance(given, Mapping) else given)
        pl_module.log("stripes/share", loss.share_hard)
        pl_module.log("stripes/pressure", loss.lambda_now)
        return {**given, "loss": total} if isinstance(given, Mapping) else total

    return training_step
