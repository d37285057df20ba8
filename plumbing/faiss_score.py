"""FaissScore(EmpiricalScore): the k points that weigh most, found by Faiss, stand for all (C.7 of the paper)."""
import torch

from empirical_score import EmpiricalScore


class FaissScore(EmpiricalScore):
    """Draw from the posterior, and find nearest points, among `neighbours` points that Faiss finds for each query.

    Posterior means are still over all points. Raise ImportError without the package faiss.
    """
    def __init__(self, x, y=None, neighbours=200):
        super().__init__(x, y)
        try:
            import faiss
        except ImportError:
            raise ImportError("target faiss needs the package faiss: pip install faiss-cpu") from None
        self.faiss, self.neighbours = faiss, neighbours

    def candidates(self, z, t, rows):
        """Return the rows of the points that weigh most for queries z (B, D), t (B, 1), and their distances: (B, k)."""
        # They have the largest z.x_i - alpha |x_i|^2 / 2. We search by this inner product, of (z, alpha) with
        # (x_i, -|x_i|^2 / 2): a search by distance needs z / alpha, which overflows near t = 1.
        points = self.points(rows) - self.centre
        keys = torch.cat([points, -points.square().sum(1, keepdim=True) / 2], dim=1).float().cpu().numpy()
        query = torch.cat([z - (1 - t) * self.centre, 1 - t], dim=1).float().cpu().numpy()
        k = min(self.neighbours, len(rows))
        _, index = self.faiss.knn(query, keys, k, self.faiss.METRIC_INNER_PRODUCT)
        near = rows[torch.from_numpy(index)]                                        # (B, k)
        points = self.points(near.flatten()).view(*near.shape, self.D)
        return near.to(self.device), (z[:, None] - (1 - t)[:, None] * points).norm(dim=2)

    def best_points(self, value, z, t, rows=None, k=1):
        """As EmpiricalScore.best_points, among the candidates."""
        near, distances = self.candidates(z, t, torch.arange(self.N) if rows is None else rows)
        best, column = value(distances, t).topk(k)
        return best, near.gather(1, column)
