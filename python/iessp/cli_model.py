"""MODEL of the command line: a saved file, a run's folder or checkpoint, module:factory, or a built-in name."""

from __future__ import annotations

import difflib
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stripe_kernels
from iessp import checkpoint
from iessp.cli_frame import Failure
from iessp.factory import absent, make
from iessp.models import MODELS, build
from iessp.runs import load_run

LARGE = ("resnet18", "resnet34", "resnet50", "mobilenetv2")  # of ImageNet: 1000 classes, 3x224x224
FORMS = (
    "a file that stripe_kernels.save wrote, a run's folder, package.module:factory, path/file.py:factory, or one "
    f"of {', '.join(MODELS)}"
)


@dataclass(frozen=True)
class Given:
    """A model in evaluation mode on the CPU, an example [1, C, H, W] of its input, and what is known besides."""

    name: str
    model: nn.Module
    example: Tensor
    folder: Path | None = None  # of the run it is from

    def images(self, batch: int) -> Tensor:
        """Random images, always the same: [batch, C, H, W]."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, *self.example.shape[1:], generator=generator)
        return x.to(self.example.dtype)

    @property
    def optimized(self) -> bool:
        return isinstance(self.model, stripe_kernels.Network)

    @cached_property
    def frozen(self) -> nn.Module:
        """The model with its zeros taken out, as it is when it has none."""
        return self.model if self.optimized else stripe_kernels.freeze(self.model).eval()


def resolve(text: str, size: str | None = None, weights: Path | None = None) -> Given:
    """The model that MODEL names. `size` is CxHxW as on the command line, `weights` a file with a state_dict.

    Raises ValueError or FileNotFoundError, with the nearest valid choice, for a wrong MODEL; Failure where it is
    right but cannot be loaded.
    """
    path = Path(text)
    name, given, folder = text, None, None
    if path.is_dir() or path.suffix == ".pt":
        run = load_run(path)
        name = f"{path}: {run.recipe.model}, {run.recipe.method}"
        model, given, folder = run.model, run.example, path if path.is_dir() else path.parent.parent
    elif path.is_file() and path.suffix != ".py":
        model, given = _file(path)
    elif ":" in text or path.suffix == ".py":
        torch.manual_seed(0)
        model, given = make(text)
        given = None if given is None else given[:1]
    elif text in MODELS:
        torch.manual_seed(0)
        given = torch.zeros(1, *_size(size or ("3x224x224" if text in LARGE else "3x32x32")))
        model = build(text, 1000 if text in LARGE else 10, given.shape[1])
    else:
        raise _unknown(text, path)
    if weights is not None:
        _load(model, weights)
    if size is not None:
        given = torch.zeros(1, *_size(size))
    if given is None:
        given = _guess(model, name)
    kind = next((p.dtype for p in model.parameters()), torch.float32)
    found = Given(name, model.eval(), given.to(kind), folder)
    _try(found)
    return found


def _try(given: Given) -> None:
    """Runs the model once: ValueError, in one line, where it does not take the example's size."""
    try:
        with torch.inference_mode():
            given.model(given.example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        size = "x".join(map(str, given.example.shape[1:]))
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{given.name} does not take images {size} (--input): {reason}") from error


def _size(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) == 4 and parts[0] == "1":
        parts = parts[1:]
    if len(parts) != 3 or not all(p.isdigit() and int(p) for p in parts):
        raise ValueError(f'--input "{text}" is not CxHxW, as in 3x32x32')
    c, h, w = map(int, parts)
    return c, h, w


def _guess(model: nn.Module, name: str) -> Tensor:
    """A 32x32 image with the channels of the first convolution, which is said."""
    first = next(
        (m for m in model.modules() if isinstance(m, (nn.Conv2d, stripe_kernels.StripeConv2d))), None
    )
    if first is None:
        raise ValueError(f"{name} has no nn.Conv2d")
    print(f"input {first.in_channels}x32x32 taken; --input CxHxW changes it", file=sys.stderr)
    return torch.zeros(1, first.in_channels, 32, 32)


def _file(path: Path) -> tuple[nn.Module, Tensor | None]:
    """The network, and an image of the size it was saved with."""
    try:
        model, inputs = stripe_kernels.load(path), stripe_kernels.example_input(path)
    except ValueError as error:
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is none of what MODEL can be: {FORMS}; weights go with --weights"
            ) from error
        raise Failure(str(error)) from error
    return model, inputs[0][:1] if inputs and inputs[0].dim() == 4 and len(inputs[0]) else None


def _load(model: nn.Module, path: Path) -> None:
    """Loads a state_dict, masked ones too: of safetensors, or of torch.save, bare or as one entry of a checkpoint."""
    if not path.is_file():
        raise absent(path)
    try:
        state = checkpoint.read(path)
    except ValueError as error:
        raise Failure(str(error)) from error
    if not isinstance(state, Mapping):
        raise Failure(f"{path} holds a {type(state).__name__}, not a state_dict")
    try:
        model.load_state_dict(stripe_kernels.plain_state(_state_dict(path, state)))
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        reason = textwrap.shorten(first[0], 120, placeholder=" ...")
        names = [str(name) for name in _state_dict(path, state)]
        if any(".parametrizations." in name for name in names):
            reason = "its model had gates or other parametrizations: save what iessp.freeze gives"
        elif any(name.rpartition(".")[2] == "skeleton" for name in names):
            reason = "it is of a frozen network: stripe_kernels.save writes a file that is a MODEL by itself"
        raise Failure(f"{path} does not fit {type(model).__name__}: {reason}") from error


def _state_dict(path: Path, held: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state_dict in what a file holds: all of it, or the entry that is one."""
    inside = [key for key, value in held.items() if isinstance(value, Mapping) and _tensors(value)]
    usual = [key for key in ("state_dict", "model_state_dict", "model") if key in inside]
    chosen = usual[:1] or inside
    if len(chosen) > 1:
        raise Failure(
            f"{path} holds several state_dicts: {', '.join(map(str, chosen))}; save the one to take"
        )
    return held[chosen[0]] if chosen else held


def _tensors(held: Mapping[str, Any]) -> bool:
    return bool(held) and all(isinstance(value, Tensor) for value in held.values())


def _unknown(text: str, path: Path) -> Exception:
    """The error for a MODEL that is none, with what comes nearest to it."""
    if path.parent != Path() or path.suffix:
        return absent(path)
    close = difflib.get_close_matches(text, [*MODELS, *(p.name for p in Path().iterdir())], n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return ValueError(f'unknown model "{text}": {hint}MODEL is {FORMS}')
