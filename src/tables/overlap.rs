//! What must not be written to as if it were something else: where the metadata of the image is known to lie.
//!
//! The classes of the option `overlap_check`, each with those before it:
//! ```text
//! constant   header, active L1 table, refcount table, snapshot table      four ranges, compared in every lookup
//! cached     L2 tables of the active state, refcount blocks               from the tables in memory
//! all        L1 and L2 tables of snapshots, bitmap directory and tables   read before the first write, and again
//!                                                                         after whatever moves them
//! ```
//! `constant` costs a comparison, without a lock. The rest takes time in proportion to the L1 and refcount tables, and is
//! for images that are not trusted.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use super::refcounts::DirtyRefcounts;
use super::{Tables, metadata_clusters};
use crate::error::{Corruption, CorruptionKind, Error, Result, Structure};
use crate::format::l2::OFFSET_MASK;
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
    clusters: HashMap<u64, Structure>,
    ranges: Vec<(Range<u64>, Structure)>,
}

impl Inactive {
    /// Adds a table.
    pub fn add_range(&mut self, clusters: Range<u64>, structure: Structure) {
        self.ranges.push((clusters, structure));
    }

    /// Adds one cluster.
    pub fn add(&mut self, cluster: u64, structure: Structure) {
        self.clusters.insert(cluster, structure);
    }

    fn find(&self, cluster: u64) -> Option<Structure> {
        let range = self.ranges.iter().find(|(range, _)| range.contains(&cluster));
        range.map(|(_, structure)| *structure).or_else(|| self.clusters.get(&cluster).copied())
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
    Table(u64),
    Block(u64),
}

impl Tables {
    /// Chooses what writes are checked against, before there are any.
    pub fn set_overlap_check(&mut self, check: OverlapCheck, header: &Header) {
        self.overlap.check = check;
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
            None if self.overlap.check >= OverlapCheck::Cached => self.known_in(cluster, Own::Nothing),
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

    #[cold]
    fn known_in(&self, cluster: HostCluster, own: Own) -> Option<Structure> {
        let at = self.geometry.host_offset(cluster).0;
        let mut tables = (0..self.l1.count()).filter(|&index| own != Own::Table(index));
        if at != 0 && tables.any(|index| self.l1.get(L1Index(index)) & OFFSET_MASK == at) {
            return Some(Structure::L2Table);
        }
        let is_block = |index: Option<u64>| index.is_some_and(|index| own != Own::Block(index));
        if is_block(self.refcounts.with(|state| state.block_in(cluster))) {
            return Some(Structure::RefcountBlock);
        }
        match self.overlap.check {
            OverlapCheck::All => lock(&self.overlap.inactive).find(cluster.0),
            _ => None,
        }
    }

    /// Refuses clusters that are to be handed out, or punched, and hold metadata.
    pub fn check_unused(&self, clusters: Range<u64>) -> Result<()> {
        if self.overlap.check < OverlapCheck::Cached {
            return Ok(()); // the allocator has looked at what is constant
        }
        for cluster in clusters.map(HostCluster) {
            if let Some(structure) = self.known_in(cluster, Own::Nothing) {
                let kind = CorruptionKind::StructureCountedFree(structure);
                return Err(self.refcounts.with(|state| state.corrupt(kind, cluster)));
            }
        }
        Ok(())
    }

    /// Refuses to change an L2 table that lies in other metadata.
    pub fn check_table(&self, index: L1Index) -> Result<()> {
        let (table, _) = self.table(index)?;
        if self.overlap.check < OverlapCheck::Cached || table == HostOffset(0) {
            return Ok(());
        }
        let Some(structure) = self.known_in(self.geometry.host_cluster(table), Own::Table(index.0)) else {
            return Ok(());
        };
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
            let cluster = self.geometry.host_cluster(at);
            if let Some(structure) = self.known_in(cluster, Own::Block(index)) {
                let kind = CorruptionKind::StructureCountedFree(structure);
                return Err(self.refcounts.with(|state| state.corrupt(kind, cluster)));
            }
        }
        Ok(())
    }
}
