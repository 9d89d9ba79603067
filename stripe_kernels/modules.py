"""StripeConv2d: nn.Conv2d that stores and computes its live stripes only."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from stripe_kernels import backends, functional, optimizers, registry, snapshots
from stripe_kernels.front import ShortWay
from stripe_kernels.geometry import IntPair, as_int, pair, resolve_padding
from stripe_kernels.skeleton import FilterSkeleton
from stripe_kernels.stripe_op import StripeOp

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode", "kernel")


def is_convolution(module: nn.Module) -> bool:
    """nn.Conv2d, or a subclass that computes what nn.Conv2d does."""
    if not isinstance(module, nn.Conv2d):
        return False
    kind = type(module)
    return kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward


class StripeConv2d(nn.Module):
    """A convolution over the live stripes of a filter; nn.Conv2d's signature plus `skeleton`, bool [K, R, S].

    weight  Parameter [A, C/groups]: live stripes in the order skeleton.nonzero() gives
    bias    Parameter [K] or None
    skeleton  buffer, bool [K, R, S]
    kernel  "auto" or a name from list_kernels()

    stride, padding, dilation, groups, padding_mode and kernel may be assigned, and calls follow.

    In inference the kernel's own form of the weight is kept until the parameter changes, moves, is loaded or the layer
    trains; after writing through ``layer.weight.data`` call ``layer.repack()``.

    >>> import torch
    >>> from stripe_kernels import StripeConv2d
    >>> skeleton = torch.rand(16, 3, 3) < 0.3
    >>> layer = StripeConv2d(8, 16, 3, padding=1, skeleton=skeleton)
    >>> layer(torch.randn(2, 8, 10, 10)).shape
    torch.Size([2, 16, 10, 10])
    """

    skeleton: Tensor
    bias: nn.Parameter | None
    stride: IntPair
    padding: Any
    dilation: IntPair
    groups: int
    padding_mode: Any
    kernel: str

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        skeleton: Tensor | FilterSkeleton,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        live = functional.as_skeleton(skeleton)
        self.in_channels = as_int(in_channels, "in_channels")
        self.out_channels = as_int(out_channels, "out_channels")
        self.kernel_size = pair(kernel_size, "kernel_size", 1)
        self._bind(
            live, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode,
            kernel="auto",
        )  # fmt: skip
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        factory = {"device": device, "dtype": dtype}
        # Inference tensors have no version: a change of theirs could not be seen.
        with torch.inference_mode(False):
            self.weight = nn.Parameter(torch.empty(live.stripes, self.in_channels // self.groups, **factory))
            self.register_parameter(
                "bias", nn.Parameter(torch.empty(self.out_channels, **factory)) if bias else None
            )
            self.register_buffer("skeleton", self._live(device))
        self.reset_parameters()

    def _bind(self, live: FilterSkeleton, **changed: Any) -> None:
        """Checks the skeleton and the settings and derives what calls need from them: of a new layer, and where they
        change. Where it raises, the layer is as it was."""
        stride, padding, dilation, groups, mode, kernel = (
            changed[name] if name in changed else getattr(self, name) for name in _SETTINGS
        )
        stride, dilation = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
        padding = padding if isinstance(padding, str) else pair(padding, "padding", 0)
        c, k, groups = self.in_channels, self.out_channels, as_int(groups, "groups")
        if groups < 1 or c < 1 or k < 1 or c % groups or k % groups:
            raise ValueError(
                f"groups={groups} must divide in_channels={c} and out_channels={k}, all positive"
            )
        if live.shape != (k, *self.kernel_size):
            raise ValueError(
                f"skeleton is {list(live.shape)} but the filter has K={k} and {self.kernel_size} taps"
            )
        if mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(_PADDING_MODES)}, got {mode!r}")
        pads = resolve_padding(padding, self.kernel_size, stride, dilation)
        top, left, bottom, right = pads
        explicit = (left, right, top, bottom) if mode != "zeros" and any(pads) else None
        inner = (0, 0, 0, 0) if explicit else pads
        op = StripeOp.of(live.text, stride, inner, dilation, groups, kernel)
        vars(self).update(zip(_SETTINGS, (stride, padding, dilation, groups, mode, kernel), strict=True))
        self.filter_skeleton, self._explicit_pad, self._op = live, explicit, op
        self._short = ShortWay(), ShortWay()  # of calls without gradients, and with them

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:
            if name == "kernel" and value != "auto":
                backends.load()
                registry.find(value)
            self._bind(self.filter_skeleton, **{name: value})
        else:
            super().__setattr__(name, value)

    def _live(self, device: Any = None) -> Tensor:
        """What the buffer `skeleton` holds."""
        return torch.tensor(self.filter_skeleton.live, device=device)

    def reset_parameters(self) -> None:
        """As nn.Conv2d: uniform in +-1/sqrt(fan_in), fan_in counted over the live stripes of an average filter."""
        live_taps = max(1.0, self.weight.shape[0] / self.out_channels)
        bound = 1 / math.sqrt(self.in_channels // self.groups * live_taps)
        with torch.no_grad():
            self.weight.uniform_(-bound, bound)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    @property
    def density(self) -> float:
        """Live stripes / all stripes."""
        return self.filter_skeleton.density

    def forward(self, input: Tensor) -> Tensor:
        """input [N, C, H, W] or [C, H, W] -> [N, K, P, Q] or [K, P, Q]; models may call it by nn.Conv2d's name."""
        x = input
        if not is_compiling() and forward_ad._current_level < 0:
            front = self._short[torch.is_grad_enabled()].front  # once: another thread may be replacing it
            if front is not None:
                own = self._parameters
                y = front(x, own.get("weight"), own.get("bias"))
                if y is not NotImplemented:
                    return y  # type: ignore[no-any-return]
        if self._explicit_pad is not None:
            x = F.pad(x, self._explicit_pad, mode=self.padding_mode)
        y = functional.convolve(self._op, x, self.weight, self.bias)
        if not is_compiling() and self._explicit_pad is None:
            self._short[torch.is_grad_enabled()].after(self._op, x, self.weight, self.bias, y)
        return y

    def repack(self) -> None:
        """Forgets packed copies of the weight; needed after writing through ``weight.data``."""
        self._short = ShortWay(), ShortWay()
        snapshots.drop_snapshot(self.weight)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, skeleton: Tensor | FilterSkeleton | None = None) -> StripeConv2d:
        """The live stripes of a convolution. Without a skeleton, stripes that are entirely zero are dead."""
        if isinstance(conv, nn.LazyConv2d) or not is_convolution(conv):
            raise TypeError(
                "from_conv2d takes an initialised nn.Conv2d, or a subclass that computes what it does, "
                f"got {type(conv).__name__}"
            )
        weight = conv.weight.detach()
        if skeleton is None:
            skeleton = (weight != 0).any(1)
        live = functional.as_skeleton(skeleton)
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
            conv.groups, conv.bias is not None, conv.padding_mode,
            skeleton=live, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(weight.permute(0, 2, 3, 1)[layer.skeleton])
            if conv.bias is not None and layer.bias is not None:
                layer.bias.copy_(conv.bias)
        _same_flags(conv, layer)
        return layer.train(conv.training)

    def dense_weight(self) -> Tensor:
        """The dense filter [K, C/groups, R, S], zero where a stripe is dead; differentiable in `weight`."""
        dense = self.weight.new_zeros(*self.skeleton.shape, self.weight.shape[1])
        return dense.index_put(self.skeleton.nonzero(as_tuple=True), self.weight).permute(0, 3, 1, 2)

    def to_conv2d(self) -> nn.Conv2d:
        """The same layer as nn.Conv2d: a dense weight with zeros. Lossless."""
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode, device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            conv.weight.copy_(self.dense_weight())
            if self.bias is not None and conv.bias is not None:
                conv.bias.copy_(self.bias)
        _same_flags(self, conv)
        return conv.train(self.training)

    def train(self, mode: bool = True) -> StripeConv2d:
        self.repack()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> StripeConv2d:
        self.repack()
        super()._apply(fn, recurse)
        # to_empty leaves no values in it, and whoever fills the parameters then does not fill a buffer.
        with torch.inference_mode(self.skeleton.is_inference()):
            self.skeleton.copy_(self._live(self.skeleton.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes a state with another skeleton too: the weight is resized to its live stripes. Of nn.Conv2d's state,
        which has no skeleton, it takes the live stripes, and refuses values elsewhere. A weight that does not fit its
        skeleton leaves both as they were."""
        self.repack()
        weight, skeleton = (state_dict.get(prefix + name) for name in ("weight", "skeleton"))
        k, r, s = self.filter_skeleton.shape
        wrong = None
        if skeleton is None:
            dense = (k, self.in_channels // self.groups, r, s)
            if weight is not None and not weight.is_meta and tuple(weight.shape) == dense:
                live = self._live(weight.device)
                wrong = _values_in_dead_stripes(weight, live)
                stripes = weight.permute(0, 2, 3, 1)[live]
                state_dict = {**state_dict, prefix + "weight": stripes, prefix + "skeleton": live}
        elif tuple(skeleton.shape) == (k, r, s) and not skeleton.is_meta:
            wrong = self._take(functional.as_skeleton(skeleton.bool()), weight)
        if wrong:
            args[-1].append(f"{prefix}weight {wrong}")
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _take(self, live: FilterSkeleton, weight: Tensor | None) -> str | None:
        """Makes room for a weight with another skeleton, or says why not. The Parameter stays: optimizers hold it."""
        own, size = self._parameters.get("weight"), (live.stripes, self.in_channels // self.groups)
        if live == self.filter_skeleton:
            return None
        if own is None or weight is None or tuple(weight.shape) != size:
            found = "is missing" if weight is None else f"is {list(weight.shape)}"
            return f"{found} but its skeleton has {live.stripes} live stripes: size mismatch, expected {list(size)}"
        optimizers.resize(own, size)
        self._bind(live)
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_op", "_short")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        own = vars(self)
        own.setdefault("kernel", own.pop("_kernel", "auto"))  # of layers pickled when kernel was a property
        self._bind(self.filter_skeleton)

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks for; its own words would be about an annotation."""
        raise TypeError(
            "TorchScript's compiler cannot read a StripeConv2d: use torch.export or torch.jit.trace, or script "
            "stripe_kernels.to_dense(model)"
        )

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )
        text += f", padding={self.padding}, density={self.density:.3f}"
        for name, default in (
            ("dilation", (1, 1)),
            ("groups", 1),
            ("padding_mode", "zeros"),
            ("kernel", "auto"),
        ):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text + (", bias=False" if self.bias is None else "")


def _values_in_dead_stripes(weight: Tensor, live: Tensor) -> str | None:
    lost = int(((weight != 0).any(1) & ~live).sum())
    if not lost:
        return None
    found = f"has values in {lost} stripes that the skeleton counts as dead"
    return f"{found}: load it into the dense model, and freeze that"


def _same_flags(source: nn.Conv2d | StripeConv2d, target: nn.Conv2d | StripeConv2d) -> None:
    """What trains of one layer trains of the other."""
    target.weight.requires_grad_(source.weight.requires_grad)
    if source.bias is not None and target.bias is not None:
        target.bias.requires_grad_(source.bias.requires_grad)
