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

#[cfg(test)]
mod tests {
    use std::ffi::CStr;
    use std::sync::Arc;

    use super::*;
    use crate::capi::error::{QCOW2_ERR_PANIC, QCOW2_ERR_POISONED, qcow2_last_error, qcow2_last_error_code};
    use crate::capi::io::{qcow2_pread, qcow2_pwrite};
    use crate::image::{CreateOptions, Image, OpenOptions, create_with};
    use crate::storage::Blocking;
    use crate::storage::memory::MemoryStorage;
    use crate::wait::block_on;

    fn last_error() -> String {
        // SAFETY: a C string that stays valid until the next failing call of this thread.
        unsafe { CStr::from_ptr(qcow2_last_error()) }.to_string_lossy().into_owned()
    }

    #[test]
    fn a_panic_is_an_error_and_poisons_the_handle() {
        let storage = Arc::new(MemoryStorage::default());
        block_on(create_with(&Blocking, &*storage, 1 << 20, &CreateOptions::default())).unwrap();
        let mut image =
            qcow2_image { image: Arc::new(Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap()) };
        let (handle, mut byte) = (&raw mut image, 7u8);
        let buf = (&raw mut byte).cast::<libc::c_void>();
        // SAFETY: an open image, and a buffer of one byte.
        assert_eq!(unsafe { qcow2_pwrite(handle, buf, 1, 0, 0) }, 0);
        // SAFETY: an open image.
        assert_eq!(unsafe { call_on(handle, |_| panic!("the {} fell over", "planner")) }, -libc::EIO);
        assert_eq!(qcow2_last_error_code(), QCOW2_ERR_PANIC);
        assert!(last_error().contains("the planner fell over"), "{}", last_error());

        let before = storage.snapshot();
        // SAFETY: an open image, and a buffer of one byte.
        assert_eq!(unsafe { qcow2_pwrite(handle, buf, 1, 1 << 19, 0) }, -libc::EIO);
        assert_eq!(qcow2_last_error_code(), QCOW2_ERR_POISONED);
        // SAFETY: an open image, and a buffer of one byte.
        assert_eq!(unsafe { qcow2_pread(handle, buf, 1, 0, 0) }, 0, "reads go on");
        assert!(image.image.close().is_err());
        assert_eq!(storage.snapshot(), before, "nothing is written any more, by close neither");
    }

    #[test]
    fn a_panic_without_a_handle_is_an_error() {
        assert_eq!(call(|| panic!("plain")), -libc::EIO);
        assert_eq!(last_error(), "internal error (this is a bug in libqcow2): plain");
        assert_eq!(call(|| std::panic::panic_any(5)), -libc::EIO, "a payload that is no text");
    }

    #[test]
    fn a_nul_does_not_cut_an_error_text() {
        assert_eq!(call(|| Err(Error::UnknownOption { key: "a\0b".to_owned() })), -libc::EINVAL);
        assert_eq!(last_error(), "unknown option 'a\u{fffd}b'");
    }
}
