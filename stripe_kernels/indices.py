"""Host index arrays on the devices that need them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class IndexArrays:
    """Index arrays by name, copied to a device the first time it is met.

    That copy waits for the device: run a kernel once before capturing it in a CUDA graph, as graphs ask for
    anyway. Later calls read nothing and copy nothing.
    """

    def __init__(self, **arrays: np.ndarray) -> None:
        self._host = arrays
        self._on: dict[torch.device, dict[str, Tensor]] = {}

    def on(self, device: torch.device) -> dict[str, Tensor]:
        found = self._on.get(device)
        if found is None:
            found = {name: torch.from_numpy(array.copy()).to(device) for name, array in self._host.items()}
            self._on[device] = found
        return found
