//! Map
//!
//! Where guest data is: which ranges are data, zero, compressed or not allocated, in which file of the backing chain,
//! and at which offset of that file. Backup, conversion and copying tools read the map to skip what holds nothing.

use std::mem::MaybeUninit;

use libc::c_int;

use super::arguments::{flags as check_flags, out};
use super::boundary::{call_on, null};
use super::image::qcow2_image;
use crate::error::{Error, Result};
use crate::format::GuestOffset;
use crate::image::{Image, MapExtent, MapKind};

/// The range reads from stored bytes ("data": true in `qemu-img map --output=json`).
pub const QCOW2_EXTENT_DATA: u32 = 1 << 0;
/// The range reads as zeroes without any stored bytes ("zero": true).
pub const QCOW2_EXTENT_ZERO: u32 = 1 << 1;
/// The range is stored compressed ("compressed": true).
pub const QCOW2_EXTENT_COMPRESSED: u32 = 1 << 2;
/// A file of the chain says something about the range; without this flag none does, and it reads as zeroes
/// ("present": true).
pub const QCOW2_EXTENT_PRESENT: u32 = 1 << 3;
/// host_offset is meaningful ("offset" is there).
pub const QCOW2_EXTENT_OFFSET_VALID: u32 = 1 << 4;
/// Of qcow2_bitmap_extents(): the range was changed since the bitmap was started.
pub const QCOW2_EXTENT_DIRTY: u32 = 1 << 5;
/// host_offset is an offset into the external data file of the file that depth names, not into that file itself.
pub const QCOW2_EXTENT_DATA_FILE: u32 = 1 << 6;

/// A range of the guest disk in which everything is of one kind. The size of this struct never changes: room to grow
/// is in its reserved members.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2_extent {
    /// Guest offset of the first byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub length: u64,
    /// Offset of the first byte in its file, with QCOW2_EXTENT_OFFSET_VALID; else 0. With QCOW2_EXTENT_DATA_FILE its
    /// file is the external data file.
    pub host_offset: u64,
    /// Which file of the backing chain says so: 0 is the image itself, 1 its backing file, and so on.
    pub depth: u32,
    /// QCOW2_EXTENT_ bits; a program must ignore bits that it does not know.
    pub flags: u32,
    /// Zero.
    pub reserved: [u64; 4],
}

impl qcow2_extent {
    fn new(extent: &MapExtent) -> Self {
        let kind = match extent.kind {
            MapKind::Data => QCOW2_EXTENT_DATA | QCOW2_EXTENT_PRESENT,
            MapKind::Compressed => QCOW2_EXTENT_DATA | QCOW2_EXTENT_COMPRESSED | QCOW2_EXTENT_PRESENT,
            MapKind::Zero => QCOW2_EXTENT_ZERO | QCOW2_EXTENT_PRESENT,
            MapKind::Unallocated => QCOW2_EXTENT_ZERO,
        };
        let offset = if extent.host_offset.is_some() { QCOW2_EXTENT_OFFSET_VALID } else { 0 };
        let data_file = if extent.in_data_file { QCOW2_EXTENT_DATA_FILE } else { 0 };
        Self {
            start: extent.start.0,
            length: extent.length,
            host_offset: extent.host_offset.map_or(0, |at| at.0),
            depth: extent.depth,
            flags: kind | offset | data_file,
            reserved: [0; 4],
        }
    }

    /// A range of which a bitmap says whether it is dirty.
    pub(super) fn of_bitmap(start: u64, length: u64, dirty: bool) -> Self {
        let flags = if dirty { QCOW2_EXTENT_DIRTY } else { 0 };
        Self { start, length, host_offset: 0, depth: 0, flags, reserved: [0; 4] }
    }

    /// Takes in the extent that follows, if it is the same thing going on.
    fn absorb(&mut self, next: &Self) -> bool {
        let same = self.depth == next.depth && self.flags == next.flags;
        let continues =
            self.flags & QCOW2_EXTENT_OFFSET_VALID == 0 || self.host_offset + self.length == next.host_offset;
        if same && continues {
            self.length += next.length;
        }
        same && continues
    }
}

/// Fills `extents` with what is between `offset` and `end`; returns how many. The last one is complete: what follows
/// it is of another kind, or starts at `end`.
fn walk(image: &Image, mut offset: u64, end: u64, extents: &mut [MaybeUninit<qcow2_extent>]) -> Result<usize> {
    let mut filled = 0;
    let mut pending: Option<qcow2_extent> = None;
    while offset < end {
        let next = qcow2_extent::new(&image.map(GuestOffset(offset), end - offset)?);
        offset += next.length;
        if let Some(extent) = &mut pending {
            if extent.absorb(&next) {
                continue;
            }
            extents[filled].write(*extent);
            filled += 1;
        }
        if filled == extents.len() {
            return Ok(filled);
        }
        pending = Some(next);
    }
    if let Some(extent) = pending {
        extents[filled].write(extent);
        filled += 1;
    }
    Ok(filled)
}

/// Lists the extents of a guest range, in order and without gaps. Neighbours that are the same kind of thing and
/// follow each other in their file come as one, exactly as in `qemu-img map --output=json`.
///
/// image:   the handle
/// offset:  guest offset in bytes
/// length:  bytes; offset + length must not be past the end of the image
/// flags:   0
/// extents: where they go: room for n_max
/// n_max:   how many there is room for, 1 or more
/// n:       how many were filled in; 0 only where length is 0, or on an error
///
/// Where n comes back as n_max, the range may have more: call again from the end of the last extent. Only extents that
/// were filled in are written to. Nothing is read but metadata. Other threads may write meanwhile: each extent was
/// true at some moment of the call.
/// Returns 0 or a negative errno, as qcow2_pread(). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_map(
    image: *mut qcow2_image,
    offset: u64,
    length: u64,
    flags: u32,
    extents: *mut qcow2_extent,
    n_max: usize,
    n: *mut usize,
) -> c_int {
    let body = |image: &qcow2_image| {
        // SAFETY: NULL or valid for a write by the manual above.
        let n = unsafe { out("n", n, 0) }?;
        check_flags(flags, 0)?;
        if extents.is_null() {
            return Err(null("extents"));
        }
        if n_max == 0 {
            return Err(Error::Argument { name: "n_max", why: "is 0; there must be room for one extent" });
        }
        let size = image.image.size();
        let end = match offset.checked_add(length) {
            Some(end) if end <= size => end,
            _ => return Err(Error::OutOfRange { offset, length, size }),
        };
        let room = n_max.min(isize::MAX as usize / size_of::<qcow2_extent>());
        // SAFETY: room for n_max structs by the manual above, which may hold anything.
        let extents = unsafe { std::slice::from_raw_parts_mut(extents.cast::<MaybeUninit<qcow2_extent>>(), room) };
        *n = walk(&image.image, offset, end, extents)?;
        Ok(())
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}
