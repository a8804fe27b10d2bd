//! Data
//!
//! Reading and writing guest data, writing zeroes, and giving space back. A request is all or nothing: it never returns
//! a number of bytes. Offsets and lengths need no alignment. Any number of threads may use one handle at once; two
//! requests that overlap and of which one writes give each byte one of the two values. What has been written is visible
//! at once, and durable after qcow2_flush().

use libc::{c_int, c_void, iovec};

use super::arguments::flags as check_flags;
use super::boundary::{call_on, null};
use super::image::qcow2_image;
use crate::error::{Error, Result};
use crate::format::GuestOffset;
use crate::image::{WriteFlags, ZeroFlags};
use crate::storage::{IoDst, IoSrc};

/// Flag of the write calls: the write is durable when the call returns, as if qcow2_flush() covered it alone
/// (the "force unit access" of SCSI, NVMe and virtio-blk).
pub const QCOW2_FUA: u32 = 1 << 0;

/// Flag of qcow2_write_zeroes(): host clusters that hold nothing else any more are given up, as by qcow2_discard().
/// Without it they stay allocated, so that writing there later needs no new space.
pub const QCOW2_MAY_UNMAP: u32 = 1 << 1;

/// Flag of qcow2_write_zeroes(): fail with -ENOTSUP rather than write zeroes as data, which is slow.
pub const QCOW2_NO_FALLBACK: u32 = 1 << 2;

/// Flag of qcow2_pwrite() and qcow2_pwritev(): the range is stored compressed, with the method of the image (option
/// "compression_type"), as far as that makes it smaller.
///
/// The range must consist of whole clusters: offset at the start of one, length a multiple of the cluster size unless
/// the range reaches the end of the image. Anything else is -EINVAL, as is an image whose data is in an external data
/// file. Each cluster is compressed by itself and packed behind the one before, across the boundaries of sectors and
/// host clusters. A cluster that does not become smaller is written as without the flag; one that is all zeroes becomes
/// zero by its entry alone, as by qcow2_write_zeroes() with QCOW2_MAY_UNMAP (in an image of version 2, which has no zero
/// flag, it is compressed like any other).
///
/// What the range held before does not matter: data, compressed clusters, clusters shared with a snapshot; it is
/// released. A later write to a part of a compressed cluster stores all of it uncompressed again. A processor compresses
/// at about a hundredth of the speed of a plain write: the flag is for disks that are written once.
///
/// Threads: where a blocking call has several clusters to compress, or to decompress, it is helped by threads of its own,
/// which have ended when it returns: no more in all calls of the process than there are processors, and none where one
/// thread is about as fast. For queues, see there.
pub const QCOW2_COMPRESSED: u32 = 1 << 3;

// A vector of the caller is used as it is, as pieces: no copy, no allocation.
const _: () = {
    assert!(size_of::<IoDst<'static>>() == size_of::<iovec>() && align_of::<IoDst<'static>>() == align_of::<iovec>());
    assert!(size_of::<IoSrc<'static>>() == size_of::<iovec>() && align_of::<IoSrc<'static>>() == align_of::<iovec>());
};

#[cold]
fn too_long(name: &'static str, length: usize) -> Error {
    Error::ArgumentValue { name, value: length.to_string(), expected: "no more bytes than memory can have (SSIZE_MAX)" }
}

/// A buffer of the caller: NULL only where nothing is transferred.
#[inline]
fn check_buffer(buf: *const c_void, length: usize) -> Result<()> {
    if buf.is_null() && length != 0 {
        return Err(null("buf"));
    }
    if length > isize::MAX as usize {
        return Err(too_long("length", length));
    }
    Ok(())
}

/// A vector of the caller, after a look at each piece.
///
/// # Safety
/// `iov` is NULL or points to `count` structs that stay unchanged for `'a`.
pub(super) unsafe fn vector<'a>(iov: *const iovec, count: c_int) -> Result<&'a [iovec]> {
    let Ok(count) = usize::try_from(count) else {
        return Err(Error::ArgumentValue { name: "iovcnt", value: count.to_string(), expected: "0 or more" });
    };
    if count == 0 {
        return Ok(&[]);
    }
    if iov.is_null() {
        return Err(null("iov"));
    }
    // SAFETY: not NULL, `count` structs by the caller's promise.
    let pieces = unsafe { std::slice::from_raw_parts(iov, count) };
    let mut total = 0usize;
    for (index, piece) in pieces.iter().enumerate() {
        if piece.iov_base.is_null() && piece.iov_len != 0 {
            return Err(Error::ArgumentValue {
                name: "iov",
                value: format!("iov[{index}].iov_base is NULL, with iov_len {}", piece.iov_len),
                expected: "memory in each piece that has a length",
            });
        }
        total = match total.checked_add(piece.iov_len) {
            Some(total) if total <= isize::MAX as usize => total,
            _ => return Err(too_long("iov", piece.iov_len)),
        };
    }
    Ok(pieces)
}

/// The flags of the calls that write data.
#[inline]
pub(super) fn write_flags(flags: u32) -> Result<WriteFlags> {
    check_flags(flags, QCOW2_FUA | QCOW2_COMPRESSED)?;
    Ok(WriteFlags { fua: flags & QCOW2_FUA != 0, compressed: flags & QCOW2_COMPRESSED != 0 })
}

/// The flags of the calls that write zeroes.
pub(super) fn zero_flags(flags: u32) -> Result<ZeroFlags> {
    check_flags(flags, QCOW2_FUA | QCOW2_MAY_UNMAP | QCOW2_NO_FALLBACK)?;
    Ok(ZeroFlags {
        may_unmap: flags & QCOW2_MAY_UNMAP != 0,
        no_fallback: flags & QCOW2_NO_FALLBACK != 0,
        fua: flags & QCOW2_FUA != 0,
    })
}

/// Reads guest data into a buffer.
///
/// image:  the handle
/// buf:    where it goes: length bytes (NULL is allowed where length is 0)
/// length: bytes
/// offset: guest offset in bytes; offset + length must not be past the end of the image
/// flags:  0
///
/// Returns 0 (all of it was read) or a negative errno: -EINVAL past the end, NULL or unknown flags; -EIO the image is
/// corrupt there, or the storage failed. After an error the contents of the buffer are undefined.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_pread(
    image: *mut qcow2_image,
    buf: *mut c_void,
    length: usize,
    offset: u64,
    flags: u32,
) -> c_int {
    let body = |image: &qcow2_image| {
        check_flags(flags, 0)?;
        check_buffer(buf, length)?;
        // SAFETY: `buf` is writable for `length` bytes by the manual above, for the time of this call.
        let piece = unsafe { IoDst::from_raw(buf.cast(), length) };
        image.image.read(&[piece], GuestOffset(offset))
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// Writes guest data from a buffer.
///
/// image:  the handle, opened for writing
/// buf:    what to write: length bytes, not changed (NULL is allowed where length is 0)
/// length: bytes
/// offset: guest offset in bytes; offset + length must not be past the end of the image
/// flags:  0, or any of QCOW2_FUA and QCOW2_COMPRESSED
///
/// Returns 0 (all of it was written) or a negative errno: -EINVAL past the end, NULL, unknown flags, or a range
/// that cannot be compressed (see QCOW2_COMPRESSED); -EROFS opened read-only; -ENOTSUP compression with a method that
/// this build lacks; -ENOSPC and others from the storage; -EIO the image is corrupt. After an error each byte of the
/// range may be old or new.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_pwrite(
    image: *mut qcow2_image,
    buf: *const c_void,
    length: usize,
    offset: u64,
    flags: u32,
) -> c_int {
    let body = |image: &qcow2_image| {
        let flags = write_flags(flags)?;
        check_buffer(buf, length)?;
        // SAFETY: `buf` is readable for `length` bytes by the manual above, for the time of this call.
        let piece = unsafe { IoSrc::from_raw(buf.cast_mut().cast(), length) };
        image.image.write(&[piece], GuestOffset(offset), flags)
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// Reads guest data into several buffers, filled one after the other.
///
/// image:  the handle
/// iov:    the buffers (NULL is allowed where iovcnt is 0); a buffer of length 0 is allowed
/// iovcnt: how many; any number, not limited by IOV_MAX
/// offset: guest offset in bytes
/// flags:  0
///
/// Returns 0 or a negative errno, as qcow2_pread(). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_preadv(
    image: *mut qcow2_image,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
) -> c_int {
    let body = |image: &qcow2_image| {
        check_flags(flags, 0)?;
        // SAFETY: a vector of iovcnt buffers by the manual above, for the time of this call.
        let pieces = unsafe { vector(iov, iovcnt) }?;
        // SAFETY: same layout (asserted above), and the caller's memory is writable for the time of this call.
        let pieces = unsafe { std::slice::from_raw_parts(pieces.as_ptr().cast::<IoDst<'_>>(), pieces.len()) };
        image.image.read(pieces, GuestOffset(offset))
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// Writes guest data from several buffers, taken one after the other.
///
/// image:  the handle, opened for writing
/// iov:    the buffers, not changed (NULL is allowed where iovcnt is 0); a buffer of length 0 is allowed
/// iovcnt: how many; any number, not limited by IOV_MAX
/// offset: guest offset in bytes
/// flags:  0, or any of QCOW2_FUA and QCOW2_COMPRESSED
///
/// Returns 0 or a negative errno, as qcow2_pwrite(). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_pwritev(
    image: *mut qcow2_image,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
) -> c_int {
    let body = |image: &qcow2_image| {
        let flags = write_flags(flags)?;
        // SAFETY: a vector of iovcnt buffers by the manual above, for the time of this call.
        let pieces = unsafe { vector(iov, iovcnt) }?;
        // SAFETY: same layout (asserted above), and the caller's memory is readable for the time of this call.
        let pieces = unsafe { std::slice::from_raw_parts(pieces.as_ptr().cast::<IoSrc<'_>>(), pieces.len()) };
        image.image.write(pieces, GuestOffset(offset), flags)
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// Makes a range read as zeroes, with as little writing as possible.
///
/// image:  the handle, opened for writing
/// offset: guest offset in bytes, of any alignment
/// length: bytes, of any alignment and any number; offset + length must not be past the end of the image
/// flags:  0, or any of QCOW2_FUA, QCOW2_MAY_UNMAP and QCOW2_NO_FALLBACK
///
/// Whole subclusters (whole clusters in an image without extended_l2) become zero by a change of their entry alone.
/// What is less than that at either end of the range is written as data, unless the rest of its subcluster is known to
/// read as zeroes too. At the end of the image, what lies past it counts as part of the range: a subcluster that the
/// image ends in is whole if all of it that the image has is. Zeroes are also written as data into parts of compressed
/// clusters, and wherever an image of version 2, which has no zero flag, leaves no other way.
///
/// Returns 0 or a negative errno, as qcow2_pwrite(); and -ENOTSUP if QCOW2_NO_FALLBACK is given and data would have to
/// be written: a caller may then repeat the request without it, or write the ends itself. After an error each byte of
/// the range may be old or zero.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_write_zeroes(image: *mut qcow2_image, offset: u64, length: u64, flags: u32) -> c_int {
    let body = |image: &qcow2_image| {
        let flags = zero_flags(flags)?;
        image.image.write_zeroes(offset, length, flags)
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// Says that nobody needs what a range holds (the "unmap", "trim" or "deallocate" of a guest), so that its space can be
/// given back.
///
/// image:  the handle, opened for writing
/// offset: guest offset in bytes, of any alignment
/// length: bytes, of any alignment and any number; offset + length must not be past the end of the image
/// flags:  0
///
/// A discard is advice: it does what is cheap, and no data is written for it. Of the range, whole subclusters (whole
/// clusters without extended_l2) are given up; the end of the image counts as the end of its subcluster. What is given
/// up reads as zeroes, never as what a backing file has there; the rest of the range keeps its contents: parts of
/// subclusters, parts of compressed clusters, and in an image of version 2 parts of clusters and whatever covers a
/// backing file. Who needs zeroes calls qcow2_write_zeroes() with QCOW2_MAY_UNMAP.
///
/// A host cluster of which nothing is left is free for other data once that is durable, and the file gets a hole there
/// (see punch_hole in "Storages") in the course of a later flush or of closing. With option "discard" set to "ignore"
/// the arguments are checked and nothing else happens.
///
/// Returns 0, also where nothing could be given up, or a negative errno: -EINVAL past the end or unknown flags; -EROFS
/// opened read-only; others from the storage; -EIO the image is corrupt. After an error each byte of the range may be
/// old or zero.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_discard(image: *mut qcow2_image, offset: u64, length: u64, flags: u32) -> c_int {
    let body = |image: &qcow2_image| {
        check_flags(flags, 0)?;
        image.image.discard(offset, length)
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}
