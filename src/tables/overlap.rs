//! What must not be written to as if it were something else: where the metadata of the image is known to lie.
//!
//! The classes of the option `overlap_check`, each with those before it:
//! ```text
//! constant   header, active L1 table, refcount table, snapshot table      four ranges, compared in every lookup
//! cached     L2 tables of the active state, refcount blocks               from the tables in memory
//! all        L1 and L2 tables of snapshots, bitmap directory and tables   read before the first write, and again
//!                                                                         after whatever moves them
//! ```
//! `constant` costs a comparison, without a lock. The rest takes a lock and a search in a tree, and memory in proportion
//! to the tables that there are; it is for images that are not trusted.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use super::refcounts::DirtyRefcounts;
use super::{Tables, metadata_clusters};
use crate::error::{Corruption, CorruptionKind, Error, Result, Structure};
use crate::format::{Header, HostCluster, HostOffset, L1Index};
use crate::wait::lock;

/// What writes are checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum OverlapCheck {
    /// Nothing.
    None,
    /// What is known at no cost.
    #[default]
    Constant,
    /// And what the tables in memory refer to.
    Cached,
    /// And what only the file tells.
    All,
}

impl OverlapCheck {
    /// The class of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "none" => Some(Self::None),
            "constant" => Some(Self::Constant),
            "cached" => Some(Self::Cached),
            "all" => Some(Self::All),
            _ => None,
        }
    }
}

/// Metadata that only the file tells of.
#[derive(Default)]
pub struct Inactive {
    clusters: BTreeMap<u64, Structure>,
    ranges: BTreeMap<u64, (u64, Structure)>, // end of each by its start; no two overlap
}

impl Inactive {
    /// Adds a table. Of what overlaps with others, what is known of them stays.
    pub fn add_range(&mut self, mut clusters: Range<u64>, structure: Structure) {
        while !clusters.is_empty() {
            let before = self.ranges.range(..=clusters.start).next_back().map(|(_, (end, _))| *end);
            clusters.start = before.map_or(clusters.start, |end| end.max(clusters.start));
            let next = self.ranges.range(clusters.start..).next().map(|(start, _)| *start);
            let end = next.map_or(clusters.end, |start| start.min(clusters.end));
            if clusters.start < end {
                self.ranges.insert(clusters.start, (end, structure));
            }
            clusters.start = clusters.start.max(end);
        }
    }

    /// Adds one cluster.
    pub fn add(&mut self, cluster: u64, structure: Structure) {
        self.clusters.insert(cluster, structure);
    }

    /// The first of these clusters that is metadata.
    fn first_in(&self, clusters: &Range<u64>) -> Option<(u64, Structure)> {
        let before = self.ranges.range(..=clusters.start).next_back();
        let around = before.filter(|(_, (end, _))| *end > clusters.start && !clusters.is_empty());
        let range = around.or_else(|| self.ranges.range(clusters.clone()).next());
        let range = range.map(|(start, (_, structure))| (*start.max(&clusters.start), *structure));
        let one = self.clusters.range(clusters.clone()).next().map(|(cluster, structure)| (*cluster, *structure));
        range.into_iter().chain(one).min_by_key(|(cluster, _)| *cluster)
    }
}

/// What is checked, and what for.
#[derive(Default)]
pub(super) struct Overlap {
    pub(super) check: OverlapCheck,
    inactive: Mutex<Inactive>,
}

/// The use of a cluster that is known and right.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Own {
    Nothing,
    Table(L1Index),
    Block(u64),
}

impl Tables {
    /// Chooses what writes are checked against, before there are any.
    pub fn set_overlap_check(&mut self, check: OverlapCheck, header: &Header) {
        self.overlap.check = check;
        if check >= OverlapCheck::Cached {
            self.l1.note_places(self.geometry.cluster_size_bytes());
            self.refcounts.with(|state| state.note_places());
        }
        self.note_metadata(header);
    }

    /// What writes are checked against.
    pub fn overlap_check(&self) -> OverlapCheck {
        self.overlap.check
    }

    /// Sets what only the file tells of; nothing while it is being changed.
    pub fn set_inactive(&self, inactive: Inactive) {
        *lock(&self.overlap.inactive) = inactive;
    }

    pub(super) fn note_metadata(&self, header: &Header) {
        for (range, clusters) in self.metadata.iter().zip(metadata_clusters(header)) {
            range.set(if self.overlap.check == OverlapCheck::None { &(0..0) } else { &clusters });
        }
    }

    /// What a cluster holds of the metadata that writes are checked against. See the module text for what that costs.
    #[inline]
    pub fn metadata_in(&self, cluster: HostCluster) -> Option<Structure> {
        match self.constant_in(cluster) {
            None if self.overlap.check >= OverlapCheck::Cached => {
                self.known_in(cluster.0..cluster.0 + 1, Own::Nothing).map(|(_, structure)| structure)
            }
            constant => constant,
        }
    }

    /// As [`Tables::metadata_in`], of the header and of what it points to. Once the refcount table has moved, its old
    /// clusters are no metadata, and the new ones are not known here.
    #[inline]
    pub fn constant_in(&self, cluster: HostCluster) -> Option<Structure> {
        let constant = [Structure::Header, Structure::L1Table, Structure::SnapshotTable, Structure::RefcountTable];
        let index = self.metadata.iter().position(|range| range.contains(cluster.0))?;
        (index < 3 || !self.refcounts.has_moved()).then(|| constant[index])
    }

    /// The first of these clusters that is known to be in use as metadata, other than `own`.
    #[cold]
    fn known_in(&self, clusters: Range<u64>, own: Own) -> Option<(HostCluster, Structure)> {
        let own_table = if let Own::Table(index) = own { Some(index) } else { None };
        let own_block = if let Own::Block(index) = own { Some(index) } else { None };
        let at = |cluster| self.geometry.host_offset(HostCluster(cluster)).0;
        let offsets = at(clusters.start)..at(clusters.end);
        let cluster = |place: HostOffset| self.geometry.host_cluster(place);
        let table = self.l1.table_in(offsets.clone(), own_table).map(|at| (cluster(at), Structure::L2Table));
        let block = self.refcounts.with(|state| state.block_in(offsets, own_block));
        let block = block.map(|at| (cluster(at), Structure::RefcountBlock));
        let inactive = match self.overlap.check {
            OverlapCheck::All => lock(&self.overlap.inactive).first_in(&clusters),
            _ => None,
        };
        let inactive = inactive.map(|(cluster, structure)| (HostCluster(cluster), structure));
        [table, block, inactive].into_iter().flatten().min_by_key(|(cluster, _)| cluster.0)
    }

    /// Refuses clusters that are to be handed out, or punched, and hold metadata.
    pub fn check_unused(&self, clusters: Range<u64>) -> Result<()> {
        if self.overlap.check < OverlapCheck::Cached {
            return Ok(()); // the allocator has looked at what is constant
        }
        self.refuse(self.known_in(clusters, Own::Nothing))
    }

    fn refuse(&self, found: Option<(HostCluster, Structure)>) -> Result<()> {
        let Some((cluster, structure)) = found else { return Ok(()) };
        let kind = CorruptionKind::StructureCountedFree(structure);
        Err(self.refcounts.with(|state| state.corrupt(kind, cluster)))
    }

    /// Refuses to change an L2 table that lies in other metadata.
    pub fn check_table(&self, index: L1Index) -> Result<()> {
        let (table, _) = self.table(index)?;
        if self.overlap.check < OverlapCheck::Cached || table == HostOffset(0) {
            return Ok(());
        }
        let cluster = self.geometry.host_cluster(table).0;
        let Some((_, structure)) = self.known_in(cluster..cluster + 1, Own::Table(index)) else { return Ok(()) };
        let guest_offset = Some(index.0 * self.geometry.l2_table_covers_bytes());
        let (kind, host_offset) = (CorruptionKind::TableInStructure(structure), self.l1.entry_offset(index).0);
        Err(Error::Corrupt(Corruption { kind, host_offset, guest_offset, value: self.l1.get(index) }))
    }

    /// Refuses to write refcount blocks over other metadata.
    pub(super) fn check_blocks(&self, blocks: &DirtyRefcounts) -> Result<()> {
        if self.overlap.check < OverlapCheck::Cached {
            return Ok(());
        }
        for (index, at) in blocks.places() {
            let cluster = self.geometry.host_cluster(at).0;
            self.refuse(self.known_in(cluster..cluster + 1, Own::Block(index)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Inactive, Structure};

    /// Against a list of all clusters: ranges that overlap, touch, hold each other and are empty.
    #[test]
    fn the_first_of_some_clusters_is_found() {
        let mut next = 7u64;
        let mut below = |n: u64| {
            next = next.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (next >> 33) % n
        };
        for _ in 0..500 {
            let (mut inactive, mut known) = (Inactive::default(), [false; 64]);
            for _ in 0..below(9) {
                let start = below(60);
                let range = start..start + below(5);
                known[range.start as usize..range.end as usize].fill(true);
                inactive.add_range(range, Structure::Bitmaps);
            }
            for _ in 0..below(4) {
                let cluster = below(64);
                known[cluster as usize] = true;
                inactive.add(cluster, Structure::InactiveL2Table);
            }
            for (start, end) in (0..64).flat_map(|start| (start..=64).map(move |end| (start, end))) {
                let expected = (start..end).find(|&cluster| known[cluster as usize]);
                let found = inactive.first_in(&(start..end)).map(|(cluster, _)| cluster);
                assert_eq!(found, expected, "{start}..{end} of {known:?}");
            }
        }
    }
}
