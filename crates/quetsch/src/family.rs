//! Families of post-LayerNorm encoders that share the one forward. What differs between them is data: names, keys of
//! `config.json`, the rule of positions, the stock head, the width of the embeddings.

use quetsch_kernels::Activation;

/// A family of encoders, with what only that family can vary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Family {
    /// BERT (Devlin et al. 2019), Chinese BERT included.
    #[default]
    Bert,
    /// DistilBERT (Sanh et al. 2019): no token types.
    DistilBert,
    /// RoBERTa (Liu et al. 2019) and what is built like it: positions count from `pad` + 1.
    Roberta {
        /// Which of them: they compute the same.
        of: RobertaLike,
        /// The padding token (`pad_token_id`).
        pad: u32,
    },
    /// ELECTRA (Clark et al. 2020): embeddings may be narrower than the layers; a projection stands between.
    Electra {
        /// Width of the embedding tables (`embedding_size`).
        embedding: usize,
    },
}

/// The model types that are RoBERTa under other names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RobertaLike {
    /// `roberta`
    Roberta,
    /// `xlm-roberta` (Conneau et al. 2020)
    XlmRoberta,
    /// `camembert` (Martin et al. 2020)
    Camembert,
}

/// A row of the table of families. In tensor names `{p}` stands for the body's prefix, `{l}` for the layer.
#[derive(Debug, PartialEq, Eq)]
pub struct Facts {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// What transformers' class names start with.
    pub class: &'static str,
    /// The body's prefix under a stock head.
    pub prefix: &'static str,

    /// Keys of config.json, each with what transformers takes where it is missing.
    pub hidden: (&'static str, usize),
    /// Number of layers.
    pub layers: (&'static str, usize),
    /// Heads per layer.
    pub heads: (&'static str, usize),
    /// Feed-forward width.
    pub ffn: (&'static str, usize),
    /// Feed-forward non-linearity.
    pub activation: &'static str,
    /// LayerNorm's epsilon; `None`: 1e-12, fixed in the code of transformers.
    pub norm_eps: Option<&'static str>,

    /// Module names of a layer: query, key, value.
    pub qkv: [&'static str; 3],
    /// Attention output.
    pub out: &'static str,
    /// Feed-forward up and down.
    pub up_down: [&'static str; 2],
    /// LayerNorms after attention and after the feed-forward network.
    pub norms: [&'static str; 2],
    /// The stock head's hidden layer and its last linear.
    pub head: [&'static str; 2],
    /// The non-linearity between the two.
    pub head_activation: Activation,
    /// Whether training drops values in front of the head's hidden layer, too.
    pub head_dropout: bool,
}

/// The pooler's name, used by the stock head of BERT alone; other families' files may hold one that is not used.
pub const POOLER: &str = "{p}pooler.dense";

const BERT: Facts = Facts {
    model_type: "bert",
    class: "Bert",
    prefix: "bert.",
    hidden: ("hidden_size", 768),
    layers: ("num_hidden_layers", 12),
    heads: ("num_attention_heads", 12),
    ffn: ("intermediate_size", 3072),
    activation: "hidden_act",
    norm_eps: Some("layer_norm_eps"),
    qkv: [
        "{p}encoder.layer.{l}.attention.self.query",
        "{p}encoder.layer.{l}.attention.self.key",
        "{p}encoder.layer.{l}.attention.self.value",
    ],
    out: "{p}encoder.layer.{l}.attention.output.dense",
    up_down: ["{p}encoder.layer.{l}.intermediate.dense", "{p}encoder.layer.{l}.output.dense"],
    norms: ["{p}encoder.layer.{l}.attention.output.LayerNorm", "{p}encoder.layer.{l}.output.LayerNorm"],
    head: [POOLER, "classifier"],
    head_activation: Activation::Tanh,
    head_dropout: false,
};

const DISTILBERT: Facts = Facts {
    model_type: "distilbert",
    class: "DistilBert",
    prefix: "distilbert.",
    hidden: ("dim", 768),
    layers: ("n_layers", 6),
    heads: ("n_heads", 12),
    ffn: ("hidden_dim", 3072),
    activation: "activation",
    norm_eps: None,
    qkv: [
        "{p}transformer.layer.{l}.attention.q_lin",
        "{p}transformer.layer.{l}.attention.k_lin",
        "{p}transformer.layer.{l}.attention.v_lin",
    ],
    out: "{p}transformer.layer.{l}.attention.out_lin",
    up_down: ["{p}transformer.layer.{l}.ffn.lin1", "{p}transformer.layer.{l}.ffn.lin2"],
    norms: ["{p}transformer.layer.{l}.sa_layer_norm", "{p}transformer.layer.{l}.output_layer_norm"],
    head: ["pre_classifier", "classifier"],
    head_activation: Activation::Relu,
    head_dropout: false,
};

const ROBERTA: Facts = Facts {
    model_type: "roberta",
    class: "Roberta",
    prefix: "roberta.",
    head: ["classifier.dense", "classifier.out_proj"],
    head_dropout: true,
    ..BERT
};

const XLM_ROBERTA: Facts = Facts { model_type: "xlm-roberta", class: "XLMRoberta", ..ROBERTA };
const CAMEMBERT: Facts = Facts { model_type: "camembert", class: "Camembert", ..ROBERTA };

const ELECTRA: Facts = Facts {
    model_type: "electra",
    class: "Electra",
    prefix: "electra.",
    hidden: ("hidden_size", 256),
    heads: ("num_attention_heads", 4),
    ffn: ("intermediate_size", 1024),
    head_activation: Activation::Gelu,
    ..ROBERTA
};

/// `model_type`s that can be read.
pub const MODEL_TYPES: [&str; 6] = [
    BERT.model_type,
    DISTILBERT.model_type,
    ROBERTA.model_type,
    XLM_ROBERTA.model_type,
    CAMEMBERT.model_type,
    ELECTRA.model_type,
];

impl Family {
    /// The family of a `model_type`, with what its config says otherwise: `pad_token_id`, `embedding_size`.
    pub fn of(model_type: &str, pad: u32, embedding: usize) -> Option<Family> {
        let roberta = |of| Family::Roberta { of, pad };
        Some(match model_type {
            "bert" => Family::Bert,
            "distilbert" => Family::DistilBert,
            "roberta" => roberta(RobertaLike::Roberta),
            "xlm-roberta" => roberta(RobertaLike::XlmRoberta),
            "camembert" => roberta(RobertaLike::Camembert),
            "electra" => Family::Electra { embedding },
            _ => return None,
        })
    }

    /// The family's row.
    pub fn facts(self) -> &'static Facts {
        match self {
            Family::Bert => &BERT,
            Family::DistilBert => &DISTILBERT,
            Family::Roberta { of: RobertaLike::Roberta, .. } => &ROBERTA,
            Family::Roberta { of: RobertaLike::XlmRoberta, .. } => &XLM_ROBERTA,
            Family::Roberta { of: RobertaLike::Camembert, .. } => &CAMEMBERT,
            Family::Electra { .. } => &ELECTRA,
        }
    }

    /// Whether the token types of an encoding reach the model: transformers gives none to the others.
    pub fn reads_types(self) -> bool {
        matches!(self, Family::Bert | Family::Electra { .. })
    }

    /// Rows of the position table that no token of a text takes.
    pub fn unused_positions(self) -> usize {
        match self {
            Family::Roberta { pad, .. } => pad as usize + 1,
            _ => 0,
        }
    }

    /// The positions of a sentence's tokens. RoBERTa counts from `pad` + 1 and passes over padding tokens, which a
    /// text may spell out, too: they all stand at `pad`.
    pub fn positions(self, ids: &[u32]) -> impl Iterator<Item = u32> {
        let (mut next, padding) = match self {
            Family::Roberta { pad, .. } => (pad + 1, Some(pad)),
            _ => (0, None),
        };
        ids.iter().map(move |id| {
            if padding == Some(*id) {
                return *id;
            }
            next += 1;
            next - 1
        })
    }
}

impl Facts {
    /// Whether the stock head goes through the pooler, so that a bare body may bring it.
    pub fn head_is_pooler(&self) -> bool {
        self.head[0] == POOLER
    }
}
