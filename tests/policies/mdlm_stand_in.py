"""A tiny model with the interface of MDLM's on the hub, whose code comes with the weights."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class StandInConfig(PretrainedConfig):
    model_type = "mdlm_stand_in"

    def __init__(self, vocab_size=9, model_length=16, time_conditioning=True, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.model_length = vocab_size, model_length
        self.time_conditioning = time_conditioning


class StandIn(PreTrainedModel):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, 8))
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, config.vocab_size)
        self.seen = []
        self.post_init()

    def forward(self, input_ids=None, timesteps=None, output_hidden_states=None, return_dict=None):
        self.seen.append(timesteps)
        if not self.config.time_conditioning:
            timesteps = torch.zeros_like(timesteps)
        x = self.embedding[input_ids]
        x = x + self.mix(x).mean(1, keepdim=True) + timesteps[:, None, None]
        return self.head(x)
