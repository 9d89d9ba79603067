"""HubModel: a frozen or optimized network as a repository of the Hugging Face Hub, or a folder like one.

Needs huggingface_hub, and torch: nobody who loads a model needs the class it was built with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

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
    network; a name goes through the Hub's cache. Raises what `save` and `load` raise.

    >>> from stripe_kernels.hub import HubModel
    >>> HubModel(frozen).save_pretrained("my-model")  # doctest: +SKIP
    >>> network = HubModel.from_pretrained("my-model").network  # doctest: +SKIP
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.network(*inputs, **named)

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self.network, save_directory / constants.SAFETENSORS_SINGLE_FILE)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubModel:
        """options: revision, cache_dir, force_download, local_files_only, token."""
        path = Path(model_id)
        if not path.is_dir():
            path = Path(hf_hub_download(model_id, constants.SAFETENSORS_SINGLE_FILE, **options))
        return cls(load(path if path.is_file() else path / constants.SAFETENSORS_SINGLE_FILE))
