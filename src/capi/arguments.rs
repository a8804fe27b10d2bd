//! Pointers and numbers of a C caller, checked and turned into values.

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libc::c_char;

use super::boundary::null;
use crate::error::{Error, Result};

/// A C string that must be UTF-8: option keys and values, names stored in an image.
///
/// # Safety
/// `text` is NULL or a NUL-terminated string that stays valid and unchanged for `'a`.
pub(super) unsafe fn text<'a>(name: &'static str, text: *const c_char) -> Result<&'a str> {
    if text.is_null() {
        return Err(null(name));
    }
    // SAFETY: not NULL; NUL-terminated and valid by the caller's promise.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| Error::ArgumentValue {
        name,
        value: text.to_string_lossy().into_owned(),
        expected: "a string in UTF-8",
    })
}

/// A path: any bytes but none at all.
///
/// # Safety
/// As [`text`].
pub(super) unsafe fn path<'a>(name: &'static str, path: *const c_char) -> Result<&'a Path> {
    if path.is_null() {
        return Err(null(name));
    }
    // SAFETY: not NULL; NUL-terminated and valid by the caller's promise.
    let bytes = unsafe { CStr::from_ptr(path) }.to_bytes();
    if bytes.is_empty() {
        return Err(Error::Argument { name, why: "is an empty string" });
    }
    Ok(Path::new(OsStr::from_bytes(bytes)))
}

/// Refuses every flag that the call does not know.
#[inline]
pub(super) fn flags(given: u32, known: u32) -> Result<()> {
    if given & !known != 0 {
        return Err(unknown_flags(given & !known, known));
    }
    Ok(())
}

#[cold]
fn unknown_flags(unknown: u32, known: u32) -> Error {
    let expected = if known == 0 { "0: this call knows no flags" } else { "only flags that this call knows" };
    Error::ArgumentValue { name: "flags", value: format!("0x{unknown:x} (unknown bits)"), expected }
}

/// A place for a result: not NULL, and set to `nothing` first, so that it never keeps a stale value after an error.
///
/// # Safety
/// `out` is NULL or valid for a write of `T`.
pub(super) unsafe fn out<'a, T>(name: &'static str, out: *mut T, nothing: T) -> Result<&'a mut T> {
    if out.is_null() {
        return Err(null(name));
    }
    // SAFETY: not NULL; valid for a write by the caller's promise, exclusive for the time of the call.
    unsafe {
        out.write(nothing);
        Ok(&mut *out)
    }
}
