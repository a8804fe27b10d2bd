//! Snapshots
//!
//! Internal snapshots: earlier states of the disk in the same file. Creating, applying and deleting one holds the image
//! alone: reads and writes of other threads that are under way end first, new ones wait until the call returns. That
//! takes as long as reading all L2 tables of the image (128 MiB for each TiB of disk in use, with the defaults) and
//! writing those that change. A crash at any moment leaves the image as it was before the call or as it is after it.
//! Snapshots go by their id or, if none has that id, by their name, of which the first in the list counts.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use libc::{c_char, c_int};

use super::arguments::{flags as check_flags, out, text};
use super::boundary::{call, call_on, null};
use super::image::qcow2_image;
use super::opts::qcow2_progress_fn;
use super::structs::{self, AbiStruct};
use crate::error::{Error, Result};
use crate::format::Snapshot;
use crate::image::SnapshotFacts;

/// A list of snapshots, as they were when it was made.
pub struct qcow2_snapshots {
    list: Vec<Listed>,
}

struct Listed {
    id: CString,
    name: CString,
    snapshot: Snapshot,
}

/// One snapshot of a list. Members may be appended in later versions.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2_snapshot_info {
    /// Its id, unique in the image; valid as long as the list.
    pub id: *const c_char,
    /// Its name, not necessarily unique nor UTF-8; valid as long as the list.
    pub name: *const c_char,
    /// Size of the disk in the snapshot in bytes; UINT64_MAX where it is not recorded, and so the size now.
    pub size_bytes: u64,
    /// Size of the VM state that is kept with it in bytes; 0 for none.
    pub vm_state_bytes: u64,
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instruction count of record and replay; UINT64_MAX for none.
    pub icount: u64,
    /// When it was taken, in seconds since the Epoch.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
}

// SAFETY: repr(C), pointers and integers without padding; NULL pointers are valid.
unsafe impl AbiStruct for qcow2_snapshot_info {
    const FIRST_SIZE: usize = 2 * size_of::<*const c_char>() + 40;
}

/// What is recorded with a new snapshot.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2_snapshot_facts {
    /// sizeof(struct qcow2_snapshot_facts).
    pub struct_size: usize,
    /// How long the guest has been running, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// When it was taken, in seconds since the Epoch; 0 together with date_nsec 0 means now.
    pub date_sec: u32,
    /// And nanoseconds, below 1000000000.
    pub date_nsec: u32,
}

// SAFETY: repr(C), integers.
unsafe impl AbiStruct for qcow2_snapshot_facts {
    const FIRST_SIZE: usize = size_of::<usize>() + 16;
}

/// Up to the first NUL, where a file has one in a name.
fn c_string(bytes: &[u8]) -> CString {
    CString::new(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).unwrap_or_default()
}

/// Lists the snapshots of an image, in the order in which they were taken.
///
/// image: the handle; one opened with "inspect" will do
/// list:  where the list goes; set to NULL on an error. The caller frees it with qcow2_snapshots_free()
///
/// Returns 0 or a negative errno; -EINVAL with QCOW2_ERR_BAD_HEADER means that the snapshot table is malformed, the text
/// says where. Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_list(image: *mut qcow2_image, list: *mut *mut qcow2_snapshots) -> c_int {
    let body = |image: &qcow2_image| {
        // SAFETY: NULL or valid for a write by the manual above.
        let list = unsafe { out("list", list, std::ptr::null_mut()) }?;
        let listed =
            |snapshot: Snapshot| Listed { id: c_string(&snapshot.id), name: c_string(&snapshot.name), snapshot };
        let all = image.image.snapshots()?.into_iter().map(listed).collect();
        *list = Box::into_raw(Box::new(qcow2_snapshots { list: all }));
        Ok(())
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// How many snapshots are in a list.
///
/// list: the list; NULL has none
///
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshots_count(list: *const qcow2_snapshots) -> usize {
    // SAFETY: NULL or a list by the manual above.
    unsafe { list.as_ref() }.map_or(0, |list| list.list.len())
}

/// Gets one snapshot of a list.
///
/// list:      the list
/// index:     which, from 0
/// info:      filled in; its texts belong to the list
/// info_size: sizeof(struct qcow2_snapshot_info)
///
/// Returns 0 or -EINVAL. Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshots_get(
    list: *const qcow2_snapshots,
    index: usize,
    info: *mut qcow2_snapshot_info,
    info_size: usize,
) -> c_int {
    call(|| {
        // SAFETY: NULL or a list by the manual above.
        let list = unsafe { list.as_ref() }.ok_or_else(|| null("list"))?;
        let Listed { id, name, snapshot } = list.list.get(index).ok_or_else(|| Error::ArgumentValue {
            name: "index",
            value: index.to_string(),
            expected: "the index of a snapshot in the list",
        })?;
        let value = qcow2_snapshot_info {
            id: id.as_ptr(),
            name: name.as_ptr(),
            size_bytes: snapshot.disk_bytes().unwrap_or(u64::MAX),
            vm_state_bytes: snapshot.vm_state_bytes(),
            vm_clock_nsec: snapshot.vm_clock_nsec,
            icount: snapshot.icount().unwrap_or(u64::MAX),
            date_sec: snapshot.date_sec,
            date_nsec: snapshot.date_nsec,
        };
        // SAFETY: NULL or info_size bytes by the manual above.
        unsafe { structs::fill("info", info, info_size, &value) }
    })
}

/// Frees a list.
///
/// list: not to be used any more, nor the texts in it; NULL is a no-op
///
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshots_free(list: *mut qcow2_snapshots) {
    if !list.is_null() {
        // SAFETY: came from Box::into_raw above, and the caller uses it no more.
        drop(unsafe { Box::from_raw(list) });
    }
}

/// Takes a snapshot of the disk as it is. Everything that was written before is durable then.
///
/// image: the handle, open for writing
/// name:  its name, 1 to 255 bytes of UTF-8. Another snapshot may have the same one. The id is one more than the largest
/// facts: what to record with it; NULL: taken now
/// flags: 0
///
/// The header of this section says what other threads wait for.
/// Returns 0 or a negative errno: -EFBIG (QCOW2_ERR_TOO_LARGE) a host cluster has as many references as its refcount can
/// hold (with refcount_bits=1 any cluster), or there are 65536 snapshots; -ENOTSUP the image has an external data file;
/// -EROFS, -EIO and what the storage returns. After an error there is no new snapshot.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_create(
    image: *mut qcow2_image,
    name: *const c_char,
    facts: *const qcow2_snapshot_facts,
    flags: u32,
) -> c_int {
    let body = |image: &qcow2_image| {
        check_flags(flags, 0)?;
        // SAFETY: NULL or a C string by the manual above.
        let name = unsafe { text("name", name) }?;
        let mut known = SnapshotFacts::default();
        if !facts.is_null() {
            // SAFETY: a struct as long as its first member says, by the manual above.
            known = facts_of(&unsafe { structs::read("facts", facts) }?)?;
        }
        image.image.snapshot_create(name, &known).map(|_| ())
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

fn facts_of(given: &qcow2_snapshot_facts) -> Result<SnapshotFacts> {
    if given.date_nsec >= 1_000_000_000 {
        return Err(Error::ArgumentValue {
            name: "facts.date_nsec",
            value: given.date_nsec.to_string(),
            expected: "less than 1000000000",
        });
    }
    let date = (given.date_sec, given.date_nsec);
    Ok(SnapshotFacts { date: (date != (0, 0)).then_some(date), vm_clock_nsec: given.vm_clock_nsec })
}

/// Makes the disk what it was when a snapshot was taken, its size included: both at once, and durably. What the disk
/// held before is gone, unless another snapshot has it; the snapshot stays.
///
/// image:      the handle, open for writing
/// id_or_name: the snapshot
/// flags:      0
///
/// The caller sees to it that nobody believes in what was read before. What reads differently becomes dirty in enabled
/// bitmaps. VM state that is kept with the snapshot stays
/// where it is, past the end of the disk.
/// Returns 0 or a negative errno: -ENOENT (QCOW2_ERR_SNAPSHOT) there is no such snapshot; -EFBIG as for creating one;
/// -ENOTSUP the image has an external data file; -EINVAL
/// (QCOW2_ERR_BAD_HEADER) its entry in the snapshot table is malformed; -EROFS, -EIO and what the storage returns. After
/// an error the disk is what it was.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_apply(image: *mut qcow2_image, id_or_name: *const c_char, flags: u32) -> c_int {
    let body = |image: &qcow2_image| {
        check_flags(flags, 0)?;
        // SAFETY: NULL or a C string by the manual above.
        image.image.snapshot_apply(unsafe { text("id_or_name", id_or_name) }?)
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// Deletes a snapshot, and frees what nothing else refers to.
///
/// image:      the handle, open for writing
/// id_or_name: the snapshot
/// flags:      0
/// progress:   told how far it has come, in the calling thread; NULL for nobody. In the first part of the work the
///             snapshot is only verified: as long as that lasts, a non-zero result ends the call with -ECANCELED, and
///             nothing has been changed. Later results count for nothing. It must not call into the image
/// user:       passed to it
///
/// Returns 0 or a negative errno: -ENOENT (QCOW2_ERR_SNAPSHOT) there is no such snapshot; -EBUSY (QCOW2_ERR_SNAPSHOT) it
/// is open, see qcow2_snapshot_open(); -ECANCELED; -EINVAL (QCOW2_ERR_BAD_HEADER) or -EIO (QCOW2_ERR_CORRUPT) something
/// is wrong with the snapshot; -ENOTSUP, -EROFS and what the storage returns. After an error the snapshot is still there.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_delete(
    image: *mut qcow2_image,
    id_or_name: *const c_char,
    flags: u32,
    progress: qcow2_progress_fn,
    user: *mut c_void,
) -> c_int {
    let body = |image: &qcow2_image| {
        check_flags(flags, 0)?;
        // SAFETY: NULL or a C string by the manual above.
        let id_or_name = unsafe { text("id_or_name", id_or_name) }?;
        let tell = |done, total| {
            // SAFETY: the caller's function with its own pointer, in the calling thread.
            progress.is_none_or(|progress| unsafe { progress(user, done, total) } == 0)
        };
        image.image.snapshot_delete(id_or_name, Some(&tell))
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// Opens a snapshot of an open image as a handle of its own, which takes no writes: reads, qcow2_map() and the facts are
/// those of the disk as the snapshot has it. (Without an open image: option "snapshot" of qcow2_open().)
///
/// image:      the handle; reads and writes on it go on
/// id_or_name: the snapshot
/// flags:      0
/// snapshot:   where the new handle goes; set to NULL on an error. The caller closes it with qcow2_close()
///
/// Until it is closed the snapshot cannot be deleted, and the file stays locked as it was for the first handle, which
/// may be closed before. Its L2 cache is one more of the same size.
/// Returns 0 or a negative errno: -ENOENT (QCOW2_ERR_SNAPSHOT) there is no such snapshot; -EINVAL (QCOW2_ERR_BAD_HEADER)
/// its entry in the snapshot table is malformed; -EROFS an image opened with "inspect".
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_open(
    image: *mut qcow2_image,
    id_or_name: *const c_char,
    flags: u32,
    snapshot: *mut *mut qcow2_image,
) -> c_int {
    let body = |image: &qcow2_image| {
        // SAFETY: NULL or valid for a write by the manual above.
        let snapshot = unsafe { out("snapshot", snapshot, std::ptr::null_mut()) }?;
        check_flags(flags, 0)?;
        // SAFETY: NULL or a C string by the manual above.
        let opened = image.image.snapshot_open(unsafe { text("id_or_name", id_or_name) }?)?;
        *snapshot = Box::into_raw(Box::new(qcow2_image { image: Arc::new(opened) }));
        Ok(())
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}
