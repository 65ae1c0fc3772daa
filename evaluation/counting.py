"""How many images are nearer than a match: counted in blocks of distances, sorted only where they tie."""

from collections.abc import Callable

import torch

FEW_MATCHES = 64  # up to this number, two comparisons per match are faster than sorting


class Gallery:
    """Finds the images of each pid, and the distance of the nearest one."""

    def __init__(self, g_pids: torch.Tensor):
        self.order = g_pids.argsort(stable=True)  # groups the images by pid
        self.pids, self.counts = g_pids[self.order].unique_consecutive(return_counts=True)
        self.starts = self.counts.cumsum(0) - self.counts
        counts, by_count = self.counts.sort(descending=True)
        starts = self.starts[by_count]  # pids with many images first, so pids with a t-th image lead
        self.turns = [self.order[starts[counts > t] + t] for t in range(int(counts[0]))]

    def images(self, pids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gallery images (q, M) of pids (q,), and which entries are not padding."""
        index = torch.searchsorted(self.pids, pids)
        counts = self.counts[index, None]
        turns = torch.arange(int(counts.max()), device=pids.device)
        real = turns < counts
        return self.order[(self.starts[index, None] + turns).where(real, 0)], real

    def nearest(self, block: torch.Tensor) -> torch.Tensor:
        """Return (q, number of pids): the distance of each pid's nearest image, from distances (q, G)."""
        nearest = block.index_select(1, self.turns[0])
        for turn in self.turns[1:]:
            leading = nearest[:, : len(turn)]  # the pids that have an image in this turn
            torch.minimum(leading, block.index_select(1, turn), out=leading)
        return nearest


def rank_matches(
    block: torch.Tensor, images: torch.Tensor, counted: torch.Tensor, keys: torch.Tensor, g_keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return matches and places as eval_metrics.Ranking has them.

    Rows of block with ties, or with more than FEW_MATCHES matches, are replaced by positions in the ranking,
    which are all different.

    Args:
        block: (q, G) distances, changed in place.
        images: (q, M) the columns of the matches.
        counted: (q, M) bool: neither padding nor ignored.
        keys, g_keys: (q, 1) and (G,), equal where an image is ignored.
    """
    matches = block.gather(1, images).masked_fill_(~counted, torch.nan)
    few = matches.shape[1] <= FEW_MATCHES
    tied = (count(torch.eq, block, matches) != counted).any(1) if few else counted.any(1)
    if tied.any():
        ranked = block[tied].argsort(dim=1, stable=True)
        ignored = (keys[tied] == g_keys).byte().gather(1, ranked)  # other images may be infinitely far too
        ranked = ranked.gather(1, ignored.argsort(dim=1, stable=True))
        positions = torch.arange(block.shape[1], device=block.device, dtype=block.dtype)
        block[tied] = block[tied].scatter_(1, ranked, positions.expand(len(ranked), -1))
        matches = block.gather(1, images).masked_fill_(~counted, torch.nan)
    matches = matches.sort(dim=1).values
    nearer = count(torch.lt, block, matches) if few else matches
    return matches, (nearer.double() + 1).masked_fill_(matches.isnan(), torch.inf)


def count(compare: Callable[..., torch.Tensor], block: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return (q, M): for how many columns of block (q, G) compare(column, value) holds, for values (q, M).

    On a CPU, summing ones and zeros of the block's dtype is much faster than summing booleans. The sum is
    exact up to 2**24 gallery images.
    """
    out = torch.empty_like(block)
    return torch.stack([compare(block, column, out=out).sum(1) for column in values.split(1, dim=1)], dim=1)
