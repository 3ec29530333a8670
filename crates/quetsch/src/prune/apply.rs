//! Surgery on checkpoints: every function here is one [`rebuild`] with another list of sources.

use super::groups::{Axis, Kind, coupling, in_layer, unit};
use super::plan::Plan;
use crate::checkpoint::{Checkpoint, Stored};
use crate::error::{Error, Result};
use crate::quant::Int8Rows;
use crate::spec::{LayerShape, Lin, ModelSpec, Tensor};

/// Where a layer of the result comes from: a layer of the parent and, place by place, the parent's positions of heads
/// and channels; `None` is a group of zeros.
struct Source {
    layer: usize,
    heads: Vec<Option<usize>>,
    ffn: Vec<Option<usize>>,
}

impl Source {
    /// All of a layer.
    fn whole(parent: &ModelSpec, layer: usize) -> Source {
        let shape = &parent.layers[layer];
        Source { layer, heads: (0..shape.heads.len()).map(Some).collect(), ffn: (0..shape.ffn).map(Some).collect() }
    }
}

/// Removes what the plan says. The result has the parent's float types, labels and configuration.
///
/// # Errors
/// A plan that does not fit ([`Plan::child`]) or a quantised parent.
pub fn apply(parent: &Checkpoint, plan: &Plan) -> Result<Checkpoint> {
    if let Some((def, _)) = parent.tensors().find(|(_, t)| !matches!(t, Stored::Float { .. })) {
        return Err(Error::invalid(format!(
            "cannot prune a quantised model ({} is quantised): quantise last, from the float checkpoint",
            def.name
        )));
    }
    let spec = plan.child(&parent.spec)?;
    let sources = plan.kept_layers().into_iter().map(|l| {
        let mut source = Source::whole(&parent.spec, l);
        let heads = &parent.spec.layers[l].heads;
        source.heads.retain(|p| p.is_some_and(|p| !plan.heads[l].contains(&heads[p])));
        source.ffn.retain(|p| p.is_some_and(|p| plan.ffn[l].binary_search(&p).is_err()));
        source
    });
    rebuild(parent, spec, &sources.collect::<Vec<_>>())
}

/// The model with these layers of the parent, in this order: a student made from its teacher, or layer dropping.
///
/// # Errors
/// No layer, an unknown one, or one twice.
pub fn keep_layers(parent: &Checkpoint, layers: &[usize]) -> Result<Checkpoint> {
    let n = parent.spec.layers.len();
    if layers.is_empty() {
        return Err(Error::invalid(format!("no layer to keep: name some of 0 to {}", n.saturating_sub(1))));
    }
    for (i, l) in layers.iter().enumerate() {
        if *l >= n {
            return Err(Error::invalid(format!("cannot keep layer {l}: the model has {n} layers, counted from 0")));
        }
        if layers[..i].contains(l) {
            return Err(Error::invalid(format!("layer {l} is listed twice among the layers to keep")));
        }
    }
    let sources: Vec<Source> = layers.iter().map(|&l| Source::whole(&parent.spec, l)).collect();
    let shapes = layers.iter().map(|&l| parent.spec.layers[l].clone()).collect();
    rebuild(parent, ModelSpec { layers: shapes, ..parent.spec.clone() }, &sources)
}

/// The `dense` layout, a plain BERT that computes the same: pruned heads come back as zero rows of q, k, v and zero
/// columns of the attention output, uneven feed-forward networks are padded with zeros to the widest (exact, because
/// GELU(0) = ReLU(0) = 0). int8 rows keep their codes; the blocks of a 4-bit weight run across heads and channels, so
/// one that changes comes out decoded, in its source type.
///
/// # Errors
/// None for a checkpoint whose spec is valid.
pub fn dense(ck: &Checkpoint) -> Result<Checkpoint> {
    let widest = ck.spec.layers.iter().map(|s| s.ffn).max().unwrap_or(0);
    let all: Vec<u16> = (0..ck.spec.original_heads).collect();
    let sources = ck.spec.layers.iter().enumerate().map(|(layer, shape)| Source {
        layer,
        heads: all.iter().map(|h| shape.heads.binary_search(h).ok()).collect(),
        ffn: (0..widest).map(|c| (c < shape.ffn).then_some(c)).collect(),
    });
    let shapes = vec![LayerShape { heads: all.clone(), ffn: widest }; ck.spec.layers.len()];
    rebuild(ck, ModelSpec { layers: shapes, ..ck.spec.clone() }, &sources.collect::<Vec<_>>())
}

/// The `compact` layout, [`dense`] undone: heads and channels that are exactly zero are taken out, and no answer
/// changes. Zero is what the group writes (the columns of the attention output, of the down projection) and what is
/// multiplied by it (values; up projection): then not even the range of a quantised input changes. What queries and keys
/// of such a head are plays no part. Tensors as in [`dense`].
///
/// # Errors
/// As [`dense`].
pub fn compact(ck: &Checkpoint) -> Result<Checkpoint> {
    let sources = (0..ck.spec.layers.len()).map(|l| {
        let mut source = Source::whole(&ck.spec, l);
        let through = |first, last| [Tensor::W(first), Tensor::B(first), Tensor::W(last)];
        let heads = zeros(ck, Kind::Head, l, through(Lin::Value(l), Lin::Out(l)));
        let channels = zeros(ck, Kind::Channel, l, through(Lin::Up(l), Lin::Down(l)));
        source.heads.retain(|p| p.is_some_and(|p| !heads[p]));
        source.ffn.retain(|p| p.is_some_and(|p| !channels[p]));
        source
    });
    let sources: Vec<Source> = sources.collect();
    let shape = |s: &Source| LayerShape {
        heads: s.heads.iter().flatten().map(|p| ck.spec.layers[s.layer].heads[*p]).collect(),
        ffn: s.ffn.len(),
    };
    let layers = sources.iter().map(shape).collect();
    rebuild(ck, ModelSpec { layers, ..ck.spec.clone() }, &sources)
}

/// Position by position, whether all that a group has in these tensors is zero.
fn zeros(ck: &Checkpoint, kind: Kind, layer: usize, tensors: [Tensor; 3]) -> Vec<bool> {
    let (n, unit) = (groups(&ck.spec.layers[layer], kind), unit(&ck.spec, kind));
    let mut zero = vec![true; n];
    for tensor in tensors {
        let rows = coupling(tensor).is_some_and(|(_, _, axis)| axis == Axis::Rows);
        let values = ck.values(tensor);
        for (i, _) in values.iter().enumerate().filter(|(_, x)| **x != 0.0) {
            let line = if rows { i / (values.len() / (n * unit)) } else { i % (n * unit) };
            zero[line / unit] = false;
        }
    }
    zero
}

fn groups(shape: &LayerShape, kind: Kind) -> usize {
    match kind {
        Kind::Head => shape.heads.len(),
        Kind::Channel => shape.ffn,
    }
}

/// A checkpoint of shape `spec` whose layer `i` is made of the parent's groups that `sources[i]` names.
fn rebuild(parent: &Checkpoint, spec: ModelSpec, sources: &[Source]) -> Result<Checkpoint> {
    let mut child = Checkpoint::from_fn(spec, parent.labels.clone(), |def| {
        let from = in_layer(def.tensor, |l| sources[l].layer);
        let stored = parent.get(from);
        let Some((kind, l, axis)) = coupling(def.tensor) else { return Ok(stored.clone()) };
        let (source, unit) = (&sources[l], unit(&parent.spec, kind));
        let groups = groups(&parent.spec.layers[source.layer], kind);
        let places = match kind {
            Kind::Head => &source.heads,
            Kind::Channel => &source.ffn,
        };
        if places.len() == groups && places.iter().enumerate().all(|(i, p)| *p == Some(i)) {
            return Ok(stored.clone());
        }
        // Rows are one run of groups, columns one in every row.
        let (runs, size) = match axis {
            Axis::Rows => (1, unit * def.shape.get(1).unwrap_or(&1)),
            Axis::Columns => (def.shape[0], unit),
        };
        let floats = |x: &[f32]| gather(x, runs, groups, size, places);
        Ok(match stored {
            Stored::Float { dtype, data } => Stored::Float { dtype: *dtype, data: floats(data) },
            Stored::Int8(q) => Stored::Int8(Int8Rows {
                values: gather(&q.values, runs, groups, size, places),
                scb: match axis {
                    Axis::Rows => gather(&q.scb, 1, groups, unit, places),
                    Axis::Columns => q.scb.clone(),
                },
                input: q.input,
            }),
            Stored::FourBit(q) => Stored::Float { dtype: q.source, data: floats(&q.dequantise()) },
        })
    })?;
    child.max_length = parent.max_length;
    child.config = parent.config.clone();
    Ok(child)
}

/// `x` is `runs` times `groups` groups of `size` elements: of every run the groups in these places, zeros for `None`.
fn gather<T: Copy + Default>(x: &[T], runs: usize, groups: usize, size: usize, places: &[Option<usize>]) -> Vec<T> {
    let mut out = Vec::with_capacity(runs * places.len() * size);
    for first in (0..runs).map(|r| r * groups) {
        for place in places {
            match place {
                Some(p) => out.extend_from_slice(&x[(first + p) * size..][..size]),
                None => out.resize(out.len() + size, T::default()),
            }
        }
    }
    out
}
