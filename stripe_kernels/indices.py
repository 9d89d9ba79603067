"""Host index arrays on the devices that need them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stripe_kernels.kept import Kept, capturing


class IndexArrays:
    """Index arrays by name, copied to a device the first time it is met (kept.py has what that takes on a
    GPU). Later calls read nothing on the host and copy nothing."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self._host = arrays
        self._on: dict[torch.device, Kept] = {}

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """RuntimeError where the first call on a device is one that a CUDA graph is being captured from."""
        found = self._on.get(device)
        if found is None:
            if capturing(device):
                raise RuntimeError(
                    "a stripe kernel's index tables cannot be copied to the GPU while a CUDA graph is being "
                    "captured: call the layer once on an input of this size, dtype and layout before"
                )
            found = self._on[device] = Kept(lambda: self._copies(device), device)
        value: dict[str, Tensor] = found.value()
        return value

    def _copies(self, device: torch.device) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array.copy()).to(device) for name, array in self._host.items()}
