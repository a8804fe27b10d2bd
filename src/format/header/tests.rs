//! Round trips, boundary values of each field, and what malformed headers are called.

use super::{
    AUTOCLEAR_BITMAPS, BackingName, Compression, Encryption, Header, INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY, INCOMPATIBLE_EXTENDED_L2,
};
use crate::error::{Error, Result};
use crate::format::extension::{self, BACKING_FORMAT, BITMAPS, DATA_FILE, ENCRYPTION, Extension, FEATURE_NAMES};
use crate::format::layout::{self, FIELDS, Field};
use crate::format::{Geometry, HostOffset};

pub(super) fn plain(version: u32) -> Header {
    let (header_length, unknown_fields) = Header::new_length(version);
    Header {
        geometry: Geometry { version, cluster_bits: 12, extended_l2: false, refcount_order: 4 },
        size_bytes: 1 << 20,
        backing: None,
        encryption: Encryption::None,
        l1_entries: 1,
        l1_offset: HostOffset(0x3000),
        refcount_table_offset: HostOffset(0x1000),
        refcount_table_clusters: 1,
        snapshots: 0,
        snapshots_offset: HostOffset(0),
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        compression: Compression::Zlib,
        header_length,
        unknown_fields,
        extensions: Vec::new(),
    }
}

pub(super) fn backing(name: &str, format: Option<&str>) -> Option<BackingName> {
    Some(BackingName { name: name.into(), format: format.map(str::to_owned) })
}

pub(super) fn ext(kind: u32, data: &[u8]) -> Extension {
    Extension { kind, data: data.to_vec() }
}

/// Parses the first cluster that `bytes` begin.
fn reparse(mut bytes: Vec<u8>) -> Result<Header> {
    bytes.resize(4096, 0);
    Header::parse(&bytes)
}

#[test]
fn what_is_encoded_is_parsed_again() {
    let mut v3 = plain(3);
    v3.compatible = 0xf001;
    v3.autoclear = 0x8000_0000_0000_0000;
    v3.incompatible = INCOMPATIBLE_DIRTY | INCOMPATIBLE_COMPRESSION;
    v3.compression = Compression::Zstd;
    v3.header_length = 136;
    v3.unknown_fields = (1..32).collect(); // 105 to 135
    v3.extensions = vec![
        ext(0x1234_5678, b"unknown, 19 bytes.."),
        ext(BACKING_FORMAT, b"raw"),
        ext(0x1234_5678, b"again: allowed where the type is not known"),
        extension::feature_names(),
        ext(7, b""),
    ];
    v3.backing = backing("../base.img", Some("raw"));
    let mut v2 = plain(2);
    v2.extensions = vec![ext(BACKING_FORMAT, b"qcow2")];
    v2.backing = backing("b", Some("qcow2"));
    for header in [plain(2), plain(3), v2, v3] {
        let bytes = header.encode().unwrap();
        let again = reparse(bytes.clone()).unwrap();
        assert_eq!(again, header);
        assert_eq!(again.encode().unwrap(), bytes);
        // A file may end with its header.
        assert_eq!(Header::parse(&bytes).unwrap(), header);
    }
}

#[test]
fn what_holds_a_header_is_parsed_as_the_whole_cluster_is() {
    let mut long = plain(3);
    long.extensions = vec![extension::feature_names(), ext(0x1234_5678, &[7; 300]), ext(9, b"last")];
    let mut behind = long.clone();
    behind.backing = backing("../base.img", Some("raw"));
    let mut v2 = plain(2);
    v2.extensions = vec![ext(BACKING_FORMAT, b"qcow2")];
    v2.backing = backing("b", Some("qcow2"));
    for header in [plain(2), plain(3), long, behind, v2] {
        let mut bytes = header.encode().unwrap();
        let used = bytes.len();
        bytes.resize(4096, 0);
        let enough: Vec<usize> = (0..=bytes.len()).filter(|&n| super::holds_header(&bytes[..n])).collect();
        for &n in &enough {
            assert_eq!(Header::parse(&bytes[..n]).unwrap(), Header::parse(&bytes).unwrap(), "from {n} bytes");
        }
        let first = enough[0];
        assert_eq!(enough.len(), bytes.len() - first + 1, "more is enough as well");
        assert!(first <= used.max(104), "{first} bytes are asked for, and {used} are used");
        // Damaged: whatever the prefix says, the result is that of the whole cluster.
        for at in (0..used).step_by(3) {
            for value in [0, 1, 0x7f, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                for n in [104, 200, 512, 1000].into_iter().filter(|&n| super::holds_header(&damaged[..n])) {
                    let (part, whole) = (Header::parse(&damaged[..n]), Header::parse(&damaged));
                    let same = part == whole || part.is_err() && whole.is_err();
                    assert!(same, "byte {at} is {value}, {n} bytes: {part:?}, and of all: {whole:?}");
                }
            }
        }
    }
}

#[test]
fn the_format_of_the_backing_file_follows_the_backing_file() {
    let mut header = plain(3);
    header.extensions = vec![extension::feature_names()];
    header.backing = backing("b", Some("qcow2"));
    let mut stored = reparse(header.encode().unwrap()).unwrap();
    assert_eq!(stored.extensions, [ext(BACKING_FORMAT, b"qcow2"), extension::feature_names()]);
    stored.backing = backing("c", Some("raw"));
    stored = reparse(stored.encode().unwrap()).unwrap();
    assert_eq!(stored.backing, backing("c", Some("raw")));
    stored.backing = backing("c", None);
    stored = reparse(stored.encode().unwrap()).unwrap();
    assert_eq!((stored.backing, stored.extensions), (backing("c", None), vec![extension::feature_names()]));
}

fn boundaries(field: Field) -> Vec<u64> {
    let max = u64::MAX >> (64 - 8 * field.bytes);
    let mut values = vec![0, 1, 2, 3, 6, 7, 8, 9, 14, 21, 22, 71, 72, 104, 105, 511, 512, 513, 1023, 1024, 4095];
    values.extend([4096, 4097, 65536, 65537, 1 << 22, (1 << 22) + 1, 1 << 31, (1 << 32) - 1, 1 << 41, 1 << 62]);
    values.extend([1 << 63, max / 2, max.saturating_sub(4095), max - 1, max]);
    values.retain(|&value| value <= max);
    values.dedup();
    values
}

/// What the specification and the limits allow a field of the sample to be, all others staying as they are.
/// The sample: version 3, 4 KiB clusters, 1 MiB disk with one L1 entry (2 MiB), backing file name at 0x200.
fn allowed(field: &str, value: u64) -> bool {
    match field {
        "magic" => false, // the right one is not among the boundary values
        "version" => value == 3 || value == 2,
        "backing_file_offset" => value == 0 || (0x200..=4096 - 4).contains(&value),
        "backing_file_size" => (1..=1023).contains(&value),
        // Smaller clusters: one L1 entry maps too little, or the name lies outside; larger ones are fine.
        "cluster_bits" => (12..=21).contains(&value),
        "size" => value <= 2 << 20,
        "crypt_method" => value <= 1, // LUKS needs its extension
        "l1_size" => (1..=1 << 22).contains(&value),
        "refcount_table_clusters" => (1..=2048).contains(&value),
        "nb_snapshots" => value <= 65536,
        "incompatible_features" => value & 0b11000 == 0, // extended L2 needs 16 KiB, bit 3 another compression type
        "autoclear_features" => value & 0b11 == 0,       // bitmaps need their extension, raw data a data file
        "refcount_order" => value <= 6,
        // Extensions begin where the header ends: the sample's would be cut.
        "header_length" => value == 104 || value == 512,
        "compression_type" => value == 0,
        "l1_table_offset" | "refcount_table_offset" | "snapshots_offset" | "compatible_features" => true,
        other => panic!("no verdict for {other}"),
    }
}

#[test]
fn each_field_at_its_boundaries() {
    let mut sample = plain(3);
    sample.backing = backing("base", None);
    let mut bytes = sample.encode().unwrap();
    // The name further on, so that there is room for longer headers.
    bytes.resize(4096, 0);
    bytes.copy_within(120..124, 0x200);
    bytes[120..124].fill(0);
    layout::BACKING_FILE_OFFSET.set(&mut bytes, 0x200);
    bytes[0x204..].fill(b'x'); // a longer or other name is still text
    let mut tried = 0;
    for field in FIELDS {
        for value in boundaries(field) {
            let mut bytes = bytes.clone();
            field.set(&mut bytes, value);
            let result = Header::parse(&bytes);
            let context = format!("{} = {value:#x}", field.name);
            tried += 1;
            match result {
                Ok(header) => {
                    assert!(allowed(field.name, value), "{context} accepted");
                    // What was accepted can be handled: no panic, and the same again after a round trip.
                    let _ = (header.check_supported(), header.check_placement(value), header.check_placement(1 << 20));
                    if let Ok(bytes) = header.encode() {
                        assert_eq!(Header::parse(&bytes).unwrap(), header, "{context}");
                    }
                }
                Err(e) => assert!(!allowed(field.name, value), "{context} refused: {e}"),
            }
        }
    }
    assert!(tried > 19 * 20, "{tried}");
}

fn refused(header: &Header) -> (&'static str, u64) {
    match reparse(header.encode().unwrap()) {
        Err(Error::Header { field, value, .. }) => (field, value),
        other => panic!("{other:?}"),
    }
}

#[test]
fn malformed_extensions_are_named() {
    let with = |extensions: Vec<Extension>| Header { extensions, ..plain(3) };
    let bitmaps = |count: u32, reserved: u32, bytes: u64, offset: u64| {
        let mut data = [count.to_be_bytes(), reserved.to_be_bytes()].concat();
        data.extend([bytes.to_be_bytes(), offset.to_be_bytes()].concat());
        Header { autoclear: AUTOCLEAR_BITMAPS, ..with(vec![ext(BITMAPS, &data)]) }
    };
    assert!(reparse(bitmaps(1, 0, 32, 0x5000).encode().unwrap()).is_ok());
    assert_eq!(refused(&bitmaps(0, 0, 32, 0x5000)), ("nb_bitmaps", 0));
    assert_eq!(refused(&bitmaps(65536, 0, 1 << 21, 0x5000)), ("nb_bitmaps", 65536));
    assert_eq!(refused(&bitmaps(1, 9, 32, 0x5000)), ("reserved field of the bitmaps extension", 9));
    assert_eq!(refused(&bitmaps(2, 0, 47, 0x5000)), ("bitmap_directory_size", 47));
    assert_eq!(refused(&bitmaps(1, 0, 32, 0x5008)), ("bitmap_directory_offset", 0x5008));
    let no_bit = Header { autoclear: 0, ..bitmaps(0, 9, 0, 1) };
    assert!(reparse(no_bit.encode().unwrap()).is_ok(), "inconsistent without the bit, and so not looked at");
    let short = Header { autoclear: AUTOCLEAR_BITMAPS, ..with(vec![ext(BITMAPS, &[0; 23])]) };
    assert_eq!(refused(&short), ("bitmaps extension length", 23));
    let twice = with(vec![extension::feature_names(), ext(5, b""), extension::feature_names()]);
    assert_eq!(refused(&twice), ("header extension type", FEATURE_NAMES.into()));
    assert_eq!(refused(&with(vec![ext(BACKING_FORMAT, b"0123456789abcdef")])).0, "backing file format name length");
    assert_eq!(refused(&with(vec![ext(BACKING_FORMAT, b"ra\0w")])), ("backing file format name", 0));
    assert_eq!(refused(&with(vec![ext(DATA_FILE, b"")])), ("external data file name length", 0));
    assert_eq!(refused(&with(vec![ext(DATA_FILE, b"a\xff")])), ("external data file name", 0xff));
    let pointer = [0x5000u64.to_be_bytes(), 100u64.to_be_bytes()].concat();
    let crypt = "full disk encryption header pointer";
    assert_eq!(refused(&with(vec![ext(ENCRYPTION, &pointer)])), (crypt, 16));
    let luks = |data: &[u8]| Header { encryption: Encryption::Luks, ..with(vec![ext(ENCRYPTION, data)]) };
    assert!(reparse(luks(&pointer).encode().unwrap()).is_ok());
    assert_eq!(refused(&luks(&pointer[..8])), (crypt, 8));
    assert_eq!(refused(&luks(&[0; 16])), (crypt, 0));
    assert_eq!(refused(&Header { encryption: Encryption::Luks, ..plain(3) }), (crypt, 0));
}

#[test]
fn an_extension_area_ends_with_the_file_the_cluster_or_the_name() {
    let bytes = Header { extensions: vec![ext(5, &[1; 40])], ..plain(3) }.encode().unwrap();
    for end in 0..=bytes.len() {
        let result = Header::parse(&bytes[..end]);
        // 112: header, 8: type and length, 40: data, 8: end. A cut in the data is noticed.
        assert_eq!(result.is_ok(), (112..120).contains(&end) || end >= 160, "{end}: {result:?}");
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let text = |header: Header| header.check_supported().unwrap_err().to_string();
    let mut names = extension::feature_names();
    names.data.extend([0, 40]);
    names.data.extend([b"flux\x1b[31m capacitor".as_slice(), &[0; 28]].concat());
    let unknown = Header { incompatible: 1 << 40 | 1 << 41, extensions: vec![names], ..plain(3) };
    let unknown = text(unknown);
    assert!(unknown.contains("'flux[31m capacitor' (incompatible feature bit 40)"), "{unknown}");
    assert!(unknown.contains("unknown incompatible feature bit 41"), "{unknown}");
    assert!(text(Header { encryption: Encryption::Aes, ..plain(3) }).contains("encryption (AES)"));
    let with_data_file = |autoclear| Header { incompatible: 4, autoclear, ..plain(3) };
    with_data_file(2).check_supported().unwrap();
    let backing = backing("b", None);
    Header { backing: backing.clone(), ..with_data_file(0) }.check_supported().unwrap();
    assert!(text(Header { backing, ..with_data_file(2) }).contains("as the image has a backing file"));
    assert!(text(Header { snapshots: 1, ..with_data_file(0) }).contains("without internal snapshots"));
    assert!(text(Header { size_bytes: (1 << 56) + 512, ..with_data_file(0) }).contains("at most 2^56"));
    for known in [INCOMPATIBLE_DIRTY, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_EXTENDED_L2] {
        Header { incompatible: known, compatible: u64::MAX, autoclear: u64::MAX, ..plain(3) }
            .check_supported()
            .unwrap();
    }
}

#[test]
fn tables_are_aligned_inside_the_file_and_apart() {
    let sample = || Header { snapshots: 1, snapshots_offset: HostOffset(0x4000), ..plain(3) };
    sample().check_placement(0x5000).unwrap();
    sample().check_placement(0x4000 + 40).unwrap();
    let mut headers = Vec::new();
    let mut bad = |field: &'static str, change: &dyn Fn(&mut Header), size: u64| {
        let mut header = sample();
        change(&mut header);
        headers.push((field, header, size));
    };
    let (l1, refcounts, snapshots) = ("l1_table_offset", "refcount_table_offset", "snapshots_offset");
    bad(l1, &|h| h.l1_offset.0 = 0x3200, 0x5000);
    bad(l1, &|h| h.l1_offset.0 = 0, 0x5000);
    bad(l1, &|h| h.l1_offset.0 = 0x5000, 0x5000);
    bad(l1, &|h| h.l1_offset.0 = !0xfff, 0x5000);
    bad(l1, &|h| h.l1_offset.0 = 0x1000, 0x5000);
    bad(l1, &|h| h.l1_entries = 1025, 0x3000 + 1025 * 8 - 1);
    bad(refcounts, &|h| h.refcount_table_offset.0 = 0x1001, 0x5000);
    bad(refcounts, &|h| h.refcount_table_offset.0 = 0, 0x5000);
    bad(refcounts, &|h| h.refcount_table_clusters = 5, 0x5000);
    bad(refcounts, &|h| h.refcount_table_offset.0 = 1 << 63, 0x5000);
    bad(snapshots, &|h| h.snapshots_offset.0 = 0x4008, 0x5000);
    bad(snapshots, &|h| h.snapshots_offset.0 = 0, 0x5000);
    bad(snapshots, &|h| h.snapshots_offset.0 = 0x3000, 0x5000);
    bad(snapshots, &|_| {}, 0x4000 + 39);
    bad(l1, &|h| h.refcount_table_clusters = 3, 0x5000);
    for (i, (field, header, size)) in headers.iter().enumerate() {
        match header.check_placement(*size) {
            Err(Error::Header { field: named, .. }) => assert_eq!(named, *field, "case {i}"),
            other => panic!("case {i}: {other:?}"),
        }
    }
    let empty = Header { l1_entries: 0, l1_offset: HostOffset(0), ..plain(3) };
    empty.check_placement(0x3000).unwrap();
}

#[test]
fn a_header_that_does_not_fit_is_refused() {
    let mut header = plain(3);
    header.extensions = vec![ext(5, &[0; 4096])];
    assert!(matches!(header.encode(), Err(Error::TooLarge { limit: 4096, .. })));
}
