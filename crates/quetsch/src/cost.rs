//! The forward run on shapes: multiply-accumulates, and who reads which activation.

use crate::batch::{Batch, Encoding};
use crate::error::Result;
use crate::ops::{Ops, forward};
use crate::spec::{Activation, At, Lin, ModelSpec, Norm, Pool};
use std::collections::BTreeMap;

/// An activation that is only its shape.
pub struct Shape {
    rows: usize,
    width: usize,
    at: Option<At>,
}

/// Who reads an activation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readers {
    /// The linears.
    pub linears: Vec<Lin>,
    /// Something other than a linear: a residual, attention, pooling.
    pub values: bool,
}

/// What a forward costs.
pub struct CostOps<'s> {
    spec: &'s ModelSpec,
    sizes: BTreeMap<Lin, (usize, usize)>,
    /// Multiply-accumulates of the linears.
    pub linear_macs: u64,
    /// Multiply-accumulates of q k^T and p v.
    pub attention_macs: u64,
    /// Readers by activation.
    pub readers: BTreeMap<At, Readers>,
}

impl<'s> CostOps<'s> {
    /// Runs the forward on a batch of these lengths (in tokens).
    ///
    /// # Errors
    /// A length of 0 or above the position table.
    pub fn run(spec: &'s ModelSpec, lengths: &[usize]) -> Result<CostOps<'s>> {
        let sentences: Vec<Encoding> =
            lengths.iter().map(|n| Encoding { ids: vec![0; *n], types: vec![] }).collect();
        let batch = Batch::new(spec, &sentences)?;
        let sizes = spec.linears().into_iter().map(|(s, n, k)| (s, (n, k))).collect();
        let readers = BTreeMap::new();
        let mut cost = CostOps { spec, sizes, linear_macs: 0, attention_macs: 0, readers };
        forward(&mut cost, spec, &batch);
        Ok(cost)
    }

    /// All multiply-accumulates.
    pub fn macs(&self) -> u64 {
        self.linear_macs + self.attention_macs
    }

    fn read(&mut self, site: Lin, x: &Shape) -> usize {
        let (n, k) = self.sizes[&site];
        assert_eq!(x.width, k, "{site:?}");
        self.linear_macs += (x.rows * n * k) as u64;
        if let Some(at) = x.at {
            self.readers.entry(at).or_default().linears.push(site);
        }
        n
    }

    fn read_values(&mut self, x: &Shape) {
        if let Some(at) = x.at {
            self.readers.entry(at).or_default().values = true;
        }
    }
}

impl Ops for CostOps<'_> {
    type Act = Shape;

    fn embed(&mut self, batch: &Batch) -> Shape {
        Shape { rows: batch.tokens(), width: self.spec.embedding(), at: None }
    }
    fn qkv(&mut self, l: usize, x: &Shape) -> Shape {
        let width = [Lin::Query(l), Lin::Key(l), Lin::Value(l)].map(|s| self.read(s, x)).iter().sum();
        Shape { rows: x.rows, width, at: None }
    }
    fn attention(&mut self, _l: usize, qkv: Shape, batch: &Batch) -> Shape {
        self.read_values(&qkv);
        let inner = qkv.width / 3;
        self.attention_macs += batch.ranges().map(|r| 2 * (r.len() * r.len() * inner) as u64).sum::<u64>();
        Shape { width: inner, at: None, ..qkv }
    }
    fn ffn_up(&mut self, l: usize, x: &Shape) -> Shape {
        Shape { rows: x.rows, width: self.read(Lin::Up(l), x), at: None }
    }
    fn linear(&mut self, site: Lin, x: Shape, _f: Activation) -> Shape {
        Shape { rows: x.rows, width: self.read(site, &x), at: None }
    }
    fn add_norm(&mut self, _site: Norm, x: Shape, residual: Shape) -> Shape {
        self.read_values(&residual);
        assert_eq!((x.rows, x.width), (residual.rows, residual.width));
        Shape { at: None, ..x }
    }
    fn pool(&mut self, _how: Pool, x: Shape, batch: &Batch) -> Shape {
        self.read_values(&x);
        Shape { rows: batch.sentences(), at: None, ..x }
    }
    fn tap(&mut self, at: At, x: Shape) -> Shape {
        Shape { at: Some(at), ..x }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Family, HeadSpec, LayerShape};

    #[test]
    fn macs_and_readers_are_those_by_hand() {
        let layer = |heads: &[u16], ffn| LayerShape { heads: heads.to_vec(), ffn };
        let spec = ModelSpec {
            family: Family::Bert,
            prefix: "bert.".into(),
            vocab: 10,
            positions: 8,
            token_types: 2,
            hidden: 6,
            head_dim: 4,
            original_heads: 3,
            layers: vec![layer(&[0, 2], 5), layer(&[], 7)],
            ffn_activation: Activation::Gelu,
            norm_eps: 1e-12,
            head: HeadSpec::Pooler { labels: 3 },
            unused_pooler: false,
        };
        let cost = CostOps::run(&spec, &[3, 4]).unwrap();
        assert_eq!(cost.linear_macs, 7 * (6 * 8 * 4 + 6 * 5 * 2 + 6 * 7 * 2) + 2 * (36 + 18));
        assert_eq!(cost.attention_macs, 2 * 8 * (9 + 16));
        let both = Readers { linears: vec![Lin::Up(0)], values: true };
        assert_eq!(cost.readers[&At::Attended(0)], both);
        assert_eq!(cost.readers[&At::Hidden(1)], Readers { linears: vec![], values: true });
        assert!(CostOps::run(&spec, &[9]).is_err());
    }
}
