//! Facts
//!
//! What an image is, without its data. To look at an image that must not be trusted or cannot be opened for use (its
//! backing file is not allowed, it needs a feature that the library lacks), open it with option "inspect".

use std::ffi::{CString, c_void};

use libc::{c_char, c_int};

use super::arguments::out;
use super::boundary::{call, call_on, null};
use super::image::qcow2_image;
use super::structs::{self, AbiStruct};
use crate::format::Compression;
use crate::image::{Info, Stats};

/// Bit of qcow2_info.flags: 32 subclusters in each cluster (extended L2 entries).
pub const QCOW2_INFO_EXTENDED_L2: u32 = 1 << 0;
/// Bit of qcow2_info.flags: refcounts may be written late.
pub const QCOW2_INFO_LAZY_REFCOUNTS: u32 = 1 << 1;
/// Bit of qcow2_info.flags: refcounts may be wrong, the image needs a repair before it is written.
pub const QCOW2_INFO_DIRTY: u32 = 1 << 2;
/// Bit of qcow2_info.flags: marked corrupt.
pub const QCOW2_INFO_CORRUPT: u32 = 1 << 3;
/// Bit of qcow2_info.flags: guest data is encrypted.
pub const QCOW2_INFO_ENCRYPTED: u32 = 1 << 4;
/// Bit of qcow2_info.flags: it has a backing file.
pub const QCOW2_INFO_BACKING_FILE: u32 = 1 << 5;
/// Bit of qcow2_info.flags: guest data is in an external data file.
pub const QCOW2_INFO_DATA_FILE: u32 = 1 << 6;
/// Bit of qcow2_info.flags: the external data file is a raw image by itself.
pub const QCOW2_INFO_DATA_FILE_RAW: u32 = 1 << 7;
/// Bit of qcow2_info.flags: allocated_bytes is known.
pub const QCOW2_INFO_ALLOCATED_BYTES: u32 = 1 << 8;

/// Compressed clusters are deflate streams.
pub const QCOW2_COMPRESSION_ZLIB: u32 = 0;
/// Compressed clusters are zstd frames.
pub const QCOW2_COMPRESSION_ZSTD: u32 = 1;

/// Facts about an image, as of the open. Members may be appended in later versions.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2_info {
    /// Size of the guest disk in bytes.
    pub size_bytes: u64,
    /// Bytes in a cluster.
    pub cluster_size_bytes: u64,
    /// Bytes in a subcluster; those of a cluster where there are none.
    pub subcluster_size_bytes: u64,
    /// Size of the image file in bytes.
    pub file_size_bytes: u64,
    /// What the image file occupies on its disk, in bytes, with QCOW2_INFO_ALLOCATED_BYTES.
    pub allocated_bytes: u64,
    /// Incompatible feature bits of the header.
    pub incompatible_features: u64,
    /// Compatible feature bits of the header.
    pub compatible_features: u64,
    /// Autoclear feature bits of the header.
    pub autoclear_features: u64,
    /// QCOW2_INFO_ bits.
    pub flags: u32,
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Bits in a reference count.
    pub refcount_bits: u32,
    /// A QCOW2_COMPRESSION_ number.
    pub compression_type: u32,
    /// How many internal snapshots there are.
    pub snapshots: u32,
    /// Zero.
    pub reserved: u32,
    /// The backing file as the image names it, cut after 1023 bytes, which is the format's limit; "" for none.
    pub backing_file: [c_char; 1024],
    /// The declared format of the backing file, cut after 63 bytes; "" for none.
    pub backing_fmt: [c_char; 64],
}

// SAFETY: repr(C), integers and characters; 88 bytes of numbers, and no padding before or after the texts.
unsafe impl AbiStruct for qcow2_info {
    const FIRST_SIZE: usize = 88 + 1024 + 64;
}
const _: () = assert!(size_of::<qcow2_info>() >= qcow2_info::FIRST_SIZE);

/// A text in a fixed place, always ended by a NUL.
fn fixed<const N: usize>(text: &str) -> [c_char; N] {
    let mut place = [0; N];
    for (to, from) in place[..N - 1].iter_mut().zip(text.bytes()) {
        *to = from as c_char;
    }
    place
}

impl qcow2_info {
    fn new(info: &Info) -> Self {
        let flags = [
            (info.extended_l2, QCOW2_INFO_EXTENDED_L2),
            (info.lazy_refcounts, QCOW2_INFO_LAZY_REFCOUNTS),
            (info.dirty, QCOW2_INFO_DIRTY),
            (info.corrupt, QCOW2_INFO_CORRUPT),
            (info.encrypted, QCOW2_INFO_ENCRYPTED),
            (info.backing.is_some(), QCOW2_INFO_BACKING_FILE),
            (info.external_data_file, QCOW2_INFO_DATA_FILE),
            (info.data_file_raw, QCOW2_INFO_DATA_FILE_RAW),
            (info.allocated_bytes.is_some(), QCOW2_INFO_ALLOCATED_BYTES),
        ];
        Self {
            size_bytes: info.size_bytes,
            cluster_size_bytes: info.cluster_size_bytes,
            subcluster_size_bytes: info.cluster_size_bytes / u64::from(info.subclusters),
            file_size_bytes: info.file_size_bytes,
            allocated_bytes: info.allocated_bytes.unwrap_or(0),
            incompatible_features: info.incompatible,
            compatible_features: info.compatible,
            autoclear_features: info.autoclear,
            flags: flags.iter().filter(|(has, _)| *has).fold(0, |bits, (_, bit)| bits | bit),
            version: info.version,
            refcount_bits: info.refcount_bits,
            compression_type: match info.compression {
                Compression::Zlib => QCOW2_COMPRESSION_ZLIB,
                Compression::Zstd => QCOW2_COMPRESSION_ZSTD,
            },
            snapshots: info.snapshots,
            reserved: 0,
            backing_file: fixed(info.backing.as_ref().map_or("", |backing| &backing.name)),
            backing_fmt: fixed(info.backing.as_ref().and_then(|backing| backing.format.as_deref()).unwrap_or("")),
        }
    }
}

/// Counters of a handle, all from 0 at the open. Members may be appended in later versions.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2_stats {
    /// Bytes that were read from old clusters or backing files to fill up what a write did not cover (copy-on-write).
    pub copied_bytes: u64,
    /// Bytes around a write that read as zeroes and are zeroes in the host cluster now: written as such, or because it
    /// was never written to.
    pub zero_filled_bytes: u64,
    /// Host clusters allocated for guest data.
    pub clusters_allocated: u64,
    /// L2 tables allocated or copied.
    pub l2_tables_allocated: u64,
    /// Writes that were not pure overwrites of allocated data.
    pub allocating_writes: u64,
}

// SAFETY: repr(C), integers.
unsafe impl AbiStruct for qcow2_stats {
    const FIRST_SIZE: usize = 40;
}

impl qcow2_stats {
    fn new(stats: Stats) -> Self {
        let Stats { copied_bytes, zero_filled_bytes, clusters_allocated, l2_tables_allocated, allocating_writes } =
            stats;
        Self { copied_bytes, zero_filled_bytes, clusters_allocated, l2_tables_allocated, allocating_writes }
    }
}

/// Gets the facts about an image. Files that it refers to are not opened for that.
///
/// image:     the handle; one opened with "inspect" will do
/// info:      filled in
/// info_size: sizeof(struct qcow2_info)
///
/// Returns 0 or a negative errno. Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_get_info(image: *mut qcow2_image, info: *mut qcow2_info, info_size: usize) -> c_int {
    let body = |image: &qcow2_image| {
        let value = qcow2_info::new(&image.image.info());
        // SAFETY: NULL or info_size bytes by the manual above.
        unsafe { structs::fill("info", info, info_size, &value) }
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// Gets the facts about an image as JSON, with the keys of `qemu-img info --output=json`.
///
/// image: the handle; one opened with "inspect" will do. Its "filename" is the path given to qcow2_open(), "" without
/// json:  where the text goes, in ASCII; set to NULL on an error. The caller frees it with qcow2_string_free()
///
/// Returns 0 or a negative errno. Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_info_json(image: *mut qcow2_image, json: *mut *mut c_char) -> c_int {
    let body = |image: &qcow2_image| {
        // SAFETY: NULL or valid for a write by the manual above.
        let json = unsafe { out("json", json, std::ptr::null_mut()) }?;
        // JSON escapes NUL, so there is none in the text.
        *json = CString::new(image.image.info_with_lists().to_json(&image.image.path().to_string_lossy()))
            .unwrap_or_default()
            .into_raw();
        Ok(())
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// Frees a string that the library gave to the caller.
///
/// string: not to be used any more; NULL is a no-op
///
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_string_free(string: *mut c_char) {
    if !string.is_null() {
        // SAFETY: came from CString::into_raw above, and the caller uses it no more.
        drop(unsafe { CString::from_raw(string) });
    }
}

/// Gets the counters of a handle.
///
/// image:      the handle
/// stats:      filled in
/// stats_size: sizeof(struct qcow2_stats)
///
/// Returns 0 or a negative errno. Thread-safe; what other threads do meanwhile may be counted or not. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_get_stats(image: *mut qcow2_image, stats: *mut qcow2_stats, stats_size: usize) -> c_int {
    let body = |image: &qcow2_image| {
        let value = qcow2_stats::new(image.image.stats());
        // SAFETY: NULL or stats_size bytes by the manual above.
        unsafe { structs::fill("stats", stats, stats_size, &value) }
    };
    // SAFETY: NULL or an open handle by the manual above.
    unsafe { call_on(image, body) }
}

/// What qcow2_probe() found: anything that is not another format.
pub const QCOW2_PROBE_RAW: i32 = 0;
/// What qcow2_probe() found: a qcow2 image, version 2 or 3.
pub const QCOW2_PROBE_QCOW2: i32 = 1;

/// Guesses the format of an image from its first bytes. Nothing in the library calls this: a guest can make a raw disk
/// look like qcow2, so a guess must never decide how a disk that a guest could write is opened.
///
/// buf:    the first bytes of the file
/// length: how many, 512 or more is enough
///
/// Returns a QCOW2_PROBE_ number (more may come), or -EINVAL where buf is NULL. Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_probe(buf: *const c_void, length: usize) -> c_int {
    let mut found = QCOW2_PROBE_RAW;
    let code = call(|| {
        if buf.is_null() {
            return Err(null("buf"));
        }
        // SAFETY: not NULL; `length` readable bytes by the manual above, of which 8 are looked at.
        let start = unsafe { std::slice::from_raw_parts(buf.cast::<u8>(), length.min(8)) };
        found = probe(start);
        Ok(())
    });
    if code < 0 { code } else { found }
}

fn probe(start: &[u8]) -> c_int {
    match start {
        [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 2 | 3] => QCOW2_PROBE_QCOW2,
        _ => QCOW2_PROBE_RAW,
    }
}
