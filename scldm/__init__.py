"""scldm: generate, embed and evaluate single cells with a latent diffusion model.

`scldm.fit(adata, conditions=[...])` trains a model. `scldm.load(folder)` opens a trained one, and needs neither
deepspeed nor mlflow nor tiledbsoma for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from scldm.version import VERSION as __version__

if TYPE_CHECKING:
    from scldm.errors import InputError
    from scldm.fitting import fit
    from scldm.flow.sampler import SamplerConfig
    from scldm.pretrained import Pretrained, load

__all__ = ["InputError", "Pretrained", "SamplerConfig", "__version__", "fit", "load"]

# name -> its module, which is imported when the name is first used: a command line must not wait for torch.
# No module may have the name of a function: importing it would put it in the function's place
_HOME = {
    "InputError": "scldm.errors",
    "Pretrained": "scldm.pretrained",
    "SamplerConfig": "scldm.flow.sampler",
    "fit": "scldm.fitting",
    "load": "scldm.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'scldm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
