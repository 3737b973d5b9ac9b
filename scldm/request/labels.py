"""What a user asks for, as the model takes it: labels as ids or values, and a sampler that the model was trained for.

Reading order: encode_labels, own_and_other, moved_obs, base_of, check_sampler, without_token, of_other_labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from scldm.errors import InputError
from scldm.flow.guidance import GuidedField
from scldm.flow.means import CombinationMeans
from scldm.flow.sampler import SamplerConfig
from scldm.flow.shift import nearest_trained, stays, ways
from scldm.label_text import texts
from scldm.model.conditions import FeatureEmbedding, ValueEmbedding
from scldm.model.dit import DiT
from scldm.request.wanted import Ways, distinct
from scldm.vocab import ConditionVocab

DRAWN = "It is drawn as {}, and moved by the difference"
MOVED = "Cells of {} are moved there by the difference of the means alone"
MOVED_COLUMNS = ("scldm_alpha", "scldm_source")  # how far a cell was taken, and its name before


def encode_labels(dit: DiT, vocab: ConditionVocab, labels: pd.DataFrame) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Every condition of the model as it takes it, (n,): label ids int64, of continuous ones values float32, `null`
    where it has no column. Also the labels, with numbers as the vocabulary writes them.

    labels: text, one column for each condition that is given

    Raises: InputError for an unknown condition or label, a label that no training cell had (unless it is known by a
        vector), or a value beyond those that were trained.
    """
    taken: dict[str, np.ndarray] = {}
    for name in dit.n_labels:
        dtype = np.float32 if name in dit.config.continuous else np.int64
        taken[name] = np.full(len(labels), dit.null(name), dtype=dtype)
    written = labels.copy()
    for name in map(str, labels):
        if name in dit.config.continuous:
            values, written[name] = _values(dit, vocab, name, list(labels[name]))
            taken[name] = values
        else:
            taken[name] = vocab.encode(name, list(labels[name]))
            written[name] = vocab.decode(name, taken[name])
            _check_trained(dit, vocab, name, taken[name])
    return taken, written


def _trained(dit: DiT, name: str) -> np.ndarray:
    """Ids of the labels that some training cell had. Of all labels where the model does not say."""
    labels_KC = dit.combinations.labels_KC.cpu().numpy()
    return np.unique(labels_KC[:, list(dit.n_labels).index(name)]) if len(labels_KC) else np.arange(dit.n_labels[name])


def _check_trained(dit: DiT, vocab: ConditionVocab, name: str, ids: np.ndarray) -> None:
    """Raises: InputError for a label that is in the vocabulary, as held-out cells have it, but means nothing yet."""
    if isinstance(dit.condition[list(dit.n_labels).index(name)], FeatureEmbedding):
        return
    unknown = np.setdiff1d(ids, _trained(dit, name))
    if len(unknown):
        raise InputError(
            f"condition {name!r}: no training cell had the label {vocab.labels[name][unknown[0]]!r}, and nothing else "
            f"tells the model what it is. label_embeddings.{name}=FILE in training would"
        )


def _values(dit: DiT, vocab: ConditionVocab, name: str, labels: list[str]) -> tuple[np.ndarray, list[str]]:
    """Numbers, and their text as the vocabulary has it."""
    embedding = dit.condition[list(dit.n_labels).index(name)]
    assert isinstance(embedding, ValueEmbedding)
    trained_K = embedding.values_K[torch.from_numpy(_trained(dit, name)).to(embedding.values_K.device)]
    low, high = float(trained_K.min()), float(trained_K.max())
    known = {float(np.float32(label)): label for label in vocab.labels[name]}
    values = np.empty(len(labels), np.float32)
    for k, label in enumerate(labels):
        try:
            values[k] = float(label)
        except ValueError:
            raise InputError(f"condition {name!r} is continuous: {label!r} is no number") from None
        if not low <= values[k] <= high:
            raise InputError(
                f"condition {name!r}: {label} lies beyond the values that were trained, {low:g} to {high:g}"
            )
    return values, [known.get(float(value), label) for value, label in zip(values, labels)]


class Moves(NamedTuple):
    """Where cells go, by combination of labels.

    row_n: the combination that each cell has, int32 (n,)
    labels: the combinations' own labels, as text
    own, by_flow: of each combination its labels as the model takes them, and those that the flow leads to
    ways: from there to the labels that were asked for
    flow_labels: those of by_flow as text
    notes: a sentence for each thing that a reader of the cells should know
    """

    row_n: np.ndarray
    labels: pd.DataFrame
    own: dict[str, np.ndarray]
    by_flow: dict[str, np.ndarray]
    ways: Ways
    flow_labels: pd.DataFrame
    notes: tuple[str, ...]


def own_and_other(
    dit: DiT,
    vocab: ConditionVocab,
    obs: pd.DataFrame,
    by: Sequence[str],
    to: Mapping[str, str],
    sampler: SamplerConfig,
    missing: Mapping[str, str],
) -> Moves:
    """by: columns of obs that are the cells' own conditions
    to: condition -> label that they shall have instead
    missing: condition -> label of its missing values

    Raises: InputError for what is no condition of the model, no column of obs, or not in `by`. Also where obs has a
        column of MOVED_COLUMNS, as of cells that were taken somewhere before.
    """
    for column in MOVED_COLUMNS:
        if column in obs:
            several = ",".join(f"{name}={label}" for name, label in to.items())
            raise InputError(
                f"obs has a column {column!r}: these cells were moved before. Move the measured cells instead, "
                f"to all labels in one call, as to={several or 'treatment=IFN'},CONDITION=LABEL. To move them once "
                f"more all the same, remove the columns {' and '.join(MOVED_COLUMNS)} first"
            )
    if not to:
        raise InputError("to names no condition. Give one, as to=treatment=stimulated")
    for name in [*by, *to]:
        if name not in dit.n_labels:
            raise InputError(f"condition {name!r} is unknown. The model knows {', '.join(dit.n_labels) or 'none'}")
        if name not in obs:
            raise InputError(f"obs has no column {name!r}. It has {', '.join(map(str, obs.columns)) or 'none'}")
        if name not in by:
            raise InputError(f"by must name {name!r} too: from which label each cell is taken to {to[name]!r}")
    row_n, labels = distinct(pd.DataFrame({name: obs[name].array for name in by}), missing)
    own, own_labels = encode_labels(dit, vocab, labels)
    other, other_labels = encode_labels(dit, vocab, labels.assign(**to))
    by_flow, moved = other, _no_ways(other)
    if sampler.guidance == "shift":
        there = _tensors(other)
        stay = stays(dit, _tensors(own), there)
        by_flow, moved = _arrays(stay), _ways(dit, stay, there, CombinationMeans(dit))
    notes = (*without_token(dit, own, own_labels), *without_token(dit, by_flow, other_labels))
    notes += of_other_labels(dit, vocab, by_flow, other, other_labels, MOVED)
    flow_labels = labels_of_base(dit, vocab, by_flow, other_labels)
    return Moves(row_n, own_labels, own, by_flow, moved, flow_labels, tuple(dict.fromkeys(notes)))


def moved_obs(
    dit: DiT, vocab: ConditionVocab, obs: pd.DataFrame, to: Mapping[str, str], alpha: float, several: bool
) -> pd.DataFrame:
    """The cells' obs where they were taken, with MOVED_COLUMNS. A name says how far where there are several."""
    moved = obs.copy()
    for name, label in to.items():
        labels = [label] * len(obs) if alpha else list(texts(pd.Series(obs[name])))
        if name in dit.config.continuous:
            moved[name] = [float(value) for value in labels]
        else:
            moved[name] = pd.Categorical(labels, categories=list(vocab.labels[name]))
    for column, value in zip(MOVED_COLUMNS, (alpha, [str(name) for name in obs.index]), strict=True):
        moved[column] = value
    moved.index = pd.Index([f"{name}-{alpha:g}" if several else str(name) for name in obs.index])
    return moved


def base_of(dit: DiT, taken: dict[str, np.ndarray], sampler: SamplerConfig) -> tuple[dict[str, np.ndarray], Ways]:
    """What the network is asked for, combination by combination: of the sampler `shift` the nearest trained one, of
    others the same. And the way from there."""
    conditions = _tensors(taken)
    if sampler.guidance != "shift":
        return taken, _no_ways(taken)
    means = CombinationMeans(dit)
    base = nearest_trained(dit, conditions, means)
    return (taken, _no_ways(taken)) if base is conditions else (_arrays(base), _ways(dit, base, conditions, means))


def _ways(dit: DiT, of: dict[str, torch.Tensor], to: dict[str, torch.Tensor], means: CombinationMeans) -> Ways:
    way_nLZ, way_K = ways(dit, of, to, means)
    return Ways(way_nLZ.numpy(), way_K.int().numpy())


def _no_ways(taken: dict[str, np.ndarray]) -> Ways:
    """Of combinations that stay where the network makes them."""
    n = len(next(iter(taken.values()))) if taken else 1
    return Ways(np.zeros((1, 1, 1), np.float32), np.zeros(n, np.int32))


def labels_of_base(dit: DiT, vocab: ConditionVocab, base: dict[str, np.ndarray], labels: pd.DataFrame) -> pd.DataFrame:
    """The combinations' labels as the network is asked for them, as text."""
    given = [name for name in dit.means.names.values() if name in labels]
    return labels.assign(**{name: [vocab.labels[name][k] for k in base[name]] for name in given})


def _tensors(taken: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in taken.items()}


def _arrays(taken: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in taken.items()}


def check_sampler(dit: DiT, asked: dict[str, np.ndarray], sampler: SamplerConfig, origin: dict[str, Any]) -> None:
    """Raises: InputError where guidance names unknown conditions. Also where it asks the model for a subset of
    conditions of a kind that it never saw in training, as far as the model's origin tells.

    asked: what the network is asked for, combination by combination
    """
    field = GuidedField(dit, _tensors(asked), sampler)
    hidden = ((origin.get("ldm") or {}).get("config") or {}).get("guidance")
    if hidden is None or not dit.n_labels:
        return
    # drop_each, of several conditions, at times hides all of them
    never_all_hidden = hidden["drop_all"] == 0 and (hidden["drop_each"] == 0 or len(dit.n_labels) == 1)
    for rows in (field.inside, field.outside):
        assert rows is not None
        n_given = dit.is_given(rows.conditions).sum(1)
        if never_all_hidden and bool((n_given == 0).any()):
            raise InputError(
                f"sampler.guidance={sampler.guidance} with guidance_scale={sampler.guidance_scale:g} and these "
                "conditions asks for cells without any condition, which the model never saw: it was trained with "
                "guidance.drop_all=0"
            )
        if hidden["drop_each"] == 0 and bool(((n_given > 0) & (n_given < len(dit.n_labels))).any()):
            raise InputError(
                f"sampler.guidance={sampler.guidance} with these conditions asks for some of the conditions "
                f"{', '.join(dit.n_labels)} without the others, which the model never saw: it was trained with "
                "guidance.drop_each=0"
            )


def without_token(dit: DiT, taken: dict[str, np.ndarray], labels: pd.DataFrame) -> tuple[str, ...]:
    """A sentence for each combination of all conditions without a token of its own, where the model has such."""
    if not dit.config.combination_tokens:
        return ()
    conditions = {name: torch.from_numpy(values).to(dit.latent_mean_LZ.device) for name, values in taken.items()}
    whole = dit.is_given(conditions).all(1)
    unknown = dit.combinations.index(dit.label_ids(conditions)) == len(dit.combinations.labels_KC)
    return tuple(
        f"{', '.join(f'{name}={label}' for name, label in labels.iloc[row].items())}: this combination was not trained "
        "and has no token of its own. It uses the sum of its conditions' embeddings alone"
        for row in (whole & unknown).nonzero()[:, 0].tolist()
    )


def of_other_labels(
    dit: DiT,
    vocab: ConditionVocab,
    asked: dict[str, np.ndarray],
    taken: dict[str, np.ndarray],
    labels: pd.DataFrame,
    how: str,
) -> tuple[str, ...]:
    """A sentence for each combination of which the network is asked for other labels. After ten, how many more.

    how: DRAWN or MOVED
    """
    names = list(dit.means.names.values())
    differ = {name: asked[name] != taken[name] for name in names}
    rows = np.flatnonzero(np.logical_or.reduce(list(differ.values()))) if names else np.empty(0, int)
    notes = []
    for row in rows[:10]:
        own = ", ".join(f"{name}={label}" for name, label in labels.iloc[row].items())
        other = ", ".join(f"{name}={vocab.labels[name][asked[name][row]]}" for name in names if differ[name][row])
        notes.append(f"{own}: no training cell has this combination. {how.format(other)}")
    return (*notes, *([f"and {len(rows) - 10} more combinations likewise"] if len(rows) > 10 else []))
