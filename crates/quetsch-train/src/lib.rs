//! Training for Quetsch: a tape over the coarse ops of [`quetsch::ops`], AdamW, and one loop.
//!
//! Fine-tuning, distillation and recovery after pruning differ in the [`Objective`], never in the loop ([`fit()`]).
//! Read [`tape`] first: each op's backward stands beside its forward.

pub mod features;
pub mod fit;
mod layer_map;
pub mod loss;
pub mod optim;
pub mod params;
pub mod qat;
pub mod schedule;
pub mod scores;
pub mod sparse;
pub mod state;
pub mod step;
pub mod student;
pub mod tape;
mod threads;

pub use features::{Features, LayerMap};
pub use fit::{Event, FitError, FitSettings, Fitted, Stop, TrainSet, fit};
pub use loss::{ClassWeights, Hard, Loss, Losses, Measure, Objective, Soft, UNLABELLED};
pub use qat::Qat;
pub use quetsch_kernels::panels::Precision;
pub use schedule::Schedule;
pub use scores::{Criterion, MaskGradients, mask_gradients};
pub use sparse::Sparsity;
pub use state::State;
pub use tape::Dropout;
