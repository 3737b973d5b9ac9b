"""The names of a model folder's files: known before packages are imported, which takes seconds. What they hold is in
model_folder.py.
"""

from __future__ import annotations

from pathlib import Path

from scldm.errors import InputError

CONFIG = "config.json"
HISTORY, GENE_COLUMNS = "history.json", "gene_columns.json"
TABLES = ("genes.json", "conditions.json", "library_sizes.json", HISTORY, GENE_COLUMNS)  # the last two if known
FILES = ("model.safetensors", CONFIG, *TABLES)


def check_names(folder: Path) -> bool:
    """Whether files of a model are there. Raises: InputError for a folder that holds anything else."""
    if not folder.exists():
        return False
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {folder.name}
    if found and CONFIG not in found:
        raise InputError(f"{folder} is not empty and not a model folder. Choose another out")
    if others := sorted(found - set(FILES)):
        raise InputError(f"{folder} holds {others[0]}, which is none of a model's files. Choose another out")
    return bool(found)
