"""Handwritten digits: 1,797 real scans of 8x8 pixels (Alpaydin & Kaynak, UCI 1998), bundled with
scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from iessp.data.images import HELD_OUT_SEED, Images, Splits, split

SIZE = 32


def digits(data_dir: Path | None = None) -> Splits:
    """8x8 scans of 16 grey levels brought to 32x32 and three equal channels; a fixed fifth of them is the
    test set."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    x = torch.from_numpy(scans.images).float().unsqueeze(1) / 16  # [N, 1, 8, 8]
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    grey = (x * 255).round().to(torch.uint8)
    images = Images(grey.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(scans.target).long())
    order = torch.from_numpy(np.random.default_rng(HELD_OUT_SEED).permutation(len(images)))
    tested = len(images) // 5
    names = tuple(str(d) for d in range(10))
    return split("digits", images.take(order[tested:]), images.take(order[:tested]), names, flip=False)
