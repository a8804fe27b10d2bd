//! Option `cache`: files without the page cache take any request, aligned or not, from any number of threads and from
//! queues; writethrough makes each write durable; unsafe makes none.

mod pass_on;
mod qemu;
mod requests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pass_on::pass_on;
use qcow2::format::GuestOffset;
use qcow2::image::{CreateOptions, Image, OpenOptions, WriteFlags, ZeroFlags, create_with};
use qcow2::queue::{Backend, Queue, Request};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::sim::Rng;
use qcow2::storage::{Blocking, IoSrc, Storage};
use qcow2::wait::block_on;
use requests::{BACKENDS, Buffer, ends, push, reap, reap_all};

/// A folder on a file system that knows O_DIRECT, or a reason to skip.
fn disk(name: &str) -> Option<PathBuf> {
    let path = std::env::temp_dir().join(format!("libqcow2-cache-{name}-{}.qcow2", std::process::id()));
    qcow2::image::create(&path, 8 << 20, &CreateOptions::default(), true).unwrap();
    match Image::open(&path, &with("direct")) {
        Ok(_) => Some(path),
        Err(e) => {
            let _ = std::fs::remove_file(&path);
            assert!(e.to_string().contains("O_DIRECT"), "{e}");
            eprintln!("SKIPPED: {name} needs a file system with O_DIRECT: {e}");
            None
        }
    }
}

fn with(cache: &str) -> OpenOptions {
    let mut options = OpenOptions::default();
    options.set("cache", cache).unwrap();
    options
}

fn finish(image: &Image, path: &Path, model: &[u8]) {
    let mut seen = vec![0; model.len()];
    image.pread(&mut seen, 0).unwrap();
    assert!(seen == model);
    image.close().unwrap();
    // With the page cache, too: what direct transfers left is what everybody sees.
    let image = Image::open(path, &OpenOptions::default()).unwrap();
    image.pread(&mut seen, 0).unwrap();
    assert!(seen == model);
    image.close().unwrap();
    if qemu::dir("cache").is_some() {
        qemu::check(path.to_str().unwrap(), false);
    }
    let _ = std::fs::remove_file(path);
}

#[test]
fn any_request_goes_without_the_page_cache() {
    let Some(path) = disk("any") else { return };
    let image = Image::open(&path, &with("none")).unwrap();
    let (mut rng, mut model) = (Rng::new(3), vec![0u8; image.size() as usize]);
    for round in 0..400u64 {
        let unit = [1, 7, 512, 4096][rng.below(4) as usize];
        let at = (rng.below(8 << 20) / unit * unit) as usize;
        let length = ((rng.below(if round % 20 == 0 { 2_500_000 } else { 9000 }) / unit + 1) * unit) as usize;
        let length = length.min(model.len() - at);
        match rng.below(5) {
            0..3 => {
                model[at..at + length]
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, byte)| *byte = (round as usize + i / 100) as u8);
                image.pwrite(&model[at..at + length], at as u64).unwrap();
            }
            3 => {
                model[at..at + length].fill(0);
                image.write_zeroes(at as u64, length as u64, ZeroFlags::default()).unwrap();
            }
            _ => {
                let mut seen = vec![0; length];
                image.pread(&mut seen, at as u64).unwrap();
                assert!(seen == model[at..at + length], "round {round}: {length} at {at}");
            }
        }
    }
    finish(&image, &path, &model);
}

/// Two writes to different bytes of one block: each has to read the rest of the block and write it back, and neither
/// may bring back what the other has changed.
#[test]
fn writes_of_parts_of_a_block_do_not_undo_each_other() {
    let Some(path) = disk("parts") else { return };
    const PART: usize = 300;
    let image = Arc::new(Image::open(&path, &with("direct")).unwrap());
    let mut model = vec![1u8; 8 << 20];
    image.pwrite(&model, 0).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let image = image.clone();
            scope.spawn(move || {
                let mut queue = Queue::new(image.clone(), 8, Backend::Auto).unwrap();
                let buffer: &'static [u8] = vec![thread as u8 + 10; PART].leak();
                for i in (thread..400).step_by(4) {
                    let at = (i * PART) as u64;
                    if i % 8 < 4 {
                        image.pwrite(buffer, at).unwrap();
                    } else {
                        let write = Request::Write(vec![IoSrc::from(buffer)], GuestOffset(at), WriteFlags::default());
                        assert!(queue.push(write, 0).is_ok());
                        queue.reap(8, usize::from(i % 16 < 8), None, |ended| ended.result.unwrap()).unwrap();
                    }
                }
                queue.reap(8, 8, None, |ended| ended.result.unwrap()).unwrap();
            });
        }
        // And whole blocks, right behind.
        for i in 40..200u64 {
            image.pwrite(&[7; 4096], i * 4096).unwrap();
        }
    });
    for i in 0..400 {
        model[i * PART..(i + 1) * PART].fill((i % 4) as u8 + 10);
    }
    model[40 * 4096..200 * 4096].fill(7);
    finish(&image, &path, &model);
}

/// A write of a part of a block waited until all writes of whole blocks had ended, in a call that polls no queue: of those
/// that the same thread had under way in a queue, for ever. Found by reading.
#[test]
fn a_write_of_a_part_of_a_block_does_not_wait_for_a_queue_that_waits_for_its_owner() {
    let Some(path) = disk("helped") else { return };
    for backend in BACKENDS {
        ends(&format!("writes of parts, {backend:?}"), || {
            let image = Arc::new(Image::open(&path, &with("direct")).unwrap());
            image.pwrite(&[1; 1 << 20], 0).unwrap(); // all that follows is written in place
            let [whole, part] = [Buffer::of(&[2; 65536]), Buffer::of(&[4; 100])];
            let write = |buffer: &Buffer, length, at| {
                Request::Write(vec![buffer.src(0, length)], GuestOffset(at), WriteFlags::default())
            };
            let mut queues = [(); 2].map(|()| Queue::new(image.clone(), 8, backend).unwrap());
            for round in 0..20 {
                let [one, two] = &mut queues;
                (0..8).for_each(|i| push(one, write(&whole, 65536, i * 65536), i));
                one.submit();
                // In blocks that are being written, and in one that is not.
                for at in [10, 65536 * 3 + 5000, 65536 * 12 + 7] {
                    match round % 2 {
                        0 => image.pwrite(&[3; 100], at).unwrap(),
                        _ => {
                            push(two, write(&part, 100, at), 0);
                            assert!(reap(two, 1)[0].1.is_ok());
                        }
                    }
                }
                assert!(reap_all(one).iter().all(|(_, result)| result.is_ok()));
                let mut seen = vec![0; 1 << 20];
                image.pread(&mut seen, 0).unwrap();
                let value = 3 + round % 2;
                assert!(seen[65536 * 12 + 7..][..100].iter().all(|&byte| byte == value));
                for at in [10, 65536 * 3 + 5000] {
                    // Of two writes at once, each byte is of one or the other.
                    assert!(seen[at..at + 100].iter().all(|&byte| byte == value || byte == 2));
                    seen[at..at + 100].fill(2);
                }
                assert!(seen[..8 * 65536].iter().all(|&byte| byte == 2));
                assert!(seen[8 * 65536..][..4 * 65536].iter().all(|&byte| byte == 1));
            }
            drop(queues);
            image.close().unwrap();
        });
    }
    let _ = std::fs::remove_file(&path);
}

/// A file whose length is no multiple of a block, under an overlay: its end is read all the same.
#[test]
fn the_end_of_a_raw_backing_file_is_read() {
    let Some(path) = disk("raw") else { return };
    let base = path.with_extension("raw");
    let content: Vec<u8> = (0..70_001u32).map(|i| (i % 251) as u8).collect();
    std::fs::write(&base, &content).unwrap();
    let mut options = CreateOptions::default();
    options.set("backing_file", base.file_name().unwrap().to_str().unwrap()).unwrap();
    options.set("backing_fmt", "raw").unwrap();
    qcow2::image::create(&path, 1 << 20, &options, true).unwrap();
    let mut options = with("direct");
    options.set("backing", "relative").unwrap();
    let image = Image::open(&path, &options).unwrap();
    let mut seen = vec![1; 80_000];
    image.pread(&mut seen, 3).unwrap();
    assert!(seen[..69_998] == content[3..] && seen[69_998..].iter().all(|&byte| byte == 0));
    image.pwrite(&[9; 10], 69_995).unwrap();
    image.pread(&mut seen, 3).unwrap();
    assert_eq!((seen[69_991], seen[69_992], seen[70_001], seen[70_002]), (content[69_994], 9, 9, 0));
    image.close().unwrap();
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_file(&base);
}

/// Counts flushes.
#[derive(Default)]
struct Counting {
    inner: MemoryStorage,
    flushes: AtomicU64,
}

impl Storage for Counting {
    pass_on!(inner: read write size truncate);
    fn flush(&self) -> std::io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn writethrough_flushes_each_write_and_unsafe_none() {
    let storage = Arc::new(Counting::default());
    block_on(create_with(&Blocking, &*storage, 8 << 20, &CreateOptions::default())).unwrap();
    let run = |cache: &str| {
        let image = Image::open_storage(storage.clone(), &with(cache)).unwrap();
        let mut flushes = Vec::new();
        for at in [0, 65536, 0] {
            let before = storage.flushes.load(Ordering::SeqCst);
            image.pwrite(&[1; 512], at + (cache.len() as u64) * 131_072).unwrap();
            flushes.push(storage.flushes.load(Ordering::SeqCst) - before);
        }
        let before = storage.flushes.load(Ordering::SeqCst);
        image.flush().unwrap();
        image.close().unwrap();
        flushes.push(storage.flushes.load(Ordering::SeqCst) - before);
        flushes
    };
    let back = run("writeback");
    assert!(back[..3].iter().all(|&n| n == 0) && back[3] >= 2, "{back:?}");
    let through = run("writethrough");
    assert!(through[..3].iter().all(|&n| n >= 1), "{through:?}");
    assert_eq!(run("unsafe"), [0; 4]);
    let e = Image::open_storage(storage.clone(), &with("direct")).map(drop).unwrap_err();
    assert!(e.to_string().contains("O_DIRECT"), "{e}");
    assert!(OpenOptions::default().set("cache", "writearound").is_err());
}
