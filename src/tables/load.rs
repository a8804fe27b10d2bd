//! Bringing L2 slices into the cache: the one that is missing, and, where loads follow each other in the guest's order, the
//! next ones of its table in the same read.
//!
//! Only who has to load a slice asks whether that goes on where another load left off: what finds its slice in the cache
//! takes no part in this. Random work loads one slice at a time, and a sequential reader, having loaded 1, then 2, 4, 8,
//! finds the next ones there.

use std::sync::Mutex;

use super::Tables;
use crate::error::{Corruption, CorruptionKind, Error, Result};
use crate::format::{HostOffset, SliceIndex};
use crate::storage::{Io, IoDst};
use crate::wait::lock;

/// Sequences of loads that are remembered.
const SEQUENCES: usize = 8;
/// Slices of one load: they cost hardly more than one.
const SLICES_MAX: u64 = 16;
/// Part of a cache which does not hold all of the disk that one load may fill with slices that nobody has asked for.
const CACHE_PART: u64 = 8;
/// What memory is aligned to, so that files without the page cache need no other.
const ALIGNMENT: usize = 4096;

#[derive(Debug, Clone, Copy, Default)]
struct Sequence {
    next: u64,   // the slice that it goes on with
    slices: u64, // that the last load would have taken; 0: there was none
}

#[derive(Debug, Default)]
struct State {
    sequences: [Sequence; SEQUENCES],
    oldest: usize,
}

/// Loads that may go on.
#[derive(Debug, Default)]
pub struct Sequences(Mutex<State>);

impl Sequences {
    /// How many slices to load at once from `slice` on, at most `max`, which is not 0.
    fn slices_from(&self, slice: SliceIndex, max: u64) -> u64 {
        let mut state = lock(&self.0);
        let known = state.sequences.iter().position(|sequence| sequence.next == slice.0 && sequence.slices > 0);
        let at = known.unwrap_or(state.oldest);
        let wanted = known.map_or(1, |at| state.sequences[at].slices * 2).min(SLICES_MAX);
        let slices = wanted.min(max);
        if known.is_none() {
            state.oldest = (at + 1) % SEQUENCES;
        }
        state.sequences[at] = Sequence { next: slice.0 + slices, slices: wanted };
        slices
    }
}

impl Tables {
    /// Brings a slice into the cache, if its L2 table exists.
    pub async fn load_slice<I: Io>(&self, io: &I, slice: SliceIndex) -> Result<()> {
        let _loading = self.slice_loads.claim(slice.0..slice.0 + 1).await;
        if self.is_cached(slice) {
            return Ok(());
        }
        let index = self.geometry.l1_index_of_slice(slice);
        let (table, _) = self.table(index)?;
        if table == HostOffset(0) {
            return Ok(()); // it has been given up meanwhile
        }
        let table_end = (index.0 + 1) * self.geometry.slices_per_table();
        let room = self.l2.slots() as u64 / if self.l2.holds_disk() { 1 } else { CACHE_PART };
        let max = SLICES_MAX.min(room).min(table_end - slice.0).max(1);
        let mut slices = self.sequences.slices_from(slice, max);
        // Those that follow: claimed like the first, so that nobody else loads, changes or replaces them until they are in
        // the cache; but not waited for.
        let following = (slices > 1).then(|| self.slice_loads.try_claim(slice.0 + 1..slice.0 + slices)).flatten();
        let uncached = |&n: &u64| !self.is_cached(SliceIndex(slice.0 + n));
        slices = if following.is_some() { 1 + (1..slices).take_while(uncached).count() as u64 } else { 1 };

        let at = table.plus(self.geometry.slice_offset_in_table(slice));
        let slice_bytes = self.geometry.slice_bytes() as usize;
        let length = slice_bytes * slices as usize;
        let mut memory = vec![0u8; length + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        let bytes = &mut memory[start..start + length];
        let mut got = self.file.read(io, &[IoDst::from(&mut bytes[..])], at).await;
        if got.is_err() && slices > 1 {
            got = self.file.read(io, &[IoDst::from(&mut bytes[..slice_bytes])], at).await; // whose error it is
        }
        let mut loaded = bytes[..got?].chunks_exact(slice_bytes);
        let Some(first) = loaded.next() else {
            let guest_offset = Some(slice.0 * self.geometry.slice_covers_bytes());
            let (kind, host_offset) = (CorruptionKind::L2TableBeyondEof, self.l1.entry_offset(index).0);
            return Err(Error::Corrupt(Corruption { kind, host_offset, guest_offset, value: table.0 }));
        };
        while !self.l2.install(slice, first) {
            self.write_back(io).await?;
        }
        for (n, bytes) in (1..).zip(loaded) {
            if !self.l2.install(SliceIndex(slice.0 + n), bytes) {
                break; // everything there waits to be written
            }
        }
        Ok(())
    }

    fn is_cached(&self, slice: SliceIndex) -> bool {
        self.l2.look(slice, |_| ()).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loads_that_follow_each_other_grow() {
        let sequences = Sequences::default();
        let load = |slice, max| sequences.slices_from(SliceIndex(slice), max);
        let mut at = 100;
        for expected in [1, 2, 4, 8, 16, 16] {
            assert_eq!(load(at, 16), expected);
            assert_eq!(load(at * 1000, 16), 1, "others in between change nothing");
            at += expected;
        }
        assert_eq!(load(at, 3), 3, "the end of a table");
        assert_eq!(load(at + 3, 16), 16);
        assert_eq!((load(0, 16), load(0, 16), load(1, 16)), (1, 1, 2));
        (0..SEQUENCES as u64).for_each(|n| assert_eq!(load(5000 * n + 7, 16), 1));
        assert_eq!(load(at + 19, 16), 1, "forgotten");
    }
}
