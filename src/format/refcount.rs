//! Entries of a refcount block: 1 to 64 bits wide. Spec, "Host cluster management".

/// Reads entry `index` of a refcount block whose entries are `1 << order` bits wide.
pub fn get(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let per_byte_bits = 3 - order;
            let shift = (index & ((1 << per_byte_bits) - 1)) << order;
            u64::from(block[index >> per_byte_bits] >> shift) & ((1 << (1 << order)) - 1)
        }
        3 => u64::from(block[index]),
        4 => u64::from(u16::from_be_bytes(bytes(block, index))),
        5 => u64::from(u32::from_be_bytes(bytes(block, index))),
        _ => u64::from_be_bytes(bytes(block, index)),
    }
}

/// Writes entry `index`; `value` fits into the width.
pub fn set(block: &mut [u8], order: u32, index: usize, value: u64) {
    debug_assert!(order == 6 || value < 1 << (1 << order), "refcount does not fit");
    match order {
        0..=2 => {
            let per_byte_bits = 3 - order;
            let shift = (index & ((1 << per_byte_bits) - 1)) << order;
            let mask = ((1u8 << (1 << order)) - 1) << shift;
            let byte = &mut block[index >> per_byte_bits];
            *byte = *byte & !mask | (value as u8) << shift;
        }
        3 => block[index] = value as u8,
        4 => block[index * 2..][..2].copy_from_slice(&(value as u16).to_be_bytes()),
        5 => block[index * 4..][..4].copy_from_slice(&(value as u32).to_be_bytes()),
        _ => block[index * 8..][..8].copy_from_slice(&value.to_be_bytes()),
    }
}

/// Entries that are compared at once where many are alike.
const AT_ONCE: usize = 64;

/// How many of these entries, from the first on, have this value.
pub fn run_of(block: &[u8], order: u32, entries: std::ops::Range<usize>, value: u64) -> usize {
    let mut done = 0;
    // The common width, by the page rather than by the entry: whole disks are given up so.
    if let (4, Ok(value)) = (order, u16::try_from(value)) {
        let alike: [u8; AT_ONCE * 2] = std::array::from_fn(|i| value.to_be_bytes()[i % 2]);
        let bytes = &block[entries.start * 2..entries.end * 2];
        done = bytes.chunks_exact(AT_ONCE * 2).take_while(|chunk| **chunk == alike).count() * AT_ONCE;
    }
    done + entries.skip(done).take_while(|&entry| get(block, order, entry) == value).count()
}

/// Sets all of these entries to 0.
pub fn clear(block: &mut [u8], order: u32, entries: std::ops::Range<usize>) {
    match order {
        0..3 => entries.for_each(|entry| set(block, order, entry, 0)),
        _ => block[entries.start << (order - 3)..entries.end << (order - 3)].fill(0),
    }
}

/// Byte range of a block that entry `index` lies in.
pub fn byte_range(order: u32, index: usize) -> std::ops::Range<usize> {
    if order < 3 {
        let byte = index >> (3 - order);
        return byte..byte + 1;
    }
    let width = 1 << (order - 3);
    index * width..(index + 1) * width
}

fn bytes<const N: usize>(block: &[u8], index: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&block[index * N..(index + 1) * N]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6u32 {
            let max = u64::MAX >> (64 - (1u32 << order));
            let n = (512 * 8) >> order;
            let mut block = vec![0u8; 512];
            for i in 0..n {
                set(&mut block, order, i, (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & max);
            }
            for i in 0..n {
                assert_eq!(
                    get(&block, order, i),
                    (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & max,
                    "order {order}"
                );
                assert!(byte_range(order, i).end <= 512);
            }
        }
    }

    #[test]
    fn runs_are_as_long_as_entry_by_entry_and_cleared_alone() {
        for order in 0..=6u32 {
            let n = (512 * 8) >> order;
            for (from, to, odd) in [(0, n, n), (3, n, n - 1), (0, n, 0), (1, n - 2, 40), (5, 5, 5), (0, n, n / 2)] {
                let mut block = vec![0u8; 512];
                (0..n).for_each(|entry| set(&mut block, order, entry, 1));
                if odd < n {
                    set(&mut block, order, odd, 0);
                }
                let slow = (from..to).take_while(|&entry| get(&block, order, entry) == 1).count();
                assert_eq!(run_of(&block, order, from..to, 1), slow, "order {order}, {from}..{to}, {odd} is another");
                assert_eq!(run_of(&block, order, from..to, 1 << 40), 0, "a value that no narrow entry has");
                clear(&mut block, order, from..to);
                let expected = |entry| u64::from(!(from..to).contains(&entry) && entry != odd);
                assert!(
                    (0..n).all(|entry| get(&block, order, entry) == expected(entry)),
                    "order {order}, {from}..{to}"
                );
            }
        }
    }

    #[test]
    fn sub_byte_entries_start_at_the_least_significant_bit() {
        let mut block = vec![0u8; 512];
        set(&mut block, 1, 1, 3);
        assert_eq!(block[0], 0b1100);
        set(&mut block, 0, 15, 1);
        assert_eq!(block[1], 0x80);
    }
}
