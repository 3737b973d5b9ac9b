"""Draws docs/images/map.png: real test cells and generated cells on one UMAP, by cell type and by treatment.

    python -m benchmarks.quality h5ad=kang18_muscat_1556x1267.h5ad conditions=cell_type,condition seeds=0 \\
      out=runs/quality-kang methods=ours
    python docs/images/map.py runs/quality-kang docs/images/map.png
"""

import sys
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import scanpy as sc

folder, out = Path(sys.argv[1]), sys.argv[2]
real = ad.read_h5ad(folder / "cells.h5ad")
real = real[real.obs["quality_split"] == "test"].copy()
made = ad.read_h5ad(folder / "ours-0" / "generated.h5ad")
both = ad.concat({"real test cells": real, "generated cells": made}, label="from", index_unique="-")
both.X = both.X.astype("float32")
sc.pp.normalize_total(both, target_sum=1e4)
sc.pp.log1p(both)
sc.pp.pca(both, n_comps=30, random_state=0)
sc.pp.neighbors(both, n_neighbors=15, random_state=0)
sc.tl.umap(both, random_state=0)
types, treatments = sorted(both.obs["cell_type"].unique()), sorted(both.obs["condition"].unique())
figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True, sharey=True)
for ax, of in zip(axes, ("real test cells", "generated cells")):
    for k, name in enumerate(types):
        for treatment, marker in zip(treatments, ("o", "^")):
            rows = (both.obs["from"] == of) & (both.obs["cell_type"] == name) & (both.obs["condition"] == treatment)
            at = both.obsm["X_umap"][rows.to_numpy()]
            ax.scatter(*at.T, s=12, color=f"C{k}", marker=marker, alpha=0.7, linewidths=0)
    ax.set(title=f"{of} ({(both.obs['from'] == of).sum()})", xticks=[], yticks=[], xlabel="UMAP 1")
axes[0].set_ylabel("UMAP 2")
handles = [plt.Line2D([], [], color=f"C{k}", marker="s", ls="", label=name) for k, name in enumerate(types)]
names = {"ctrl": "control", "stim": "IFN-beta"}
handles += [plt.Line2D([], [], color="gray", marker=m, ls="", label=names.get(t, t)) for t, m in zip(treatments, "o^")]
figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9)
figure.tight_layout(rect=(0, 0.06, 1, 1))
figure.savefig(out, dpi=110)
