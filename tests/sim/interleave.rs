//! Interleavings. Two to eight requests of up to four clients run at once on one image under a seeded scheduler; what each read saw and what
//! is there afterwards must be explained, atom by atom, by some order of the requests in which none moves before
//! one that had ended when it began. Then the image is judged, and now and then shown to qemu-img.
//!
//! `INTERLEAVINGS` sets how many, `INTERLEAVE_SEED` the first seed.

use crate::number;
use crate::qemu;
use std::cell::{Cell, RefCell};
use std::sync::Arc;

use crate::judge::{Judge, Layout};
use crate::stage::{Case, Guest, Start, cases, data_file_cases, disks, open, open_disks, pattern, squeezable};
use qcow2::error::ErrorCode;
use qcow2::format::GuestOffset;
use qcow2::image::{Image, WriteFlags, ZeroFlags};
use qcow2::storage::sim::{Rng, Scheduler, SimDisk, SimIo, Task};
use qcow2::storage::{Blocking, IoDst, IoSrc};

/// Requests start and end at multiples of this: smaller than a sector, so that two writes share one.
const ATOM: u64 = 128;
const COMPRESSED: WriteFlags = WriteFlags { fua: false, compressed: true };
const INTERLEAVINGS_BY_DEFAULT: u64 = 64_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Compressed,
    Zero,
    Discard,
    Flush,
}

/// A request with its data (what was written, or what was read) and when it began and ended.
#[derive(Debug, Clone)]
pub struct Request {
    pub kind: Kind,
    pub offset: u64,
    pub data: Vec<u8>,
    pub fua: bool,
    /// It was refused on its way, because the disk had become smaller: each part of it has happened or not.
    pub optional: bool,
    pub began: u64,
    pub ended: u64,
}

impl Request {
    fn atom(&self, offset: u64) -> Option<&[u8]> {
        let at = offset.checked_sub(self.offset)? as usize;
        self.data.get(at..at + ATOM as usize)
    }
}

/// Is there an order of the operations on one atom that explains what the reads saw? `used` marks those that are in
/// the order already, `value` is what the atom holds after them.
fn explained(requests: &[(&Request, &[u8])], used: u32, value: &[u8]) -> bool {
    if used == (1 << requests.len()) - 1 {
        return true;
    }
    let left = |i: &usize| used >> i & 1 == 0;
    let earliest_end = (0..requests.len()).filter(left).map(|i| requests[i].0.ended).min().unwrap();
    (0..requests.len()).filter(left).any(|i| {
        let (request, data) = requests[i];
        match request.kind {
            _ if request.began > earliest_end => false,
            _ if request.optional && explained(requests, used | 1 << i, value) => true,
            Kind::Read => data == value && explained(requests, used | 1 << i, value),
            _ => explained(requests, used | 1 << i, data),
        }
    })
}

pub async fn perform(image: &Image, io: &SimIo, clock: &Cell<u64>, done: &RefCell<Vec<Request>>, mut request: Request) {
    let tick = || clock.replace(clock.get() + 1);
    request.began = tick();
    let offset = GuestOffset(request.offset);
    let result = match request.kind {
        Kind::Flush => image.flush_with(io).await,
        Kind::Read => image.read_with(io, &[IoDst::from(&mut request.data[..])], offset).await,
        Kind::Zero => {
            let flags = ZeroFlags { may_unmap: request.fua, ..ZeroFlags::default() };
            image.write_zeroes_with(io, offset, request.data.len() as u64, flags).await
        }
        Kind::Discard => image.discard_with(io, offset, request.data.len() as u64).await,
        Kind::Write | Kind::Compressed => {
            let flags = WriteFlags {
                fua: request.fua,
                compressed: request.kind == Kind::Compressed && !image.header().has_data_file(),
            };
            // Two pieces, so that lists of memory pieces are cut at odd places as well.
            let (head, tail) = request.data.split_at(request.data.len() / 3);
            image.write_with(io, &[IoSrc::from(head), IoSrc::from(tail)], offset, flags).await
        }
    };
    if let Err(e) = result {
        // The disk has become smaller meanwhile, or larger, so that what was its last cluster is one in part now.
        let is_cut = request.kind == Kind::Compressed && e.code() == ErrorCode::Argument;
        assert!(is_cut || e.code() == ErrorCode::OutOfRange, "{e}");
        if request.kind == Kind::Read {
            return;
        }
        request.optional = true;
    }
    request.ended = tick();
    done.borrow_mut().push(request);
}

/// One client reads or overwrites a part of a cluster, while another gives the cluster up, flushes and writes
/// elsewhere: what the first one holds must not be handed out to the second.
fn clients_that_reuse(rng: &mut Rng, start: &Start) -> Vec<Vec<Request>> {
    let request = |kind, offset, data| Request { kind, offset, data, fua: true, optional: false, began: 0, ended: 0 };
    let (offset, length) = if rng.one_in(5) { start.last_table() } else { start.random_cluster(rng) };
    let part = (offset + rng.below(length / ATOM) * ATOM, ATOM);
    let slow = if rng.one_in(3) {
        request(Kind::Write, part.0, pattern(1, part.0, part.1))
    } else {
        request(Kind::Read, offset, vec![0; length as usize])
    };
    let gives_up = match rng.below(3) {
        0 => request(Kind::Discard, offset, vec![0; length as usize]),
        1 => request(Kind::Zero, offset, vec![0; length as usize]),
        _ => request(Kind::Compressed, offset, squeezable(9, offset, length)),
    };
    let mut other = vec![gives_up, request(Kind::Flush, 0, Vec::new())];
    for op in 2..4 {
        let (offset, length) = start.random_cluster(rng);
        other.push(match rng.one_in(3) {
            true => request(Kind::Compressed, offset, squeezable(op, offset, length)),
            false => request(Kind::Write, offset, pattern(op, offset, length)),
        });
    }
    vec![vec![slow], other]
}

/// Requests of two to four clients: each sends its next one when the one before has been answered.
fn random_clients(rng: &mut Rng, start: &Start) -> Vec<Vec<Request>> {
    if rng.one_in(4) {
        return clients_that_reuse(rng, start);
    }
    let mut clients = vec![Vec::new(); 2 + rng.below(3) as usize];
    for request in random_requests(rng, start) {
        let client = rng.below(clients.len() as u64) as usize;
        clients[client].push(request);
    }
    clients
}

pub fn random_requests(rng: &mut Rng, start: &Start) -> Vec<Request> {
    // Most requests meet in one or two clusters.
    let around = start.random_range(rng, ATOM);
    let mut requests = Vec::new();
    for op in 0..2 + rng.below(7) {
        let (mut offset, mut length) = start.random_range(rng, ATOM);
        if rng.below(4) > 0 {
            let cluster = around.0 / start.cluster * start.cluster;
            let end = (cluster + start.cluster).min(start.guest_size);
            offset = cluster + offset % start.cluster;
            offset = offset.min(end - ATOM);
            length = length.min(end - offset);
        }
        let kind = [
            [Kind::Write; 4],
            [Kind::Read, Kind::Read, Kind::Read, Kind::Flush],
            [Kind::Zero, Kind::Zero, Kind::Discard, Kind::Flush],
            [Kind::Compressed; 4],
        ][[0, 0, 1, 1, 2, 3][rng.below(6) as usize]][rng.below(4) as usize];
        if kind == Kind::Discard || kind == Kind::Compressed {
            let cluster = offset / start.cluster * start.cluster;
            (offset, length) = (cluster, start.cluster.min(start.guest_size - cluster));
        }
        let data = match kind {
            Kind::Write => pattern(op + 1, offset, length),
            Kind::Compressed if rng.one_in(6) => pattern(op + 1, offset, length),
            Kind::Compressed => squeezable(op + 1, offset, length),
            Kind::Read => vec![0xee; length as usize],
            Kind::Zero | Kind::Discard => vec![0; length as usize],
            Kind::Flush => Vec::new(),
        };
        requests.push(Request { kind, offset, data, fua: rng.one_in(8), optional: false, began: 0, ended: 0 });
    }
    requests
}

/// Reads everything at the end, and checks that the history of each atom can be explained. Returns the final contents.
pub fn check_history(
    start: &Start,
    guest: &Guest,
    image: &Image,
    mut history: Vec<Request>,
    label: &str,
) -> Vec<Request> {
    let mut last = Vec::new();
    for cluster in &start.hot {
        let offset = cluster * start.cluster;
        let mut data = vec![0; (start.guest_size - offset).min(start.cluster) as usize];
        image.pread(&mut data, offset).unwrap();
        last.push(Request {
            kind: Kind::Read,
            offset,
            data,
            fua: false,
            optional: false,
            began: u64::MAX,
            ended: u64::MAX,
        });
    }
    history.extend(last.iter().cloned());
    for sector in guest.sectors() {
        for at in (0..512).step_by(ATOM as usize) {
            let before = &guest.latest(sector)[at..][..ATOM as usize];
            let offset = sector * 512 + at as u64;
            let requests: Vec<(&Request, &[u8])> = history.iter().filter_map(|r| Some((r, r.atom(offset)?))).collect();
            if requests.len() == 1 && requests[0].1 == before {
                continue; // nobody touched it
            }
            let fine = explained(&requests, 0, before);
            assert!(fine, "{label}: no order explains guest offset {offset}: {}", tell(&requests, before));
        }
    }
    last
}

fn tell(requests: &[(&Request, &[u8])], before: &[u8]) -> String {
    let mut text = format!("before {:02x?}", &before[32..40]);
    for (r, data) in requests {
        text += &format!(
            "\n  {:?} {}+{} [{}..{}] {:02x?}",
            r.kind,
            r.offset,
            r.data.len(),
            r.began,
            r.ended,
            &data[32..40]
        );
    }
    text
}

fn interleaving(start: &Start, seed: u64, dir: &qemu::Dir, name: &str) {
    let mut rng = Rng::new(seed);
    let disks = disks(start);
    let io = SimIo::new(rng.next_u64(), 1 + rng.clone().below(3), disks.to_vec());
    let cache = if rng.one_in(3) { 4 * start.cluster.min(4096) } else { 0 };
    let image = qcow2::wait::block_on(open_disks(&Blocking, &disks, start, cache)).unwrap();
    // A sequential prologue, so that clusters are in all states.
    let mut guest = start.guest();
    for op in 0..rng.below(6) {
        let (offset, length) = start.random_range(&mut rng, ATOM);
        if rng.one_in(4) {
            guest.issue(offset, &vec![0; length as usize]);
            image.write_zeroes(offset, length, ZeroFlags::default()).unwrap();
            continue;
        }
        if rng.one_in(3) && !image.header().has_data_file() {
            let (offset, length) = start.random_clusters(&mut rng);
            let data = squeezable(100 + op, offset, length);
            guest.issue(offset, &data);
            image.write(&[IoSrc::from(&data[..])], GuestOffset(offset), COMPRESSED).unwrap();
            continue;
        }
        let data = pattern(100 + op, offset, length);
        guest.issue(offset, &data);
        image.pwrite(&data, offset).unwrap();
    }
    if rng.one_in(2) {
        image.flush().unwrap();
    }
    let clients = random_clients(&mut rng, start);
    let label = format!("{name}, seed {seed}");
    let (clock, done) = (Cell::new(1), RefCell::new(Vec::new()));
    let (image_ref, io_ref, clock_ref, done_ref) = (&image, &io, &clock, &done);
    let tasks = clients.iter().map(|requests| {
        Box::pin(async move {
            for request in requests {
                perform(image_ref, io_ref, clock_ref, done_ref, request.clone()).await;
            }
        }) as Task<'_, ()>
    });
    let stuck = Scheduler::new(rng.next_u64()).run(tasks.collect(), || {}).err();
    let shape = |r: &Request| (r.kind, r.offset, r.data.len());
    let shapes: Vec<Vec<_>> = clients.iter().map(|c| c.iter().map(shape).collect()).collect();
    assert_eq!(stuck, None, "{label}: {shapes:?}");
    assert!(done.borrow().iter().all(|request| !request.optional), "{label}: refused");
    let last = check_history(start, &guest, &image, done.into_inner(), &label);
    image.close().unwrap();
    let [end, data] = disks.each_ref().map(|disk| disk.durable());
    let verdict = Judge::default().judge(&end);
    assert!(verdict.violations.is_empty() && verdict.leaks == 0, "{label}: {shapes:?} {verdict:?}");
    let layout = Layout::parse_files([&end, &data]).unwrap();
    for read in &last {
        for (n, expected) in read.data.chunks(512).enumerate() {
            let sector = read.offset / 512 + n as u64;
            let mut found = [0; 512];
            if layout.read(0, sector, &mut found).unwrap().is_none() {
                found = start.backing_sector(sector);
            }
            assert!(found == *expected, "{label}: sector {sector} reads otherwise on the disk after close");
            if start.is_raw() {
                let mut alone = vec![0; expected.len()];
                data.read(sector * 512, &mut alone);
                let same = alone == expected;
                assert!(same, "{label}: sector {sector} of the raw data file reads otherwise (D14)");
            }
        }
    }
    if seed.is_multiple_of(1000) {
        let path = dir.path("end.qcow2");
        std::fs::write(&path, end.to_file()).unwrap();
        qemu::check(&path, false);
    }
}

fn run(names: &[&str], scratch: &str) {
    let Some(dir) = qemu::dir(scratch) else { return };
    let all = cases().into_iter().chain(data_file_cases());
    let cases: Vec<Case> = all.filter(|case| names.contains(&case.name)).collect();
    assert_eq!(cases.len(), names.len());
    let count = number("INTERLEAVINGS", INTERLEAVINGS_BY_DEFAULT) / 2 / cases.len() as u64;
    let first = number("INTERLEAVE_SEED", 1);
    for case in &cases {
        let start = case.make(&dir);
        (first..first + count).for_each(|seed| interleaving(&start, seed, &dir, case.name));
        println!("{}: {count} interleavings", case.name);
    }
}

#[test]
fn concurrent_requests_on_subclusters_are_linearizable() {
    run(&["16 KiB, extended", "16 KiB, extended, backing", "16 KiB, extended, snapshot"], "interleave-extended");
}

#[test]
fn concurrent_requests_on_clusters_are_linearizable() {
    run(
        &[
            "512 B",
            "512 B, snapshots",
            "512 B, compressed, backing",
            "4 KiB, backing",
            "4 KiB, snapshot, compressed",
            "4 KiB, 2-bit refcounts, zstd",
        ],
        "interleave-standard",
    );
}

/// Guest clusters come back to the places that they left: what was let go may be punched, or written again, while an
/// older request is still on its way there.
#[test]
fn concurrent_requests_on_data_files_are_linearizable() {
    run(
        &[
            "512 B, data file",
            "16 KiB, extended, data file, backing",
            "512 B, raw data file",
            "16 KiB, extended, raw data file",
        ],
        "interleave-data-files",
    );
}

/// A write in place holds no claim. It looks up its host cluster; zeroes that keep that cluster are linked, and reads
/// see them; a third write of a part of the cluster writes copied zeroes around its data. If the first write's transfer
/// landed only then, what the zeroes had replaced would be seen again once the third is linked.
#[test]
fn a_zeroed_range_never_shows_an_older_write_again() {
    let Some(dir) = qemu::dir("interleave-zeroes") else { return };
    let case = cases().into_iter().find(|case| case.name == "512 B").unwrap();
    let start = case.make(&dir);
    for seed in 1..20_000 {
        let disk = Arc::new(SimDisk::new(start.image.clone()));
        let io = SimIo::new(seed, 3, vec![disk.clone()]);
        let image = qcow2::wait::block_on(open(&Blocking, &disk, &start, 0)).unwrap();
        let mut guest = start.guest();
        let before = pattern(100, 0, 512);
        guest.issue(0, &before);
        image.pwrite(&before, 0).unwrap();
        let request =
            |kind, offset, data| Request { kind, offset, data, fua: false, optional: false, began: 0, ended: 0 };
        let clients = [
            vec![request(Kind::Write, 0, pattern(1, 0, 512)), request(Kind::Read, 0, vec![0; 512])],
            vec![request(Kind::Zero, 0, vec![0; 512]), request(Kind::Write, 128, pattern(2, 128, 256))],
        ];
        let (clock, done) = (Cell::new(1), RefCell::new(Vec::new()));
        let (image_ref, io_ref, clock_ref, done_ref) = (&image, &io, &clock, &done);
        let tasks = clients.iter().map(|requests| {
            Box::pin(async move {
                for request in requests {
                    perform(image_ref, io_ref, clock_ref, done_ref, request.clone()).await;
                }
            }) as Task<'_, ()>
        });
        Scheduler::new(seed).run(tasks.collect(), || {}).unwrap();
        check_history(&start, &guest, &image, done.into_inner(), &format!("seed {seed}"));
        image.close().unwrap();
    }
}

/// Clusters that are compressed to the same length take each other's place in the file: what was kept of the one that was
/// there before must not be read as the one that is there now. Small reads of both are under way all the time.
#[test]
fn what_is_kept_decompressed_is_never_older_than_the_entry() {
    let Some(dir) = qemu::dir("interleave-kept") else { return };
    let extent_of = |disk: &SimDisk, cluster| Layout::parse(&disk.durable()).unwrap().entry(0, cluster).descriptor;
    for name in ["4 KiB, backing", "4 KiB, 2-bit refcounts, zstd"] {
        let start = cases().into_iter().find(|case| case.name == name).unwrap().make(&dir);
        let (cluster, mut reused) = (start.cluster, 0);
        for seed in 1..number("INTERLEAVINGS", INTERLEAVINGS_BY_DEFAULT) / 20 {
            let mut rng = Rng::new(seed);
            let disk = Arc::new(SimDisk::new(start.image.clone()));
            let io = SimIo::new(seed, 1 + seed % 3, vec![disk.clone()]);
            let image = qcow2::wait::block_on(open(&Blocking, &disk, &start, 0)).unwrap();
            let mut guest = start.guest();
            let (from, to) = (start.hot[0] * cluster, start.hot[1] * cluster);
            let before = squeezable(1, from, cluster);
            guest.issue(from, &before);
            guest.issue(to, &vec![0; cluster as usize]);
            image.write_zeroes(to, cluster, ZeroFlags { may_unmap: true, ..ZeroFlags::default() }).unwrap();
            image.write(&[IoSrc::from(&before[..])], GuestOffset(from), COMPRESSED).unwrap();
            image.flush().unwrap();
            let first = extent_of(&disk, from / cluster);
            let request =
                |kind, offset, data| Request { kind, offset, data, fua: false, optional: false, began: 0, ended: 0 };
            let small = |rng: &mut Rng, at: u64| {
                request(Kind::Read, at + rng.below(cluster / ATOM) * ATOM, vec![0; ATOM as usize])
            };
            let mut readers = vec![Vec::new(); 2];
            for _ in 0..8 {
                let at = [from, to][rng.below(2) as usize];
                readers[rng.below(2) as usize].push(small(&mut rng, at));
            }
            let writer = vec![
                small(&mut rng, from),
                request(Kind::Zero, from, vec![0; cluster as usize]),
                request(Kind::Flush, 0, Vec::new()),
                request(Kind::Flush, 0, Vec::new()), // a reader may have kept the first one from freeing it
                request(Kind::Compressed, to, squeezable(8, to, cluster)),
                small(&mut rng, to),
            ];
            let mut writer = writer;
            writer[1].fua = true; // may unmap
            let clients = [readers, vec![writer]].concat();
            let (clock, done) = (Cell::new(1), RefCell::new(Vec::new()));
            let (image_ref, io_ref, clock_ref, done_ref) = (&image, &io, &clock, &done);
            let tasks = clients.iter().map(|requests| {
                Box::pin(async move {
                    for request in requests {
                        perform(image_ref, io_ref, clock_ref, done_ref, request.clone()).await;
                    }
                }) as Task<'_, ()>
            });
            let label = format!("{name}, seed {seed}");
            let stuck = Scheduler::new(seed).run(tasks.collect(), || {}).err();
            assert_eq!(stuck, None, "{label}");
            check_history(&start, &guest, &image, done.into_inner(), &label);
            image.close().unwrap();
            reused += u64::from(extent_of(&disk, to / cluster) == first);
        }
        println!("{name}: the place was taken over {reused} times");
        assert!(reused > 50, "{name}: the place was taken over {reused} times only");
    }
}
