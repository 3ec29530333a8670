//! Intel AMX: products of tiles of 16 rows by 64 bytes, int8 into i32 and bf16 into f32.
//!
//! The intrinsics are not stable, so the instructions stand in `asm!`. The whole loop over the inner index, from
//! `tilezero` to `tilestored`, is one block: no tile outlives it. Only the tile shapes (`ldtilecfg`) stay for one
//! product. Instructions, shapes and the order of sums: Intel 64 and IA-32 Software Developer's Manual, volume 1,
//! chapter 18, and volume 2, TDPBSSD and TDPBF16PS.

use crate::int8::stride;
use crate::vnni::Product;
use crate::window::Window;
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

/// Rows of a tile, and columns of a panel.
const SIDE: usize = 16;
/// Bytes of a tile's row: 64 int8, 32 bf16, 16 sums.
const LINE: usize = 64;
/// Bytes of a tile.
const TILE: usize = SIDE * LINE;

/// Why AMX is used or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// The CPU or its operating system has none.
    Absent,
    /// The operating system denied its tile registers to this process: errno.
    Denied(isize),
    /// A product was wrong.
    Wrong(&'static str),
    /// It works.
    Ready,
}

/// Asked and tried once.
pub(crate) fn state() -> State {
    static STATE: OnceLock<State> = OnceLock::new();
    *STATE.get_or_init(|| {
        if !present() {
            return State::Absent;
        }
        match permission() {
            0 => trial(),
            error => State::Denied(-error),
        }
    })
}

/// AMX-TILE, AMX-INT8 and AMX-BF16 in the CPU, both tile states enabled by the system, and the AVX-512 of the epilogue.
fn present() -> bool {
    const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    const OSXSAVE: u32 = 1 << 27;
    const TILES: u64 = 1 << 17 | 1 << 18;
    is_x86_feature_detected!("avx512f")
        && __cpuid(0).eax >= 7
        && __cpuid_count(7, 0).edx & AMX == AMX
        && __cpuid(1).ecx & OSXSAVE != 0
        // SAFETY: OSXSAVE says that the instruction is there.
        && unsafe { _xgetbv(0) } & TILES == TILES
}

/// Asks Linux for the tile registers (`arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`), for all threads of this
/// process: 0 or a negative errno. Other systems have no such call here, and get no AMX.
fn permission() -> isize {
    if !cfg!(target_os = "linux") {
        return -38; // ENOSYS
    }
    const ARCH_PRCTL: isize = 158;
    let mut answer = ARCH_PRCTL;
    // SAFETY: the system call reads its two numbers and no memory of ours; rcx and r11 are what `syscall` overwrites.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") answer,
            in("rdi") 0x1023,
            in("rsi") 18,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    answer
}

/// Two matrices: A in rows of whole lines, B in panels of 16 columns. Behind the inner length B is zero, and A zero or
/// at least finite.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    /// Row `r` begins at byte `r * stride`.
    pub a: &'a [u8],
    /// Bytes from one row to the next.
    pub stride: usize,
    /// Rows of A.
    pub rows: usize,
    /// `[panels][lines][16]` lines: `[16][4]` int8 or `[16][2]` bf16 each.
    pub b: &'a [u8],
    /// Lines of the inner index: 64 int8 or 32 bf16 each.
    pub lines: usize,
}

/// How the rows fall into tiles: of one height, so that one configuration serves all. The last tile takes its rows from
/// the end and computes a few of them again (at most one less than there are tiles).
#[derive(Clone, Copy)]
struct Split {
    rows: usize,
    height: usize,
}

impl Split {
    fn new(rows: usize) -> Split {
        Split { rows, height: rows.div_ceil(rows.div_ceil(SIDE)) }
    }

    /// The first row that a tile computes.
    fn start(self, tile: usize) -> usize {
        (tile * self.height).min(self.rows - self.height)
    }

    /// The rows that a tile answers for.
    fn own(self, tile: usize) -> Range<usize> {
        tile * self.height..((tile + 1) * self.height).min(self.rows)
    }

    fn tiles(self) -> usize {
        self.rows.div_ceil(self.height)
    }
}

/// The tile shapes of this thread, until dropped.
struct Shapes;

impl Shapes {
    /// Sums in tmm0 to 3, A in tmm4 and 5 (`height` rows), B in tmm6 and 7 (16 rows).
    ///
    /// # Safety
    /// [`state`] is past [`permission`]; `height` is in 1..=16.
    unsafe fn new(height: usize) -> Shapes {
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            line: [u16; 16],
            rows: [u8; 16],
        }
        let mut c = Config { palette: 1, start_row: 0, reserved: [0; 14], line: [0; 16], rows: [0; 16] };
        c.line[..8].fill(LINE as u16);
        c.rows[..6].fill(height as u8);
        c.rows[6..8].fill(SIDE as u8);
        // SAFETY: reads 64 bytes; the shapes are within palette 1. The compiler never touches tile state itself.
        unsafe { asm!("ldtilecfg [{0}]", in(reg) &c, options(nostack, readonly)) };
        Shapes
    }
}

impl Drop for Shapes {
    fn drop(&mut self) {
        // SAFETY: made by `new`, on this thread: `Shapes` never leaves `product`.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Sums of two tiles of rows by two panels: `[tile][panel][row][column]`.
#[repr(C, align(64))]
struct Sums([u8; 4 * TILE]);

/// One or two tiles of rows by two panels: the loop over the inner index, in one block.
macro_rules! tiles {
    ($dot:literal, $two:expr, $a:expr, $stride:expr, $b:expr, $lines:expr, $to:expr) => {
        if $two {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "test {n}, {n}",
                "jz 3f",
                "2:",
                "tileloadd tmm4, [{a0} + {stride}*1]",
                "tileloadd tmm6, [{b0} + {line}*1]",
                concat!($dot, " tmm0, tmm4, tmm6"),
                "tileloadd tmm7, [{b1} + {line}*1]",
                concat!($dot, " tmm1, tmm4, tmm7"),
                "tileloadd tmm5, [{a1} + {stride}*1]",
                concat!($dot, " tmm2, tmm5, tmm6"),
                concat!($dot, " tmm3, tmm5, tmm7"),
                "add {a0}, 64", "add {a1}, 64", "add {b0}, 1024", "add {b1}, 1024",
                "dec {n}",
                "jnz 2b",
                "3:",
                "tilestored [{to} + {line}*1], tmm0",
                "tilestored [{to} + {line}*1 + 1024], tmm1",
                "tilestored [{to} + {line}*1 + 2048], tmm2",
                "tilestored [{to} + {line}*1 + 3072], tmm3",
                a0 = inout(reg) $a[0] => _, a1 = inout(reg) $a[1] => _, stride = in(reg) $stride,
                b0 = inout(reg) $b[0] => _, b1 = inout(reg) $b[1] => _, line = in(reg) LINE,
                n = inout(reg) $lines => _, to = in(reg) $to,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            )
        } else {
            asm!(
                "tilezero tmm0", "tilezero tmm1",
                "test {n}, {n}",
                "jz 3f",
                "2:",
                "tileloadd tmm4, [{a0} + {stride}*1]",
                "tileloadd tmm6, [{b0} + {line}*1]",
                concat!($dot, " tmm0, tmm4, tmm6"),
                "tileloadd tmm7, [{b1} + {line}*1]",
                concat!($dot, " tmm1, tmm4, tmm7"),
                "add {a0}, 64", "add {b0}, 1024", "add {b1}, 1024",
                "dec {n}",
                "jnz 2b",
                "3:",
                "tilestored [{to} + {line}*1], tmm0",
                "tilestored [{to} + {line}*1 + 1024], tmm1",
                a0 = inout(reg) $a[0] => _, stride = in(reg) $stride,
                b0 = inout(reg) $b[0] => _, b1 = inout(reg) $b[1] => _, line = in(reg) LINE,
                n = inout(reg) $lines => _, to = in(reg) $to,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            )
        }
    };
}

/// A B for the panels `panels` of B: hands the 16 sums of every row and panel to `finish(row, panel, sums)`, i32 for
/// int8 and f32 for `BF16`. A row's sums do not depend on the other rows.
///
/// # Safety
/// [`state`] is past [`permission`], so the CPU has AMX and AVX-512.
///
/// # Panics
/// When a slice is shorter than the sizes say.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn product<const BF16: bool>(
    o: Operands,
    panels: Range<usize>,
    mut finish: impl FnMut(usize, usize, __m512i),
) {
    if o.rows == 0 || panels.is_empty() {
        return;
    }
    let panel = o.lines * TILE;
    assert!((o.rows - 1) * o.stride + o.lines * LINE <= o.a.len() && panels.end * panel <= o.b.len());
    let split = Split::new(o.rows);
    // SAFETY: passed on; the height of 1 or more rows in 1..=16 tiles' worth is in 1..=16.
    let _shapes = unsafe { Shapes::new(split.height) };
    // The sums of one block are finished behind the next: vector units work while the tile unit does.
    let mut sums = [const { Sums([0; 4 * TILE]) }; 2];
    let mut drain = |sums: &Sums, first_tile: usize, first_panel: usize| {
        for (t, tile) in (first_tile..split.tiles().min(first_tile + 2)).enumerate() {
            for (p, panel) in (first_panel..panels.end.min(first_panel + 2)).enumerate() {
                for row in split.own(tile) {
                    let at = (2 * t + p) * TILE + (row - split.start(tile)) * LINE;
                    // SAFETY: `at` is a multiple of 64 inside `sums`, which is aligned to 64.
                    finish(row, panel, unsafe { _mm512_load_si512(sums.0[at..at + LINE].as_ptr().cast()) });
                }
            }
        }
    };
    let mut last = None;
    let share = (2 * panel).div_ceil(split.tiles().div_ceil(2)).next_multiple_of(LINE);
    for (i, p) in panels.clone().step_by(2).enumerate() {
        // A last panel without a neighbour is its own.
        let b = [p, (p + 1).min(panels.end - 1)].map(|p| o.b[p * panel..].as_ptr());
        let mut next = o.b[(p + 2).min(panels.end) * panel..(p + 4).min(panels.end) * panel].chunks(share.max(1));
        for (j, tile) in (0..split.tiles()).step_by(2).enumerate() {
            let two = tile + 1 < split.tiles();
            let a = [tile, tile + two as usize].map(|t| o.a[split.start(t) * o.stride..].as_ptr());
            let now = (i * split.tiles().div_ceil(2) + j) % 2;
            let to = sums[now].0.as_mut_ptr();
            // SAFETY: the assert above: `height` rows of `lines` lines from either `a`, `lines` tiles from either `b`;
            // `sums` takes four tiles.
            unsafe {
                if BF16 {
                    tiles!("tdpbf16ps", two, a, o.stride, b, o.lines, to);
                } else {
                    tiles!("tdpbssd", two, a, o.stride, b, o.lines, to);
                }
            }
            for line in next.next().unwrap_or_default().chunks(LINE) {
                _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
            }
            if let Some((before, tile, p)) = last.replace((now, tile, p)) {
                drain(&sums[before], tile, p);
            }
        }
    }
    if let Some((before, tile, p)) = last {
        drain(&sums[before], tile, p);
    }
}

/// The bytes of int8 or of 32-bit words.
fn bytes<T>(x: &[T]) -> &[u8] {
    // SAFETY: this module's T have no padding, and every bit pattern is a byte.
    unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), size_of_val(x)) }
}

/// The int8 product, [`Matrix::multiply`](crate::int8::Matrix::multiply).
///
/// # Safety
/// [`state`] is past [`permission`]; the slices are as long as `Matrix::multiply` checks.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn int8(p: &Product, out: *mut f32) {
    let stride = stride(p.k);
    let o = Operands { a: bytes(p.x.q), stride, rows: p.x.scale.len(), b: bytes(p.w), lines: stride / LINE };
    // SAFETY: passed on.
    unsafe {
        product::<false>(o, 0..p.scale.len().div_ceil(SIDE), |row, panel, sums| {
            p.finish(row, &p.columns(panel), sums, out);
        });
    }
}

/// out `[rows, n]` = or += A B in bf16 with f32 sums: A in rows of `row` words, of which `words`
/// count, B in panels of `words` words. Denormals count as zero; a sum adds the products of even and of odd inner
/// indices of a line apart.
///
/// # Safety
/// [`state`] is past [`permission`].
///
/// # Panics
/// When a slice is shorter than the sizes say.
#[allow(clippy::too_many_arguments)] // two operands, a result and their sizes
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn bf16(a: &[u32], row: usize, rows: usize, b: &[u32], words: usize, mut out: Window, add: bool) {
    let (n, stride) = (out.width(), out.stride());
    assert!(rows == out.rows());
    let o = Operands { a: bytes(a), stride: 4 * row, rows, b: bytes(b), lines: words / SIDE };
    let finish = |r: usize, panel: usize, sums: __m512i| {
        let column = panel * SIDE;
        let mask = u16::MAX >> (SIDE - SIDE.min(n - column));
        // SAFETY: the window has this row, and the mask keeps the access inside it.
        unsafe {
            let to = out.as_mut_ptr().add(r * stride + column);
            let old = if add { _mm512_maskz_loadu_ps(mask, to) } else { _mm512_setzero_ps() };
            _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(old, _mm512_castsi512_ps(sums)));
        }
    };
    // SAFETY: passed on.
    unsafe { product::<true>(o, 0..n.div_ceil(SIDE), finish) };
}

/// `steps` times four products between tiles that stay in their registers; how many multiply-adds those are.
///
/// # Safety
/// [`state`] is past [`permission`].
pub(crate) unsafe fn burst<const BF16: bool>(steps: usize) -> usize {
    macro_rules! dots {
        ($dot:literal) => {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                concat!($dot, " tmm0, tmm4, tmm6"),
                concat!($dot, " tmm1, tmm4, tmm7"),
                concat!($dot, " tmm2, tmm5, tmm6"),
                concat!($dot, " tmm3, tmm5, tmm7"),
                "dec {n}",
                "jnz 2b",
                n = inout(reg) steps.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, nomem),
            )
        };
    }
    // SAFETY: passed on; the products read and write tiles alone, within their shapes.
    unsafe {
        let _shapes = Shapes::new(SIDE);
        if BF16 {
            dots!("tdpbf16ps");
        } else {
            dots!("tdpbssd");
        }
    }
    steps.max(1) * 4 * SIDE * SIDE * if BF16 { LINE / 2 } else { LINE }
}

/// Small products, of one tile and of several, against plain loops.
fn trial() -> State {
    for (rows, panels, lines) in [(3, 1, 1), (16, 2, 2), (21, 3, 3), (41, 2, 1)] {
        // SAFETY: `state` got the permission.
        if !unsafe { right::<false>(rows, panels, lines) } {
            return State::Wrong("int8");
        }
        // SAFETY: as above.
        if !unsafe { right::<true>(rows, panels, lines) } {
            return State::Wrong("bf16");
        }
    }
    State::Ready
}

/// Whether one product is right.
///
/// # Safety
/// As for [`product`].
#[target_feature(enable = "avx512f")]
unsafe fn right<const BF16: bool>(rows: usize, panels: usize, lines: usize) -> bool {
    let noise = |n: usize, seed: u64| -> Vec<u8> {
        let bytes = (0..n as u64).map(|i| ((i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8);
        // bf16: a sign, an exponent near that of 1, and a mantissa.
        bytes.enumerate().map(|(i, v)| if BF16 && i % 2 == 1 { v & 0x80 | 0x3f } else { v }).collect()
    };
    let stride = (lines + 1) * LINE;
    let (a, b) = (noise(rows * stride, 1), noise(panels * lines * TILE, 2));
    let value = |bytes: &[u8]| match BF16 {
        true => f64::from(f32::from_bits(u32::from_le_bytes([0, 0, bytes[0], bytes[1]]))),
        false => f64::from(bytes[0] as i8),
    };
    let size = if BF16 { 2 } else { 1 };
    let (mut seen, mut right) = (0, true);
    let o = Operands { a: &a, stride, rows, b: &b, lines };
    let finish = |row: usize, panel: usize, sums: __m512i| {
        // SAFETY: both are 64 bytes without invalid patterns.
        let sums = unsafe { std::mem::transmute::<__m512i, [u32; SIDE]>(sums) };
        for (c, got) in sums.into_iter().enumerate() {
            let (mut want, mut sum) = (0.0, 0.0);
            for i in 0..lines * LINE / size {
                let x = value(&a[row * stride + i * size..]);
                let w = value(&b[(panel * lines * SIDE + i * size / 4) * LINE + c * 4 + i * size % 4..]);
                (want, sum) = (want + x * w, sum + (x * w).abs());
            }
            right &= match BF16 {
                true => (f64::from(f32::from_bits(got)) - want).abs() <= 1e-5 * sum,
                false => f64::from(got as i32) == want,
            };
            seen += 1;
        }
    };
    // SAFETY: passed on.
    unsafe { product::<BF16>(o, 0..panels, finish) };
    right && seen == rows * panels * SIDE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_once() {
        for rows in 1..100 {
            let split = Split::new(rows);
            assert!((1..=SIDE).contains(&split.height));
            let own: Vec<usize> = (0..split.tiles()).flat_map(|t| split.own(t)).collect();
            assert!(own.into_iter().eq(0..rows), "{rows}");
            for t in 0..split.tiles() {
                assert!(split.start(t) <= split.own(t).start && split.own(t).end <= split.start(t) + split.height);
                assert!(split.start(t) + split.height <= rows);
            }
        }
    }

    /// On a CPU with AMX: shapes beyond the trial's.
    #[test]
    fn products_are_right() {
        if state() == State::Absent {
            return;
        }
        assert_eq!(state(), State::Ready);
        for (rows, panels, lines) in
            [(1, 1, 0), (1, 5, 6), (15, 2, 1), (17, 4, 3), (33, 3, 2), (64, 1, 24), (100, 7, 5)]
        {
            // SAFETY: the state is ready.
            assert!(unsafe { right::<false>(rows, panels, lines) && right::<true>(rows, panels, lines) });
        }
    }
}
