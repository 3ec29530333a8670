//! Shapes are data: a model's shape, the one table of its tensors, and the names of places ("sites") in its forward.
//!
//! Pruning changes a [`ModelSpec`] and nothing else about how a model is read, run or written. `head_dim` is stored,
//! never derived from `hidden / heads`, so a layer may keep any number of heads, also none.

use crate::error::{Error, Result};
use crate::family::{Facts, POOLER};
pub use crate::family::{Family, RobertaLike};
pub use quetsch_kernels::{Activation, Pool};

/// One encoder layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Surviving attention heads by ORIGINAL index, ascending; may be empty.
    pub heads: Vec<u16>,
    /// Width of the feed-forward network; may be 0.
    pub ffn: usize,
}

/// What stands on top of the encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadSpec {
    /// A bare body: hidden states are the output.
    None,
    /// `StudentHFModel`: mean pool, `head.1` + GELU, `head.4`.
    MeanMlp {
        /// Number of labels.
        labels: usize,
    },
    /// The family's own `ForSequenceClassification`: first token, a hidden layer (BERT: `pooler.dense` + tanh), last
    /// linear.
    Pooler {
        /// Number of labels.
        labels: usize,
    },
    /// `..ForTokenClassification` of every family: the last linear on every token.
    Tokens {
        /// Number of labels.
        labels: usize,
    },
}

/// How the forward goes from tokens to sentences in a head: pool, hidden layer; the last linear follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadFlow {
    /// How a sentence becomes one row.
    pub pool: Pool,
    /// Whether training drops values in front of the hidden layer.
    pub dropout: bool,
    /// The hidden layer's non-linearity.
    pub activation: Activation,
}

impl HeadSpec {
    /// Number of labels, 0 for a bare body.
    pub fn labels(self) -> usize {
        match self {
            HeadSpec::None => 0,
            HeadSpec::MeanMlp { labels } | HeadSpec::Pooler { labels } | HeadSpec::Tokens { labels } => labels,
        }
    }
}

/// Attention heads of a layer that a model may have.
pub const MOST_HEADS: u16 = 1 << 12;

/// The shape of a whole model: everything that decides which tensors exist and how the forward runs.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The family: names, positions, the stock head.
    pub family: Family,
    /// Prefix of the body's tensor names: the family's own (`bert.`), `backbone.` or empty.
    pub prefix: String,
    /// Rows of the word embedding table.
    pub vocab: usize,
    /// Rows of the position embedding table.
    pub positions: usize,
    /// Rows of the token-type embedding table; 0: there is none.
    pub token_types: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of one attention head.
    pub head_dim: usize,
    /// Heads per layer before any pruning (`num_attention_heads`).
    pub original_heads: u16,
    /// The layers, first to last.
    pub layers: Vec<LayerShape>,
    /// The feed-forward network's non-linearity: GELU or ReLU.
    pub ffn_activation: Activation,
    /// LayerNorm epsilon.
    pub norm_eps: f32,
    /// The classification head.
    pub head: HeadSpec,
    /// A `pooler.dense` that stands in the file but that the forward does not use (`StudentHFModel`, bare bodies).
    pub unused_pooler: bool,
}

/// A linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lin {
    /// From the width of the embeddings to that of the layers (`embeddings_project`), where they differ.
    EmbedProjection,
    /// Attention query of a layer.
    Query(usize),
    /// Attention key of a layer.
    Key(usize),
    /// Attention value of a layer.
    Value(usize),
    /// Attention output (`attention.output.dense`).
    Out(usize),
    /// Feed-forward up (`intermediate.dense`).
    Up(usize),
    /// Feed-forward down (`output.dense`).
    Down(usize),
    /// The head's hidden layer: `head.1`, `pooler.dense`, `pre_classifier` or `classifier.dense`.
    HeadDense,
    /// The last linear: `head.4`, `classifier` or `classifier.out_proj`.
    Classifier,
    /// A pooler that stands in the file and is not used.
    UnusedPooler,
}

/// A LayerNorm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Norm {
    /// After the embeddings.
    Embeddings,
    /// After the attention block of a layer.
    Attention(usize),
    /// After the feed-forward block of a layer.
    Ffn(usize),
}

/// A place in the forward where an activation exists: the key of taps, masks, calibration and input quantisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum At {
    /// After the embedding LayerNorm. `[tokens, embedding width]`
    Embedded,
    /// After the projection of the embeddings, where there is one. `[tokens, hidden]`
    Projected,
    /// q, k and v side by side. `[tokens, 3 * heads * head_dim]`
    Qkv(usize),
    /// Attention output before the output projection. `[tokens, heads * head_dim]`
    Context(usize),
    /// After the attention LayerNorm. `[tokens, hidden]`
    Attended(usize),
    /// After the feed-forward non-linearity. `[tokens, ffn]`
    FfnHidden(usize),
    /// The layer's output. `[tokens, hidden]`
    Hidden(usize),
    /// `[sentences, hidden]`
    Pooled,
    /// `[sentences, hidden]`
    HeadHidden,
    /// `[sentences, labels]`, or `[tokens, labels]` of a head on tokens
    Logits,
}

/// A dropout of the forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DropSite {
    /// After the embeddings (`hidden_dropout_prob`).
    Embedded,
    /// After the attention output projection (`hidden_dropout_prob`).
    Attention(usize),
    /// After the feed-forward down projection (`hidden_dropout_prob`).
    Ffn(usize),
    /// In front of the head's hidden layer ([`HeadFlow::dropout`]).
    HeadIn,
    /// In front of the classifier.
    Classifier,
}

impl Norm {
    /// The place that this LayerNorm writes.
    pub fn at(self) -> At {
        match self {
            Norm::Embeddings => At::Embedded,
            Norm::Attention(l) => At::Attended(l),
            Norm::Ffn(l) => At::Hidden(l),
        }
    }
}

/// The key of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tensor {
    /// Word embeddings. `[vocab, embedding width]`
    Word,
    /// Position embeddings. `[positions, embedding width]`
    Position,
    /// Token-type embeddings. `[token_types, embedding width]`
    TokenType,
    /// LayerNorm weight. `[width]`
    Gamma(Norm),
    /// LayerNorm bias. `[width]`
    Beta(Norm),
    /// Weight of a linear. `[out, in]`
    W(Lin),
    /// Bias of a linear. `[out]`
    B(Lin),
    /// Of training alone, in no model's table: maps a student's activations to its teacher's width. `[to, from]`
    Projection(usize),
    /// Of training alone: logits of the weights of a teacher's layers in what a student's layer learns. `[layers]`
    LayerWeights(usize),
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// An embedding table.
    Embedding,
    /// A LayerNorm's weight or bias.
    Norm,
    /// The weight of a linear: the only role that is quantised by default.
    Weight,
    /// The bias of a linear.
    Bias,
}

/// A row of the table of tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorDef {
    /// The key.
    pub tensor: Tensor,
    /// The name in the file.
    pub name: String,
    /// The shape in the file.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
}

impl TensorDef {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element (a layer without heads).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl ModelSpec {
    /// Width of a layer's attention: heads * head_dim.
    pub fn inner(&self, layer: usize) -> usize {
        self.layers[layer].heads.len() * self.head_dim
    }

    /// Width of the embedding tables: `hidden`, but for ELECTRA.
    pub fn embedding(&self) -> usize {
        match self.family {
            Family::Electra { embedding } => embedding,
            _ => self.hidden,
        }
    }

    /// Whether a projection stands between embeddings and layers.
    pub fn is_projected(&self) -> bool {
        self.embedding() != self.hidden
    }

    /// The longest input in tokens: positions that a text can take.
    pub fn longest(&self) -> usize {
        self.positions.saturating_sub(self.family.unused_positions())
    }

    /// How the forward goes from tokens to sentences; `None` where rows stay tokens.
    pub fn head_flow(&self) -> Option<HeadFlow> {
        let facts = self.family.facts();
        match self.head {
            HeadSpec::None | HeadSpec::Tokens { .. } => None,
            HeadSpec::MeanMlp { .. } => {
                Some(HeadFlow { pool: Pool::Mean, dropout: true, activation: Activation::Gelu })
            }
            HeadSpec::Pooler { .. } => {
                Some(HeadFlow { pool: Pool::First, dropout: facts.head_dropout, activation: facts.head_activation })
            }
        }
    }

    /// (site, out, in) of every linear, in forward order, the unused pooler last.
    pub fn linears(&self) -> Vec<(Lin, usize, usize)> {
        let h = self.hidden;
        let mut t = vec![];
        if self.is_projected() {
            t.push((Lin::EmbedProjection, h, self.embedding()));
        }
        for (l, layer) in self.layers.iter().enumerate() {
            let (inner, ffn) = (self.inner(l), layer.ffn);
            t.extend([Lin::Query(l), Lin::Key(l), Lin::Value(l)].map(|s| (s, inner, h)));
            t.extend([(Lin::Out(l), h, inner), (Lin::Up(l), ffn, h), (Lin::Down(l), h, ffn)]);
        }
        match self.head {
            HeadSpec::None => {}
            HeadSpec::MeanMlp { labels } | HeadSpec::Pooler { labels } => {
                t.extend([(Lin::HeadDense, h, h), (Lin::Classifier, labels, h)]);
            }
            HeadSpec::Tokens { labels } => t.push((Lin::Classifier, labels, h)),
        }
        if self.unused_pooler {
            t.push((Lin::UnusedPooler, h, h));
        }
        t
    }

    /// Every LayerNorm, in forward order.
    pub fn norms(&self) -> Vec<Norm> {
        let layers = (0..self.layers.len()).flat_map(|l| [Norm::Attention(l), Norm::Ffn(l)]);
        std::iter::once(Norm::Embeddings).chain(layers).collect()
    }

    /// The one table of tensors: the only place that knows which tensors exist, their names and their shapes.
    pub fn tensors(&self) -> Vec<TensorDef> {
        let e = self.embedding();
        let mut keys = vec![
            (Tensor::Word, vec![self.vocab, e], Role::Embedding),
            (Tensor::Position, vec![self.positions, e], Role::Embedding),
        ];
        if self.token_types > 0 {
            keys.push((Tensor::TokenType, vec![self.token_types, e], Role::Embedding));
        }
        for n in self.norms() {
            let h = if n == Norm::Embeddings { e } else { self.hidden };
            keys.extend([(Tensor::Gamma(n), vec![h], Role::Norm), (Tensor::Beta(n), vec![h], Role::Norm)]);
        }
        for (s, n, k) in self.linears() {
            keys.extend([(Tensor::W(s), vec![n, k], Role::Weight), (Tensor::B(s), vec![n], Role::Bias)]);
        }
        keys.into_iter()
            .map(|(tensor, shape, role)| TensorDef { tensor, name: self.name(tensor), shape, role })
            .collect()
    }

    /// The name of a tensor in the file.
    pub fn name(&self, tensor: Tensor) -> String {
        let p = &self.prefix;
        match tensor {
            Tensor::Word => format!("{p}embeddings.word_embeddings.weight"),
            Tensor::Position => format!("{p}embeddings.position_embeddings.weight"),
            Tensor::TokenType => format!("{p}embeddings.token_type_embeddings.weight"),
            Tensor::Gamma(n) => format!("{}.weight", self.norm_name(n)),
            Tensor::Beta(n) => format!("{}.bias", self.norm_name(n)),
            Tensor::W(s) => format!("{}.weight", self.module(s)),
            Tensor::B(s) => format!("{}.bias", self.module(s)),
            Tensor::Projection(i) => format!("projection.{i}.weight"),
            Tensor::LayerWeights(i) => format!("layer_weights.{i}"),
        }
    }

    fn norm_name(&self, norm: Norm) -> String {
        let facts = self.family.facts();
        match norm {
            Norm::Embeddings => self.fill("{p}embeddings.LayerNorm", 0),
            Norm::Attention(l) => self.fill(facts.norms[0], l),
            Norm::Ffn(l) => self.fill(facts.norms[1], l),
        }
    }

    /// The module name of a linear in transformers: its tensor names without `.weight` or `.bias`.
    pub fn module(&self, site: Lin) -> String {
        let facts: &Facts = self.family.facts();
        match site {
            Lin::EmbedProjection => self.fill("{p}embeddings_project", 0),
            Lin::Query(l) => self.fill(facts.qkv[0], l),
            Lin::Key(l) => self.fill(facts.qkv[1], l),
            Lin::Value(l) => self.fill(facts.qkv[2], l),
            Lin::Out(l) => self.fill(facts.out, l),
            Lin::Up(l) => self.fill(facts.up_down[0], l),
            Lin::Down(l) => self.fill(facts.up_down[1], l),
            Lin::UnusedPooler => self.fill(POOLER, 0),
            Lin::HeadDense => self.head_name(facts, 0),
            Lin::Classifier => self.head_name(facts, 1),
        }
    }

    fn head_name(&self, facts: &Facts, i: usize) -> String {
        match self.head {
            HeadSpec::MeanMlp { .. } => ["head.1", "head.4"][i].to_owned(),
            HeadSpec::Tokens { .. } => "classifier".to_owned(),
            _ => self.fill(facts.head[i], 0),
        }
    }

    fn fill(&self, name: &str, layer: usize) -> String {
        name.replace("{p}", &self.prefix).replace("{l}", &layer.to_string())
    }

    /// Checks that the numbers can be a model at all, so that nothing behind this door has to.
    pub fn validate(&self) -> Result<()> {
        let bad = |what: String| Err(Error::Invalid(format!("model shape: {what}")));
        let sizes = [
            ("vocab_size", self.vocab, 1 << 24),
            ("max_position_embeddings", self.positions, 1 << 20),
            ("hidden_size", self.hidden, 1 << 16),
            ("embedding_size", self.embedding(), 1 << 16),
            ("head_dim", self.head_dim, 1 << 12),
            ("num_attention_heads", self.original_heads as usize, MOST_HEADS as usize),
        ];
        for (name, value, limit) in sizes {
            if value == 0 || value > limit {
                return bad(format!("{name} is {value}, expected 1 to {limit}"));
            }
        }
        match (self.family, self.token_types) {
            (Family::DistilBert, 0) => {}
            (Family::DistilBert, n) => return bad(format!("{n} token types, but DistilBERT has none")),
            (_, 1..=65536) => {}
            (_, n) => return bad(format!("type_vocab_size is {n}, expected 1 to 65536")),
        }
        if self.longest() == 0 {
            return bad(format!(
                "max_position_embeddings is {}, but positions count from pad_token_id + 1 = {}",
                self.positions,
                self.family.unused_positions()
            ));
        }
        if self.layers.len() > 1 << 10 {
            return bad(format!("num_hidden_layers is {}, expected at most 1024", self.layers.len()));
        }
        for (l, layer) in self.layers.iter().enumerate() {
            if layer.heads.windows(2).any(|w| w[0] >= w[1])
                || layer.heads.last().is_some_and(|&h| h >= self.original_heads)
            {
                return bad(format!(
                    "layer {l} keeps heads {:?}, expected ascending indices below {}",
                    layer.heads, self.original_heads
                ));
            }
            if layer.ffn > 1 << 20 {
                return bad(format!("layer {l} has intermediate size {}, expected at most {}", layer.ffn, 1 << 20));
            }
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return bad(format!("layer_norm_eps is {}, expected a small positive number", self.norm_eps));
        }
        if !matches!(self.ffn_activation, Activation::Gelu | Activation::Relu) {
            return bad(format!("hidden_act is {:?}, expected gelu or relu", self.ffn_activation));
        }
        if self.head != HeadSpec::None && !(1..=1 << 20).contains(&self.head.labels()) {
            return bad(format!("{} labels, expected 1 to {}", self.head.labels(), 1 << 20));
        }
        Ok(())
    }
}
