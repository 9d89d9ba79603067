"""The Lightning callback: an ordinary LightningModule ends as a frozen network within the budget."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import iessp
from stripe_kernels import StripeConv2d

try:
    import lightning.pytorch as pl
except ImportError:
    pl = pytest.importorskip("pytorch_lightning")

from iessp.lightning import StripePruning

BATCHES = 12


class Classifier(pl.LightningModule):
    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not by_hand
        convs = [nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU()]
        self.net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))

    def training_step(self, batch: list[Tensor], index: int) -> dict[str, Tensor]:
        x, y = batch
        return {"loss": F.cross_entropy(self.net(x), y)}

    def configure_optimizers(self) -> Any:
        optimiser = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimiser], [torch.optim.lr_scheduler.StepLR(optimiser, 1)]


def images() -> DataLoader:
    y = torch.arange(BATCHES * 8) % 2
    x = torch.randn(len(y), 1, 8, 8) * 0.2
    x[:, 0, 3, :] += 2 * y[:, None]
    return DataLoader(TensorDataset(x, y), batch_size=8)


def fit(
    folder: Path,
    module: Any,
    callback: StripePruning,
    epochs: int,
    resume: Path | None = None,
    **options: Any,
) -> Any:
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[callback], **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and loggers
        trainer.fit(module, images(), ckpt_path=resume)
    return trainer


def pruning(**options: Any) -> StripePruning:
    example = torch.zeros(1, 1, 8, 8)
    return StripePruning(0.4, module="net", example_input=example, gate_lr=0.2, **options)


@pytest.mark.parametrize("method", ["iem", "magnitude", "filter-skeleton"])
def test_a_fit_ends_frozen_within_the_budget(tmp_path: Path, method: str) -> None:
    module, callback = Classifier(), pruning(method=method)
    trainer = fit(tmp_path, module, callback, 4)
    assert callback.loss is not None
    assert int(callback.loss.step) == 4 * BATCHES
    assert (
        0 < float(trainer.callback_metrics["stripes/share"]) <= float(torch.tensor(0.4))
    )  # the metric is float32
    assert "training_step" not in vars(module)
    assert isinstance(callback.frozen[2], StripeConv2d)
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(callback.frozen.eval()(x), module.net.eval()(x))


def test_the_gates_learn_though_the_module_knows_nothing_of_them(tmp_path: Path) -> None:
    module, callback = Classifier(), pruning()
    trainer = fit(tmp_path, module, callback, 4)
    learned = {id(p) for p in iessp.gate_parameters(module.net)}
    assert learned
    assert learned.isdisjoint(id(p) for p in trainer.optimizers[0].state)
    assert learned <= {id(p) for p in callback.optimiser.state}


def test_a_resumed_fit_keeps_its_skeletons(tmp_path: Path) -> None:
    first = Classifier()
    callback = pruning(loss_options={"meet": 0.4, "settle": 0.5})
    trainer = fit(tmp_path, first, callback, 4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    skeletons = iessp.skeletons(first.net)

    again, callback = Classifier(), pruning(loss_options={"meet": 0.2, "settle": 0.25})
    fit(tmp_path, again, callback, 8, tmp_path / "half.ckpt")
    assert int(callback.loss.step) == 8 * BATCHES
    assert all(torch.equal(s, skeletons[name]) for name, s in iessp.skeletons(again.net).items())
    assert not torch.equal(first.net[6].weight, again.net[6].weight)


def test_gates_sit_out_a_step_that_overflowed(tmp_path: Path) -> None:
    """Under float16 the scale of gradients is found by overflowing."""
    seen = []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=0.25)
    precision = pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)
    module, callback = Classifier(), pruning(loss_options={"warmup": 0.0})
    module.on_train_batch_end = lambda *_: seen.append(scaler.get_scale())
    fit(tmp_path, module, callback, 4, plugins=[precision])
    assert seen[0] < 2.0**30, "the first step overflowed"
    assert all(p.isfinite().all() for p in iessp.gate_parameters(module.net))
    assert callback.optimiser.state[module.net[0].parametrizations.weight[0].bias]["step"] > 20
    assert 0.35 < float(callback.loss.share_hard) <= 0.4 + 1e-6


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_other_precisions_than_float32(tmp_path: Path, precision: str) -> None:
    """Within a step they are torch's default, too."""
    module, callback = Classifier(), pruning()
    fit(tmp_path, module, callback, 4, precision=precision)
    assert 0.35 < float(callback.loss.share_hard) <= 0.4 + 1e-6
    assert callback.frozen is not None


def test_refusals_name_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="by hand"):
        fit(tmp_path, Classifier(by_hand=True), pruning(), 1)
    with pytest.raises(ValueError, match="max_epochs or max_steps"):
        fit(tmp_path, Classifier(), pruning(), -1)
