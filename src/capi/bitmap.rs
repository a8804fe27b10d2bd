//! Bitmaps
//!
//! Persistent dirty bitmaps: which parts of the disk were changed since a moment, kept in the image. What an incremental
//! backup copies.
//!
//! A bitmap that is enabled records every change, from whatever thread and by whatever program that knows bitmaps. While
//! a handle writes, its bitmaps are marked in use in the file; qcow2_close() stores them. A program that ends otherwise
//! leaves them marked, and such a bitmap can only be removed: start a new one, and make a full backup.
//!
//! Functions that change bitmaps wait for the requests under way and hold up later ones, are done when they return, and
//! survive a crash as a whole or not at all.

use std::mem::MaybeUninit;

use libc::{c_char, c_int};

use super::arguments::{flags as check_flags, out, text};
use super::boundary::{call_on, null};
use super::image::qcow2_image;
use super::map::qcow2_extent;
use super::structs::{self, AbiStruct};
use crate::error::{Error, Result};
use crate::image::{BitmapExtent, BitmapInfo, BitmapOptions};

/// For qcow2_bitmap_add(): the bitmap records nothing until it is enabled.
pub const QCOW2_BITMAP_DISABLED: u32 = 1 << 0;

/// The bitmap records changes.
pub const QCOW2_BITMAP_ENABLED: u32 = 1 << 0;
/// The bitmap is marked in use in the file: by this handle, or by one that has not closed it.
pub const QCOW2_BITMAP_IN_USE: u32 = 1 << 1;
/// It was in use when a program ended without closing the image: it may lack changes, and can only be removed.
pub const QCOW2_BITMAP_INCONSISTENT: u32 = 1 << 2;
/// This version of the library cannot use it: it is kept as it is, and can be removed.
pub const QCOW2_BITMAP_UNUSABLE: u32 = 1 << 3;

/// Extents that are asked for at once.
const CHUNK: usize = 1024;

/// Facts about a bitmap. Members may be appended in later versions.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2_bitmap {
    /// Its name, with a NUL at its end.
    pub name: [c_char; 1024],
    /// Bytes of the disk that one bit stands for.
    pub granularity_bytes: u64,
    /// QCOW2_BITMAP_ENABLED, QCOW2_BITMAP_IN_USE, QCOW2_BITMAP_INCONSISTENT, QCOW2_BITMAP_UNUSABLE; a program must ignore
    /// bits that it does not know.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: repr(C), integers without padding.
unsafe impl AbiStruct for qcow2_bitmap {
    const FIRST_SIZE: usize = 1024 + 16;
}

impl qcow2_bitmap {
    fn new(info: &BitmapInfo) -> Self {
        let mut name = [0; 1024];
        // At most 1023 bytes, none of them NUL: others are refused with their directory.
        name.iter_mut().zip(info.name.bytes().take(1023)).for_each(|(to, byte)| *to = byte as c_char);
        let bit = |on: bool, bit: u32| if on { bit } else { 0 };
        let flags = bit(info.enabled, QCOW2_BITMAP_ENABLED)
            | bit(info.in_use, QCOW2_BITMAP_IN_USE)
            | bit(info.inconsistent, QCOW2_BITMAP_INCONSISTENT)
            | bit(info.unusable.is_some(), QCOW2_BITMAP_UNUSABLE);
        Self { name, granularity_bytes: info.granularity_bytes, flags, reserved: 0 }
    }
}

/// Describes one of the image's bitmaps; count index up from 0 until it fails.
///
/// image:       the handle; it may have been opened with "inspect"
/// index:       which, in the order of the file
/// bitmap:      filled in
/// bitmap_size: sizeof(struct qcow2_bitmap)
///
/// Returns 0, -ENOENT past the last one, -EINVAL where the bitmaps of the image are malformed, or another negative errno,
/// as qcow2_pread(). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_bitmap_describe(
    image: *mut qcow2_image,
    index: usize,
    bitmap: *mut qcow2_bitmap,
    bitmap_size: usize,
) -> c_int {
    let body = |image: &qcow2_image| {
        let list = image.image.bitmap_list()?;
        let Some(info) = list.get(index) else {
            let problem = crate::error::BitmapProblem::Missing;
            return Err(Error::Bitmap { name: format!("number {index}"), problem });
        };
        // SAFETY: NULL or bitmap_size bytes by the manual above.
        unsafe { structs::fill("bitmap", bitmap, bitmap_size, &qcow2_bitmap::new(info)) }
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// Adds a bitmap in which nothing is dirty.
///
/// image:             the handle, open for writing; version 3 of the format ("compat" 1.1)
/// name:              1 to 1023 bytes of UTF-8, without control characters, that no other bitmap of the image has
/// granularity_bytes: bytes of the disk that one bit stands for, a power of two from 512 to 2 GiB; 0 for the cluster
///                    size, but at least 4 KiB and at most 64 KiB
/// flags:             0, or QCOW2_BITMAP_DISABLED
///
/// Returns 0 or a negative errno: -EEXIST there is one of that name; -EINVAL wrong name, granularity or flags; -ENOTSUP
/// the image cannot have it (version 2, or it would take more than 512 MiB); or as qcow2_pwrite(). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_bitmap_add(
    image: *mut qcow2_image,
    name: *const c_char,
    granularity_bytes: u64,
    flags: u32,
) -> c_int {
    let body = |image: &qcow2_image| {
        // SAFETY: NULL or a string by the manual above.
        let name = unsafe { text("name", name) }?;
        check_flags(flags, QCOW2_BITMAP_DISABLED)?;
        image.image.bitmap_add(name, BitmapOptions { granularity_bytes, disabled: flags & QCOW2_BITMAP_DISABLED != 0 })
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// Removes a bitmap, whatever state it is in.
///
/// image: the handle, open for writing
/// name:  the bitmap
///
/// Returns 0 or a negative errno: -ENOENT there is none of that name; or as qcow2_pwrite(). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_bitmap_remove(image: *mut qcow2_image, name: *const c_char) -> c_int {
    // SAFETY: NULL or a string by the manual above; NULL or an open handle.
    unsafe { call_on(image, |image: &qcow2_image| image.image.bitmap_remove(text("name", name)?)) }
}

/// Makes a bitmap start anew: nothing is dirty in it.
///
/// image: the handle, open for writing
/// name:  the bitmap
///
/// Returns 0 or a negative errno: -ENOENT there is none of that name; -EINVAL it is inconsistent; or as qcow2_pwrite().
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_bitmap_clear(image: *mut qcow2_image, name: *const c_char) -> c_int {
    // SAFETY: NULL or a string by the manual above; NULL or an open handle.
    unsafe { call_on(image, |image: &qcow2_image| image.image.bitmap_clear(text("name", name)?)) }
}

/// Lets a bitmap record changes from now on. It keeps what it says.
///
/// image: the handle, open for writing
/// name:  the bitmap
///
/// Returns 0 or a negative errno, as qcow2_bitmap_clear(). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_bitmap_enable(image: *mut qcow2_image, name: *const c_char) -> c_int {
    // SAFETY: NULL or a string by the manual above; NULL or an open handle.
    unsafe { call_on(image, |image: &qcow2_image| image.image.bitmap_enable(text("name", name)?, true)) }
}

/// Lets a bitmap record no more changes. It keeps what it says.
///
/// image: the handle, open for writing
/// name:  the bitmap
///
/// Returns 0 or a negative errno, as qcow2_bitmap_clear(). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_bitmap_disable(image: *mut qcow2_image, name: *const c_char) -> c_int {
    // SAFETY: NULL or a string by the manual above; NULL or an open handle.
    unsafe { call_on(image, |image: &qcow2_image| image.image.bitmap_enable(text("name", name)?, false)) }
}

/// Makes dirty in one bitmap what is dirty in another. Where their granularities differ, everything counts that a bit of
/// either stands for.
///
/// image: the handle, open for writing
/// name:  the bitmap that is added to
/// from:  the handle of the image that has the other bitmap; NULL, or image itself, for the same image. Another one has to
///        be of the same size, and may be open for reading
/// other: the other bitmap
///
/// Returns 0 or a negative errno: -ENOENT there is none of that name; -EINVAL one is inconsistent, or the sizes differ;
/// or as qcow2_pwrite(). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_bitmap_merge(
    image: *mut qcow2_image,
    name: *const c_char,
    from: *mut qcow2_image,
    other: *const c_char,
) -> c_int {
    let body = |image: &qcow2_image| {
        // SAFETY: NULL or strings, NULL or an open handle, by the manual above.
        let (name, other, from) = unsafe { (text("name", name)?, text("other", other)?, from.as_ref()) };
        image.image.bitmap_merge(name, from.map(|from| &*from.image), other)
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// Lists what a bitmap says about a guest range: extents, in order and without gaps, that are dirty (QCOW2_EXTENT_DIRTY) or
/// not; as long as they can be. What was written through this handle counts, although it is stored only when the
/// handle is closed.
///
/// image:   the handle
/// name:    the bitmap
/// offset:  guest offset in bytes
/// length:  bytes; offset + length must not be past the end of the image
/// flags:   0
/// extents: where they go: room for n_max. Of each, start, length and flags are filled in, and the rest is zero
/// n_max:   how many there is room for, 1 or more
/// n:       how many were filled in; 0 only where length is 0, or on an error
///
/// Where n comes back as n_max, the range may have more: call again from the end of the last extent. The first extent
/// begins at offset and the last one ends with the range, also inside of what one bit stands for.
/// Returns 0 or a negative errno: -ENOENT there is no bitmap of that name; -EINVAL it is inconsistent; or as
/// qcow2_pread(). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_bitmap_extents(
    image: *mut qcow2_image,
    name: *const c_char,
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
        // SAFETY: NULL or a string by the manual above.
        let name = unsafe { text("name", name) }?;
        check_flags(flags, 0)?;
        if extents.is_null() {
            return Err(null("extents"));
        }
        if n_max == 0 {
            return Err(Error::Argument { name: "n_max", why: "is 0; there must be room for one extent" });
        }
        let room = n_max.min(isize::MAX as usize / size_of::<qcow2_extent>());
        // SAFETY: room for n_max structs by the manual above, which may hold anything.
        let extents = unsafe { std::slice::from_raw_parts_mut(extents.cast::<MaybeUninit<qcow2_extent>>(), room) };
        *n = fill(image, name, offset, length, extents)?;
        Ok(())
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// Fills as many extents as there is room for, some at a time; returns how many.
fn fill(
    image: &qcow2_image,
    name: &str,
    offset: u64,
    length: u64,
    extents: &mut [MaybeUninit<qcow2_extent>],
) -> Result<usize> {
    let (mut at, mut left, mut filled) = (offset, length, 0);
    loop {
        let wanted = CHUNK.min(extents.len() - filled);
        let found = image.image.bitmap_extents(name, at, left, wanted)?;
        for BitmapExtent { start, length, dirty } in &found {
            extents[filled].write(qcow2_extent::of_bitmap(start.0, *length, *dirty));
            (filled, at, left) = (filled + 1, at + length, left - length);
        }
        if left == 0 || filled == extents.len() {
            return Ok(filled);
        }
    }
}
