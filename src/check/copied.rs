//! COPIED flags, one entry after the other: told, or put right together with what else an entry allows.

use super::Checker;
use super::counts::{COPIED as COUNTED_COPIED, Counter, Counts, OUTSIDE};
use super::finding::FindingKind;
use super::l2::{Problem, is_outside};
use super::mend::{has_cluster, mend, with_copied};
use super::repair::QUIET;
use super::tables::{TableList, TableUse};
use crate::error::Result;
use crate::format::l2::{COPIED, OFFSET_MASK};
use crate::format::l2_table::entry_of;
use crate::format::{HostOffset, L2Entry};
use crate::storage::Io;

/// Entries are written in whole sectors.
const SECTOR_BYTES: usize = 512;

/// What is done about entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Wrong flags are told.
    Tell,
    /// Flags that must not be there go, and entries are mended: safe before counts are raised.
    Clear,
    /// Flags that should be there come: only once counts are right.
    Set,
}

impl<I: Io> Checker<'_, '_, I> {
    /// Tells which COPIED flags are wrong. The counters' flag says what is right.
    pub(super) async fn tell_copied(&mut self, counts: &Counts) -> Result<()> {
        self.entries(counts, Pass::Tell, false).await.map(|_| ())
    }

    /// Goes through the entries of L1 and L2 tables. Returns how many COPIED flags were changed. `mending`: entries
    /// are mended as well, those of snapshots too.
    pub(super) async fn entries(&mut self, counts: &Counts, pass: Pass, mending: bool) -> Result<u64> {
        let mut changed = self.l1_entries(counts, pass, mending).await?;
        let l1_tables = self.l1_tables();
        let mut from = 0;
        loop {
            let list = self.list_tables(&l1_tables, from, QUIET).await?;
            // COPIED means something in the active state alone; without a cluster of this file, it is always set.
            let is_wanted = |table: &&TableUse| mending || table.uses.active > 0 && !self.has_data_file();
            let wanted: Vec<TableUse> = list.tables.iter().filter(is_wanted).copied().collect();
            for table in &wanted {
                changed += self.l2_entries(counts, table, pass, mending).await?;
                self.progress(1)?;
            }
            match list {
                TableList { end: Some(end), .. } => from = end,
                _ => return Ok(changed),
            }
        }
    }

    /// What COPIED should be for a cluster; `None` if this window does not know.
    fn expected(&self, counts: &Counts, cluster: u64, pass: Pass) -> Option<bool> {
        let Counter { references, flags } = counts.covers(cluster).then(|| counts.get(cluster))?;
        // References past the end of the file are not counted: there the count that is stored decides, as it does in
        // the check. New refcount structures have none.
        let is_lost = references == 0 && flags & OUTSIDE != 0 && !self.sum.rebuild;
        Some(match pass {
            _ if is_lost => flags & COUNTED_COPIED != 0,
            Pass::Tell => flags & COUNTED_COPIED != 0,
            Pass::Clear | Pass::Set => references.min(self.geometry.refcount_max()) == 1,
        })
    }

    /// Whether this pass changes (or tells of) a flag.
    fn is_due(pass: Pass, copied: bool, expected: Option<bool>) -> bool {
        match (pass, expected) {
            (_, None) => false,
            (Pass::Tell, Some(expected)) => copied != expected,
            (Pass::Clear, Some(expected)) => copied && !expected,
            (Pass::Set, Some(expected)) => !copied && expected,
        }
    }

    async fn l1_entries(&mut self, counts: &Counts, pass: Pass, mending: bool) -> Result<u64> {
        let (mut changed, mut entries) = (0, Vec::new());
        for (tree, table) in self.l1_tables().into_iter().enumerate().take(if mending { usize::MAX } else { 1 }) {
            let is_outside = is_outside(self.geometry, self.file_bytes, table.offset, table.bytes);
            let mut at = if is_outside { table.bytes / 8 } else { 0 };
            while at < table.bytes / 8 {
                at = self.l1_piece(table, at, &mut entries).await?;
                for &(index, word) in &entries {
                    let (offset, copied) = (word & OFFSET_MASK, word & COPIED != 0);
                    let expected = self.expected(counts, offset >> self.geometry.cluster_bits, pass);
                    let is_due = tree == 0 && offset != 0 && Self::is_due(pass, copied, expected);
                    if is_due && pass == Pass::Tell {
                        self.wrong_l1(FindingKind::CopiedFlag, "an L2 table", table.offset, index, word);
                    } else if (is_due || mending && offset == 0 && copied)
                        && self.is_alone(counts, table.offset + index * 8)
                    {
                        let place = HostOffset(table.offset + index * 8);
                        self.put(&(word ^ COPIED).to_be_bytes(), place).await?;
                        changed += u64::from(is_due);
                    }
                }
            }
        }
        Ok(changed)
    }

    async fn l2_entries(&mut self, counts: &Counts, table: &TableUse, pass: Pass, mending: bool) -> Result<u64> {
        let size = self.geometry.cluster_size_bytes();
        if table.offset >= self.file_bytes || pass != Pass::Tell && !self.may_change(counts, table) {
            return Ok(0);
        }
        let mut bytes = std::mem::take(&mut self.buffer);
        bytes.resize(bytes.len().max(size as usize), 0);
        self.read(&mut bytes[..size as usize], table.offset).await?;
        let width = self.geometry.l2_entry_bytes() as usize;
        let (mut changed, mut first, mut end) = (0, usize::MAX, 0);
        for (index, stored) in bytes[..size as usize].chunks_exact_mut(width).enumerate() {
            if stored.iter().all(|byte| *byte == 0) {
                continue;
            }
            let old = entry_of(stored);
            let mut new = old;
            if mending {
                new = mend(old, self.geometry, self.has_data_file());
            }
            if self.is_copied_due(counts, table, new, pass) {
                changed += 1;
                if pass == Pass::Tell {
                    let (kind, what) = (FindingKind::CopiedFlag, "a data cluster");
                    self.wrong_entry(table, Problem { index, kind, what, value: old.descriptor });
                } else {
                    new = with_copied(new, new.descriptor & COPIED == 0);
                }
            }
            if new != old {
                stored.copy_from_slice(&bytes_of(new)[..width]);
                (first, end) = (first.min(index * width), (index + 1) * width);
            }
        }
        if first < end {
            let (first, end) = (first / SECTOR_BYTES * SECTOR_BYTES, end.next_multiple_of(SECTOR_BYTES));
            let place = HostOffset(table.offset + first as u64);
            self.put(&bytes[first..end], place).await?;
        }
        self.buffer = bytes;
        Ok(changed)
    }

    fn is_copied_due(&self, counts: &Counts, table: &TableUse, entry: L2Entry, pass: Pass) -> bool {
        let data_file = self.has_data_file();
        if table.uses.active == 0 || !has_cluster(entry, self.geometry, data_file) {
            return false;
        }
        let cluster = (entry.descriptor & OFFSET_MASK) >> self.geometry.cluster_bits;
        let expected = if data_file { Some(true) } else { self.expected(counts, cluster, pass) };
        Self::is_due(pass, entry.descriptor & COPIED != 0, expected)
    }

    /// Whether nothing else lies in the cluster of an L1 entry.
    fn is_alone(&self, counts: &Counts, place: u64) -> bool {
        let cluster = place >> self.geometry.cluster_bits;
        if counts.covers(cluster) { counts.get(cluster).references == 1 } else { !self.sum.overlap }
    }

    /// A table is written to only if it is nothing but that table.
    fn may_change(&self, counts: &Counts, table: &TableUse) -> bool {
        let cluster = table.offset >> self.geometry.cluster_bits;
        let is_aligned = table.offset & (self.geometry.cluster_size_bytes() - 1) == 0;
        let is_alone = match counts.covers(cluster) {
            true => counts.get(cluster).references == table.uses.times,
            false => !self.sum.overlap,
        };
        is_aligned && is_alone
    }
}

fn bytes_of(entry: L2Entry) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&entry.descriptor.to_be_bytes());
    bytes[8..].copy_from_slice(&entry.bitmap.to_be_bytes());
    bytes
}
