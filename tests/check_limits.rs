//! Checks of images that are far larger than memory, or claim to be: memory stays within its bound, the result is the
//! same as with plenty of it, and a repair copes.

#[path = "hostile/guarded.rs"]
#[allow(dead_code)] // the heap alone is used
mod guarded;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use guarded::Heap;
use qcow2::image::check::{CheckOptions, CheckResult, FindingKind, Repair, check_with};
use qcow2::image::{CreateOptions, Image, OpenOptions, create_with};
use qcow2::storage::{Blocking, IoDst, IoSrc, Storage};
use qcow2::wait::block_on;

#[global_allocator]
static HEAP: Heap = Heap;

const PAGE: u64 = 4096;

/// A file of which only the pages exist that were written.
#[derive(Default)]
struct Sparse(Mutex<(BTreeMap<u64, Vec<u8>>, u64)>);

impl Sparse {
    fn each(offset: u64, length: usize, mut each: impl FnMut(u64, usize, usize, usize)) {
        let mut done = 0;
        while done < length {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let n = (PAGE as usize - within).min(length - done);
            each(at / PAGE, within, done, n);
            done += n;
        }
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        let (pages, size) = &mut *self.0.lock().unwrap();
        *size = (*size).max(offset + bytes.len() as u64);
        Self::each(offset, bytes.len(), |page, within, done, n| {
            let is_zero = bytes[done..done + n].iter().all(|byte| *byte == 0);
            if !is_zero || pages.contains_key(&page) {
                let page = pages.entry(page).or_insert_with(|| vec![0; PAGE as usize]);
                page[within..within + n].copy_from_slice(&bytes[done..done + n]);
            }
        });
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(&[IoDst::from(&mut bytes[..])], at).unwrap();
        u64::from_be_bytes(bytes)
    }
}

impl Storage for Sparse {
    fn read(&self, pieces: &[IoDst<'_>], mut offset: u64) -> io::Result<usize> {
        let (pages, size) = &*self.0.lock().unwrap();
        let mut total = 0;
        for piece in pieces {
            let n = size.saturating_sub(offset).min(piece.len() as u64) as usize;
            piece.slice(0, n).fill_zero();
            Self::each(offset, n, |page, within, done, n| {
                if let Some(page) = pages.get(&page) {
                    piece.slice(done, n).copy_from(&page[within..within + n]);
                }
            });
            total += n;
            offset += n as u64;
        }
        Ok(total)
    }
    fn write(&self, pieces: &[IoSrc<'_>], mut offset: u64) -> io::Result<()> {
        for piece in pieces {
            let mut bytes = vec![0; piece.len()];
            piece.copy_to(&mut bytes);
            self.put(offset, &bytes);
            offset += bytes.len() as u64;
        }
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().1)
    }
    fn truncate(&self, size: u64) -> io::Result<()> {
        self.0.lock().unwrap().1 = size;
        Ok(())
    }
}

fn check(storage: &Arc<Sparse>, repair: Repair, memory_bytes: u64) -> (CheckResult, Vec<FindingKind>) {
    let mut kinds = Vec::new();
    let mut note = |finding: &qcow2::image::check::Finding| kinds.push(finding.kind);
    let mut options = CheckOptions { repair, memory_bytes, on_finding: Some(&mut note), on_progress: None };
    let storage = Arc::clone(storage) as Arc<dyn Storage>;
    let result = block_on(check_with(&Blocking, storage, "sparse", &OpenOptions::default(), &mut options)).unwrap();
    (result, kinds)
}

/// Places with data: more than the counters of 1 MiB have chunks for.
const PLACES: u64 = 120;
const CLUSTER: u64 = 256 << 10;

/// A disk of 1 PiB with data in some places.
fn huge() -> Arc<Sparse> {
    let storage = Arc::new(Sparse::default());
    let mut options = CreateOptions::default();
    options.set("cluster_size", "256k").unwrap();
    block_on(create_with(&Blocking, &*storage, 1 << 50, &options)).unwrap();
    let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    for i in 0..PLACES {
        image.pwrite(&[i as u8 + 1; 512], i * ((1 << 50) / PLACES) / 512 * 512).unwrap();
    }
    image.close().unwrap();
    storage
}

#[test]
fn a_petabyte_is_checked_and_repaired_in_bounded_memory() {
    let storage = huge();
    let sound = check(&storage, Repair::Nothing, 1 << 20).0;
    assert_eq!((sound.corruptions, sound.leaks, sound.allocated_clusters), (0, 0, PLACES));
    assert_eq!(sound.total_clusters, 1 << 32);

    // Data moves to the far end of the file, each cluster into a chunk of its own, where no refcount block is.
    let l1 = storage.word(40);
    let mut moved = 0;
    for index in 0..storage.word(32) & 0xffff_ffff {
        let table = storage.word(l1 + index * 8) & 0x00ff_ffff_ffff_fe00;
        for entry in (table..table + CLUSTER).step_by(8).filter(|_| table != 0) {
            let old = storage.word(entry) & 0x00ff_ffff_ffff_fe00;
            if old != 0 {
                let mut bytes = vec![0; CLUSTER as usize];
                storage.read(&[IoDst::from(&mut bytes[..])], old).unwrap();
                let new = (1 << 49) + moved * (1 << 34);
                storage.put(new, &bytes);
                storage.put(entry, &(new | 1 << 63).to_be_bytes());
                moved += 1;
            }
        }
    }
    assert_eq!(moved, PLACES);
    storage.truncate(1 << 50).unwrap();
    let start = Heap::start();
    let small = check(&storage, Repair::Nothing, 1 << 20);
    let heap = Heap::peak_since(start);
    assert!(heap < 24 << 20, "{heap} bytes");
    assert_eq!(small.0, check(&storage, Repair::Nothing, 1 << 30).0, "little memory or much");
    assert_eq!((small.0.corruptions, small.0.leaks), (2 * PLACES, PLACES));
    let (repaired, _) = check(&storage, Repair::All, 1 << 20);
    assert_eq!((repaired.corruptions, repaired.leaks, repaired.leaks_fixed), (0, 0, PLACES));
    let image = Image::open_storage(storage.clone(), &OpenOptions { read_only: true, ..Default::default() }).unwrap();
    for i in 0..PLACES {
        let mut found = [0; 512];
        image.pread(&mut found, i * ((1 << 50) / PLACES) / 512 * 512).unwrap();
        assert_eq!(found, [i as u8 + 1; 512]);
    }
}

/// One L2 table behind every entry of an L1 table of 16 MiB: read once, counted two million times.
#[test]
fn a_table_that_everything_refers_to_is_read_once() {
    let storage = Arc::new(Sparse::default());
    block_on(create_with(&Blocking, &*storage, 1 << 50, &CreateOptions::default())).unwrap();
    let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    image.pwrite(&[1; 65536], 0).unwrap();
    image.close().unwrap();
    let l1 = storage.word(40);
    let entry = storage.word(l1).to_be_bytes();
    let table: Vec<u8> = std::iter::repeat_n(entry, (1 << 50) / (1 << 29)).flatten().collect();
    storage.put(l1, &table);
    let (result, kinds) = check(&storage, Repair::Nothing, 1 << 20);
    assert_eq!(result.allocated_clusters, 1 << 21);
    assert!(kinds.contains(&FindingKind::CountTooLow) || kinds.contains(&FindingKind::CountOverflow), "{kinds:?}");
}
