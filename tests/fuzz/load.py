"""Coverage-guided fuzzing of stripe_kernels.load: any file gives a network or a ValueError.

    python -m tests.fuzz.load -max_total_time=600 CORPUS      (make fuzz)

Input: bytes of a file as they are; or, behind the byte "J", a description (JSON) that is sealed with a right checksum
over the tensors of a sound file, so that the parser behind the checksum is reached.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["stripe_kernels.compile", "safetensors"]):
    import torch
    from safetensors.torch import save as serialize
    from torch import nn

    from stripe_kernels import freeze, load, save
    from stripe_kernels.compile import files

FOLDER = Path(tempfile.mkdtemp())


def sound() -> tuple[bytes, str, dict[str, torch.Tensor]]:
    """A file with a stripe layer, an epilogue and a linear layer: whole, and as its description and tensors."""
    from safetensors import safe_open

    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    save(freeze(body, {"0": torch.rand(4, 3, 3) < 0.5}), FOLDER / "sound")
    with safe_open(FOLDER / "sound", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return (FOLDER / "sound").read_bytes(), file.metadata()["stripe_kernels"], tensors


WHOLE, TEXT, TENSORS = sound()


def content(data: bytes) -> bytes:
    if not data.startswith(b"J"):
        return data
    text = data[1:].decode(errors="replace")
    return serialize(TENSORS, {"stripe_kernels": text, "sha256": files._checksum(text, TENSORS)})


def one_input(data: bytes) -> None:
    path = FOLDER / "fuzzed"
    path.write_bytes(content(data))
    try:
        network = load(path)
    except ValueError:
        return
    assert isinstance(network, nn.Module)


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Half the time a change of the description's structure, which flipped bits seldom keep parseable."""
    rng = random.Random(seed)
    if rng.random() < 0.5 or not data.startswith(b"J"):
        return atheris.Mutate(data, most)
    try:
        return restructure(data, rng)[:most]
    except (ValueError, RecursionError):  # no JSON, nothing to change, or copied into itself too often
        return atheris.Mutate(data, most)


def restructure(data: bytes, rng: random.Random) -> bytes:
    tree = json.loads(data[1:])
    places: list[tuple[object, object]] = []

    def walk(value: object) -> None:
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, inner in list(items):
            places.append((value, key))
            walk(inner)

    walk(tree)
    if not places:
        raise ValueError("neither a list nor a dict with anything in it")
    inside, key = rng.choice(places)
    other, place = rng.choice(places)
    odd = [
        None,
        -1,
        0,
        2**31,
        2**63,
        1e308,
        "",
        "x",
        [],
        {},
        True,
        {"node": "x"},
        {"tuple": []},
        {"float": "nan"},
    ]
    change = rng.choice(["odd", "copy", "drop"])
    if change == "drop":
        del inside[key]  # type: ignore[attr-defined]
    else:
        inside[key] = rng.choice(odd) if change == "odd" else json.loads(json.dumps(other[place]))  # type: ignore[index]
    return b"J" + json.dumps(tree).encode()


def main() -> None:
    atheris.Setup([*sys.argv, "-rss_limit_mb=4096", "-max_len=16384"], one_input, custom_mutator=mutate)
    folders = [Path(a) for a in sys.argv[1:] if not a.startswith("-")]
    if folders:
        folders[0].mkdir(parents=True, exist_ok=True)
        (folders[0] / "whole").write_bytes(WHOLE)
        (folders[0] / "described").write_bytes(b"J" + TEXT.encode())
    atheris.Fuzz()


if __name__ == "__main__":
    main()
