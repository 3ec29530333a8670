"""Pruned encoders for transformers 4.57 and 5, written by `quetsch export --layout remote-code`.

config.json lists for every layer the surviving heads and the width of the feed-forward part (`quetsch.layers`); the
modules of a stock model are replaced by narrower ones. Read it before you pass trust_remote_code=True.
"""

from torch import nn
from transformers import (
    AutoModel,
    BertForSequenceClassification,
    BertPreTrainedModel,
    CamembertForSequenceClassification,
    CamembertPreTrainedModel,
    ElectraForSequenceClassification,
    ElectraPreTrainedModel,
    RobertaForSequenceClassification,
    RobertaPreTrainedModel,
    XLMRobertaForSequenceClassification,
    XLMRobertaPreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput


class NoHeads(nn.Module):
    """Self-attention of a layer whose heads are all gone: rows without columns."""

    def __init__(self, hidden):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(hidden, 0) for _ in range(3))

    def forward(self, hidden_states, *_, **__):
        return hidden_states[..., :0], None


def narrow(model):
    """Gives the encoder of a model the widths that its config lists."""
    facts = model.config.quetsch
    dim, hidden = facts["head_dim"], model.config.hidden_size
    for layer, shape in zip(model.base_model.encoder.layer, facts["layers"]):
        heads = len(shape["heads"])
        inner = layer.attention.self
        if heads == 0:
            layer.attention.self = NoHeads(hidden)
        else:
            inner.num_attention_heads, inner.all_head_size = heads, heads * dim
            for name in ("query", "key", "value"):
                setattr(inner, name, nn.Linear(hidden, heads * dim))
        layer.attention.output.dense = nn.Linear(heads * dim, hidden)
        layer.intermediate.dense = nn.Linear(hidden, shape["ffn"])
        layer.output.dense = nn.Linear(shape["ffn"], hidden)


class Narrow:
    """A stock sequence classifier, made narrower."""

    def __init__(self, config):
        super().__init__(config)
        narrow(self)
        self.post_init()


class QuetschBert(Narrow, BertForSequenceClassification):
    pass


class QuetschRoberta(Narrow, RobertaForSequenceClassification):
    pass


class QuetschXLMRoberta(Narrow, XLMRobertaForSequenceClassification):
    pass


class QuetschCamembert(Narrow, CamembertForSequenceClassification):
    pass


class QuetschElectra(Narrow, ElectraForSequenceClassification):
    pass


class Student:
    """An encoder, the mean over its tokens, and a head of two linears."""

    base_model_prefix = "backbone"

    def __init__(self, config):
        super().__init__(config)
        self.num_labels, h = config.num_labels, config.hidden_size
        self.backbone = AutoModel.from_config(config)
        self.head = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(h, h), nn.GELU(), nn.Dropout(0.2), nn.Linear(h, config.num_labels)
        )
        narrow(self)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **_):
        if attention_mask is None:
            attention_mask = input_ids.new_ones(input_ids.shape)
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        x = self.backbone(input_ids, attention_mask=attention_mask, **types).last_hidden_state
        mask = attention_mask[..., None].to(x.dtype)
        logits = self.head((x * mask).sum(1) / mask.sum(1).clamp(min=1e-6))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class QuetschBertStudent(Student, BertPreTrainedModel):
    pass


class QuetschRobertaStudent(Student, RobertaPreTrainedModel):
    pass


class QuetschXLMRobertaStudent(Student, XLMRobertaPreTrainedModel):
    pass


class QuetschCamembertStudent(Student, CamembertPreTrainedModel):
    pass


class QuetschElectraStudent(Student, ElectraPreTrainedModel):
    pass
