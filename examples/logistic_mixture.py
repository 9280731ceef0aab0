"""Another distribution of tokens: mixtures of logistics, which have heavier tails than Gaussians.

    python train.py --model examples.logistic_mixture --out runs/logistic

This works because training, guidance by resampling and the likelihood use only a mixture's methods.
"""
import torch
import torch.nn.functional as F

import farmer
from farmer import PRESETS, TRAINING, Config, Sampling  # noqa: F401  (the scripts look for them)


class Logistics(farmer.GMM):
    """sum_k pi_k prod_channels Logistic(mu_k, exp(log_sigma_k)), in place of Eq. 11."""

    def log_prob(self, z):
        """z (..., d) -> (...) in nats."""
        e = (z.unsqueeze(-2) - self.mu) * torch.exp(-self.log_sigma)  # (..., K, d)
        log_logistic = (-e - 2 * F.softplus(-e) - self.log_sigma).sum(-1)  # (..., K)
        return torch.logsumexp(log_logistic + self.logits.log_softmax(-1), -1)

    def shared_log_prob(self, z):
        """log_prob of S vectors under one mixture: z (B, S, d), mixtures (B, ...) -> (B, S), nats.
        """
        one_for_all = self._make(part.unsqueeze(1) for part in self)
        return one_for_all.log_prob(z)

    def sample(self, u, eps):
        """eps is standard normal: its quantile in the logistic distribution takes its place."""
        logistic = torch.special.log_ndtr(eps) - torch.special.log_ndtr(-eps)
        return super().sample(u, logistic)


class Model(farmer.Farmer):
    def __init__(self, config):
        super().__init__(config)
        for head in (self.prior.informative, self.prior.redundant):
            if head is not None:  # without a split, or with N(0, I), there is no second one
                head.mixture = Logistics
