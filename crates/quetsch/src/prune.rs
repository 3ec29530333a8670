//! Structured pruning: score, plan, apply.
//!
//! The unit is the *group* of coupled slices, which leaves the shapes consistent when it goes: an attention head (rows
//! of query, key and value weights and biases, columns of the attention output), a feed-forward channel (row and bias
//! of the up projection, column of the down projection), a whole layer. Scores come from the weights ([`magnitude`],
//! L1 or L2; Li et al. 2017) or from outside, such as gradients of a head mask (Michel et al. 2019). [`plan`] is pure
//! and its [`Plan`] can be printed, stored and edited; [`apply`] only slices.
//!
//! [`search()`] fills a budget with heads and channels together ([`search_latency`]: one of measured time), [`tune`] fits
//! what is left to what was there.
//!
//! The law that proves the surgery: *masking the groups ([`masks`]), then forward == applying the plan, then forward*.

mod apply;
mod budget;
mod calibrate;
mod diff;
mod groups;
mod latency;
mod plan;
mod scores;
mod search;
mod sparse;

pub use apply::{apply, compact, dense, keep_layers};
pub use budget::{Amount, Budget, ByLayer, Cut, Scope};
pub use calibrate::{Tune, activation, tune};
pub use diff::{PlanDiff, Removed, diff};
pub use latency::{LatencyTable, TABLE_VERSION, Timing, measure as measure_latency, search_latency};
pub use plan::{Parent, ParentLayer, Plan, VERSION, fingerprint, masks, plan};
pub use scores::{Magnitude, Scores, magnitude};
pub use search::{Costs, Keep, rearrange, search};
pub use sparse::{sparse, sparse_sites, sparsify, sparsity};

#[cfg(test)]
mod tests;
