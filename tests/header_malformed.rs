//! Malformed headers: each is refused with an error that names what is wrong, and nothing is written.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use qcow2::error::{Error, ErrorCode, Result};
use qcow2::format::Header;
use qcow2::image::{CreateOptions, Image, OpenOptions, create_with, load_header};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::{Blocking, IoDst, IoSrc, Storage};
use qcow2::wait::block_on;

/// A storage that nobody may change.
struct Untouchable(MemoryStorage);

impl Storage for Untouchable {
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> std::io::Result<usize> {
        self.0.read(pieces, offset)
    }
    fn write(&self, _: &[IoSrc<'_>], offset: u64) -> std::io::Result<()> {
        panic!("a refused image is written to at {offset}")
    }
    fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn size(&self) -> std::io::Result<u64> {
        self.0.size()
    }
    fn truncate(&self, size: u64) -> std::io::Result<()> {
        panic!("a refused image is truncated to {size}")
    }
}

/// The three checks of a header, and the opens that are made of them: they agree, and none of them writes.
fn open(bytes: &[u8]) -> Result<Header> {
    let storage = Arc::new(Untouchable(MemoryStorage::new(bytes.to_vec())));
    let loaded = block_on(load_header(&Blocking, &*storage));
    let result = loaded.clone().and_then(|header| {
        header.check_supported()?;
        header.check_placement(bytes.len() as u64)?;
        Ok(header)
    });
    for (read_only, inspect) in [(false, false), (true, false), (false, true)] {
        let base: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
        let options = OpenOptions { read_only, inspect, backing_storages: vec![base], ..Default::default() };
        // An open for writing repairs a dirty image.
        let is_dirty = result.as_ref().is_ok_and(|header| header.incompatible & 1 != 0);
        let opened = match is_dirty && !read_only && !inspect {
            true => Image::open_storage(Arc::new(MemoryStorage::new(bytes.to_vec())), &options),
            false => Image::open_storage(storage.clone(), &options),
        };
        let expected = if inspect { loaded.as_ref().err() } else { result.as_ref().err() };
        match (opened, expected) {
            (Err(found), Some(expected)) => assert_eq!(found, *expected, "read_only {read_only}, inspect {inspect}"),
            (Ok(_), Some(expected)) => panic!("opened in spite of: {expected}"),
            (Err(found), None) => {
                // Sound, but not to be written, or with a table that is refused for what is in it.
                let allowed = matches!(found, Error::MarkedCorrupt | Error::NeedsRepair if !read_only)
                    || matches!(found, Error::Corrupt(_) | Error::BackingFormat { .. } | Error::Unsupported { .. })
                    || matches!(found, Error::DataFileMissing);
                assert!(allowed && !inspect, "read_only {read_only}: {found}");
            }
            (Ok(image), None) => image.close().unwrap(),
        }
    }
    assert_eq!(storage.0.snapshot(), bytes);
    result
}

/// A good image with 4 KiB clusters: refcount table at 0x1000, block at 0x2000, L1 at 0x3000, a backing file name.
fn sample(settings: &[(&str, &str)]) -> Vec<u8> {
    let mut options = CreateOptions::default();
    for (key, value) in [("cluster_size", "4k"), ("backing_file", "base.img"), ("backing_fmt", "raw")] {
        options.set(key, value).unwrap();
    }
    for (key, value) in settings {
        options.set(key, value).unwrap();
    }
    let storage = MemoryStorage::default();
    block_on(create_with(&Blocking, &storage, 1 << 20, &options)).unwrap();
    let bytes = storage.snapshot();
    open(&bytes).unwrap();
    bytes
}

/// A field of `width` bytes as the specification places it; written here a second time, on purpose.
fn put(bytes: &mut [u8], at: usize, width: usize, value: u64) {
    bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

/// Puts an extension in front of the others (the sample's first one is at 112) and moves the name behind them.
fn insert_extension(bytes: &mut [u8], kind: u32, length: u32, data: &[u8]) {
    let padded = 8 + data.len().next_multiple_of(8);
    bytes.copy_within(112..2048, 112 + padded);
    bytes[112..112 + padded].fill(0);
    put(bytes, 112, 4, kind.into());
    put(bytes, 116, 4, length.into());
    bytes[120..120 + data.len()].copy_from_slice(data);
    let name = u64::from_be_bytes(bytes[8..16].try_into().unwrap());
    put(bytes, 8, 8, name + padded as u64);
}

#[track_caller]
fn expect_header_error(bytes: &[u8], field: &str, value: u64, context: &str) {
    let error = open(bytes).map(|_| ()).expect_err(context);
    let text = error.to_string();
    match &error {
        Error::Header { field: named, value: found, expected } => {
            assert_eq!((*named, *found), (field, value), "{context}: {text}");
            assert!(text.contains(named) && text.contains(&found.to_string()) && text.contains(expected), "{text}");
            assert!(!expected.is_empty());
        }
        other => panic!("{context}: {other:?}"),
    }
    assert_eq!(error.code(), ErrorCode::BadHeader);
    assert_eq!(error.errno(), libc::EINVAL);
}

#[test]
fn each_malformed_field_is_named() {
    // Offset, width, name, bad values.
    let fields: [(usize, usize, &str, &[u64]); 20] = [
        (4, 4, "version", &[0, 1, 4, 0x0300_0000, u32::MAX as u64]),
        (8, 8, "backing_file_offset", &[1, 71, 103, 4089, 4096, 1 << 32, u64::MAX]),
        (16, 4, "backing_file_size", &[0, 1024, u32::MAX as u64]),
        (20, 4, "cluster_bits", &[0, 8, 22, 63, 64, u32::MAX as u64]),
        (24, 8, "size", &[(2 << 40) * 4 + 1, 1 << 63, u64::MAX]),
        (32, 4, "crypt_method", &[3, u32::MAX as u64]),
        (36, 4, "l1_size", &[0, (1 << 22) + 1, u32::MAX as u64]),
        (40, 8, "l1_table_offset", &[0, 1, 0x3200, 0x4000, 1 << 55, u64::MAX, u64::MAX - 4095]),
        (48, 8, "refcount_table_offset", &[0, 1, 0x1008, 0x4000, 1 << 63, u64::MAX - 4095]),
        (56, 4, "refcount_table_clusters", &[0, 2049, u32::MAX as u64]),
        (60, 4, "nb_snapshots", &[65537, u32::MAX as u64]),
        (60, 4, "snapshots_offset", &[0]), // one snapshot, and no table
        (88, 8, "autoclear_features", &[2]),
        (96, 4, "refcount_order", &[7, 64, u32::MAX as u64]),
        (100, 4, "header_length", &[0, 72, 103, 105, 4104, u32::MAX as u64]),
        (104, 1, "compression_type", &[1, 2, 255]),
        (72, 8, "compression_type", &[0]),                    // bit 3 without a type
        (72, 8, "cluster_bits", &[12]),                       // extended L2 entries with small clusters
        (88, 8, "autoclear_features", &[1]),                  // bitmaps bit without the extension
        (32, 4, "full disk encryption header pointer", &[0]), // LUKS without its header
    ];
    let sample = sample(&[]);
    let mut tried = 0;
    for (at, width, field, values) in fields {
        for &value in values {
            let mut bytes = sample.clone();
            // Where it is not the field itself that is wrong, what makes it so:
            let stored = match (at, field) {
                (60, "snapshots_offset") => 1,
                (72, "compression_type") => 8,
                (72, "cluster_bits") => 16,
                (32, "full disk encryption header pointer") => 2,
                _ => value,
            };
            put(&mut bytes, at, width, stored);
            expect_header_error(&bytes, field, value, &format!("{field} = {stored:#x}"));
            tried += 1;
        }
    }
    assert!(tried > 50, "{tried}");
}

#[test]
fn each_text_is_its_own() {
    // Different mistakes in one field do not share a text.
    let sample = sample(&[]);
    let text = |at, width, value| {
        let mut bytes = sample.clone();
        put(&mut bytes, at, width, value);
        match open(&bytes) {
            Err(Error::Header { expected, .. }) => expected,
            other => panic!("{at}: {value}: {other:?}"),
        }
    };
    for (at, width, values) in [
        (8, 8, vec![71, 4090]),                      // before the end of the header; past the cluster
        (36, 4, vec![0, u32::MAX.into()]),           // too few; too many
        (40, 8, vec![0, 0x3001, 0x1000, 0x10_0000]), // header; unaligned; overlap; outside
        (56, 4, vec![0, 4096]),                      // none; too many
        (100, 4, vec![105, 8192]),                   // unaligned; longer than the cluster
    ] {
        let mut texts: Vec<_> = values.iter().map(|&value| text(at, width, value)).collect();
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), values.len(), "{texts:?}");
    }
}

#[test]
fn truncated_files() {
    for (version, shortest) in [("v2", 72), ("v3", 104)] {
        let bytes = sample(&[("compat", version)]);
        for length in 0..=104 {
            let cut = &bytes[..length];
            if length < shortest {
                expect_header_error(cut, "file length", length as u64, version);
            } else {
                // The fields are there; what they point to is not.
                let error = open(cut).map(|_| ()).expect_err("cut");
                assert!(matches!(error, Error::Header { .. }), "{version} {length}: {error}");
            }
        }
        // Cut anywhere in the first cluster, or in front of the end of the L1 table.
        for length in (105..4096).step_by(7).chain([0x1000, 0x2000, 0x3000, 0x3000 + 7]) {
            let error = open(&bytes[..length.min(bytes.len())]).map(|_| ());
            assert!(matches!(error, Err(Error::Header { .. })), "{version} {length}: {error:?}");
        }
    }
}

#[test]
fn other_files_are_not_qcow2() {
    for magic in [0, 1, 0x5146_49fa, 0x514f_5743, u32::MAX] {
        let mut bytes = sample(&[]);
        put(&mut bytes, 0, 4, magic.into());
        let error = open(&bytes).unwrap_err();
        assert_eq!(error, Error::NotQcow2 { magic });
        assert!(error.to_string().contains(&format!("0x{magic:08x}")), "{error}");
        assert_eq!(error.code(), ErrorCode::NotQcow2);
    }
}

#[test]
fn extensions_that_overrun() {
    for kind in [0xe279_2acau32, 0x6803_f857, 0x2385_2875, 0x0537_be77, 0x4441_5441, 0x1234_5678] {
        for length in [1025u32, 4096, 0x7fff_ffff, 0xffff_fff8, u32::MAX] {
            let mut bytes = sample(&[]);
            insert_extension(&mut bytes, kind, length, &[]);
            expect_header_error(&bytes, "header extension length", length.into(), &format!("{kind:x}"));
        }
    }
    // One byte more than there is before the name.
    let mut bytes = sample(&[]);
    let name = u64::from_be_bytes(bytes[8..16].try_into().unwrap());
    put(&mut bytes, 116, 4, name - 120 + 1);
    expect_header_error(&bytes, "header extension length", name - 120 + 1, "into the name");
}

#[test]
fn malformed_extensions() {
    let with = |kind, data: &[u8]| {
        let mut bytes = sample(&[]);
        insert_extension(&mut bytes, kind, data.len() as u32, data);
        bytes
    };
    expect_header_error(&with(0xe279_2aca, b"qcow2"), "header extension type", 0xe279_2aca, "twice");
    expect_header_error(&with(0x4441_5441, b""), "external data file name length", 0, "empty");
    expect_header_error(&with(0x4441_5441, b"a\nb"), "external data file name", 10, "newline");
    let crypt = "full disk encryption header pointer";
    expect_header_error(&with(0x0537_be77, &[0; 16]), crypt, 16, "without LUKS");
    let mut luks = with(0x0537_be77, &[0, 0, 0, 0, 0, 0, 0x40, 1, 0, 0, 0, 0, 0, 0, 1, 0]);
    put(&mut luks, 32, 4, 2);
    expect_header_error(&luks, crypt, 0x4001, "unaligned");
    let mut bitmaps = with(0x2385_2875, &[0; 24]);
    open(&bitmaps).expect("without its autoclear bit the extension is not looked at");
    put(&mut bitmaps, 88, 8, 1);
    expect_header_error(&bitmaps, "nb_bitmaps", 0, "no bitmaps");
    // The sample's own format name.
    let mut bytes = sample(&[]);
    put(&mut bytes, 116, 4, 0);
    expect_header_error(&bytes, "backing file format name length", 0, "empty");
    let mut bytes = sample(&[]);
    bytes[121] = 0xc3;
    expect_header_error(&bytes, "backing file format name", 0xc3, "not UTF-8");
}

#[test]
fn backing_names_that_read_as_another_name() {
    for (byte, at) in [(0u8, 0usize), (0, 7), (b'\n', 3), (0x1b, 3), (0x7f, 1), (0xff, 2)] {
        let mut bytes = sample(&[]);
        let name = u64::from_be_bytes(bytes[8..16].try_into().unwrap()) as usize;
        bytes[name + at] = byte;
        expect_header_error(&bytes, "backing file name", byte.into(), "");
    }
}

#[test]
fn overlapping_tables() {
    let mut bytes = sample(&[]);
    put(&mut bytes, 40, 8, 0x1000);
    expect_header_error(&bytes, "l1_table_offset", 0x1000, "L1 on the refcount table");
    let mut bytes = sample(&[]);
    put(&mut bytes, 56, 4, 3); // 0x1000 to 0x4000
    expect_header_error(&bytes, "l1_table_offset", 0x3000, "refcount table over L1");
    for other in [0x1000, 0x3000] {
        let mut bytes = sample(&[]);
        put(&mut bytes, 60, 4, 1);
        put(&mut bytes, 64, 8, other);
        expect_header_error(&bytes, "snapshots_offset", other, "snapshot table on another");
    }
}

#[track_caller]
fn expect_unsupported(bytes: &[u8], named: &[&str]) {
    let error = open(bytes).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
    assert_eq!((error.code(), error.errno()), (ErrorCode::Unsupported, libc::ENOTSUP));
    for name in named {
        assert!(text.contains(name), "{name} is not in: {text}");
    }
}

#[test]
fn what_is_not_supported_is_named() {
    for bit in 5..64u32 {
        let mut bytes = sample(&[]);
        put(&mut bytes, 72, 8, 1 << bit);
        expect_unsupported(&bytes, &[&format!("bit {bit}")]);
    }
    // Named by the image's feature name table: of the right kind and bit only.
    let mut bytes = sample(&[]);
    let mut table = Vec::new();
    for (kind, bit, name) in
        [(1u8, 33u8, "compatible"), (2, 33, "autoclear"), (0, 34, "neighbour"), (0, 33, "time travel")]
    {
        let end = table.len() + 48;
        table.extend([kind, bit]);
        table.extend(name.bytes());
        table.resize(end, 0);
    }
    insert_extension(&mut bytes, 0x6803_f857, table.len() as u32, &table);
    put(&mut bytes, 72, 8, 1 << 33 | 1 << 50);
    expect_unsupported(&bytes, &["'time travel' (incompatible feature bit 33)", "bit 50"]);
    let mut bytes = sample(&[]);
    put(&mut bytes, 32, 4, 1);
    expect_unsupported(&bytes, &["encryption", "AES"]);
    let mut bytes = sample(&[]);
    put(&mut bytes, 32, 4, 2);
    insert_extension(&mut bytes, 0x0537_be77, 16, &[0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    expect_unsupported(&bytes, &["encryption", "LUKS"]);
    let mut bytes = sample(&[("compression_type", "zstd")]);
    bytes[104] = 9;
    expect_unsupported(&bytes, &["compression type 9"]);
}

#[test]
fn unknown_compatible_and_autoclear_bits_are_accepted_and_kept() {
    let mut bytes = sample(&[]);
    put(&mut bytes, 80, 8, !0);
    put(&mut bytes, 88, 8, !3);
    let header = open(&bytes).unwrap();
    assert_eq!((header.compatible, header.autoclear), (!0, !3));
}

/// Every single bit of the first 512 bytes, flipped: a verdict each time, and no panic.
#[test]
fn each_bit_flipped() {
    let sample = sample(&[]);
    let mut refused = 0;
    for bit in 0..512 * 8 {
        let mut bytes = sample.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        match open(&bytes) {
            Ok(header) => assert!(header.encode().is_ok() || header.geometry.cluster_bits != 12, "bit {bit}"),
            Err(Error::Header { .. } | Error::NotQcow2 { .. } | Error::Unsupported { .. }) => refused += 1,
            Err(other) => panic!("bit {bit}: {other:?}"),
        }
    }
    assert!(refused > 400, "{refused}");
}

/// The same through a path: the file's bytes and its time of modification stay.
#[test]
fn a_refused_file_is_left_as_it_was() {
    let dir = std::env::temp_dir().join(format!("libqcow2-malformed-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let path = dir.join("image");
    let good = sample(&[]);
    let changed = |at: usize, width: usize, value: u64| {
        let mut bytes = good.clone();
        put(&mut bytes, at, width, value);
        bytes
    };
    let dirty_and_unknown = {
        let mut bytes = changed(72, 8, 1 | 1 << 60);
        put(&mut bytes, 88, 8, 1 << 63); // an autoclear bit that a first write would clear
        bytes
    };
    let v2 = sample(&[("compat", "v2")]);
    let cases = [changed(20, 4, 30), changed(40, 8, 77), changed(72, 8, 2), dirty_and_unknown, v2[..100].to_vec()];
    for (i, bytes) in cases.iter().enumerate() {
        fs::write(&path, bytes).unwrap();
        let before = fs::metadata(&path).unwrap().modified().unwrap();
        for options in [OpenOptions::default(), OpenOptions { inspect: true, ..Default::default() }] {
            let result = Image::open(Path::new(&path), &options);
            assert!(result.is_err() || options.inspect, "case {i}");
        }
        assert_eq!(fs::read(&path).unwrap(), *bytes, "case {i}");
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before, "case {i}");
    }
    fs::remove_dir_all(&dir).unwrap();
}
