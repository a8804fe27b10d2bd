//! Version
//!
//! Which library this program runs with, and what that build can do.

use libc::{c_char, c_int};

use super::arguments;

const fn number(text: &str) -> u32 {
    let bytes = text.as_bytes();
    let mut value = 0;
    let mut at = 0;
    while at < bytes.len() {
        value = value * 10 + (bytes[at] - b'0') as u32;
        at += 1;
    }
    value
}

const VERSION: u32 = (number(env!("CARGO_PKG_VERSION_MAJOR")) << 16)
    | (number(env!("CARGO_PKG_VERSION_MINOR")) << 8)
    | number(env!("CARGO_PKG_VERSION_PATCH"));

/// What a build may have or lack. Names only ever get added.
const FEATURES: &[(&str, bool)] = &[
    ("zlib", true),
    ("zstd", cfg!(feature = "zstd")),
    ("extended_l2", true),
    ("write_zeroes", true),
    ("discard", true),
    ("write_compressed", true),
];

/// The version of the library as text, "0.1.0" for example.
///
/// Returns a static string; never NULL, not to be freed.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn qcow2_version_string() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The version of the library as a number to compare: major << 16 | minor << 8 | patch.
///
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn qcow2_version_number() -> u32 {
    VERSION
}

/// Whether this build of the library has a feature.
///
/// name: "zlib" and "zstd" (compressed clusters of that kind can be read), "extended_l2" (subclusters),
///       "write_zeroes" and "discard" (those calls), "write_compressed" (QCOW2_COMPRESSED, with the methods that can be
///       read).
///
/// Returns 1 if it has, 0 if it has not or nobody knows a feature of that name (NULL included).
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_has_feature(name: *const c_char) -> c_int {
    // SAFETY: the caller passes NULL or a NUL-terminated string.
    let Ok(name) = (unsafe { arguments::text("name", name) }) else { return 0 };
    FEATURES.iter().any(|&(feature, has)| feature == name && has).into()
}
