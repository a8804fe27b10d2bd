//! Creating images
//!
//! A new image reads as zeroes, or as its backing file. These calls write the image and leave it closed.

use libc::{c_char, c_int};

use super::arguments::{flags as check_flags, path};
use super::boundary::{call, null};
use super::opts::{Call, qcow2_opts};
use super::storage::qcow2_storage;
use crate::error::Result;
use crate::image::{CreateOptions, ProgressFn, create_reporting, create_with_data_file};
use crate::storage::Blocking;
use crate::wait::block_on;

/// Flag of qcow2_create(): replace the file if it exists.
pub const QCOW2_OVERWRITE: u32 = 1 << 0;

/// Runs a create with its options; NULL means all defaults.
///
/// # Safety
/// `opts` is NULL or came from `qcow2_opts_new` and is not changed meanwhile.
unsafe fn with_options(
    opts: *const qcow2_opts,
    create: impl FnOnce(&CreateOptions, Option<ProgressFn<'_>>) -> Result<()>,
) -> Result<()> {
    // SAFETY: the caller's promise.
    match unsafe { opts.as_ref() } {
        None => create(&CreateOptions::default(), None),
        Some(opts) => {
            opts.refuse_unused(Call::Create)?;
            create(&opts.create, Some(&|done, total| opts.tell(done, total)))
        }
    }
}

/// Creates an image in a file.
///
/// path:   the file
/// size:   size of the guest disk in bytes; rounded up to a multiple of 512
/// opts:   the format (cluster_size, extended_l2, backing_file, ...), or NULL for the defaults: version 3, clusters of
///         64 KiB, no backing file
/// flags:  0 or QCOW2_OVERWRITE
///
/// With option "backing_file", "backing_fmt" must be set too; the backing file is not opened, so its size is not used.
/// With option "data_file" that file is made too, as long as the disk (a relative name starts from the folder of the
/// image); if it exists, it is refused or, with QCOW2_OVERWRITE, emptied.
/// With option "preallocation" the call may take long: see qcow2_opts_set_progress().
/// Returns 0 or a negative errno: -EEXIST the file exists; -EBUSY somebody uses it; -EINVAL a wrong option, or options
/// that exclude each other; -EFBIG larger than the format can have with that cluster size; -ECANCELED the progress
/// function ended it; those of open(2) and write(2). A file that was made here and not completed is removed.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_create(path: *const c_char, size: u64, opts: *const qcow2_opts, flags: u32) -> c_int {
    call(|| {
        check_flags(flags, QCOW2_OVERWRITE)?;
        // SAFETY: NULL or a C string by the manual above.
        let path = unsafe { self::path("path", path) }?;
        let overwrite = flags & QCOW2_OVERWRITE != 0;
        // SAFETY: NULL or options that nobody changes during the call, by the manual above.
        if unsafe { opts.as_ref() }.is_some_and(|opts| !opts.open.data_file_storages.is_empty()) {
            return Err(Call::Create.unused("storage"));
        }
        // SAFETY: NULL or options that nobody changes during the call, by the manual above.
        unsafe { with_options(opts, |options, tell| create_reporting(path, size, options, overwrite, tell)) }
    })
}

/// Creates an image in a storage of the caller (see "Storages"), whatever that held before.
///
/// storage: where the bytes go; it must be able to write, flush and truncate. It stays the caller's
/// size:    size of the guest disk in bytes; rounded up to a multiple of 512
/// opts:    as in qcow2_create(); with qcow2_opts_set_storage() and QCOW2_ROLE_DATA_FILE, guest data goes to that
///          storage, of which nothing remains, and option "data_file" is the name that the image stores for it, if any
/// flags:   0
///
/// Returns 0 or a negative errno, as qcow2_create(), or what a callback of the storage returned.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_create_storage(
    storage: *mut qcow2_storage,
    size: u64,
    opts: *const qcow2_opts,
    flags: u32,
) -> c_int {
    call(|| {
        check_flags(flags, 0)?;
        // SAFETY: NULL or a live storage by the manual above.
        let storage = unsafe { storage.as_ref() }.ok_or_else(|| null("storage"))?;
        // SAFETY: as for `with_options` below.
        let data = unsafe { opts.as_ref() }.and_then(|opts| opts.open.data_file_storages.first().cloned().flatten());
        let create = |options: &CreateOptions, tell: Option<ProgressFn<'_>>| {
            block_on(create_with_data_file(&Blocking, &*storage.inner, data.as_deref(), size, options, tell))
        };
        // SAFETY: NULL or options that nobody changes during the call, by the manual above.
        unsafe { with_options(opts, create) }
    })
}
