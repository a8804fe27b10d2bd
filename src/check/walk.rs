//! What the header leads to: areas of known length, the snapshot table, the bitmap directory; and one walk that counts
//! all references to the clusters of a window.

use std::sync::Arc;

use super::counts::{Counts, METADATA, Near};
use super::finding::{Finding, FindingKind};
use super::l2::{clusters_of, is_outside};
use super::{Checker, Plan, READ_BYTES};
use crate::error::Result;
use crate::format::bitmap::{BitsAt, parse_directory};
use crate::format::extension;
use crate::format::header::{AUTOCLEAR_BITMAPS, Encryption, L1_ENTRIES_MAX};
use crate::format::snapshot::{Parsed, Snapshot, TABLE_BYTES_MAX};
use crate::storage::Io;

/// A range of the file that is in use as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// What it is.
    pub what: &'static str,
    /// Where it begins.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// It is a bitmap table, and its entries refer to clusters.
    pub is_bitmap: bool,
}

impl Area {
    fn new(what: &'static str, offset: u64, bytes: u64) -> Self {
        Self { what, offset, bytes, is_bitmap: false }
    }
}

impl<I: Io> Checker<'_, '_, I> {
    /// Reads what tells how long areas are, and tells what is wrong with it.
    pub(super) async fn read_areas(&mut self) -> Result<()> {
        self.snapshots.clear();
        self.areas.clear();
        self.areas.push(Area::new("header", 0, self.geometry.cluster_size_bytes()));
        self.read_snapshots().await?;
        if self.header.encryption == Encryption::Luks
            && let Some(data) = extension::find(&self.header.extensions, extension::ENCRYPTION)
            && let [offset, length] = data.as_chunks::<8>().0
        {
            let [offset, length] = [offset, length].map(|word| u64::from_be_bytes(*word));
            self.areas.push(Area::new("encryption header", offset, length));
        }
        if self.header.autoclear & AUTOCLEAR_BITMAPS != 0 {
            self.read_bitmaps().await?;
        }
        Ok(())
    }

    fn wrong(&mut self, kind: FindingKind, what: &'static str, host_offset: u64, value: u64) {
        let finding = Finding { kind, what, host_offset, guest_offset: None, value, references: 0, clusters: 1 };
        self.find(finding);
    }

    async fn read_snapshots(&mut self) -> Result<()> {
        let start = self.header.snapshots_offset.0;
        let (mut bytes, mut used, mut at) = (Vec::new(), 0, start);
        for index in 0..self.header.snapshots {
            let snapshot = loop {
                match Snapshot::parse(&bytes[used..], index) {
                    Ok(Parsed::Entry(snapshot, length)) => {
                        used = (used + length).min(bytes.len());
                        at += length as u64;
                        break snapshot;
                    }
                    Ok(Parsed::Short(wanted)) if at.saturating_add(wanted as u64) <= self.file_bytes => {
                        bytes.resize(wanted.max(64 << 10), 0);
                        self.read(&mut bytes, at).await?;
                        used = 0;
                    }
                    _ => {
                        self.wrong(FindingKind::Unreadable, "snapshot table entry", at, u64::from(index));
                        return Ok(());
                    }
                }
            };
            if at - start > TABLE_BYTES_MAX {
                self.wrong(FindingKind::Unreadable, "snapshot table is larger than 64 MiB", start, at - start);
                return Ok(());
            }
            self.add_snapshot(&snapshot, at);
        }
        if at > start {
            self.areas.push(Area::new("snapshot table", start, at - start));
        }
        if self.has_data_file() && self.header.snapshots > 0 {
            self.wrong(FindingKind::SnapshotTable, "snapshots of an image with a data file", start, at - start);
        }
        Ok(())
    }

    fn add_snapshot(&mut self, snapshot: &Snapshot, at: u64) {
        let (offset, entries) = (snapshot.l1_offset.0, u64::from(snapshot.l1_entries));
        self.sum.is_lost |= is_outside(self.geometry, self.file_bytes, offset, entries.saturating_mul(8).max(1));
        if offset & (self.geometry.cluster_size_bytes() - 1) != 0 {
            self.sum.is_lost = true;
            self.wrong(FindingKind::SnapshotTable, "L1 table of a snapshot is not aligned", at, offset);
        } else if entries > L1_ENTRIES_MAX {
            self.sum.is_lost = true;
            self.wrong(FindingKind::SnapshotTable, "L1 table of a snapshot is larger than 32 MiB", at, entries);
        } else {
            self.snapshots.push(Area::new("L1 table of a snapshot", offset, entries * 8));
        }
    }

    /// A directory that cannot be read leaves clusters that somebody may still want: it is an error of the check, so
    /// that no repair takes them for leaks.
    async fn read_bitmaps(&mut self) -> Result<()> {
        let pointer = extension::bitmaps(&self.header.extensions, self.geometry)?;
        let (offset, length) = (pointer.directory_offset, pointer.directory_bytes);
        self.areas.push(Area::new("bitmap directory", offset, length));
        if is_outside(self.geometry, self.file_bytes, offset, length) {
            self.wrong(FindingKind::Unreadable, "bitmap directory ends past the end of the file", offset, length);
            return Ok(());
        }
        let mut bytes = vec![0; length as usize];
        self.read(&mut bytes, offset).await?;
        match parse_directory(&bytes, pointer, self.geometry) {
            Ok(entries) => {
                let is_lost = |at: u64, bytes| is_outside(self.geometry, self.file_bytes, at, bytes);
                self.sum.is_lost |= entries.iter().any(|entry| is_lost(entry.table_offset.0, entry.table_bytes()));
                self.areas.extend(entries.iter().map(|entry| {
                    let area = Area::new("bitmap table", entry.table_offset.0, entry.table_bytes());
                    Area { is_bitmap: true, ..area }
                }))
            }
            Err(_) => self.wrong(FindingKind::Unreadable, "bitmap directory is malformed", offset, length),
        }
        Ok(())
    }

    /// Counts all references to the clusters of the window that begins at `from`, which ends where memory does.
    pub(super) async fn count(&mut self, from: u64, plan: Plan) -> Result<Counts> {
        let (file_clusters, block_bits) = (self.file_clusters(), self.geometry.refcount_block_bits());
        let near = Near { file_clusters, block_bits, blocks: Arc::clone(&self.refcounts.entries) };
        let mut counts = Counts::new(from, (self.options.memory_bytes / 4 * 3) as usize, near);
        for index in 0..self.areas.len() {
            let area = self.areas[index];
            self.count_area(&mut counts, area, plan);
            if area.is_bitmap {
                self.count_bitmap(&mut counts, area, plan).await?;
            }
        }
        let l1_tables = self.l1_tables();
        l1_tables.iter().for_each(|table| self.count_area(&mut counts, *table, plan));
        self.count_tables(&mut counts, &l1_tables, plan).await?;
        if plan.refcounts {
            self.count_blocks(&mut counts, plan);
        }
        Ok(counts)
    }

    /// The L1 tables of all trees, the active one first.
    pub(super) fn l1_tables(&self) -> Vec<Area> {
        let active = Area::new("L1 table", self.header.l1_offset.0, u64::from(self.header.l1_entries) * 8);
        std::iter::once(active).chain(self.snapshots.iter().copied()).collect()
    }

    /// Counts an area, unless it reaches past the end of the file: then it is as if it were not there.
    pub(super) fn count_area(&mut self, counts: &mut Counts, area: Area, plan: Plan) {
        if area.bytes == 0 {
            return;
        }
        if is_outside(self.geometry, self.file_bytes, area.offset, area.bytes) {
            if plan.report {
                self.wrong(FindingKind::OutsideFile, area.what, area.offset, area.bytes);
            }
            return;
        }
        let (first, n) = clusters_of(self.geometry, area.offset, area.bytes);
        counts.add(first, n, 1, METADATA);
    }

    async fn count_bitmap(&mut self, counts: &mut Counts, table: Area, plan: Plan) -> Result<()> {
        if is_outside(self.geometry, self.file_bytes, table.offset, table.bytes) {
            return Ok(());
        }
        let mut bytes = Vec::new();
        let mut at = 0;
        while at < table.bytes {
            bytes.resize((table.bytes - at).min(READ_BYTES as u64) as usize, 0);
            self.read(&mut bytes, table.offset + at).await?;
            for (index, entry) in bytes.as_chunks::<8>().0.iter().enumerate() {
                let (word, place) = (u64::from_be_bytes(*entry), table.offset + at + index as u64 * 8);
                match BitsAt::decode(word, self.geometry) {
                    Some(BitsAt::Cluster(to)) => {
                        let area = Area::new("bitmap data", to.0, self.geometry.cluster_size_bytes());
                        if is_outside(self.geometry, self.file_bytes, area.offset, area.bytes) {
                            self.count_area(counts, area, plan);
                        } else {
                            counts.add(to.0 >> self.geometry.cluster_bits, 1, 1, 0);
                        }
                    }
                    Some(_) => {}
                    None if plan.report => self.wrong(FindingKind::Bitmaps, "bitmap table entry", place, word),
                    None => {}
                }
            }
            at += bytes.len() as u64;
        }
        Ok(())
    }
}
