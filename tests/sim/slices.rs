//! Which L2 slices are read from the file when.

use std::io;
use std::sync::{Arc, Mutex};

use crate::decompressed::{Counting, memory};
use qcow2::image::{Image, OpenOptions, ZeroFlags};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::{IoDst, IoSrc, Storage};

/// What a slice of 4 KiB maps with clusters of 64 KiB.
const COVERED: u64 = 32 << 20;
/// Slices of a table of that shape.
const IN_A_TABLE: u64 = 16;

/// An image of two L2 tables, open behind a storage that notes reads, and these.
type Counted = (Image, Arc<Mutex<Vec<(u64, u64)>>>);

fn counted(cache: &str) -> Counted {
    let (storage, image) = memory(&[("preallocation", "metadata")], 2 * IN_A_TABLE * COVERED);
    image.close().unwrap();
    let reads = Arc::new(Mutex::new(Vec::new()));
    let below: Arc<dyn Storage> = Arc::new(Counting { below: storage, reads: reads.clone() });
    let mut options = OpenOptions::default();
    options.set("l2_cache_size", cache).unwrap();
    let image = Image::open_storage(below, &options).unwrap();
    reads.lock().unwrap().clear();
    (image, reads)
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
    let (image, reads) = counted("1M");
    assert_eq!(loads(&image, &reads, 0..2 * IN_A_TABLE), [1, 2, 4, 8, 1, 16]); // a table ends after 16
    assert!(loads(&image, &reads, 0..2 * IN_A_TABLE).is_empty(), "all are cached");

    let (image, reads) = counted("1M");
    assert_eq!(loads(&image, &reads, (0..2 * IN_A_TABLE).rev()), [1; 32]);

    // Two readers, in turns.
    let (image, reads) = counted("1M");
    let turns = (0..8).flat_map(|n| [n, IN_A_TABLE + n]);
    assert_eq!(loads(&image, &reads, turns), [1, 1, 2, 2, 4, 4, 8, 8]);

    // Of a small cache, a load takes an eighth at most.
    let (image, reads) = counted("64k");
    assert_eq!(loads(&image, &reads, 0..IN_A_TABLE), [1, 2, 2, 2, 2, 2, 2, 2, 1]);
}

/// A storage that does something when it is next asked for at least 4 KiB, after it has read them.
struct Interrupted {
    below: Arc<MemoryStorage>,
    then: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Storage for Interrupted {
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        let got = self.below.read(pieces, offset);
        let is_table = pieces.iter().map(|piece| piece.len()).sum::<usize>() >= 4096;
        if let Some(then) = is_table.then(|| self.then.lock().unwrap().take()).flatten() {
            then();
        }
        got
    }

    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        self.below.write(pieces, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.below.flush()
    }

    fn size(&self) -> io::Result<u64> {
        self.below.size()
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        self.below.truncate(size)
    }
}

/// A slice that is cached, and would be read once more on the way, because it follows one that is missing: while that read
/// is under way it is changed, written and evicted, so that what was read is old, and must not be taken for it.
#[test]
fn what_is_read_on_the_way_replaces_nothing_newer() {
    let (storage, image) = memory(&[("preallocation", "metadata")], 2 * IN_A_TABLE * COVERED);
    image.pwrite(&[7; 512], 2 * COVERED).unwrap();
    image.close().unwrap();
    let interrupted = Arc::new(Interrupted { below: storage, then: Mutex::default() });
    let mut options = OpenOptions::default();
    options.set("l2_cache_size", "64k").unwrap(); // 16 slices
    let image = Arc::new(Image::open_storage(interrupted.clone(), &options).unwrap());
    let first = |slice: u64| {
        let mut found = [0xaa; 512];
        image.pread(&mut found, slice * COVERED).unwrap();
        found[0]
    };
    assert_eq!((first(2), first(0)), (7, 0));
    let other = image.clone();
    *interrupted.then.lock().unwrap() = Some(Box::new(move || {
        other.write_zeroes(2 * COVERED, 65536, ZeroFlags::default()).unwrap();
        other.flush().unwrap();
        for slice in (8..2 * IN_A_TABLE).rev() {
            other.pread(&mut [0; 512], slice * COVERED).unwrap();
        }
    }));
    assert_eq!(first(1), 0); // goes on where slice 0 was loaded
    assert!(interrupted.then.lock().unwrap().is_none(), "it was loaded");
    assert_eq!(first(2), 0);
    image.close().unwrap();
}
