//! The order of a repair. Nothing is worse at any moment than it was before, so that a crash, an error or a
//! cancellation in between leaves an image that can be checked and repaired again:
//!
//! ```text
//! entries that must not say COPIED lose it, malformed ones are mended; counts that are too low are raised
//! barrier
//! (or, where counts cannot be raised in place, or guest clusters have to get away from metadata: new refcount
//! structures beside everything; barrier; switch; barrier; and entries that refer to the copies; barrier)
//! counts that are too high are lowered, entries that may say COPIED get it
//! barrier
//! a second look; then, if nothing is wrong any more, the dirty and corrupt bits go; barrier
//! ```

use std::sync::atomic::Ordering;

use super::copied::Pass;
use super::counts::Counts;
use super::{CheckResult, Checker, Plan, Repair};
use crate::error::Result;
use crate::format::header::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY, OFFSET_AUTOCLEAR,
    OFFSET_INCOMPATIBLE,
};
use crate::format::{HostOffset, refcount};
use crate::storage::Io;

const SECTOR_BYTES: usize = 512;
/// Rounds of a repair: each makes the image better, so that the next run goes on where this one ends.
const ROUNDS_MAX: usize = 8;
/// A walk that only counts.
pub(super) const QUIET: Plan = Plan { report: false, look: false, refcounts: true };

/// Which counts are changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Adjust {
    /// Those that are too low.
    Raise,
    /// Those that are too high.
    Lower,
}

impl<I: Io> Checker<'_, '_, I> {
    /// Puts right what the first look has found, and looks again; once more, if that has made more possible.
    pub(super) async fn repair(mut self, before: CheckResult) -> Result<CheckResult> {
        let everything = self.options.repair == Repair::All;
        let flagged = self.header.incompatible & (INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT) != 0;
        let is_wanted = before.leaks > 0 || flagged || everything && before.corruptions > 0;
        // What could not be checked may refer to anything: nothing can be given up, and nothing is known to be right.
        if before.check_errors > 0 || self.sum.is_lost || !is_wanted || self.sum.rebuild && !everything {
            return Ok(before);
        }
        self.options.on_finding = None;
        let first = self.sum.clone();
        self.clear_unknown_autoclear().await?;
        let (mut copied, mut now) = (0, before);
        for _ in 0..ROUNDS_MAX {
            self.has_written.store(false, Ordering::Relaxed);
            copied += self.round(now, everything).await?;
            if self.has_written.load(Ordering::Relaxed) {
                self.reread().await?;
                self.look().await?;
            }
            now = self.result();
            let is_done = now.corruptions + now.leaks == 0 || now.check_errors > 0 || self.sum.is_lost;
            if is_done || !self.has_written.load(Ordering::Relaxed) {
                break;
            }
        }
        if everything && !now.is_sound() {
            // As whoever looks next sees it: entries that a repair would have dropped, and could not, refer to something.
            self.options.repair = Repair::Nothing;
            self.look().await?;
            now = self.result();
        }
        let left = self.sum.corruptions - self.sum.copied_wrong;
        now.corruptions_fixed = (first.corruptions - first.copied_wrong).saturating_sub(left) + copied;
        now.leaks_fixed = first.leaks.saturating_sub(self.sum.leaks);
        if now.is_sound() {
            self.clear_flags().await?;
        }
        Ok(now)
    }

    /// One round of changes. Returns how many COPIED flags were changed.
    async fn round(&mut self, now: CheckResult, everything: bool) -> Result<u64> {
        let mut copied = 0;
        if everything && now.corruptions > 0 {
            copied += self.raise_all(self.sum.rebuild).await?;
        }
        if now.leaks > 0 || now.corruptions > 0 && everything {
            copied += self.lower_all().await?;
        }
        Ok(copied)
    }

    async fn clear_unknown_autoclear(&mut self) -> Result<()> {
        let known = self.header.autoclear & (AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW);
        if known != self.header.autoclear {
            self.header.autoclear = known;
            self.put(&known.to_be_bytes(), HostOffset(OFFSET_AUTOCLEAR)).await?;
            self.file.barrier(self.io).await?;
        }
        Ok(())
    }

    async fn raise_all(&mut self, rebuild: bool) -> Result<u64> {
        let copies = self.find_overlaps().await?;
        if !copies.is_empty() {
            // Before that, a change of a table would change what the guest reads, if one of its clusters lies there.
            self.rebuild(&copies).await?;
            return self.clear_and_raise(true).await;
        }
        let copied = self.clear_and_raise(!rebuild).await?;
        if rebuild {
            self.rebuild(&copies).await?;
        }
        Ok(copied)
    }

    async fn clear_and_raise(&mut self, raising: bool) -> Result<u64> {
        let mut copied = 0;
        let (mut from, mut mending) = (Some(0), true);
        while let Some(start) = from {
            let mut counts = self.count(start, QUIET).await?;
            self.note_stored(&mut counts).await?;
            copied += self.entries(&counts, Pass::Clear, mending).await?;
            if raising {
                self.adjust(&counts, Adjust::Raise).await?;
            }
            from = self.next_window(&counts);
            mending = false;
        }
        self.file.barrier(self.io).await?;
        Ok(copied)
    }

    async fn lower_all(&mut self) -> Result<u64> {
        let mut copied = 0;
        let mut from = Some(0);
        while let Some(start) = from {
            let mut counts = self.count(start, QUIET).await?;
            self.note_stored(&mut counts).await?;
            self.adjust(&counts, Adjust::Lower).await?;
            copied += self.entries(&counts, Pass::Set, false).await?;
            from = self.next_window(&counts);
        }
        self.file.barrier(self.io).await?;
        Ok(copied)
    }

    /// Has the counters say which of the stored counts are 1, as far as that decides anything: past the end of the file.
    async fn note_stored(&mut self, counts: &mut Counts) -> Result<()> {
        if self.sum.outside.is_some() {
            let sum = self.sum.clone();
            let compared = self.compare(counts).await; // nothing is told during a repair
            self.sum = sum;
            compared?;
        }
        Ok(())
    }

    /// Changes the counts of the window where they are.
    async fn adjust(&mut self, counts: &Counts, adjust: Adjust) -> Result<()> {
        let size = self.geometry.cluster_size_bytes() as usize;
        let mut bytes = vec![0; size];
        for index in self.blocks_of(counts) {
            let super::compare::Block::At(offset) = self.block(index) else { continue };
            let Some((first, _)) = self.parts(counts, index).next() else { continue };
            let base = self.offset_in_block(first) as usize;
            self.read(&mut bytes[base..], offset + base as u64).await?;
            let parts: Vec<(u64, u64)> = self.parts(counts, index).collect();
            for (first, n) in parts {
                self.adjust_part(counts, adjust, &mut bytes, (first, n), offset).await?;
            }
        }
        Ok(())
    }

    async fn adjust_part(
        &self,
        counts: &Counts,
        adjust: Adjust,
        block: &mut [u8],
        (first, n): (u64, u64),
        offset: u64,
    ) -> Result<()> {
        let (order, max) = (self.geometry.refcount_order, self.geometry.refcount_max());
        let entry_of = |cluster: u64| (cluster & (self.geometry.refcount_block_entries() - 1)) as usize;
        let mut changed: Option<(usize, usize)> = None;
        for cluster in first..(first + n).min(self.file_clusters()) {
            let index = entry_of(cluster);
            let (stored, references) = (refcount::get(block, order, index), counts.get(cluster).references.min(max));
            let new = match adjust {
                Adjust::Raise => stored.max(references),
                Adjust::Lower => stored.min(references),
            };
            if new != stored {
                refcount::set(block, order, index, new);
                let bytes = refcount::byte_range(order, index);
                changed = Some((changed.map_or(bytes.start, |(start, _)| start), bytes.end));
            }
        }
        let Some((start, end)) = changed else { return Ok(()) };
        let (start, end) = (start / SECTOR_BYTES * SECTOR_BYTES, end.next_multiple_of(SECTOR_BYTES));
        self.put(&block[start..end], HostOffset(offset + start as u64)).await
    }

    /// The file may have grown, and may have other refcount structures.
    async fn reread(&mut self) -> Result<()> {
        self.file_bytes = self.file.size_bytes()?;
        self.refcounts = self.read_refcount_table().await?;
        Ok(())
    }

    async fn clear_flags(&mut self) -> Result<()> {
        let bits = self.header.incompatible & !(INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT);
        if bits != self.header.incompatible {
            self.header.incompatible = bits;
            self.put(&bits.to_be_bytes(), HostOffset(OFFSET_INCOMPATIBLE)).await?;
            self.file.barrier(self.io).await?;
        }
        Ok(())
    }
}
