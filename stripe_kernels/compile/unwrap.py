"""A private, plain copy of a model: no wrappers, no pruning hooks, no parametrizations, no history."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from stripe_kernels.compile.checkpoints import without_filter_skeleton

# Compiled, data-parallel and averaging wrappers, by the attribute that holds what they wrap. Names, not classes:
# importing torch's compiler or its distributed package costs seconds and the latter is not built everywhere.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module",
    "AveragedModel": "module",
}  # fmt: skip
_SPREAD = "its parameters are spread over processes; gather them into the plain model first"
_REFUSED = {
    "FullyShardedDataParallel": _SPREAD,
    "FSDPModule": _SPREAD,
    "ScriptModule": "TorchScript hides the modules; give the Python model that was scripted",
}
_HOOK_ATTRIBUTES = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def clone(model: nn.Module) -> nn.Module:
    """A deep copy of `model` without wrappers, pruning hooks and parametrizations; the input is untouched.

    Raises TypeError for what is not an nn.Module or hides its modules, ValueError for uninitialised lazy
    parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    _refuse(model)
    while type(model).__name__ in _WRAPPERS:  # before copying: a process group cannot be copied
        model = getattr(model, _WRAPPERS[type(model).__name__])
    # Outside inference mode copies are ordinary tensors, which can be trained and saved later.
    with torch.inference_mode(False), torch.no_grad():
        copied = _unwrap(copy.deepcopy(model, _detached_attributes(model)))
        for module in copied.modules():
            _bake(module)
        plain = {m: conv for m in copied.modules() if (conv := without_filter_skeleton(m)) is not None}
    return replace_modules(copied, dict(plain))


def plain_names(model: nn.Module) -> dict[str, str]:
    """Every name of a module -> that in the model's clone, without what wrappers put in: "_orig_mod.conv" -> "conv"."""
    modules = dict(model.named_modules(remove_duplicate=False))
    plain = {"": ""}
    for name in list(modules)[1:]:  # owners come first
        owner, _, part = name.rpartition(".")
        wrapped = _WRAPPERS.get(type(modules[owner]).__name__) == part
        plain[name] = plain[owner] if wrapped else f"{plain[owner]}.{part}".removeprefix(".")
    return plain


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Puts `replacements[m]` wherever m is registered, so that shared modules stay shared."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """The caller's own hooks go on observing the layer that takes `source`'s place."""
    for attribute in _HOOK_ATTRIBUTES:
        hooks = getattr(source, attribute, None)
        if hooks:
            getattr(target, attribute).update(hooks)


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _REFUSED:
                raise TypeError(
                    f"cannot take {name or 'a model'} of type {kind.__name__}: {_REFUSED[kind.__name__]}"
                )
        if any(nn.parameter.is_lazy(p) for p in module._parameters.values()):
            raise ValueError(
                f"{name or 'the model'} has uninitialised lazy parameters: run the model once first"
            )


def _detached_attributes(model: nn.Module) -> dict[int, Any]:
    """deepcopy's memo for tensors it refuses: computed ones kept as attributes, as pruning hooks do."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return memo


def _unwrap(model: nn.Module) -> nn.Module:
    inner = {
        m: getattr(m, _WRAPPERS[type(m).__name__]) for m in model.modules() if type(m).__name__ in _WRAPPERS
    }
    for wrapper, module in inner.items():
        while module in inner:
            module = inner[module]
        inner[wrapper] = module
    return replace_modules(model, inner)


def _bake(module: nn.Module) -> None:
    """Weights as they are used: computed parameters become plain ones."""
    if parametrize.is_parametrized(module):
        # deepcopy shares the class that parametrize made for the original, and removal edits that class.
        kind = type(module)
        module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        parametrizations: Any = module.parametrizations
        parametrizations.eval()  # in training mode spectral norm goes a step on
        for name in list(parametrizations):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    for hook in hooks:
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif type(hook).__name__ == "WeightNorm":
            nn.utils.remove_weight_norm(module, hook.name)
        elif type(hook).__name__ == "SpectralNorm":
            nn.utils.remove_spectral_norm(module, hook.name)
