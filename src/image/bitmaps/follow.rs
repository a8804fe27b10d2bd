//! Bitmaps follow the disk where it changes as a whole: where it gets another size, or is switched to a snapshot. For who
//! holds the image alone.

use std::ops::Range;
use std::sync::Arc;

use super::store::Draft;
use super::{Image, problem_of};
use crate::error::{BitmapProblem, Error, Result};
use crate::format::bitmap::{BITMAP_BYTES_MAX, table_entries_for};
use crate::image::options::LogLevel;
use crate::storage::Io;

impl Image {
    /// Refuses a size that the bitmaps of the image cannot follow to: those that cannot be used would say nothing of it,
    /// and say so too late. Only for who holds the image alone.
    pub(in crate::image) async fn check_bitmaps_follow<I: Io>(&self, io: &I, size: u64) -> Result<()> {
        let geometry = self.active().geometry;
        let list = match self.load_bitmaps(io).await {
            Err(e @ Error::Io { .. }) => return Err(e),
            Err(_) => return Ok(()), // given up with the first change
            Ok(list) => list,
        };
        for bitmap in list.iter() {
            self.check_usable(bitmap)?;
            let needed = table_entries_for(size, bitmap.entry.granularity_bits, geometry);
            let why = match needed.checked_mul(geometry.cluster_size_bytes()) {
                Some(0) => "it has no bits for a disk of 0 bytes; remove it first",
                Some(bytes) if bytes <= BITMAP_BYTES_MAX => continue,
                _ => {
                    "it would be larger than 512 MiB for a disk of that size; remove it first, or use a larger granularity"
                }
            };
            return Err(problem_of(&bitmap.entry, BitmapProblem::Unusable { why }));
        }
        Ok(())
    }

    /// Before the disk changes as a whole: what was recorded is stored, and every bitmap is marked in use, so that a
    /// crash from now on leaves none that seems to say everything. Only for who holds the image alone.
    pub(in crate::image) async fn suspend_bitmaps<I: Io>(&self, io: &I) -> Result<()> {
        if !self.has_bitmaps() {
            return Ok(());
        }
        self.store_bitmaps(io).await?;
        self.mark_bitmaps(io, true).await
    }

    /// After it: bitmaps follow the new size, and those that are enabled call `changed` dirty. `old_size` is that of the
    /// disk before. It has happened whether they can follow or not: what cannot be stored now is stored later, at close
    /// at the latest. Until then they are marked in use.
    pub(in crate::image) async fn resume_bitmaps<I: Io>(&self, io: &I, old_size: u64, changed: &[Range<u64>]) {
        let Some(list) = self.bitmaps.get() else { return };
        if !list.iter().any(|bitmap| bitmap.ours) {
            return;
        }
        let mut list = (*list).clone();
        for bitmap in list.iter_mut().filter(|bitmap| bitmap.ours) {
            bitmap.stored_for = Some(old_size);
            // What there is of a recorder is empty, and of the old size.
            bitmap.recorder = bitmap.entry.auto.then(|| self.new_recorder(&bitmap.entry));
            if let Some(recorder) = &bitmap.recorder {
                changed.iter().for_each(|range| recorder.note(range.start, range.end - range.start));
            }
        }
        self.bitmaps.set(Arc::new(list.clone()));
        if let Err(e) = self.store_drafts(io, list.iter().map(Draft::of).collect(), &list).await {
            self.log(LogLevel::Warning, &format!("the bitmaps of the image follow it later: {e}"));
        }
    }
}
