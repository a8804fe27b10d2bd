//! Before the first change: the header may have to say so (O6), and an L2 table has to be ours to be changed.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::Image;
use super::status::{CORRUPT, READ_ONLY, UNLISTED, UNTOUCHED};
use crate::error::{Corruption, CorruptionKind, Error, Result};
use crate::format::header::{AUTOCLEAR_KNOWN, INCOMPATIBLE_CORRUPT, OFFSET_AUTOCLEAR, OFFSET_INCOMPATIBLE};
use crate::format::l2::encode_l1;
use crate::format::{HostOffset, L1Index, l2_table};
use crate::image::options::LogLevel;
use crate::storage::{Io, IoDst};
use crate::wait::lock;

/// How much of the end of a table is written where only the file has to become long enough: what no storage does in
/// more than one piece, and none has to read before.
const END_BYTES: u64 = 4096;

impl Image {
    /// Whether a change may begin with no further question. Asked before anything else: what comes to nothing but entries
    /// in memory, or to nothing at all, is no more acknowledged after a failed flush than what reaches the file.
    #[inline]
    pub(super) fn may_change(&self) -> bool {
        self.status.is_clear() && !self.active().file.is_stopped()
    }

    /// Lets a write through, or says why not. The first write of a handle clears the autoclear bits that it does not
    /// know: they vouch for structures that nobody keeps up to date now (spec, "autoclear_features").
    #[cold]
    pub(super) async fn prepare_write<I: Io>(&self, io: &I) -> Result<()> {
        self.status.check_write()?;
        self.active().file.check_writes()?;
        if self.status.any(UNLISTED) {
            self.list_inactive(io).await?;
        }
        let _only_one = self.header_claims.claim(0..1).await;
        self.status.check_write()?;
        if self.status.any(UNTOUCHED) {
            let mut header = (*self.header()).clone();
            if header.autoclear & !AUTOCLEAR_KNOWN != 0 {
                header.autoclear &= AUTOCLEAR_KNOWN;
                let file = &self.active().file;
                file.write_bytes(io, &header.autoclear.to_be_bytes(), HostOffset(OFFSET_AUTOCLEAR)).await?;
                file.barrier(io).await?;
                *lock(&self.header) = Arc::new(header);
            }
            self.status.clear(UNTOUCHED);
        }
        Ok(())
    }

    /// Makes sure that the L2 table behind an L1 entry exists and belongs to the active state alone.
    pub(super) async fn own_l2_table<I: Io>(&self, io: &I, index: L1Index) -> Result<()> {
        let tables = self.active();
        if tables.table(index)?.1 {
            return tables.check_table(index);
        }
        let _claim = self.table_claims.claim(index.0..index.0 + 1).await;
        let (old, ours) = tables.table(index)?;
        if ours {
            return Ok(());
        }
        let reservation = self.allocator.reserve(io, tables, 1).await?;
        let Some(cluster) = reservation.clusters().next() else { unreachable!("one was asked for") };
        let new = tables.geometry.host_offset(cluster);
        let size = tables.geometry.cluster_size_bytes();
        // What has never been written is a table of zeroes already.
        let early = old == HostOffset(0) && reservation.may_show_early();
        if old != HostOffset(0) {
            let mut table = vec![0u8; size as usize];
            self.read_shared_table(io, index, old, &mut table).await?;
            tables.file.write_bytes(io, &table, new).await?;
        } else if !(reservation.is_fresh() && reservation.is_in_file()) {
            let written = if reservation.is_fresh() { size.min(END_BYTES) } else { size };
            tables.file.write_bytes(io, &vec![0; written as usize], new.plus(size - written)).await?;
        }
        tables.replace_table(index, encode_l1(new), early).await;
        let change = tables.order.number_change();
        reservation.keep();
        if old != HostOffset(0) {
            let old = tables.geometry.host_cluster(old).0;
            self.allocator.release(old..old + 1, change);
        }
        self.counters.l2_tables_allocated.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Reads a table that is shared with a snapshot. Nothing in it can be ours alone, whatever its flags say: they
    /// are only accurate in tables of the active state (spec, "L2 table entry"; D4).
    async fn read_shared_table<I: Io>(&self, io: &I, index: L1Index, at: HostOffset, table: &mut [u8]) -> Result<()> {
        let tables = self.active();
        let got = tables.file.read(io, &[IoDst::from(&mut *table)], at).await?;
        if got < table.len() {
            return Err(Error::Corrupt(Corruption {
                kind: CorruptionKind::L2TableBeyondEof,
                host_offset: tables.l1.entry_offset(index).0,
                guest_offset: Some(index.0 * tables.geometry.l2_table_covers_bytes()),
                value: at.0,
            }));
        }
        // With an external data file there are no snapshots, and an entry may be nothing but its COPIED flag.
        if tables.external.is_none() {
            l2_table::clear_copied(table, tables.geometry);
        }
        Ok(())
    }

    /// After a request: batches of metadata leave before they fill the caches.
    pub(super) async fn maintain<I: Io>(&self, io: &I) -> Result<()> {
        let tables = self.active();
        if self.allocator.takes_flush() {
            return self.flush_with(io).await;
        }
        if tables.l2.wants_write_back() || tables.refcounts.wants_write_back() {
            return match tables.write_back(io).await {
                Ok(()) => Ok(()),
                Err(e) => Err(self.note_error(io, e).await),
            };
        }
        Ok(())
    }

    /// Looks at an error on its way out: corruption of this image marks it, and ends writing through this handle.
    pub(super) async fn note_error<I: Io>(&self, io: &I, error: Error) -> Error {
        if let Error::Corrupt(found) = &error
            && self.status.set(CORRUPT) & (CORRUPT | READ_ONLY) == 0
        {
            self.log(LogLevel::Error, &format!("{found}; the image takes no more writes"));
            if let Err(e) = self.mark_corrupt(io).await {
                self.log(LogLevel::Error, &format!("marking the image corrupt failed: {e}"));
            }
        }
        error
    }

    /// As [`Image::note_error`], of an outcome.
    pub(super) async fn noting<I: Io, T>(&self, io: &I, outcome: Result<T>) -> Result<T> {
        match outcome {
            Ok(done) => Ok(done),
            Err(e) => Err(self.note_error(io, e).await),
        }
    }

    /// What has been acknowledged goes to disk first; then the corrupt bit, which forbids writing (spec,
    /// "incompatible_features"). Version 2 has no such bit.
    async fn mark_corrupt<I: Io>(&self, io: &I) -> Result<()> {
        let tables = self.active();
        let flushed = tables.flush(io).await;
        if tables.geometry.version >= 3 {
            let _only_one = self.header_claims.claim(0..1).await;
            let bits = self.header().incompatible | INCOMPATIBLE_CORRUPT;
            tables.file.write_bytes(io, &bits.to_be_bytes(), HostOffset(OFFSET_INCOMPATIBLE)).await?;
            // Through the gate: of two fdatasyncs at once only one may be told of an error.
            tables.sync(io).await?;
        }
        flushed
    }
}
