//! A tree of mapping tables: an L1 table, the L2 tables that it points to, and the clusters behind them. Walked table
//! by table, in memory that does not grow with the tree.

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use crate::alloc::{Allocator, bulk};
use crate::error::{Corruption, CorruptionKind, Error, Result};
use crate::format::l2::{COPIED, decode_l1};
use crate::format::{HostCluster, HostOffset, L1Index, SliceIndex, l2_table, words};
use crate::image::progress::Progress;
use crate::storage::{Io, IoDst};
use crate::tables::Tables;

/// What is going to be done with the references of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Count {
    /// Each gets one more.
    Raise,
    /// Each is taken back.
    Lower,
}

/// A tree, of which the L1 table is in memory.
pub(super) struct Tree {
    l1: Vec<u64>,
    l1_at: HostOffset,
}

/// An L2 table of a tree.
struct Table {
    at: HostOffset,
    bytes: Vec<u8>,
    /// The table's own cluster and those that its entries refer to, sorted.
    clusters: Vec<u64>,
}

impl Tree {
    /// The tree that the guest sees.
    pub(super) fn active(tables: &Tables) -> Self {
        Self { l1: tables.l1.entries(), l1_at: tables.l1.host_range().start }
    }

    /// The tree of an L1 table in the file. Its place has been checked.
    pub(super) async fn load<I: Io>(io: &I, tables: &Tables, l1_at: HostOffset, entries: u32) -> Result<Self> {
        let mut bytes = vec![0; entries as usize * 8];
        if !bytes.is_empty() {
            tables.file.read(io, &[IoDst::from(&mut bytes[..])], l1_at).await?;
        }
        Ok(Self { l1: words(&bytes).collect(), l1_at })
    }

    /// Its L1 entries as they have to be where the tree is shared: nothing is COPIED.
    pub(super) fn shared_l1(&self) -> Vec<u64> {
        self.l1.iter().map(|entry| entry & !COPIED).collect()
    }

    /// The host clusters of its L1 table.
    pub(super) fn l1_clusters(&self, tables: &Tables) -> Vec<u64> {
        let first = tables.geometry.host_cluster(self.l1_at).0;
        (first..first + tables.geometry.clusters_for(self.l1.len() as u64 * 8)).collect()
    }

    /// How much work it is to walk the tree.
    pub(super) fn work(&self) -> u64 {
        self.l1.len() as u64
    }

    /// Where the L2 table of an L1 entry is.
    fn table_at(&self, tables: &Tables, index: usize) -> Result<HostOffset> {
        let (at, _) = decode_l1(self.l1[index], tables.geometry).map_err(|kind| self.corrupt(tables, kind, index))?;
        if at != HostOffset(0) && tables.is_metadata(tables.geometry.host_cluster(at)) {
            return Err(self.corrupt(tables, CorruptionKind::L2TableInMetadata, index));
        }
        Ok(at)
    }

    fn corrupt(&self, tables: &Tables, kind: CorruptionKind, index: usize) -> Error {
        let guest_offset = Some(index as u64 * tables.geometry.l2_table_covers_bytes());
        let host_offset = self.l1_at.0 + index as u64 * 8;
        Error::Corrupt(Corruption { kind, host_offset, guest_offset, value: self.l1[index] })
    }

    /// Reads and verifies the L2 table of an L1 entry, if there is one.
    async fn table<I: Io>(&self, io: &I, tables: &Tables, index: usize) -> Result<Option<Table>> {
        let geometry = tables.geometry;
        let at = self.table_at(tables, index)?;
        if at == HostOffset(0) {
            return Ok(None);
        }
        let mut bytes = vec![0; geometry.cluster_size_bytes() as usize];
        let got = tables.file.read(io, &[IoDst::from(&mut bytes[..])], at).await?;
        if got < bytes.len() {
            return Err(self.corrupt(tables, CorruptionKind::L2TableBeyondEof, index));
        }
        let entry_error = |kind, entry: u64, value| {
            Error::Corrupt(Corruption {
                kind,
                host_offset: at.0 + entry * geometry.l2_entry_bytes(),
                guest_offset: Some(index as u64 * geometry.l2_table_covers_bytes() + (entry << geometry.cluster_bits)),
                value,
            })
        };
        let mut clusters =
            l2_table::references(&bytes, geometry).map_err(|bad| entry_error(bad.kind, bad.index, bad.descriptor))?;
        let in_metadata = |&cluster: &u64| Some((cluster, tables.constant_in(HostCluster(cluster))?));
        if let Some((cluster, structure)) = clusters.iter().find_map(in_metadata) {
            let value = geometry.host_offset(HostCluster(cluster)).0;
            return Err(entry_error(CorruptionKind::ClusterInMetadata(structure), 0, value));
        }
        let own = geometry.host_cluster(at).0;
        let place = clusters.partition_point(|&cluster| cluster < own);
        clusters.insert(place, own);
        Ok(Some(Table { at, bytes, clusters }))
    }

    /// Verifies all of the tree, and that its references can be counted so, before anything changes.
    pub(super) async fn check<I: Io>(
        &self,
        io: &I,
        tables: &Tables,
        count: Count,
        progress: &Progress<'_>,
    ) -> Result<()> {
        for index in 0..self.l1.len() {
            if let Some(table) = self.table(io, tables, index).await? {
                match count {
                    Count::Raise => bulk::check_raise(io, tables, &table.clusters).await?,
                    Count::Lower => bulk::check_lower(io, tables, &table.clusters).await?,
                }
            }
            progress.advance(1)?;
        }
        match count {
            Count::Raise => Ok(()),
            Count::Lower => bulk::check_lower(io, tables, &self.l1_clusters(tables)).await,
        }
    }

    /// Says of the active tree that nothing in it is its own alone any more: in memory, and with the next pass in the L1
    /// table on disk. [`Tree::share`] has done so for the L2 tables on disk.
    pub(super) fn disown(&self, tables: &Tables) {
        tables.l2.clear_copied();
        for (index, &entry) in self.l1.iter().enumerate().filter(|(_, entry)| **entry & COPIED != 0) {
            tables.l1.set(L1Index(index as u64), entry & !COPIED, false);
        }
    }

    /// Adds a reference to everything in the tree, and clears its COPIED flags in the file: both have to be durable
    /// before a second L1 table makes the tree reachable. After an error nothing has been added.
    pub(super) async fn share<I: Io>(&self, io: &I, tables: &Tables, allocator: &Allocator) -> Result<()> {
        for index in 0..self.l1.len() {
            if let Err(e) = self.share_table(io, tables, allocator, index).await {
                // What cannot be taken back now is taken back later; what counts is why.
                let _ = self.lower_tables(io, tables, allocator, false, 0..index, &Progress::none()).await;
                return Err(e);
            }
        }
        Ok(())
    }

    async fn share_table<I: Io>(&self, io: &I, tables: &Tables, allocator: &Allocator, index: usize) -> Result<()> {
        let Some(mut table) = self.table(io, tables, index).await? else { return Ok(()) };
        // A write that failed may be read back as done, and need not be on the disk.
        if l2_table::clear_copied(&mut table.bytes, tables.geometry) || allocator.flags_in_doubt.load(Relaxed) {
            let written = tables.file.write_bytes(io, &table.bytes, table.at).await;
            allocator.flags_in_doubt.fetch_or(written.is_err(), Relaxed);
            written?;
        }
        bulk::raise(io, tables, &table.clusters).await
    }

    /// Takes back a reference from everything in the tree, which no L1 table on disk makes reachable by that any more.
    /// What an error gets in the way of is done with a later flush.
    pub(super) async fn lower<I: Io>(
        &self,
        io: &I,
        tables: &Tables,
        allocator: &Allocator,
        punch: bool,
        progress: &Progress<'_>,
    ) -> Result<()> {
        self.lower_tables(io, tables, allocator, punch, 0..self.l1.len(), progress).await
    }

    /// As [`Tree::lower`], for the tables behind these L1 entries.
    async fn lower_tables<I: Io>(
        &self,
        io: &I,
        tables: &Tables,
        allocator: &Allocator,
        punch: bool,
        indices: Range<usize>,
        progress: &Progress<'_>,
    ) -> Result<()> {
        let mut result = Ok(());
        for index in indices {
            let _ = progress.advance(1); // too late to be ended
            result = result.and(match self.table(io, tables, index).await {
                Ok(Some(table)) => bulk::lower(io, tables, allocator, &table.clusters, punch).await,
                Ok(None) => Ok(()),
                Err(e) => {
                    let place = decode_l1(self.l1[index], tables.geometry);
                    if let (Error::Io { .. }, Ok((at, _))) = (&e, place) {
                        lower_later(tables, allocator, index, at);
                    }
                    Err(e)
                }
            });
        }
        result
    }
}

/// For a table that cannot be read while references are taken back: it stays as it is until it can be, and is copied by
/// whoever wants to change it before. Otherwise it would be what the guest made of it meanwhile that loses references.
fn lower_later(tables: &Tables, allocator: &Allocator, index: usize, at: HostOffset) {
    let place = L1Index(index as u64);
    let active = tables.l1.get(place);
    if active & COPIED != 0 && tables.table(place).is_ok_and(|(table, _)| table == at) {
        tables.l1.set(place, active & !COPIED, false);
    }
    bulk::keep_for_later(allocator, at);
}

/// Makes the COPIED flags of the active tree say again what it has alone, after something has let go of it: what was
/// shared can be changed in place then. Flags in tables that were shared may be stale, and are not taken for granted
/// (D4). Nothing of the tree waits to be written.
pub(super) async fn own_what_is_single<I: Io>(io: &I, tables: &Tables, progress: &Progress<'_>) -> Result<()> {
    let active = Tree::active(tables);
    for index in 0..active.l1.len() {
        let _ = progress.advance(1); // too late to be ended
        let at = active.table_at(tables, index)?;
        let own = tables.geometry.host_cluster(at).0;
        if at == HostOffset(0) || bulk::with_one_reference(io, tables, &[own]).await?.is_empty() {
            continue; // what a shared table refers to is shared as well
        }
        let Some(mut table) = active.table(io, tables, index).await? else { continue };
        let single = bulk::with_one_reference(io, tables, &table.clusters).await?;
        let is_single = |cluster: HostCluster| single.binary_search(&cluster.0).is_ok();
        if l2_table::rebuild_copied(&mut table.bytes, tables.geometry, is_single) {
            tables.file.write_bytes(io, &table.bytes, table.at).await?;
            let first = index as u64 * tables.geometry.slices_per_table();
            tables.l2.forget(SliceIndex(first)..SliceIndex(first + tables.geometry.slices_per_table()));
        }
        if active.l1[index] & COPIED == 0 {
            tables.l1.set(L1Index(index as u64), active.l1[index] | COPIED, false);
        }
    }
    Ok(())
}
