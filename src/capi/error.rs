//! Errors
//!
//! Calls return 0 or a negative errno. Why a call failed is kept for the calling thread until its next failing call:
//! a stable code to decide by, and a text for a person.

use std::cell::RefCell;
use std::ffi::CString;

use libc::{c_char, c_int};

use crate::error::{Error, ErrorCode};

/// No call of this thread failed yet.
pub const QCOW2_ERR_NONE: i32 = 0;
/// The storage (file, device, callback) reported an error; the returned errno is the storage's.
pub const QCOW2_ERR_IO: i32 = 1;
/// The image is corrupt, and the text names the place; or it is marked corrupt and takes no writes.
pub const QCOW2_ERR_CORRUPT: i32 = 2;
/// A field of the header or of a header extension is malformed.
pub const QCOW2_ERR_BAD_HEADER: i32 = 3;
/// The file is not a qcow2 image.
pub const QCOW2_ERR_NOT_QCOW2: i32 = 4;
/// The image needs a feature that this library (or this build of it) does not have; the text names it.
pub const QCOW2_ERR_UNSUPPORTED: i32 = 5;
/// The image refers to another file (a backing file, an external data file), and option "backing", a resolver or a storage
/// did not allow that.
pub const QCOW2_ERR_BACKING_DENIED: i32 = 6;
/// A backing file has no declared format, or one that is neither qcow2 nor raw.
pub const QCOW2_ERR_BACKING_FORMAT: i32 = 7;
/// The backing chain has a loop, or is deeper than option "backing_depth_max", or an external data file is a file of it.
pub const QCOW2_ERR_CHAIN: i32 = 8;
/// The image has the dirty bit: it can be read, and needs a repair before it is written.
pub const QCOW2_ERR_NEEDS_REPAIR: i32 = 9;
/// A write to an image that was opened with "read_only", or any data call with "inspect".
pub const QCOW2_ERR_READ_ONLY: i32 = 10;
/// An earlier failure left the state of the file unknown: this handle writes nothing more, and acknowledges no change.
pub const QCOW2_ERR_POISONED: i32 = 11;
/// The request reaches past the end of the image.
pub const QCOW2_ERR_OUT_OF_RANGE: i32 = 12;
/// An argument of the call is wrong: a NULL pointer, unknown flags, a struct size, a path.
pub const QCOW2_ERR_ARGUMENT: i32 = 13;
/// No option of that name, or it cannot have that value, or not in this call.
pub const QCOW2_ERR_OPTION: i32 = 14;
/// The image would grow past what the format or the library can address.
pub const QCOW2_ERR_TOO_LARGE: i32 = 15;
/// The file exists, and QCOW2_OVERWRITE was not given.
pub const QCOW2_ERR_EXISTS: i32 = 16;
/// A bug in the library; the handle is poisoned, close it. Please report the text.
pub const QCOW2_ERR_PANIC: i32 = 17;
/// Somebody else uses the image, or a file under it, in a way that excludes this.
pub const QCOW2_ERR_LOCKED: i32 = 18;
/// A secret is missing or wrong.
pub const QCOW2_ERR_BAD_SECRET: i32 = 19;
/// The progress callback ended the call.
pub const QCOW2_ERR_CANCELLED: i32 = 20;
/// There is no such bitmap, or one too many, or it cannot be relied on.
pub const QCOW2_ERR_BITMAP: i32 = 24;
/// There is no such snapshot (-ENOENT), or it is open as a handle of its own (-EBUSY).
pub const QCOW2_ERR_SNAPSHOT: i32 = 23;

/// A queue is full, or has no such request to cancel.
pub const QCOW2_ERR_QUEUE: i32 = 30;

/// The numbers of the header are those of the crate.
const _: () = {
    assert!(QCOW2_ERR_NONE == ErrorCode::None as i32);
    assert!(QCOW2_ERR_IO == ErrorCode::Io as i32);
    assert!(QCOW2_ERR_CORRUPT == ErrorCode::Corrupt as i32);
    assert!(QCOW2_ERR_BAD_HEADER == ErrorCode::BadHeader as i32);
    assert!(QCOW2_ERR_NOT_QCOW2 == ErrorCode::NotQcow2 as i32);
    assert!(QCOW2_ERR_UNSUPPORTED == ErrorCode::Unsupported as i32);
    assert!(QCOW2_ERR_BACKING_DENIED == ErrorCode::BackingDenied as i32);
    assert!(QCOW2_ERR_BACKING_FORMAT == ErrorCode::BackingFormat as i32);
    assert!(QCOW2_ERR_CHAIN == ErrorCode::Chain as i32);
    assert!(QCOW2_ERR_NEEDS_REPAIR == ErrorCode::NeedsRepair as i32);
    assert!(QCOW2_ERR_READ_ONLY == ErrorCode::ReadOnly as i32);
    assert!(QCOW2_ERR_POISONED == ErrorCode::Poisoned as i32);
    assert!(QCOW2_ERR_OUT_OF_RANGE == ErrorCode::OutOfRange as i32);
    assert!(QCOW2_ERR_ARGUMENT == ErrorCode::Argument as i32);
    assert!(QCOW2_ERR_OPTION == ErrorCode::Option as i32);
    assert!(QCOW2_ERR_SNAPSHOT == ErrorCode::Snapshot as i32);
    assert!(QCOW2_ERR_TOO_LARGE == ErrorCode::TooLarge as i32);
    assert!(QCOW2_ERR_EXISTS == ErrorCode::Exists as i32);
    assert!(QCOW2_ERR_PANIC == ErrorCode::Panic as i32);
    assert!(QCOW2_ERR_LOCKED == ErrorCode::Locked as i32);
    assert!(QCOW2_ERR_BAD_SECRET == ErrorCode::BadSecret as i32);
    assert!(QCOW2_ERR_QUEUE == ErrorCode::Queue as i32);
    assert!(QCOW2_ERR_CANCELLED == ErrorCode::Cancelled as i32);
    assert!(QCOW2_ERR_BITMAP == ErrorCode::Bitmap as i32);
};

struct LastError {
    code: i32,
    text: CString,
}

thread_local! {
    static LAST: RefCell<LastError> = RefCell::new(LastError { code: QCOW2_ERR_NONE, text: CString::default() });
}

/// Keeps an error for `qcow2_last_error` and gives the number that the call returns.
#[cold]
pub(super) fn record(error: &Error) -> c_int {
    // A NUL can only come out of a caller's or an image's string; the text must not end there.
    let text = CString::new(error.to_string().replace('\0', "\u{fffd}")).unwrap_or_default();
    // A thread that is being torn down has no place left for its text; the number is still returned.
    let _ = LAST.try_with(|last| *last.borrow_mut() = LastError { code: error.code() as i32, text });
    -error.errno()
}

/// Why the last failing call of this thread failed, in words: it names the offending value and what to do about it.
///
/// Returns a string of the library, valid until the next failing call of the same thread; "" if none failed yet.
/// Never NULL, not to be freed. A call that succeeds leaves it as it is.
/// Thread-safe: each thread has its own. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn qcow2_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().text.as_ptr()).unwrap_or(c"".as_ptr())
}

/// Why the last failing call of this thread failed, as a QCOW2_ERR_ number. Numbers are never reused; a program must
/// expect ones that it does not know.
///
/// Thread-safe: each thread has its own. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn qcow2_last_error_code() -> c_int {
    LAST.try_with(|last| last.borrow().code).unwrap_or(QCOW2_ERR_NONE)
}
