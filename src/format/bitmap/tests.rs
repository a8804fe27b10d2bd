use super::{
    BitmapEntry, BitmapsPointer, BitsAt, Error, Geometry, HostOffset, NAME_MAX, Result, bits_for,
    default_granularity_bits, encode_directory, parse_directory, table_entries_for,
};

const GEOMETRY: Geometry = Geometry { version: 3, cluster_bits: 16, extended_l2: false, refcount_order: 4 };

fn entry(name: &str) -> BitmapEntry {
    BitmapEntry {
        name: name.into(),
        granularity_bits: 16,
        in_use: false,
        auto: true,
        extra_data_compatible: false,
        extra_data: Vec::new(),
        table_offset: HostOffset(0x50000),
        table_entries: 1,
    }
}

fn parse(bytes: &[u8], count: u32) -> Result<Vec<BitmapEntry>> {
    let pointer = BitmapsPointer { count, directory_bytes: bytes.len() as u64, directory_offset: 0x40000 };
    parse_directory(bytes, pointer, GEOMETRY)
}

#[test]
fn a_directory_is_what_it_was_encoded_from() {
    let list = vec![
        entry("b0"),
        BitmapEntry { in_use: true, auto: false, granularity_bits: 31, ..entry("a name of\u{e9}") },
        BitmapEntry { extra_data: vec![1, 2, 3], extra_data_compatible: true, ..entry("extra") },
        BitmapEntry { table_entries: u32::MAX, ..entry(&"n".repeat(NAME_MAX)) },
    ];
    let bytes = encode_directory(&list).unwrap();
    assert_eq!(bytes.len(), list.iter().map(BitmapEntry::encoded_bytes).sum::<usize>());
    assert_eq!(parse(&bytes, 4).unwrap(), list);
    // The layout, by the numbers of the specification.
    assert_eq!(bytes[..8], 0x50000u64.to_be_bytes());
    assert_eq!(bytes[8..16], [0, 0, 0, 1, 0, 0, 0, 2]);
    assert_eq!(bytes[16..32], [1, 16, 0, 2, 0, 0, 0, 0, b'b', b'0', 0, 0, 0, 0, 0, 0]);
}

#[test]
fn what_is_wrong_with_an_entry_is_named() {
    let good = encode_directory(&[entry("one"), entry("two")]).unwrap();
    let with = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[32 + at..32 + at + value.len()].copy_from_slice(value);
        parse(&bytes, 2).unwrap_err()
    };
    for (at, value, field) in [
        (0, &[0; 8][..], "bitmap_table_offset"),
        (6, &[0x12], "bitmap_table_offset"),
        (0, &[1], "bitmap_table_offset"),
        (8, &[0; 4], "bitmap_table_size"),
        (15, &[8], "flags"),
        (12, &[0x80], "flags"),
        (16, &[0], "type"),
        (16, &[2], "type"),
        (17, &[64], "granularity_bits"),
        (18, &[0, 0], "name_size"),
        (18, &[4, 0], "name_size"),
        (20, &[0xff; 4], "extra_data_size"),
        (20, &[0, 0, 0, 16], "extra_data_size"),
        (24, b"one", "name"),
        (24, b"\xff", "name"),
        (24, b"\0", "name"),
    ] {
        match with(at, value) {
            Error::BitmapDirectory { entry: 1, field: found, .. } => assert_eq!(found, field, "{at}: {value:?}"),
            other => panic!("{at}: {value:?}: {other}"),
        }
    }
    for (bytes, count) in [(&good[..], 1), (&good[..], 3), (&good[..40], 2), (&good[..63], 2), (&[][..], 1)] {
        let e = parse(bytes, count).unwrap_err();
        let Error::BitmapDirectory { field, .. } = e else { panic!("{e}") };
        assert!(field == "bitmap_directory_size" || field == "extra_data_size", "{field}");
    }
}

#[test]
fn no_bytes_make_the_parser_panic_or_read_past_the_end() {
    let good = encode_directory(&[entry("one"), BitmapEntry { extra_data: vec![7; 20], ..entry("two") }]).unwrap();
    for at in 0..good.len() {
        for value in [0, 1, 2, 0x7f, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            if let Ok(list) = parse(&bytes, 2) {
                // What is accepted is written as it was read, but for the padding.
                assert_eq!(parse(&encode_directory(&list).unwrap(), 2).unwrap(), list);
            }
        }
    }
    for length in 0..good.len() {
        assert!(parse(&good[..length], 2).is_err(), "{length} of {} bytes", good.len());
    }
}

#[test]
fn table_entries() {
    for (word, expected) in [
        (0, Some(BitsAt::Zeroes)),
        (1, Some(BitsAt::Ones)),
        (0x50000, Some(BitsAt::Cluster(HostOffset(0x50000)))),
        (0x50001, None),
        (0x50200, None),
        (2, None),
        (0x100, None),
        (1 << 56, None),
        (u64::MAX, None),
    ] {
        let found = BitsAt::decode(word, GEOMETRY);
        assert_eq!(found, expected, "0x{word:x}");
        assert!(found.is_none_or(|found| found.encode() == word));
    }
}

#[test]
fn sizes_follow_the_disk() {
    assert_eq!(bits_for(0, 16), 0);
    assert_eq!((bits_for(1, 16), bits_for(65536, 16), bits_for(65537, 16)), (1, 1, 2));
    // One cluster of 64 KiB has 2^19 bits, which are 32 GiB at 64 KiB each.
    assert_eq!(table_entries_for(32 << 30, 16, GEOMETRY), 1);
    assert_eq!(table_entries_for((32 << 30) + 1, 16, GEOMETRY), 2);
    assert_eq!(default_granularity_bits(Geometry { cluster_bits: 9, ..GEOMETRY }), 12);
    assert_eq!(default_granularity_bits(Geometry { cluster_bits: 21, ..GEOMETRY }), 16);
}

#[test]
fn what_cannot_be_used_says_why() {
    let size = 1 << 30;
    assert_eq!(entry("a").unusable(size, GEOMETRY), None);
    let extra = BitmapEntry { extra_data: vec![0], ..entry("a") };
    assert!(extra.unusable(size, GEOMETRY).unwrap().contains("extra data"));
    assert_eq!(BitmapEntry { extra_data_compatible: true, ..extra }.unusable(size, GEOMETRY), None);
    for granularity_bits in [0, 8, 32, 63] {
        let odd = BitmapEntry { granularity_bits, ..entry("a") };
        assert!(odd.unusable(size, GEOMETRY).unwrap().contains("granularity"));
    }
    let resized = BitmapEntry { table_entries: 2, ..entry("a") };
    assert!(resized.unusable(size, GEOMETRY).unwrap().contains("size"));
    let large = BitmapEntry { table_entries: 8193, ..entry("a") };
    assert!(large.unusable(size, GEOMETRY).unwrap().contains("512 MiB"));
}
