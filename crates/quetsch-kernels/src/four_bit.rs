//! 4-bit blocks: decoding.

/// Decodes elements `range` of a tensor of two elements a byte (the first in the high nibble); `table(b)` gives the
/// sixteen values of block `b`, which holds elements `b * block ..`.
pub fn decode(
    packed: &[u8],
    block: usize,
    range: std::ops::Range<usize>,
    table: impl Fn(usize) -> [f32; 16],
    out: &mut [f32],
) {
    let mut i = range.start;
    let mut out = out.iter_mut();
    while i < range.end {
        let (values, end) = (table(i / block), ((i / block + 1) * block).min(range.end));
        for (j, o) in (i..end).zip(&mut out) {
            let byte = packed[j / 2];
            *o = values[usize::from(if j % 2 == 0 { byte >> 4 } else { byte & 15 })];
        }
        i = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_may_start_and_end_inside_a_byte_and_a_block() {
        let packed = [0x01, 0x23, 0x45, 0x67];
        let table = |b: usize| std::array::from_fn(|i| (100 * b + i) as f32);
        let mut all = [0.0; 8];
        decode(&packed, 4, 0..8, table, &mut all);
        assert_eq!(all, [0.0, 1.0, 2.0, 3.0, 104.0, 105.0, 106.0, 107.0]);
        let mut some = [0.0; 4];
        decode(&packed, 4, 3..7, table, &mut some);
        assert_eq!(some, all[3..7]);
    }
}
