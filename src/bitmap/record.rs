//! Bits that are set while the disk changes: by any number of threads, without a lock, in memory that grows with what
//! is dirtied.
//!
//! Recording never fails: where the memory that all bitmaps together may take is used up, whole stretches count as
//! dirty. A bitmap may say too much, never too little (D10).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

const LEAF_WORDS: usize = 512;
const LEAF_BITS: u64 = LEAF_WORDS as u64 * 64;

/// Memory that the bitmaps of a handle may take.
#[derive(Debug)]
pub struct Budget {
    left_bytes: AtomicU64,
    was_exceeded: AtomicBool,
}

impl Budget {
    /// So many bytes.
    pub fn new(bytes: u64) -> Self {
        Self { left_bytes: AtomicU64::new(bytes), was_exceeded: AtomicBool::new(false) }
    }

    fn take(&self, bytes: u64) -> bool {
        let taken =
            self.left_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)).is_ok();
        self.was_exceeded.fetch_or(!taken, Ordering::Relaxed);
        taken
    }

    fn give_back(&self, bytes: u64) {
        self.left_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether it was exceeded since this was last asked.
    pub fn take_exceeded(&self) -> bool {
        self.was_exceeded.swap(false, Ordering::Relaxed)
    }
}

enum Leaf {
    Bits(Box<[AtomicU64; LEAF_WORDS]>),
    All,
}

/// Bits of one bitmap that were set since it was last stored.
pub struct Recorder {
    granularity_bits: u32,
    leaves: Box<[OnceLock<Leaf>]>, // none: everything counts as dirty
    budget: Arc<Budget>,
    taken_bytes: AtomicU64,
}

impl Recorder {
    /// For a bitmap of `bits` bits, none of them set.
    pub fn new(bits: u64, granularity_bits: u32, budget: &Arc<Budget>) -> Self {
        let leaves = bits.div_ceil(LEAF_BITS);
        let bytes = leaves * size_of::<OnceLock<Leaf>>() as u64;
        let count = if budget.take(bytes) { leaves as usize } else { 0 };
        Self {
            granularity_bits,
            leaves: (0..count).map(|_| OnceLock::new()).collect(),
            budget: budget.clone(),
            taken_bytes: AtomicU64::new(if count == 0 { 0 } else { bytes }),
        }
    }

    /// Notes a change of a guest range that is not empty and lies inside of the disk.
    pub fn note(&self, offset: u64, length: u64) {
        let (first, last) = (offset >> self.granularity_bits, (offset + length - 1) >> self.granularity_bits);
        for index in first / LEAF_BITS..=last / LEAF_BITS {
            let Some(leaf) = self.leaves.get(index as usize) else { return };
            let start = index * LEAF_BITS;
            // Whole leaves cost nothing: what a disk grows by may be terabytes.
            let is_whole = first <= start && last - start >= LEAF_BITS - 1;
            if let Leaf::Bits(words) = leaf.get_or_init(|| if is_whole { Leaf::All } else { self.new_leaf() }) {
                set(words, first.max(start) - start, last.min(start + LEAF_BITS - 1) - start);
            }
        }
    }

    fn new_leaf(&self) -> Leaf {
        let bytes = LEAF_BITS / 8;
        if !self.budget.take(bytes) {
            return Leaf::All;
        }
        self.taken_bytes.fetch_add(bytes, Ordering::Relaxed);
        Leaf::Bits(Box::new([const { AtomicU64::new(0) }; LEAF_WORDS]))
    }

    /// Whether any of the bits `[first, first + bits)` is set.
    pub fn touches(&self, first: u64, bits: u64) -> bool {
        let mut found = false;
        self.each_word(first, bits, |_, word| found |= word != 0);
        found
    }

    /// Adds the bits from `first` on, a multiple of 64, to `bytes`, whose length is one of 8: as they are stored.
    pub fn or_into(&self, first: u64, bytes: &mut [u8]) {
        self.each_word(first, bytes.len() as u64 * 8, |index, word| {
            let at = index as usize * 8;
            bytes[at..at + 8].iter_mut().zip(word.to_le_bytes()).for_each(|(byte, new)| *byte |= new);
        });
    }

    /// Calls `each(index, word)` for the words of 64 bits from bit `first` on that may not be zero.
    fn each_word(&self, first: u64, bits: u64, mut each: impl FnMut(u64, u64)) {
        debug_assert!(first.is_multiple_of(64));
        let words = bits.div_ceil(64);
        if self.leaves.is_empty() {
            return (0..words).for_each(|index| each(index, u64::MAX));
        }
        let mut index = 0;
        while index < words {
            let bit = first + index * 64;
            let in_leaf = (bit % LEAF_BITS / 64) as usize;
            let n = (words - index).min((LEAF_WORDS - in_leaf) as u64);
            match self.leaves.get((bit / LEAF_BITS) as usize).and_then(OnceLock::get) {
                None => {}
                Some(Leaf::All) => (index..index + n).for_each(|index| each(index, u64::MAX)),
                Some(Leaf::Bits(leaf)) => {
                    for (i, word) in leaf[in_leaf..in_leaf + n as usize].iter().enumerate() {
                        each(index + i as u64, word.load(Ordering::Relaxed));
                    }
                }
            }
            index += n;
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.budget.give_back(*self.taken_bytes.get_mut());
    }
}

/// Sets the bits `first..=last`. Words that have them already are only read: then no line is taken from other threads.
fn set(words: &[AtomicU64; LEAF_WORDS], first: u64, last: u64) {
    for index in first / 64..=last / 64 {
        let from = first.max(index * 64) % 64;
        let to = last.min(index * 64 + 63) % 64;
        let mask = u64::MAX >> (63 - (to - from)) << from;
        let word = &words[index as usize];
        if word.load(Ordering::Relaxed) & mask != mask {
            word.fetch_or(mask, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BITS: u64 = 3 * LEAF_BITS + 100;

    fn bytes_of(recorder: &Recorder, first: u64, bytes: usize) -> Vec<u8> {
        let mut found = vec![0; bytes];
        recorder.or_into(first, &mut found);
        found
    }

    /// A disk that grew by terabytes made each bitmap that was enabled note them bit by bit, in hundreds of megabytes. Found by
    /// fuzzing operations.
    #[test]
    fn a_long_range_takes_no_memory() {
        let budget = Arc::new(Budget::new(1 << 30));
        let recorder = Recorder::new(1000 * LEAF_BITS + 100, 9, &budget);
        let before = budget.left_bytes.load(Ordering::Relaxed);
        let (first, last) = (LEAF_BITS / 2, 1000 * LEAF_BITS + 99);
        recorder.note(first << 9, (last - first + 1) << 9);
        assert_eq!(
            before - budget.left_bytes.load(Ordering::Relaxed),
            2 * LEAF_BITS / 8,
            "the first and the last leaf"
        );
        let found = bytes_of(&recorder, 0, (1001 * LEAF_BITS / 8) as usize);
        let is_set = |bit: u64| found[bit as usize / 8] >> (bit % 8) & 1 == 1;
        let all = 0..1001 * LEAF_BITS;
        assert!(all.clone().all(|bit| is_set(bit) == (first..=last).contains(&bit)));
        let narrow = Recorder::new(3 * LEAF_BITS, 9, &budget);
        narrow.note(LEAF_BITS << 9, (LEAF_BITS - 1) << 9);
        assert!(!is_set(all.end - 1) && bytes_of(&narrow, 2 * LEAF_BITS - 64, 8)[7] == 0x7f, "one bit short of a leaf");
    }

    #[test]
    fn what_is_noted_is_set_and_nothing_else() {
        let budget = Arc::new(Budget::new(1 << 30));
        let recorder = Recorder::new(BITS, 9, &budget);
        let mut expected = vec![0u8; BITS.next_multiple_of(64) as usize / 8];
        let mut word = 7u64;
        for _ in 0..200 {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let offset = (word >> 20) % ((BITS << 9) - 1);
            let length = 1 + (word >> 8) % (1 << (4 + word % 18)).min((BITS << 9) - offset - 1).max(1);
            recorder.note(offset, length);
            for bit in offset >> 9..=(offset + length - 1) >> 9 {
                expected[bit as usize / 8] |= 1 << (bit % 8);
            }
        }
        assert!(bytes_of(&recorder, 0, expected.len()) == expected);
        for first in (0..BITS - 512).step_by(512) {
            let part = &expected[first as usize / 8..][..64];
            assert!(bytes_of(&recorder, first, 64) == part);
            assert_eq!(recorder.touches(first, 512), part.iter().any(|&byte| byte != 0));
        }
    }

    #[test]
    fn memory_follows_what_is_dirtied_and_goes_back() {
        let budget = Arc::new(Budget::new(1 << 20));
        let left = || budget.left_bytes.load(Ordering::Relaxed);
        let recorder = Recorder::new(1 << 30, 16, &budget);
        let empty = left();
        recorder.note(0, 1);
        recorder.note(5, 1 << 20);
        assert_eq!(empty - left(), LEAF_BITS / 8);
        recorder.note(LEAF_BITS << 16, 1);
        assert_eq!(empty - left(), LEAF_BITS / 4);
        drop(recorder);
        assert_eq!((left(), budget.take_exceeded()), (1 << 20, false));
    }

    #[test]
    fn without_memory_everything_counts_as_dirty() {
        // Room for the list of leaves, and for two of them.
        let leaves = BITS.div_ceil(LEAF_BITS) * size_of::<OnceLock<Leaf>>() as u64;
        let budget = Arc::new(Budget::new(leaves + 2 * LEAF_BITS / 8));
        let recorder = Recorder::new(BITS, 9, &budget);
        for leaf in 0..3 {
            recorder.note((leaf * LEAF_BITS) << 9, 1);
        }
        assert!(budget.take_exceeded() && !budget.take_exceeded());
        assert_eq!(bytes_of(&recorder, LEAF_BITS, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes_of(&recorder, 2 * LEAF_BITS, 8), [0xff; 8]);
        assert_eq!(bytes_of(&recorder, 3 * LEAF_BITS, 8), [0; 8]);
        // And without even that.
        let recorder = Recorder::new(BITS, 9, &Arc::new(Budget::new(10)));
        recorder.note(0, 1);
        assert!(bytes_of(&recorder, 64, 16) == [0xff; 16] && recorder.touches(BITS - 100, 64));
    }

    #[test]
    fn threads_lose_no_bit() {
        let budget = Arc::new(Budget::new(1 << 20));
        let recorder = Recorder::new(BITS, 0, &budget);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let recorder = &recorder;
                scope.spawn(move || (thread..BITS).step_by(4).for_each(|bit| recorder.note(bit, 1)));
            }
        });
        let found = bytes_of(&recorder, 0, BITS as usize / 64 * 8);
        assert!(found.iter().all(|&byte| byte == 0xff));
    }
}
