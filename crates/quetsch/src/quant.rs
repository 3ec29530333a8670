//! Quantised tensors and the schemes that make them. How to encode and decode is in `int8` and `four_bit`, both in
//! the layout of bitsandbytes; *where* a scheme applies is an ordered list of (site pattern, scheme).

pub mod four_bit;
pub mod int8;

pub use four_bit::{Absmax, FourBit, FourBitKind};
pub use int8::Int8Rows;
