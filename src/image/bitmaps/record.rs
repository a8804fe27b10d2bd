//! Recording: the marks before the first change, and the notes of every change.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::{Bitmap, Image};
use crate::bitmap::stored;
use crate::error::{Error, Result};
use crate::format::bitmap::encode_directory;
use crate::format::header::{AUTOCLEAR_BITMAPS, OFFSET_AUTOCLEAR};
use crate::format::{GuestOffset, HostOffset};
use crate::image::options::LogLevel;
use crate::image::status::{RECORDING, UNMARKED};
use crate::storage::Io;
use crate::wait::lock;

impl Image {
    /// Notes a change in the bitmaps that are enabled, before its data goes out: a change that fails may leave a range
    /// dirty that is not, and never the other way around.
    ///
    /// The caller has entered the image, or has a claim on clusters, until the change is done: whoever clears a bitmap
    /// holds the image alone, and so does not get in between.
    #[inline]
    pub(in crate::image) async fn record<I: Io>(&self, io: &I, offset: GuestOffset, length: u64) -> Result<()> {
        if self.status.any(RECORDING) { self.record_change(io, offset, length).await } else { Ok(()) }
    }

    #[cold]
    async fn record_change<I: Io>(&self, io: &I, offset: GuestOffset, length: u64) -> Result<()> {
        if self.status.any(UNMARKED) {
            self.mark_bitmaps(io, false).await?;
        }
        if length > 0 {
            self.bitmaps.note(offset.0, length);
        }
        Ok(())
    }

    /// Marks the bitmaps that have to record changes as in use, durably; with `all`, the others as well, since what
    /// comes next changes the size of every bitmap.
    pub(in crate::image) async fn mark_bitmaps<I: Io>(&self, io: &I, all: bool) -> Result<()> {
        let _only_one = self.header_claims.claim(0..1).await;
        if !self.status.any(UNMARKED) && !all {
            return Ok(()); // somebody else has, meanwhile
        }
        self.status.check_write()?;
        let list = match self.load_bitmaps(io).await {
            Ok(list) => list,
            Err(e @ Error::Io { .. }) => return Err(e),
            Err(malformed) => return self.give_up_bitmaps(io, &malformed).await,
        };
        let header = self.header();
        let mut marked = (*list).clone();
        for bitmap in &mut marked {
            let usable = bitmap.entry.unusable(header.size_bytes, header.geometry).is_none();
            let is_recorded = bitmap.is_recorded(header.size_bytes, header.geometry);
            if !bitmap.entry.in_use && (bitmap.entry.auto || all) {
                bitmap.entry.in_use = true;
                // One that records changes and cannot be used lacks what comes now, for good.
                bitmap.ours = usable;
            }
            if is_recorded && bitmap.recorder.is_none() {
                bitmap.recorder = Some(self.new_recorder(&bitmap.entry));
            }
        }
        let is_marked = marked.iter().zip(list.iter()).all(|(new, old)| new.entry == old.entry);
        if !is_marked || self.bitmaps.marks_unknown.load(Relaxed) {
            match self.write_directory_in_place(io, &marked).await {
                Err(malformed @ Error::Header { .. }) => return self.give_up_bitmaps(io, &malformed).await,
                Err(e) => {
                    // Any of the marks may be on disk: they are taken away again, and written again before a change.
                    self.bitmaps.marks_unknown.store(true, Relaxed);
                    self.bitmaps.set(Arc::new(marked));
                    return Err(e);
                }
                Ok(()) => {}
            }
        }
        self.bitmaps.marks_unknown.store(false, Relaxed);
        let has_recorders = marked.iter().any(|bitmap| bitmap.recorder.is_some());
        self.bitmaps.set(Arc::new(marked));
        self.status.clear(if has_recorders { UNMARKED } else { UNMARKED | RECORDING });
        Ok(())
    }

    /// Writes the directory over itself: its entries have changed, and neither their order nor their length.
    pub(super) async fn write_directory_in_place<I: Io>(&self, io: &I, list: &[Bitmap]) -> Result<()> {
        let tables = self.active();
        let Some(pointer) = stored::pointer(&self.header())? else { return Ok(()) };
        let entries: Vec<_> = list.iter().map(|bitmap| bitmap.entry.clone()).collect();
        let bytes = encode_directory(&entries)?;
        let at = HostOffset(pointer.directory_offset);
        let first = tables.geometry.host_cluster(at).0;
        // Whatever the extension says, nothing is written over the header or its tables.
        if tables.holds_metadata(first..first + tables.geometry.clusters_for(bytes.len() as u64)) {
            return Err(Error::Header {
                field: "bitmap_directory_offset",
                value: at.0,
                expected: "an offset in clusters that no other table occupies",
            });
        }
        tables.file.write_bytes(io, &bytes, at).await?;
        tables.sync(io).await
    }

    /// The directory makes no sense: its bitmaps cannot be kept up to date, and no longer count (spec,
    /// "autoclear_features"). The disk itself is as good as ever.
    async fn give_up_bitmaps<I: Io>(&self, io: &I, why: &Error) -> Result<()> {
        let tables = self.active();
        let mut header = (*self.header()).clone();
        header.autoclear &= !AUTOCLEAR_BITMAPS;
        tables.file.write_bytes(io, &header.autoclear.to_be_bytes(), HostOffset(OFFSET_AUTOCLEAR)).await?;
        tables.sync(io).await?;
        *lock(&self.header) = Arc::new(header);
        self.bitmaps.set(Arc::default());
        self.status.clear(RECORDING | UNMARKED);
        self.log(LogLevel::Warning, &format!("the bitmaps of the image are given up: {why}"));
        Ok(())
    }
}

impl super::Bitmaps {
    fn note(&self, offset: u64, length: u64) {
        let list = self.list.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        for bitmap in list.iter().flat_map(|list| list.iter()) {
            if let Some(recorder) = &bitmap.recorder {
                recorder.note(offset, length);
            }
        }
    }
}
