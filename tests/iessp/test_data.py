"""Images: one split for all runs, augmentation that only moves pixels."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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


def batch(seed: int, n: int = 20) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (n, 3072), dtype=np.uint8), random.permutation(np.arange(n) % 10).astype(
        np.uint8
    )


def cifar_files(form: str) -> dict[str, bytes]:
    files = {}
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels, labels = batch(i)
        if form == "python":
            content = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"x"}
            files[name] = pickle.dumps(content, protocol=2)
        else:
            files[f"{name}.bin"] = np.concatenate([labels[:, None], pixels], 1).tobytes()
    return files


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar_in_every_official_form(tmp_path: Path, form: str, packed: bool) -> None:
    if packed:
        with tarfile.open(tmp_path / f"cifar-10-{form}.tar.gz", "w:gz") as archive:
            for name, content in cifar_files(form).items():
                info = tarfile.TarInfo(f"cifar-10-batches/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        (tmp_path / "sub").mkdir()
        for name, content in cifar_files(form).items():
            (tmp_path / "sub" / name).write_bytes(content)
    splits = load("cifar10", tmp_path)
    assert (len(splits.train) + len(splits.held_out), len(splits.test)) == (100, 20)
    pixels, labels = batch(5)
    assert torch.equal(splits.test.x, torch.from_numpy(pixels).view(-1, 3, 32, 32))
    assert splits.test.y.tolist() == labels.tolist()
    assert splits.flip


def test_cifar_refuses_code_and_damage(tmp_path: Path) -> None:
    for name, content in cifar_files("python").items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Path("x")}))
    with pytest.raises(pickle.UnpicklingError, match="does not hold pathlib"):
        load("cifar10", tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    for name, content in cifar_files("binary").items():
        (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match="not made of records of 3073"):
        load("cifar10", tmp_path)


def test_missing_data_says_what_to_get(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar10 needs --data-dir"):
        load("cifar10")
    with pytest.raises(
        FileNotFoundError, match=r"expected cifar-100-python.tar.gz or cifar-100-binary.tar.gz"
    ):
        load("cifar100", tmp_path)
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte does not exist"):
        load("mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match="train is missing"):
        load("folder", tmp_path)


def test_a_folder_of_images_by_class(tmp_path: Path) -> None:
    for part, n in (("train", 10), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (8, 8) if i else (9, 7), (label * 200, i, 0)).save(
                    tmp_path / part / name / f"{i:02}.png"
                )
    splits = load("cifar10", tmp_path)
    assert splits.classes == ("cat", "dog")
    assert splits.test.x.shape == (6, 3, 7, 9), "the first image's size"
    assert splits.test.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert (len(splits.train), len(splits.held_out)) == (18, 2)
    assert splits.test.x[4, :, 0, 0].tolist() == [200, 1, 0]
    (tmp_path / "test" / "cow").mkdir()
    with pytest.raises(ValueError, match="has classes"):
        load("folder", tmp_path)


def test_idx_files_packed_or_not(tmp_path: Path) -> None:
    def idx(array: np.ndarray) -> bytes:
        return struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape) + array.tobytes()

    random = np.random.default_rng(0)
    pixels, labels = (
        random.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        (np.arange(20) % 10).astype(np.uint8),
    )
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    splits = load("fashion-mnist", tmp_path)
    assert splits.test.x.shape == (20, 1, 32, 32)
    assert torch.equal(splits.test.x[:, 0, 2:30, 2:30], torch.from_numpy(pixels))
    assert splits.flip
    assert not load("mnist", tmp_path).flip
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels)[:-1])
    with pytest.raises(ValueError, match="does not fit its sizes"):
        load("mnist", tmp_path)
