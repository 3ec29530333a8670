//! Hooks for [`With`](crate::ops::With): recording and masks.

use crate::ops::{Hook, Inspect};
use crate::spec::At;
use std::collections::BTreeMap;

/// Copies of the activations at the wanted places (golden tests, hidden states of a teacher).
pub struct Record {
    /// Where to look.
    pub want: Vec<At>,
    /// What was there, row-major.
    pub got: BTreeMap<At, Vec<f32>>,
}

impl<O: Inspect> Hook<O> for &mut Record {
    fn at(&mut self, ops: &mut O, at: At, x: O::Act) -> O::Act {
        if self.want.contains(&at) {
            self.got.insert(at, ops.values(&x));
        }
        x
    }
}

/// Head masks at `Context(l)`, channel masks at `FfnHidden(l)`. On the tape each mask is a leaf with a gradient.
pub struct Masks(pub BTreeMap<At, Vec<f32>>);

impl<O: Inspect> Hook<O> for &Masks {
    fn at(&mut self, ops: &mut O, at: At, x: O::Act) -> O::Act {
        match self.0.get(&at) {
            Some(mask) => ops.scale_columns(at, x, mask),
            None => x,
        }
    }
}
