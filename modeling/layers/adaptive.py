"""Large vocabularies, the most frequent words first: cut into clusters, of which the rarer have smaller embeddings
(adaptive input: Baevski and Auli, 2018, arXiv:1809.10853) and are named in two steps, first the cluster, then the word
(adaptive softmax: Grave et al., 2016, arXiv:1609.04309).

`config.cutoffs` says where clusters but the first begin, `config.embedding_size` how wide the first one's embeddings
are, and `config.div_val` how much narrower those of each further cluster; where it is 1, all have one table.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Cluster(NamedTuple):
    start: int
    end: int
    size: int  # of its embeddings


def clusters(config) -> list[Cluster]:
    starts = [0, *(config.cutoffs or [])]
    ends = [*starts[1:], config.vocab_size]
    sizes = [config.embedding_size // config.div_val**i for i in range(len(starts))]
    return [Cluster(*told) for told in zip(starts, ends, sizes, strict=True)]


def table_sizes(config) -> list[tuple[int, int]]:
    """(words, size) of each table."""
    if config.div_val == 1:
        return [(config.vocab_size, config.embedding_size)]
    return [(cluster.end - cluster.start, cluster.size) for cluster in clusters(config)]


class AdaptiveEmbedding(nn.Module):
    """projection_c(table_c(word)), c the cluster of the word."""

    def __init__(self, config):
        super().__init__()
        sizes = table_sizes(config)
        self.starts = [0, *(config.cutoffs or [])][: len(sizes)]
        self.tables = nn.ModuleList(nn.Embedding(*size) for size in sizes)
        self.projections = nn.ModuleList(nn.Linear(size, config.hidden_size, bias=False) for _, size in sizes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedded = 0.0
        for start, table, projection in zip(self.starts, self.tables, self.projections, strict=True):
            place = ids - start
            inside = (place >= 0) & (place < table.num_embeddings)
            found = projection(table(place.clamp(0, table.num_embeddings - 1)))
            embedded = embedded + found * inside[..., None]
        return embedded


class AdaptiveSoftmax(nn.Module):
    """log p(word) = log p(cluster) + log p(word in the cluster), over the whole vocabulary; of a vocabulary that is not
    cut, the scores themselves. Words of the first cluster are named beside the other clusters."""

    def __init__(self, config):
        super().__init__()
        self.clusters, self.out_features = clusters(config), config.vocab_size
        sizes = table_sizes(config)
        self.tables = nn.ModuleList(nn.Linear(size, words) for words, size in sizes)
        self.projections = nn.ModuleList(
            nn.Linear(cluster.size if len(sizes) > 1 else config.embedding_size, config.hidden_size, bias=False)
            for cluster in self.clusters
        )
        self.cluster_names = nn.Linear(config.embedding_size, len(self.clusters) - 1) if config.cutoffs else None

    @property
    def tied(self) -> dict[str, str]:
        """The parameters that an AdaptiveEmbedding has, too."""
        tables = {f"tables.{i}.weight": f"tables.{i}.weight" for i in range(len(self.tables))}
        last = len(self.tables) - 1
        return tables | {
            f"projections.{i}.weight": f"projections.{min(i, last)}.weight" for i in range(len(self.clusters))
        }

    def scores(self, hidden_states: torch.Tensor, number: int) -> torch.Tensor:
        """Of the words of a cluster, and of the further clusters after those of the first."""
        cluster = self.clusters[number]
        table = self.tables[min(number, len(self.tables) - 1)]
        rows = slice(cluster.start, cluster.end) if len(self.tables) == 1 else slice(None)
        projected = hidden_states @ self.projections[number].weight
        scores = F.linear(projected, table.weight[rows], table.bias[rows])
        if number or self.cluster_names is None:
            return scores
        return torch.cat((scores, self.cluster_names(projected)), dim=-1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        first = self.scores(hidden_states, 0)
        if self.cluster_names is None:
            return first
        wide = torch.promote_types(first.dtype, torch.float32)
        words, names = first.log_softmax(-1, dtype=wide).split((self.clusters[0].end, len(self.clusters) - 1), dim=-1)
        rest = [
            names[..., i - 1 : i] + self.scores(hidden_states, i).log_softmax(-1, dtype=wide)
            for i in range(1, len(self.clusters))
        ]
        return torch.cat((words, *rest), dim=-1).to(hidden_states.dtype)
