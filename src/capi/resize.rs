//! Resizing
//!
//! Another size for the guest disk of an open image.

use libc::c_int;

use super::arguments::flags as check_flags;
use super::boundary::call_on;
use super::image::qcow2_image;
use super::opts::{Call, qcow2_opts};
use crate::image::{Preallocation, ResizeOptions};

/// Flag of qcow2_resize(): the new size may be smaller. What lies past it is given up for good.
pub const QCOW2_ALLOW_SHRINK: u32 = 1 << 0;

/// Gives the guest disk another size.
///
/// image: the handle
/// size:  the new size in bytes; rounded up to a multiple of 512
/// opts:  NULL, or "preallocation" for what the disk grows by, and a progress function
///        (qcow2_opts_set_progress()); no other option may be set
/// flags: 0 or QCOW2_ALLOW_SHRINK
///
/// What the disk grows by reads as zeroes, whatever a backing file has there. What it shrinks by goes back to the file
/// system. An external data file gets the length of the disk. Persistent bitmaps follow: what the disk gains is dirty in
/// those that are enabled. Internal snapshots keep their own size. The new size is in force, and durable, when the call
/// returns; after a crash the disk has its old size or the new one, and so it has after an error (qcow2_size() tells).
/// A crash in the middle may leave the bitmaps marked in use.
/// Returns 0 or a negative errno: -EINVAL smaller without QCOW2_ALLOW_SHRINK, or a wrong option, or a bitmap that is
/// inconsistent (remove it first); -EFBIG larger than the format can have with that cluster size; -ENOTSUP the image is of
/// version 2 with snapshots or over a longer backing file, or a bitmap cannot be used, or not with that size; -ENOSPC;
/// -ECANCELED the progress function ended it: the disk has its old size; -EROFS.
/// Thread-safe; requests of other threads wait until it is done. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_resize(
    image: *mut qcow2_image,
    size: u64,
    opts: *const qcow2_opts,
    flags: u32,
) -> c_int {
    let resize = |image: &qcow2_image| {
        check_flags(flags, QCOW2_ALLOW_SHRINK)?;
        let allow_shrink = flags & QCOW2_ALLOW_SHRINK != 0;
        // SAFETY: NULL or options that nobody changes during the call, by the manual above.
        let Some(opts) = (unsafe { opts.as_ref() }) else {
            let options = ResizeOptions { allow_shrink, preallocation: Preallocation::Off };
            return image.image.resize(size, options, None);
        };
        opts.refuse_unused(Call::Resize)?;
        let options = ResizeOptions { allow_shrink, preallocation: opts.create.preallocation };
        image.image.resize(size, options, Some(&|done, total| opts.tell(done, total)))
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, resize) }
}
