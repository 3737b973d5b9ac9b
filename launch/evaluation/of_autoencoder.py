"""How well an autoencoder reconstructs the test cells of a shard set, beside mean profiles.

`scldm evaluate vae=RUN shards=SET` calls evaluate_vae.

Reading order: evaluate_vae, autoencoder, scored, the verdict, the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from data_pipeline.format.schema import read_manifest
from launch.evaluation.cells import cells_of_shards
from launch.evaluation.config import EvaluateVerbConfig
from launch.evaluation.reconstructed_cells import decoded, encoded, known_genes
from launch.evaluation.sight import blind_spots, known_by_latents
from launch.evaluation.terminal import console, started
from launch.trained import checkpoint_of, trained_vae
from scldm import count_draws, draws
from scldm.environment import describe
from scldm.errors import InputError
from scldm.evaluate.baselines import with_relatives
from scldm.evaluate.cells import NO_TYPE, Cells
from scldm.evaluate.intervals import WIDTH
from scldm.evaluate.named import PROTOCOL_NOTE, PUBLISHED, check_published
from scldm.evaluate.reconstruction import (
    MeanProfile,
    Reconstruction,
    fit_mean_profile,
    log_profile,
    mean_and_error,
    nb_nll,
)
from scldm.evaluate.sample import Sample
from scldm.library_size import LibrarySizeModel
from scldm.networks import Precision, device_of, usable
from scldm.pretrained import Pretrained, load
from scldm.progress import Progress
from scldm.vocab import ConditionVocab, GeneVocab

TITLES = {"model": "autoencoder", "mean_profile": "mean profile", "mean_of_combination": "mean profile per combination"}


def evaluate_vae(config: EvaluateVerbConfig) -> dict:
    """Reconstruction scores of an autoencoder on the test cells of a shard set, whose training cells give the mean
    profiles.

    Raises: InputError for what is not there, or does not belong together.
    """
    check_published(config.published)
    folder, seed = config.vae or config.model, config.evaluate.seed
    model, origin = autoencoder(Path(folder), device_of(config.device), config.batch, config.precision)
    there = tuple(read_manifest(config.shards).conditions.names)
    conditions = config.conditions or there
    if conditions == ("none",):
        conditions = tuple(c for c in conditions if c in there)
    sample = Sample(config.evaluate.max_real_cells, None, seed)
    train, _, test = cells_of_shards(config.shards, conditions, sample, config.cache_folder, config.cache_gb)
    evaluation = {
        "kind": "reconstruction",
        "vae": {"folder": folder, **origin, "precision": config.precision},
        "shards": config.shards,
        "conditions": list(conditions),
        "seed": seed,
        **scored(model, train, test, seed),
        "made_with": describe(),
    }
    if config.published:
        rows = PUBLISHED[config.published]
        evaluation["published"] = {"data": config.published, "note": PROTOCOL_NOTE, "rows": rows}
    return evaluation


def autoencoder(
    folder: Path, device: str, batch: int, precision: Precision = "float32"
) -> tuple[Pretrained, dict[str, Any]]:
    """The autoencoder of a run (its best checkpoint) or a model folder, ready to encode. And where it comes from: run,
    step, hash.

    Raises: InputError for a folder that is neither.
    """
    if (folder / "model.safetensors").is_file():
        model = load(folder, device, batch=batch, precision=precision)
        origin = model.origin.get("vae", {})
    else:
        usable(device)
        vae, origin = trained_vae(folder, "best")
        kept = checkpoint_of(origin)
        genes, conditions = GeneVocab.load(kept / "genes.json"), ConditionVocab.load(kept / "conditions.json")
        sizes = LibrarySizeModel.load(kept / "library_sizes.json")
        words = (genes, conditions, sizes, {"vae": origin}, origin["hash"], batch, precision)
        model = Pretrained(vae, None, *words).to(device)
    said = {name: origin[name] for name in ("run", "step", "hash") if name in origin}
    return model, {**said, "likelihood": model.vae.config.likelihood}


# --- scores --------------------------------------------------------------------------------------------------------


def scored(model: Pretrained, train: Cells, test: Cells, seed: int) -> dict:
    """Scores of the model and of mean profiles on the test cells, JSON-ready. Test cells without a count in the genes
    that the model knows are left out and counted.

    A cell is given all genes of the set that the model knows, and judged on them. Its library size is its total over
    them, as in validation. Of a combination without training cells, the mean profile is that of its relatives.

    Raises: InputError where no cell or gene is left, and for a model whose numbers are not finite.
    """
    n_genes = {"set": len(test.genes), "model": model.genes.n_genes}
    lacking = [gene for gene, k in zip(test.genes, model.genes.lookup(test.genes), strict=True) if not k]
    found = {"train": len(train), "test": len(test)}
    drawn_of = {cells_of: cells.drawn_of for cells_of, cells in (("train", train), ("test", test)) if cells.drawn_of}
    (train, _), (test, gene_ids_G) = known_genes(model, train), known_genes(model, test)
    counted = test.counts.getnnz(1) > 0
    n_empty = int((~counted).sum())
    if n_empty == len(test):
        raise InputError(f"{test.name}: no cell has a count in a gene that the model knows")
    test = test.select(np.flatnonzero(counted)) if n_empty else test
    seen = train.numbers()
    unseen = {name: labels for name, labels in test.combinations().items() if name not in seen}
    n_unseen = sum(n for name, n in test.numbers().items() if name in unseen)
    profiles = {"mean_profile": fit_mean_profile(train.counts, seed=seed)}
    if NO_TYPE not in seen:
        wanted = {**seen, **dict.fromkeys(unseen, 500)}
        of_each = with_relatives(train, unseen, wanted, seed)[0] if unseen else train
        profiles["mean_of_combination"] = fit_mean_profile(of_each.counts, of_each.types, seed)
    every = _score(model, test, gene_ids_G, profiles, seed)
    known = known_by_latents(model, train, test, gene_ids_G, seed)
    scores = {name: of.result() for name, of in every.items()}
    for name in profiles:
        scores["model"].setdefault("re_less", {})[name] = mean_and_error(every["model"].nll_n - every[name].nll_n)
    return {
        "cells": {**found, "scored": len(test), "without_counts": n_empty, "drawn_of": drawn_of},
        "genes": {**n_genes, "scored": len(test.genes), "unknown_to_model": len(lacking), "such_as": lacking[:5]},
        "combinations": {"train": len(seen), "unseen": list(unseen), "cells_of_unseen": n_unseen},
        "scores": scores,
        "latents": known,
        "verdict": " ".join([verdict(scores, model.vae.config.likelihood), *blindness(known["sight"])]),
    }


def _score(
    model: Pretrained, test: Cells, gene_ids_G: torch.Tensor, profiles: Mapping[str, MeanProfile], seed: int
) -> dict[str, Reconstruction]:
    """Everyone reconstructs the same blocks of cells. Counts are drawn by the cell's row and the gene."""
    every = {name: Reconstruction() for name in ("model", *profiles)}
    theta = {name: torch.from_numpy(profile.theta_G) for name, profile in profiles.items()}
    with Progress("reconstruct", len(test), "cells") as bar, torch.no_grad():
        for block in encoded(model, test.counts, gene_ids_G):
            counts, types = test.counts[block.rows], test.types[block.rows]
            real_BG, size_B = log_profile(counts.toarray()), np.asarray(counts.sum(1), np.float64).ravel()
            numbers_B = torch.arange(block.rows.start, block.rows.stop, device=model.device)
            keys_BG = draws.keys(seed, "counts", numbers_B, gene_ids_G)
            predicted = decoded(model, block.latent_BLZ, gene_ids_G)
            nll_B = predicted.nll_B(block.given, block.size_B).cpu().numpy()
            if not np.isfinite(nll_B).all():
                raise InputError("the autoencoder's likelihoods are not finite: its weights are broken")
            expected_BG = predicted.expected(block.size_B).cpu().numpy()
            every["model"].add(real_BG, expected_BG, predicted.sample(block.size_B, keys_BG).cpu().numpy(), nll_B)
            keys_BG = keys_BG.cpu()
            for name, profile in profiles.items():
                mean_BG = profile.mean_BG(size_B, types)
                drawn_BG = count_draws.negative_binomial(torch.from_numpy(mean_BG), theta[name], keys_BG).numpy()
                every[name].add(real_BG, mean_BG, drawn_BG, nb_nll(counts, mean_BG, profile.theta_G))
            bar.advance(len(size_B))
    return every


def least_of_means(scores: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The mean profile of the lowest RE, and the model's RE less its own: mean over cells, standard error."""
    best = min(scores["model"]["re_less"], key=lambda name: scores[name]["re"]["mean"])
    return best, scores["model"]["re_less"][best]


def verdict(scores: Mapping[str, Any], likelihood: str) -> str:
    """One sentence: does the autoencoder know more about a cell than means do? By RE, the difference taken cell by
    cell."""
    if likelihood == "gaussian":
        return (
            "RE of a gaussian autoencoder is a density of log values, which can't be compared with that of counts. "
            "Compare PCC and MSE."
        )
    best, gap = least_of_means(scores)
    interval = "" if gap["se"] is None else f" (95 % interval {_interval(abs(gap['mean']), gap['se'])})"
    if gap["se"] is not None and abs(gap["mean"]) <= WIDTH * gap["se"]:
        return (
            f"The autoencoder can't be told from the {TITLES[best]}: {-gap['mean']:+.1f} nats a cell, "
            f"95 % interval {_interval(-gap['mean'], gap['se'])}. "
            "Train it longer, or with more genes given."
        )
    if gap["mean"] < 0:
        return f"The autoencoder is {-gap['mean']:.1f} nats a cell better than the {TITLES[best]}{interval}."
    return (
        f"The autoencoder is {gap['mean']:.1f} nats a cell WORSE than the {TITLES[best]}{interval}. Means say more "
        "about a cell than this network does. Train it longer, or with more genes given."
    )


def blindness(sight: Mapping[str, dict]) -> list[str]:
    """A sentence where the encoder does not see how much of a gene there is."""
    if spots := blind_spots(sight):
        return [f"The encoder is BLIND to counts: {' and '.join(spots)} hardly move its latents. Only genes are seen."]
    return []


def _interval(mean: float, error: float) -> str:
    return f"{mean - WIDTH * error:.1f} to {mean + WIDTH * error:.1f}"


# --- the table -----------------------------------------------------------------------------------------------------


def show(evaluation: Mapping[str, Any]) -> None:
    """The table in the terminal, and what a reader must know of it."""
    terminal, cells, genes = console(), evaluation["cells"], evaluation["genes"]
    title = f"reconstruction of {cells['scored']:,} test cells x {genes['scored']:,} genes"
    table = started(title, ("RE (nats)", "PCC draw", "MSE draw", "PCC genes", "PCC cells", "MSE mean"))
    for name, of in evaluation["scores"].items():
        re, draw, mean = of["re"], of["published"], of["ours"]
        error = "" if re["se"] is None else f" ± {WIDTH * re['se']:.1f}"
        numbers = (draw["pcc"], draw["mse"], mean["pcc_gene"], mean["pcc_cell"], mean["mse"])
        table.add_row(TITLES[name], f"{re['mean']:.1f}{error}", *(_text(number) for number in numbers))
    if "published" in evaluation:
        table.add_section()
        for method, (re, pcc, mse) in evaluation["published"]["rows"].items():
            table.add_row(f"{method}, as published", f"{re:,.0f}", _text(pcc), _text(mse), "", "", "")
    terminal.print(table)
    show_latents(terminal, evaluation["latents"])
    for line in [*notes(evaluation), evaluation["verdict"]]:
        terminal.print(line, soft_wrap=True)


def show_latents(terminal: Console, known: Mapping[str, Any]) -> None:
    """What latents see of counts, and tell of labels."""
    columns = ("latents move (1: as far as another cell)", "true counts lose (nats a cell)")
    table = started("what the encoder sees: its input changed", columns)
    for of in known["sight"].values():
        error = "" if of["nats"]["se"] is None else f" ± {WIDTH * of['nats']['se']:.1f}"
        table.add_row(of["title"], _text(of["moved"]), f"{of['nats']['mean']:.1f}{error}")
    terminal.print(table)
    recall = [f"{c} {value:.3f}" for c, value in known["label_recall"].items()]
    told = f". Recall of labels by the 15 nearest training cells: {', '.join(recall)}" if recall else ""
    terminal.print(f"effective dimension of the latents: {known['effective_dimension']:.1f}{told}", soft_wrap=True)


def notes(evaluation: Mapping[str, Any]) -> list[str]:
    """Sentences below the table."""
    cells, genes, combinations = (evaluation[name] for name in ("cells", "genes", "combinations"))
    pcc = evaluation["scores"]["model"]["published"]
    lines = [
        "RE: negative log-likelihood summed over genes, mean over cells, ± 95 %. PCC and MSE: of log1p counts per "
        "10,000.",
        f"draw: one draw of counts a cell, genes correlated within batches of {pcc['batch']} cells, as the published "
        "code does. mean: expected counts, genes over all cells, cells over all genes.",
        "The mean profile is the same for all cells, so that its expected counts have no correlation over cells. Its "
        "draws have some, as small cells have other values per 10,000 than large ones.",
    ]
    if "published" in evaluation:
        data = evaluation["published"]
        lines.append(f"As published: {data['data']}, {data['note']}.")
    if n := genes["unknown_to_model"]:
        lines.append(
            f"{n:,} of {genes['set']:,} genes are left out, as the model does not know them, such as "
            f"{', '.join(genes['such_as'][:3])}."
        )
    if n := cells["without_counts"]:
        lines.append(f"{n:,} test cells are left out: no count in a gene that the model knows.")
    for split, n in cells["drawn_of"].items():
        lines.append(f"{cells[split]:,} of {n:,} {split} cells were drawn.")
    if n := combinations["cells_of_unseen"]:
        lines.append(
            f"{n:,} test cells are of {len(combinations['unseen'])} combinations without training cells. Their mean "
            "profile is that of the combinations that share most of their labels."
        )
    return lines


def _text(number: float | None) -> str:
    return "\N{EN DASH}" if number is None else f"{number:.3f}"
