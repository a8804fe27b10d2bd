//! Another size for the disk: the checks, and how size and L1 table are switched.
//!
//! The image is held alone. What the disk grows over is made to read as zeroes while nobody can see it yet; what it
//! shrinks by goes only after nobody can see it any more. In between, one write of one sector switches the size,
//! together with the place and the length of the L1 table: a crash leaves the old disk or the new one.

mod grow;
mod shrink;

use std::ops::Range;

use super::Image;
use super::alone::{Alone, NewL1};
use super::create::round_size;
use super::options::{LogLevel, Preallocation};
use super::progress::ProgressFn;
use crate::alloc::Reservation;
use crate::error::{Corruption, CorruptionKind, Error, Result};
use crate::format::header::DATA_FILE_BYTES_MAX;
use crate::format::l2_table::entry_of;
use crate::format::{ClusterState, GuestOffset, HostOffset, L1Index, L2Entry};
use crate::storage::{Io, IoDst};
use crate::tables::Tables;

/// How a disk is to get another size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ResizeOptions {
    /// The new size may be smaller; what lies past it is given up.
    pub allow_shrink: bool,
    /// What to allocate ahead where the disk grows.
    pub preallocation: Preallocation,
}

/// Entries of an L1 table that are written at once.
const PIECE_ENTRIES: u64 = 1 << 17;

/// An L2 table as it is on disk.
struct StoredTable {
    at: HostOffset,
    ours: bool,
    bytes: Vec<u8>,
}

impl StoredTable {
    /// Entry `index` of the table. Entries are one word long, or two.
    fn entry(&self, index: usize, entry_bytes: usize) -> L2Entry {
        entry_of(&self.bytes[index * entry_bytes..(index + 1) * entry_bytes])
    }

    fn set(&mut self, index: usize, entry_bytes: usize, entry: L2Entry) {
        let place = &mut self.bytes[index * entry_bytes..(index + 1) * entry_bytes];
        for (word, place) in [entry.descriptor, entry.bitmap].into_iter().zip(place.chunks_exact_mut(8)) {
            place.copy_from_slice(&word.to_be_bytes());
        }
    }
}

impl Image {
    /// Gives the disk another size. See [`Image::resize`].
    pub async fn resize_with<I: Io>(
        &self,
        io: &I,
        size_bytes: u64,
        options: ResizeOptions,
        tell: Option<ProgressFn<'_>>,
    ) -> Result<()> {
        self.status.check_write()?;
        let size = self.check_new_size(size_bytes)?;
        let alone = self.hold_alone(io).await?;
        let old = self.size();
        if size == old {
            return Ok(());
        }
        if size < old && !options.allow_shrink {
            let why =
                "is smaller than the disk; what lies past it would be given up, so allow shrinking if that is meant";
            return Err(Error::Argument { name: "size", why });
        }
        if size < old && options.preallocation != Preallocation::Off {
            let why = "cannot be had where a disk becomes smaller";
            return Err(Error::Argument { name: "preallocation", why });
        }
        self.check_bitmaps_follow(io, size).await?;
        let result = match size > old {
            true => alone.grow(io, size, options.preallocation, tell).await,
            false => alone.shrink(io, size, tell).await,
        };
        drop(alone);
        match result {
            Ok(()) => Ok(()),
            Err(e) => Err(self.note_error(io, e).await),
        }
    }

    /// The size that is meant, or why the image cannot have it.
    fn check_new_size(&self, size_bytes: u64) -> Result<u64> {
        let header = self.header();
        let size = round_size(size_bytes, header.geometry)?;
        if header.snapshots > 0 && header.geometry.version < 3 {
            let feature = "another size for a version 2 image with snapshots, which do not say how large they are";
            return Err(Error::Unsupported { feature: feature.to_owned() });
        }
        if header.has_data_file() && size > DATA_FILE_BYTES_MAX {
            let what = "size of a disk with an external data file";
            return Err(Error::TooLarge { what, limit: DATA_FILE_BYTES_MAX });
        }
        Ok(size)
    }
}

impl Alone<'_> {
    /// Switches size and L1 table at once, durably. `entries` are the entries that the table has from then on; a table
    /// that differs from the present one in more than its length goes to another place.
    async fn switch_table<I: Io>(&self, io: &I, size: u64, entries: &[u64]) -> Result<()> {
        let tables = self.tables();
        let geometry = tables.geometry;
        let clusters = |count: u64| geometry.clusters_for(count * 8);
        let (old_count, old_at) = (tables.l1.count(), tables.l1.host_range().start);
        let count = entries.len() as u64;
        let old_first = geometry.host_cluster(old_at).0;
        let is_same = || (0..old_count).zip(entries).all(|(index, entry)| tables.l1.get(L1Index(index)) == *entry);
        if old_at != HostOffset(0) && clusters(count) <= clusters(old_count) && is_same() {
            self.extend_in_place(io, old_at, old_count, entries).await?;
            let place = if count == 0 { HostOffset(0) } else { old_at };
            self.switch_roots(io, |header| set_roots(header, size, place, count), NewL1::Rewritten(entries)).await?;
            self.release_now(old_first + clusters(count)..old_first + clusters(old_count));
            return Ok(());
        }
        let reservation = self.allocator().reserve_run(io, tables, clusters(count)).await?;
        self.move_table(io, size, entries, reservation).await
    }

    /// As [`Alone::switch_table`], with the table in these clusters, which follow each other.
    async fn move_table<I: Io>(&self, io: &I, size: u64, entries: &[u64], reservation: Reservation<'_>) -> Result<()> {
        let tables = self.tables();
        let geometry = tables.geometry;
        let old = tables.l1.host_range();
        let count = entries.len() as u64;
        let Some(first) = reservation.clusters().next() else {
            unreachable!("a table that grows or changes is not empty")
        };
        let place = geometry.host_offset(first);
        // In pieces: the table may be 32 MiB long, and is in memory twice already.
        let whole = geometry.clusters_for(count * 8) * geometry.cluster_size_bytes() / 8;
        let mut bytes = Vec::new();
        for from in (0..whole).step_by(PIECE_ENTRIES as usize) {
            bytes.clear();
            let entry = |index: u64| entries.get(index as usize).copied().unwrap_or(0);
            (from..whole.min(from + PIECE_ENTRIES)).for_each(|index| bytes.extend(entry(index).to_be_bytes()));
            tables.file.write_bytes(io, &bytes, place.plus(from * 8)).await?;
        }
        self.flush(io).await?;
        self.switch_roots(io, |header| set_roots(header, size, place, count), NewL1::Rewritten(entries)).await?;
        reservation.keep();
        let old_first = geometry.host_cluster(old.start).0;
        self.release_now(old_first..geometry.clusters_for(old.end.0).max(old_first));
        Ok(())
    }

    /// Writes the entries that an L1 table has more than before, in the clusters that it has.
    async fn extend_in_place<I: Io>(&self, io: &I, at: HostOffset, old_count: u64, entries: &[u64]) -> Result<()> {
        let from = (old_count / 64 * 64) as usize;
        if entries.len() as u64 > old_count {
            let bytes: Vec<u8> = entries[from..].iter().flat_map(|entry| entry.to_be_bytes()).collect();
            self.tables().file.write_bytes(io, &bytes, at.plus(from as u64 * 8)).await?;
            self.tables().sync(io).await?;
        }
        Ok(())
    }

    /// Reads the L2 table behind an L1 entry (`None`: there is none). No slice of it may be waiting to be written.
    async fn stored_table<I: Io>(&self, io: &I, index: L1Index, entry: u64) -> Result<Option<StoredTable>> {
        let tables = self.tables();
        let (at, ours) = tables.decode_l1(index, entry)?;
        if at == HostOffset(0) {
            return Ok(None);
        }
        let mut bytes = vec![0u8; tables.geometry.cluster_size_bytes() as usize];
        let got = tables.file.read(io, &[IoDst::from(&mut bytes[..])], at).await?;
        if got < bytes.len() {
            return Err(table_beyond_eof(tables, index, at));
        }
        Ok(Some(StoredTable { at, ours, bytes }))
    }

    /// State of the cluster with this entry.
    fn stored_state(&self, table: &StoredTable, index: L1Index, entry: usize) -> Result<(GuestOffset, ClusterState)> {
        let tables = self.tables();
        let geometry = tables.geometry;
        let guest = GuestOffset(index.0 * geometry.l2_table_covers_bytes() + ((entry as u64) << geometry.cluster_bits));
        let stored = table.entry(entry, geometry.l2_entry_bytes() as usize);
        let state = tables.meaning(stored, guest, table.ours).map_err(|error| match error {
            // The L1 entry may be gone that would tell where the table is.
            Error::Corrupt(found) => {
                let host_offset = table.at.0 + entry as u64 * geometry.l2_entry_bytes();
                Error::Corrupt(Corruption { host_offset, ..found })
            }
            other => other,
        });
        Ok((guest, state?))
    }

    /// Releases everything that an L2 table refers to, and the table: nothing refers to it any more.
    fn release_table(&self, table: &StoredTable, index: L1Index) -> Result<()> {
        let geometry = self.tables().geometry;
        let mut runs: Vec<Range<u64>> = Vec::new();
        // What is in an external data file has no counts.
        let entries = if self.tables().external.is_some() { 0 } else { 1usize << geometry.l2_bits() };
        for entry in 0..entries {
            let (_, state) = self.stored_state(table, index, entry)?;
            let clusters = state.host.clusters(geometry);
            match runs.last_mut() {
                _ if clusters.is_empty() => {}
                Some(last) if last.end == clusters.start => last.end = clusters.end,
                _ => runs.push(clusters),
            }
        }
        runs.into_iter().for_each(|run| self.release_now(run));
        let at = geometry.host_cluster(table.at).0;
        self.release_now(at..at + 1);
        Ok(())
    }

    /// Takes back a reference to each cluster, whose entries are gone.
    fn release_now(&self, clusters: Range<u64>) {
        if !clusters.is_empty() {
            self.allocator().release(clusters, self.tables().order.number_change());
        }
    }

    /// Keeps what waits to be freed, and what waits to be written, within bounds.
    async fn maintain<I: Io>(&self, io: &I) -> Result<()> {
        let tables = self.tables();
        if self.allocator().takes_flush() {
            return self.flush(io).await;
        }
        if tables.l2.wants_write_back() || tables.refcounts.wants_write_back() {
            return tables.write_back(io).await;
        }
        Ok(())
    }

    /// Says in the log what could not be done, and does not decide about the result.
    fn note(&self, what: &str, result: Result<()>) {
        if let Err(e) = result {
            self.image().log(LogLevel::Warning, &format!("{what}: {e}"));
        }
    }
}

fn table_beyond_eof(tables: &Tables, index: L1Index, at: HostOffset) -> Error {
    Error::Corrupt(Corruption {
        kind: CorruptionKind::L2TableBeyondEof,
        host_offset: tables.l1.entry_offset(index).0,
        guest_offset: Some(index.0 * tables.geometry.l2_table_covers_bytes()),
        value: at.0,
    })
}

fn set_roots(header: &mut crate::format::Header, size: u64, l1_at: HostOffset, l1_entries: u64) {
    header.size_bytes = size;
    header.l1_offset = l1_at;
    header.l1_entries = l1_entries as u32; // at most L1_ENTRIES_MAX
}
