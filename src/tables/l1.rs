//! The active L1 table, whole in memory.
//!
//! It can grow, and be replaced as a whole (a resize, a snapshot that is applied), without a lock on the side of the
//! readers: entries live in segments that are added and never moved. Each one is as large as all before it.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use super::file::HostFile;
use super::places::Places;
use crate::error::{Error, Result};
use crate::format::header::L1_ENTRIES_MAX;
use crate::format::l2::OFFSET_MASK;
use crate::format::{HostOffset, L1Index, words};
use crate::storage::{Io, IoDst};
use crate::wait::lock;

/// Entries in a sector of the disk: what is written back at once, because a sector is written as a whole or not.
const ENTRIES_PER_SECTOR: u64 = 512 / 8;
/// Segments after the first: enough for any table from a first segment of one entry.
const MORE_SEGMENTS: usize = 32;

/// Entries that follow each other.
type Segment = Box<[AtomicU64]>;

/// The active L1 table. Reads take no lock; changes are made by the holder of the table's claim.
pub struct L1Table {
    first: Segment,
    more: OnceLock<Box<[OnceLock<Segment>; MORE_SEGMENTS]>>, // which few tables need
    count: AtomicU64,
    offset: AtomicU64,
    dirty: Mutex<Dirty>,
    places: Option<Mutex<Places>>, // where the entries lead to, if anybody asks
}

#[derive(Default)]
struct Dirty {
    sectors: BTreeSet<u64>,
    is_early: bool, // all of them, where there are any
}

/// Sectors of the L1 table as they were when they were collected.
pub struct DirtyL1 {
    /// Sector number and its bytes.
    pub sectors: Vec<(u64, Vec<u8>)>,
    /// They may be written before anything else is durable.
    pub is_early: bool,
    table_at: HostOffset,
}

impl L1Table {
    /// Reads a table of `count` entries in one go. Entries are verified when they are used.
    pub async fn load<I: Io>(io: &I, file: &HostFile, offset: HostOffset, count: u64) -> Result<Self> {
        let mut bytes = vec![0u8; (count * 8) as usize];
        let got = file.read(io, &[IoDst::from(&mut bytes[..])], offset).await?;
        if got < bytes.len() {
            let expected = "an L1 table that lies inside the file";
            return Err(Error::Header { field: "l1_table_offset", value: offset.0, expected });
        }
        Ok(Self::new(words(&bytes).map(AtomicU64::new).collect(), offset))
    }

    fn new(entries: Segment, offset: HostOffset) -> Self {
        Self {
            count: AtomicU64::new(entries.len() as u64),
            first: entries,
            more: OnceLock::new(),
            offset: AtomicU64::new(offset.0),
            dirty: Mutex::default(),
            places: None,
        }
    }

    /// From now on, [`L1Table::table_in`] knows. Before the first change.
    pub fn note_places(&mut self, cluster_bytes: u64) {
        let offsets = (0..self.count()).map(|index| self.get(L1Index(index)) & OFFSET_MASK);
        self.places = Some(Mutex::new(Places::of(cluster_bytes, offsets)));
    }

    /// The first place in a range of host offsets that an entry, other than `own`, leads to. Nothing is known before
    /// [`L1Table::note_places`].
    pub fn table_in(&self, offsets: std::ops::Range<u64>, own: Option<L1Index>) -> Option<HostOffset> {
        let places = lock(self.places.as_ref()?);
        let own = own.map(|index| self.get(index) & OFFSET_MASK); // changed under the same lock
        places.first_in(offsets, own).map(HostOffset)
    }

    /// Number of entries.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    fn offset(&self) -> HostOffset {
        HostOffset(self.offset.load(Ordering::Acquire))
    }

    /// The entry as stored; 0 past the end of the table.
    #[inline]
    pub fn get(&self, index: L1Index) -> u64 {
        let entry = match self.first.get(index.0 as usize) {
            Some(entry) => Some(entry),
            None => self.entry_in_more(index.0),
        };
        entry.map_or(0, |e| e.load(Ordering::Acquire))
    }

    /// An entry past the first segment, if there is room for it. Segment `k` begins where there are 2^k times as many
    /// entries before it as in the first.
    #[cold]
    fn entry_in_more(&self, index: u64) -> Option<&AtomicU64> {
        let (segment, start) = self.segment_of(index);
        self.more.get()?.get(segment)?.get()?.get((index - start) as usize)
    }

    /// Number and first entry of the segment that holds entry `index`, which is past the first.
    fn segment_of(&self, index: u64) -> (usize, u64) {
        let first = (self.first.len() as u64).max(1);
        let segment = (index / first).max(1).ilog2();
        (segment as usize, if segment == 0 { self.first.len() as u64 } else { first << segment })
    }

    fn entry(&self, index: u64) -> &AtomicU64 {
        if let Some(entry) = self.first.get(index as usize) {
            return entry;
        }
        let (segment, start) = self.segment_of(index);
        let end = (self.first.len() as u64).max(1) << (segment + 1);
        let end = end.min(L1_ENTRIES_MAX.max(index + 1)); // no table is longer
        let more = self.more.get_or_init(|| Box::new([const { OnceLock::new() }; MORE_SEGMENTS]));
        let entries = more[segment].get_or_init(|| (start..end).map(|_| AtomicU64::new(0)).collect());
        &entries[(index - start) as usize]
    }

    /// Replaces the whole table by one that lies, with these entries, at `offset`, and is referred to by the header
    /// already. Only for who holds the image alone, with nothing of the old table waiting to be written.
    pub fn replace(&self, offset: HostOffset, entries: &[u64]) {
        let mut dirty = lock(&self.dirty);
        debug_assert!(dirty.sectors.is_empty(), "changes of a table that is replaced are lost");
        dirty.sectors.clear();
        let count = entries.len() as u64;
        let mut places = self.places.as_ref().map(lock);
        if let Some(places) = &mut places {
            places.refill(entries.iter().map(|entry| entry & OFFSET_MASK));
        }
        for (index, &entry) in entries.iter().enumerate() {
            self.entry(index as u64).store(entry, Ordering::Release);
        }
        for index in count..self.count() {
            self.entry(index).store(0, Ordering::Release);
        }
        self.count.store(count, Ordering::Release);
        self.offset.store(offset.0, Ordering::Release);
    }

    /// All entries as they are now.
    pub fn entries(&self) -> Vec<u64> {
        self.entries_to(self.count())
    }

    /// The first `count` entries as they are now; 0 past the end of the table.
    pub fn entries_to(&self, count: u64) -> Vec<u64> {
        (0..count).map(|index| self.get(L1Index(index))).collect()
    }

    /// Host offset of an entry, to name it in errors.
    pub fn entry_offset(&self, index: L1Index) -> HostOffset {
        self.offset().plus(index.0 * 8)
    }

    /// Host range of the table.
    pub fn host_range(&self) -> std::ops::Range<HostOffset> {
        self.offset()..self.offset().plus(self.count() * 8)
    }

    /// Publishes a new entry in memory; it reaches the disk with the next write-back. `early`: it may do so before
    /// anything else is durable, because the guest then sees what it saw, and all that is referred to is counted.
    pub fn set(&self, index: L1Index, entry: u64, early: bool) {
        let mut dirty = lock(&self.dirty);
        assert!(index.0 < self.count(), "an L1 entry past the end of the table");
        let mut places = self.places.as_ref().map(lock);
        let old = self.entry(index.0).swap(entry, Ordering::AcqRel);
        if let Some(places) = &mut places {
            places.change(old & OFFSET_MASK, entry & OFFSET_MASK);
        }
        dirty.is_early = early && (dirty.is_early || dirty.sectors.is_empty());
        dirty.sectors.insert(index.0 / ENTRIES_PER_SECTOR);
    }

    /// Takes the changed sectors for writing. They count as clean; [`L1Table::redirty`] undoes that.
    pub fn collect_dirty(&self) -> DirtyL1 {
        let mut dirty = lock(&self.dirty);
        let Dirty { sectors, is_early } = std::mem::take(&mut *dirty);
        let sectors = sectors.into_iter().map(|s| (s, self.sector_bytes(s))).collect();
        DirtyL1 { sectors, is_early, table_at: self.offset() }
    }

    fn sector_bytes(&self, sector: u64) -> Vec<u8> {
        let first = sector * ENTRIES_PER_SECTOR;
        let last = self.count().min(first + ENTRIES_PER_SECTOR);
        (first..last).flat_map(|index| self.get(L1Index(index)).to_be_bytes()).collect()
    }

    /// Marks sectors as changed again whose write failed.
    pub fn redirty(&self, failed: &DirtyL1) {
        let mut dirty = lock(&self.dirty);
        dirty.is_early = false; // it is no time to save barriers
        dirty.sectors.extend(failed.sectors.iter().map(|(sector, _)| *sector));
    }

    /// Writes collected sectors.
    pub async fn write<I: Io>(&self, io: &I, file: &HostFile, dirty: &DirtyL1) -> Result<()> {
        for (sector, bytes) in &dirty.sectors {
            file.write_bytes(io, bytes, dirty.table_at.plus(sector * 512)).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_all_lengths_can_follow_each_other() {
        for first in [0u64, 1, 2, 3, 64, 100] {
            let table = L1Table::new((0..first).map(AtomicU64::new).collect(), HostOffset(512));
            for (round, count) in [0, 1, 2, 5, 3, 64, 1000, 65, 4097, 0, 7].into_iter().enumerate() {
                let entry = |index: u64| (index + 1) * 1000 + round as u64;
                let entries: Vec<u64> = (0..count).map(entry).collect();
                table.replace(HostOffset(round as u64 * 512), &entries);
                assert_eq!((table.count(), table.entries()), (count, entries));
                let past: Vec<u64> = (count..5000).map(|index| table.get(L1Index(index))).collect();
                assert!(past.iter().all(|&entry| entry == 0), "old entries show up past the end");
                if count > 0 {
                    table.set(L1Index(count - 1), 42, false);
                    let dirty = table.collect_dirty();
                    let (sector, bytes) = &dirty.sectors[0];
                    assert_eq!((*sector, &bytes[bytes.len() - 8..]), ((count - 1) / 64, &42u64.to_be_bytes()[..]));
                    assert_eq!(dirty.table_at, HostOffset(round as u64 * 512));
                }
            }
        }
    }
}
