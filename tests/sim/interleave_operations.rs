//! Interleavings with operations that hold the image alone: snapshots are taken, applied and deleted, the disk gets other
//! sizes, bitmaps come and go, while clients read, write, zero, discard and compress. To each byte of the disk a snapshot
//! that is taken is a read, one that is applied a write, and a cut of the disk (smaller, and as large as before again)
//! zeroes: some order has to explain all of them. What an enabled bitmap was told to record is dirty in it.
//!
//! `INTERLEAVINGS` and `INTERLEAVE_SEED` as for the others.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use crate::interleave::{Kind, Request, check_history, perform, random_requests};
use crate::judge::Judge;
use crate::stage::{Case, Operation, Start, cases, data_file_cases, disks, open_disks, pattern};
use crate::{number, qemu};
use qcow2::Error;
use qcow2::image::{Image, Preallocation};
use qcow2::storage::Blocking;
use qcow2::storage::sim::{Rng, Scheduler, SimIo, Task};
use qcow2::wait::block_on;

const INTERLEAVINGS_BY_DEFAULT: u64 = 6_000;

/// What a client sends.
#[derive(Debug, Clone)]
enum Sent {
    Request(Request),
    Operation(Operation),
    /// The disk ends here, and where it ended before again.
    Cut(u64),
}

/// An operation on a bitmap that has been done.
struct Noted {
    operation: Operation,
    ended: u64,
}

#[derive(Default)]
struct Done {
    requests: RefCell<Vec<Request>>,
    /// What operations did to the disk.
    effects: RefCell<Vec<Request>>,
    bitmaps: RefCell<Vec<Noted>>,
    /// Snapshots that were taken: their ids, and when.
    taken: RefCell<Vec<(String, u64, u64)>>,
}

fn random_operation(rng: &mut Rng, start: &Start) -> Sent {
    let may_resize = start.is_v3() || start.snapshots.is_empty();
    loop {
        let name = format!("b{}", rng.below(2));
        return Sent::Operation(match rng.below(10) {
            0 | 1 if start.data_file.is_none() => Operation::Create,
            2 if !start.snapshots.is_empty() => Operation::Apply(0),
            3 if !start.snapshots.is_empty() => Operation::Delete(0),
            4 if may_resize => {
                let cluster = start.hot[rng.below(start.hot.len() as u64) as usize];
                return Sent::Cut((cluster * start.cluster + rng.below(start.cluster / 512) * 512).max(512));
            }
            5 if may_resize => {
                let modes = [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
                let size = start.guest_size + 512 * rng.below(4 * start.cluster / 512);
                Operation::Resize { size, mode: modes[rng.below(3) as usize] }
            }
            6 if start.is_v3() => Operation::Add { name, granularity: 512, disabled: false },
            7 if start.is_v3() => Operation::Clear(name),
            8 if start.is_v3() => {
                [Operation::Remove(name.clone()), Operation::Enable(name, rng.one_in(2))][rng.below(2) as usize].clone()
            }
            9 if start.is_v3() => Operation::Merge(name, format!("b{}", rng.below(2))),
            _ => continue,
        });
    }
}

/// Two to four clients, with one to three operations among their requests.
fn random_clients(rng: &mut Rng, start: &Start) -> Vec<Vec<Sent>> {
    let mut sent: Vec<Sent> = random_requests(rng, start).into_iter().map(Sent::Request).collect();
    for _ in 0..1 + rng.below(3) {
        let at = rng.below(sent.len() as u64 + 1) as usize;
        sent.insert(at, random_operation(rng, start));
    }
    let mut clients = vec![Vec::new(); 2 + rng.below(3) as usize];
    for one in sent {
        let client = rng.below(clients.len() as u64) as usize;
        clients[client].push(one);
    }
    clients
}

/// What an operation does to the disk, as requests.
fn effects(start: &Start, kind: Kind, began: u64, ended: u64, content: impl Fn(u64) -> [u8; 512]) -> Vec<Request> {
    let of_sector = |&sector: &u64| {
        let data = content(sector).to_vec();
        Request { kind, offset: sector * 512, data, fua: false, optional: false, began, ended }
    };
    start.hot_sectors.iter().map(of_sector).collect()
}

async fn send(image: &Image, io: &SimIo, start: &Start, clock: &Cell<u64>, done: &Done, sent: Sent) {
    let tick = || clock.replace(clock.get() + 1);
    let operation = match sent {
        Sent::Request(mut request) => {
            // On a disk that ends elsewhere, half a cluster is not discarded.
            let end = request.offset + request.data.len() as u64;
            request.optional = request.kind == Kind::Discard && !end.is_multiple_of(start.cluster);
            return perform(image, io, clock, &done.requests, request).await;
        }
        Sent::Cut(size) => {
            let began = tick();
            let cut = Operation::Resize { size, mode: Preallocation::Off };
            cut.perform(image, io).await.unwrap();
            Operation::Resize { size: start.guest_size, mode: Preallocation::Off }.perform(image, io).await.unwrap();
            let ended = tick();
            let all = effects(start, Kind::Zero, began, ended, |_| [0; 512]);
            done.effects.borrow_mut().extend(all.into_iter().filter(|request| request.offset >= size));
            return;
        }
        Sent::Operation(operation) => operation,
    };
    let began = tick();
    if operation == Operation::Create {
        match image.snapshot_create_with(io, "taken", &Default::default()).await {
            Ok(snapshot) => {
                let id = String::from_utf8(snapshot.id).unwrap();
                done.taken.borrow_mut().push((id, began, tick()));
            }
            Err(e) => assert!(matches!(e, Error::TooLarge { .. }), "{e}"), // narrow refcounts
        }
        return;
    }
    // The snapshots that were there at the start are known by their names: indices move.
    let result = match &operation {
        Operation::Apply(index) => image.snapshot_apply_with(io, &format!("s{index}")).await,
        Operation::Delete(index) => image.snapshot_delete_with(io, &format!("s{index}"), None).await,
        operation => operation.perform(image, io).await,
    };
    let ended = tick();
    match (&operation, result) {
        (Operation::Apply(index), Ok(())) => {
            let contents: BTreeMap<u64, _> =
                start.hot_sectors.iter().copied().zip(start.snapshots[*index].iter().cloned()).collect();
            let all = effects(start, Kind::Write, began, ended, |sector| *contents[&sector]);
            done.effects.borrow_mut().extend(all);
        }
        (_, Ok(())) => done.bitmaps.borrow_mut().push(Noted { operation, ended }),
        (_, Err(Error::SnapshotMissing { .. } | Error::Bitmap { .. } | Error::TooLarge { .. })) => {}
        // Somebody else has made it larger already.
        (Operation::Resize { .. }, Err(Error::Argument { name: "preallocation", .. })) => {}
        (_, Err(e)) => panic!("{operation:?}: {e}"),
    }
}

/// Every write that began after a bitmap was last added, cleared or enabled is dirty in it.
fn check_bitmaps(image: &Image, done: &Done, label: &str) {
    for bitmap in image.bitmap_list().unwrap() {
        assert!(!bitmap.inconsistent && bitmap.unusable.is_none(), "{label}: {bitmap:?}");
        let is_about = |noted: &&Noted| match &noted.operation {
            Operation::Add { name, .. }
            | Operation::Clear(name)
            | Operation::Enable(name, _)
            | Operation::Remove(name) => *name == bitmap.name,
            _ => false,
        };
        let noted = done.bitmaps.borrow();
        let since = noted.iter().filter(is_about).map(|noted| noted.ended).max().unwrap();
        if !bitmap.enabled {
            continue;
        }
        let extents = image.bitmap_extents(&bitmap.name, 0, image.size(), usize::MAX).unwrap();
        let is_change =
            |request: &&Request| matches!(request.kind, Kind::Write | Kind::Compressed) && !request.optional;
        for request in done.requests.borrow().iter().filter(is_change).filter(|request| request.began > since) {
            let (from, to) = (request.offset, request.offset + request.data.len() as u64);
            let clean = extents.iter().find(|e| !e.dirty && e.start.0 < to && from < e.start.0 + e.length);
            assert!(clean.is_none(), "{label}: {} misses {from}..{to}: {clean:?}", bitmap.name);
        }
    }
}

fn interleaving(start: &Start, seed: u64, name: &str) {
    let mut rng = Rng::new(seed);
    let disks = disks(start);
    let io = SimIo::new(rng.next_u64(), 1 + rng.clone().below(3), disks.to_vec());
    let cache = if rng.one_in(3) { 4 * start.cluster.min(4096) } else { 0 };
    let image = block_on(open_disks(&Blocking, &disks, start, cache)).unwrap();
    let mut guest = start.guest();
    let (clock, done) = (Cell::new(1), Done::default());
    if start.is_v3() && rng.one_in(2) {
        let operation = Operation::Add { name: "b0".into(), granularity: 4096, disabled: false };
        block_on(operation.perform(&image, &Blocking)).unwrap();
        done.bitmaps.borrow_mut().push(Noted { operation, ended: 0 });
    }
    for op in 0..rng.below(4) {
        let (offset, length) = start.random_range(&mut rng, 512);
        let data = pattern(100 + op, offset, length);
        guest.issue(offset, &data);
        image.pwrite(&data, offset).unwrap();
    }
    let clients = random_clients(&mut rng, start);
    let label = format!("{name}, seed {seed}");
    let (image_ref, io_ref, clock_ref, done_ref) = (&image, &io, &clock, &done);
    let tasks = clients.iter().map(|sent| {
        Box::pin(async move {
            for one in sent {
                send(image_ref, io_ref, start, clock_ref, done_ref, one.clone()).await;
            }
        }) as Task<'_, ()>
    });
    let stuck = Scheduler::new(rng.next_u64()).run(tasks.collect(), || {}).err();
    assert_eq!(stuck, None, "{label}: {clients:?}");
    check_bitmaps(&image, &done, &label);
    for (id, began, ended) in done.taken.borrow().iter() {
        let snapshot = image.snapshot_open(id).unwrap();
        let content = |sector| {
            let mut found = [0; 512];
            // Taken while the disk was cut: there is nothing there.
            if (sector + 1) * 512 <= snapshot.size() {
                snapshot.pread(&mut found, sector * 512).unwrap();
            }
            found
        };
        let all = effects(start, Kind::Read, *began, *ended, content);
        done.effects.borrow_mut().extend(all.into_iter().filter(|read| read.offset + 512 <= snapshot.size()));
        snapshot.close().unwrap();
    }
    let size = image.size();
    if size < start.guest_size {
        // Applied was a snapshot that was taken of a cut disk: not among these operations.
        panic!("{label}: the disk has {size} bytes");
    }
    let history = [done.requests.take(), done.effects.take()].concat();
    check_history(start, &guest, &image, history, &label);
    image.close().unwrap();
    let [end, _] = disks.each_ref().map(|disk| disk.durable());
    let verdict = Judge::default().judge(&end);
    assert!(verdict.violations.is_empty() && verdict.leaks == 0, "{label}: {clients:?} {verdict:?}");
}

#[test]
fn operations_among_requests_are_linearizable() {
    let Some(dir) = qemu::dir("interleave-operations") else { return };
    let wanted = std::env::var("CRASH_CASE").unwrap_or_default();
    let names = [
        "512 B",
        "512 B, snapshots",
        "4 KiB, snapshot, compressed",
        "4 KiB, v2, snapshot",
        "4 KiB, 2-bit refcounts, zstd",
        "16 KiB, extended, backing",
        "16 KiB, extended, snapshot",
        "512 B, data file",
        "16 KiB, extended, data file, backing",
        "16 KiB, extended, raw data file",
    ];
    let is_wanted = |case: &Case| names.contains(&case.name) && case.name.contains(&wanted);
    let cases: Vec<Case> = cases().into_iter().chain(data_file_cases()).filter(is_wanted).collect();
    let count = number("INTERLEAVINGS", INTERLEAVINGS_BY_DEFAULT) / cases.len() as u64;
    let first = number("INTERLEAVE_SEED", 1);
    for case in &cases {
        let start = case.make(&dir);
        (first..first + count).for_each(|seed| interleaving(&start, seed, case.name));
        println!("{}: {count} interleavings", case.name);
    }
}
