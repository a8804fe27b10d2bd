//! Storing: what was recorded, and what an operation changes, becomes what is on disk.
//!
//! ```text
//! new clusters   changed bits, tables of changed bitmaps, the directory where it changes its shape
//! FLUSH          they are durable, and so are their counts; nothing refers to them yet
//! switch         the header's first sector names the new directory, which marks nothing as in use any more: D1
//!                or, where all that changes is marked in use, the directory is written over itself twice, first with
//!                the new tables and then without the marks
//! BARRIER        what the old tables referred to is released
//! ```

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::{Bitmap, Image};
use crate::alloc::Reservation;
use crate::bitmap::record::Recorder;
use crate::bitmap::stored::{Bits, ClusterBits, load_table, pointer};
use crate::error::{Error, Result};
use crate::format::HostOffset;
use crate::format::bitmap::{BITMAP_BYTES_MAX, BitmapEntry, BitsAt, bits_for, encode_directory, table_entries_for};
use crate::format::extension::{self, BitmapsPointer};
use crate::format::header::AUTOCLEAR_BITMAPS;
use crate::image::options::LogLevel;
use crate::image::status::{RECORDING, UNMARKED};
use crate::storage::Io;
use crate::wait::lock;

/// What a bitmap is to become.
pub(super) struct Draft {
    /// What it is now; `None` if it is new.
    pub(super) old: Option<Bitmap>,
    /// Its entry. Table and marks are filled in when it is stored.
    pub(super) entry: BitmapEntry,
    /// Nothing of the old bits stays.
    pub(super) cleared: bool,
    /// Bits that are added to it, beside those that it has recorded itself.
    pub(super) added: Option<Arc<Recorder>>,
}

impl Draft {
    /// Stays what it is, with what it has recorded.
    pub(super) fn of(bitmap: &Bitmap) -> Self {
        Self { old: Some(bitmap.clone()), entry: bitmap.entry.clone(), cleared: false, added: None }
    }
}

/// What is reserved for new structures, and what the old ones give back.
struct Exchange<'a> {
    reserved: Vec<Reservation<'a>>,
    released: Vec<Range<u64>>,
}

impl Image {
    /// Stores what the bitmaps have recorded. See [`Image::store_drafts`].
    pub(in crate::image) async fn store_bitmaps<I: Io>(&self, io: &I) -> Result<()> {
        let Some(list) = self.bitmaps.get() else { return Ok(()) };
        if !list.iter().any(|bitmap| bitmap.ours) {
            return Ok(());
        }
        let drafts = list.iter().map(Draft::of).collect();
        self.store_drafts(io, drafts, &list).await
    }

    /// Makes the image's bitmaps what `drafts` say, all at once and durably. None that can be used is marked in use
    /// then; `old` are those that there are now.
    ///
    /// Only for who holds the image alone, or closes it. After an error the old bitmaps are in force.
    pub(super) async fn store_drafts<I: Io>(&self, io: &I, drafts: Vec<Draft>, old: &[Bitmap]) -> Result<()> {
        let mut exchange = Exchange { reserved: Vec::new(), released: Vec::new() };
        let mut list = Vec::with_capacity(drafts.len());
        for draft in &drafts {
            list.push(Bitmap::found(self.store_bits(io, draft, &mut exchange).await?));
        }
        for gone in old.iter().filter(|old| list.iter().all(|new| new.entry.name != old.entry.name)) {
            self.release_bitmap(io, gone, &mut exchange).await?;
        }
        let tables = self.active();
        if can_stay_in_place(old, &list) {
            tables.flush(io).await?;
            if let Err(e) = self.switch_in_place(io, old, &list).await {
                if self.write_directory_in_place(io, old).await.is_err() {
                    self.keep_both(exchange);
                }
                return Err(e);
            }
        } else {
            self.switch_directory(io, &list, &mut exchange).await?;
        }
        exchange.reserved.into_iter().for_each(Reservation::keep);
        // Its removal is durable already.
        exchange.released.append(&mut lock(&self.bitmaps.orphans));
        exchange.released.into_iter().for_each(|clusters| self.allocator.release(clusters, 0));
        let records = list.iter().any(|bitmap| bitmap.entry.auto && !bitmap.entry.in_use);
        self.bitmaps.set(Arc::new(list));
        self.bitmaps.marks_unknown.store(false, Relaxed);
        if records {
            self.status.set(RECORDING | UNMARKED);
        } else {
            self.status.clear(RECORDING | UNMARKED);
        }
        if self.bitmaps.budget.take_exceeded() {
            self.log(LogLevel::Warning, "recording took all the memory that it may: bitmaps say more than was changed");
        }
        Ok(())
    }

    /// Which of two directories is on disk, or what mixture of them, is unknown. Both say what is right as long as nothing
    /// changes: before that, the bitmaps are marked again. What either refers to stays until the next one is known.
    fn keep_both(&self, exchange: Exchange<'_>) {
        for reservation in exchange.reserved {
            lock(&self.bitmaps.orphans).extend_from_slice(reservation.runs());
            reservation.keep();
        }
        self.bitmaps.marks_unknown.store(true, Relaxed);
        self.status.set(UNMARKED);
    }

    /// Writes the bits and the table of a bitmap where they change; returns its new entry.
    async fn store_bits<'a, I: Io>(
        &'a self,
        io: &I,
        draft: &Draft,
        exchange: &mut Exchange<'a>,
    ) -> Result<BitmapEntry> {
        let (tables, size) = (self.active(), self.size());
        let geometry = tables.geometry;
        let mut entry = draft.entry.clone();
        if draft.old.as_ref().is_some_and(Bitmap::is_inconsistent) {
            return Ok(entry);
        }
        entry.in_use = false;
        let recorder = draft.old.as_ref().and_then(|old| old.recorder.clone()).filter(|_| !draft.cleared);
        let recorders: Vec<_> = recorder.into_iter().chain(draft.added.clone()).collect();
        let needed = table_entries_for(size, entry.granularity_bits, geometry);
        if needed == 0 || needed * geometry.cluster_size_bytes() > BITMAP_BYTES_MAX {
            // The disk has outgrown it, or there is none left: it stays as it is, marked in use.
            entry.in_use = draft.entry.in_use;
            return Ok(entry);
        }
        let stored_for = draft.old.as_ref().and_then(|old| old.stored_for);
        if draft.old.is_some() && !draft.cleared && stored_for.is_none() && recorders.is_empty() {
            return Ok(entry);
        }
        let old_table = match &draft.old {
            Some(old) => match load_table(io, &tables.file, &old.entry, geometry).await {
                Err(e @ Error::Bitmap { .. }) if !draft.cleared => {
                    // No reason not to store the others. It stays marked, if it is, and is ours no more.
                    self.log(LogLevel::Error, &format!("what was recorded is lost: {e}"));
                    entry.in_use = draft.entry.in_use;
                    return if draft.added.is_none() { Ok(entry) } else { Err(e) };
                }
                Err(Error::Bitmap { .. }) => Vec::new(), // its clusters are lost, and nothing else
                loaded => loaded?,
            },
            None => Vec::new(),
        };
        let kept = if draft.cleared { Vec::new() } else { old_table.clone() };
        let mut bits = Bits::new(size, entry.granularity_bits, geometry, kept, recorders);
        if let Some(old_size) = stored_for {
            bits = bits.stored_for(old_size, entry.granularity_bits);
        }
        let new_table = self.store_clusters(io, &bits, exchange).await?;
        if draft.old.is_some() && new_table == old_table {
            return Ok(entry);
        }
        let bytes: Vec<u8> = new_table.iter().flat_map(|at| at.encode().to_be_bytes()).collect();
        entry.table_offset = self.write_new(io, &bytes, exchange).await?;
        entry.table_entries = new_table.len() as u32; // as many as the limits allow: checked when it was added
        let stays: HashSet<u64> = new_table.iter().map(|at| at.encode()).collect();
        release_table(self, draft.old.as_ref(), old_table.iter().filter(|at| !stays.contains(&at.encode())), exchange);
        Ok(entry)
    }

    /// The table of a bitmap, with the clusters written in which bits have changed.
    async fn store_clusters<'a, I: Io>(
        &'a self,
        io: &I,
        bits: &Bits,
        exchange: &mut Exchange<'a>,
    ) -> Result<Vec<BitsAt>> {
        let file = &self.active().file;
        let mut table = Vec::with_capacity(bits.clusters() as usize);
        for index in 0..bits.clusters() {
            let old = bits.stored_at(index);
            let is_cut = bits.is_cut(index);
            if !bits.is_recorded(index) && !is_cut {
                table.push(old);
                continue;
            }
            let new = bits.load(io, file, index).await?;
            table.push(match new {
                ClusterBits::Zeroes => BitsAt::Zeroes,
                ClusterBits::Ones => BitsAt::Ones,
                ClusterBits::Bytes(_) if !is_cut && new == bits.load_stored(io, file, index).await? => old,
                ClusterBits::Bytes(bytes) => BitsAt::Cluster(self.write_new(io, &bytes, exchange).await?),
            });
        }
        Ok(table)
    }

    /// Writes bytes to clusters that nothing refers to yet.
    async fn write_new<'a, I: Io>(&'a self, io: &I, bytes: &[u8], exchange: &mut Exchange<'a>) -> Result<HostOffset> {
        let tables = self.active();
        let clusters = tables.geometry.clusters_for(bytes.len() as u64);
        let run = self.allocator.reserve_run(io, tables, clusters).await?;
        let Some(first) = run.clusters().next() else { unreachable!("there are bytes to be written") };
        let at = tables.geometry.host_offset(first);
        exchange.reserved.push(run);
        // Whole clusters: a reader may ask for all of the last one.
        let mut padded = bytes.to_vec();
        padded.resize((clusters * tables.geometry.cluster_size_bytes()) as usize, 0);
        tables.file.write_bytes(io, &padded, at).await?;
        Ok(at)
    }

    /// Gives back what a bitmap that goes occupies. If its table makes no sense, its clusters are lost: it can go.
    async fn release_bitmap<I: Io>(&self, io: &I, gone: &Bitmap, exchange: &mut Exchange<'_>) -> Result<()> {
        let tables = self.active();
        match load_table(io, &tables.file, &gone.entry, tables.geometry).await {
            Ok(table) => release_table(self, Some(gone), table.iter(), exchange),
            Err(e @ Error::Bitmap { .. }) => self.log(LogLevel::Warning, &format!("clusters are leaked: {e}")),
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// All that changes is marked in use: the new tables go first, and then the marks.
    async fn switch_in_place<I: Io>(&self, io: &I, old: &[Bitmap], new: &[Bitmap]) -> Result<()> {
        let changed = |(old, new): (&Bitmap, &Bitmap)| BitmapEntry { in_use: true, ..new.entry.clone() } != old.entry;
        if old.iter().zip(new).filter(|(old, _)| old.entry.in_use).any(changed) {
            let marked: Vec<Bitmap> = old
                .iter()
                .zip(new)
                .map(|(old, new)| {
                    Bitmap::found(BitmapEntry { in_use: old.entry.in_use || new.entry.in_use, ..new.entry.clone() })
                })
                .collect();
            self.write_directory_in_place(io, &marked).await?;
        }
        self.write_directory_in_place(io, new).await
    }

    /// A new directory, and the header that names it; none where there are no bitmaps any more.
    async fn switch_directory<'a, I: Io>(&'a self, io: &I, new: &[Bitmap], exchange: &mut Exchange<'a>) -> Result<()> {
        let tables = self.active();
        let entries: Vec<_> = new.iter().map(|bitmap| bitmap.entry.clone()).collect();
        let bytes = encode_directory(&entries)?;
        let old = pointer(&self.header())?;
        let to = if new.is_empty() {
            None
        } else {
            let directory_offset = self.write_new(io, &bytes, exchange).await?.0;
            Some(BitmapsPointer { count: new.len() as u32, directory_bytes: bytes.len() as u64, directory_offset })
        };
        tables.flush(io).await?;
        self.rewrite_header(io, |header| {
            header.set_extension(extension::BITMAPS, to.map(BitmapsPointer::encode));
            header.autoclear &= !AUTOCLEAR_BITMAPS;
            header.autoclear |= if to.is_some() { AUTOCLEAR_BITMAPS } else { 0 };
        })
        .await?;
        if let Some(old) = old {
            let first = tables.geometry.host_cluster(HostOffset(old.directory_offset)).0;
            exchange.released.push(first..first + tables.geometry.clusters_for(old.directory_bytes));
        }
        Ok(())
    }
}

fn release_table<'a>(
    image: &Image,
    old: Option<&Bitmap>,
    clusters: impl Iterator<Item = &'a BitsAt>,
    exchange: &mut Exchange<'_>,
) {
    let geometry = image.active().geometry;
    let Some(old) = old else { return };
    let first = geometry.host_cluster(old.entry.table_offset).0;
    exchange.released.push(first..first + geometry.clusters_for(old.entry.table_bytes()));
    for at in clusters {
        if let BitsAt::Cluster(at) = at {
            let cluster = geometry.host_cluster(*at).0;
            exchange.released.push(cluster..cluster + 1);
        }
    }
}

/// Whether the new directory has the shape of the old one, and every entry that differs is marked in use.
fn can_stay_in_place(old: &[Bitmap], new: &[Bitmap]) -> bool {
    let fits = |(old, new): (&Bitmap, &Bitmap)| {
        let same_place = old.entry.name == new.entry.name && old.entry.extra_data == new.entry.extra_data;
        same_place && (old.entry == new.entry || old.entry.in_use)
    };
    !new.is_empty() && old.len() == new.len() && old.iter().zip(new).all(fits)
}

impl Image {
    /// A recorder of the size of the disk.
    pub(super) fn new_recorder(&self, entry: &BitmapEntry) -> Arc<Recorder> {
        let bits = bits_for(self.size(), entry.granularity_bits);
        Arc::new(Recorder::new(bits, entry.granularity_bits, &self.bitmaps.budget))
    }
}
