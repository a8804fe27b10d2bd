//! What a thread waits for while a queue of its own has requests under way: nothing that only it could let go on. The
//! queue may be another handle's that shares something with the one that is waited on.

mod pass_on;
mod requests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pass_on::pass_on;
use qcow2::format::GuestOffset;
use qcow2::image::check::CheckOptions;
use qcow2::image::{CreateOptions, Image, OpenOptions, SnapshotFacts, WriteFlags, ZeroFlags, create_with};
use qcow2::queue::{Completion, Queue, Request};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::{Blocking, IoDst, Storage};
use qcow2::wait::block_on;
use requests::{BACKENDS, Buffer, ends, push, reap, reap_all};

const SIZE: u64 = 4 << 20;
const PART: usize = 4096;

/// Bytes in memory; while it is held back, nothing that is read from it arrives.
#[derive(Default)]
struct Base {
    bytes: MemoryStorage,
    is_held_back: AtomicBool,
}

impl Storage for Base {
    pass_on!(bytes: write flush size truncate);
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        while self.is_held_back.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.bytes.read(pieces, offset)
    }
}

/// An image over a backing file that is full of fives, and two snapshots of it, each a handle of its own. Nothing of the
/// backing file's L2 table has been loaded.
fn image_and_snapshots() -> (Arc<Base>, [Arc<Image>; 3]) {
    let base = Arc::new(Base::default());
    block_on(create_with(&Blocking, &*base, SIZE, &CreateOptions::default())).unwrap();
    let written = Image::open_storage(base.clone(), &OpenOptions::default()).unwrap();
    written.pwrite(&vec![5; SIZE as usize], 0).unwrap();
    written.close().unwrap();
    let overlay = MemoryStorage::default();
    let mut backing = CreateOptions::default();
    backing.set("backing_file", "base").unwrap();
    backing.set("backing_fmt", "qcow2").unwrap();
    block_on(create_with(&Blocking, &overlay, SIZE, &backing)).unwrap();
    let options = OpenOptions { backing_storages: vec![base.clone() as Arc<dyn Storage>], ..OpenOptions::default() };
    let image = Image::open_storage(Arc::new(overlay), &options).unwrap();
    let opened = ["one", "two"].map(|name| {
        image.snapshot_create(name, &SnapshotFacts::default()).unwrap();
        image.snapshot_open(name).unwrap()
    });
    let [one, two] = opened;
    (base, [image, one, two].map(Arc::new))
}

fn read(buffer: &mut Buffer, at: u64) -> Request {
    Request::Read(vec![buffer.dst(0, PART)], GuestOffset(at))
}

/// A queue on an image had begun to load a slice of the backing file's L2 table, and its owner read the same through the
/// handle of a snapshot, which shares the backing file: it waited for ever, because only the queues of that handle were
/// polled. Found by reading.
#[test]
fn a_call_on_one_handle_does_not_wait_for_a_queue_on_another_that_shares_the_backing_file() {
    for backend in BACKENDS {
        for (of_queue, of_call) in [(0, 1), (1, 0), (1, 2)] {
            ends(&format!("a read on handle {of_call}, {backend:?} on handle {of_queue}"), || {
                let (_, images) = image_and_snapshots();
                let mut buffer = Buffer::new(PART);
                let mut queue = Queue::new(images[of_queue].clone(), 4, backend).unwrap();
                push(&mut queue, read(&mut buffer, 65536), 0);
                queue.submit();
                let mut seen = [0; PART];
                images[of_call].pread(&mut seen, 3 * 65536).unwrap();
                assert!(reap_all(&mut queue).iter().all(|(_, result)| result.is_ok()));
                assert!(seen == [5; PART] && buffer.bytes() == [5; PART]);
            });
        }
    }
}

/// Closing a handle, and dropping a queue, waited for ever for a queue on another handle that nobody polled.
#[test]
fn the_end_of_a_handle_does_not_wait_for_a_queue_on_another_that_waits_for_its_owner() {
    for backend in BACKENDS {
        for (first, second, closes) in [(0, 1, true), (1, 0, true), (1, 2, true), (0, 1, false), (1, 0, false)] {
            ends(&format!("the end of handle {second}, {backend:?} on handle {first}, closes: {closes}"), || {
                let (_, images) = image_and_snapshots();
                let mut buffers = [Buffer::new(PART), Buffer::new(PART)];
                let [mut one, mut two] = [first, second].map(|i| Queue::new(images[i].clone(), 4, backend).unwrap());
                push(&mut one, read(&mut buffers[0], 65536), 0);
                one.submit();
                push(&mut two, read(&mut buffers[1], 3 * 65536), 0); // waits for the other
                two.submit();
                if closes {
                    images[second].close().unwrap();
                }
                drop(two);
                assert!(reap_all(&mut one).iter().all(|(_, result)| result.is_ok()));
                assert!(buffers.iter().all(|buffer| buffer.bytes() == [5; PART]));
            });
        }
    }
}

/// The longest way round: a check holds the image alone, waits for a write of a queue on it, which needs a slice of the
/// backing file, which a queue on a snapshot is loading. All of that is for the thread that checks to do.
#[test]
fn what_holds_an_image_alone_helps_queues_on_other_handles() {
    for backend in BACKENDS {
        ends(&format!("a check, {backend:?}"), || {
            let (_, [image, one, _]) = image_and_snapshots();
            let mut buffers = [Buffer::new(PART), Buffer::of(&[7; PART])];
            let [mut reads, mut writes] = [&one, &image].map(|image| Queue::new(image.clone(), 4, backend).unwrap());
            push(&mut reads, read(&mut buffers[0], 65536), 0);
            reads.submit();
            let write = vec![buffers[1].src(0, PART)];
            push(&mut writes, Request::Write(write, GuestOffset(65536), WriteFlags::default()), 0);
            writes.submit();
            assert!(image.check(&mut CheckOptions::default()).unwrap().is_sound());
            assert_eq!(writes.submit(), 1, "the check has waited for it");
            let mut seen = [1; 2 * PART];
            image.pread(&mut seen, 65536).unwrap();
            assert!(seen.chunks(PART).zip([7, 5]).all(|(part, value)| part.iter().all(|&byte| byte == value)));
            assert!(reap(&mut reads, 1)[0].1.is_ok() && buffers[0].bytes() == [5; PART]);
        });
    }
}

/// What handles share is who is helped, and no more: the requests of another handle are not waited for.
#[test]
fn closing_a_handle_does_not_wait_for_the_requests_of_another() {
    for backend in BACKENDS {
        for (of_queue, closed) in [(0, 1), (1, 0)] {
            ends(&format!("closing handle {closed}, {backend:?} on handle {of_queue}"), || {
                let (base, images) = image_and_snapshots();
                let mut buffer = Buffer::new(PART);
                let mut queue = Queue::new(images[of_queue].clone(), 4, backend).unwrap();
                base.is_held_back.store(true, Ordering::SeqCst);
                push(&mut queue, read(&mut buffer, 65536), 0);
                queue.submit();
                images[closed].close().unwrap();
                assert_eq!(queue.reap(1, 0, None, |_| ()).unwrap(), 0, "it is still under way");
                base.is_held_back.store(false, Ordering::SeqCst);
                assert!(reap_all(&mut queue).iter().all(|(_, result)| result.is_ok()));
                assert!(buffer.bytes() == [5; PART]);
            });
        }
    }
}

/// A thread with two queues waited for ever in `reap` of one whose requests waited for those of the other, which nobody
/// else polls: on one image, where one has claimed the cluster, and on two handles of it.
#[test]
fn a_queue_is_reaped_although_all_of_it_waits_for_another_queue_of_the_same_thread() {
    for backend in BACKENDS {
        for (first, second) in [(0, 0), (0, 1), (1, 0), (1, 2)] {
            for timeout in [None, Some(Duration::from_secs(3600))] {
                ends(&format!("{backend:?} on handle {second}, after one on handle {first}"), || {
                    let (_, images) = image_and_snapshots();
                    let mut buffers = [Buffer::of(&[7; PART]), Buffer::of(&[8; PART])];
                    let mut queues = [first, second].map(|i| Queue::new(images[i].clone(), 4, backend).unwrap());
                    for (i, (queue, buffer)) in queues.iter_mut().zip(&mut buffers).enumerate() {
                        let at = 65536 + (i * PART) as u64;
                        let request = match first == second {
                            true => Request::Write(vec![buffer.src(0, PART)], GuestOffset(at), WriteFlags::default()),
                            false => read(buffer, at),
                        };
                        push(queue, request, i as u64);
                        queue.submit();
                    }
                    let [one, two] = &mut queues;
                    let mut ended = 0;
                    two.reap(4, 1, timeout, |completion| {
                        completion.result.unwrap();
                        ended += 1;
                    })
                    .unwrap();
                    assert_eq!(ended, 1);
                    assert!(reap(one, 1)[0].1.is_ok());
                    let mut seen = [0; 3 * PART];
                    images[first].pread(&mut seen, 65536).unwrap();
                    let is_written = first == second;
                    let expected = if is_written { [7, 8, 5] } else { [5; 3] };
                    assert!(seen.chunks(PART).zip(expected).all(|(part, value)| part.iter().all(|&b| b == value)));
                    assert!(is_written || buffers.iter().all(|buffer| buffer.bytes() == [5; PART]));
                });
            }
        }
    }
}

/// Who was handed a completion and used the image then waited for ever for other requests of the queue: it could be polled
/// by nobody until all completions had been handed out.
#[test]
fn a_completion_is_answered_with_a_call_on_the_image() {
    for backend in BACKENDS {
        ends(&format!("a call for a completion, {backend:?}"), || {
            let (base, [image, ..]) = image_and_snapshots();
            let buffers = [Buffer::of(&[7; PART]), Buffer::of(&[8; 65536])];
            let mut queue = Queue::new(image.clone(), 8, backend).unwrap();
            let write = |i: usize, at| {
                let piece = buffers[i].src(0, buffers[i].bytes().len());
                Request::Write(vec![piece], GuestOffset(at), WriteFlags::default())
            };
            base.is_held_back.store(true, Ordering::SeqCst);
            push(&mut queue, write(0, 65536), 0); // has claimed its cluster, and waits for what lies around it
            push(&mut queue, write(1, 3 * 65536), 1);
            let answer = |completion: Completion| {
                completion.result.unwrap();
                assert_eq!(completion.user_data, 1);
                base.is_held_back.store(false, Ordering::SeqCst);
                image.write_zeroes(65536 + PART as u64, PART as u64, ZeroFlags::default()).unwrap();
            };
            assert_eq!(queue.reap(8, 1, None, answer).unwrap(), 1);
            assert!(reap(&mut queue, 1)[0].1.is_ok());
            let mut seen = [1; 3 * PART];
            image.pread(&mut seen, 65536).unwrap();
            assert!(seen.chunks(PART).zip([7, 0, 5]).all(|(part, value)| part.iter().all(|&byte| byte == value)));
        });
    }
}
