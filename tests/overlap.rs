//! The option `overlap_check`: tables that point into each kind of metadata, and every way of writing. Each class refuses
//! what it says, names it, and marks the image; what it does not say goes through.

use std::sync::Arc;

use qcow2::error::{CorruptionKind, Error, Structure};
use qcow2::format::GuestOffset;
use qcow2::image::options::OverlapCheck;
use qcow2::image::{
    BitmapOptions, CreateOptions, Image, OpenOptions, SnapshotFacts, WriteFlags, ZeroFlags, create_with,
};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::{Blocking, IoSrc};
use qcow2::wait::block_on;

const CLASSES: [OverlapCheck; 4] =
    [OverlapCheck::None, OverlapCheck::Constant, OverlapCheck::Cached, OverlapCheck::All];
const CLUSTER: u64 = 4096;
const COPIED: u64 = 1 << 63;
/// What an L2 table of such clusters covers.
const TABLE: u64 = 512 * CLUSTER;

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..][..8].copy_from_slice(&value.to_be_bytes());
}

/// An image with every structure, and where each of them is.
struct Sample {
    bytes: Vec<u8>,
    l2: u64,
    places: Vec<(Structure, u64, OverlapCheck)>, // host offset, and the first class that protects it
}

fn sample() -> Sample {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions { cluster_size_bytes: CLUSTER, ..CreateOptions::default() };
    block_on(create_with(&Blocking, &*storage, 2 * TABLE, &options)).unwrap();
    let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    image.pwrite(&[1; 3 * CLUSTER as usize], 0).unwrap();
    // Disabled: the entry of an enabled one changes with the first write.
    image.bitmap_add("bitmap", BitmapOptions { disabled: true, ..BitmapOptions::default() }).unwrap();
    image.snapshot_create("snapshot", &SnapshotFacts::default()).unwrap();
    image.pwrite(&[2; 3 * CLUSTER as usize], 0).unwrap();
    image.pwrite(&[3; CLUSTER as usize], TABLE).unwrap();
    image.close().unwrap();
    let bytes = storage.snapshot();
    let header = qcow2::format::Header::parse(&bytes[..CLUSTER as usize]).unwrap();
    let (l1, table) = (header.l1_offset.0, header.refcount_table_offset.0);
    let (l2, other) = (word(&bytes, l1) & !COPIED, word(&bytes, l1 + 8) & !COPIED);
    let inactive = word(&bytes, header.snapshots_offset.0);
    let pointer = qcow2::bitmap::stored::pointer(&header).unwrap().unwrap();
    let places = vec![
        (Structure::L1Table, l1, OverlapCheck::Constant),
        (Structure::RefcountTable, table, OverlapCheck::Constant),
        (Structure::SnapshotTable, header.snapshots_offset.0, OverlapCheck::Constant),
        (Structure::L2Table, other, OverlapCheck::Cached),
        (Structure::RefcountBlock, word(&bytes, table), OverlapCheck::Cached),
        (Structure::InactiveL1Table, inactive, OverlapCheck::All),
        (Structure::InactiveL2Table, word(&bytes, inactive) & !COPIED, OverlapCheck::All),
        (Structure::Bitmaps, pointer.directory_offset, OverlapCheck::All),
        (Structure::Bitmaps, word(&bytes, pointer.directory_offset), OverlapCheck::All),
    ];
    assert!(
        places
            .iter()
            .all(|(structure, at, _)| *at != 0 && at % CLUSTER == 0 && *at != l2 || panic!("{structure:?} {at}"))
    );
    Sample { bytes, l2, places }
}

fn open(bytes: &[u8], check: OverlapCheck) -> (Arc<MemoryStorage>, Image) {
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let options = OpenOptions { overlap_check: check, ..OpenOptions::default() };
    (storage.clone(), Image::open_storage(storage, &options).unwrap())
}

/// What a write came to: refused for the sake of a structure, or let through.
#[track_caller]
fn outcome(result: Result<(), Error>, storage: &MemoryStorage, image: &Image, at: u64) -> Option<Structure> {
    match result {
        Ok(()) => None,
        Err(error @ Error::Corrupt(found)) => {
            let structure = found.kind.structure().unwrap_or_else(|| panic!("{error}"));
            assert_eq!(found.value & 0x00ff_ffff_ffff_fe00, at, "what would be overwritten is not named: {error}");
            assert!(error.to_string().contains(structure.name()), "{error}");
            assert_eq!(word(&storage.snapshot(), 72) & 2, 2, "not marked corrupt");
            assert!(matches!(image.pwrite(&[0], 0), Err(Error::MarkedCorrupt)), "still takes writes");
            Some(structure)
        }
        Err(other) => panic!("{other}"),
    }
}

type Way = (&'static str, fn(&Image) -> Result<(), Error>);

/// Ways to change guest cluster 0.
const WAYS: [Way; 6] = [
    ("a write of a part", |image| image.pwrite(&[7; 512], 512)),
    ("a write of all of it", |image| image.pwrite(&[7; CLUSTER as usize], 0)),
    ("a write with its neighbours", |image| image.pwrite(&[7; 3 * CLUSTER as usize], 0)),
    ("zeroes", |image| image.write_zeroes(0, CLUSTER, ZeroFlags { may_unmap: true, ..ZeroFlags::default() })),
    ("a discard", |image| image.discard(0, CLUSTER)),
    ("a compressed write", |image| {
        let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
        image.write(&[IoSrc::from(&[7; CLUSTER as usize][..])], GuestOffset(0), flags)
    }),
];

#[test]
fn data_is_not_written_where_metadata_lies() {
    let sample = sample();
    let mut refused = 0;
    for (structure, at, from) in &sample.places {
        for copied in [COPIED, 0] {
            let mut bytes = sample.bytes.clone();
            put(&mut bytes, sample.l2, at | copied);
            for (way, write) in WAYS {
                for check in CLASSES {
                    let (storage, image) = open(&bytes, check);
                    let result = write(&image);
                    let expected = (check >= *from).then_some(*structure);
                    let what = format!("{way} over {structure:?}, {check:?}, COPIED {copied:x}");
                    assert_eq!(outcome(result, &storage, &image, *at), expected, "{what}");
                    if expected.is_some() {
                        drop(image);
                        let after = storage.snapshot();
                        let range = *at as usize..(*at + CLUSTER) as usize;
                        assert!(after[range.clone()] == bytes[range], "{what}: something was written there");
                        refused += 1;
                    }
                }
            }
        }
    }
    assert_eq!(refused, 2 * 6 * (3 * 3 + 2 * 2 + 4));
}

/// The header, which only a compressed cluster can lie in: offset 0 is none.
#[test]
fn a_compressed_cluster_in_the_header_is_not_freed() {
    let mut sample = sample();
    put(&mut sample.bytes, sample.l2, 1 << 62 | 512);
    for check in [OverlapCheck::Constant, OverlapCheck::Cached, OverlapCheck::All] {
        let (storage, image) = open(&sample.bytes, check);
        let Err(Error::Corrupt(found)) = image.pwrite(&[7; CLUSTER as usize], 0) else { panic!("let through") };
        assert_eq!(found.kind, CorruptionKind::ClusterInMetadata(Structure::Header));
        drop(image);
        assert!(storage.snapshot()[..72] == sample.bytes[..72]);
    }
}

/// Metadata that is counted as free: it is not handed out.
#[test]
fn metadata_that_counts_as_free_is_not_allocated() {
    let sample = sample();
    for (structure, at, from) in &sample.places {
        let mut bytes = sample.bytes.clone();
        let block = sample.places.iter().find(|(s, ..)| *s == Structure::RefcountBlock).unwrap().1;
        let count = (block + at / CLUSTER * 2) as usize;
        assert!(bytes[count + 1] > 0, "{structure:?} is not counted");
        bytes[count..count + 2].fill(0);
        for check in CLASSES {
            let (storage, image) = open(&bytes, check);
            // Until there are no others.
            let mut writes = (100..200).map(|cluster| image.pwrite(&[7; CLUSTER as usize], cluster * CLUSTER));
            let result = writes.find(Result::is_err).unwrap_or(Ok(()));
            match (result, check >= *from) {
                // What is constant, and the block that counts it, the allocator has always looked at.
                (Err(Error::Corrupt(found)), _) if found.kind == CorruptionKind::MetadataCountedFree => {
                    assert!(*from == OverlapCheck::Constant || *structure == Structure::RefcountBlock, "{structure:?}");
                }
                (result, true) => {
                    assert_eq!(outcome(result, &storage, &image, *at), Some(*structure), "{structure:?}, {check:?}");
                    assert!(storage.snapshot()[*at as usize..][..64] == bytes[*at as usize..][..64], "{structure:?}");
                }
                (result, false) => result.unwrap(),
            }
        }
    }
}

/// L1 entries that lead to something that is no L2 table, or somebody else's.
#[test]
fn l2_tables_are_not_written_over_other_metadata() {
    let sample = sample();
    let l1 = sample.places[0].1;
    for (structure, at, from) in sample.places.iter().filter(|(.., from)| *from > OverlapCheck::Constant) {
        // What lies there is read as entries before anything is written: it has to look like a table.
        let mut bytes = sample.bytes.clone();
        let target = if *structure == Structure::L2Table { sample.l2 } else { *at };
        put(&mut bytes, l1 + 8, target | COPIED);
        for check in [OverlapCheck::Cached, OverlapCheck::All].into_iter().filter(|check| check >= from) {
            let (storage, image) = open(&bytes, check);
            let result = image.pwrite(&[7; CLUSTER as usize], TABLE + 300 * CLUSTER);
            let Err(Error::Corrupt(found)) = result else { panic!("{structure:?}, {check:?}: {result:?}") };
            assert_eq!(found.kind, CorruptionKind::TableInStructure(*structure));
            assert_eq!((found.host_offset, found.value), (l1 + 8, target | COPIED));
            drop(image);
            let range = target as usize..(target + CLUSTER) as usize;
            assert!(storage.snapshot()[range.clone()] == bytes[range], "{structure:?}: something was written there");
        }
    }
}

/// Nothing is refused in a sound image, while its metadata moves about.
#[test]
fn sound_images_are_not_held_up() {
    for check in CLASSES {
        let (storage, image) = open(&sample().bytes, check);
        for round in 0..12u64 {
            let name = format!("taken {round}");
            image.snapshot_create(&name, &SnapshotFacts::default()).unwrap();
            for i in 0..20 {
                image.pwrite(&[round as u8; 5000], (round * 37 + i * 53) % 1000 * CLUSTER).unwrap();
            }
            image.bitmap_add(&name, Default::default()).unwrap();
            image.discard(round * 7 * CLUSTER, 9 * CLUSTER).unwrap();
            image.flush().unwrap();
            if round % 3 == 2 {
                image.snapshot_apply(&format!("taken {}", round - 1)).unwrap();
                image.snapshot_delete(&format!("taken {}", round - 2), None).unwrap();
                image.bitmap_remove(&format!("taken {}", round - 2)).unwrap();
            }
            image.pwrite(&[0xee; 3 * CLUSTER as usize], round * 31 * CLUSTER).unwrap();
            image.flush().unwrap();
        }
        image.close().unwrap();
        let mut options = qcow2::image::check::CheckOptions::default();
        let open = OpenOptions::default();
        let checked = qcow2::image::check::check_with(&Blocking, storage, "image", &open, &mut options);
        let result = block_on(checked).unwrap();
        assert!(result.is_sound() && result.leaks == 0, "{check:?}: {result:?}");
    }
}

/// A resize to the largest disk made each cluster that was handed out cost a search through the four million entries of
/// the new L1 table, and one operation took minutes. Found by fuzzing operations.
#[test]
fn a_check_does_not_search_the_whole_l1_table() {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions { cluster_size_bytes: 512, ..CreateOptions::default() };
    block_on(create_with(&Blocking, &*storage, 1 << 20, &options)).unwrap();
    let largest = (32 << 20) / 8 * (512 / 8) * 512;
    let writes = |check| {
        let options = OpenOptions { overlap_check: check, ..OpenOptions::default() };
        let image = Image::open_storage(Arc::new(MemoryStorage::new(storage.snapshot())), &options).unwrap();
        image.resize(largest, Default::default(), None).unwrap();
        let began = std::time::Instant::now();
        for n in 0..100 {
            image.pwrite(&[7; 512], n * (largest / 100) / 512 * 512).unwrap(); // a table and a cluster each
        }
        image.flush().unwrap();
        began.elapsed()
    };
    // In turns, so that what else the machine does meets both. The search took thousands of times as long.
    let mut rounds = (0..3).map(|_| (writes(OverlapCheck::All), writes(OverlapCheck::Constant)));
    let found = rounds.find(|(all, constant)| *all < *constant * 20);
    assert!(found.is_some(), "writes with all checks take more than 20 times as long");
}

#[test]
fn the_option_is_set_by_name() {
    let mut options = OpenOptions::default();
    assert_eq!(options.overlap_check, OverlapCheck::Constant);
    for (name, check) in ["none", "constant", "cached", "all"].into_iter().zip(CLASSES) {
        options.set("overlap_check", name).unwrap();
        assert_eq!(options.overlap_check, check);
    }
    assert!(options.set("overlap_check", "some").unwrap_err().to_string().contains("none, constant, cached or all"));
}
