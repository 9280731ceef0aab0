"""Invert the flow by parallel passes, the Jacobi iteration, instead of token by token.

    python train.py --model examples.jacobi_inverse --out runs/jacobi
    python sample.py runs/jacobi --out samples.png

Eq. 9, x_i = z_i exp(-a(x_<i)) + mu(x_<i), has the form of a fixed point, x = g(x). A pass computes
g(x) for all tokens at once. g is triangular: each pass makes at least one more token exact, so
N - 1 passes always suffice; about 5 to 9 for N = 16, or 10 to 23 for N = 64, get within a
thousandth.

It can win at batch 1, with long sequences, on a GPU: there a step of one token leaves most of the
chip idle. It loses on a CPU and in large batches (12 times slower), where arithmetic is the limit:
a pass costs as much as all steps with a KV cache together, and several passes are needed.

It takes the weights of FARMER: Model(model.config).load_state_dict(model.state_dict()).
"""
import torch

import farmer
from farmer import PRESETS, TRAINING, Config, Sampling  # noqa: F401  (the scripts look for them)

TOLERANCE = 2e-5  # an image has converged when no value moves by more in a pass


class JacobiBlock(farmer.FlowBlock):
    def inverse(self, z, labels=None):
        """z (B, N, d) -> x (B, N, d). Each image stops on its own, whatever else is in the batch.
        """
        z = self.order(z)
        B, N, _ = z.shape
        context = self.context(labels).expand(B, -1, -1)
        x = z.clone()  # the first token is exact, the others are a guess
        active = torch.arange(B, device=z.device)  # the images that have not converged
        for _ in range(N - 1):
            # A wrong guess may overflow, and one NaN would reach all tokens: 0 times NaN is NaN,
            # in masked attention as well.
            guess = x[active].nan_to_num(0.0).clamp(-1e6, 1e6)
            h = self.hidden(guess[:, :-1], context[active, :-1])
            mu, a = self.mu_a(h)
            new = farmer.affine_inverse(z[active, 1:], mu, a)
            x[active, 1:] = new
            converged = (new - guess[:, 1:]).abs().amax((1, 2)) <= TOLERANCE
            active = active[~converged]
            if len(active) == 0:
                break
        return self.unorder(x)


class Model(farmer.Farmer):
    def __init__(self, config):
        super().__init__(config)
        for t, block in enumerate(self.flow.blocks):
            self.flow.blocks[t] = JacobiBlock(config, block.flip)
