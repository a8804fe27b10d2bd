//! Storages
//!
//! Advanced: where the bytes of an image are. A path or a file descriptor is enough for most programs; a storage is
//! for those that keep images in Ceph, in S3, in memory, or behind a privileged process.
//!
//! A storage is counted: images, options and resolvers keep their own reference, so that qcow2_storage_free() only
//! gives up the caller's.

use std::io;
use std::sync::Arc;

use libc::{c_char, c_int, c_void, iovec, ssize_t};

use super::arguments::{flags as check_flags, out, path};
use super::boundary::{call, null};
use super::opts::qcow2_destroy_fn;
use super::structs::{self, AbiStruct};
use crate::error::{Error, IoOp, Result};
use crate::image::backing::open_file;
use crate::storage::file::FileStorage;
use crate::storage::record::Recorder;
use crate::storage::{IoDst, IoSrc, Storage};

/// Flag of qcow2_storage_open(): open the file for reading only.
pub const QCOW2_STORAGE_READ_ONLY: u32 = 1 << 0;

/// Most buffers that preadv and pwritev of a storage are called with.
pub const QCOW2_STORAGE_IOV_MAX: u32 = 1024;

/// A place for the bytes of an image: a file, or the caller's callbacks.
pub struct qcow2_storage {
    pub(super) inner: Arc<dyn Storage>,
}

/// What a storage does. Members that are NULL are not supported: a call that needs one fails with -ENOTSUP. Members
/// may be appended in later versions.
/// No member reserves space: where preallocation=falloc asks for that, zeroes are written, as with preallocation=full.
///
/// Every callback gets the user pointer given to qcow2_storage_new(), is called from any thread and from several at
/// once, returns a negative errno on failure, and must not call into an image that uses the storage, nor unwind
/// (throw). A read may be under way in the sector in which a write begins: what it finds of that does not matter.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2_storage_ops {
    /// sizeof(struct qcow2_storage_ops).
    pub struct_size: usize,
    /// Required. Reads up to length bytes at offset: returns how many, 0 only at or past the end of the storage.
    pub pread: Option<unsafe extern "C" fn(user: *mut c_void, buf: *mut c_void, length: usize, offset: u64) -> ssize_t>,
    /// Writes up to length bytes at offset, growing the storage if need be: returns how many, 1 or more. NULL makes
    /// a storage that can only be read.
    pub pwrite:
        Option<unsafe extern "C" fn(user: *mut c_void, buf: *const c_void, length: usize, offset: u64) -> ssize_t>,
    /// As pread, into up to QCOW2_STORAGE_IOV_MAX buffers. NULL: the library calls pread for each.
    pub preadv:
        Option<unsafe extern "C" fn(user: *mut c_void, iov: *const iovec, iovcnt: c_int, offset: u64) -> ssize_t>,
    /// As pwrite, from up to QCOW2_STORAGE_IOV_MAX buffers. NULL: the library calls pwrite for each.
    pub pwritev:
        Option<unsafe extern "C" fn(user: *mut c_void, iov: *const iovec, iovcnt: c_int, offset: u64) -> ssize_t>,
    /// Makes everything durable whose write returned before the call. Returns 0. A storage that has nothing to make
    /// durable gives a function that returns 0, not NULL.
    pub flush: Option<unsafe extern "C" fn(user: *mut c_void) -> c_int>,
    /// Required. Stores the size of the storage in bytes. Returns 0.
    pub get_size: Option<unsafe extern "C" fn(user: *mut c_void, size: *mut u64) -> c_int>,
    /// Sets the size of the storage in bytes; new bytes read as zeroes. Returns 0.
    pub truncate: Option<unsafe extern "C" fn(user: *mut c_void, size: u64) -> c_int>,
    /// Called once, when the last image, option object or handle that used the storage is gone. May be NULL.
    pub destroy: qcow2_destroy_fn,
    /// Gives up the space of length bytes at offset: they read as zeroes from then on, and the size stays. Returns 0.
    /// NULL, or a function that fails: freed clusters keep their space until they are used again; after the first
    /// failure an image does not call it again.
    pub punch_hole: Option<unsafe extern "C" fn(user: *mut c_void, offset: u64, length: u64) -> c_int>,
}

// SAFETY: repr(C); one integer and pointers, for which zero is NULL.
unsafe impl AbiStruct for qcow2_storage_ops {
    /// All members up to `destroy`, as released in 0.1.
    const FIRST_SIZE: usize = 9 * size_of::<usize>();
}

/// The caller's pointer together with what gives it up.
pub(super) struct UserData {
    pub(super) user: *mut c_void,
    pub(super) destroy: qcow2_destroy_fn,
}

// SAFETY: the manual demands callbacks that may be called from any thread with this pointer, several at once.
unsafe impl Send for UserData {}
// SAFETY: as above.
unsafe impl Sync for UserData {}

impl Drop for UserData {
    fn drop(&mut self) {
        if let Some(destroy) = self.destroy {
            // SAFETY: the caller gave function and pointer together; called once, after the last use.
            unsafe { destroy(self.user) }
        }
    }
}

/// What a callback that returns 0 or a negative errno said.
pub(super) fn status(code: c_int) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(callback_error(i64::from(code))) }
}

/// The error behind a callback's result; what is no errno (a positive number, say) counts as EIO.
fn callback_error(code: i64) -> io::Error {
    let errno = if (-4095..0).contains(&code) { -code as i32 } else { libc::EIO };
    io::Error::from_raw_os_error(errno)
}

fn unsupported() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOTSUP)
}

/// The caller's functions as a [`Storage`].
struct CallbackStorage {
    ops: qcow2_storage_ops,
    data: UserData,
}

/// How many bytes a transfer callback did; more than it was asked for is a broken callback, not progress.
fn progress(n: ssize_t, asked: usize) -> io::Result<usize> {
    match usize::try_from(n) {
        Ok(n) if n <= asked => Ok(n),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EIO)),
        Err(_) => Err(callback_error(n as i64)),
    }
}

/// Repeats `one` or `many` until the pieces are done or no progress is made; returns the bytes done. The pieces are
/// given by their lengths, the closures know the rest: `one(piece, done of it, at)`, `many(first, last + 1, at)`.
fn transfer(
    lengths: &dyn Fn(usize) -> usize,
    count: usize,
    offset: u64,
    one: &dyn Fn(usize, usize, u64) -> ssize_t,
    many: Option<&dyn Fn(usize, usize, u64) -> ssize_t>,
) -> io::Result<usize> {
    let (mut index, mut within, mut done) = (0, 0, 0usize);
    while index < count {
        if within == lengths(index) {
            (index, within) = (index + 1, 0);
            continue;
        }
        let last = count.min(index + QCOW2_STORAGE_IOV_MAX as usize);
        let at = offset + done as u64;
        let mut n = match many {
            Some(many) if within == 0 && last - index > 1 => {
                progress(many(index, last, at), (index..last).map(lengths).sum())?
            }
            _ => progress(one(index, within, at), lengths(index) - within)?,
        };
        if n == 0 {
            break;
        }
        done += n;
        while n > 0 {
            let step = n.min(lengths(index) - within);
            (n, within) = (n - step, within + step);
            if within == lengths(index) {
                (index, within) = (index + 1, 0);
            }
        }
    }
    Ok(done)
}

impl Storage for CallbackStorage {
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        let user = self.data.user;
        let pread = self.ops.pread.ok_or_else(unsupported)?;
        let one = |index: usize, within: usize, at: u64| {
            let rest = pieces[index].slice(within, pieces[index].len() - within);
            // SAFETY: the caller's function, with its own pointer and memory that is valid for the request.
            unsafe { pread(user, rest.base().cast(), rest.len(), at) }
        };
        let many = self.ops.preadv.map(|preadv| {
            move |first: usize, last: usize, at: u64| {
                let part = &pieces[first..last];
                // SAFETY: as above; IoDst has the layout of struct iovec, and the count fits (QCOW2_STORAGE_IOV_MAX).
                unsafe { preadv(user, part.as_ptr().cast(), part.len() as c_int, at) }
            }
        });
        let many = many.as_ref().map(|many| many as &dyn Fn(usize, usize, u64) -> ssize_t);
        transfer(&|index| pieces[index].len(), pieces.len(), offset, &one, many)
    }

    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let user = self.data.user;
        let pwrite = self.ops.pwrite.ok_or_else(unsupported)?;
        let one = |index: usize, within: usize, at: u64| {
            let rest = pieces[index].slice(within, pieces[index].len() - within);
            // SAFETY: the caller's function, with its own pointer and memory that is valid for the request.
            unsafe { pwrite(user, rest.base().cast(), rest.len(), at) }
        };
        let many = self.ops.pwritev.map(|pwritev| {
            move |first: usize, last: usize, at: u64| {
                let part = &pieces[first..last];
                // SAFETY: as above; IoSrc has the layout of struct iovec, and the count fits (QCOW2_STORAGE_IOV_MAX).
                unsafe { pwritev(user, part.as_ptr().cast(), part.len() as c_int, at) }
            }
        });
        let many = many.as_ref().map(|many| many as &dyn Fn(usize, usize, u64) -> ssize_t);
        let done = transfer(&|index| pieces[index].len(), pieces.len(), offset, &one, many)?;
        // No progress and no error: as with a file, there is no room.
        if (done as u64) < crate::storage::total_src(pieces) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let flush = self.ops.flush.ok_or_else(unsupported)?;
        // SAFETY: the caller's function with its own pointer.
        status(unsafe { flush(self.data.user) })
    }

    fn size(&self) -> io::Result<u64> {
        let get_size = self.ops.get_size.ok_or_else(unsupported)?;
        let mut size = 0;
        // SAFETY: the caller's function with its own pointer, and a place for the result.
        status(unsafe { get_size(self.data.user, &raw mut size) })?;
        Ok(size)
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        let truncate = self.ops.truncate.ok_or_else(unsupported)?;
        // SAFETY: the caller's function with its own pointer.
        status(unsafe { truncate(self.data.user, size) })
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let punch_hole = self.ops.punch_hole.ok_or_else(unsupported)?;
        // SAFETY: the caller's function with its own pointer.
        status(unsafe { punch_hole(self.data.user, offset, length) })
    }
}

/// Makes a storage of callbacks.
///
/// ops:     the functions; copied, may be freed after the call
/// user:    passed to each of them; must stay valid until ops->destroy is called with it
/// storage: where the storage goes; set to NULL on an error
///
/// On an error ops->destroy is not called: user stays the caller's. The caller gives its reference up with
/// qcow2_storage_free().
/// Returns 0 or -EINVAL: NULL, a wrong struct_size, or a required callback is missing. Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_storage_new(
    ops: *const qcow2_storage_ops,
    user: *mut c_void,
    storage: *mut *mut qcow2_storage,
) -> c_int {
    call(|| {
        // SAFETY: NULL or valid for a write by the manual above.
        let storage = unsafe { out("storage", storage, std::ptr::null_mut()) }?;
        // SAFETY: NULL or a struct that is as long as it says by the manual above.
        let ops = unsafe { structs::read("ops", ops) }?;
        if ops.pread.is_none() {
            return Err(null("ops->pread"));
        }
        if ops.get_size.is_none() {
            return Err(null("ops->get_size"));
        }
        let inner = Arc::new(CallbackStorage { ops, data: UserData { user, destroy: ops.destroy } });
        *storage = Box::into_raw(Box::new(qcow2_storage { inner }));
        Ok(())
    })
}

/// Makes a storage of a file or block device: what a resolver returns for a name that it allows.
///
/// path:    the file, which must exist
/// flags:   0 (for reading and writing) or QCOW2_STORAGE_READ_ONLY
/// storage: where the storage goes; set to NULL on an error
///
/// Returns 0 or a negative errno, that of open(2). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_storage_open(
    path: *const c_char,
    flags: u32,
    storage: *mut *mut qcow2_storage,
) -> c_int {
    call(|| {
        // SAFETY: NULL or valid for a write by the manual above.
        let storage = unsafe { out("storage", storage, std::ptr::null_mut()) }?;
        check_flags(flags, QCOW2_STORAGE_READ_ONLY)?;
        // SAFETY: NULL or a C string by the manual above.
        let path = unsafe { self::path("path", path) }?;
        let file = open_file(path, flags & QCOW2_STORAGE_READ_ONLY == 0)?;
        *storage = Box::into_raw(Box::new(qcow2_storage { inner: Arc::new(file) }));
        Ok(())
    })
}

/// Makes a storage that passes everything on to another one and writes down, in the format of the kernel's
/// dm-log-writes target, what is written, flushed and discarded: whoever wants to know what a power cut would leave can
/// replay the log onto a copy of the file as it was before, up to any entry.
///
/// inner:    where the bytes are. The new storage keeps a reference
/// log_path: the log, a file that is made or emptied
/// flags:    0
/// storage:  where the storage goes; set to NULL on an error
///
/// Calls are passed on one at a time: this is for tests. A call whose entry cannot be logged fails. The number of
/// entries in the log is right after each flush, and once the last user of the storage is gone.
/// Returns 0 or a negative errno: that of open(2) for the log. Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_storage_record(
    inner: *mut qcow2_storage,
    log_path: *const c_char,
    flags: u32,
    storage: *mut *mut qcow2_storage,
) -> c_int {
    call(|| {
        // SAFETY: NULL or valid for a write by the manual above.
        let storage = unsafe { out("storage", storage, std::ptr::null_mut()) }?;
        check_flags(flags, 0)?;
        // SAFETY: NULL or a live storage by the manual above.
        let inner = unsafe { inner.as_ref() }.ok_or_else(|| null("inner"))?;
        // SAFETY: NULL or a C string by the manual above.
        let path = unsafe { self::path("log_path", log_path) }?;
        let mut open = std::fs::OpenOptions::new();
        let log = open.read(true).write(true).create(true).truncate(true).open(path);
        let log = Arc::new(FileStorage::new(log.map_err(|e| Error::open(path, &e))?));
        let recorder = Recorder::new(Arc::clone(&inner.inner), log).map_err(|e| Error::io(IoOp::Write, 0, &e))?;
        *storage = Box::into_raw(Box::new(qcow2_storage { inner: Arc::new(recorder) }));
        Ok(())
    })
}

/// Gives up the caller's reference to a storage. What still uses the storage (an open image, options) keeps it alive.
///
/// storage: not to be used any more; NULL is a no-op
///
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_storage_free(storage: *mut qcow2_storage) {
    if storage.is_null() {
        return;
    }
    // SAFETY: came from Box::into_raw in one of the calls above, and the caller uses it no more.
    let storage = unsafe { Box::from_raw(storage) };
    call(move || {
        drop(storage);
        Ok(())
    });
}

/// Takes over the reference that a resolver returned.
///
/// # Safety
/// `storage` came from a call above and is given up by its owner.
pub(super) unsafe fn take(storage: *mut qcow2_storage) -> Result<Arc<dyn Storage>> {
    if storage.is_null() {
        return Err(Error::Argument { name: "storage", why: "was not set by the resolver, which returned 0" });
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { Box::from_raw(storage) }.inner)
}
