"""The two layers an optimized network is made of besides torch's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stripe_kernels import functional
from stripe_kernels.epilogue import ACTIVATIONS
from stripe_kernels.modules import StripeConv2d
from stripe_kernels.skeleton import FilterSkeleton


class FusedConv2d(StripeConv2d):
    """activation(conv(x) + bias[k] + residual) in one call of the operator; inference only.

    activation is one of epilogue.ACTIVATIONS; everything else is as in StripeConv2d.
    """

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
        activation: str = "none",
        *,
        skeleton: Tensor | FilterSkeleton,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            skeleton=skeleton, device=device, dtype=dtype,
        )  # fmt: skip
        self.activation = activation
        self.requires_grad_(False)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input [N, C, H, W], residual [N, K, P, Q] -> [N, K, P, Q]."""
        x = input
        if self._explicit_pad is not None:
            x = F.pad(x, self._explicit_pad, mode=self.padding_mode)
        return functional.convolve(
            self._op, x, self.weight, self.bias, residual=residual, activation=self.activation
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + f", activation={self.activation!r}"


class Filter(nn.Module):
    """A convolution or linear layer while passes edit it: dense float64 on the CPU, rounded once at the end.

    weight [K, C/groups, R, S] with zeros for dead stripes, bias [K]. A linear layer is a 1x1 filter.
    """

    def __init__(self, layer: nn.Conv2d | StripeConv2d | nn.Linear) -> None:
        super().__init__()
        dense = layer.dense_weight() if isinstance(layer, StripeConv2d) else layer.weight
        self.dtype, self.device = dense.dtype, dense.device
        self.linear = isinstance(layer, nn.Linear)
        self.stride: Any
        self.dilation: Any
        self.weight = dense.detach().cpu().double().clone()
        if isinstance(layer, nn.Linear):
            self.weight = self.weight[:, :, None, None]
            self.stride = self.dilation = (1, 1)
            self.padding: Any = (0, 0)
            self.padding_mode, self.groups = "zeros", 1
        else:
            self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
            self.padding, self.padding_mode = layer.padding, layer.padding_mode
        zeros = self.weight.new_zeros(self.weight.shape[0])
        self.bias = zeros if layer.bias is None else layer.bias.detach().cpu().double().clone()
        self.had_bias = layer.bias is not None
        self.activation = "none"
        self.origin = layer  # calls of one module share what stays equal

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.weight.shape[0] and self.weight.shape[1] == 1

    @property
    def zero_border(self) -> bool:
        """Whether out-of-image zeros enter: a constant channel is then no constant near the border."""
        if self.padding_mode != "zeros" or self.linear:
            return False
        if isinstance(self.padding, str):
            return self.padding == "same" and max(self.weight.shape[2:]) > 1
        return any(self.padding)

    def scale(self, factor: Tensor, shift: Tensor) -> None:
        """Follows the layer by y * factor[k] + shift[k]."""
        self.weight = self.weight * factor[:, None, None, None]
        self.bias = self.bias * factor + shift

    def finish(self) -> nn.Module:
        """The layer in its own dtype again, stored as live stripes."""
        keep_bias = self.had_bias or bool(self.bias.any())
        k, c, r, s = self.weight.shape
        factory: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        bias = nn.Parameter(self.bias.to(**factory), requires_grad=False)
        if self.linear:
            linear = nn.Linear(c, k, keep_bias, **factory).requires_grad_(False)
            linear.weight = nn.Parameter(self.weight[:, :, 0, 0].to(**factory), requires_grad=False)
            if keep_bias:
                linear.bias = bias
            return linear.eval()
        live = (self.weight != 0).any(1)
        layer = FusedConv2d(
            c * self.groups, k, (r, s), self.stride, self.padding, self.dilation, self.groups, keep_bias,
            self.padding_mode, self.activation, skeleton=live, **factory,
        )  # fmt: skip
        values = self.weight.permute(0, 2, 3, 1)[live].to(**factory)
        layer.weight = nn.Parameter(values.contiguous(), requires_grad=False)
        if keep_bias:
            layer.bias = bias
        return layer.eval()
