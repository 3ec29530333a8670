"""The student of the reference recipe as a transformers (4.57) class: `backbone`, masked mean pooling, two-layer `head`;
heads are pruned as config.student_pruned_heads says. transformers 5 has no head pruning."""

import logging

import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

logging.disable(logging.WARNING)


class StudentHFModel(BertPreTrainedModel):
    config_class, base_model_prefix = BertConfig, "backbone"

    def __init__(self, config, **_):
        super().__init__(config)
        self.backbone = AutoModel.from_config(config)
        pruned = getattr(config, "student_pruned_heads", None) or {}
        for layer, heads in pruned.items():
            if heads:
                self.backbone.encoder.layer[int(layer)].attention.prune_heads(set(map(int, heads)))
        width = config.hidden_size
        self.head = nn.Sequential(
            nn.Dropout(0.2),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(width, config.num_labels),
        )
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **_):
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=torch.finfo(hidden.dtype).tiny)
        return SequenceClassifierOutput(logits=self.head(pooled))
