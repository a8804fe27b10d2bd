//! The model over queues: random requests, many under way at once, on io_uring and on threads, on files that a disk is
//! behind. Some meet, some do not. Among them, in the queue's own thread, the calls that change the image as a whole.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::history::{Begun, History};
use super::requests::{BACKENDS, Buffer, push, reap};
use super::{Image, Rng, Shape, check_end, check_snapshots, half_random_bytes, number, open_options, qemu};
use super::{random_bytes, range};
use qcow2::Error;
use qcow2::error::ErrorCode;
use qcow2::format::GuestOffset;
use qcow2::image::{ResizeOptions, SnapshotFacts, WriteFlags, ZeroFlags};
use qcow2::queue::{Backend, Queue, Request};

const DEPTH: usize = 16;
const REQUESTS_PER_ROUND: u64 = 40;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Read,
    Write,
    Compressed,
    Zero,
    Discard,
    Flush,
}

/// A request between push and reap.
struct Sent {
    kind: Kind,
    from: u64,
    buffer: Buffer, // what is written, or what is read
    began: u64,     // when it was submitted; 0: not yet
    change: Option<Begun>,
    /// The smallest size that the disk had meanwhile, and whether it had several.
    size: u64,
    resized: bool,
}

/// What happened, so that a test that met nothing does not pass for one that did.
#[derive(Debug, Default)]
struct Tally {
    requests: u64,
    overlaps: usize,
    refused: u64,
    operations: u64,
    under_way: u64, // requests, when operations began
}

/// A queue, its requests, and what its image may hold. (The queue goes first: it waits for its requests.)
struct Run<'a> {
    queue: Queue,
    sent: BTreeMap<u64, Sent>,
    image: Arc<Image>,
    shape: &'a Shape,
    rng: Rng,
    history: History,
    size: u64,
    snapshots: Vec<(String, Vec<u8>)>,
    tally: Tally,
}

/// Says what was run when a test fails.
struct Told(String);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed: {} (MODEL_SEED={})", self.0, number("MODEL_SEED", 1));
        }
    }
}

impl Run<'_> {
    /// More than the disk ever has.
    fn capacity(shape: &Shape) -> usize {
        shape.size as usize * 3 / 2 + 512
    }

    fn push(&mut self, hot: u64) {
        let (rng, cluster) = (&mut self.rng, 1u64 << self.shape.cluster_bits);
        // Half of the requests go where they meet others.
        let (low, high) = match rng.one_in(2) {
            true => (hot.min(self.size - 1), (hot + 4 * cluster).min(self.size)),
            false => (0, self.size),
        };
        let (at, length) = range(rng, self.shape, low, high);
        let whole = (at / cluster * cluster, (at + length).next_multiple_of(cluster).min(self.size));
        let whole = (whole.0, whole.1 - whole.0);
        let kind = match rng.below(20) {
            0..6 => Kind::Read,
            6..8 => Kind::Zero,
            8 => Kind::Discard,
            9..11 => Kind::Compressed,
            11 => Kind::Flush,
            _ => Kind::Write,
        };
        let (from, length) = match kind {
            Kind::Discard | Kind::Compressed => whole,
            Kind::Flush => (0, 0),
            _ => (at, length),
        };
        let mut buffer = match kind {
            Kind::Write => Buffer::of(&random_bytes(rng, length)),
            Kind::Compressed => Buffer::of(&half_random_bytes(rng, length)),
            _ => Buffer::new(length as usize),
        };
        let cut = if rng.one_in(2) { length } else { rng.below(length.max(1)) } as usize;
        let rest = length as usize - cut;
        let (fua, at) = (rng.one_in(12), GuestOffset(from));
        let request = match kind {
            Kind::Read => Request::Read(vec![buffer.dst(0, cut), buffer.dst(cut, rest)], at),
            Kind::Write | Kind::Compressed => {
                let flags = WriteFlags { fua, compressed: kind == Kind::Compressed };
                Request::Write(vec![buffer.src(0, cut), buffer.src(cut, rest)], at, flags)
            }
            Kind::Zero => {
                Request::WriteZeroes(at, length, ZeroFlags { may_unmap: rng.one_in(2), fua, no_fallback: false })
            }
            Kind::Discard => Request::Discard(at, length),
            Kind::Flush => Request::Flush,
        };
        self.tally.requests += 1;
        push(&mut self.queue, request, self.tally.requests);
        let sent = Sent { kind, from, buffer, began: 0, change: None, size: self.size, resized: false };
        self.sent.insert(self.tally.requests, sent);
    }

    /// What was pushed begins now.
    fn begin(&mut self) {
        for sent in self.sent.values_mut().filter(|sent| sent.began == 0) {
            // Their size may have changed since they were made up: what is past it is refused.
            let inside = sent.from + sent.buffer.bytes().len() as u64 <= self.size;
            if inside && !matches!(sent.kind, Kind::Read | Kind::Flush) {
                sent.change = Some(self.history.begin(sent.from, sent.buffer.bytes().to_vec()));
            }
            sent.began = self.history.now();
        }
    }

    fn submit(&mut self) {
        self.begin();
        self.queue.submit();
    }

    /// So many of them, that are under way: whichever ends first.
    fn reap(&mut self, count: usize) {
        self.begin();
        for (number, result) in reap(&mut self.queue, count) {
            let sent = self.sent.remove(&number).expect("a request that was sent, and reaped once");
            let (kind, from, end) = (sent.kind, sent.from, sent.from + sent.buffer.bytes().len() as u64);
            if let Err(e) = &result {
                let is_out = matches!(e, Error::OutOfRange { .. }) && end > sent.size;
                // What was the last cluster of the disk is one in part now.
                let is_cut = kind == Kind::Compressed && sent.resized && e.code() == ErrorCode::Argument;
                assert!(is_out || is_cut, "{kind:?} of {from}..{end}: {e}");
                self.tally.refused += 1;
            }
            let is_read = matches!(kind, Kind::Read | Kind::Flush);
            assert!(
                is_read || sent.change.is_some() || result.is_err(),
                "{kind:?} of {from}..{end} outside of the disk"
            );
            if let Some(change) = sent.change {
                // A discard keeps what it covers in part: at the end of the disk that was, clusters may go on now.
                let in_part = result.is_err() || kind == Kind::Discard && sent.resized;
                self.history.end(change, in_part);
            } else if kind == Kind::Read && result.is_ok() {
                self.explain(from, sent.buffer.bytes(), sent.began, &format!("request {number}"));
            }
        }
    }

    /// What a read that began then has found.
    fn explain(&self, from: u64, found: &[u8], began: u64, what: &str) {
        if let Some(at) = self.history.unexplained(from, found, began) {
            let (is, told) = (found[(at - from) as usize], self.history.told(at));
            panic!("{what}, since {began}: byte {at} is 0x{is:02x}; {told:#?}");
        }
    }

    /// The disk has another size. What comes to it, or may come back to it later, reads as zeroes.
    fn becomes(&mut self, size: u64) {
        for sent in self.sent.values_mut() {
            sent.resized |= size != self.size;
            sent.size = sent.size.min(size);
        }
        self.size = size;
    }

    fn resize(&mut self) {
        let size = match self.rng.below(3) {
            0 => (self.size + self.rng.below(5000)).saturating_sub(self.rng.below(5000)),
            _ => self.rng.below(self.shape.size) + self.shape.size / 2,
        };
        let size = size.clamp(512, self.shape.size * 3 / 2).next_multiple_of(512);
        let zeroes = vec![0; Self::capacity(self.shape) - size.min(self.size) as usize];
        let change = self.history.begin(size.min(self.size), zeroes);
        self.image.resize(size, ResizeOptions { allow_shrink: true, ..ResizeOptions::default() }, None).unwrap();
        self.history.end(change, false);
        self.becomes(size);
    }

    fn take_snapshot(&mut self) {
        let name = format!("taken-{}", self.tally.operations);
        let began = self.history.now();
        self.image.snapshot_create(&name, &SnapshotFacts::default()).unwrap();
        let snapshot = self.image.snapshot_open(&name).unwrap();
        assert_eq!(snapshot.size(), self.size);
        let mut content = vec![0xaa; self.size as usize];
        snapshot.pread(&mut content, 0).unwrap();
        self.explain(0, &content, began, &name);
        self.snapshots.push((name, content));
    }

    fn apply_snapshot(&mut self, index: usize) {
        let (name, content) = &self.snapshots[index];
        let size = content.len() as u64;
        let mut becomes = content.clone();
        becomes.resize(Self::capacity(self.shape), 0);
        let change = self.history.begin(0, becomes);
        self.image.snapshot_apply(name).unwrap();
        self.history.end(change, false);
        self.becomes(size);
    }

    /// In the thread that the queue belongs to, while requests are under way and others wait to be submitted.
    fn operate(&mut self) {
        self.tally.operations += 1;
        self.tally.under_way += self.sent.values().filter(|sent| sent.began != 0).count() as u64;
        let index = self.rng.below(self.snapshots.len().max(1) as u64) as usize;
        match self.rng.below(5) {
            0 | 1 => self.resize(),
            2 if !self.snapshots.is_empty() => self.apply_snapshot(index),
            3 if !self.snapshots.is_empty() => {
                let (name, _) = self.snapshots.remove(index);
                self.image.snapshot_delete(&name, None).unwrap();
            }
            _ if self.snapshots.len() < 3 => self.take_snapshot(),
            _ => {}
        }
        assert_eq!(self.image.size(), self.size);
    }

    fn round(&mut self) {
        let hot = self.rng.below(self.size);
        for _ in 0..REQUESTS_PER_ROUND {
            if self.sent.len() == DEPTH {
                let count = 1 + self.rng.below(DEPTH as u64) as usize;
                self.reap(count);
            }
            self.push(hot);
            match self.rng.below(12) {
                0..4 => self.submit(),
                4 => self.operate(),
                5 => self.reap(1),
                _ => {}
            }
        }
        self.reap(self.sent.len());
        assert!(self.sent.is_empty(), "every request ends");
        let began = self.history.now();
        let mut seen = vec![0xaa; self.size as usize];
        self.image.pread(&mut seen, 0).unwrap();
        self.explain(0, &seen, began, "a blocking read of everything");
        self.tally.overlaps += self.history.overlaps();
        seen.resize(Self::capacity(self.shape), 0);
        self.history.settle(&seen);
    }
}

/// One image, from its making to its end.
fn run(dir: &qemu::Dir, shape: &Shape, backend: Backend, direct: bool, seed: u64) -> Option<Tally> {
    let label = format!("{shape:?}, {backend:?}, direct: {direct}");
    let told = Told(label.clone());
    let mut rng = Rng::new(seed);
    let (path, mut content) = shape.make(dir, &mut rng);
    let mut options = open_options(rng.one_in(2));
    if direct {
        options.set("cache", "direct").unwrap();
    }
    let image = match Image::open(Path::new(&path), &options) {
        Err(e) if direct && e.to_string().contains("O_DIRECT") => {
            eprintln!("SKIPPED: queues without the page cache: {e}");
            return None;
        }
        opened => Arc::new(opened.unwrap()),
    };
    content.resize(Run::capacity(shape), 0);
    let mut run = Run {
        queue: Queue::new(image.clone(), DEPTH as u32, backend).unwrap(),
        sent: BTreeMap::new(),
        image,
        shape,
        rng,
        history: History::new(content),
        size: shape.size,
        snapshots: Vec::new(),
        tally: Tally::default(),
    };
    for _ in 0..number("MODEL_OPS", 200) / 25 {
        run.round();
    }
    let Run { queue, image, mut history, size, snapshots, tally, .. } = run;
    drop(queue);
    let (mut content, began) = (vec![0xaa; size as usize], history.now());
    image.pread(&mut content, 0).unwrap();
    assert_eq!(history.unexplained(0, &content, began), None);
    image.close().unwrap();
    check_end(&path, dir, &content, &label);
    check_snapshots(&path, dir, &snapshots, content.len(), &label);
    std::fs::remove_file(&path).unwrap();
    drop(told);
    Some(tally)
}

#[test]
fn queues_against_a_history_of_a_flat_array() {
    let Some(dir) = qemu::dir_on_disk("model-queues") else { return };
    let shape = |cluster_bits, extended, chain, size| Shape {
        cluster_bits,
        extended,
        refcount_bits: 16,
        version: 3,
        chain,
        size,
    };
    let kinds = [
        (shape(9, false, 0, 300 << 10), false),
        (shape(9, false, 1, 300 << 10), true),
        (shape(14, true, 0, 400 << 10), false),
        (shape(14, true, 2, 400 << 10), false),
        (shape(16, false, 1, 1200 << 10), false),
        (shape(16, false, 0, 1200 << 10), true),
    ];
    let seed = number("MODEL_SEED", 1) * 1000;
    for (n, (shape, direct)) in kinds.iter().enumerate() {
        for backend in BACKENDS {
            let Some(tally) = run(&dir, shape, backend, *direct, seed + n as u64) else { continue };
            println!("{shape:?}, {backend:?}, direct: {direct}: {tally:?}");
            assert!(tally.overlaps > 20 && tally.operations > 5 && tally.under_way > 5, "{tally:?}");
        }
    }
}
