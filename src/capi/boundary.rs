//! The panic boundary: every C call runs its body through one of these.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use libc::c_int;

use super::error::record;
use super::image::qcow2_image;
use crate::error::{Error, Result};

/// Runs the body of a call without a handle. A panic or an error becomes a negative errno, its text is kept for
/// `qcow2_last_error`.
#[inline]
pub(super) fn call(body: impl FnOnce() -> Result<()>) -> c_int {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => record(&error),
        Err(panic) => record(&panicked(panic)),
    }
}

/// Runs the body of a call on an image. A panic also poisons the handle, so that nothing built on half-changed state
/// reaches the file.
///
/// # Safety
/// `image` is NULL or came from `qcow2_open*` and was not closed.
#[inline]
pub(super) unsafe fn call_on(image: *const qcow2_image, body: impl FnOnce(&qcow2_image) -> Result<()>) -> c_int {
    // SAFETY: the caller's promise; shared access only, everything in an image is safe to use from many threads.
    let Some(image) = (unsafe { image.as_ref() }) else {
        return record(&null("image"));
    };
    match catch_unwind(AssertUnwindSafe(|| body(image))) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => record(&error),
        Err(panic) => after_panic(image, panic),
    }
}

#[cold]
fn after_panic(image: &qcow2_image, panic: Box<dyn Any + Send>) -> c_int {
    image.image.poison("a bug made an earlier call panic");
    record(&panicked(panic))
}

/// The error for a panic; its message is the caller's only hint.
#[cold]
fn panicked(panic: Box<dyn Any + Send>) -> Error {
    let message = match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().map_or_else(|| "panic".to_owned(), |text| (*text).to_owned()),
    };
    Error::Panic { message }
}

/// The error for a pointer that must not be NULL.
#[cold]
pub(super) fn null(name: &'static str) -> Error {
    Error::Argument { name, why: "is NULL" }
}
