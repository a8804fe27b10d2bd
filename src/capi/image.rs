//! Images
//!
//! Open an image, make it durable, close it. The simple calls: a program that reads and writes an image needs these
//! and the data calls below.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use libc::{c_char, c_int};

use super::arguments::{out, path};
use super::boundary::{call, call_on, null};
use super::error::record;
use super::opts::{Call, qcow2_opts};
use super::storage::qcow2_storage;
use crate::error::{Error, IoOp, Result};
use crate::image::{Image, OpenOptions};
use crate::storage::Storage;
use crate::storage::file::FileStorage;

/// An open image.
pub struct qcow2_image {
    pub(super) image: Arc<Image>, // queues hold it too
}

/// Hands a new image to the caller.
///
/// # Safety
/// `image` is NULL or valid for a write.
unsafe fn open_with(
    image: *mut *mut qcow2_image,
    opts: *const qcow2_opts,
    open: impl FnOnce(&OpenOptions) -> Result<Image>,
) -> c_int {
    call(|| {
        // SAFETY: the caller's promise.
        let image = unsafe { out("image", image, std::ptr::null_mut()) }?;
        // SAFETY: the C caller passes NULL or options that nobody changes during the call.
        let options = unsafe { open_options(opts) }?;
        *image = Box::into_raw(Box::new(qcow2_image { image: Arc::new(open(&options)?) }));
        Ok(())
    })
}

/// The options of an open; NULL means all defaults.
///
/// # Safety
/// `opts` is NULL or came from `qcow2_opts_new` and is not changed meanwhile.
unsafe fn open_options(opts: *const qcow2_opts) -> Result<OpenOptions> {
    // SAFETY: the caller's promise.
    match unsafe { opts.as_ref() } {
        None => Ok(OpenOptions::default()),
        Some(opts) => {
            opts.refuse_unused(Call::Open)?;
            Ok(opts.open.clone())
        }
    }
}

/// A descriptor of our own for the file behind the caller's.
pub(super) fn duplicate(fd: c_int) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(Error::ArgumentValue { name: "fd", value: fd.to_string(), expected: "an open file descriptor" });
    }
    // SAFETY: used only for the duplication below; a number that is not open makes that fail with EBADF.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    fd.try_clone_to_owned().map_err(|e| Error::io(IoOp::Open, 0, &e))
}

/// Opens the image in a file.
///
/// path:   the file, a qcow2 image (nothing is guessed: a file in another format is refused)
/// opts:   how to open it, or NULL for the defaults: for reading and writing, and no other file is opened for it.
///         An image with a backing file therefore needs option "backing" (or a resolver, or storages)
/// image:  where the handle goes; set to NULL on an error
///
/// The caller closes the handle with qcow2_close(). The options stay the caller's and may be freed or used again.
/// Returns 0 or a negative errno: that of open(2); -EINVAL not a qcow2 image, malformed, or a wrong option; -ENOTSUP
/// needs a feature that is not supported; -EACCES backing files not allowed; -EBUSY somebody else uses the image, or a
/// file under it, in a way that does not go together with this one (see option "locking"). An image that is refused is
/// never written to.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_open(
    path: *const c_char,
    opts: *const qcow2_opts,
    image: *mut *mut qcow2_image,
) -> c_int {
    let open = |options: &OpenOptions| {
        // SAFETY: NULL or a C string by the manual above.
        let path = unsafe { self::path("path", path) }?;
        Image::open(path, options)
    };
    // SAFETY: pointers as in the manual above.
    unsafe { open_with(image, opts, open) }
}

/// Opens the image in a file that the caller has opened already, so that the library needs no access to paths.
///
/// fd:     the file or block device, open for reading, and for writing unless option "read_only" or "inspect" is set.
///         The library duplicates it: the caller's descriptor stays the caller's, and may be closed at once. The file
///         position is not used
/// opts:   as in qcow2_open(). Option "backing" cannot be "relative" (there is no folder to start from)
/// image:  where the handle goes; set to NULL on an error
///
/// Returns 0 or a negative errno, as qcow2_open(). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_open_fd(fd: c_int, opts: *const qcow2_opts, image: *mut *mut qcow2_image) -> c_int {
    let open = |options: &OpenOptions| {
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::new(File::from(duplicate(fd)?)));
        Image::open_storage(storage, options)
    };
    // SAFETY: pointers as in the manual above.
    unsafe { open_with(image, opts, open) }
}

/// Opens the image in a storage of the caller (see "Storages").
///
/// storage: where the bytes are. The image keeps a reference: the caller may free the storage at any time
/// opts:    as in qcow2_open_fd()
/// image:   where the handle goes; set to NULL on an error
///
/// Returns 0 or a negative errno, as qcow2_open(), or what a callback of the storage returned. Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_open_storage(
    storage: *mut qcow2_storage,
    opts: *const qcow2_opts,
    image: *mut *mut qcow2_image,
) -> c_int {
    let open = |options: &OpenOptions| {
        // SAFETY: NULL or a live storage by the manual above.
        let storage = unsafe { storage.as_ref() }.ok_or_else(|| null("storage"))?;
        Image::open_storage(Arc::clone(&storage.inner), options)
    };
    // SAFETY: pointers as in the manual above.
    unsafe { open_with(image, opts, open) }
}

/// Closes an image and frees its handle, whatever it returns and whatever happened to the handle before.
///
/// image:  the handle, not to be used any more; NULL is a no-op that returns 0
///
/// Everything written is made durable first. Returns 0, or the negative errno of that last flush: then data that was
/// not flushed before may be lost. A handle that took no writes after an earlier error returns that error again.
/// Exclusive: no other call on the handle may be running or follow. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_close(image: *mut qcow2_image) -> c_int {
    if image.is_null() {
        return 0;
    }
    // SAFETY: an open handle by the manual above.
    let code = unsafe { call_on(image, |image| image.image.close()) };
    // SAFETY: came from Box::into_raw in `open_with`, and nobody uses it any more (manual above).
    let image = unsafe { Box::from_raw(image) };
    // Apart from the close: if that panicked, dropping the image while it unwinds could end the process.
    let dropped = call(move || {
        drop(image);
        Ok(())
    });
    if code < 0 { code } else { dropped }
}

/// Makes everything durable whose write had returned before this call: data and metadata survive a power cut.
///
/// image:  the handle
///
/// Returns 0 or a negative errno. After a failed flush it is not known what is on disk: from then on every write, zeroing,
/// discard, flush and change of the image fails (QCOW2_ERR_POISONED), whether it would have had to write or not, and
/// reads go on.
/// Thread-safe: any number of threads may use the handle at once. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_flush(image: *mut qcow2_image) -> c_int {
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, |image| image.image.flush()) }
}

/// The size of the guest disk in bytes.
///
/// image:  the handle
///
/// Returns the size, at most INT64_MAX, or a negative errno. Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_size(image: *const qcow2_image) -> i64 {
    // SAFETY: NULL or an open handle by the manual above.
    match unsafe { image.as_ref() } {
        Some(image) => i64::try_from(image.image.size()).unwrap_or(i64::MAX),
        None => i64::from(record(&null("image"))),
    }
}
