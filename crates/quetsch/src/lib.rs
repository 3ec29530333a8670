//! BERT-style models of texts and words as data: shapes, checkpoints, pruning surgery, quantisation, CPU inference and
//! evaluation. Start reading at [`ops`] (the one forward) and [`spec`] (the one table of tensors).

pub mod atomic;
pub mod baseline;
pub mod batch;
pub mod checkpoint;
pub mod config;
pub mod cost;
pub mod data;
pub mod dir;
pub mod error;
pub mod family;
pub mod head;
pub mod hooks;
pub mod metrics;
pub mod ops;
pub mod prune;
pub mod quant;
pub mod rng;
pub mod runtime;
pub mod spec;
pub mod task;
pub mod tokenizer;
pub mod vocab;

pub use error::{Error, Result};
