"""Images: one split for all runs, augmentation that only moves pixels."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from iessp.data import load
from iessp.data.download import SOURCES
from iessp.data.images import Images, augment, normalise, shuffled, subset
from iessp.data.stream import imagenet
from iessp.recipe import Recipe
from iessp.train import Interrupted, Trainer, count_errors


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


def cifar_files(form: str, fine: bool = False) -> dict[str, bytes]:
    """Files of CIFAR-10, or of CIFAR-100, whose images have a coarse label (here always 19) before the fine one."""
    files = {}
    names = ["train", "test"] if fine else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names, 6 - len(names)):
        pixels, labels = batch(i)
        coarse = np.full_like(labels, 19)
        if form == "python":
            kinds = {b"coarse_labels": coarse.tolist(), b"fine_labels": labels.tolist()}
            content = {
                b"data": pixels,
                b"batch_label": b"x",
                **(kinds if fine else {b"labels": labels.tolist()}),
            }
            files[name] = pickle.dumps(content, protocol=2)
        else:
            columns = [coarse[:, None]] * fine + [labels[:, None], pixels]
            files[f"{name}.bin"] = np.concatenate(columns, 1).tobytes()
    return files


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_in_every_official_form(tmp_path: Path, form: str, packed: bool, classes: int) -> None:
    files = cifar_files(form, classes == 100)
    if packed:
        with tarfile.open(tmp_path / f"cifar-{classes}-{form}.tar.gz", "w:gz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(f"cifar-{classes}/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        (tmp_path / "sub").mkdir()
        for name, content in files.items():
            (tmp_path / "sub" / name).write_bytes(content)
    splits = load(f"cifar{classes}", tmp_path)
    assert (len(splits.train) + len(splits.held_out), len(splits.test)) == (20 * (len(files) - 1), 20)
    assert len(splits.classes) == classes
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


def test_official_files_are_fetched_checked_and_left_when_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, mine = tmp_path / "official", tmp_path / "mine"
    place.mkdir()
    with tarfile.open(place / "c.tar.gz", "w:gz") as archive:
        for name, content in cifar_files("python").items():
            info = tarfile.TarInfo(f"batches/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    whole = (place / "c.tar.gz").read_bytes()
    (place / "cifar-10-python.tar.gz").write_bytes(whole)
    files = {"cifar-10-python.tar.gz": hashlib.md5(whole).hexdigest()}
    monkeypatch.setitem(SOURCES, "cifar10", (f"{place.as_uri()}/", files))
    assert len(load("cifar10", mine, fetch=True).test) == 20
    (place / "cifar-10-python.tar.gz").unlink()
    load("cifar10", mine, fetch=True)  # whole: not fetched again
    (mine / "cifar-10-python.tar.gz").write_bytes(whole[:-1])
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python.tar.gz cannot be fetched .* yourself"):
        load("cifar10", mine, fetch=True)
    (place / "cifar-10-python.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not the published"):
        load("cifar10", mine, fetch=True)
    assert [path.name for path in mine.iterdir()] == ["cifar-10-python.tar.gz"], (
        "as it was, nothing beside it"
    )
    with pytest.raises(ValueError, match="needs --data-dir"):
        load("cifar10", fetch=True)
    with pytest.raises(ValueError, match="digits has no place to download from"):
        load("digits", mine, fetch=True)


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


def test_a_folder_of_images_passes_over_what_other_programs_put_there(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog", ".ipynb_checkpoints", "cat/.cache"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8)).save(tmp_path / part / name / f"{i}.png")
        (tmp_path / part / "cat/._0.png").write_bytes(b"of macOS")
        (tmp_path / part / "cat/Thumbs.db").write_bytes(b"of Windows")
    splits = load("folder", tmp_path)
    assert splits.classes == ("cat", "dog")
    assert splits.test.y.tolist() == [0, 0, 1, 1]
    assert (splits.train.y.tolist(), splits.held_out.y.tolist()) == ([0, 1], [0, 1]), (
        "some of each, few as they are"
    )


def test_what_is_wrong_in_a_folder_of_images_is_named(tmp_path: Path) -> None:
    photographs(tmp_path)
    broken = tmp_path / "train/dog/03.png"
    whole = broken.read_bytes()
    for content in (b"no image", whole[:-40]):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=f"{broken} cannot be read as an image"):
            load("folder", tmp_path)
        with pytest.raises(ValueError, match=f"{broken} cannot be read as an image"):
            list(imagenet(tmp_path, size=16, workers=0).train.batches([torch.arange(20)]))
    broken.write_bytes(whole)
    for path in (tmp_path / "val/cat").iterdir():
        path.rename(path.with_suffix(".gif"))
    with pytest.raises(FileNotFoundError, match=r"val/cat has no image: no file ends in \.bmp, "):
        load("folder", tmp_path)
    (tmp_path / "empty/train").mkdir(parents=True)
    (tmp_path / "empty/test").mkdir()
    with pytest.raises(FileNotFoundError, match="empty/train has no folder, of which every class needs one"):
        load("folder", tmp_path / "empty")


def photographs(root: Path) -> Path:
    """24 + 4 images of two classes in several sizes: the left half of each one colour, the right another."""
    random = np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 2)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(0, 255, (int(random.integers(20, 40)), 30 + i, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i:02}.png")
    return root


def test_a_stream_gives_the_same_pixels_for_any_number_of_workers_and_from_any_batch_on(
    tmp_path: Path,
) -> None:
    photographs(tmp_path)
    order = [torch.tensor([3, 1, 4]), torch.tensor([5, 9]), torch.tensor([2, 6, 0])]
    alone, helped = (imagenet(tmp_path, size=16, workers=n).train for n in (0, 2))
    first, second = (list(s.batches(order, salt=7)) for s in (alone, helped))
    assert [len(images) for images in first] == [3, 2, 3]
    for a, b, index in zip(first, second, order, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, alone.y[index])
    (resumed,) = helped.batches(order[2:], salt=7)
    assert torch.equal(resumed.x, first[2].x)
    (other,) = alone.batches(order[2:], salt=8)
    assert not torch.equal(other.x, resumed.x), "another epoch, another part of the image"
    (plain,) = alone.batches(order[2:])
    assert torch.equal(plain.x, alone.take(order[2]).x)


def test_the_evaluation_form_is_the_centre(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "only").mkdir(parents=True)
        for i in range(10):
            pixels = np.zeros((16, 32, 3), np.uint8)
            pixels[1:15, 9:23] = 200  # 7/8 of the shorter side, in the middle
            Image.fromarray(pixels).save(tmp_path / part / "only" / f"{i}.png")
    splits = imagenet(tmp_path, size=14, workers=0)
    assert (len(splits.train), len(splits.held_out), len(splits.test)) == (9, 1, 10)
    assert (splits.channels, splits.size) == (3, 14)
    assert splits.test.take(torch.tensor([0])).x.eq(200).all()


def test_training_from_a_stream_resumes_with_the_same_bits(tmp_path: Path) -> None:
    splits = imagenet(photographs(tmp_path / "images"), size=16, workers=1)
    recipe = Recipe(name="stream", model="resnet20", width=0.25, data="imagenet", epochs=2, batch=8, crop=1)
    whole = Trainer(recipe, splits, tmp_path / "whole")
    whole.run()
    stopped = Trainer(recipe, splits, tmp_path / "stopped")
    with pytest.raises(Interrupted):
        stopped.run(stop=lambda: stopped.step >= 3)
    resumed = Trainer(recipe, splits, tmp_path / "stopped")
    resumed.run()
    expected = whole.model.state_dict()
    assert all(
        torch.equal(v, expected[k]) for k, v in resumed.model.state_dict().items() if isinstance(v, Tensor)
    )
    assert count_errors(whole.model, splits.test, splits) <= len(splits.test)


def test_a_subset_is_stratified_and_fixed() -> None:
    train = load("digits").train
    few = subset(train, 200)
    assert abs(len(few) - 200) <= 10
    share = few.y.bincount() / train.y.bincount()
    assert float(share.max() - share.min()) < 0.02
    assert torch.equal(few.x, subset(train, 200).x)


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
