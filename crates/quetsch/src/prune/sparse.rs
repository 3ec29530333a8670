//! Unstructured pruning: single weights, the smallest by magnitude (L1; Han et al. 2015). Shapes stay, so nothing runs
//! faster; a file of zeros compresses.

use super::budget::Scope;
use crate::checkpoint::{Checkpoint, Stored};
use crate::error::{Error, Result};
use crate::spec::{Lin, ModelSpec, Tensor};

/// The matrices that lose single weights: those of the layers. Embeddings, head, biases and LayerNorms stay.
pub fn sparse_sites(spec: &ModelSpec) -> Vec<Lin> {
    let in_layer = |s: &Lin| {
        matches!(s, Lin::Query(_) | Lin::Key(_) | Lin::Value(_) | Lin::Out(_) | Lin::Up(_) | Lin::Down(_))
    };
    spec.linears().into_iter().map(|(s, ..)| s).filter(in_layer).collect()
}

/// Sets the `share` of the weights with the smallest magnitude to 0, of each matrix or of all together, ties by place;
/// weights that are 0 already count. The number is rounded to the nearest.
///
/// # Errors
/// A share outside 0 to 1.
pub fn sparsify(weights: &mut [&mut [f32]], share: f64, scope: Scope) -> Result<()> {
    if !(0.0..=1.0).contains(&share) {
        return Err(Error::invalid(format!("the share of weights to set to zero is {share}, expected 0 to 1")));
    }
    let zero = |weights: &mut [&mut [f32]]| {
        let n: usize = weights.iter().map(|w| w.len()).sum();
        let k = (share * n as f64).round() as usize;
        if k == 0 {
            return;
        }
        let mut sizes: Vec<f32> = weights.iter().flat_map(|w| w.iter().map(|v| v.abs())).collect();
        let limit = *sizes.select_nth_unstable_by(k - 1, f32::total_cmp).1;
        let below = weights.iter().flat_map(|w| w.iter()).filter(|v| v.abs() < limit).count();
        let mut ties = k - below;
        for v in weights.iter_mut().flat_map(|w| w.iter_mut()) {
            if v.abs() < limit {
                *v = 0.0;
            } else if v.abs() == limit && ties > 0 {
                (*v, ties) = (0.0, ties - 1);
            }
        }
    };
    match scope {
        Scope::Global => zero(weights),
        Scope::PerLayer => weights.chunks_mut(1).for_each(zero),
    }
    Ok(())
}

/// [`sparsify`] on a checkpoint; [`Scope::PerLayer`] is matrix by matrix.
///
/// # Errors
/// A share outside 0 to 1, or a quantised checkpoint.
pub fn sparse(ck: &Checkpoint, share: f64, scope: Scope) -> Result<Checkpoint> {
    let mut thin = ck.clone();
    let sites = sparse_sites(&ck.spec);
    let mut stored = vec![];
    for site in &sites {
        match ck.get(Tensor::W(*site)) {
            Stored::Float { dtype, data } => stored.push((*dtype, data.clone())),
            _ => {
                return Err(Error::invalid(
                    "cannot set single weights of a quantised model to zero: quantise last",
                ));
            }
        }
    }
    let mut all: Vec<&mut [f32]> = stored.iter_mut().map(|(_, d)| d.as_mut_slice()).collect();
    sparsify(&mut all, share, scope)?;
    for (site, (dtype, data)) in sites.into_iter().zip(stored) {
        thin.set(Tensor::W(site), Stored::Float { dtype, data });
    }
    Ok(thin)
}

/// The share of zeros of every linear's weight.
pub fn sparsity(ck: &Checkpoint) -> Vec<(Lin, f64)> {
    let share = |site: Lin| {
        let w = ck.values(Tensor::W(site));
        w.iter().filter(|v| **v == 0.0).count() as f64 / w.len().max(1) as f64
    };
    ck.spec.linears().into_iter().map(|(s, ..)| (s, share(s))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_go() {
        let (a, b) = ([3.0, -1.0, 0.0, 2.0], [0.5, -0.5, 4.0, 0.5]);
        let run = |share, scope| {
            let (mut a, mut b) = (a, b);
            sparsify(&mut [&mut a, &mut b], share, scope).map(|()| (a, b))
        };
        let rows = [
            (0.0, Scope::Global, a, b),
            (0.25, Scope::Global, [3.0, -1.0, 0.0, 2.0], [0.0, -0.5, 4.0, 0.5]),
            (0.5, Scope::Global, [3.0, -1.0, 0.0, 2.0], [0.0, 0.0, 4.0, 0.0]),
            (0.5, Scope::PerLayer, [3.0, 0.0, 0.0, 2.0], [0.0, 0.0, 4.0, 0.5]),
            (0.75, Scope::PerLayer, [3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 4.0, 0.0]),
            (1.0, Scope::Global, [0.0; 4], [0.0; 4]),
        ];
        for (share, scope, a, b) in rows {
            assert_eq!(run(share, scope).unwrap(), (a, b), "{share} {scope:?}");
        }
        assert!(run(1.5, Scope::Global).is_err() && run(f64::NAN, Scope::Global).is_err());
    }
}
