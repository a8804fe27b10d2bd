//! Bugs of the tables, the allocator and their order on disk that a review found, each as small as it could be made.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::pass_on::pass_on;
use qcow2::error::CorruptionKind;
use qcow2::format::{GuestOffset, HostCluster, L1Index};
use qcow2::image::options::Discard;
use qcow2::image::{BackingFormat, CreateOptions, Image, OpenOptions, ZeroFlags, load_header};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::sim::{DiskImage, Scheduler, SimDisk, SimIo, Task};
use qcow2::storage::{Blocking, IoDst, IoSrc, Storage};
use qcow2::tables::file::HostFile;
use qcow2::tables::{Place, Tables};
use qcow2::wait::block_on;
use qcow2::{Error, Result};

const COPIED: u64 = 1 << 63;

/// What reached the storage, in order.
#[derive(Debug, Clone)]
enum Event {
    Write(u64, Vec<u8>),
    Flush,
    Punch,
}

/// Memory that keeps a log, and can claim once that the refcount table's root was not written although it was.
#[derive(Default)]
struct Recorder {
    memory: MemoryStorage,
    log: Mutex<Vec<Event>>,
    deny_root: AtomicBool,
}

impl Recorder {
    fn log(&self) -> Vec<Event> {
        self.log.lock().unwrap().clone()
    }
}

impl Storage for Recorder {
    pass_on!(memory: read size truncate);
    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let mut bytes = Vec::new();
        for piece in pieces {
            let start = bytes.len();
            bytes.resize(start + piece.len(), 0);
            piece.copy_to(&mut bytes[start..]);
        }
        self.log.lock().unwrap().push(Event::Write(offset, bytes));
        self.memory.write(pieces, offset)?;
        if offset == 48 && self.deny_root.swap(false, Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(5));
        }
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.log.lock().unwrap().push(Event::Flush);
        Ok(())
    }
    fn punch_hole(&self, _: u64, _: u64) -> io::Result<()> {
        self.log.lock().unwrap().push(Event::Punch);
        Ok(())
    }
}

fn options(text: &[(&str, &str)]) -> CreateOptions {
    let mut options = CreateOptions::default();
    for (key, value) in text {
        options.set(key, value).unwrap();
    }
    options
}

fn create(storage: &dyn Storage, size: u64, text: &[(&str, &str)]) {
    block_on(qcow2::image::create_with(&Blocking, storage, size, &options(text))).unwrap();
}

fn open(storage: &Arc<Recorder>) -> Result<Image> {
    let options = OpenOptions { discard: Discard::Unmap, ..OpenOptions::default() };
    Image::open_storage(storage.clone(), &options)
}

fn word(storage: &dyn Storage, at: u64) -> u64 {
    let mut bytes = [0; 8];
    storage.read(&[IoDst::from(&mut bytes[..])], at).unwrap();
    u64::from_be_bytes(bytes)
}

fn put(storage: &dyn Storage, at: u64, value: u64) {
    storage.write(&[IoSrc::from(&value.to_be_bytes()[..])], at).unwrap();
}

fn kind(error: &Error) -> Option<CorruptionKind> {
    match error {
        Error::Corrupt(found) => Some(found.kind),
        _ => None,
    }
}

/// A copied L2 table was announced as ours before the cached slices of the shared one were forgotten: for that moment
/// their stale COPIED flags counted, and what was linked into them was dropped.
#[test]
fn nobody_sees_that_a_table_is_ours_with_the_flags_of_the_shared_one() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
    create(&*storage, 512 << 30, &[("cluster_size", "2M")]);
    let last = (512 << 30) - 512;
    let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    image.pwrite(&[1; 512], last).unwrap();
    image.close().unwrap();
    let header = block_on(load_header(&Blocking, &*storage)).unwrap();
    let shared = word(&*storage, header.l1_offset.0) & !COPIED;
    let entry = word(&*storage, shared + (2 << 20) - 8);
    assert!(entry & COPIED != 0, "the flag that is stale once the table is shared");
    // The copy, without the flag. Its place does not matter: nothing is allocated here.
    let copy = storage.size().unwrap().next_multiple_of(2 << 20);
    put(&*storage, copy + (2 << 20) - 8, entry & !COPIED);
    let file = HostFile::new(storage.clone());
    let tables = block_on(Tables::load(&Blocking, file, &header, 8 << 20, 8 << 20)).unwrap();
    // Odd while the shared table is being replaced. What the reader sees counts if all of it was seen in one such time.
    let round = AtomicU64::new(0);
    const ROUNDS: u64 = 5_000;
    let seen = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = 0;
            loop {
                let before = round.load(Ordering::SeqCst);
                if before >= ROUNDS * 2 {
                    return seen;
                }
                let offered = matches!(tables.mapped(GuestOffset(last), 512, true), Place::At(_));
                seen += u32::from(offered && before % 2 == 1 && round.load(Ordering::SeqCst) == before);
            }
        });
        for _ in 0..ROUNDS {
            block_on(tables.replace_table(L1Index(0), shared, false));
            block_on(tables.load_slice(&Blocking, tables.geometry.slice_index(GuestOffset(last)))).unwrap();
            round.fetch_add(1, Ordering::SeqCst);
            block_on(tables.replace_table(L1Index(0), copy | COPIED, false));
            round.fetch_add(1, Ordering::SeqCst);
        }
        reader.join().unwrap()
    });
    assert_eq!(seen, 0, "times a shared cluster was offered for being overwritten");
}

/// An L1 entry that is nothing but COPIED has no table; the header was read as if it were one.
#[test]
fn an_l1_entry_without_an_offset_has_no_table() {
    let storage = Arc::new(Recorder::default());
    create(&*storage, 1 << 20, &[]);
    let header = block_on(load_header(&Blocking, &*storage)).unwrap();
    put(&*storage, header.l1_offset.0, COPIED);
    let image = open(&storage).unwrap();
    let mut found = [7; 1024];
    image.pread(&mut found, 0).unwrap();
    assert_eq!(found, [0; 1024]);
    image.pwrite(&[1; 512], 0).unwrap();
    image.pread(&mut found, 0).unwrap();
    assert_eq!((found[511], found[512]), (1, 0));
    image.close().unwrap();
    assert_eq!(word(&*storage, 0) >> 32, 0x5146_49fb, "the header is still there");
}

/// Zeroes for a part of a version 2 cluster were written to all of it, after the claim on it had been released: a
/// write that was acknowledged in between was lost.
#[test]
fn zeroing_a_part_of_a_version_2_cluster_touches_no_other_part() {
    let v2 = [("compat", "0.10"), ("cluster_size", "4k")];
    let (base, top) = (Arc::new(MemoryStorage::default()), MemoryStorage::default());
    create(&*base, 64 << 10, &v2);
    let overlay =
        CreateOptions { backing_file: Some("base".into()), backing_fmt: Some(BackingFormat::Qcow2), ..options(&v2) };
    block_on(qcow2::image::create_with(&Blocking, &top, 64 << 10, &overlay)).unwrap();
    let open_options = OpenOptions { backing_storages: vec![base], ..OpenOptions::default() };
    for seed in 0..200 {
        let disk = Arc::new(SimDisk::new(DiskImage::new(top.snapshot())));
        let io = SimIo::new(seed, 3, vec![disk.clone()]);
        let image = block_on(Image::open_with(&Blocking, disk.clone(), &open_options)).unwrap();
        let (zero, write): (Task<'_, Result<()>>, Task<'_, Result<()>>) = (
            Box::pin(image.write_zeroes_with(&io, GuestOffset(512), 512, ZeroFlags::default())),
            Box::pin(async {
                let data = [9; 512];
                image.write_with(&io, &[IoSrc::from(&data[..])], GuestOffset(2048), Default::default()).await
            }),
        );
        for result in Scheduler::new(seed).run(vec![zero, write], || {}).unwrap() {
            result.unwrap();
        }
        let mut found = [0; 512];
        image.pread(&mut found, 2048).unwrap();
        assert_eq!(found, [9; 512], "seed {seed}");
    }
}

/// The header's pointer to a refcount table that had moved was written, but reported as failed. The next pass wrote
/// the table again, now in use, in one go with the new blocks that it points to: a crash could leave pointers to
/// blocks that are not there.
#[test]
fn a_moved_refcount_table_never_points_to_blocks_that_are_not_durable() {
    let storage = Arc::new(Recorder::default());
    create(&*storage, 8 << 20, &[("cluster_size", "512"), ("refcount_bits", "64")]);
    let image = open(&storage).unwrap();
    storage.deny_root.store(true, Ordering::SeqCst);
    // The table has 64 entries for blocks of 64 clusters: it moves after 2 MiB.
    let mut failed = false;
    for i in 0..80u64 {
        image.pwrite(&[3; 32 << 10], i * (32 << 10)).unwrap();
        failed |= image.flush().is_err();
    }
    assert!(failed, "the root was denied once");
    image.close().unwrap();
    let (mut durable, mut written) = (std::collections::HashSet::new(), std::collections::HashSet::new());
    let (mut table, mut checked) = (0..0, 0);
    for event in storage.log() {
        match event {
            Event::Flush => durable.extend(written.drain()),
            Event::Punch => {}
            Event::Write(48, root) => {
                let at = u64::from_be_bytes(root[..8].try_into().unwrap());
                let clusters = u32::from_be_bytes(root[8..].try_into().unwrap());
                table = at..at + u64::from(clusters) * 512;
            }
            Event::Write(at, bytes) => {
                if table.contains(&at) {
                    for entry in bytes.chunks_exact(8).map(|e| u64::from_be_bytes(e.try_into().unwrap())) {
                        assert!(entry == 0 || durable.contains(&entry), "block {entry:x} is not durable");
                        checked += 1;
                    }
                }
                written.extend((at..at + bytes.len() as u64).step_by(512));
            }
        }
    }
    assert!(checked > 64, "the table was written again after the root was denied");
}

/// Where refcount blocks exist for clusters that no entry can point to, such clusters were handed out.
#[test]
fn no_cluster_past_the_last_host_offset_is_handed_out() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
    create(&*storage, 1 << 20, &[("cluster_size", "2M"), ("refcount_bits", "1")]);
    let header = block_on(load_header(&Blocking, &*storage)).unwrap();
    let free = storage.size().unwrap().next_multiple_of(2 << 20);
    put(&*storage, free + (2 << 20) - 8, 0);
    // One block counts 2^24 clusters of 2^21 bytes: block 2048 begins at 2^56.
    put(&*storage, header.refcount_table_offset.0 + 2048 * 8, free);
    let file = HostFile::new(storage.clone());
    let tables = block_on(Tables::load(&Blocking, file, &header, 8 << 20, 8 << 20)).unwrap();
    tables.refcounts.with(|state| state.hint = HostCluster(2048 << 24));
    let allocator = qcow2::alloc::Allocator::default();
    let taken = block_on(allocator.reserve(&Blocking, &tables, 1)).err();
    assert!(matches!(taken, Some(Error::TooLarge { .. })), "{taken:?}");
}

/// A refcount table entry that points to the L1 table made counts be written over it.
#[test]
fn counts_are_not_written_over_a_table() {
    let storage = Arc::new(Recorder::default());
    create(&*storage, 1 << 20, &[("cluster_size", "512"), ("refcount_bits", "64")]);
    let header = block_on(load_header(&Blocking, &*storage)).unwrap();
    put(&*storage, header.refcount_table_offset.0 + 8, header.l1_offset.0);
    let image = open(&storage).unwrap();
    let error = image.pwrite(&[1; 64 << 10], 0).unwrap_err();
    assert_eq!(kind(&error), Some(CorruptionKind::RefcountTableEntry), "{error}");
}

/// A data entry that points to a refcount block, discarded: the file gave up the block. And once an image is known
/// to be corrupt, nothing more is given up at all.
#[test]
fn metadata_is_never_punched() {
    let storage = Arc::new(Recorder::default());
    create(&*storage, 1 << 20, &[]);
    let image = open(&storage).unwrap();
    image.pwrite(&[1; 128 << 10], 0).unwrap();
    image.close().unwrap();
    let header = block_on(load_header(&Blocking, &*storage)).unwrap();
    let l2 = word(&*storage, header.l1_offset.0) & !COPIED;
    put(&*storage, l2, word(&*storage, header.refcount_table_offset.0) | COPIED);
    let image = open(&storage).unwrap();
    image.discard(0, 64 << 10).unwrap();
    let error = image.flush().unwrap_err();
    assert_eq!(kind(&error), Some(CorruptionKind::MetadataCountedFree), "{error}");
    image.flush().unwrap();
    let _ = image.close();
    assert!(!storage.log().iter().any(|e| matches!(e, Event::Punch)), "nothing was punched");
}

/// A poisoned handle that came across corruption wrote its metadata and marked the image.
#[test]
fn a_poisoned_handle_writes_nothing() {
    let storage = Arc::new(Recorder::default());
    create(&*storage, 1 << 20, &[]);
    let image = open(&storage).unwrap();
    image.pwrite(&[1; 128 << 10], 0).unwrap();
    image.close().unwrap();
    let header = block_on(load_header(&Blocking, &*storage)).unwrap();
    let l2 = word(&*storage, header.l1_offset.0) & !COPIED;
    put(&*storage, l2, COPIED | 0x200);
    let image = open(&storage).unwrap();
    image.pwrite(&[2; 512], 512 << 10).unwrap();
    let before = storage.memory.snapshot();
    image.poison("a test says so");
    assert!(image.pread(&mut [0; 512], 0).is_err());
    drop(image);
    assert!(storage.memory.snapshot() == before);
}
