"""The autoregressive flow is told the class, which in the paper only the AR Transformer knows.

    python train.py --model examples.class_conditional_flow --out runs/conditional
    python train.py --distill runs/conditional --out runs/conditional-student

Every block of the flow receives the labels as an argument, in the inverse and the student as well.
"""
from torch import nn

import farmer
from farmer import PRESETS, TRAINING, Config, Sampling  # noqa: F401  (the scripts look for them)


class ConditionalBlock(farmer.FlowBlock):
    """A flow block that adds an embedding of the class to each token, besides its position."""

    def __init__(self, config, flip):
        super().__init__(config, flip)
        self.classes = nn.Embedding(config.num_classes + 1, config.flow_width)
        nn.init.normal_(self.classes.weight, std=0.5)

    def context(self, labels):
        """labels (B,) -> (B, N, W)."""
        if labels is None:
            classes = self.classes.weight[-1:]  # the null class
        else:
            classes = self.classes(labels)
        return super().context(labels) + classes.unsqueeze(1)


class Model(farmer.Farmer):
    def __init__(self, config):
        super().__init__(config)
        for t, block in enumerate(self.flow.blocks):
            self.flow.blocks[t] = ConditionalBlock(config, block.flip)
