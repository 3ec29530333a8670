//! The forward run on shapes: multiply-accumulates, weight bytes, and who reads which activation.
