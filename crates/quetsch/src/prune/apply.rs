//! Surgery on checkpoints: every function here is one [`rebuild`] with another list of sources.

use super::groups::{Axis, Kind, coupling, in_layer, unit};
use super::plan::Plan;
use crate::checkpoint::{Checkpoint, Stored};
use crate::error::{Error, Result};
use crate::spec::{LayerShape, ModelSpec};

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
    must_be_float(parent, "prune")?;
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
/// GELU(0) = ReLU(0) = 0).
///
/// # Errors
/// A quantised checkpoint.
pub fn dense(ck: &Checkpoint) -> Result<Checkpoint> {
    must_be_float(ck, "write as a dense layout")?;
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

fn must_be_float(ck: &Checkpoint, what: &str) -> Result<()> {
    match ck.tensors().find(|(_, t)| !matches!(t, Stored::Float { .. })) {
        Some((def, _)) => Err(Error::invalid(format!(
            "cannot {what} a quantised model ({} is quantised): quantise last, from the float checkpoint",
            def.name
        ))),
        None => Ok(()),
    }
}

/// A checkpoint of shape `spec` whose layer `i` is made of the parent's groups that `sources[i]` names.
fn rebuild(parent: &Checkpoint, spec: ModelSpec, sources: &[Source]) -> Result<Checkpoint> {
    let mut child = Checkpoint::from_fn(spec, parent.labels.clone(), |def| {
        let from = in_layer(def.tensor, |l| sources[l].layer);
        let stored = parent.get(from);
        let Some((kind, l, axis)) = coupling(def.tensor) else { return Ok(stored.clone()) };
        let (source, shape) = (&sources[l], &parent.spec.layers[sources[l].layer]);
        let (places, groups) = match kind {
            Kind::Head => (&source.heads, shape.heads.len()),
            Kind::Channel => (&source.ffn, shape.ffn),
        };
        let untouched = places.len() == groups && places.iter().enumerate().all(|(i, p)| *p == Some(i));
        match stored {
            Stored::Float { dtype, data } if !untouched => {
                let unit = unit(&parent.spec, kind);
                let data = match (axis, def.shape.get(1)) {
                    (Axis::Rows, columns) => gather(data, unit * columns.unwrap_or(&1), places),
                    (Axis::Columns, _) => {
                        // One gather per row; a parent without groups has no data to cut into rows.
                        let row =
                            |r: usize| gather(&data[r * groups * unit..(r + 1) * groups * unit], unit, places);
                        (0..def.shape[0]).flat_map(row).collect()
                    }
                };
                Ok(Stored::Float { dtype: *dtype, data })
            }
            _ => Ok(stored.clone()),
        }
    })?;
    child.max_length = parent.max_length;
    child.config = parent.config.clone();
    Ok(child)
}

/// Runs of `run` elements of `x` by position, zeros for `None`.
fn gather(x: &[f32], run: usize, places: &[Option<usize>]) -> Vec<f32> {
    let mut out = Vec::with_capacity(places.len() * run);
    for place in places {
        match place {
            Some(p) => out.extend_from_slice(&x[p * run..(p + 1) * run]),
            None => out.resize(out.len() + run, 0.0),
        }
    }
    out
}
