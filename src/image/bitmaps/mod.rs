//! Dirty bitmaps of an image: what is asked of them, and what is done with them.
//!
//! On disk a bitmap is either marked in use, or says everything (D10). In order:
//!
//! ```text
//! first change of the disk   enabled bitmaps are marked in use, durably, before it             record
//! every change               is noted in memory, before its data goes out
//! close, and operations      new bits, tables and directory are durable; then one write makes   store
//!                            the directory known and takes the marks away
//! ```
//! A handle that only reads changes nothing; one that was killed leaves the marks. Operations hold the image alone: no
//! change is under way while a bitmap is cleared or merged, so that each is noted before or after as a whole.

mod follow;
mod operate;
mod record;
mod store;

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, RwLock};

use super::Image;
use crate::bitmap::record::Budget;
use crate::bitmap::stored::{Bits, Runs, load_directory, load_table};
use crate::bitmap::{Bitmap, stored};
use crate::error::{BitmapProblem, Error, Result};
use crate::format::GuestOffset;
use crate::format::bitmap::{BITMAP_BYTES_MAX, BitmapEntry};
use crate::storage::Io;
use crate::tables::file::HostFile;

pub use operate::BitmapOptions;

/// Memory for recording: QEMU's limit for one bitmap, here for all of them together.
const RECORDING_BYTES_MAX: u64 = BITMAP_BYTES_MAX;

/// The bitmaps of a handle.
pub(super) struct Bitmaps {
    /// Once the directory had to be read to be changed. Replaced as a whole.
    list: RwLock<Option<Arc<Vec<Bitmap>>>>,
    /// Marks were being written when that failed: which of them are on disk is unknown.
    marks_unknown: AtomicBool,
    /// Clusters of a directory that may be on disk or not, to be released once another one is.
    orphans: Mutex<Vec<Range<u64>>>,
    budget: Arc<Budget>,
}

impl Default for Bitmaps {
    fn default() -> Self {
        Self {
            list: RwLock::default(),
            marks_unknown: AtomicBool::new(false),
            orphans: Mutex::default(),
            budget: Arc::new(Budget::new(RECORDING_BYTES_MAX)),
        }
    }
}

impl Bitmaps {
    fn get(&self) -> Option<Arc<Vec<Bitmap>>> {
        self.list.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    fn set(&self, list: Arc<Vec<Bitmap>>) {
        *self.list.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(list);
    }
}

/// Facts about one bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Guest bytes that one bit stands for.
    pub granularity_bytes: u64,
    /// It records changes.
    pub enabled: bool,
    /// It is marked in use on disk.
    pub in_use: bool,
    /// It was in use and not saved: it may lack changes, and can only be removed.
    pub inconsistent: bool,
    /// Why this library cannot use it, although it is well-formed.
    pub unusable: Option<&'static str>,
}

/// A guest range of which a bitmap says the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapExtent {
    /// First byte.
    pub start: GuestOffset,
    /// Length in bytes.
    pub length: u64,
    /// It was changed since the bitmap was started.
    pub dirty: bool,
}

impl Image {
    /// The bitmaps of the image, in their order.
    pub async fn bitmap_list_with<I: Io>(&self, io: &I) -> Result<Vec<BitmapInfo>> {
        let _entered = self.enter_to_look().await?;
        let header = self.header();
        let describe = |bitmap: &Bitmap| BitmapInfo {
            name: bitmap.entry.name.clone(),
            granularity_bytes: 1 << bitmap.entry.granularity_bits,
            enabled: bitmap.entry.auto,
            in_use: bitmap.entry.in_use,
            inconsistent: bitmap.is_inconsistent(),
            unusable: bitmap.unusable(header.size_bytes, header.geometry),
        };
        let list = self.load_bitmaps(io).await?;
        Ok(list.iter().map(describe).collect())
    }

    /// What a bitmap says about `[offset, offset + length)`: at most `max` extents, from `offset` on. Extents are as
    /// long as they can be; the next call goes on where the last one ends. See [`Image::bitmap_extents`].
    pub async fn bitmap_extents_with<I: Io>(
        &self,
        io: &I,
        name: &str,
        offset: GuestOffset,
        length: u64,
        max: usize,
    ) -> Result<Vec<BitmapExtent>> {
        self.status.check_read()?;
        let _entered = self.enter_to_look().await?;
        self.check_range(offset, length)?;
        let mut extents = Vec::new();
        if length == 0 {
            return Ok(extents);
        }
        let list = self.load_bitmaps(io).await?;
        let bitmap = find(&list, name)?;
        self.check_usable(bitmap)?;
        let file = HostFile::new(self.storage.clone());
        let bits = self.load_bits(io, &file, bitmap).await?;
        let granularity = bitmap.entry.granularity_bits;
        let end = offset.0 + length;
        let mut runs = Runs::new(&bits, offset.0 >> granularity, ((end - 1) >> granularity) + 1);
        while extents.len() < max {
            let Some((dirty, first, count)) = runs.next(io, &file).await? else { break };
            let start = (first << granularity).max(offset.0);
            let stop = ((first + count) << granularity).min(end);
            extents.push(BitmapExtent { start: GuestOffset(start), length: stop - start, dirty });
        }
        Ok(extents)
    }

    /// Keeps out who would change the bitmaps, where somebody could.
    async fn enter_to_look(&self) -> Result<Option<crate::alloc::epoch::Pin<'_>>> {
        self.status.check_open()?;
        Ok(self.enter().await)
    }

    /// The bitmaps as this handle knows them, or as they are on disk.
    async fn load_bitmaps<I: Io>(&self, io: &I) -> Result<Arc<Vec<Bitmap>>> {
        if let Some(list) = self.bitmaps.get() {
            return Ok(list);
        }
        let file = HostFile::new(self.storage.clone());
        let entries = load_directory(io, &file, &self.header()).await?;
        Ok(Arc::new(entries.into_iter().map(Bitmap::found).collect()))
    }

    /// Refuses to use what cannot be relied on.
    fn check_usable(&self, bitmap: &Bitmap) -> Result<()> {
        let header = self.header();
        let problem = if bitmap.is_inconsistent() {
            BitmapProblem::Inconsistent
        } else if let Some(why) = bitmap.unusable(header.size_bytes, header.geometry) {
            BitmapProblem::Unusable { why }
        } else {
            return Ok(());
        };
        Err(problem_of(&bitmap.entry, problem))
    }

    /// All bits of a bitmap.
    async fn load_bits<I: Io>(&self, io: &I, file: &HostFile, bitmap: &Bitmap) -> Result<Bits> {
        let header = self.header();
        let table = load_table(io, file, &bitmap.entry, header.geometry).await?;
        let recorders = bitmap.recorder.iter().cloned().collect();
        let granularity_bits = bitmap.entry.granularity_bits;
        let bits = Bits::new(header.size_bytes, granularity_bits, header.geometry, table, recorders);
        Ok(match bitmap.stored_for {
            Some(old_size) => bits.stored_for(old_size, granularity_bits),
            None => bits,
        })
    }

    /// Whether the image has bitmaps that count.
    pub(super) fn has_bitmaps(&self) -> bool {
        !matches!(stored::pointer(&self.header()), Ok(None))
    }
}

fn problem_of(entry: &BitmapEntry, problem: BitmapProblem) -> Error {
    Error::Bitmap { name: entry.name.clone(), problem }
}

fn find<'a>(list: &'a [Bitmap], name: &str) -> Result<&'a Bitmap> {
    let missing = || Error::Bitmap { name: name.to_owned(), problem: BitmapProblem::Missing };
    list.iter().find(|bitmap| bitmap.entry.name == name).ok_or_else(missing)
}
