//! New refcount structures from nothing but the references: for images whose own cannot be trusted or changed in place.
//!
//! They go behind everything that is in use, so that the old ones stay as they are until the header, in one write of
//! one sector, leads to the new ones. The old ones are free from then on. Copies of guest clusters ([`super::detach`])
//! are written and counted in the same go.

use std::ops::Range;

use super::compare::RefcountTable;
use super::counts::{CHUNK, Counts};
use super::detach::Copy;
use super::repair::QUIET;
use super::{Checker, Plan, READ_BYTES};
use crate::error::{Error, Result};
use crate::format::header::{OFFSET_REFCOUNT_TABLE, REFCOUNT_TABLE_BYTES_MAX};
use crate::format::l2::OFFSET_MASK;
use crate::format::{HostOffset, refcount};
use crate::storage::Io;

/// A walk that counts what the new structures have to cover, the old ones not included.
pub(super) const WITHOUT_OLD: Plan = Plan { report: false, look: false, refcounts: false };
/// Most entries of a refcount table.
const BLOCKS_MAX: u64 = REFCOUNT_TABLE_BYTES_MAX / 8;

/// Where new structures go: the table first, its blocks behind it.
struct Place {
    first: u64,
    table_clusters: u64,
    /// Indices of the blocks, in order.
    blocks: Vec<u64>,
    /// Copies of guest clusters, behind them.
    copies: u64,
}

impl Place {
    fn clusters(&self) -> u64 {
        self.own_clusters() + self.copies
    }

    /// Those of the refcount structures themselves.
    fn own_clusters(&self) -> u64 {
        self.table_clusters + self.blocks.len() as u64
    }

    fn cluster_of(&self, block: u64) -> Option<u64> {
        let rank = self.blocks.binary_search(&block).ok()?;
        Some(self.first + self.table_clusters + rank as u64)
    }
}

impl<I: Io> Checker<'_, '_, I> {
    /// Makes new structures and switches to them; then, `copies` are referred to.
    pub(super) async fn rebuild(&mut self, copies: &[Copy]) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        // Behind everything, the old structures included, whose own counts may not even know of it.
        let used_end = self.count(0, QUIET).await?.highest().max(self.sum.used_end);
        let mut place = self.place(used_end, copies).await?;
        if let Some(Range { start: low, end: high }) = self.sum.outside
            && place.first + place.clusters() > low
        {
            // What refers to nothing must not come to refer to the new structures: they go behind that, and the
            // clusters before them become part of the file, as empty as they have been.
            self.file_bytes = self.file_bytes.max(high << bits);
            place = self.place(high.max(used_end), copies).await?;
        }
        let end = place.first + place.clusters();
        if end > OFFSET_MASK >> bits {
            return self.too_large("the offset of new refcount structures", OFFSET_MASK);
        }
        self.file_bytes = self.file_bytes.max(end << bits);
        self.write_zeroes(place.first << bits, end << bits).await?;
        self.write_copies(copies, place.first + place.own_clusters()).await?;
        self.write_blocks(&place, copies).await?;
        let mut entries = vec![0; (place.table_clusters << bits) as usize / 8];
        for &block in &place.blocks {
            entries[block as usize] = place.cluster_of(block).unwrap_or(0) << bits;
        }
        let table: Vec<u8> = entries.iter().flat_map(|entry: &u64| entry.to_be_bytes()).collect();
        self.put(&table, HostOffset(place.first << bits)).await?;
        self.file.barrier(self.io).await?;
        let mut roots = [0; 12];
        roots[..8].copy_from_slice(&(place.first << bits).to_be_bytes());
        roots[8..].copy_from_slice(&(place.table_clusters as u32).to_be_bytes());
        self.put(&roots, HostOffset(OFFSET_REFCOUNT_TABLE)).await?;
        self.file.barrier(self.io).await?;
        self.header.refcount_table_offset = HostOffset(place.first << bits);
        self.header.refcount_table_clusters = place.table_clusters as u32;
        self.refcounts = RefcountTable { entries: entries.into(), is_usable: true };
        if copies.is_empty() {
            return Ok(());
        }
        self.link_copies(copies, place.first + place.own_clusters()).await
    }

    /// What is needed behind cluster `first`: a block for everything in use, the new structures themselves included.
    async fn place(&mut self, first: u64, copies: &[Copy]) -> Result<Place> {
        let block_bits = self.geometry.refcount_block_bits();
        let mut is_needed = Vec::new();
        let mut from = Some(0);
        while let Some(start) = from {
            let counts = self.count(start, WITHOUT_OLD).await?;
            self.note_needed(&counts, &mut is_needed)?;
            from = counts.next().filter(|next| *next < self.file_clusters());
        }
        let mut place = Place { first, table_clusters: 1, blocks: Vec::new(), copies: copies.len() as u64 };
        loop {
            let end = first + place.clusters();
            let own = first >> block_bits..((end - 1) >> block_bits) + 1;
            if own.end > BLOCKS_MAX {
                return self.too_large("the number of refcount blocks", BLOCKS_MAX);
            }
            is_needed.resize(is_needed.len().max(own.end as usize), false);
            own.for_each(|block| is_needed[block as usize] = true);
            let blocks = (0u64..).zip(&is_needed).filter(|(_, needed)| **needed).map(|(block, _)| block);
            let last = (is_needed.len() as u64 * 8).div_ceil(self.geometry.cluster_size_bytes());
            let next = Place { table_clusters: last, blocks: blocks.collect(), ..place };
            if next.clusters() == place.clusters() {
                return Ok(next);
            }
            place = next;
        }
    }

    fn note_needed(&self, counts: &Counts, is_needed: &mut Vec<bool>) -> Result<()> {
        let bits = self.geometry.refcount_block_bits();
        for first in counts.chunk_starts() {
            for cluster in (first..first + CHUNK).filter(|cluster| counts.get(*cluster).references > 0) {
                let block = cluster >> bits;
                if block >= BLOCKS_MAX {
                    return self.too_large("the number of refcount blocks", BLOCKS_MAX);
                }
                is_needed.resize(is_needed.len().max(block as usize + 1), false);
                is_needed[block as usize] = true;
            }
        }
        Ok(())
    }

    async fn write_zeroes(&self, mut offset: u64, end: u64) -> Result<()> {
        let zeroes = vec![0; (end - offset).min(READ_BYTES as u64) as usize];
        while offset < end {
            let n = (end - offset).min(zeroes.len() as u64);
            self.put(&zeroes[..n as usize], HostOffset(offset)).await?;
            offset += n;
        }
        Ok(())
    }

    async fn write_blocks(&mut self, place: &Place, copies: &[Copy]) -> Result<()> {
        let mut from = Some(0);
        while let Some(start) = from {
            let mut counts = self.count(start, WITHOUT_OLD).await?;
            counts.add(place.first, place.own_clusters(), 1, 0);
            for (copy, cluster) in copies.iter().zip(place.first + place.own_clusters()..) {
                counts.add(cluster, 1, copy.times, 0);
            }
            let starts: Vec<u64> = counts.chunk_starts().collect();
            let bits = self.geometry.refcount_block_bits();
            let blocks = starts.iter().flat_map(|first| first >> bits..((first + CHUNK - 1) >> bits) + 1);
            let mut blocks: Vec<u64> = blocks.collect();
            blocks.dedup();
            for block in blocks {
                if let Some(cluster) = place.cluster_of(block) {
                    self.write_block(&counts, block, cluster << self.geometry.cluster_bits).await?;
                }
            }
            from = counts.next().filter(|next| *next < self.file_clusters());
        }
        Ok(())
    }

    /// Writes what the window has to say about one block.
    async fn write_block(&self, counts: &Counts, block: u64, offset: u64) -> Result<()> {
        let (order, max) = (self.geometry.refcount_order, self.geometry.refcount_max());
        let parts: Vec<(u64, u64)> = self.parts(counts, block).collect();
        for (first, n) in parts {
            let mut bytes = vec![0; ((n << order) / 8) as usize];
            for (index, cluster) in (first..first + n).enumerate() {
                refcount::set(&mut bytes, order, index, counts.get(cluster).references.min(max));
            }
            if bytes.iter().any(|byte| *byte != 0) {
                let at = HostOffset(offset + self.offset_in_block(first));
                self.put(&bytes, at).await?;
            }
        }
        Ok(())
    }

    fn too_large<T>(&self, what: &'static str, limit: u64) -> Result<T> {
        Err(Error::TooLarge { what, limit })
    }
}
