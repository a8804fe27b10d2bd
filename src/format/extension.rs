//! Header extensions. Spec, "Header extensions" and the sections after it.
//!
//! Extensions are kept as they were found, in their order, so that a header that is written again carries what this
//! library does not know. What it does know is read out of them by the functions here.

use super::bitmap::{BITMAPS_MAX, DIRECTORY_BYTES_MAX};
use super::geometry::Geometry;
use crate::error::{Error, Result};

/// End of the extension area.
const END: u32 = 0;
/// Name of the backing file's format.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Pointer to the bitmap directory.
pub const BITMAPS: u32 = 0x2385_2875;
/// Pointer to the encryption header.
pub const ENCRYPTION: u32 = 0x0537_be77;
/// Name of the external data file.
pub const DATA_FILE: u32 = 0x4441_5441;

/// Longest backing format name (QEMU's buffer, less its terminator).
const BACKING_FORMAT_MAX: usize = 15;
/// Longest name of an external data file.
const DATA_FILE_MAX: usize = 1023;
/// Type and length before the data.
pub(super) const HEAD_BYTES: usize = 8;
/// Type, bit number, and a name of 46 bytes.
const FEATURE_NAME_BYTES: usize = 48;

/// One header extension as stored, without its padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extension {
    /// Type number.
    pub kind: u32,
    /// Data.
    pub data: Vec<u8>,
}

impl Extension {
    /// Bytes that it takes in the header: type, length, data and padding.
    pub(super) fn stored_bytes(&self) -> usize {
        HEAD_BYTES + self.data.len().next_multiple_of(8)
    }
}

/// The three feature bitmaps of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FeatureKind {
    /// An unknown bit forbids the open.
    Incompatible = 0,
    /// An unknown bit may be ignored.
    Compatible = 1,
    /// An unknown bit is cleared by the first write.
    Autoclear = 2,
}

/// The feature bits that the specification defines, with the names that QEMU stores for them.
const FEATURES: [(FeatureKind, u8, &str); 8] = [
    (FeatureKind::Incompatible, 0, "dirty bit"),
    (FeatureKind::Incompatible, 1, "corrupt bit"),
    (FeatureKind::Incompatible, 2, "external data file"),
    (FeatureKind::Incompatible, 3, "compression type"),
    (FeatureKind::Incompatible, 4, "extended L2 entries"),
    (FeatureKind::Compatible, 0, "lazy refcounts"),
    (FeatureKind::Autoclear, 0, "bitmaps"),
    (FeatureKind::Autoclear, 1, "raw external data"),
];

/// Where the bitmap directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsPointer {
    /// Bitmaps in the directory.
    pub count: u32,
    /// Size of the directory in bytes.
    pub directory_bytes: u64,
    /// Offset of the directory.
    pub directory_offset: u64,
}

impl BitmapsPointer {
    /// As the data of the extension.
    pub fn encode(self) -> Vec<u8> {
        let mut data = Vec::with_capacity(24);
        data.extend_from_slice(&self.count.to_be_bytes());
        data.extend_from_slice(&[0; 4]);
        data.extend_from_slice(&self.directory_bytes.to_be_bytes());
        data.extend_from_slice(&self.directory_offset.to_be_bytes());
        data
    }
}

/// Whether the extension area that starts at `start` ends with its mark inside `bytes`.
pub(super) fn ends_inside(bytes: &[u8], start: u64) -> bool {
    let mut at = start;
    while at.saturating_add(HEAD_BYTES as u64) <= bytes.len() as u64 {
        if be32(bytes, at as usize) == END {
            return true;
        }
        at += HEAD_BYTES as u64 + u64::from(be32(bytes, at as usize + 4)).next_multiple_of(8);
    }
    false
}

/// Reads the extension area that starts at `start` and ends at `end` at the latest (both inside `bytes`).
pub(super) fn parse_all(bytes: &[u8], start: usize, end: usize) -> Result<Vec<Extension>> {
    let mut list: Vec<Extension> = Vec::new();
    let mut at = start;
    // The area also ends where no further extension fits: with the backing file name, or with the cluster.
    while end.saturating_sub(at) >= HEAD_BYTES {
        let kind = be32(bytes, at);
        if kind == END {
            break;
        }
        let length = be32(bytes, at + 4) as usize;
        at += HEAD_BYTES;
        if length > end - at {
            return Err(Error::Header {
                field: "header extension length",
                value: length as u64,
                expected: "an extension that ends before the backing file name, the first cluster and the file do",
            });
        }
        if is_known(kind) && find(&list, kind).is_some() {
            return Err(Error::Header {
                field: "header extension type",
                value: u64::from(kind),
                expected: "an extension type that did not appear before",
            });
        }
        list.push(Extension { kind, data: bytes[at..at + length].to_vec() });
        at = (at + length.next_multiple_of(8)).min(end);
    }
    Ok(list)
}

/// Appends one extension, padded with zeroes.
pub(super) fn encode_one(kind: u32, data: &[u8], to: &mut Vec<u8>) -> Result<()> {
    let length = u32::try_from(data.len())
        .map_err(|_| Error::TooLarge { what: "header extension length", limit: u64::from(u32::MAX) })?;
    to.extend_from_slice(&kind.to_be_bytes());
    to.extend_from_slice(&length.to_be_bytes());
    to.extend_from_slice(data);
    to.resize(to.len().next_multiple_of(8), 0);
    Ok(())
}

/// Appends the end of the extension area.
pub(super) fn encode_end(to: &mut Vec<u8>) {
    to.extend_from_slice(&[0; HEAD_BYTES]);
}

fn is_known(kind: u32) -> bool {
    [BACKING_FORMAT, FEATURE_NAMES, BITMAPS, ENCRYPTION, DATA_FILE].contains(&kind)
}

/// The data of the extension of that type, if it is there.
pub fn find(extensions: &[Extension], kind: u32) -> Option<&[u8]> {
    extensions.iter().find(|e| e.kind == kind).map(|e| e.data.as_slice())
}

/// The backing file's format, if declared.
pub fn backing_format(extensions: &[Extension]) -> Result<Option<String>> {
    let Some(data) = find(extensions, BACKING_FORMAT) else { return Ok(None) };
    if data.is_empty() || data.len() > BACKING_FORMAT_MAX {
        return Err(Error::Header {
            field: "backing file format name length",
            value: data.len() as u64,
            expected: "1 to 15 bytes",
        });
    }
    text(data, "backing file format name").map(Some)
}

/// The name of the external data file, if stored.
pub fn data_file(extensions: &[Extension]) -> Result<Option<String>> {
    let Some(data) = find(extensions, DATA_FILE) else { return Ok(None) };
    if data.is_empty() || data.len() > DATA_FILE_MAX {
        return Err(Error::Header {
            field: "external data file name length",
            value: data.len() as u64,
            expected: "1 to 1023 bytes",
        });
    }
    text(data, "external data file name").map(Some)
}

/// Turns bytes into a name: UTF-8 without NUL or control characters, which would make it read as another name than
/// it is. `value` of the error is the byte or character that does not belong there.
pub(super) fn text(data: &[u8], field: &'static str) -> Result<String> {
    let wrong = |value, expected| Err(Error::Header { field, value, expected });
    match std::str::from_utf8(data) {
        Err(e) => wrong(u64::from(data[e.valid_up_to()]), "UTF-8 text"),
        Ok(text) => match text.chars().find(|c| c.is_control()) {
            Some(c) => wrong(u64::from(c), "text without NUL or control characters"),
            None => Ok(text.to_owned()),
        },
    }
}

/// The name that the feature name table gives to a bit, made printable: it is text from the file.
pub fn feature_name(extensions: &[Extension], kind: FeatureKind, bit: u32) -> Option<String> {
    let table = find(extensions, FEATURE_NAMES)?;
    let entry =
        table.chunks_exact(FEATURE_NAME_BYTES).find(|entry| entry[0] == kind as u8 && u32::from(entry[1]) == bit)?;
    let name = entry[2..].split(|&byte| byte == 0).next().unwrap_or_default();
    let name: String = String::from_utf8_lossy(name).chars().filter(|c| !c.is_control()).collect();
    (!name.is_empty()).then_some(name)
}

/// The feature name table that new images get.
pub fn feature_names() -> Extension {
    let mut data = Vec::with_capacity(FEATURES.len() * FEATURE_NAME_BYTES);
    for (kind, bit, name) in FEATURES {
        let end = data.len() + FEATURE_NAME_BYTES;
        data.extend_from_slice(&[kind as u8, bit]);
        data.extend_from_slice(name.as_bytes());
        data.resize(end, 0);
    }
    Extension { kind: FEATURE_NAMES, data }
}

/// The bitmaps extension. To be called only if its autoclear bit is set: without the bit its data counts as
/// inconsistent, and nobody looks at it.
pub fn bitmaps(extensions: &[Extension], geometry: Geometry) -> Result<BitmapsPointer> {
    let wrong = |field, value, expected| Err(Error::Header { field, value, expected });
    let Some(data) = find(extensions, BITMAPS) else {
        return wrong("autoclear_features", 1, "a bitmaps extension where the bitmaps bit (0) is set");
    };
    if data.len() != 24 {
        return wrong("bitmaps extension length", data.len() as u64, "24 bytes");
    }
    let (count, reserved) = (u64::from(be32(data, 0)), u64::from(be32(data, 4)));
    let (bytes, offset) = (be64(data, 8), be64(data, 16));
    if count == 0 || count > BITMAPS_MAX {
        return wrong("nb_bitmaps", count, "1 to 65535");
    }
    if reserved != 0 {
        return wrong("reserved field of the bitmaps extension", reserved, "0");
    }
    // An entry has 24 bytes before its name, which is not empty, and padding.
    if bytes < count * 32 || bytes > DIRECTORY_BYTES_MAX {
        return wrong("bitmap_directory_size", bytes, "at least 32 bytes for each bitmap, at most 67107840 in all");
    }
    if offset == 0 || offset % geometry.cluster_size_bytes() != 0 {
        return wrong("bitmap_directory_offset", offset, "a multiple of the cluster size, and not 0");
    }
    Ok(BitmapsPointer { count: count as u32, directory_bytes: bytes, directory_offset: offset })
}

/// Checks the encryption header pointer against the encryption method: it is there with LUKS and only then.
pub(super) fn check_encryption(extensions: &[Extension], luks: bool, geometry: Geometry) -> Result<()> {
    let field = "full disk encryption header pointer";
    let wrong = |value, expected| Err(Error::Header { field, value, expected });
    match (find(extensions, ENCRYPTION), luks) {
        (None, false) => Ok(()),
        (None, true) => wrong(0, "to be present, as crypt_method is 2 (LUKS)"),
        (Some(data), false) => wrong(data.len() as u64, "to be absent, as crypt_method is not 2 (LUKS)"),
        (Some(data), true) if data.len() != 16 => wrong(data.len() as u64, "16 bytes of data"),
        (Some(data), true) => match be64(data, 0) {
            0 => wrong(0, "an offset that is not 0"),
            offset if offset % geometry.cluster_size_bytes() != 0 => {
                wrong(offset, "an offset that is a multiple of the cluster size")
            }
            _ => Ok(()),
        },
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}
