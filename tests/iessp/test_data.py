"""Images: one split for all runs, augmentation that only moves pixels."""

from __future__ import annotations

import pytest
import torch

from iessp.data import load
from iessp.data.images import Images, augment, normalise, shuffled


def test_digits_are_split_once_and_for_all() -> None:
    a, b = load("digits"), load("digits")
    assert (len(a.train), len(a.held_out), len(a.test)) == (1295, 143, 359)
    assert torch.equal(a.held_out.x, b.held_out.x)
    assert a.train.x.shape[1:] == (3, 32, 32)
    counts = torch.bincount(a.held_out.y, minlength=10)
    share = counts / torch.bincount(torch.cat([a.train.y, a.held_out.y]), minlength=10)
    assert 0.095 < share.min() <= share.max() < 0.105, "stratified"

    def rows(images: Images) -> set[bytes]:
        return {x.numpy().tobytes() for x in images.x}

    assert not rows(a.train) & rows(a.held_out)
    assert not (rows(a.train) | rows(a.held_out)) & rows(a.test)


def test_normalised_training_images_have_unit_variance() -> None:
    splits = load("digits")
    x = normalise(splits.train.x, splits)
    assert float(x.mean()) == pytest.approx(0, abs=1e-4)
    assert float(x.std()) == pytest.approx(1, abs=1e-3)
    assert normalise(splits.train.x[:2], splits, 16).shape == (2, 3, 16, 16)


def test_augmentation_shifts_reflects_and_mirrors() -> None:
    x = torch.arange(5 * 6).view(1, 1, 5, 6).expand(64, 2, -1, -1).to(torch.uint8)
    moved = augment(x, torch.Generator().manual_seed(0), shift=2, flip=True)
    assert moved.shape == x.shape
    assert moved.dtype == torch.uint8
    candidates = set()
    for mirrored in (x[:1], x[:1].flip(3)):
        padded = torch.nn.functional.pad(mirrored.float(), (2,) * 4, mode="reflect").to(torch.uint8)
        candidates |= {
            padded[0, 0, r : r + 5, c : c + 6].numpy().tobytes() for r in range(5) for c in range(5)
        }
    found = {image[0].numpy().tobytes() for image in moved}
    assert found <= candidates
    assert len(found) > 20
    still = augment(x, torch.Generator(), shift=0, flip=False)
    assert torch.equal(still, x)


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own() -> None:
    first, again, second = (torch.cat(list(shuffled(100, 10, 7, e))) for e in (0, 0, 1))
    assert sorted(first.tolist()) == list(range(100))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert [len(b) for b in shuffled(25, 10, 0, 0)] == [10, 10]


def test_images_are_checked() -> None:
    with pytest.raises(
        ValueError, match=r"uint8 \[N, C, H, W\] with N labels, got torch.float32 \(2, 3, 4, 4\) with 2"
    ):
        Images(torch.zeros(2, 3, 4, 4), torch.zeros(2))
    with pytest.raises(ValueError, match='unknown data set "digit": did you mean "digits"'):
        load("digit")
