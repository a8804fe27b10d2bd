//! Guest clusters that lie where metadata does: each gets a copy of its own, so that the guest reads what it read, and
//! neither of the two is overwritten through the other any more.

use super::Checker;
use std::collections::HashMap;

use super::counts::{Counts, METADATA};
use super::mend::has_cluster;
use super::rebuild::WITHOUT_OLD;
use super::tables::TableUse;
use crate::error::Result;
use crate::format::l2::{COPIED, OFFSET_MASK};
use crate::format::{HostOffset, L2Entry};
use crate::storage::Io;

/// An entry that is to refer to a copy.
#[derive(Debug, Clone, Copy)]
pub struct Copy {
    /// Where its descriptor is.
    place: u64,
    descriptor: u64,
    /// How often its table is referred to.
    pub times: u64,
    /// The cluster of its table, and all references to that.
    table: (u64, u64),
}

/// Leaves out entries of tables in which something lies that stays there: a change of the table would change it.
fn only_in_tables_of_their_own(copies: &mut Vec<Copy>, cluster_bits: u32) {
    loop {
        let mut leaving: HashMap<u64, u64> = HashMap::new();
        for copy in &*copies {
            *leaving.entry((copy.descriptor & OFFSET_MASK) >> cluster_bits).or_default() += copy.times;
        }
        let before = copies.len();
        copies.retain(|copy| {
            let (cluster, references) = copy.table;
            references == copy.times + leaving.get(&cluster).copied().unwrap_or(0)
        });
        if copies.len() == before {
            return;
        }
    }
}

impl<I: Io> Checker<'_, '_, I> {
    /// Entries that refer to a cluster of metadata. (Not those that refer to the refcount structures, which move away.)
    pub(super) async fn find_overlaps(&mut self) -> Result<Vec<Copy>> {
        let mut copies = Vec::new();
        let mut from = Some(0).filter(|_| self.sum.overlap && !self.has_data_file());
        while let Some(start) = from {
            let counts = self.count(start, WITHOUT_OLD).await?;
            let l1_tables = self.l1_tables();
            let mut offset = Some(0);
            while let Some(at) = offset {
                let list = self.list_tables(&l1_tables, at, WITHOUT_OLD).await?;
                for table in &list.tables {
                    self.find_overlaps_in(&counts, table, &mut copies).await?;
                }
                offset = list.end;
            }
            from = counts.next();
        }
        only_in_tables_of_their_own(&mut copies, self.geometry.cluster_bits);
        Ok(copies)
    }

    async fn find_overlaps_in(&self, counts: &Counts, table: &TableUse, copies: &mut Vec<Copy>) -> Result<()> {
        let (size, width) = (self.geometry.cluster_size_bytes(), self.geometry.l2_entry_bytes());
        if table.offset & (size - 1) != 0 || table.offset >= self.file_bytes {
            return Ok(());
        }
        let mut bytes = vec![0; size as usize];
        self.read(&mut bytes, table.offset).await?;
        let own = table.offset >> self.geometry.cluster_bits;
        // Of a table that this window does not count, nothing is known: a limit of memory that few images meet.
        let table_references = if counts.covers(own) { counts.get(own).references } else { u64::MAX };
        for (place, stored) in (table.offset..).step_by(width as usize).zip(bytes.chunks_exact(width as usize)) {
            let descriptor = stored.first_chunk().map_or(0, |word| u64::from_be_bytes(*word));
            let offset = descriptor & OFFSET_MASK;
            let is_whole = offset & (size - 1) == 0 && offset < self.file_bytes;
            if !is_whole || !has_cluster(L2Entry { descriptor, bitmap: 0 }, self.geometry, false) {
                continue;
            }
            let counter = counts.get(offset >> self.geometry.cluster_bits);
            let is_overlap = counter.flags & METADATA != 0 && counter.references > 1;
            let has_room = copies.len() < self.options.memory_bytes as usize / 8 / size_of::<Copy>();
            if is_overlap && has_room && table.uses.times <= self.geometry.refcount_max() {
                let times = table.uses.times;
                copies.push(Copy { place, descriptor, times, table: (own, table_references) });
            }
        }
        Ok(())
    }

    /// Copies the clusters, the first to host cluster `first`.
    pub(super) async fn write_copies(&self, copies: &[Copy], first: u64) -> Result<()> {
        let mut bytes = vec![0; self.geometry.cluster_size_bytes() as usize];
        for (copy, cluster) in copies.iter().zip(first..) {
            self.read(&mut bytes, copy.descriptor & OFFSET_MASK).await?;
            self.put(&bytes, HostOffset(cluster << self.geometry.cluster_bits)).await?;
        }
        Ok(())
    }

    /// Lets the entries refer to the copies, which are durable and counted.
    pub(super) async fn link_copies(&self, copies: &[Copy], first: u64) -> Result<()> {
        for (copy, cluster) in copies.iter().zip(first..) {
            let rest = copy.descriptor & !(OFFSET_MASK | COPIED);
            let descriptor = rest | cluster << self.geometry.cluster_bits;
            self.put(&descriptor.to_be_bytes(), HostOffset(copy.place)).await?;
        }
        self.file.barrier(self.io).await
    }
}
