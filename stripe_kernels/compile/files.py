"""save and load: a network in one safetensors file.

    header   metadata "stripe_kernels": JSON with versions, modules, graph nodes, tuned choices and, where known, the
    sizes of the input; "sha256" of it all
    tensors  parameters and buffers under their state_dict names; a skeleton [K, R, S] as ceil(K*R*S
    / 8) packed bytes

The graph is torch.fx's, written in the words of vocabulary.py. Reading needs none of the classes the network
was written with, runs no pickle, and looks up nothing by a name of the file's own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from stripe_kernels.compile import choices, vocabulary
from stripe_kernels.compile.network import Network, as_inputs
from stripe_kernels.compile.trace import WAY_OUT, line_of, trace
from stripe_kernels.modules import StripeConv2d
from stripe_kernels.skeleton import FilterSkeleton
from stripe_kernels.version import __version__

Inputs = list[tuple[tuple[int, ...], torch.dtype]]  # size and dtype of each

FORMAT = 1  # rises when an older reader would misread a file
_KEY = "stripe_kernels"
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, SyntaxError)
_LARGEST = 2**28  # values of an input that a file may ask for
_DOTTED = re.compile(r"\w+(\.\w+)*", re.ASCII)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Tensor | tuple[Tensor, ...] | None = None,
) -> None:
    """Writes `model` to one safetensors file that `load` reads without the code that built it.

    Live stripes only are stored, so the file shrinks with the density. The network is stored in evaluation
    mode, on the CPU; choices of `tune` go with it. The file appears whole or not at all.

    example_input: its sizes and dtypes go into the file, for `example_input` and for the command line; default: what
    an optimized network was made on.

    Raises ValueError, with the line of the model's code, where it has no fixed torch.fx graph or uses an operation
    that files do not carry.
    """
    # Imported here: kernels are checked and timed on machines that have torch and nothing else.
    from safetensors.torch import save as serialize

    inputs = _inputs(model, example_input)
    network = trace(model, None if inputs is None else len(inputs))
    graph = _graph_json(network)
    tensors = _tensors(network, graph)
    graph["choices"] = choices.of_network(network)
    if isinstance(model, Network):
        graph["network"] = {
            name: getattr(model, name) for name in ("report", "resident_from", "lane_vectors", "alone_up_to")
        }
    if inputs is not None:
        graph["inputs"] = vocabulary.encode([(list(size), dtype) for size, dtype in inputs])
    text = json.dumps(graph, separators=(",", ":"), sort_keys=True)
    metadata = {_KEY: text, "sha256": _checksum(text, tensors)}
    _write_whole(Path(path), serialize(tensors, metadata))


def load(path: str | os.PathLike[str]) -> nn.Module:
    """The network that `save` wrote, in evaluation mode on the CPU: a graph of torch's layers and ours.

    What `optimize` made comes back optimized.

    Tuned choices in the file become this process's choices where the kernels exist here, so outputs repeat
    bit for bit.

    Raises OSError where the file cannot be read, ValueError where it is corrupt, truncated, foreign, or
    written by a newer version.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    text = metadata[_KEY]
    if metadata.get("sha256") != _checksum(text, tensors):
        raise ValueError(f"{path} is corrupt: its contents do not have the checksum it states")
    try:
        graph = json.loads(text)
        network = _network(graph, tensors)
        choices.restore(graph["choices"], network)
        inputs = _decoded(graph.get("inputs"))
        return _optimized(network, graph["network"], inputs) if "network" in graph else network
    except _MALFORMED as error:
        # The checksum is no secret: a file made by hand can have any content and a right one.
        raise ValueError(f"{path} describes no network: {type(error).__name__}: {error}") from error


def example_input(path: str | os.PathLike[str]) -> tuple[Tensor, ...] | None:
    """Zeros as large as the example that the network in a file was saved with; None where it was saved without.

    Raises what `load` raises, but does not read the values: their checksum is `load`'s to compare.

    >>> optimize(load("net.safetensors"), example_input("net.safetensors"))  # doctest: +SKIP
    """
    metadata, _ = _read(Path(path), values=False)
    try:
        inputs = _decoded(json.loads(metadata[_KEY]).get("inputs"))
        return None if inputs is None else tuple(torch.zeros(size, dtype=dtype) for size, dtype in inputs)
    except _MALFORMED as error:
        raise ValueError(f"{path} describes no input: {type(error).__name__}: {error}") from error


def _inputs(model: nn.Module, given: Tensor | tuple[Tensor, ...] | None) -> Inputs | None:
    if given is None:
        return model.inputs if isinstance(model, Network) else None
    return [(tuple(x.shape), x.dtype) for x in as_inputs(given)]


def _decoded(inputs: Any) -> Inputs | None:
    if inputs is None:
        return None
    found = [(tuple(map(int, size)), dtype) for size, dtype in vocabulary.decode(inputs, {})]
    for size, dtype in found:
        if min(size, default=0) < 0 or math.prod(size) > _LARGEST or not isinstance(dtype, torch.dtype):
            raise ValueError(f"an input {list(size)} of {dtype}")
    return found


def _read(path: Path, values: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header, of a version that can be read, and the tensors unless they are not asked for."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies: get_tensor's are the file's own pages, and the process dies where somebody shortens the file.
            tensors = {n: file.get_tensor(n).clone() for n in file.keys()} if values else {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if _KEY not in metadata:
        raise ValueError(f"{path} was not written by stripe_kernels.save: its header does not say so")
    _check_version(path, metadata[_KEY])
    return metadata, tensors


def _optimized(body: fx.GraphModule, settings: dict[str, Any], inputs: Inputs | None) -> Network:
    network = Network(body)
    network.inputs = inputs
    network.report = [str(line) for line in settings["report"]]
    start = settings["resident_from"]
    network.resident_from = None if start is None else int(start)
    network.lane_vectors = 2 if settings.get("lane_vectors") == 2 else 1
    network.alone_up_to = {
        int(threads): int(most) for threads, most in settings.get("alone_up_to", {}).items()
    }
    return network


def _check_version(path: Path, text: str) -> None:
    try:
        graph = json.loads(text)
        version = graph["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt: its description is not what save writes ({error})") from error
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"{path} has format {version}, of stripe_kernels {graph.get('library')}; this version reads "
            f"formats up to {FORMAT}: upgrade stripe_kernels"
        )


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # not the temporary file's name
    finally:
        temporary.unlink(missing_ok=True)


def _graph_json(network: fx.GraphModule) -> dict[str, Any]:
    modules: dict[str, Any] = {}
    first: dict[nn.Module, str] = {}
    nodes = []
    for node in network.graph.nodes:
        target = node.target
        if node.op == "call_module":
            module = network.get_submodule(target)
            if first.setdefault(module, target) != target:
                modules[target] = {"same_as": first[module]}
            else:
                modules[target] = _module_json(node, module)
        elif node.op == "call_function":
            target = vocabulary.FUNCTION_NAMES.get(target)
            known = target is not None and (target != "getattr" or node.args[1] in vocabulary.ATTRIBUTES)
            if not known:
                name = getattr(node.target, "__name__", node.target)
                raise ValueError(f"a file cannot hold the function {name}{line_of(node)}: {WAY_OUT}")
        elif node.op == "call_method" and target not in vocabulary.METHODS:
            raise ValueError(f"a file cannot hold the method {target} of a tensor{line_of(node)}: {WAY_OUT}")
        try:
            arguments = [vocabulary.encode(node.args), vocabulary.encode(dict(node.kwargs))]
        except TypeError as error:
            raise ValueError(f"{error}{line_of(node)}: {WAY_OUT}") from error
        nodes.append([node.name, node.op, target, *arguments])
    versions = {"format": FORMAT, "library": __version__, "torch": torch.__version__}
    return {**versions, "modules": modules, "nodes": nodes}


def _module_json(node: fx.Node, module: nn.Module) -> dict[str, Any]:
    kind = vocabulary.MODULE_NAMES.get(type(module))
    if kind is None:
        raise ValueError(
            f"a file cannot hold {node.target!r}{line_of(node)}: {type(module).__name__} is not among the modules it "
            f"carries: {WAY_OUT}"
        )
    entry = {"class": kind, "config": vocabulary.encode(vocabulary.module_config(module))}
    if isinstance(module, StripeConv2d):
        entry["skeleton"] = list(module.skeleton.shape)
    return entry


def _tensors(network: fx.GraphModule, graph: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor once, under its first name; `graph` learns the other names and who wants gradients."""
    found: dict[str, Tensor] = {}
    for name, entry in graph["modules"].items():
        if "class" in entry:
            state = network.get_submodule(name).state_dict(keep_vars=True)
            found |= {f"{name}.{key}": t for key, t in state.items()}
    for node in network.graph.nodes:
        if node.op == "get_attr":
            owner, _, leaf = node.target.rpartition(".")
            found[node.target] = getattr(network.get_submodule(owner), leaf)
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, t in found.items():
        if first.setdefault(id(t), name) != name:
            ties[name] = first[id(t)]
        elif t.dtype == torch.bool and name.endswith(".skeleton"):
            tensors[name] = torch.from_numpy(np.packbits(t.cpu().numpy()))
        else:
            tensors[name] = t.detach().cpu().contiguous().clone()
    graph["ties"] = ties
    graph["parameters"] = {n: t.requires_grad for n, t in found.items() if isinstance(t, nn.Parameter)}
    return tensors


def _network(graph: dict[str, Any], tensors: dict[str, Tensor]) -> fx.GraphModule:
    found: dict[str, Tensor] = {}
    for name, t in tensors.items():
        trainable = graph["parameters"].get(name)
        found[name] = t if trainable is None else nn.Parameter(t, requires_grad=trainable)
    found |= {name: found[first] for name, first in graph["ties"].items()}
    root = nn.Module()
    modules: dict[str, nn.Module] = {}
    for name, entry in graph["modules"].items():
        modules[name] = modules[entry["same_as"]] if "same_as" in entry else _module(name, entry, found)
        _attach(root, name, modules[name])
    built = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for name, op, target, args, kwargs in graph["nodes"]:
        args, kwargs = vocabulary.decode(args, nodes), vocabulary.decode(kwargs, nodes)
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise ValueError(f"node {name!r} has malformed arguments")
        for keyword in kwargs:  # torch.fx and the flat program write names of arguments into source
            if not isinstance(keyword, str) or not keyword.isidentifier():
                raise ValueError(f"node {name!r} has an argument {keyword!r}, which is not a name")
        if op == "placeholder":  # torch.fx writes its default where no node's result is there yet
            reads: list[fx.Node] = []
            fx.node.map_arg(args, reads.append)
            if reads or len(args) > 1 or kwargs:
                raise ValueError(f"input {name!r} has a default that is no constant")
        if op == "get_attr" and target not in modules:
            _attach(root, target, found[target])
        nodes[name] = built.create_node(
            op, _target(op, target, args, modules), args, kwargs, _identifier(name)
        )
    built.lint()
    return fx.GraphModule(root, built, "Network").eval()


def _target(op: str, target: Any, args: tuple[Any, ...], modules: dict[str, nn.Module]) -> Any:
    """The whitelisted thing a node calls; ValueError otherwise."""
    if op == "call_function" and target in vocabulary.FUNCTIONS:
        if target != "getattr" or (len(args) == 2 and args[1] in vocabulary.ATTRIBUTES):
            return vocabulary.FUNCTIONS[target]
    elif op == "call_method" and target in vocabulary.METHODS:
        return target
    elif (op == "call_module" and target in modules) or op in ("placeholder", "get_attr", "output"):
        return _identifier(target)
    raise ValueError(f"{op} of {target!r} is not something a file may ask for")


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not _DOTTED.fullmatch(name.lstrip("*")):
        raise ValueError(f"{name!r} is not a name")
    return name


def _attach(root: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    """Registers `value` under a dotted name, making the modules on the way."""
    *path, leaf = _identifier(name).split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    if isinstance(value, nn.Module):
        root.add_module(leaf, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(leaf, value)
    else:
        root.register_buffer(leaf, value)


def _module(name: str, entry: dict[str, Any], found: dict[str, Tensor]) -> nn.Module:
    """One leaf. It is built without storage first, so that a wrong size cannot ask for memory."""
    kind = vocabulary.MODULES[entry["class"]]
    config = vocabulary.decode(entry["config"], {})
    state = {key.removeprefix(name + "."): t for key, t in found.items() if key.startswith(name + ".")}
    if "skeleton" in entry:
        shape = entry["skeleton"]
        bits = state["skeleton"].numpy()
        count = int(np.prod(shape))
        if len(shape) != 3 or bits.size != (count + 7) // 8:
            raise ValueError(f"skeleton of {name!r} is {shape} but has {bits.size} bytes of bits")
        live = np.unpackbits(bits, count=count).astype(np.bool_).reshape(shape)
        state["skeleton"] = torch.from_numpy(live)
        config["skeleton"] = FilterSkeleton(live)
    if issubclass(kind, nn.RNNBase) and config.get("num_layers", 1) > len(state):
        raise ValueError(f"{name!r} asks for {config['num_layers']} layers but has {len(state)} tensors")
    with torch.device("meta"):
        module = kind(**config)
    wants_gradient = {key: t.requires_grad for key, t in state.items()}
    module.load_state_dict(state, assign=True)  # sets the new module's requires_grad on what it is given
    for key in module._parameters.keys() & state.keys():
        module._parameters[key] = state[key].requires_grad_(wants_gradient[key])  # type: ignore[assignment]
    if isinstance(module, StripeConv2d):
        module.repack()
    return module
