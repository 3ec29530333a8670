//! Matrix products for training, in f32 or on bf16 inputs with f32 sums, over operands of 32-bit words.
//!
//! A word is one f32, or two bf16 of neighbouring inner index k, the lower one in the low half. With that, both
//! precisions share one layout and one blocking, and differ in one instruction: `vfmadd231ps` or `vdpbf16ps`.
//!
//! - The left operand A `[m, k]` is row-major: row `i` begins at word `i * row_words(k)`; or it is the transpose of
//!   a right operand, in panels of 16 rows.
//! - The right operand B `[k, n]` lies in panels of 16 columns: `[n / 16][panel_words(k)][16]` words, which for bf16 is
//!   `[n / 16][k / 2][16][2]`: the stream of an AMX tile and the operand of `vdpbf16ps` at once.
//!
//! Padding is zero. Values are rounded to bf16 to nearest, ties to even, by the same integer code on every tier.

use crate::gemm::Write;
use crate::isa::bf16_is_fast;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Isa, bf16_dot, isa};
use crate::prefetch::Ahead;
use crate::window::Window;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::transpose;

/// The inputs' type; sums are f32 in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 32-bit inputs.
    F32,
    /// Inputs rounded to bfloat16.
    Bf16,
}

/// Words in a line of cache, and columns in a panel.
const LINE: usize = 16;
type Block = [[u32; LINE]; LINE];

impl Precision {
    /// `f32` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }

    /// The faster one on this CPU.
    pub fn fastest() -> Precision {
        if bf16_is_fast() { Precision::Bf16 } else { Precision::F32 }
    }

    /// Inner indices in a word.
    fn per_word(self) -> usize {
        match self {
            Precision::F32 => 1,
            Precision::Bf16 => 2,
        }
    }

    /// Words that `k` inner indices take, up to a full line.
    pub fn panel_words(self, k: usize) -> usize {
        k.div_ceil(self.per_word()).next_multiple_of(LINE)
    }

    /// Words from one row of A to the next: an odd number of lines, so that rows do not fall into the same cache sets.
    pub fn row_words(self, k: usize) -> usize {
        ((self.panel_words(k) / LINE) | 1) * LINE
    }

    /// Words of an `[m, k]` left operand.
    pub fn rows_len(self, m: usize, k: usize) -> usize {
        m * self.row_words(k)
    }

    /// Words of a `[k, n]` right operand.
    pub fn panels_len(self, k: usize, n: usize) -> usize {
        n.next_multiple_of(LINE) * self.panel_words(k)
    }
}

/// Rows of floats: row `r` begins at `data[r * stride]`.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The floats.
    pub data: &'a [f32],
    /// From one row to the next.
    pub stride: usize,
}

/// A left operand `[m, k]`.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    words: &'a [u32],
    /// Words from one row to the next, inside a panel for panels.
    row: usize,
    /// Words from one word of a row to the next.
    step: usize,
    /// Words in a panel of 16 rows, if it lies in panels.
    panel: Option<usize>,
}

impl<'a> Left<'a> {
    /// What [`pack_rows`] wrote for an inner length of `k`.
    pub fn rows(words: &'a [u32], p: Precision, k: usize) -> Left<'a> {
        Left { words, row: p.row_words(k), step: 1, panel: None }
    }

    /// The transpose of a right operand `[k, m]`.
    pub fn panels(words: &'a [u32], p: Precision, k: usize) -> Left<'a> {
        Left { words, row: 1, step: LINE, panel: Some(p.panel_words(k) * LINE) }
    }

    /// Rows of f32 as they are.
    pub fn f32_rows(x: Source<'a>) -> Left<'a> {
        // SAFETY: f32 and u32 have the same size and alignment, and every bit pattern is a u32.
        let words = unsafe { std::slice::from_raw_parts(x.data.as_ptr().cast::<u32>(), x.data.len()) };
        Left { words, row: x.stride, step: 1, panel: None }
    }

    /// Columns of f32 rows as they are: the transpose.
    pub fn f32_columns(x: Source<'a>) -> Left<'a> {
        Left { row: 1, step: x.stride, ..Left::f32_rows(x) }
    }

    /// The rows from `r` on; `r` is a multiple of 16.
    pub fn below(self, r: usize) -> Left<'a> {
        Left { words: self.words.get(self.start(r)..).unwrap_or_default(), ..self }
    }

    /// Where row `r` begins.
    fn start(&self, r: usize) -> usize {
        match self.panel {
            None => r * self.row,
            Some(panel) => r / LINE * panel + r % LINE,
        }
    }

    fn holds(&self, m: usize, words: usize) -> bool {
        words == 0 || self.start(m - 1) + (words - 1) * self.step < self.words.len()
    }
}

/// The bits of `x` rounded to bfloat16, in the high half; NaN stays NaN.
#[inline(always)]
fn round(x: f32) -> u32 {
    crate::math::bf16(x).to_bits()
}

#[inline(always)]
fn word(p: Precision, low: f32, high: f32) -> u32 {
    match p {
        Precision::F32 => low.to_bits(),
        Precision::Bf16 => (round(low) >> 16) | round(high),
    }
}

/// 16 words of two rows of floats: `low[j]`, and `high[j]` where a word holds two.
#[inline(always)]
fn words(p: Precision, low: &[f32], high: &[f32]) -> [u32; LINE] {
    match (low.first_chunk::<LINE>(), high.first_chunk::<LINE>()) {
        (Some(low), Some(high)) => std::array::from_fn(|j| word(p, low[j], high[j])),
        (Some(low), None) if p == Precision::F32 => low.map(f32::to_bits),
        _ => std::array::from_fn(|j| {
            let at = |row: &[f32]| row.get(j).copied().unwrap_or(0.0);
            word(p, at(low), at(high))
        }),
    }
}

/// 16 words of one row of floats whose inner index runs along it.
#[inline(always)]
fn words_along(p: Precision, row: &[f32]) -> [u32; LINE] {
    let at = |i: usize| row.get(i).copied().unwrap_or(0.0);
    match p {
        Precision::F32 => match row.first_chunk::<LINE>() {
            Some(row) => row.map(f32::to_bits),
            None => std::array::from_fn(|w| at(w).to_bits()),
        },
        Precision::Bf16 => match row.first_chunk::<{ 2 * LINE }>() {
            Some(row) => std::array::from_fn(|w| word(p, row[2 * w], row[2 * w + 1])),
            None => std::array::from_fn(|w| word(p, at(2 * w), at(2 * w + 1))),
        },
    }
}

kernel! {
    /// A `[m, k]` from rows of floats.
    pub fn pack_rows(p: Precision, x: Source, m: usize, k: usize, out: &mut [u32]) {
        let used = p.panel_words(k);
        for (r, out) in out.chunks_exact_mut(p.row_words(k)).take(m).enumerate() {
            let row = &x.data[r * x.stride..r * x.stride + k];
            for (i, out) in out[..used].as_chunks_mut::<LINE>().0.iter_mut().enumerate() {
                *out = words_along(p, &row[i * LINE * p.per_word()..]);
            }
        }
    }
}

/// Packs B `[k, n]` whose row `i` is the `n` floats `row(i)`.
#[inline(always)]
fn pack_panels_by<'a>(p: Precision, row: impl Fn(usize) -> &'a [f32], k: usize, n: usize, out: &mut [u32]) {
    let panel = p.panel_words(k);
    let row = |i: usize| if i < k { &row(i)[..n] } else { &[][..] };
    for w in 0..panel {
        let (low, high) = match p {
            Precision::F32 => (row(w), &[][..]),
            Precision::Bf16 => (row(2 * w), row(2 * w + 1)),
        };
        for c in (0..n).step_by(LINE) {
            let at = c * panel + w * LINE;
            out[at..at + LINE].copy_from_slice(&words(
                p,
                low.get(c..).unwrap_or_default(),
                high.get(c..).unwrap_or_default(),
            ));
        }
    }
}

#[inline(always)]
fn pack_panels_across_by<'a>(
    p: Precision,
    column: impl Fn(usize) -> &'a [f32],
    k: usize,
    n: usize,
    out: &mut [u32],
    transpose: impl Fn(&mut Block),
) {
    let panel = p.panel_words(k) * LINE;
    for first in (0..if k == 0 { 0 } else { n }).step_by(LINE) {
        let out = &mut out[first * panel / LINE..][..panel];
        for (i, out) in out.as_chunks_mut::<{ LINE * LINE }>().0.iter_mut().enumerate() {
            let mut block: Block = std::array::from_fn(|j| match first + j {
                c if c < n => words_along(p, &column(c)[(i * LINE * p.per_word()).min(k)..k]),
                _ => [0; LINE],
            });
            transpose(&mut block);
            out.copy_from_slice(block.as_flattened());
        }
    }
}

fn transpose_plain(block: &mut Block) {
    let old = *block;
    for (i, row) in block.iter_mut().enumerate() {
        *row = std::array::from_fn(|j| old[j][i]);
    }
}

/// Runs a generic packing compiled for the instruction set in use.
macro_rules! on_every_isa {
    ($name:ident($($arg:expr),*), $plain:expr) => {{
        #[cfg(target_arch = "x86_64")]
        match isa() {
            // SAFETY: `isa()` is at most what this CPU has.
            Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => return unsafe { avx512::$name($($arg),*) },
            // SAFETY: as above.
            Isa::Avx2 => return unsafe { avx2::$name($($arg),*) },
            Isa::Scalar => {}
        }
        $plain
    }};
}

/// B `[k, n]` whose row `i` is the `n` floats `row(i)`.
pub fn pack_panels<'a>(p: Precision, row: impl Fn(usize) -> &'a [f32], k: usize, n: usize, out: &mut [u32]) {
    on_every_isa!(pack_panels(p, row, k, n, out), pack_panels_by(p, row, k, n, out))
}

/// B `[k, n]` whose column `c` is the `k` floats `column(c)`: the transpose.
pub fn pack_panels_across<'a>(
    p: Precision,
    column: impl Fn(usize) -> &'a [f32],
    k: usize,
    n: usize,
    out: &mut [u32],
) {
    on_every_isa!(
        pack_panels_across(p, column, k, n, out),
        pack_panels_across_by(p, column, k, n, out, transpose_plain)
    )
}

/// out `[m, n]` (row stride `stride`) = or += A `[m, k]` B `[k, n]`, on the calling thread. The order of summation does
/// not depend on `m`: a row has the same bits whatever rows stand beside it.
///
/// # Panics
/// When a slice is shorter than the sizes say.
#[allow(clippy::too_many_arguments)] // two operands, a result and their sizes
pub fn multiply(
    p: Precision,
    a: Left,
    b: &[u32],
    m: usize,
    n: usize,
    k: usize,
    out: &mut [f32],
    stride: usize,
    write: Write,
) {
    multiply_into(p, a, b, k, Window::new(out, m, n, stride), write);
}

/// As [`multiply`], into a window of a larger matrix: of `b` the panels of its columns.
///
/// # Panics
/// When a slice is shorter than the sizes say.
pub fn multiply_into(p: Precision, a: Left, b: &[u32], k: usize, mut out: Window, write: Write) {
    let (m, n) = (out.rows(), out.width());
    if m == 0 || n == 0 {
        return;
    }
    let (used, panel) = (k.div_ceil(p.per_word()), p.panel_words(k) * LINE);
    assert!(a.holds(m, used) && p.panels_len(k, n) <= b.len());
    let add = write == Write::Add;
    // A block of A's rows stays in the second-level cache while all panels pass by.
    let block = (BLOCK_WORDS / used.max(1)).next_multiple_of(TALL).min(m);
    #[cfg(target_arch = "x86_64")]
    if p == Precision::Bf16 && isa() == Isa::Amx {
        // SAFETY: `isa()` saw that AMX works, and that implies AVX-512.
        return unsafe { avx512::tiles_of_rows(a, b, k, block, out, add) };
    }
    for first in (0..m).step_by(block) {
        for c in (0..n).step_by(WIDE * LINE) {
            let end = (first + block).min(m);
            let tiles = (end - first).div_ceil(TALL);
            for (i, r) in (first..end).step_by(TALL).enumerate() {
                let t = Tile {
                    a: &a.words[a.start(r)..],
                    a_row: a.row,
                    a_step: a.step,
                    b: &b[c / LINE * panel..],
                    panel,
                    words: used,
                    add,
                    ahead: if c + WIDE * LINE < n {
                        Ahead::of(i, tiles, WIDE, panel / LINE)
                    } else {
                        Ahead::NOTHING
                    },
                };
                t.run(p, &mut out.part(r..(r + TALL).min(end), c..(c + WIDE * LINE).min(n)));
            }
        }
    }
}

/// Rows of a tile of the result; divides the 16 rows of a panel.
const TALL: usize = 8;
/// Panels of a tile of the result: 8 x 3 sums, 3 words of B and one of A fit into 32 vector registers.
const WIDE: usize = 3;
/// Words of A that stay in the cache: 256 KiB.
const BLOCK_WORDS: usize = 1 << 16;

/// What a tile of at most `TALL` rows and `WIDE` panels is computed from; `multiply_into` has checked the sizes.
struct Tile<'a> {
    a: &'a [u32],
    a_row: usize,
    a_step: usize,
    b: &'a [u32],
    panel: usize,
    words: usize,
    add: bool,
    /// What it fetches of the panels that come next.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only x86-64 fetches ahead"))]
    ahead: Ahead,
}

impl Tile<'_> {
    #[inline]
    fn run(&self, p: Precision, out: &mut Window) {
        #[cfg(target_arch = "x86_64")]
        match p {
            // SAFETY: `isa()` is at most what this CPU has, `bf16_dot()` saw its feature; the sizes are checked.
            Precision::F32 if isa() >= Isa::Avx512 => return unsafe { avx512::f32_tile(self, out) },
            // SAFETY: as above.
            Precision::Bf16 if bf16_dot() => return unsafe { avx512::bf16_tile(self, out) },
            _ => {}
        }
        plain_tile(p, self, out);
    }
}

/// Rows of A that the plain tile takes at a time: 4 x 16 sums are eight registers of AVX2.
const LOW: usize = 4;

kernel! {
    /// The twin of the vector tiles, in plain Rust.
    fn plain_tile(p: Precision, t: &Tile, out: &mut Window) {
        for c in (0..out.width()).step_by(LINE) {
            let b = t.b[c / LINE * t.panel..].as_chunks::<LINE>().0;
            for r in (0..out.rows()).step_by(LOW) {
                let rows: [usize; LOW] = std::array::from_fn(|i| (r + i).min(out.rows() - 1) * t.a_row);
                let mut sums = [[0f32; LINE]; LOW];
                for (w, b) in b[..t.words].iter().enumerate() {
                    for (sum, row) in sums.iter_mut().zip(rows) {
                        let a = t.a[row + w * t.a_step];
                        for j in 0..LINE {
                            sum[j] += dot(p, a, b[j]);
                        }
                    }
                }
                for (i, sum) in sums.iter().enumerate().take(out.rows() - r) {
                    out.row(r + i)[c..].iter_mut().zip(sum).for_each(|(o, s)| *o = if t.add { *o + s } else { *s });
                }
            }
        }
    }
}

#[inline(always)]
fn dot(p: Precision, a: u32, b: u32) -> f32 {
    let (low, high) = (|v: u32| f32::from_bits(v << 16), |v: u32| f32::from_bits(v & 0xffff_0000));
    match p {
        Precision::F32 => f32::from_bits(a) * f32::from_bits(b),
        Precision::Bf16 => low(a) * low(b) + high(a) * high(b),
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::Precision;

    #[target_feature(enable = "avx2")]
    pub fn pack_panels<'a>(p: Precision, row: impl Fn(usize) -> &'a [f32], k: usize, n: usize, out: &mut [u32]) {
        super::pack_panels_by(p, row, k, n, out);
    }

    #[target_feature(enable = "avx2")]
    pub fn pack_panels_across<'a>(
        p: Precision,
        column: impl Fn(usize) -> &'a [f32],
        k: usize,
        n: usize,
        out: &mut [u32],
    ) {
        super::pack_panels_across_by(p, column, k, n, out, super::transpose_plain);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Block, LINE, Left, Precision, Tile, WIDE, Window};
    use std::arch::x86_64::*;

    /// 16 x 16 words, in four rounds of shuffles.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn transpose(block: &mut Block) {
        // SAFETY: every row of the block is 64 bytes; the load is unaligned.
        let r: [__m512i; LINE] = std::array::from_fn(|i| unsafe { _mm512_loadu_si512(block[i].as_ptr().cast()) });
        let mut t = r;
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        // After this, lane L of u[4 i + j] holds column 4 L + j of rows 4 i .. 4 i + 3.
        let mut u = t;
        for i in 0..4 {
            let (a, b, c, d) = (t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]);
            u[4 * i] = _mm512_unpacklo_epi64(a, c);
            u[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
            u[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
            u[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
        }
        let mut store = |i: usize, v: __m512i| {
            // SAFETY: as for the loads.
            unsafe { _mm512_storeu_si512(block[i].as_mut_ptr().cast(), v) }
        };
        for j in 0..4 {
            let even = _mm512_shuffle_i32x4::<0x88>(u[j], u[4 + j]);
            let odd = _mm512_shuffle_i32x4::<0xdd>(u[j], u[4 + j]);
            let even2 = _mm512_shuffle_i32x4::<0x88>(u[8 + j], u[12 + j]);
            let odd2 = _mm512_shuffle_i32x4::<0xdd>(u[8 + j], u[12 + j]);
            store(j, _mm512_shuffle_i32x4::<0x88>(even, even2));
            store(4 + j, _mm512_shuffle_i32x4::<0x88>(odd, odd2));
            store(8 + j, _mm512_shuffle_i32x4::<0xdd>(even, even2));
            store(12 + j, _mm512_shuffle_i32x4::<0xdd>(odd, odd2));
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn pack_panels<'a>(p: Precision, row: impl Fn(usize) -> &'a [f32], k: usize, n: usize, out: &mut [u32]) {
        super::pack_panels_by(p, row, k, n, out);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn pack_panels_across<'a>(
        p: Precision,
        column: impl Fn(usize) -> &'a [f32],
        k: usize,
        n: usize,
        out: &mut [u32],
    ) {
        super::pack_panels_across_by(p, column, k, n, out, |b| transpose(b));
    }

    /// bf16 on AMX, whose left tiles are rows: panels are turned first.
    ///
    /// # Safety
    /// AMX works here.
    #[allow(clippy::too_many_arguments)] // as for `multiply`
    #[target_feature(enable = "avx512f")]
    pub unsafe fn tiles_of_rows(a: Left, b: &[u32], k: usize, block: usize, mut out: Window, add: bool) {
        let (p, m, n) = (Precision::Bf16, out.rows(), out.width());
        let words = p.panel_words(k);
        let mut turned = Vec::new();
        let (a, row) = match a.panel {
            None => (a.words, a.row),
            Some(_) => {
                turned.resize(p.panels_len(k, m), 0);
                let panels = a.words.as_chunks::<{ LINE * LINE }>().0.iter().take(turned.len() / (LINE * LINE));
                for (i, panel) in panels.enumerate() {
                    let mut block: Block = std::array::from_fn(|w| std::array::from_fn(|r| panel[w * LINE + r]));
                    transpose(&mut block);
                    let (first, line) = (i / (words / LINE) * LINE, i % (words / LINE) * LINE);
                    for (r, row) in block.iter().enumerate() {
                        turned[(first + r) * words + line..][..LINE].copy_from_slice(row);
                    }
                }
                (&turned[..], words)
            }
        };
        for first in (0..m).step_by(block) {
            let a = &a[first * row..];
            let rows = block.min(m - first);
            // SAFETY: passed on.
            unsafe { crate::amx::bf16(a, row, rows, b, words, out.part(first..first + rows, 0..n), add) };
        }
    }

    /// Calls a tile of constant sizes.
    macro_rules! sizes {
        ($fixed:ident, $t:ident, $out:ident, $rows:expr, $panels:expr, [$($r:literal)*]) => {
            match ($rows, $panels) {
                $(($r, 1) => $fixed::<$r, 1>($t, $out),
                ($r, 2) => $fixed::<$r, 2>($t, $out),
                ($r, WIDE) => $fixed::<$r, WIDE>($t, $out),)*
                _ => unreachable!("at most TALL rows and WIDE panels"),
            }
        };
    }

    macro_rules! tiles {
        ($tile:ident, $fixed:ident, $features:literal, |$sum:ident, $a:ident, $b:ident| $step:expr) => {
            /// # Safety
            /// The features, and slices as long as the sizes in `t` say.
            #[target_feature(enable = $features)]
            pub unsafe fn $tile(t: &Tile, out: &mut Window) {
                // SAFETY: passed on.
                unsafe {
                    sizes!($fixed, t, out, out.rows(), out.width().div_ceil(LINE), [1 2 3 4 5 6 7 8]);
                }
            }

            /// `R` rows times `P` panels.
            ///
            /// # Safety
            /// As above; the tile has these sizes.
            #[target_feature(enable = $features)]
            unsafe fn $fixed<const R: usize, const P: usize>(t: &Tile, out: &mut Window) {
                let mut sums = [[_mm512_setzero_ps(); P]; R];
                let (a_rows, panels) = (t.a.as_ptr(), t.b.as_ptr());
                let mut next = t.ahead.behind(panels.wrapping_add(P * t.panel));
                for w in 0..t.words {
                    // SAFETY: `multiply` checked that A has `words` words in each row and B a whole panel each.
                    let b: [__m512; P] = std::array::from_fn(|p| unsafe {
                        _mm512_loadu_ps(panels.add(p * t.panel + w * LINE).cast())
                    });
                    for r in 0..R {
                        // SAFETY: as above.
                        let $a = unsafe { _mm512_set1_ps(*a_rows.add(r * t.a_row + w * t.a_step).cast::<f32>()) };
                        for p in 0..P {
                            let ($sum, $b) = (sums[r][p], b[p]);
                            sums[r][p] = $step;
                        }
                    }
                    next.fetch::<P>();
                }
                for (r, sums) in sums.iter().enumerate() {
                    for (p, sum) in sums.iter().enumerate() {
                        let c = p * LINE;
                        let mask = u16::MAX >> (LINE - LINE.min(out.width() - c));
                        // SAFETY: the window has `R` rows, and the mask keeps the access inside the row.
                        unsafe {
                            let at = out.as_mut_ptr().add(r * out.stride() + c);
                            let old = if t.add { _mm512_maskz_loadu_ps(mask, at) } else { _mm512_setzero_ps() };
                            _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(old, *sum));
                        }
                    }
                }
            }
        };
    }

    tiles!(f32_tile, f32_fixed, "avx512f", |sum, a, b| _mm512_fmadd_ps(a, b, sum));
    tiles!(bf16_tile, bf16_fixed, "avx512f,avx512bf16", |sum, a, b| {
        // SAFETY: both are 512 bits without invalid patterns.
        unsafe {
            _mm512_dpbf16_ps(
                sum,
                std::mem::transmute::<__m512, __m512bh>(a),
                std::mem::transmute::<__m512, __m512bh>(b),
            )
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::bf16;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| {
                ((i ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32
                    - 1.0
            })
            .collect()
    }

    const SIZES: [(usize, usize, usize); 8] = [
        (1, 1, 1),
        (3, 5, 2),
        (8, 48, 32),
        (9, 49, 33),
        (17, 80, 100),
        (40, 96, 384),
        (7, 130, 65),
        (200, 100, 700),
    ];
    const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];

    /// x [rows, cols] -> [cols, rows]
    fn transposed(x: &[f32], cols: usize) -> Vec<f32> {
        let rows = x.len() / cols;
        (0..x.len()).map(|i| x[i % rows * cols + i / rows]).collect()
    }

    /// Against f64 sums of the rounded inputs: a f32 sum of k products is off by at most about k roundings of the sum
    /// of absolute values.
    fn check(p: Precision, a: &[f32], b: &[f32], (m, n, k): (usize, usize, usize), got: &[f32], stride: usize) {
        let near = |x: f32| f64::from(if p == Precision::Bf16 { bf16(x) } else { x });
        for r in 0..m {
            for c in 0..n {
                let terms = (0..k).map(|i| near(a[r * k + i]) * near(b[i * n + c]));
                let (want, size) = terms.fold((0.0, 0.0), |(s, t), v| (s + v, t + v.abs()));
                let got = f64::from(got[r * stride + c]);
                assert!(
                    (got - want).abs() <= 1e-6 + 2e-7 * size * (k as f64).sqrt(),
                    "{p:?} {m}x{n}x{k}: {got} {want}"
                );
            }
        }
    }

    #[test]
    fn every_packing_gives_the_product_of_rounded_inputs() {
        for (p, (m, n, k)) in BOTH.into_iter().flat_map(|p| SIZES.map(|s| (p, s))) {
            let (a, b) = (noise(m * k, 1), noise(k * n, 2));
            let (a_t, b_t) = (transposed(&a, k), transposed(&b, n));
            let (mut left, mut left_t) = (vec![0; p.rows_len(m, k)], vec![0; p.panels_len(k, m)]);
            pack_rows(p, Source { data: &a, stride: k }, m, k, &mut left);
            pack_panels(p, |i| &a_t[i * m..][..m], k, m, &mut left_t);
            let (mut right, mut right_t) = (vec![0; p.panels_len(k, n)], vec![0; p.panels_len(k, n)]);
            pack_panels(p, |i| &b[i * n..][..n], k, n, &mut right);
            pack_panels_across(p, |c| &b_t[c * k..][..k], k, n, &mut right_t);
            assert!(right == right_t, "{p:?} {k}x{n}");
            let stride = n + 3;
            let mut out = vec![9.0; m * stride];
            multiply(p, Left::rows(&left, p, k), &right, m, n, k, &mut out, stride, Write::Set);
            check(p, &a, &b, (m, n, k), &out, stride);
            assert!(out.chunks(stride).all(|row| row[n..] == [9.0; 3]), "{p:?}: outside the result");
            let once = out.clone();
            multiply(p, Left::rows(&left, p, k), &right, m, n, k, &mut out, stride, Write::Add);
            let twice = |(a, b): (&f32, &f32)| *b == 9.0 && *a == 9.0 || *a == 2.0 * b;
            assert!(out.iter().zip(&once).all(twice), "{p:?}: added");
            let mut other = vec![9.0; m * stride];
            multiply(p, Left::panels(&left_t, p, k), &right, m, n, k, &mut other, stride, Write::Set);
            assert!(other == once, "{p:?}: the transpose of a right operand");
            if p == Precision::F32 {
                let mut plain = vec![9.0; m * stride];
                let rows = Left::f32_rows(Source { data: &a, stride: k });
                multiply(p, rows, &right, m, n, k, &mut plain, stride, Write::Set);
                assert!(plain == once, "rows as they are");
            }
        }
    }

    /// The vector tiles against their twin.
    #[test]
    fn tiles_are_the_plain_tile() {
        for (p, k) in BOTH.into_iter().flat_map(|p| [1, 31, 64, 385].map(|k| (p, k))) {
            let (m, n) = (TALL, WIDE * LINE);
            let (a, b) = (noise(m * k, 3), noise(k * n, 4));
            let (mut left, mut right) = (vec![0; p.rows_len(m, k)], vec![0; p.panels_len(k, n)]);
            pack_rows(p, Source { data: &a, stride: k }, m, k, &mut left);
            pack_panels(p, |i| &b[i * n..][..n], k, n, &mut right);
            for (rows, cols) in [(TALL, WIDE * LINE), (5, 17), (1, 1)] {
                let t = Tile {
                    a: &left,
                    a_row: p.row_words(k),
                    a_step: 1,
                    b: &right,
                    panel: p.panel_words(k) * LINE,
                    words: k.div_ceil(p.per_word()),
                    add: false,
                    ahead: Ahead::NOTHING,
                };
                let (mut got, mut want) = (vec![0f32; m * n], vec![0f32; m * n]);
                t.run(p, &mut Window::new(&mut got, rows, cols, n));
                plain_tile(p, &t, &mut Window::new(&mut want, rows, cols, n));
                let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 2e-5, "{p:?} {rows}x{cols}x{k}: {worst}");
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        let p = Precision::Bf16;
        for bad in [f32::NAN, f32::INFINITY, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)] {
            let mut left = vec![0; p.rows_len(1, 2)];
            pack_rows(p, Source { data: &[1.0, bad], stride: 2 }, 1, 2, &mut left);
            assert!(!f32::from_bits(left[0] & 0xffff_0000).is_finite());
        }
    }

    #[test]
    #[should_panic(expected = "assertion")]
    fn short_operands_are_refused() {
        let p = Precision::F32;
        multiply(p, Left::rows(&[0; 16], p, 16), &[0; 255], 1, 16, 16, &mut [0.0; 16], 16, Write::Set);
    }
}
