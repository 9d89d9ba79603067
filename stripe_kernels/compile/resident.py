"""A graph as one native network whose activations stay in batch lanes between layers.

For batches that fill the lanes (16 images on AVX-512): no transposes, no padding, no Python between layers,
and a block of images passes through all layers on one core. `resident` translates a fused graph, or says
which node it cannot take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from stripe_kernels import backends
from stripe_kernels.compile.fuse import activation_of, is_plain_sum
from stripe_kernels.compile.graph import averages_pixels, is_hooked, module_of, record_sizes, size_of
from stripe_kernels.compile.layers import FusedConv2d
from stripe_kernels.compile.program import Program
from stripe_kernels.geometry import ConvShape, pair
from stripe_kernels.modules import StripeConv2d
from stripe_kernels.skeleton import FilterSkeleton


class Untranslatable(ValueError):
    """A node that has no counterpart in lanes."""


def resident(body: fx.GraphModule, inputs: tuple[Tensor, ...], threads: int, vectors: int = 1) -> Program:
    """The program for one float32 CPU input [N, C, H, W]; it takes any N of that C, H, W.

    vectors: of images a block, as in LaneNetwork.

    Raises Untranslatable with the node that stands in the way.
    """
    if (
        len(inputs) != 1
        or inputs[0].dim() != 4
        or inputs[0].dtype != torch.float32
        or inputs[0].device.type != "cpu"
    ):
        raise Untranslatable("lanes take one float32 CPU input [N, C, H, W]")
    hooked = [str(node.target) for node in body.graph.nodes if is_hooked(module_of(node))]
    if hooked:
        raise Untranslatable(f"{', '.join(hooked)}: its hooks want maps, not lanes")
    record_sizes(body, inputs)
    return _Translator(body, threads, vectors).program()


class _Translator:
    """Walks the graph once; an activation's room is given back after its last reader."""

    def __init__(self, body: fx.GraphModule, threads: int, vectors: int) -> None:
        self.network = backends.lane_network(threads, vectors)
        self.body = body
        self.at: dict[fx.Node, Any] = {}  # node -> Activation
        self.owner: dict[fx.Node, fx.Node] = {}  # views -> the node whose room they are
        self.readers: dict[fx.Node, int] = {}

    def program(self) -> Program:
        source = target = None
        result: fx.Node | None = None
        for node in self.body.graph.nodes:
            if node.op == "placeholder":
                source = self.at[node] = self.network.activation(*size_of(node)[1:])  # type: ignore[index]
                self.own(node)
            elif node.op == "output":
                result = node.args[0]
                if not isinstance(result, fx.Node) or result not in self.at:
                    raise Untranslatable("lanes return one tensor")
                target = self.at[result]
            elif node.op != "get_attr":
                self.translate(node)
                for read in node.all_input_nodes:
                    self.drop(read)
        network, flat = self.network, len(size_of(result) or ()) == 2

        def program(x: Tensor) -> Tensor:
            y: Tensor = network.run(x, source, target)
            return y.flatten(1) if flat else y

        y_floats = (size_of(result) or (0,))[0] * target.c * target.h * target.w  # type: ignore[union-attr]
        facts: Any = program
        facts.activations = network.threads * network.bytes_per_thread + 4 * y_floats
        facts.packed = None  # as large as the weights
        facts.kept, facts.front = (), None
        written: Program = facts
        return written

    def own(self, node: fx.Node) -> None:
        self.owner[node] = node
        self.readers[node] = len(node.users)

    def drop(self, node: fx.Node) -> None:
        owner = self.owner.get(node)
        if owner is None:
            return
        self.readers[owner] -= 1
        if self.readers[owner] == 0:
            self.network.release(self.at[owner])

    def make(self, node: fx.Node) -> Any:
        """Room for what the node returns; [N, C] is a map of one pixel."""
        size = size_of(node)
        if size is None or len(size) not in (2, 4):
            raise Untranslatable(f"{node.name} returns {size}")
        self.at[node] = (
            self.network.activation(*size[1:]) if len(size) == 4 else self.network.activation(size[1], 1, 1)
        )
        self.own(node)
        return self.at[node]

    def view(self, node: fx.Node, of: fx.Node) -> None:
        """The node is another name of the same lanes."""
        self.at[node], self.owner[node] = self.at[of], self.owner[of]
        self.readers[self.owner[of]] += len(node.users)

    def source(self, value: Any) -> Any:
        if not isinstance(value, fx.Node) or value not in self.at:
            raise Untranslatable(f"{value} is no activation")
        return self.at[value]

    def translate(self, node: fx.Node) -> None:
        module = module_of(node)
        if isinstance(module, StripeConv2d):
            return self.conv(node, module)
        if isinstance(module, nn.Linear):
            return self.linear(node, module)
        if isinstance(module, nn.MaxPool2d):
            return self.max_pool(node, module)
        if isinstance(module, nn.AvgPool2d):
            return self.average_pool(node, module)
        if averages_pixels(node):
            return self.global_average(node)
        if (activation := activation_of(node)) is not None:
            return self.pointwise(node, activation, None)
        if is_plain_sum(node):
            return self.pointwise(node, "none", node.args[1])
        target: Any = node.target
        if target is torch.flatten and tuple(node.args[1:]) == (1,):
            return self.flatten(node)
        if target is torch.cat and (node.args[1:] == (1,) or node.kwargs == {"dim": 1}):
            return self.concatenate(node)
        raise Untranslatable(
            f"{node.name} ({module.__class__.__name__ if module else target}) has no counterpart in lanes"
        )

    def conv(self, node: fx.Node, layer: StripeConv2d) -> None:
        if layer._explicit_pad is not None or layer.weight.dtype != torch.float32:
            raise Untranslatable(f"{node.name}: lanes take zero padding and float32 weights")
        if layer.groups > 1 and layer.stride != (1, 1):
            raise Untranslatable(f"{node.name}: the phases of a strided input are laid out for one group")
        x = self.source(node.args[0])
        residual = self.source(node.args[1]) if len(node.args) > 1 and node.args[1] is not None else None
        activation = layer.activation if isinstance(layer, FusedConv2d) else "none"
        shape = layer._op.shape(self.network.images, x.c, x.h, x.w)
        y = self.make(node)
        self.network.conv(layer.filter_skeleton, shape, layer.weight, layer.bias, activation, x, residual, y)

    def linear(self, node: fx.Node, layer: nn.Linear) -> None:
        """A linear layer over C x h x w features is a convolution with an h x w filter."""
        x = self.source(node.args[0])
        k = layer.out_features
        if (
            x.c * x.h * x.w != layer.in_features
            or len(size_of(node) or ()) != 2
            or layer.weight.dtype != torch.float32
        ):
            raise Untranslatable(f"{node.name}: a linear layer over something else than all features")
        weight = layer.weight.detach().view(k, x.c, x.h, x.w)
        skeleton = FilterSkeleton((weight != 0).any(1).numpy())
        values = weight.permute(0, 2, 3, 1)[torch.from_numpy(skeleton.live.copy())]
        shape = ConvShape(self.network.images, x.c, x.h, x.w, k, x.h, x.w)
        self.network.conv(skeleton, shape, values, layer.bias, "none", x, None, self.make(node))

    def max_pool(self, node: fx.Node, layer: nn.MaxPool2d) -> None:
        if layer.ceil_mode or layer.return_indices or pair(layer.dilation, "dilation", 1) != (1, 1):
            raise Untranslatable(f"{node.name}: a plain max pool")
        stride = layer.kernel_size if layer.stride is None else layer.stride
        self.pool(node, "max", layer.kernel_size, stride, layer.padding)

    def average_pool(self, node: fx.Node, layer: nn.AvgPool2d) -> None:
        if layer.ceil_mode or layer.divisor_override is not None:
            raise Untranslatable(f"{node.name}: a plain average pool")
        stride = layer.kernel_size if layer.stride is None else layer.stride
        kind = "average_padded" if layer.count_include_pad else "average"
        self.pool(node, kind, layer.kernel_size, stride, layer.padding)

    def pool(self, node: fx.Node, kind: str, kernel: Any, stride: Any, padding: Any) -> None:
        window = (*pair(kernel, "kernel_size", 1), *pair(stride, "stride", 1), *pair(padding, "padding", 0))
        x = self.source(node.args[0])
        self.network.pool(kind, window, x, self.make(node))

    def global_average(self, node: fx.Node) -> None:
        x = self.source(node.args[0])
        self.pool(node, "average", (x.h, x.w), (x.h, x.w), 0)

    def pointwise(self, node: fx.Node, activation: str, residual: Any) -> None:
        x = self.source(node.args[0])
        other = None if residual is None else self.source(residual)
        self.network.pointwise(activation, x, other, self.make(node))

    def flatten(self, node: fx.Node) -> None:
        x: Any = node.args[0]
        only_linear = all(isinstance(module_of(u), nn.Linear) for u in node.users)
        if self.source(x).h * self.source(x).w > 1 and not only_linear:
            raise Untranslatable(f"{node.name}: only linear layers read flattened maps in lanes")
        self.view(node, x)

    def concatenate(self, node: fx.Node) -> None:
        parts: Any = node.args[0]
        sources = [self.source(p) for p in parts]
        whole, first = self.make(node), 0
        for x in sources:
            self.network.pointwise("none", x, None, self.network.channels(whole, first, x.c))
            first += x.c
