//! How far quantised tensors lie from the float ones they were made from.

use crate::checkpoint::{Checkpoint, Stored};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What storing a tensor w as w^ lost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distortion {
    /// Mean of |w^ - w|.
    pub mean_abs: f64,
    /// Largest |w^ - w|.
    pub max_abs: f64,
    /// Signal to quantisation noise, 10 log10(sum w^2 / sum (w^ - w)^2), in dB; none where nothing was lost.
    pub sqnr_db: Option<f64>,
}

impl Distortion {
    /// Of two vectors of one length.
    pub fn of(w: &[f32], stored: &[f32]) -> Distortion {
        let (mut sum, mut max, mut noise, mut signal) = (0.0, 0.0f64, 0.0, 0.0);
        for (w, s) in w.iter().zip(stored) {
            let (w, error) = (f64::from(*w), f64::from(*s) - f64::from(*w));
            sum += error.abs();
            max = max.max(error.abs());
            noise += error * error;
            signal += w * w;
        }
        let sqnr_db = (noise > 0.0).then(|| 10.0 * (signal / noise).log10());
        Distortion { mean_abs: sum / w.len().max(1) as f64, max_abs: max, sqnr_db }
    }
}

/// The distortion of every quantised tensor, by its name.
///
/// # Errors
/// `parent` is of another shape.
pub fn distortions(parent: &Checkpoint, child: &Checkpoint) -> Result<BTreeMap<String, Distortion>> {
    if parent.spec != child.spec {
        return Err(Error::invalid(
            "the models differ in shape: distortion is measured against the float model that was quantised",
        ));
    }
    let quantised = child.tensors().filter(|(_, stored)| !matches!(stored, Stored::Float { .. }));
    let one = |(def, _): (crate::spec::TensorDef, &Stored)| {
        let (w, stored) = (parent.values(def.tensor), child.values(def.tensor));
        (def.name, Distortion::of(&w, &stored))
    };
    Ok(quantised.map(one).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_extremes_and_decibels() {
        let d = Distortion::of(&[3.0, -4.0, 0.0, 0.0], &[3.0, -3.5, 0.0, 0.5]);
        assert_eq!((d.mean_abs, d.max_abs), (0.25, 0.5));
        assert!((d.sqnr_db.unwrap_or(0.0) - 10.0 * 50f64.log10()).abs() < 1e-12, "25 / 0.5");
        assert_eq!(Distortion::of(&[1.0], &[1.0]).sqnr_db, None);
        assert_eq!(Distortion::of(&[], &[]).mean_abs, 0.0);
    }
}
