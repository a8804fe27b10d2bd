//! The active L1 table, whole in memory.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::file::HostFile;
use crate::error::{Error, Result};
use crate::format::{HostOffset, L1Index};
use crate::storage::{Io, IoDst};
use crate::wait::lock;

/// Entries in a sector of the disk: what is written back at once, because a sector is written as a whole or not.
const ENTRIES_PER_SECTOR: u64 = 512 / 8;

/// The active L1 table. Reads take no lock; changes are made by the holder of the table's claim.
pub struct L1Table {
    entries: Box<[AtomicU64]>,
    offset: HostOffset,
    dirty_sectors: Mutex<BTreeSet<u64>>,
}

/// Sectors of the L1 table as they were when they were collected.
pub struct DirtyL1 {
    /// Sector number and its bytes.
    pub sectors: Vec<(u64, Vec<u8>)>,
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
        let words = bytes.chunks_exact(8).map(super::word);
        Ok(Self { entries: words.map(AtomicU64::new).collect(), offset, dirty_sectors: Mutex::default() })
    }

    /// Number of entries.
    pub fn count(&self) -> u64 {
        self.entries.len() as u64
    }

    /// The entry as stored; 0 past the end of the table.
    #[inline]
    pub fn get(&self, index: L1Index) -> u64 {
        self.entries.get(index.0 as usize).map_or(0, |e| e.load(Ordering::Acquire))
    }

    /// Host offset of an entry, to name it in errors.
    pub fn entry_offset(&self, index: L1Index) -> HostOffset {
        self.offset.plus(index.0 * 8)
    }

    /// Host range of the table.
    pub fn host_range(&self) -> std::ops::Range<HostOffset> {
        self.offset..self.offset.plus(self.count() * 8)
    }

    /// Publishes a new entry in memory; it reaches the disk with the next write-back.
    pub fn set(&self, index: L1Index, entry: u64) {
        let mut dirty = lock(&self.dirty_sectors);
        self.entries[index.0 as usize].store(entry, Ordering::Release);
        dirty.insert(index.0 / ENTRIES_PER_SECTOR);
    }

    /// Takes the changed sectors for writing. They count as clean; [`L1Table::redirty`] undoes that.
    pub fn collect_dirty(&self) -> DirtyL1 {
        let mut dirty = lock(&self.dirty_sectors);
        let sectors = std::mem::take(&mut *dirty);
        DirtyL1 { sectors: sectors.into_iter().map(|s| (s, self.sector_bytes(s))).collect() }
    }

    fn sector_bytes(&self, sector: u64) -> Vec<u8> {
        let first = (sector * ENTRIES_PER_SECTOR) as usize;
        let last = self.entries.len().min(first + ENTRIES_PER_SECTOR as usize);
        self.entries[first..last].iter().flat_map(|e| e.load(Ordering::Acquire).to_be_bytes()).collect()
    }

    /// Marks sectors as changed again whose write failed.
    pub fn redirty(&self, failed: &DirtyL1) {
        lock(&self.dirty_sectors).extend(failed.sectors.iter().map(|(sector, _)| *sector));
    }

    /// Writes collected sectors.
    pub async fn write<I: Io>(&self, io: &I, file: &HostFile, dirty: &DirtyL1) -> Result<()> {
        for (sector, bytes) in &dirty.sectors {
            file.write_bytes(io, bytes, self.offset.plus(sector * 512)).await?;
        }
        Ok(())
    }
}
