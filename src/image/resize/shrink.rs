//! Shrinking: the new size is switched to together with an L1 table that knows of nothing past it; only then is what
//! lay there given up.

use super::{Alone, StoredTable, table_beyond_eof};
use crate::alloc::Reservation;
use crate::alloc::bulk::keep_for_later;
use crate::error::{Error, Result};
use crate::format::l2::{COMPRESSED, COPIED, encode_l1};
use crate::format::{ClusterState, GuestOffset, Host, HostOffset, L1Index, L2Entry};
use crate::image::allocate::ZEROES;
use crate::image::link::look_up;
use crate::image::progress::{Progress, ProgressFn};
use crate::plan::resize::{cut, kept_subclusters};
use crate::storage::Io;

/// The L2 table that the new end lies in, without what lies past it.
struct Trimmed<'a> {
    reservation: Reservation<'a>,
    entry: u64,
    released: Vec<Host>,
    old: StoredTable,
}

impl Alone<'_> {
    /// Makes the disk smaller. After an error it has its old size, unless the handle says otherwise.
    pub(super) async fn shrink<I: Io>(&self, io: &I, size: u64, tell: Option<ProgressFn<'_>>) -> Result<()> {
        let tables = self.tables();
        let geometry = tables.geometry;
        let old = tables.l1.entries();
        let mut entries = old.clone();
        entries.truncate(geometry.l1_entries_for(size) as usize);
        self.check_tables(&old, entries.len())?;
        let progress = Progress::new(tell, (old.len() - entries.len()) as u64 + 1);
        progress.advance(0)?;
        let trimmed = self.trim_table(io, size).await?;
        if let (Some(trimmed), Some(last)) = (&trimmed, entries.last_mut()) {
            *last = trimmed.entry;
            self.flush(io).await?;
        }
        progress.advance(1)?;
        self.switch_table(io, size, &entries).await?;
        // The disk has its new size. From here on it is only about space, and cannot be called off any more.
        if let Some(trimmed) = trimmed {
            trimmed.reservation.keep();
            let at = geometry.host_cluster(trimmed.old.at).0;
            self.release_now(at..at + 1);
            trimmed.released.iter().for_each(|host| self.release_now(host.clusters(geometry)));
        }
        let released = self.release_tables(io, &old, entries.len(), &progress).await;
        self.tolerate("a part of what a disk has shrunk by is not given back", released)?;
        let cut = match &tables.external {
            Some(external) => external.file.set_size(size),
            None => self.zero_tail(io, size).await,
        };
        self.tolerate("a disk has shrunk, and what it held past its end is still in the file", cut)?;
        let shorter = match self.give_back(io).await {
            Ok(()) => self.move_tables_down(io, size).await,
            Err(e) => Err(e),
        };
        self.tolerate("the file of a disk that has shrunk stays longer than it has to be", shorter)
    }

    /// Refuses L1 entries, from `first` on, that lead nowhere: while nothing has changed, and they have a place to name.
    fn check_tables(&self, l1: &[u64], first: usize) -> Result<()> {
        let (tables, end) = (self.tables(), self.tables().file.size_bytes()?);
        for (index, &entry) in l1.iter().enumerate().skip(first).filter(|(_, entry)| **entry != 0) {
            let index = L1Index(index as u64);
            let (at, _) = tables.decode_l1(index, entry)?;
            if at != HostOffset(0) && at.0 + tables.geometry.cluster_size_bytes() > end {
                return Err(table_beyond_eof(tables, index, at));
            }
        }
        Ok(())
    }

    /// After the switch an error costs space and no more, unless something in the image is wrong.
    fn tolerate(&self, what: &str, result: Result<()>) -> Result<()> {
        if let Err(e @ Error::Corrupt(_)) = result {
            return Err(e);
        }
        self.note(what, result);
        Ok(())
    }

    /// The tables that were written anew for the new size lie behind everything that there was: they move to where space
    /// has become free, so that the file can become shorter.
    async fn move_tables_down<I: Io>(&self, io: &I, size: u64) -> Result<()> {
        let tables = self.tables();
        let geometry = tables.geometry;
        let index = geometry.l1_index(GuestOffset(size));
        let mut moved = false;
        let table = self.stored_table(io, index, tables.l1.get(index)).await?;
        if let Some(table) = table.filter(|table| table.ours) {
            let reservation = self.allocator().reserve(io, tables, 1).await?;
            let at = reservation.clusters().next().map(|cluster| geometry.host_offset(cluster));
            if let Some(at) = at.filter(|&at| at < table.at) {
                tables.file.write_bytes(io, &table.bytes, at).await?;
                tables.replace_table(index, encode_l1(at), false).await;
                reservation.keep();
                let old = geometry.host_cluster(table.at).0;
                self.release_now(old..old + 1);
                self.flush(io).await?;
                moved = true;
            }
        }
        let l1 = tables.l1.host_range();
        if !l1.is_empty() {
            let clusters = geometry.clusters_for(tables.l1.count() * 8);
            let reservation = self.allocator().reserve_run(io, tables, clusters).await?;
            if reservation.clusters().next().is_some_and(|first| geometry.host_offset(first) < l1.start) {
                self.move_table(io, size, &tables.l1.entries(), reservation).await?;
                moved = true;
            }
        }
        if moved { self.give_back(io).await } else { Ok(()) }
    }

    /// Releases the tables that L1 entries from `first` on point to.
    async fn release_tables<I: Io>(&self, io: &I, l1: &[u64], first: usize, progress: &Progress<'_>) -> Result<()> {
        let tables = self.tables();
        let mut result = Ok(());
        for (index, &entry) in l1.iter().enumerate().skip(first) {
            let index = L1Index(index as u64);
            let (at, _) = tables.decode_l1(index, entry)?;
            match self.stored_table(io, index, entry).await {
                Ok(None) => continue,
                Ok(Some(table)) => self.release_table(&table, index)?,
                Err(e @ Error::Corrupt(_)) => return Err(e),
                // What is in an external data file has no counts.
                Err(_) if tables.external.is_some() => {
                    let cluster = tables.geometry.host_cluster(at).0;
                    self.release_now(cluster..cluster + 1);
                }
                Err(e) => {
                    keep_for_later(self.allocator(), at);
                    result = Err(e);
                }
            }
            result = result.and(self.maintain(io).await);
            let _ = progress.advance(1); // too late to call it off
        }
        result
    }

    /// Writes a copy of the L2 table that `end` lies in, without what lies past it. `None`: there is nothing to change.
    async fn trim_table<I: Io>(&self, io: &I, end: u64) -> Result<Option<Trimmed<'_>>> {
        let tables = self.tables();
        let geometry = tables.geometry;
        let index = geometry.l1_index(GuestOffset(end));
        if end.is_multiple_of(geometry.l2_table_covers_bytes()) {
            return Ok(None);
        }
        let Some(old) = self.stored_table(io, index, tables.l1.get(index)).await? else { return Ok(None) };
        let entry_bytes = geometry.l2_entry_bytes() as usize;
        let first = (geometry.guest_cluster(GuestOffset(end)).0 & ((1 << geometry.l2_bits()) - 1)) as usize;
        let mut new = StoredTable { at: HostOffset(0), ours: true, bytes: old.bytes.clone() };
        // With an external data file there are no snapshots, and an entry may be nothing but its COPIED flag.
        if !old.ours && tables.external.is_none() {
            own_entries(&mut new, entry_bytes);
        }
        let (mut released, mut changed) = (Vec::new(), false);
        for entry in first..1usize << geometry.l2_bits() {
            let (guest, state) = self.stored_state(&old, index, entry)?;
            let left = cut(state, kept_subclusters(geometry, guest.0, end));
            if left == state {
                continue;
            }
            changed = true;
            if left.host == Host::None && state.host != Host::None && tables.external.is_none() {
                released.push(state.host);
            }
            new.set(entry, entry_bytes, L2Entry::encode(left, geometry));
        }
        if !changed {
            return Ok(None);
        }
        let reservation = self.allocator().reserve(io, tables, 1).await?;
        let Some(cluster) = reservation.clusters().next() else { unreachable!("one was asked for") };
        new.at = geometry.host_offset(cluster);
        tables.file.write_bytes(io, &new.bytes, new.at).await?;
        Ok(Some(Trimmed { reservation, entry: encode_l1(new.at), released, old }))
    }

    /// Zeroes what is left of the last subcluster behind the new end, so that whoever makes the disk larger again finds
    /// nothing there. Whoever does so through this library finds nothing in any case.
    async fn zero_tail<I: Io>(&self, io: &I, size: u64) -> Result<()> {
        let tables = self.tables();
        let geometry = tables.geometry;
        let at = GuestOffset(size);
        let start = geometry.in_cluster(at);
        if start.is_multiple_of(geometry.subcluster_size_bytes()) || tables.table(geometry.l1_index(at))?.0.0 == 0 {
            return Ok(());
        }
        let ClusterState { host: Host::Cluster { cluster, copied: true }, alloc, .. } = look_up(io, tables, at).await?
        else {
            return Ok(());
        };
        let end = start.next_multiple_of(geometry.subcluster_size_bytes());
        if alloc & 1 << geometry.subcluster_of(start) == 0 {
            return Ok(());
        }
        for from in (start..end).step_by(ZEROES.len()) {
            let n = (end - from).min(ZEROES.len() as u64) as usize;
            tables.file.write_bytes(io, &ZEROES[..n], geometry.host_offset(cluster).plus(from)).await?;
        }
        Ok(())
    }
}

/// Clears the COPIED flags of a table that was shared: nothing in it is ours alone (D4).
fn own_entries(table: &mut StoredTable, entry_bytes: usize) {
    for index in 0..table.bytes.len() / entry_bytes {
        let mut entry = table.entry(index, entry_bytes);
        if entry.descriptor & COMPRESSED == 0 {
            entry.descriptor &= !COPIED;
            table.set(index, entry_bytes, entry);
        }
    }
}
