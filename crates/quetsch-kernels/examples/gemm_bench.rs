//! int8 products on one thread, GOP/s and share of the CPU's peak: rows by shapes of BERT's linears, and the geometric
//! mean over the shapes at every number of rows.
//!
//!     cargo run --release -p quetsch-kernels --example gemm_bench

use quetsch_kernels::int8::{Matrix, Range, Rows, quantise, stride};
use quetsch_kernels::isa::isa;
use quetsch_kernels::math::Activation;
use quetsch_kernels::peak::{Arithmetic, operations_per_second};
use std::hint::black_box;
use std::time::Instant;

/// Width of input and output.
const SHAPES: [(usize, usize); 5] = [(384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072)];

fn main() {
    let peak = operations_per_second(Arithmetic::Int8, 1);
    println!("{}: {:.0} GOP/s in registers", isa().name(), peak / 1e9);
    for rows in [16, 32, 128, 512] {
        let shares = SHAPES.map(|(k, n)| operations(rows, k, n) / peak);
        let columns = SHAPES
            .iter()
            .zip(&shares)
            .map(|((k, n), share)| format!("{k}->{n} {:.0} ({:.0}%)", share * peak / 1e9, 100.0 * share));
        let mean = (shares.iter().map(|s| s.ln()).sum::<f64>() / shares.len() as f64).exp();
        println!("{rows} rows: {}; mean {:.0}%", columns.collect::<Vec<_>>().join(", "), 100.0 * mean);
    }
}

/// Operations a second, the median of 9 times of some 5 ms.
fn operations(rows: usize, k: usize, n: usize) -> f64 {
    let wave = |i: usize| (i as f32 * 0.37).sin();
    let weights: Vec<i8> = (0..n * k).map(|i| (127.0 * wave(i)) as i8).collect();
    let w = Matrix::new(&weights, vec![0.01; n], k);
    let x: Vec<f32> = (0..rows * k).map(wave).collect();
    let (mut q, mut scale) = (vec![0; rows * stride(k)], vec![0.0; rows]);
    quantise(&x, k, Range::Row, &mut q, &mut scale);
    let (bias, mut out) = (vec![0.5; n], vec![0.0; rows * n]);
    let once = (2 * rows * k * n) as f64;
    let times = (1e9 / once).ceil() as usize;
    let mut rates: Vec<f64> = (0..9)
        .map(|_| {
            let begin = Instant::now();
            for _ in 0..times {
                w.multiply(Rows { q: &q, scale: &scale }, &bias, Activation::Identity, black_box(&mut out), n);
            }
            times as f64 * once / begin.elapsed().as_secs_f64()
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    rates[4]
}
