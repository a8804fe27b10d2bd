//! PURE: every decision about guest data, as functions over small values. No I/O, no locks, no clock.
//!
//! - [`split`]: a guest range in pieces that stay inside one L2 slice
//! - [`write::plan_write`]: **what must be copied, and what the allocation and zero bits become**
//! - [`read::run_at`]: what a range reads from
//! - [`new_image::NewImage`]: where everything of a new image goes
//! - [`resize::cut`], [`resize::plan_grown`]: what becomes of clusters past an old or a new end
//! - [`zero::plan_zero`], [`zero::plan_discard`]: what zeroes and discards make of an entry
//!
//! A standard cluster is the case of one subcluster: there is one planner, not two.

pub mod new_image;
pub mod read;
pub mod resize;
pub mod write;
pub mod zero;

use crate::format::{Geometry, GuestOffset};

/// Part of a cluster, in bytes from its start: `start <= end <= cluster size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl Span {
    /// Length in bytes.
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether it holds no byte.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }
}

/// Length of the first piece of `[offset, offset + length)` that stays inside one L2 slice.
pub fn split(geometry: Geometry, offset: GuestOffset, length: u64) -> u64 {
    let covers = geometry.slice_covers_bytes();
    length.min(covers - (offset.0 & (covers - 1)))
}

/// Mask of subclusters `first..=last`.
pub fn subcluster_mask(first: u32, last: u32) -> u32 {
    debug_assert!(first <= last && last < 32);
    (u32::MAX >> (31 - (last - first))) << first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_at_the_edges() {
        assert_eq!(subcluster_mask(0, 31), u32::MAX);
        assert_eq!(subcluster_mask(31, 31), 1 << 31);
        assert_eq!(subcluster_mask(0, 0), 1);
        assert_eq!(subcluster_mask(3, 5), 0b11_1000);
    }

    #[test]
    fn pieces_end_at_slices() {
        let geometry = Geometry { version: 3, cluster_bits: 16, extended_l2: true, refcount_order: 4 };
        let covers = geometry.slice_covers_bytes();
        assert_eq!(covers, 256 << 16);
        assert_eq!(split(geometry, GuestOffset(covers - 1), 10), 1);
        assert_eq!(split(geometry, GuestOffset(covers), covers * 2), covers);
        assert_eq!(split(geometry, GuestOffset(5), 10), 10);
    }
}
