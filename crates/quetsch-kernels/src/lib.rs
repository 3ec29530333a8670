//! Numbers on slices: every loop over floats and integers that Quetsch is judged by, and the only home of its `unsafe`.
//!
//! Matrices are row-major slices. Sentences are ragged: `starts[i]..starts[i + 1]` are the rows of sentence `i`.
//! Elementwise kernels are written once as plain Rust and compiled for several instruction sets by `isa::kernel!`;
//! they use no fused multiply-add, so that every tier gives the same bits. f32 matrix products come from `gemm-f32`
//! or from [`panels`]. Attention is written over vectors
//! of f32 (`lanes`): its bits are those of a tier.

#[macro_use]
pub mod isa;
#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
pub mod attention_train;
pub mod four_bit;
mod gelu;
pub mod gemm;
pub mod int8;
mod lanes;
pub mod map;
pub mod math;
pub mod norm;
pub mod optim;
#[cfg(target_arch = "x86_64")]
mod pairs;
pub mod panels;
pub mod peak;
mod prefetch;
pub mod rows;
mod sync;
pub mod team;
#[cfg(test)]
mod team_tests;
#[cfg(target_arch = "x86_64")]
mod vnni;
pub mod watch;
pub mod window;

pub use math::Activation;
pub use rows::Pool;
