//! Which L2 slices are read from the file when.

use std::sync::{Arc, Mutex};

use crate::decompressed::{Counting, memory};
use qcow2::image::{Image, OpenOptions};
use qcow2::storage::Storage;
use qcow2::storage::memory::MemoryStorage;

/// What a slice of 4 KiB maps with clusters of 64 KiB.
const COVERED: u64 = 32 << 20;
/// Slices of a table of that shape.
const IN_A_TABLE: u64 = 16;

/// An image of two L2 tables, open behind a storage that counts reads, and these.
type Counted = (Arc<MemoryStorage>, Image, Arc<Mutex<Vec<(u64, u64)>>>);

fn counted(cache: &str) -> Counted {
    let (storage, image) = memory(&[("preallocation", "metadata")], 2 * IN_A_TABLE * COVERED);
    image.close().unwrap();
    let reads = Arc::new(Mutex::new(Vec::new()));
    let below: Arc<dyn Storage> = Arc::new(Counting { below: storage.clone(), reads: reads.clone() });
    let mut options = OpenOptions::default();
    options.set("l2_cache_size", cache).unwrap();
    let image = Image::open_storage(below, &options).unwrap();
    reads.lock().unwrap().clear();
    (storage, image, reads)
}

/// Slices that each read of tables took, where 512 bytes are read in each of these slices.
fn loads(image: &Image, reads: &Mutex<Vec<(u64, u64)>>, slices: impl Iterator<Item = u64>) -> Vec<u64> {
    reads.lock().unwrap().clear();
    for slice in slices {
        image.pread(&mut [0; 512], slice * COVERED + 4096).unwrap();
    }
    let reads = reads.lock().unwrap();
    reads.iter().filter(|(_, bytes)| *bytes != 512).map(|(_, bytes)| bytes / 4096).collect()
}

#[test]
fn a_sequential_reader_finds_the_next_slices_loaded_and_others_load_one_at_a_time() {
    let (_, image, reads) = counted("1M");
    assert_eq!(loads(&image, &reads, 0..2 * IN_A_TABLE), [1, 2, 4, 8, 1, 16]); // a table ends after 16
    assert!(loads(&image, &reads, 0..2 * IN_A_TABLE).is_empty(), "all are cached");

    let (_, image, reads) = counted("1M");
    assert_eq!(loads(&image, &reads, (0..2 * IN_A_TABLE).rev()), [1; 32]);

    // Two readers, in turns.
    let (_, image, reads) = counted("1M");
    let turns = (0..8).flat_map(|n| [n, IN_A_TABLE + n]);
    assert_eq!(loads(&image, &reads, turns), [1, 1, 2, 2, 4, 4, 8, 8]);

    // Of a small cache, a load takes an eighth at most.
    let (_, image, reads) = counted("64k");
    assert_eq!(loads(&image, &reads, 0..IN_A_TABLE), [1, 2, 2, 2, 2, 2, 2, 2, 1]);
}

#[test]
fn what_is_loaded_on_the_way_replaces_nothing_newer() {
    let (storage, image, reads) = counted("1M");
    // Slice 5 is changed in the cache, and not on the disk.
    image.discard(5 * COVERED, 65536).unwrap();
    image.pwrite(&[7; 512], 5 * COVERED + 4096).unwrap();
    let before = loads(&image, &reads, 0..8);
    assert_eq!(before, [1, 2, 2, 2], "up to slice 5 and behind it");
    let mut found = [0; 512];
    image.pread(&mut found, 5 * COVERED + 4096).unwrap();
    assert_eq!(found, [7; 512]);
    image.close().unwrap();
    let image = Image::open_storage(storage, &OpenOptions::default()).unwrap();
    image.pread(&mut found, 5 * COVERED + 4096).unwrap();
    assert_eq!(found, [7; 512]);
}
