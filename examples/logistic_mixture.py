"""Another distribution of tokens: mixtures of logistics, which have heavier tails than Gaussians.

    python train.py --model examples.logistic_mixture --out runs/logistic

This works because training, guidance by resampling and the likelihood use only a mixture's methods.
"""
import torch
import torch.nn.functional as F

import farmer
from farmer import PRESETS, TRAINING, Config, Sampling  # noqa: F401  (the scripts look for them)


def logistic_noise(*shape, **options):
    """Draws from the standard logistic distribution, with the arguments of torch.randn."""
    return torch.logit(torch.rand(*shape, **options), eps=1e-6)


class Logistics(farmer.GMM):
    """sum_k pi_k prod_channels Logistic(mu_k, exp(log_sigma_k)), in place of Eq. 11."""

    noise = staticmethod(logistic_noise)  # GMM.sample returns mu + sigma eps with eps of this law

    def log_prob(self, z):
        """z (..., d) -> (...) in nats."""
        e = (z.unsqueeze(-2) - self.mu) * torch.exp(-self.log_sigma)  # (..., K, d)
        log_logistic = (-e - 2 * F.softplus(-e) - self.log_sigma).sum(-1)  # (..., K)
        return torch.logsumexp(log_logistic + self.logits.log_softmax(-1), -1)

    def shared_log_prob(self, z):
        """log_prob of T vectors under one mixture: z (B, T, d), mixtures (B, ...) -> (B, T), nats.
        """
        one_for_all = self._make(part.unsqueeze(1) for part in self)
        return one_for_all.log_prob(z)


class Model(farmer.Farmer):
    mixture = Logistics
