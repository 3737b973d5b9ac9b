"""scldm: generate, embed and evaluate single cells with a latent diffusion model.

`scldm.load(folder)` opens what `scldm export` wrote; it needs neither deepspeed nor mlflow nor tiledbsoma.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scldm.pretrained import Pretrained, load

__all__ = ["Pretrained", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from scldm import pretrained  # torch is imported only when a model is asked for

        return getattr(pretrained, name)
    raise AttributeError(f"module 'scldm' has no attribute {name!r}")
