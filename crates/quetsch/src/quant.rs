//! Quantised tensors and the schemes that make them. How to encode and decode is in `int8` and `four_bit`, both in
//! the layout of bitsandbytes; *where* a scheme applies is an ordered list of (site pattern, scheme).

pub mod four_bit;
pub mod int8;

pub use four_bit::{Absmax, Compute, FourBit, FourBitKind};
pub use int8::{Int8Input, Int8Rows};

use crate::checkpoint::{FloatType, Stored};
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// How a tensor is stored and, for the quantised ones, how its linear computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scheme {
    /// Dense f32.
    F32,
    /// Dense f16.
    F16,
    /// Dense bf16.
    Bf16,
    /// int8 rows, int8 per token at run time.
    Int8,
    /// int8 rows, LLM.int8(): input columns with an element >= threshold stay in float.
    BnbInt8 {
        /// Outlier threshold, 6.0 by default.
        threshold: f32,
    },
    /// 4-bit NormalFloat blocks of 64.
    Nf4 {
        /// Whether the block scales are quantised too.
        double_quant: bool,
        /// What the forward computes in.
        compute: Compute,
    },
    /// 4-bit float blocks of 64.
    Fp4 {
        /// Whether the block scales are quantised too.
        double_quant: bool,
        /// What the forward computes in.
        compute: Compute,
    },
}

impl Scheme {
    /// Every name that [`FromStr`] takes.
    pub const NAMES: [&str; 8] = ["f32", "f16", "bf16", "int8", "int8-dynamic", "bnb-int8", "nf4", "fp4"];

    /// The name, without its options.
    pub fn name(self) -> &'static str {
        match self {
            Scheme::F32 => "f32",
            Scheme::F16 => "f16",
            Scheme::Bf16 => "bf16",
            Scheme::Int8 => "int8",
            Scheme::BnbInt8 { .. } => "bnb-int8",
            Scheme::Nf4 { .. } => "nf4",
            Scheme::Fp4 { .. } => "fp4",
        }
    }

    /// The scheme that a tensor is stored in.
    pub fn of(stored: &Stored) -> Scheme {
        match stored {
            Stored::Float { dtype: FloatType::F32, .. } => Scheme::F32,
            Stored::Float { dtype: FloatType::F16, .. } => Scheme::F16,
            Stored::Float { dtype: FloatType::Bf16, .. } => Scheme::Bf16,
            Stored::Int8(q) => match q.input {
                Int8Input::Dynamic => Scheme::Int8,
                Int8Input::Mixed { threshold } => Scheme::BnbInt8 { threshold },
            },
            Stored::FourBit(q) => {
                let (double_quant, compute) = (matches!(q.absmax, Absmax::Nested { .. }), q.compute);
                match q.kind {
                    FourBitKind::Nf4 => Scheme::Nf4 { double_quant, compute },
                    FourBitKind::Fp4 => Scheme::Fp4 { double_quant, compute },
                }
            }
        }
    }

    /// The float type of a dense scheme.
    pub fn float(self) -> Option<FloatType> {
        match self {
            Scheme::F32 => Some(FloatType::F32),
            Scheme::F16 => Some(FloatType::F16),
            Scheme::Bf16 => Some(FloatType::Bf16),
            _ => None,
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Scheme {
    type Err = Error;

    fn from_str(name: &str) -> Result<Scheme> {
        let (double_quant, compute) = (true, Compute::Bf16);
        Ok(match name {
            "f32" => Scheme::F32,
            "f16" => Scheme::F16,
            "bf16" => Scheme::Bf16,
            "int8" | "int8-dynamic" => Scheme::Int8,
            "bnb-int8" => Scheme::BnbInt8 { threshold: int8::THRESHOLD },
            "nf4" => Scheme::Nf4 { double_quant, compute },
            "fp4" => Scheme::Fp4 { double_quant, compute },
            "int8-static" | "int8-weight" => {
                return Err(Error::invalid(format!("scheme {name} is planned but not built yet; int8 is")));
            }
            _ => {
                let names = Scheme::NAMES.join(", ");
                return Err(Error::invalid(format!("unknown scheme {name:?}, expected one of {names}")));
            }
        })
    }
}
