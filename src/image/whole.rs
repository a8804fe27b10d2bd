//! L2 tables that are dropped as a whole: because a request covers all that one maps, or because nothing is left in it.
//!
//! Without its table, all of a range is unallocated. Where nothing lies below, that reads as zeroes, so that neither its
//! entries have to be changed one by one nor the table kept. On disk this is one L1 entry; what the table and its
//! entries refer to is released as ever, once that is durable (O3).

use std::collections::HashMap;
use std::ops::Range;

use super::Image;
use crate::error::Result;
use crate::format::{GuestOffset, Host, HostOffset, L1Index, L2Entry, SliceIndex, words as stored_words};
use crate::storage::{Io, IoDst};
use crate::tables::Tables;
use crate::wait::lock;

/// An L2 table is looked at with the next flush once it has let go of one in this many of its clusters: dropping it and
/// making a new one later costs a cluster each, and so is small beside what it was needed for.
const PRUNE_ONE_IN: u64 = 64;

/// Most L2 tables that are remembered so, to bound memory (M9).
const EMPTIED_MAX: usize = 1 << 16;

/// L2 tables from which clusters were dropped: how many, since somebody looked at what is left.
pub(super) type Emptied = HashMap<L1Index, u64>;

impl Image {
    /// Whether all that an L2 table maps may be unallocated to read as zeroes, from the table's first byte on.
    fn may_lack_table(&self, at: GuestOffset) -> bool {
        self.active().external.is_none() && self.below_is_zero(at)
    }

    /// Zeroes or discards all that the L2 table at `at` maps, if `end` is behind that: by dropping the table, where
    /// `may_unmap` allows it, or by doing nothing where there is none. Returns how much that was.
    pub(super) async fn drop_whole<I: Io>(
        &self,
        io: &I,
        at: GuestOffset,
        end: u64,
        may_unmap: bool,
    ) -> Result<Option<u64>> {
        let tables = self.active();
        let covers = tables.geometry.l2_table_covers_bytes();
        let length = covers.min(self.size().saturating_sub(at.0));
        if !at.0.is_multiple_of(covers) || length == 0 || end - at.0 < length || !self.may_lack_table(at) {
            return Ok(None);
        }
        let index = tables.geometry.l1_index(at);
        if tables.table(index)?.0 != HostOffset(0) {
            if !may_unmap {
                return Ok(None);
            }
            let _claim = self.claim_clusters(io, at, length).await?;
            self.drop_table(io, index).await?;
        }
        Ok(Some(length))
    }

    /// Drops an L2 table and everything in it. The caller has claimed all clusters that it maps.
    async fn drop_table<I: Io>(&self, io: &I, index: L1Index) -> Result<()> {
        let tables = self.active();
        let (at, ours) = tables.table(index)?;
        if at == HostOffset(0) {
            return Ok(());
        }
        let hosts = referred_to(tables, index, &read_table(io, tables, index).await?, ours)?;
        let change = tables.give_up_table(index).await;
        lock(&self.emptied).remove(&index);
        let own = tables.geometry.host_cluster(at).0;
        self.allocator.release(own..own + 1, change);
        hosts.into_iter().for_each(|run| self.allocator.release(run, change));
        Ok(())
    }

    /// Notes that clusters of an L2 table have been dropped.
    pub(super) fn note_emptied(&self, at: GuestOffset, clusters: u64) {
        if clusters > 0 && self.may_lack_table(at) {
            let mut emptied = lock(&self.emptied);
            let index = self.active().geometry.l1_index(at);
            if emptied.len() < EMPTIED_MAX || emptied.contains_key(&index) {
                *emptied.entry(index).or_default() += clusters;
            }
        }
    }

    /// Drops L2 tables in which nothing is left, where enough has been dropped from them. Returns whether there were
    /// any. Where somebody is at work, a table is left for the next time.
    pub(super) async fn drop_empty_tables<I: Io>(&self, io: &I) -> Result<bool> {
        let tables = self.active();
        let per_table = 1u64 << tables.geometry.l2_bits();
        let is_due = |&(_, &clusters): &(&L1Index, &u64)| clusters >= per_table.div_ceil(PRUNE_ONE_IN);
        let due: Vec<L1Index> = lock(&self.emptied).iter().filter(is_due).map(|(index, _)| *index).collect();
        let mut dropped = false;
        for index in due {
            let first = index.0 * per_table;
            let Some(_claim) = self.cluster_claims.try_claim(first..first + per_table) else { continue };
            lock(&self.emptied).remove(&index);
            let at = GuestOffset(index.0 * tables.geometry.l2_table_covers_bytes());
            let (table, ours) = tables.table(index)?;
            if table == HostOffset(0) || at.0 >= self.size() || !self.may_lack_table(at) {
                continue;
            }
            let entries = read_table(io, tables, index).await?;
            if referred_to(tables, index, &entries, ours)?.is_empty() {
                self.drop_table(io, index).await?;
                dropped = true;
            }
        }
        Ok(dropped)
    }
}

/// The words of an L2 table as they are now. The caller keeps everybody from changing them.
async fn read_table<I: Io>(io: &I, tables: &Tables, index: L1Index) -> Result<Vec<u64>> {
    let geometry = tables.geometry;
    let words = (geometry.slice_bytes() / 8) as usize;
    let slices = geometry.slices_per_table();
    let (table, _) = tables.table(index)?;
    let mut content = vec![0; words * slices as usize];
    let mut missing: Vec<Range<u64>> = Vec::new();
    for (slice, place) in (0..).zip(content.chunks_exact_mut(words)) {
        // What is not cached is on disk: a slice with changes is never evicted.
        if tables.l2.copy(SliceIndex(index.0 * slices + slice), place) {
            continue;
        }
        match missing.last_mut() {
            Some(run) if run.end == slice => run.end += 1,
            _ => missing.push(slice..slice + 1),
        }
    }
    for run in missing {
        let mut bytes = vec![0; ((run.end - run.start) * geometry.slice_bytes()) as usize];
        tables.file.read(io, &[IoDst::from(&mut bytes[..])], table.plus(run.start * geometry.slice_bytes())).await?;
        let place = &mut content[run.start as usize * words..run.end as usize * words];
        for (word, stored) in place.iter_mut().zip(stored_words(&bytes)) {
            *word = stored;
        }
    }
    Ok(content)
}

/// The host clusters that the entries of a table refer to, as runs.
fn referred_to(tables: &Tables, index: L1Index, words: &[u64], ours: bool) -> Result<Vec<Range<u64>>> {
    let geometry = tables.geometry;
    let step = if geometry.extended_l2 { 2 } else { 1 };
    let first = GuestOffset(index.0 * geometry.l2_table_covers_bytes());
    let mut runs: Vec<Range<u64>> = Vec::new();
    for (cluster, entry) in (0..).zip(words.chunks_exact(step)) {
        let entry = L2Entry { descriptor: entry[0], bitmap: entry.get(1).copied().unwrap_or(0) };
        if entry.descriptor == 0 && entry.bitmap == 0 {
            continue;
        }
        let state = tables.meaning(entry, first.plus(cluster << geometry.cluster_bits), ours)?;
        if state.host == Host::None {
            continue;
        }
        let run = state.host.clusters(geometry);
        match runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => runs.push(run),
        }
    }
    Ok(runs)
}
