//! Check and repair
//!
//! Whether an image is consistent, and putting right what can be put right. The image is named by its path, descriptor
//! or storage: what needs a repair cannot be opened for writing. (A dirty image can: such an open repairs it first.) An
//! image that is open is checked by its handle, and not repaired. Of the options, "locking", "check_memory" and the log, progress and finding functions count.
//! Nothing that the image refers to is opened.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use libc::{c_char, c_int, c_void};

use super::arguments::{flags as check_flags, path};
use super::boundary::{call, call_on, null};
use super::image::{duplicate, qcow2_image};
use super::opts::{Call, qcow2_destroy_fn, qcow2_opts};
use super::storage::{UserData, qcow2_storage};
use super::structs::{self, AbiStruct};
use crate::error::Result;
use crate::image::OpenOptions;
use crate::image::backing::open_file;
use crate::image::check::{CheckOptions, CheckResult, Finding, FindingKind, Repair, check_with};
use crate::storage::file::FileStorage;
use crate::storage::{Blocking, Storage};
use crate::wait::block_on;

/// Flag of the check calls: clusters that are counted and not used are given up.
pub const QCOW2_CHECK_FIX_LEAKS: u32 = 1 << 0;
/// Flag of the check calls: everything is put right that can be without a guess, leaks included.
pub const QCOW2_CHECK_FIX_ALL: u32 = 1 << 1;

/// Kind of a finding: clusters counted more often than they are referred to. Space is lost, nothing else.
pub const QCOW2_FINDING_LEAK: u32 = 1;
/// Kind of a finding: clusters referred to more often than they are counted; they could be handed out while in use.
pub const QCOW2_FINDING_COUNT_TOO_LOW: u32 = 2;
/// Kind of a finding: more references than a count of this width can tell.
pub const QCOW2_FINDING_COUNT_OVERFLOW: u32 = 3;
/// Kind of a finding: a COPIED flag that does not say whether the count is one.
pub const QCOW2_FINDING_COPIED_FLAG: u32 = 4;
/// Kind of a finding: a reference past the end of the file.
pub const QCOW2_FINDING_OUTSIDE_FILE: u32 = 5;
/// Kind of a finding: a reference that is not a multiple of the cluster size.
pub const QCOW2_FINDING_UNALIGNED: u32 = 6;
/// Kind of a finding: bits that are reserved are set.
pub const QCOW2_FINDING_RESERVED_BITS: u32 = 7;
/// Kind of a finding: flags or bitmap of an L2 entry contradict each other.
pub const QCOW2_FINDING_MALFORMED_ENTRY: u32 = 8;
/// Kind of a finding: a refcount block that cannot be used.
pub const QCOW2_FINDING_REFCOUNT_BLOCK: u32 = 9;
/// Kind of a finding: the refcount table cannot be used.
pub const QCOW2_FINDING_REFCOUNT_TABLE: u32 = 10;
/// Kind of a finding: a cluster that holds metadata and something else.
pub const QCOW2_FINDING_OVERLAP: u32 = 11;
/// Kind of a finding: an entry of the snapshot table.
pub const QCOW2_FINDING_SNAPSHOT_TABLE: u32 = 12;
/// Kind of a finding: a bitmap table.
pub const QCOW2_FINDING_BITMAPS: u32 = 13;
/// Kind of a finding: something that could not be read, and was not checked.
pub const QCOW2_FINDING_UNREADABLE: u32 = 14;

/// A guest offset that is none: the finding has to do with no guest offset.
pub const QCOW2_NO_OFFSET: u64 = u64::MAX;

/// One thing that is wrong, as told to the function of qcow2_opts_set_finding(). The library makes this struct; it may
/// grow at its end.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2_finding {
    /// Offset in the image file: of the entry that is wrong, or of the cluster whose count is.
    pub host_offset: u64,
    /// Guest offset that goes with it, or QCOW2_NO_OFFSET.
    pub guest_offset: u64,
    /// What is stored there: an entry, a count.
    pub value: u64,
    /// Of counts: how many references there are; else 0.
    pub references: u64,
    /// Of counts: for how many clusters in a row this is true; else how often the structure is referred to.
    pub clusters: u64,
    /// A QCOW2_FINDING_ number; there may be more of them in later versions.
    pub kind: u32,
    /// Zero.
    pub reserved: u32,
    /// All of that in words; valid during the call.
    pub text: *const c_char,
}

/// Told of each finding of a check.
///
/// user:    the pointer given with the function
/// finding: what is wrong; valid during the call. A later version of the library may append members
pub type qcow2_finding_fn = Option<unsafe extern "C" fn(user: *mut c_void, finding: *const qcow2_finding)>;

fn kind_number(kind: FindingKind) -> u32 {
    match kind {
        FindingKind::Leak => QCOW2_FINDING_LEAK,
        FindingKind::CountTooLow => QCOW2_FINDING_COUNT_TOO_LOW,
        FindingKind::CountOverflow => QCOW2_FINDING_COUNT_OVERFLOW,
        FindingKind::CopiedFlag => QCOW2_FINDING_COPIED_FLAG,
        FindingKind::OutsideFile => QCOW2_FINDING_OUTSIDE_FILE,
        FindingKind::Unaligned => QCOW2_FINDING_UNALIGNED,
        FindingKind::ReservedBits => QCOW2_FINDING_RESERVED_BITS,
        FindingKind::MalformedEntry => QCOW2_FINDING_MALFORMED_ENTRY,
        FindingKind::RefcountBlock => QCOW2_FINDING_REFCOUNT_BLOCK,
        FindingKind::RefcountTable => QCOW2_FINDING_REFCOUNT_TABLE,
        FindingKind::Overlap => QCOW2_FINDING_OVERLAP,
        FindingKind::SnapshotTable => QCOW2_FINDING_SNAPSHOT_TABLE,
        FindingKind::Bitmaps => QCOW2_FINDING_BITMAPS,
        FindingKind::Unreadable => QCOW2_FINDING_UNREADABLE,
    }
}

impl qcow2_finding {
    fn new(finding: &Finding, text: &CString) -> Self {
        Self {
            host_offset: finding.host_offset,
            guest_offset: finding.guest_offset.unwrap_or(QCOW2_NO_OFFSET),
            value: finding.value,
            references: finding.references,
            clusters: finding.clusters,
            kind: kind_number(finding.kind),
            reserved: 0,
            text: text.as_ptr(),
        }
    }
}

/// What a check found. After a repair: what is left, and how much was put right.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2_check_result {
    /// Things that are wrong and can lose data.
    pub corruptions: u64,
    /// Clusters that are counted more often than they are used: space is lost.
    pub leaks: u64,
    /// Structures that could not be checked. With any of them, a repair changes nothing.
    pub check_errors: u64,
    /// Corruptions that were put right.
    pub corruptions_fixed: u64,
    /// Leaks that were put right.
    pub leaks_fixed: u64,
    /// Clusters of the guest disk.
    pub total_clusters: u64,
    /// Those that are allocated.
    pub allocated_clusters: u64,
    /// Allocated ones that do not follow the one before in the file; all compressed ones.
    pub fragmented_clusters: u64,
    /// Compressed ones.
    pub compressed_clusters: u64,
    /// End of the last cluster that is used or counted, in bytes.
    pub image_end_offset: u64,
}

// SAFETY: repr(C), ten integers of 8 bytes.
unsafe impl AbiStruct for qcow2_check_result {
    const FIRST_SIZE: usize = 80;
}

impl qcow2_check_result {
    fn new(result: &CheckResult) -> Self {
        Self {
            corruptions: result.corruptions,
            leaks: result.leaks,
            check_errors: result.check_errors,
            corruptions_fixed: result.corruptions_fixed,
            leaks_fixed: result.leaks_fixed,
            total_clusters: result.total_clusters,
            allocated_clusters: result.allocated_clusters,
            fragmented_clusters: result.fragmented_clusters,
            compressed_clusters: result.compressed_clusters,
            image_end_offset: result.image_end_offset,
        }
    }
}

/// The repair that flags ask for.
fn repair_of(flags: u32) -> Result<Repair> {
    check_flags(flags, QCOW2_CHECK_FIX_LEAKS | QCOW2_CHECK_FIX_ALL)?;
    Ok(match flags {
        0 => Repair::Nothing,
        QCOW2_CHECK_FIX_LEAKS => Repair::Leaks,
        _ => Repair::All,
    })
}

/// Has `run` check something, with the caller's options, and tells the caller.
///
/// # Safety
/// `opts` is NULL or options that nobody changes during the call; `out` is NULL or valid for writes of `out_size` bytes.
unsafe fn check(
    run: impl FnOnce(&OpenOptions, &mut CheckOptions<'_>) -> Result<CheckResult>,
    opts: *const qcow2_opts,
    flags: u32,
    out: *mut qcow2_check_result,
    out_size: usize,
) -> Result<()> {
    let repair = repair_of(flags)?;
    // SAFETY: the caller's promise.
    unsafe { structs::fill("out", out, out_size, &qcow2_check_result::new(&CheckResult::default())) }?;
    // SAFETY: the caller's promise.
    let opts = unsafe { opts.as_ref() };
    opts.map_or(Ok(()), |opts| opts.refuse_unused(Call::Check))?;
    let mut on_finding = |finding: &Finding| {
        let text = CString::new(finding.to_string()).unwrap_or_default();
        if let Some(opts) = opts {
            opts.tell_finding(&qcow2_finding::new(finding, &text));
        }
    };
    let mut on_progress = |done, total| opts.is_none_or(|opts| opts.tell(done, total));
    let defaults = OpenOptions::default();
    let open = opts.map_or(&defaults, |opts| &opts.open);
    let mut options = CheckOptions { repair, memory_bytes: open.check_memory, ..CheckOptions::default() };
    if opts.is_some_and(qcow2_opts::wants_findings) {
        options.on_finding = Some(&mut on_finding);
    }
    options.on_progress = Some(&mut on_progress);
    let result = run(open, &mut options)?;
    // SAFETY: the caller's promise.
    unsafe { structs::fill("out", out, out_size, &qcow2_check_result::new(&result)) }
}

/// As [`check`], of what `storage` gives.
///
/// # Safety
/// As of [`check`].
unsafe fn check_storage(
    storage: impl FnOnce(Repair) -> Result<(Arc<dyn Storage>, String)>,
    opts: *const qcow2_opts,
    flags: u32,
    out: *mut qcow2_check_result,
    out_size: usize,
) -> c_int {
    let run = |open: &OpenOptions, options: &mut CheckOptions<'_>| {
        let (storage, name) = storage(options.repair)?;
        block_on(check_with(&Blocking, storage, &name, open, options))
    };
    // SAFETY: the caller's promise.
    call(|| unsafe { check(run, opts, flags, out, out_size) })
}

/// Lets the caller see what a check finds, one thing at a time and in no particular order. A repair tells what its first
/// look has found; what it leaves is in the result.
///
/// opts:    the options
/// finding: the function; NULL takes an earlier one away. Called during the check only, in its thread; it must not call
///          into the image
/// user:    passed to it
/// destroy: called once with user when the options are freed or get another function; NULL if there is nothing to do.
///          Called too when this call fails
///
/// Returns 0 or -EINVAL. One thread at a time. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_opts_set_finding(
    opts: *mut qcow2_opts,
    finding: qcow2_finding_fn,
    user: *mut c_void,
    destroy: qcow2_destroy_fn,
) -> c_int {
    call(|| {
        let data = UserData { user, destroy };
        // SAFETY: NULL or an option object that only this thread uses, by the manual above.
        let opts = unsafe { opts.as_mut() }.ok_or_else(|| null("opts"))?;
        opts.set_finding(finding, data);
        Ok(())
    })
}

/// Checks the image in a file, and repairs it if that is asked for.
///
/// path:     the file
/// opts:     as told at the head of this section, or NULL for the defaults
/// flags:    0 to look only; QCOW2_CHECK_FIX_LEAKS, QCOW2_CHECK_FIX_ALL
/// out:      what was found, and what was put right
/// out_size: sizeof(struct qcow2_check_result)
///
/// An image is sound if corruptions and check_errors are 0; what the call returns only tells whether it could be
/// checked. Memory is bounded by option "check_memory", whatever the file says: where it is short, the tables are read
/// several times. With flags, the image is written to, in an order in which neither a power cut nor the progress
/// function can make it worse; a repair that was ended is finished by the next one. What can only be guessed stays as
/// it is and is still counted. When nothing is wrong any more, the dirty and the corrupt bit are cleared.
/// Returns 0 or a negative errno: that of open(2) and of the reads and writes; -EINVAL not a qcow2 image, or a header
/// that leads nowhere; -ENOTSUP incompatible features that nobody knows; -EBUSY somebody else uses the image;
/// -ECANCELED the progress function ended the call; -EFBIG new refcount structures would not fit.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_check(
    path: *const c_char,
    opts: *const qcow2_opts,
    flags: u32,
    out: *mut qcow2_check_result,
    out_size: usize,
) -> c_int {
    let open = |repair| {
        // SAFETY: NULL or a C string by the manual above.
        let path = unsafe { self::path("path", path) }?;
        let storage: Arc<dyn Storage> = Arc::new(open_file(path, repair != Repair::Nothing)?);
        Ok((storage, path.display().to_string()))
    };
    // SAFETY: pointers as in the manual above.
    unsafe { check_storage(open, opts, flags, out, out_size) }
}

/// As qcow2_check(), for a file that the caller has opened: for reading, and for writing if it is to be repaired.
///
/// fd:       the descriptor; it stays the caller's
/// opts, flags, out, out_size: as in qcow2_check()
///
/// Returns 0 or a negative errno, as qcow2_check(). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_check_fd(
    fd: c_int,
    opts: *const qcow2_opts,
    flags: u32,
    out: *mut qcow2_check_result,
    out_size: usize,
) -> c_int {
    let open = |_| {
        let own: OwnedFd = duplicate(fd)?;
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::from(own));
        Ok((storage, String::new()))
    };
    // SAFETY: pointers as in the manual above.
    unsafe { check_storage(open, opts, flags, out, out_size) }
}

/// As qcow2_check(), for a storage of the caller, which must be able to write and flush if the image is to be repaired.
///
/// storage:  where the image is; it stays the caller's
/// opts, flags, out, out_size: as in qcow2_check()
///
/// Returns 0 or a negative errno, as qcow2_check(), or what a callback of the storage returned. Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_check_storage(
    storage: *mut qcow2_storage,
    opts: *const qcow2_opts,
    flags: u32,
    out: *mut qcow2_check_result,
    out_size: usize,
) -> c_int {
    let open = |_| {
        // SAFETY: NULL or a live storage by the manual above.
        let storage = unsafe { storage.as_ref() }.ok_or_else(|| null("storage"))?;
        Ok((Arc::clone(&storage.inner), String::new()))
    };
    // SAFETY: pointers as in the manual above.
    unsafe { check_storage(open, opts, flags, out, out_size) }
}

/// As qcow2_check(), for an image that is open, by whatever way. Nothing is repaired: for that, the image is closed first.
///
/// image: the handle; not that of a snapshot from qcow2_snapshot_open()
/// flags: 0
/// opts, out, out_size: as in qcow2_check(); option "locking" does not count
///
/// What has been written through the handle is made durable first, as by qcow2_flush(). Requests of other threads and of
/// queues wait until the check is done; the finding and progress functions must not call into the image.
/// Returns 0 or a negative errno, as qcow2_check(); -EINVAL flags, or the handle of a snapshot; -EIO the handle writes
/// no more, because corruption was found or a flush has failed: close it, and check the file.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_check_image(
    image: *mut qcow2_image,
    opts: *const qcow2_opts,
    flags: u32,
    out: *mut qcow2_check_result,
    out_size: usize,
) -> c_int {
    let check = |image: &qcow2_image| {
        let run = |_: &OpenOptions, options: &mut CheckOptions<'_>| image.image.check(options);
        // SAFETY: pointers as in the manual above.
        unsafe { check(run, opts, flags, out, out_size) }
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, check) }
}
