//! Holding the image alone (M10): what changes its structure as a whole (its size, its L1 table, its snapshots) waits
//! until every request under way has ended, and lets none begin until it is done.
//!
//! There are three ways into the image, and each has its door:
//!
//! ```text
//! reads and writes in place    pin the epoch of transfers, then look whether ALONE is set     Image::enter
//! whatever changes entries     claims the clusters                                           Image::claim_clusters
//! flushes                      claim a number of their own                                   Image::enter_entry
//! ```
//! Who wants the image alone closes them from the last to the first: flushes wait for no other request, and claims on
//! clusters are never waited for by who has a pin, so no circle can close (M8).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Image;
use super::status::{ALONE, READ_ONLY};
use crate::alloc::Allocator;
use crate::alloc::epoch::Pin;
use crate::error::Result;
use crate::format::header::OFFSET_SIZE;
use crate::format::l2::COPIED;
use crate::format::{Header, HostOffset, L1Index};
use crate::image::options::LogLevel;
use crate::storage::Io;
use crate::tables::Tables;
use crate::wait::{Claim, lock};

/// The L1 table under new roots of the image.
#[derive(Clone, Copy)]
pub(super) enum NewL1<'a> {
    /// The one that there is, at its place.
    Kept,
    /// These entries, through which the guest sees what it saw before, as far as the disk reaches.
    Rewritten(&'a [u64]),
    /// These entries, of another state of the disk.
    Replaced(&'a [u64]),
}

impl<'a> NewL1<'a> {
    fn entries(self) -> Option<&'a [u64]> {
        match self {
            Self::Kept => None,
            Self::Rewritten(entries) | Self::Replaced(entries) => Some(entries),
        }
    }
}

/// The image, held alone: no other request is under way, and none begins. Dropping it lets them in again.
pub(super) struct Alone<'a> {
    image: &'a Image,
    _clusters: Claim<'a>,
    _entries: Claim<'a>,
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        // Before the claims go: who waited for them looks at the bit again.
        self.image.status.clear(ALONE);
        self.image.active().refcounts.with(|state| state.holds_back = false);
    }
}

impl Image {
    /// Enters the image for a transfer: pins the epoch, where clusters can be freed at all, or waits until nobody
    /// holds the image alone. Until the pin goes, size and L1 table stay what they are.
    #[inline]
    pub(super) async fn enter(&self) -> Option<Pin<'_>> {
        match self.try_enter() {
            Some(entered) => entered,
            None => self.enter_later().await,
        }
    }

    /// As [`Image::enter`], if nobody holds the image alone. The two shortest ways in ask this first: the future of the other
    /// costs as much as the pin.
    #[inline]
    pub(super) fn try_enter(&self) -> Option<Option<Pin<'_>>> {
        if self.status.any(READ_ONLY) {
            return Some(None); // nothing ever changes
        }
        let pin = self.allocator.transfers.pin();
        (!self.status.any(ALONE)).then_some(Some(pin))
    }

    #[cold]
    async fn enter_later(&self) -> Option<Pin<'_>> {
        loop {
            drop(self.enter_entry().await);
            if let Some(entered) = self.try_enter() {
                return entered;
            }
        }
    }

    /// Enters the image without a pin and without a claim on clusters. Not to be waited for by who has one of them.
    pub(super) async fn enter_entry(&self) -> Claim<'_> {
        let number = self.next_entry.fetch_add(1, Ordering::Relaxed);
        self.entries.claim(number..number + 1).await
    }

    /// Waits until every request under way has ended, and keeps the image until what it returns is dropped. What was
    /// acknowledged is durable then, and no table has changes that wait to be written. Refused where the image may not
    /// be written.
    pub(super) async fn hold_alone<I: Io>(&self, io: &I) -> Result<Alone<'_>> {
        self.prepare_write(io).await?;
        self.hold_still(io).await
    }

    /// As [`Image::hold_alone`], for who is not going to change anything: of an image that has not been written yet, the
    /// header stays as it is.
    pub(super) async fn hold_still<I: Io>(&self, io: &I) -> Result<Alone<'_>> {
        let entries = self.entries.claim_all().await;
        let clusters = self.cluster_claims.claim_all().await;
        // From here on dropping it, at whatever point, lets everybody in again.
        let alone = Alone { image: self, _clusters: clusters, _entries: entries };
        self.status.set(ALONE);
        self.forget_inactive();
        self.allocator.transfers.passed(self.allocator.transfers.removed_at()).await;
        self.status.check_write()?;
        alone.tables().refcounts.with(|state| {
            state.holds_back = true; // what changes the structure wants the file no longer than it is
            state.forget_fresh(); // it may leave behind in clusters what their entries do not show
        });
        alone.tables().refcounts.give_ahead_back(io, &alone.tables().file).await?;
        alone.flush(io).await?;
        Ok(alone)
    }
}

impl Alone<'_> {
    /// The image that is held.
    pub(super) fn image(&self) -> &Image {
        self.image
    }

    /// The allocator of the image.
    pub(super) fn allocator(&self) -> &Allocator {
        &self.image.allocator
    }

    /// The image's own tables.
    pub(super) fn tables(&self) -> &Tables {
        self.image.active()
    }

    /// As [`Image::flush`]: everything is durable, and what was released before is free.
    pub(super) async fn flush<I: Io>(&self, io: &I) -> Result<()> {
        self.image.flush_entered(io).await
    }

    /// Switches the roots of the image: size, L1 table, snapshot table, as `change` sets them in the header. One write
    /// of one sector, so that a crash leaves the old ones or the new ones (D1), and durable when this returns.
    ///
    /// The caller has made durable what the new roots refer to ([`Alone::flush`] does), and has nothing of the old
    /// tables waiting to be written. After an error the old roots are in force, or the handle writes no more.
    ///
    /// Bitmaps follow: what reads differently from now on is dirty in those that are enabled.
    pub(super) async fn switch_roots<I: Io>(
        &self,
        io: &I,
        change: impl FnOnce(&mut Header),
        l1: NewL1<'_>,
    ) -> Result<()> {
        let image = self.image;
        let mut new = (*image.header()).clone();
        let old_size = new.size_bytes;
        change(&mut new);
        let changed = self.ranges_that_change(new.size_bytes, l1);
        if !image.has_bitmaps() || (new.size_bytes == old_size && changed.is_empty()) {
            return self.write_new_roots(io, new, l1.entries()).await;
        }
        image.suspend_bitmaps(io).await?;
        let switched = self.write_new_roots(io, new, l1.entries()).await;
        let changed = if switched.is_ok() { &changed[..] } else { &[] };
        image.resume_bitmaps(io, old_size, changed).await;
        switched
    }

    /// Guest ranges that may read differently under another size or L1 table: what a larger disk gains, and what other
    /// L2 tables map. (A table that two states share has not changed since: whoever changes one makes it its own.)
    fn ranges_that_change(&self, size: u64, l1: NewL1<'_>) -> Vec<Range<u64>> {
        let tables = self.tables();
        let (old_size, covers) = (tables.size_bytes(), tables.geometry.l2_table_covers_bytes());
        let mut ranges = Vec::new();
        if size > old_size {
            ranges.push(old_size..size);
        }
        let NewL1::Replaced(new) = l1 else { return ranges };
        for index in 0..tables.geometry.l1_entries_for(size) {
            let (old, new) = (tables.l1.get(L1Index(index)), new.get(index as usize).copied().unwrap_or(0));
            if (old ^ new) & !COPIED != 0 {
                ranges.push(index * covers..size.min((index + 1) * covers));
            }
        }
        ranges
    }

    async fn write_new_roots<I: Io>(&self, io: &I, mut new: Header, l1_entries: Option<&[u64]>) -> Result<()> {
        let image = self.image;
        let tables = self.tables();
        let _only_one = image.header_claims.claim(0..1).await;
        image.status.check_write()?;
        let old = image.header();
        // Bitmaps may have been stored meanwhile.
        (new.extensions, new.autoclear) = (old.extensions.clone(), old.autoclear);
        // Where the refcount table is belongs to the passes; none is under way, and nothing waits for the next.
        let (at, clusters) = tables.refcounts.with(|state| state.root());
        new.refcount_table_offset = at;
        new.refcount_table_clusters = clusters as u32;
        if let Err(e) = self.write_roots(io, &new).await {
            let back = Header {
                refcount_table_offset: new.refcount_table_offset,
                refcount_table_clusters: new.refcount_table_clusters,
                ..(*old).clone()
            };
            if self.write_roots(io, &back).await.is_err() {
                image.poison(
                    "a root of the image was being switched when writing failed, and which one is on disk is unknown",
                );
                image.log(LogLevel::Error, "neither the new nor the old roots of the image could be written");
            }
            return Err(e);
        }
        tables.follow_header(&new, l1_entries).await;
        *lock(&image.header) = Arc::new(new);
        Ok(())
    }

    async fn write_roots<I: Io>(&self, io: &I, header: &Header) -> Result<()> {
        self.tables().file.write_bytes(io, &header.encode_roots(), HostOffset(OFFSET_SIZE)).await?;
        self.tables().sync(io).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64};
    use std::time::Duration;

    use super::*;
    use crate::format::GuestOffset;
    use crate::image::{CreateOptions, OpenOptions, ZeroFlags, create_with};
    use crate::storage::memory::MemoryStorage;
    use crate::storage::{Blocking, Storage};
    use crate::wait::block_on;

    struct OnDrop<F: Fn()>(F);

    impl<F: Fn()> Drop for OnDrop<F> {
        fn drop(&mut self) {
            (self.0)();
        }
    }

    fn image(size: u64) -> (Arc<MemoryStorage>, Image) {
        let storage = Arc::new(MemoryStorage::default());
        block_on(create_with(&Blocking, &*storage, size, &CreateOptions::default())).unwrap();
        let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
        (storage, image)
    }

    #[test]
    fn nobody_else_is_in_an_image_that_is_held_alone() {
        let (_, image) = image(64 << 20);
        let stop = AtomicBool::new(false);
        let done: [AtomicU64; 4] = Default::default();
        let now = || done.each_ref().map(|done| done.load(Ordering::SeqCst));
        std::thread::scope(|scope| {
            // Also when an assertion fails: the threads would go on for ever.
            let _stops = OnDrop(|| stop.store(true, Ordering::Relaxed));
            for thread in 0..4u64 {
                let (image, done, stop) = (&image, &done[thread as usize], &stop);
                scope.spawn(move || {
                    let mut buffer = [thread as u8; 4096];
                    for i in 0u64.. {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let at = (i * 7919 + thread * 100) % 1000 * 65536;
                        match (i + thread) % 5 {
                            0 => image.pwrite(&buffer, at).unwrap(),
                            1 => image.pread(&mut buffer, at).unwrap(),
                            2 => image.write_zeroes(at, 65536, ZeroFlags::default()).unwrap(),
                            3 => drop(image.map(GuestOffset(at), 65536).unwrap()),
                            _ => image.flush().unwrap(),
                        }
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
            for _ in 0..30 {
                let alone = block_on(image.hold_alone(&Blocking)).unwrap();
                let before = now();
                std::thread::sleep(Duration::from_millis(2));
                // Who is on the way out counts itself, once.
                let after = now();
                let only_out = before.iter().zip(&after).all(|(before, after)| after - before <= 1);
                assert!(only_out, "requests began meanwhile: {before:?}, and then {after:?}");
                assert_eq!((alone.tables().l2.dirty_count(), image.status.any(ALONE)), (0, true));
                drop(alone);
                while now() == after {
                    std::thread::yield_now();
                }
            }
        });
        image.close().unwrap();
    }

    #[test]
    fn a_switched_root_is_what_the_next_handle_finds() {
        let (storage, image) = image(3 << 20);
        image.pwrite(&[7; 512], 1 << 20).unwrap();
        let alone = block_on(image.hold_alone(&Blocking)).unwrap();
        block_on(alone.switch_roots(&Blocking, |header| header.size_bytes = 2 << 20, NewL1::Kept)).unwrap();
        drop(alone);
        assert_eq!((image.size(), image.header().size_bytes), (2 << 20, 2 << 20));
        assert!(image.pread(&mut [0; 512], 2 << 20).is_err(), "past the end");
        image.close().unwrap();
        let image = Image::open_storage(storage, &OpenOptions::default()).unwrap();
        let mut buffer = [0; 512];
        image.pread(&mut buffer, 1 << 20).unwrap();
        assert_eq!((image.size(), buffer), (2 << 20, [7; 512]));
    }

    #[test]
    fn an_image_that_takes_no_writes_cannot_be_held_alone() {
        let (storage, image) = image(1 << 20);
        image.poison("of the test");
        assert!(block_on(image.hold_alone(&Blocking)).is_err());
        drop(image);
        let options = OpenOptions { read_only: true, ..Default::default() };
        let image = Image::open_storage(storage as Arc<dyn Storage>, &options).unwrap();
        assert!(block_on(image.hold_alone(&Blocking)).is_err());
        image.pread(&mut [0; 512], 0).unwrap();
    }
}
