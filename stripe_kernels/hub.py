"""HubModel: a frozen or optimized network as a repository of the Hugging Face Hub, or a folder like one.

Needs huggingface_hub, and torch: nobody who loads a model needs the class it was built with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stripe_kernels.compile import example_input as input_of
from stripe_kernels.compile import load, save

try:
    from huggingface_hub import ModelHubMixin, constants, hf_hub_download
except ImportError as error:
    raise ImportError(
        f"stripe_kernels.hub needs the package huggingface_hub (pip install huggingface_hub): {error}; "
        "stripe_kernels.save and load write and read the same file without it"
    ) from error


class HubModel(
    nn.Module,
    ModelHubMixin,
    library_name="stripe-kernels",
    tags=["stripe-pruning", "sparsity"],
):
    """`network`, with save_pretrained, from_pretrained and push_to_hub of huggingface_hub.ModelHubMixin.

    A repository holds one model.safetensors, the file of `stripe_kernels.save`. A folder is read without a
    network; a name goes through the Hub's cache. `example_input` are the tensors that `network` is called with, whose
    sizes go into the file; `from_pretrained` gives zeros of these sizes, or (). Raises what `save` and `load` raise.

    >>> from stripe_kernels.hub import HubModel
    >>> HubModel(frozen, example).save_pretrained("my-model")  # doctest: +SKIP
    >>> network = HubModel.from_pretrained("my-model").network  # doctest: +SKIP
    """

    # Variadic: what arguments default to, the mixin would write into a config.json.
    def __init__(self, network: nn.Module, *example_input: Tensor) -> None:
        super().__init__()
        self.network = network
        self.example_input = example_input
        self.train(network.training)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.network(*inputs, **named)

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self.network, save_directory / constants.SAFETENSORS_SINGLE_FILE, self.example_input or None)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubModel:
        """options: revision, cache_dir, force_download, local_files_only, token."""
        path = Path(model_id)
        if not path.is_dir():
            path = Path(hf_hub_download(model_id, constants.SAFETENSORS_SINGLE_FILE, **options))
        file = path if path.is_file() else path / constants.SAFETENSORS_SINGLE_FILE
        return cls(load(file), *(input_of(file) or ()))
