//! Operations on bitmaps. Each holds the image alone, and is done at once and durably, or not at all. What other bitmaps
//! have recorded by then is stored with it.

use std::sync::Arc;

use super::store::Draft;
use super::{Bitmap, Image, find, problem_of};
use crate::bitmap::record::Recorder;
use crate::bitmap::stored::Runs;
use crate::error::{BitmapProblem, Error, Result};
use crate::format::bitmap::{
    BitmapEntry, GRANULARITY_BITS_MAX, GRANULARITY_BITS_MIN, NAME_MAX, default_granularity_bits, table_entries_for,
};
use crate::format::{GuestOffset, HostOffset};
use crate::storage::{Blocking, Io};
use crate::tables::file::HostFile;
use crate::wait::block_on_helping;

use super::{BitmapExtent, BitmapInfo};

/// Extents that are read at once from the bitmap of another image.
const EXTENTS_AT_ONCE: usize = 4096;

/// How a bitmap is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BitmapOptions {
    /// Guest bytes that one bit stands for: a power of two from 512 to 2 GiB; 0 for the cluster size, within 4 KiB and
    /// 64 KiB.
    pub granularity_bytes: u64,
    /// It records nothing until it is enabled.
    pub disabled: bool,
}

impl Image {
    /// The bitmaps of the image, in their order. Works on images that were opened to be inspected, too.
    pub fn bitmap_list(&self) -> Result<Vec<BitmapInfo>> {
        self.block(self.bitmap_list_with(&Blocking))
    }

    /// What a bitmap says about `[offset, offset + length)`: at most `max` extents, from `offset` on, as long as they can
    /// be; the next call goes on where the last one ends. What was written through this handle counts.
    pub fn bitmap_extents(&self, name: &str, offset: u64, length: u64, max: usize) -> Result<Vec<BitmapExtent>> {
        self.block(self.bitmap_extents_with(&Blocking, name, GuestOffset(offset), length, max))
    }

    /// Adds a bitmap. Unless it is disabled, it records from now on.
    pub fn bitmap_add(&self, name: &str, options: BitmapOptions) -> Result<()> {
        self.block(self.bitmap_add_with(&Blocking, name, options))
    }

    /// Removes a bitmap, whatever state it is in.
    pub fn bitmap_remove(&self, name: &str) -> Result<()> {
        self.block(self.bitmap_remove_with(&Blocking, name))
    }

    /// Makes a bitmap say that nothing was changed.
    pub fn bitmap_clear(&self, name: &str) -> Result<()> {
        self.block(self.bitmap_clear_with(&Blocking, name))
    }

    /// Lets a bitmap record changes from now on, or no longer.
    pub fn bitmap_enable(&self, name: &str, enabled: bool) -> Result<()> {
        self.block(self.bitmap_enable_with(&Blocking, name, enabled))
    }

    /// Adds to `name` what bitmap `from` says, of this image or of another one of the same size. Their granularities
    /// may differ: what one bit of either covers counts as a whole.
    pub fn bitmap_merge(&self, name: &str, other: Option<&Image>, from: &str) -> Result<()> {
        // The other image may have to wait for its own queues.
        let helpers = [self.helpers(), other.unwrap_or(self).helpers()];
        block_on_helping(self.bitmap_merge_with(&Blocking, name, other, from), &helpers)
    }

    /// As [`Image::bitmap_add`].
    pub async fn bitmap_add_with<I: Io>(&self, io: &I, name: &str, options: BitmapOptions) -> Result<()> {
        self.operate(io, |list, drafts| {
            if list.iter().any(|bitmap| bitmap.entry.name == name) {
                return Err(Error::Bitmap { name: name.to_owned(), problem: BitmapProblem::Exists });
            }
            let entry = self.new_entry(name, options)?;
            drafts.push(Draft { old: None, entry, cleared: false, added: None });
            Ok(())
        })
        .await
    }

    /// As [`Image::bitmap_remove`].
    pub async fn bitmap_remove_with<I: Io>(&self, io: &I, name: &str) -> Result<()> {
        self.operate(io, |list, drafts| {
            find(list, name)?;
            drafts.retain(|draft| draft.entry.name != name);
            Ok(())
        })
        .await
    }

    /// As [`Image::bitmap_clear`].
    pub async fn bitmap_clear_with<I: Io>(&self, io: &I, name: &str) -> Result<()> {
        self.operate(io, |list, drafts| {
            self.draft_of(list, drafts, name)?.cleared = true;
            Ok(())
        })
        .await
    }

    /// As [`Image::bitmap_enable`].
    pub async fn bitmap_enable_with<I: Io>(&self, io: &I, name: &str, enabled: bool) -> Result<()> {
        self.operate(io, |list, drafts| {
            self.draft_of(list, drafts, name)?.entry.auto = enabled;
            Ok(())
        })
        .await
    }

    /// As [`Image::bitmap_merge`].
    pub async fn bitmap_merge_with<I: Io>(&self, io: &I, name: &str, other: Option<&Image>, from: &str) -> Result<()> {
        // Read before this image is held: two images may be merged into each other at the same time.
        let from_other = match other.filter(|other| !std::ptr::eq(*other, self)) {
            Some(other) => Some(self.fetch_bits(io, name, other, from).await?),
            None => None,
        };
        let alone = self.hold_alone(io).await?;
        let list = self.load_bitmaps(io).await?;
        let mut drafts: Vec<Draft> = list.iter().map(Draft::of).collect();
        let added = match from_other {
            Some((size, _)) if size != self.size() => return Err(size_differs(size)),
            Some((_, recorder)) => recorder,
            None => self.copy_bits(io, find(&list, name)?, find(&list, from)?).await?,
        };
        self.draft_of(&list, &mut drafts, name)?.added = Some(added);
        let result = self.store_drafts(io, drafts, &list).await;
        drop(alone);
        self.noted(io, result).await
    }

    async fn operate<I: Io>(
        &self,
        io: &I,
        change: impl FnOnce(&[Bitmap], &mut Vec<Draft>) -> Result<()>,
    ) -> Result<()> {
        let alone = self.hold_alone(io).await?;
        let list = self.load_bitmaps(io).await?;
        let mut drafts = list.iter().map(Draft::of).collect();
        change(&list, &mut drafts)?;
        let result = self.store_drafts(io, drafts, &list).await;
        drop(alone);
        self.noted(io, result).await
    }

    async fn noted<I: Io>(&self, io: &I, result: Result<()>) -> Result<()> {
        match result {
            Ok(()) => Ok(()),
            Err(e) => Err(self.note_error(io, e).await),
        }
    }

    /// The draft of a bitmap that can be relied on.
    fn draft_of<'a>(&self, list: &[Bitmap], drafts: &'a mut [Draft], name: &str) -> Result<&'a mut Draft> {
        self.check_usable(find(list, name)?)?;
        let missing = || Error::Bitmap { name: name.to_owned(), problem: BitmapProblem::Missing };
        drafts.iter_mut().find(|draft| draft.entry.name == name).ok_or_else(missing)
    }

    fn new_entry(&self, name: &str, options: BitmapOptions) -> Result<BitmapEntry> {
        let geometry = self.active().geometry;
        if geometry.version < 3 {
            return Err(Error::Unsupported { feature: "bitmaps in an image of version 2 (compat=0.10)".into() });
        }
        if name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control) {
            return Err(Error::Argument { name: "name", why: "must be 1 to 1023 bytes without control characters" });
        }
        let granularity_bits = match options.granularity_bytes {
            0 => default_granularity_bits(geometry),
            bytes if bytes.is_power_of_two() => bytes.trailing_zeros(),
            _ => u32::MAX,
        };
        if !(GRANULARITY_BITS_MIN..=GRANULARITY_BITS_MAX).contains(&granularity_bits) {
            return Err(Error::ArgumentValue {
                name: "granularity",
                value: options.granularity_bytes.to_string(),
                expected: "a power of two from 512 to 2147483648",
            });
        }
        let entry = BitmapEntry {
            name: name.to_owned(),
            granularity_bits,
            in_use: false,
            auto: !options.disabled,
            extra_data_compatible: false,
            extra_data: Vec::new(),
            table_offset: HostOffset(0), // filled in when it is stored
            table_entries: table_entries_for(self.size(), granularity_bits, geometry) as u32,
        };
        if entry.table_entries == 0 {
            return Err(problem_of(&entry, BitmapProblem::Unusable { why: "the disk has a size of 0" }));
        }
        match entry.unusable(self.size(), geometry) {
            Some(why) => Err(problem_of(&entry, BitmapProblem::Unusable { why })),
            None => Ok(entry),
        }
    }

    /// What a bitmap of another image says, in the granularity of `name`; and the size of that image.
    async fn fetch_bits<I: Io>(&self, io: &I, name: &str, other: &Image, from: &str) -> Result<(u64, Arc<Recorder>)> {
        let size = other.size();
        if size != self.size() {
            return Err(size_differs(size));
        }
        let entry = {
            let _entered = self.enter_to_look().await?;
            find(&self.load_bitmaps(io).await?, name)?.entry.clone()
        };
        let recorder = self.new_recorder(&entry);
        let mut at = 0;
        while at < size {
            let extents = other.bitmap_extents_with(io, from, GuestOffset(at), size - at, EXTENTS_AT_ONCE).await?;
            for extent in &extents {
                if extent.dirty {
                    recorder.note(extent.start.0, extent.length);
                }
                at = extent.start.0 + extent.length;
            }
        }
        Ok((size, recorder))
    }

    /// What another bitmap of this image says, in the granularity of `to`.
    async fn copy_bits<I: Io>(&self, io: &I, to: &Bitmap, from: &Bitmap) -> Result<Arc<Recorder>> {
        self.check_usable(from)?;
        let recorder = self.new_recorder(&to.entry);
        let file = HostFile::new(self.storage.clone());
        let bits = self.load_bits(io, &file, from).await?;
        let granularity = from.entry.granularity_bits;
        let mut runs = Runs::new(&bits, 0, u64::MAX);
        while let Some((dirty, first, count)) = runs.next(io, &file).await? {
            if dirty {
                let start = first << granularity;
                recorder.note(start, (count << granularity).min(self.size() - start));
            }
        }
        Ok(recorder)
    }
}

fn size_differs(size: u64) -> Error {
    Error::ArgumentValue {
        name: "other image",
        value: format!("a disk of {size} bytes"),
        expected: "one of the size of this image",
    }
}
