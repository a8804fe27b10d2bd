//! Bugs that were found once, each as small as it could be made.

mod pass_on;
mod requests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use pass_on::pass_on;
use qcow2::error::{CorruptionKind, Error, ErrorCode, IoOp, Structure};
use qcow2::format::GuestOffset;
use qcow2::image::check::CheckOptions;
use qcow2::image::{
    BitmapOptions, CreateOptions, Image, OpenOptions, ResizeOptions, SnapshotFacts, WriteFlags, ZeroFlags,
};
use qcow2::queue::{Queue, Request};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::{Blocking, IoSrc, Storage};
use requests::{BACKENDS, Buffer, push, reap_all};

/// The search for a free cluster began anew each time it had to wait for a refcount block. With more full blocks
/// than the cache holds, it evicted the first ones to load the next and never came to an end.
#[test]
fn a_refcount_cache_smaller_than_the_full_blocks_does_not_stop_the_allocator() {
    let (done, finished) = mpsc::channel();
    std::thread::spawn(move || {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
        let mut options = CreateOptions::default();
        options.set("cluster_size", "512").unwrap();
        options.set("refcount_bits", "64").unwrap();
        let size = 1 << 20;
        qcow2::wait::block_on(qcow2::image::create_with(&Blocking, &*storage, size, &options)).unwrap();
        let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
        // A refcount block counts 64 clusters: this fills more than eight.
        image.pwrite(&vec![1; 300 << 10], 0).unwrap();
        image.close().unwrap();
        let small = OpenOptions { refcount_cache_size: 512, ..OpenOptions::default() };
        let image = Image::open_storage(storage, &small).unwrap();
        image.pwrite(&[2; 512], 400 << 10).unwrap();
        image.pwrite(&[3; 5000], 500 << 10).unwrap();
        image.close().unwrap();
        done.send(()).unwrap();
    });
    finished.recv_timeout(Duration::from_secs(20)).expect("the allocator found a free cluster");
}

/// An image of 4 KiB clusters whose first guest cluster holds ones, and a word of it.
fn sample() -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::default());
    let mut options = CreateOptions::default();
    options.set("cluster_size", "4k").unwrap();
    qcow2::wait::block_on(qcow2::image::create_with(&Blocking, &*storage, 1 << 20, &options)).unwrap();
    let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    image.pwrite(&[1; 4096], 0).unwrap();
    image.close().unwrap();
    storage.snapshot()
}

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap())
}

/// Puts `value` at `at` and opens the image.
fn damaged(mut bytes: Vec<u8>, at: u64, value: u64) -> (Arc<MemoryStorage>, Image) {
    bytes[at as usize..][..8].copy_from_slice(&value.to_be_bytes());
    let storage = Arc::new(MemoryStorage::new(bytes));
    let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    (storage, image)
}

/// Expects corruption of a kind at a place, and the image to be marked.
#[track_caller]
fn found(result: Result<(), Error>, kind: CorruptionKind, host_offset: u64, storage: &MemoryStorage) {
    match result {
        Err(Error::Corrupt(c)) => assert_eq!((c.kind, c.host_offset), (kind, host_offset)),
        other => panic!("{kind:?} is not found: {other:?}"),
    }
    assert_eq!(word(&storage.snapshot(), 72), 2, "the corrupt bit");
}

/// With a damaged L2 entry, a guest's write overwrote the header, the L1 or the refcount table in place; without
/// COPIED, what was replaced was released and punched, which emptied them as well.
#[test]
fn guest_writes_do_not_reach_the_header_and_the_tables() {
    let bytes = sample();
    let table = word(&bytes, word(&bytes, 40)) & !(1 << 63);
    for copied in [1 << 63, 0] {
        for (at, structure) in [(40, Structure::L1Table), (48, Structure::RefcountTable)] {
            let target = word(&bytes, at);
            let (storage, image) = damaged(bytes.clone(), table, target | copied);
            let before = storage.snapshot();
            found(image.pwrite(&[7; 512], 0), CorruptionKind::ClusterInMetadata(structure), table, &storage);
            drop(image);
            assert!(storage.snapshot()[80..] == before[80..], "more than the corrupt bit was written");
        }
    }
    // A compressed cluster in the header.
    let (storage, image) = damaged(bytes, table, 1 << 62 | 512);
    found(image.pwrite(&[7; 4096], 0), CorruptionKind::ClusterInMetadata(Structure::Header), table, &storage);
}

/// A file that had lost its end: a repair took COPIED away from entries that pointed past it, because nothing counts
/// references there, and the next check, which goes by the stored counts, complained that it was missing. Found by fuzzing.
#[test]
fn a_repair_leaves_entries_past_the_end_of_the_file_as_the_check_wants_them() {
    use qcow2::image::check::{CheckOptions, CheckResult, Repair, check_with};
    let mut bytes = sample();
    let l2 = word(&bytes, word(&bytes, 40)) & !(1 << 63);
    // Counted once, referred to once, and two clusters past the end. The cluster that was there before is a leak now.
    let lost = bytes.len().div_ceil(4096) + 2;
    bytes[l2 as usize..][..8].copy_from_slice(&((1 << 63) | (lost as u64 * 4096)).to_be_bytes());
    let block = word(&bytes, word(&bytes, 48)) as usize;
    bytes[block + 2 * lost + 1] = 1;
    let storage = Arc::new(MemoryStorage::new(bytes));
    let check = |repair| -> CheckResult {
        let mut options = CheckOptions { repair, ..CheckOptions::default() };
        let storage = Arc::clone(&storage) as Arc<dyn Storage>;
        qcow2::wait::block_on(check_with(&Blocking, storage, "image", &OpenOptions::default(), &mut options)).unwrap()
    };
    let before = check(Repair::Nothing);
    let repaired = check(Repair::All);
    assert!(
        before.corruptions > 0 && repaired.corruptions > 0,
        "what is past the end is lost: {before:?} {repaired:?}"
    );
    assert!(repaired.corruptions <= before.corruptions, "{before:?} {repaired:?}");
    assert_eq!(check(Repair::Nothing).corruptions, repaired.corruptions);
}

/// Checks, and repairs if that is asked for.
fn checked(storage: &Arc<MemoryStorage>, repair: qcow2::image::check::Repair) -> qcow2::image::check::CheckResult {
    use qcow2::image::check::{CheckOptions, check_with};
    let mut options = CheckOptions { repair, ..CheckOptions::default() };
    let storage = Arc::clone(storage) as Arc<dyn Storage>;
    qcow2::wait::block_on(check_with(&Blocking, storage, "image", &OpenOptions::default(), &mut options)).unwrap()
}

/// The refcount block of the image is malformed, as far as its table entry tells.
fn with_malformed_block(mut bytes: Vec<u8>) -> Vec<u8> {
    let table = word(&bytes, 48) as usize;
    bytes[table..table + 8].copy_from_slice(&0x1f20u64.to_be_bytes());
    bytes
}

/// Where a refcount block was malformed, entries that point past the end of the file were forgotten: a repair put the new
/// refcount structures where they point, and what had read as zeroes read as these. Found by fuzzing.
#[test]
fn new_refcount_structures_do_not_show_up_where_entries_point_past_the_end() {
    use qcow2::image::check::Repair;
    for clusters in 1..6 {
        let mut bytes = with_malformed_block(sample());
        let l2 = word(&bytes, word(&bytes, 40)) & !(1 << 63);
        let lost = (bytes.len().div_ceil(4096) + clusters) as u64 * 4096;
        bytes[l2 as usize + 8..][..8].copy_from_slice(&lost.to_be_bytes());
        let storage = Arc::new(MemoryStorage::new(bytes));
        let read = || {
            let options = OpenOptions { read_only: true, ..OpenOptions::default() };
            let image = Image::open_storage(storage.clone(), &options).unwrap();
            let mut found = vec![0; 8192];
            image.pread(&mut found, 0).unwrap();
            found
        };
        let before = read();
        assert!(before == [vec![1; 4096], vec![0; 4096]].concat());
        let repaired = checked(&storage, Repair::All);
        assert!(repaired.corruptions_fixed > 0, "{repaired:?}");
        assert!(read() == before, "{clusters} cluster(s) past the end: the guest reads something else");
    }
}

/// Each damaged entry that pointed somewhere far past the end of the file cost a walk through the whole image, and a check
/// of 300 KiB took minutes. Found by fuzzing.
#[test]
fn entries_that_point_far_away_do_not_cost_a_pass_each() {
    use qcow2::image::check::{CheckOptions, check_with};
    let mut bytes = sample();
    let l2 = (word(&bytes, word(&bytes, 40)) & !(1 << 63)) as usize;
    let entries = 500;
    for n in 0..entries {
        bytes[l2 + n * 8..][..8].copy_from_slice(&(((n as u64 + 1) << 46) | (n as u64 & 1) << 63).to_be_bytes());
    }
    let mut steps = 0;
    let mut count = |_, _| {
        steps += 1;
        true
    };
    let mut options = CheckOptions { memory_bytes: 1 << 20, on_progress: Some(&mut count), ..CheckOptions::default() };
    let storage = Arc::new(MemoryStorage::new(bytes)) as Arc<dyn Storage>;
    let open = OpenOptions::default();
    let result = qcow2::wait::block_on(check_with(&Blocking, storage, "image", &open, &mut options)).unwrap();
    // Each entry is past the end, and every second one says COPIED of a cluster that nothing counts.
    assert_eq!((result.corruptions, result.leaks), (entries as u64 * 3 / 2, 1), "{result:?}");
    assert!(steps < 20, "{steps} steps for an image with one L2 table");
}

/// Behind a malformed refcount block, overlaps and wrong COPIED flags were passed over: a repair did not keep off them,
/// and the check after it told more corruptions than the first. Found by fuzzing.
#[test]
fn what_is_wrong_whatever_the_counts_are_is_told_without_a_refcount_block() {
    use qcow2::image::check::Repair;
    let mut bytes = with_malformed_block(sample());
    let l1 = word(&bytes, 40);
    let l2 = word(&bytes, l1) & !(1 << 63);
    // Guest cluster 1 lies in the L2 table itself, and both entries say that it is there alone.
    bytes[l2 as usize + 8..][..8].copy_from_slice(&((1 << 63) | l2).to_be_bytes());
    let storage = Arc::new(MemoryStorage::new(bytes));
    let before = checked(&storage, Repair::Nothing);
    assert_eq!(before.corruptions, 1 + 1 + 2, "the block, the overlap, and two flags: {before:?}");
    let repaired = checked(&storage, Repair::All);
    assert!(repaired.corruptions < before.corruptions, "{before:?} {repaired:?}");
    assert_eq!(checked(&storage, Repair::Nothing).corruptions, repaired.corruptions);
}

/// An overlap in a cluster that was counted too often was told, but not counted: an image with nothing else wrong had leaks
/// only, and was sound. Found by fuzzing.
#[test]
fn an_overlap_counts_as_corruption_beside_a_leak() {
    use qcow2::image::check::Repair;
    let mut bytes = sample();
    let l1 = word(&bytes, 40);
    let l2 = word(&bytes, l1) & !(1 << 63);
    // Guest cluster 1 lies in the L2 table itself; nothing says COPIED of it, and it has five references, not two.
    bytes[l1 as usize] &= 0x7f;
    bytes[l2 as usize + 8..][..8].copy_from_slice(&l2.to_be_bytes());
    let block = word(&bytes, word(&bytes, 48));
    bytes[(block + l2 / 4096 * 2 + 1) as usize] = 5;
    let storage = Arc::new(MemoryStorage::new(bytes));
    let before = checked(&storage, Repair::Nothing);
    assert_eq!((before.corruptions, before.leaks, before.is_sound()), (1, 1, false), "{before:?}");
    let repaired = checked(&storage, Repair::All);
    assert!(repaired.corruptions <= 1 && repaired.leaks == 0, "{repaired:?}");
}

/// An L1 entry that a smaller disk has no room for was malformed: the disk shrank, an error followed, and that named host
/// offset 0. Found by fuzzing operations.
#[test]
fn a_disk_with_a_malformed_l1_entry_does_not_shrink() {
    use qcow2::image::ResizeOptions;
    let bytes = sample();
    let l1 = word(&bytes, 40);
    let end = bytes.len().div_ceil(4096) as u64 * 4096;
    for (value, kind) in
        [(1 << 56 | 1, CorruptionKind::L1EntryReservedBits), (end | 1 << 63, CorruptionKind::L2TableBeyondEof)]
    {
        let (storage, image) = damaged(bytes.clone(), l1, value);
        let shrink = ResizeOptions { allow_shrink: true, ..ResizeOptions::default() };
        let result = image.resize(0, shrink, None);
        assert_eq!(image.size(), 1 << 20, "the disk has shrunk in spite of the error");
        found(result, kind, l1, &storage);
    }
    // What only the entries of the table tell is found after the switch, and still named by its place.
    let l2 = word(&bytes, l1) & !(1 << 63);
    let (storage, image) = damaged(bytes, l2 + 16, 0x50200);
    let shrink = ResizeOptions { allow_shrink: true, ..ResizeOptions::default() };
    found(image.resize(0, shrink, None), CorruptionKind::ClusterUnaligned, l2 + 16, &storage);
}

/// Corruption in the tree of a snapshot that was to be applied, or deleted, was reported, but the image was not marked. Found
/// by fuzzing operations.
#[test]
fn corruption_in_a_snapshot_marks_the_image() {
    let storage = Arc::new(MemoryStorage::new(sample()));
    let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    image.snapshot_create("one", &Default::default()).unwrap();
    image.pwrite(&[2; 4096], 0).unwrap();
    image.close().unwrap();
    let bytes = storage.snapshot();
    let l2 = word(&bytes, word(&bytes, word(&bytes, 64)));
    for change in [|image: &Image| image.snapshot_apply("one"), |image: &Image| image.snapshot_delete("one", None)] {
        let (storage, image) = damaged(bytes.clone(), l2 + 8, 2);
        found(change(&image), CorruptionKind::L2EntryReservedBits, l2 + 8, &storage);
    }
}

/// A compressed write panicked where the image was opened to be inspected only, which has no tables. Found by fuzzing C calls.
#[test]
fn an_image_that_is_only_inspected_refuses_everything_else() {
    use qcow2::format::GuestOffset;
    use qcow2::image::check::CheckOptions;
    use qcow2::image::{WriteFlags, ZeroFlags};
    use qcow2::storage::IoSrc;
    let options = OpenOptions { inspect: true, ..OpenOptions::default() };
    let open = || Image::open_storage(Arc::new(MemoryStorage::new(sample())), &options).unwrap();
    let compressed = |image: &Image| {
        let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
        image.write(&[IoSrc::from(&[7; 4096][..])], GuestOffset(0), flags)
    };
    let shrink = |image: &Image| image.resize(1 << 21, Default::default(), None);
    type Call<'a> = (&'a str, &'a dyn Fn(&Image) -> Result<(), Error>);
    let calls: [Call<'_>; 14] = [
        ("read", &|image| image.pread(&mut [0; 512], 0)),
        ("write", &|image| image.pwrite(&[1; 512], 0)),
        ("compressed write", &compressed),
        ("zeroes", &|image| image.write_zeroes(0, 4096, ZeroFlags::default())),
        ("discard", &|image| image.discard(0, 4096)),
        ("map", &|image| image.map(GuestOffset(0), 4096).map(drop)),
        ("resize", &shrink),
        ("check", &|image| image.check(&mut CheckOptions::default()).map(drop)),
        ("snapshot", &|image| image.snapshot_create("one", &Default::default()).map(drop)),
        ("apply", &|image| image.snapshot_apply("one")),
        ("delete", &|image| image.snapshot_delete("one", None)),
        ("bitmap", &|image| image.bitmap_add("one", Default::default())),
        ("clear", &|image| image.bitmap_clear("one")),
        ("extents", &|image| image.bitmap_extents("one", 0, 4096, 1).map(drop)),
    ];
    for (what, call) in calls {
        assert_eq!(call(&open()), Err(Error::InspectOnly), "{what}");
    }
    open().flush().unwrap();
    open().close().unwrap();
}

/// An L2 table in the refcount table: linking a new cluster overwrote refcount table entries.
#[test]
fn l2_entries_are_not_written_into_other_tables() {
    let bytes = sample();
    let (l1, refcount_table) = (word(&bytes, 40), word(&bytes, 48));
    let (storage, image) = damaged(bytes, l1, refcount_table | 1 << 63);
    found(image.pwrite(&[7], 1 << 16), CorruptionKind::L2TableInMetadata, l1, &storage);
    assert_eq!(word(&storage.snapshot(), refcount_table + 16 * 8), 0);
}

/// A refcount table entry past 2^63 was read at that offset: each write failed with EINVAL, and nobody knew why.
#[test]
fn a_refcount_block_at_an_impossible_offset_is_corruption() {
    let bytes = sample();
    let refcount_table = word(&bytes, 48);
    for offset in [1 << 63, !0xfff, (1 << 63) - 4096, 1 << 56] {
        // A file, as memory has no largest offset.
        let path = std::env::temp_dir().join(format!("libqcow2-impossible-{}", std::process::id()));
        let mut bytes = bytes.clone();
        bytes[refcount_table as usize..][..8].copy_from_slice(&u64::to_be_bytes(offset));
        std::fs::write(&path, bytes).unwrap();
        let image = Image::open(&path, &OpenOptions::default()).unwrap();
        let result = image.pwrite(&[7], 1 << 16);
        let storage = MemoryStorage::new(std::fs::read(&path).unwrap());
        std::fs::remove_file(path).unwrap();
        found(result, CorruptionKind::RefcountBlockBeyondEof, refcount_table, &storage);
    }
}

/// Where metadata was counted as free without a refcount block, the error named host offset 0.
#[test]
fn metadata_without_a_refcount_block_is_named_by_the_table_entry() {
    let bytes = sample();
    let refcount_table = word(&bytes, 48);
    let (storage, image) = damaged(bytes.clone(), refcount_table, 0);
    found(image.pwrite(&[7], 1 << 16), CorruptionKind::MetadataCountedFree, refcount_table, &storage);
    // And with a block, by the count.
    let block = word(&bytes, refcount_table);
    let (storage, image) = damaged(bytes, block, 0x0001_0000_0001_0001);
    found(image.pwrite(&[7], 1 << 16), CorruptionKind::MetadataCountedFree, block + 2, &storage);
}

/// Corruption that only closing came upon was reported, but the image was not marked.
#[test]
fn corruption_found_by_close_marks_the_image() {
    let bytes = sample();
    let block = word(&bytes, word(&bytes, 48));
    let table = word(&bytes, word(&bytes, 40)) & !(1 << 63);
    // A compressed cluster in host cluster 100, which is counted 0 times: only its release comes upon that.
    let (storage, image) = damaged(bytes, table, 1 << 62 | 100 << 12);
    image.pwrite(&[7; 4096], 0).unwrap();
    found(image.close(), CorruptionKind::RefcountUnderflow, block + 200, &storage);
}

/// Clusters that the refcount table had left were still taken for metadata once they held something else.
#[test]
fn the_place_that_a_refcount_table_has_left_is_used_again() {
    let storage = Arc::new(MemoryStorage::default());
    let mut options = CreateOptions::default();
    options.set("cluster_size", "512").unwrap();
    options.set("refcount_bits", "64").unwrap();
    let size = 8u64 << 20;
    qcow2::wait::block_on(qcow2::image::create_with(&Blocking, &*storage, size, &options)).unwrap();
    let before = storage.snapshot();
    let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    for round in 1..=3u8 {
        for at in (0..size - (1 << 20) * u64::from(4 - round)).step_by(1 << 16) {
            image.pwrite(&vec![round; 1 << 16], at).unwrap();
        }
        image.flush().unwrap();
    }
    image.close().unwrap();
    let (after, old_table) = (storage.snapshot(), word(&before, 48));
    assert_ne!(word(&after, 48), old_table, "the table was to move");
    let place = old_table as usize..old_table as usize + 512;
    assert_ne!(after[place.clone()], before[place], "the place was to be used again");
}

/// A file whose disk fails: what was written is there, and no flush succeeds.
#[derive(Default)]
struct Failing {
    bytes: MemoryStorage,
    fails: AtomicBool,
}

impl Storage for Failing {
    pass_on!(bytes: read write size truncate);
    fn flush(&self) -> io::Result<()> {
        if self.fails.load(Ordering::SeqCst) { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }
}

/// After a failed flush a handle still acknowledged what needed no write of its own: zeroes where zeroes were, or
/// entries that it has in memory and never stores. Found by sweeps of errors under queues.
#[test]
fn after_a_failed_flush_no_change_is_acknowledged_that_needs_no_write_either() {
    for (detect_zeroes, discard) in [("off", "unmap"), ("on", "ignore")] {
        let storage = Arc::new(Failing::default());
        let size = 1 << 20;
        let options = CreateOptions { extended_l2: true, ..CreateOptions::default() };
        qcow2::wait::block_on(qcow2::image::create_with(&Blocking, &*storage, size, &options)).unwrap();
        let mut options = OpenOptions::default();
        options.set("detect_zeroes", detect_zeroes).unwrap();
        options.set("discard", discard).unwrap();
        let image = Arc::new(Image::open_storage(storage.clone(), &options).unwrap());
        image.pwrite(&[1; 128 << 10], 0).unwrap();
        storage.fails.store(true, Ordering::SeqCst);
        assert!(matches!(image.flush().unwrap_err(), Error::Io { op: IoOp::Flush, .. }));
        storage.fails.store(false, Ordering::SeqCst); // as the kernel has it: told once

        let (zeroes, compressed) = (vec![0; 65536], WriteFlags { compressed: true, ..WriteFlags::default() });
        let whole = || [IoSrc::from(&zeroes[..])];
        let unmap = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        let outcomes = [
            ("data in place", image.pwrite(&[2; 512], 0)),
            ("data elsewhere", image.pwrite(&[2; 512], 512 << 10)),
            ("nothing", image.pwrite(&[], 0)),
            ("zeroes as data", image.pwrite(&zeroes, 512 << 10)),
            ("zeroes, compressed", image.write(&whole(), GuestOffset(512 << 10), compressed)),
            ("zeroes over data", image.write_zeroes(0, 4096, ZeroFlags::default())),
            ("zeroes over zeroes", image.write_zeroes(512 << 10, 65536, ZeroFlags::default())),
            ("zeroes over all", image.write_zeroes(0, size, unmap)),
            ("no zeroes", image.write_zeroes(0, 0, ZeroFlags::default())),
            ("giving up data", image.discard(0, 65536)),
            ("giving up nothing", image.discard(512 << 10, 65536)),
            ("a flush", image.flush()),
            ("the same size", image.resize(size, ResizeOptions::default(), None)),
            ("a snapshot", image.snapshot_create("s", &SnapshotFacts::default()).map(drop)),
            ("a bitmap", image.bitmap_add("b", BitmapOptions::default())),
            ("a check", image.check(&mut CheckOptions::default()).map(drop)),
        ];
        for (what, outcome) in outcomes {
            assert_eq!(
                outcome.map_err(|e| e.code()),
                Err(ErrorCode::Poisoned),
                "{what}, detect_zeroes={detect_zeroes}"
            );
        }
        for backend in BACKENDS {
            let mut queue = Queue::new(image.clone(), 8, backend).unwrap();
            let buffer = Buffer::new(4096);
            let at = GuestOffset(512 << 10);
            push(&mut queue, Request::WriteZeroes(at, 4096, ZeroFlags::default()), 0);
            push(&mut queue, Request::Discard(at, 65536), 1);
            push(&mut queue, Request::Write(vec![buffer.src(0, 4096)], at, WriteFlags::default()), 2);
            push(&mut queue, Request::Flush, 3);
            let ended = reap_all(&mut queue);
            assert_eq!(ended.len(), 4);
            for (request, outcome) in ended {
                assert_eq!(outcome.map_err(|e| e.code()), Err(ErrorCode::Poisoned), "{request} on {backend:?}");
            }
        }
        let mut seen = vec![0; 128 << 10];
        image.pread(&mut seen, 0).unwrap();
        assert!(seen.iter().all(|&byte| byte == 1), "reads go on, and nothing has changed");
        assert_eq!(image.close().map_err(|e| e.code()), Err(ErrorCode::Poisoned));
        // The same where nothing had been written before.
        let untouched = Image::open_storage(storage.clone(), &options).unwrap();
        storage.fails.store(true, Ordering::SeqCst);
        assert!(untouched.flush().is_err());
        storage.fails.store(false, Ordering::SeqCst);
        assert_eq!(untouched.pwrite(&[2; 512], 0).map_err(|e| e.code()), Err(ErrorCode::Poisoned));
        assert_eq!(untouched.close().map_err(|e| e.code()), Err(ErrorCode::Poisoned));
    }
}
