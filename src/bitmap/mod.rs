//! Dirty bitmaps: what is stored of them ([`stored`]), and what is recorded in memory while the disk changes
//! ([`record`]). When they are marked, stored and changed is for `image::bitmaps` to say.

pub mod record;
pub mod stored;

use std::sync::Arc;

use crate::format::Geometry;
use crate::format::bitmap::BitmapEntry;
use record::Recorder;

/// A bitmap of an open image.
#[derive(Clone)]
pub struct Bitmap {
    /// Its entry, as it is on disk now.
    pub entry: BitmapEntry,
    /// It is marked in use on disk because this handle uses it: with what is recorded, it says everything.
    pub ours: bool,
    /// Changes since it was last stored.
    pub recorder: Option<Arc<Recorder>>,
    /// It was stored for a disk of this size, and could not follow the disk to its present one yet.
    pub stored_for: Option<u64>,
}

impl Bitmap {
    /// As found on disk.
    pub fn found(entry: BitmapEntry) -> Self {
        Self { entry, ours: false, recorder: None, stored_for: None }
    }

    /// Somebody has used it and not saved it: what it says may be out of date.
    pub fn is_inconsistent(&self) -> bool {
        self.entry.in_use && !self.ours
    }

    /// Why its bits cannot be used on a disk of this size, although it is well-formed.
    pub fn unusable(&self, size_bytes: u64, geometry: Geometry) -> Option<&'static str> {
        if self.stored_for.is_some() { None } else { self.entry.unusable(size_bytes, geometry) }
    }

    /// Whether every change to a disk of this size has to be recorded in it, and can be.
    pub fn is_recorded(&self, size_bytes: u64, geometry: Geometry) -> bool {
        self.entry.auto && !self.is_inconsistent() && self.unusable(size_bytes, geometry).is_none()
    }
}
